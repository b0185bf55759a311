"""Sources in memory: state dicts, transformers models, TransformerLens bridges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from contract.source_makers import example
from tiny_models import tiny
from torch import nn

from virtual_weights.checkpoint import MappingSource, open_source
from virtual_weights.errors import CheckpointError, UsageError


def test_a_source_is_returned_as_it_is() -> None:
    source = MappingSource(example(), {})
    assert open_source(source) is source


def test_a_state_dict_needs_a_configuration() -> None:
    with pytest.raises(UsageError, match="configuration"):
        open_source(example())


@pytest.mark.parametrize(
    "value", [3, torch.ones(2, device="meta"), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)]
)
def test_what_is_no_dense_tensor_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="'w'"):
        open_source({"w": value}, config={})


@pytest.mark.parametrize("thing", [3, None, [torch.ones(1)]])
def test_what_is_no_reference_is_refused(thing: object) -> None:
    with pytest.raises(UsageError, match="is not a checkpoint"):
        open_source(thing)


def test_a_configuration_must_be_plain_json() -> None:
    assert MappingSource({}, {"dtype": torch.bfloat16, "ids": (1, 2)}).config == {"dtype": "bfloat16", "ids": [1, 2]}
    with pytest.raises(UsageError, match="plain JSON"):
        MappingSource({}, {"a": object()})


def test_tensors_are_referred_to_not_copied_and_views_are_read_right() -> None:
    base = torch.randn(6, 200_000, generator=torch.Generator().manual_seed(0))
    turned = base.T
    source = MappingSource({"w": turned, "base": base}, {})
    assert source._values["base"].data_ptr() == base.data_ptr()
    assert torch.equal(source.read("w", slice(5, 9)), turned[5:9])
    assert source.fingerprint == MappingSource({"w": turned.contiguous(), "base": base}, {}).fingerprint
    before = source.fingerprint
    base[0, 0] += 1
    assert source.fingerprint != before


@pytest.mark.parametrize("kind", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_a_live_model_is_what_it_saves(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    live = open_source(model)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        n: i.shape for n, i in live.tensors.items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(live.read(name), tensor)
        assert not live.read(name).requires_grad
    model.save_pretrained(tmp_path)
    saved = open_source(tmp_path)
    # transformers 5 writes NeoX's unembedding under its old name and leaves a tied one out
    assert set(saved.tensors) - {"embed_out.weight"} <= set(live.tensors)
    for name in set(saved.tensors) & set(live.tensors):
        assert torch.equal(saved.read(name), live.read(name))
    for key, value in json.loads((tmp_path / "config.json").read_text()).items():
        if key not in ("architectures", "dtype"):  # filled in by transformers as it saves
            assert live.config[key] == value, key


def test_a_plain_module_needs_a_configuration() -> None:
    module = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="configuration"):
        open_source(module)
    source = open_source(module, config={"a": 1})
    assert torch.equal(source.read("weight"), module.weight)
    assert "Linear" in source.reference


# -- TransformerLens, which is not installed here: modules of the same class names and structure as its 4.3


class Wrapper(nn.Module):
    """Like the bridge's components: the wrapped module, and aliases of its parts under other names."""

    def __init__(self, wrapped: nn.Module, **aliases: nn.Module) -> None:
        super().__init__()
        self.add_module("_original_component", wrapped)
        for name, module in aliases.items():
            self.add_module(name, module)


def give_bias(module: nn.Module, bias: torch.Tensor) -> None:
    del module.bias
    (module.register_parameter if isinstance(bias, nn.Parameter) else module.register_buffer)("bias", bias)


def bridge(model: nn.Module) -> nn.Module:
    for name, layer in list(model.model.layers.named_children()):
        layer.mlp.up_proj = Wrapper(layer.mlp.up_proj)
        layer.mlp = Wrapper(layer.mlp, up=layer.mlp.up_proj)
        setattr(model.model.layers, name, Wrapper(layer, mlp2=layer.mlp))
    model.lm_head = Wrapper(model.lm_head)
    give_bias(model.lm_head.get_submodule("_original_component"), torch.zeros(37))
    kind = type("TransformerBridge", (nn.Module,), {"__module__": "transformer_lens.model_bridge.transformer_bridge"})
    outside = kind()
    outside.__dict__["original_model"] = model
    return outside


def test_a_bridge_gives_the_models_own_names() -> None:
    plain = tiny("llama-grouped-untied")
    source = open_source(bridge(tiny("llama-grouped-untied")))
    assert set(source.tensors) == set(plain.state_dict())
    assert source.config["model_type"] == "llama"
    for name, tensor in plain.state_dict().items():
        assert torch.equal(source.read(name), tensor)


def test_a_bridges_bias_is_kept_when_it_is_the_models_own() -> None:
    for bias in (nn.Parameter(torch.zeros(37)), torch.ones(37)):
        wrapped = bridge(tiny("llama-grouped-untied"))
        inner = wrapped.original_model.lm_head.get_submodule("_original_component")
        give_bias(inner, bias)
        assert "lm_head.bias" in open_source(wrapped).tensors


def test_a_bridge_with_processed_weights_is_refused() -> None:
    processed = bridge(tiny("llama-grouped-untied"))
    processed.__dict__["_weights_processed"] = True
    with pytest.raises(CheckpointError, match="folded or centred"):
        open_source(processed)
