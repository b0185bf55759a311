"""A GGUF file that llama.cpp's converter writes is the model that it was written from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from conformance.checkpoints import Flavour, build, scalings
from gguf_twin import CONVERTERS, write_twin
from safetensors.torch import load_file, save_file

import virtual_weights as vw
from virtual_weights.architecture.gguf import architectures, serving
from virtual_weights.errors import ArchitectureError
from virtual_weights.runtime.running.model import ModuleRunner

BASE = 10000.0
TOKENS = torch.randint(4, 99, (2, 20), generator=torch.Generator().manual_seed(3))


@dataclass
class Case:
    """A checkpoint of a type: settings beside those of the conformance checks, and settings that are taken away."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    runs: bool = True

    def saved(self, folder: Path) -> Path:
        build(self.kind, Flavour("case", self.settings), folder)
        tensors = load_file(folder / "model.safetensors")  # on a grid, so that 1 + gain is exact
        save_file(
            {k: (x * 4096).round() / 4096 for k, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        return folder


def rope(theta: float = BASE, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


HALF = rope(partial_rotary_factor=0.5)
OWN_HEAD = {"head_dim": 8}
SLIDING = ["sliding_attention", "full_attention"] * 2
YARN = scalings(8)["yarn"]

CASES = {
    "llama": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear": Case("llama", rope(500.0, rope_type="linear", factor=4.0)),
    "llama, yarn": Case("llama", rope(500.0, **YARN)),
    "llama, yarn with a factor of its own": Case("llama", rope(500.0, **YARN, attention_factor=1.5)),
    "llama, llama3": Case("llama", rope(5000.0, **{**scalings(8)["llama3"], "original_max_position_embeddings": 8192})),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3"),
    "gpt2": Case("gpt2", {"n_inner": None, "activation_function": "gelu_new"}),
    "gemma": Case("gemma", rope()),
    "gemma2": Case("gemma2", {"query_pre_attn_scalar": 16, **rope()}),
    "gemma2, scores over sqrt(d/heads)": Case(
        "gemma2", {"num_hidden_layers": 46, "layer_types": None, "query_pre_attn_scalar": 8, **rope()}, runs=False
    ),
    "gemma3": Case("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": None, "num_hidden_layers": 7}),
    "gemma3, one kind of layers": Case(
        "gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 4}
    ),
    "gemma3, scores over sqrt(d/heads)": Case(
        "gemma3_text", {"num_hidden_layers": 62, "layer_types": None, "query_pre_attn_scalar": 8}, runs=False
    ),
    "phi2": Case("phi", {"intermediate_size": 192, "num_key_value_heads": 6, **HALF}),
    "phi3": Case("phi3", HALF),
    "phi3, longrope": Case("phi3", {"original_max_position_embeddings": 32, **rope(**scalings(4)["longrope"])}),
    "gptneox": Case("gpt_neox", HALF),
    "gptneox, one part after the other": Case("gpt_neox", {"use_parallel_residual": False, **HALF}),
    "falcon, one key head": Case("falcon", {"ffn_hidden_size": 192, **rope()}),
    "falcon, two norms": Case("falcon", {"ffn_hidden_size": 192, "new_decoder_architecture": True, **rope()}),
    "falcon, one norm": Case(
        "falcon",
        {"ffn_hidden_size": 192, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, **rope()},
    ),
    "bloom": Case("bloom"),
    "mpt": Case("mpt", {"layer_norm_epsilon": 1e-5}),
    "stablelm": Case("stablelm", {"use_qkv_bias": True, **HALF}),
    "stablelm, parallel": Case("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, **HALF}),
    "starcoder": Case("gpt_bigcode", {"n_inner": None}),
    "starcoder2": Case("starcoder2"),
    "olmo": Case("olmo"),
    "olmo2": Case("olmo2"),
    "olmo3": Case("olmo3", {"layer_types": SLIDING}),
    "command-r": Case("cohere"),
    "command-r, norms on queries": Case("cohere", {"use_qk_norm": True}),
    "cohere2": Case("cohere2", {"layer_types": None, **OWN_HEAD}),
    "chatglm": Case("glm", {**OWN_HEAD, "rms_norm_eps": 1e-5, **HALF}),
    "glm4": Case("glm4", HALF),
    "granite": Case("granite"),
    "nemotron": Case("nemotron", {**OWN_HEAD, **HALF}),
    "exaone4": Case("exaone4", {"layer_types": SLIDING}),
    "exaone4, no window": Case("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "smollm3": Case("smollm3", {"no_rope_layers": None}),
    "arcee": Case("arcee"),
    "hunyuan-dense": Case("hunyuan_v1_dense"),
    "seed_oss": Case("seed_oss"),
    "ernie4_5": Case("ernie4_5"),
    "jais2": Case("jais2", OWN_HEAD),
    "apertus": Case("apertus", rope(500.0), runs=False),
    "mistral3": Case("mistral", {"sliding_window": None}),
    "ministral3": Case("ministral3"),
}


def assert_same(ours: Any, theirs: Any, what: str, bound: float = 1e-12) -> None:
    assert (ours is None) == (theirs is None), what
    if ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, msg=lambda text: f"{what}: {text}")


def comparable(spec: Any, stored: Any) -> Any:
    """What a model is, less what is in the file otherwise: 1 is added to gains there, and a vocabulary is as long as
    its embedding."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        if not is_dataclass(value) or isinstance(value, type):
            return value
        changed = {part.name: plain(getattr(value, part.name)) for part in fields(value)}
        other = {"plus": 0.0, "vocab": None} | ({} if stored is None else {"scaling": {}})
        return replace(value, **changed | {name: other[name] for name in changed if name in other})

    return plain(spec)


def assert_twins(stream: Any, expected: Any) -> None:
    stream, expected = stream.to(torch.float64), expected.to(torch.float64)
    stored = stream.weight("factors", "rotary")  # in place of a scaling; of float32
    assert comparable(stream.spec, stored) == comparable(expected.spec, stored)
    for group in expected.groups:
        for port in group.ports:
            ours, theirs = stream.read(port, group.id), expected.read(port, group.id)
            for part in ("maps", "constants", "shift"):
                assert_same(getattr(ours, part), getattr(theirs, part), f"{part} of {group.id}.{port}")
        if group.writes:
            assert_same(stream.write(group.id).double(), expected.write(group.id).double(), f"what {group.id} writes")
        if group.kind == "head":
            bound = 1e-12 if stored is None else 1e-6
            assert_same(stream.rotation(3, group.id), expected.rotation(3, group.id), f"how {group.id} turns", bound)


@pytest.mark.parametrize("name", CASES)
def test_a_converted_file_is_its_checkpoint(name: str, tmp_path: Path) -> None:
    folder = CASES[name].saved(tmp_path / "model")
    stream = vw.open(write_twin(folder, tmp_path / "twin.gguf"))
    assert_twins(stream, vw.open(folder))
    if CASES[name].runs:
        runner = ModuleRunner(stream)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            torch.testing.assert_close(runner.module(TOKENS).logits, model.eval()(TOKENS).logits, rtol=1e-4, atol=1e-5)
        assert runner.exactness_error < 1e-5


LOCAL = {"full_attention": rope(1e6)["rope_parameters"], "sliding_attention": rope()["rope_parameters"]}
FOURTH = ["sliding_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize(
    ("kind", "settings", "absent"),
    [
        (
            "gemma3_text",
            {"query_pre_attn_scalar": 16, "layer_types": FOURTH, "rope_parameters": LOCAL},
            "freq_base_swa",
        ),
        ("olmo3", {"layer_types": FOURTH}, "sliding_window_pattern"),
        ("exaone4", {"layer_types": FOURTH}, "sliding_window_pattern"),
    ],
)
def test_what_a_file_leaves_out_is_what_llama_cpp_takes(
    kind: str, settings: dict[str, Any], absent: str, tmp_path: Path
) -> None:
    folder = Case(kind, settings).saved(tmp_path / "model")
    flags = [kind == "sliding_attention" for kind in FOURTH]
    changes: dict[str, Any] = {"rope.freq_base_swa": None, "attention.sliding_window_pattern": flags}
    if absent == "sliding_window_pattern":
        changes = {"attention.sliding_window_pattern": None}
    assert_twins(vw.open(write_twin(folder, tmp_path / "twin.gguf", **changes)), vw.open(folder))


@pytest.mark.parametrize("name", ["qwen2", "phi2", "chatglm"])
def test_queries_keys_and_values_may_be_one_tensor(name: str, tmp_path: Path) -> None:
    folder = CASES[name].saved(tmp_path / "model")
    stream = vw.open(write_twin(folder, tmp_path / "twin.gguf", merged=True))
    assert_twins(stream, vw.open(folder))
    assert ModuleRunner(stream).exactness_error < 1e-5


def test_every_architecture_is_tried() -> None:
    tried = {
        gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, converter.architecture)] for converter in CONVERTERS.values()
    }
    assert tried == set(architectures())
    assert {case.kind for case in CASES.values()} == set(CONVERTERS)
    assert all(serving(kind) for kind in CONVERTERS)
    assert (serving("mistral"), serving("ministral3")) == (("llama", "mistral3"), ("mistral3",))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3", {"expert_count": 4}, ["qwen3.expert_count = 4"]),
        ("qwen3", {"nextn_predict_layers": 1}, ["qwen3.nextn_predict_layers = 1"]),
        ("qwen3", {"rope.dimension_sections": [4, 4, 0, 0]}, ["qwen3.rope.dimension_sections"]),
        ("qwen3", {"pooling_type": 3}, ["qwen3.pooling_type"]),
        ("qwen3", {"attention.scale": 0.3}, ["qwen3.attention.scale", "0.25"]),
        ("qwen3", {"rope.freq_base_swa": 7.0}, ["qwen3.rope.freq_base_swa = 7.0", "one base for all layers"]),
        (
            "qwen3",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            ["'yarn'", "original_context_length None"],
        ),
        ("qwen3", {"rope.scaling.type": "longrope"}, ["'longrope'", "rope_factors_short.weight"]),
        ("qwen3", {"rope.scaling.attn_factor": 1.5}, ["attn_factor 1.5"]),
        ("qwen3", {"rope.scaling.yarn_ext_factor": 0.5}, ["yarn_ext_factor = 0.5"]),
        ("qwen3", {"rope.scaling.factor": [4, 4]}, ["factor = [4, 4]", "a positive number"]),
        ("gemma", {"embedding_scale": 2.0}, ["gemma.embedding_scale = 2.0"]),
        ("gemma", {"final_logit_softcapping": 30.0}, ["gemma.final_logit_softcapping"]),
        ("gemma3", {"attention.sliding_window_pattern": [True, False]}, ["sliding_window_pattern"]),
        ("gemma3", {"rope.dimension_count": 8}, ["8 of 16"]),
        ("granite", {"logit_scale": None}, ["lacks granite.logit_scale"]),
        ("granite", {"rope.scaling.finetuned": False}, ["granite.rope.scaling.finetuned"]),
        ("granite", {"attention.scale": "wide"}, ["attention.scale", "a positive number"]),
        ("command-r", {"logit_scale": None}, ["lacks command-r.logit_scale"]),
        ("cohere2", {"attention.sliding_window": None}, ["lacks cohere2.attention.sliding_window"]),
        ("gptneox", {"use_parallel_residual": None}, ["lacks gptneox.use_parallel_residual"]),
        ("starcoder", {"attention.head_count_kv": 6}, ["starcoder.attention.head_count_kv = 6"]),
        ("mpt", {"attention.max_alibi_bias": 0.0}, ["mpt.attention.max_alibi_bias = 0.0"]),
        ("olmo", {"attention.clamp_kqv": 8.0}, ["olmo.attention.clamp_kqv = 8.0"]),
        ("falcon, one key head", {"attention.max_alibi_bias": 8.0}, ["falcon.attention.max_alibi_bias"]),
        (
            "seed_oss",
            {"attention.head_count_kv": [2, 2, 2, 3]},
            ["attention.head_count_kv", "one value for all layers"],
        ),
        ("phi3, longrope", {"rope.scaling.original_context_length": None}, ["'longrope'", "stored short factors"]),
    ],
)
def test_what_a_file_may_say_and_no_map_can_is_refused_by_name(
    name: str, changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    file = write_twin(CASES[name].saved(tmp_path / "model"), tmp_path / "twin.gguf", **changes)
    with pytest.raises(ArchitectureError) as caught:
        vw.open(file)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_factor_that_is_not_longropes_own_is_kept(tmp_path: Path) -> None:
    folder = CASES["phi3, longrope"].saved(tmp_path / "model")
    other_factor: dict[str, Any] = {"rope.scaling.attn_factor": 1.5}
    usual = vw.open(write_twin(folder, tmp_path / "usual.gguf")).spec.attentions[0]
    other = vw.open(write_twin(folder, tmp_path / "other.gguf", **other_factor)).spec.attentions[0]
    assert usual.scale == pytest.approx(8**-0.5 * (1 + math.log(2) / math.log(32)))
    assert other.scale == pytest.approx(8**-0.5 * 1.5**2)


def test_an_activation_whose_numbers_are_not_read_does_not_run(tmp_path: Path) -> None:
    file = write_twin(CASES["apertus"].saved(tmp_path / "model"), tmp_path / "twin.gguf")
    with pytest.raises(ArchitectureError, match="numbers of its activation"):
        ModuleRunner(vw.open(file)).module  # noqa: B018 - that is when it is built
