"""An adapter folded into its base is the merged model: the same maps, the same edges, the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_twin import write_twin
from safetensors.torch import save_file
from tiny_models import tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.errors import ArchitectureError, CheckpointError, UnsafeCheckpointError

RANK, ALPHA = 3, 5.0
MODULES = {
    "llama-grouped-untied": (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    "gpt2-untied-narrow": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "neox-parallel-partial-rotary": ("attention.query_key_value", "mlp.dense_4h_to_h"),
}


def write_adapter(folder: Path, model: nn.Module, leaves: tuple[str, ...], **settings: Any) -> dict[str, Tensor]:
    """An adapter of these modules of every layer; by name of the weight what merging adds, as it is stored."""
    generator = torch.Generator().manual_seed(7)
    transposed, added, tensors = "c_attn" in str(leaves), dict[str, Tensor](), dict[str, Tensor]()
    for name, module in model.named_modules():
        if name.endswith(leaves):
            weight: Any = module.weight
            shape = weight.shape[::-1] if transposed else weight.shape
            down, up = (
                torch.randn(RANK, shape[1], generator=generator),
                torch.randn(shape[0], RANK, generator=generator),
            )
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            delta = up.double() @ down.double()
            added[f"{name}.weight"] = (delta.T if transposed else delta).contiguous()
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": transposed, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    assert added
    return added


def merged(model: nn.Module, added: dict[str, Tensor], scale: Callable[[str], float]) -> nn.Module:
    with torch.no_grad():
        for name, delta in added.items():
            parameter = model.get_parameter(name)
            parameter.copy_((parameter.double() + scale(name) * delta).to(parameter.dtype))
    return model


@pytest.mark.parametrize("name", MODULES)
def test_base_with_adapter_is_the_merged_model(name: str, tmp_path: Path) -> None:
    model = tiny(name, seed=3)
    model.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    added = write_adapter(tmp_path / "adapter", model, MODULES[name])
    stream = vw.open(tmp_path / "base", attach=[tmp_path / "adapter"])
    base, whole = vw.open(tmp_path / "base"), vw.open(merged(model, added, lambda _: ALPHA / RANK))
    for port in stream.groups.ports:
        found, wanted, before = (
            vw.Composition(port, None, "all", "float64")(s).numbers("strength") for s in (stream, whole, base)
        )
        assert torch.allclose(found, wanted, rtol=1e-6, equal_nan=True)
        if port != "unembed" or "down" in str(added) or "proj" in str(added):
            assert not torch.allclose(found, before, rtol=1e-2, equal_nan=True)
    tokens = torch.tensor([[3, 17, 5, 30, 1, 22]])
    one, other = (vw.Run.on_tokens(s, tokens).module(tokens).logits for s in (stream, whole))
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert stream.source.fingerprint not in (base.source.fingerprint, whole.source.fingerprint)


def test_a_gguf_base_takes_the_same_adapter(tmp_path: Path) -> None:
    model = tiny("llama-grouped-untied", seed=3)
    model.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    twin = write_twin(tmp_path / "base", tmp_path / "base.gguf")
    write_adapter(tmp_path / "adapter", model, MODULES["llama-grouped-untied"])
    one, other = (vw.open(base, attach=[tmp_path / "adapter"]) for base in (tmp_path / "base", twin))
    for port in ("Q", "K", "V", "up"):
        scores = [vw.Composition(port, None, "all", "float64")(s).numbers("strength") for s in (one, other)]
        assert torch.allclose(*scores, rtol=1e-6, equal_nan=True)


def test_rank_and_alpha_by_patterns_and_rooted(tmp_path: Path) -> None:
    model = tiny("llama-grouped-untied", seed=3)
    leaves = ("self_attn.q_proj", "self_attn.k_proj")
    pattern = {r"layers\.0\.self_attn\.q_proj": 11.0, "k_proj": 2.0}
    added = write_adapter(tmp_path / "adapter", model, leaves, alpha_pattern=pattern, use_rslora=True)
    stream = vw.open(model, attach=[tmp_path / "adapter"])

    def scale(name: str) -> float:
        alpha = 11.0 if "layers.0.self_attn.q" in name else 2.0 if "k_proj" in name else ALPHA
        return alpha / RANK**0.5

    for name, delta in added.items():
        wanted = model.get_parameter(name).detach().double() + scale(name) * delta
        assert torch.allclose(stream.source.read(name).double(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(stream.source.read(name, slice(2, 5)), stream.source.read(name)[2:5])


def test_answers_of_the_adapted_model_are_its_own(tmp_path: Path) -> None:
    model = tiny("llama-grouped-untied", seed=3)
    model.save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    write_adapter(tmp_path / "adapter", model, ("self_attn.q_proj",))
    stream = vw.open(tmp_path / "base", attach=[tmp_path / "adapter"])
    record = vw.Composition("Q")(stream)
    assert str(tmp_path / "adapter") in record.provenance["model"]
    plan = vw.Plan((vw.Part.composition,))
    atlas = vw.map(stream, tmp_path / "mapped", plan=plan, executor="local:2", progress=False)
    (stored,) = [e for e in atlas.entries() if (e.question, e.parameters.get("port")) == ("composition", "Q")]
    assert atlas.get(stored.key) == vw.Composition("Q", None, "all")(stream)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"r": 4},
        {"lora_alpha": None},
    ],
)
def test_what_two_factors_do_not_say_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama-grouped-untied")
    write_adapter(tmp_path / "adapter", model, ("self_attn.q_proj",), **settings)
    with pytest.raises(CheckpointError) as error:
        vw.open(model, attach=[tmp_path / "adapter"])
    assert next(iter(settings)) in str(error.value) or "rank" in str(error.value) or "type" in str(error.value)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "other", tiny("gpt2-untied-narrow"), ("attn.c_proj", "attn.c_attn"))
    with pytest.raises(ArchitectureError, match="which this model has not"):
        vw.open(tiny("llama-grouped-untied"), attach=[tmp_path / "other"])
    write_adapter(tmp_path / "turned", tiny("gpt2-untied-narrow"), ("attn.c_attn",), fan_in_fan_out=False)
    with pytest.raises(ArchitectureError, match="fan_in_fan_out"):
        vw.open(tiny("gpt2-untied-narrow"), attach=[tmp_path / "turned"])


def test_pickled_factors_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny("llama-grouped-untied"), ("self_attn.q_proj",))
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpointError, match="pickled"):
        vw.open(tiny("llama-grouped-untied"), attach=[tmp_path / "adapter"])
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        vw.open(tiny("llama-grouped-untied"), attach=[tmp_path])
