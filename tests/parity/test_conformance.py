"""Every model type that opens, on tiny checkpoints: what its maps say is what transformers computes; faults are found.

A part of ``make conformance``, which runs all variants.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conformance.checkpoints import Flavour, build, flavours
from conformance.checkpoints import model_types as conformance_types
from conformance.law import judge

import virtual_weights as vw
from virtual_weights.architecture import model_types
from virtual_weights.errors import ArchitectureError

TYPES = sorted(set(model_types()) & set(conformance_types()))


def some(model_type: str) -> list[Flavour]:
    """The plain checkpoint of a type, and two of its variants."""
    base, *others = flavours(model_type)
    return [base, *random.Random(model_type).sample(others, min(2, len(others)))]


@pytest.mark.parametrize("model_type", TYPES)
def test_maps_say_what_transformers_computes(model_type: str, tmp_path: Path) -> None:
    verdicts = [judge(model_type, flavour, tmp_path / flavour.name) for flavour in some(model_type)]
    assert verdicts[0].verdict == "conformant", verdicts[0]
    assert all(verdict.verdict in ("conformant", "refused", "not buildable") for verdict in verdicts), verdicts


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"scale": 1.0}),
    ("llama", {"rotary": "pairs"}),
    ("llama", {"rotary": "none"}),
    ("llama", {"rotary_back": True}),
    ("llama", {"eps": 1e-4}),
    ("llama", {"plus": 1.0}),
    ("llama", {"act": "gelu"}),
    ("llama", {"name": {"gate": "mlp.up_proj", "up": "mlp.gate_proj"}}),
    ("llama", {"name": {"attn.norm": "post_attention_layernorm", "mlp.norm": "input_layernorm"}}),
    ("qwen2", {"qkv_bias": False}),
    ("gemma", {"plus": 0.0}),
    ("gemma", {"embed_factor": 1.0}),
    ("gemma2", {"logit_cap": 0.0}),
    ("gemma2", {"attn_cap": 0.0}),
    ("gemma2", {"scale": "$d_head^-0.5"}),
    ("gemma2", {"name": {"attn.after": "-"}}),
    ("gemma2", {"name": {"attn.after": "pre_feedforward_layernorm", "mlp.norm": "post_attention_layernorm"}}),
    ("gemma3_text", {"qk_plus": 0.0}),
    ("gemma3_text", {"qk_norm": ""}),
    ("gemma3_text", {"layer_pattern": 1, "local_theta": ""}),
    ("olmo2", {"name": {"attn.norm": "post_attention_layernorm", "attn.after": "-"}}),
    ("olmo2", {"qk_norm": "head"}),
    ("qwen3", {"qk_norm": "all"}),
    ("qwen3", {"qk_after_rotary": True}),
    ("hunyuan_v1_dense", {"qk_after_rotary": False}),
    ("granite", {"attn_factor": 1.0}),
    ("granite", {"mlp_factor": 1.0}),
    ("granite", {"logit_factor": "$logits_scaling"}),
    ("granite", {"scale": "$d_head^-0.5"}),
    ("hyperclovax", {"logit_factor": "1/$logits_scaling"}),
    ("cohere", {"parallel": False}),
    ("cohere", {"rotary": "halves"}),
    ("cohere", {"logit_factor": 1.0}),
    ("cohere", {"norm": "rms"}),
    ("smollm3", {"no_rotary": ""}),
    ("smollm3", {"no_rotary": "$no_rope_layers"}),
    ("cohere2", {"no_rotary": ""}),
    ("exaone4", {"no_rotary": "sliding_attention"}),
    ("gpt2", {"fused": "heads"}),
    ("gpt2", {"transposed": False}),
    ("gpt_neox", {"fused": "blocks"}),
    ("gpt_neox", {"partial": ""}),
    ("gpt_neox", {"parallel": False}),
    ("phi3", {"fused_mlp": "up gate"}),
    ("phi3", {"fused": "groups"}),
    ("glm", {"rotary": "halves"}),
    ("glm4", {"name": {"attn.after": "post_mlp_layernorm", "mlp.after": "post_self_attn_layernorm"}}),
    ("falcon", {"fused": "heads"}),
    ("codegen", {"fused": "heads"}),
    ("gptj", {"rotary": "halves"}),
    ("gpt_neo", {"scale": "$d_head^-0.5"}),
    ("opt", {"pos_offset": 0}),
    ("biogpt", {"embed_factor": 1.0}),
    ("bloom", {"fused": "groups", "embed_norm": False}),
    ("nanochat", {"rotary_back": False}),
    ("nanochat", {"embed_norm": False}),
    ("bitnet", {"name": {"attn.inner": "-"}}),
    ("persimmon", {"qk_kind": "rms"}),
    ("nemotron", {"plus": 0.0}),
    ("nemotron", {"act": "silu"}),
    ("xglm", {"sinusoidal": "d"}),
    ("ctrl", {"final_eps": ""}),
]


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {as_toml(item)}' for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


@pytest.mark.parametrize(("model_type", "fault"), FAULTS, ids=[f"{name} {fault}" for name, fault in FAULTS])
def test_a_fault_in_a_table_is_found(model_type: str, fault: dict[str, Any], tmp_path: Path) -> None:
    table = tmp_path / "fault.toml"
    lines = [f"{key} = {as_toml(value)}" for key, value in fault.items()]
    table.write_text("\n".join([f'["{model_type}"]', f'like = "{model_type}"', *lines]))
    verdict = judge(model_type, flavours(model_type)[0], tmp_path / "model", table=table)
    assert verdict.verdict in ("wrong", "refused"), verdict


@pytest.mark.parametrize(
    ("model_type", "key"),
    [("granite", "residual_multiplier"), ("granite", "attention_multiplier"), ("gemma2", "final_logit_softcapping")],
)
def test_a_factor_of_zero_is_not_taken_for_none(model_type: str, key: str, tmp_path: Path) -> None:
    build(model_type, flavours(model_type)[0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ArchitectureError, match=f"{key} = 0"):
        vw.open(tmp_path, config={**config, key: 0})
