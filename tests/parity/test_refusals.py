"""What the tables do not account for is refused by name, never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.errors import ArchitectureError, MissingTensorError, UsageError


def parts(name: str = "llama-grouped-untied") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = tiny(name)
    return dict(model.state_dict()), model.config.to_dict()


def test_an_unknown_tensor_is_named() -> None:
    tensors, config = parts()
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(4)
    with pytest.raises(ArchitectureError, match=r"q_norm\.weight"):
        vw.open(tensors, config=config)


def test_a_missing_tensor_is_named_unless_partial() -> None:
    tensors, config = parts()
    del tensors["model.layers.2.mlp.down_proj.weight"]
    with pytest.raises(ArchitectureError, match=r"layers\.2\.mlp\.down_proj"):
        vw.open(tensors, config=config)
    stream = vw.open(tensors, config=config, partial=True)
    assert "L2.mlp" not in [str(c.label) for c in stream.components]
    with pytest.raises(MissingTensorError, match=r"no output of L2\.mlp"):
        stream.write("L2.mlp")


def test_an_untied_model_without_unembedding_does_not_borrow_the_embedding() -> None:
    tensors, config = parts()
    del tensors["lm_head.weight"]
    with pytest.raises(ArchitectureError, match="lm_head"):
        vw.open(tensors, config=config)
    assert "unembed" not in [str(c.label) for c in vw.open(tensors, config=config, partial=True).components]


def test_an_unknown_configuration_key_is_named() -> None:
    tensors, config = parts()
    with pytest.raises(ArchitectureError, match="residual_multiplier"):
        vw.open(tensors, config={**config, "residual_multiplier": 0.5})
    vw.open(tensors, config={**config, "residual_multiplier": None})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-full", {"model_type": "mamba"}, "mamba"),
        ("llama-full", {"hidden_size": 25}, "cannot be divided|contradicts"),
        ("llama-full", {"intermediate_size": 41}, "contradicts the tensor"),
        ("llama-grouped-untied", {"num_key_value_heads": 4}, "cannot be divided"),
        ("llama-grouped-untied", {"num_key_value_heads": 3}, "contradicts the tensor"),
        ("llama-full", {"num_hidden_layers": 2}, "no row"),
        ("llama-full", {"num_hidden_layers": 4}, "missing"),
        ("llama-full", {"num_hidden_layers": 10**9}, "layers"),
        ("llama-full", {"num_hidden_layers": -1}, "whole number"),
        ("llama-full", {"num_attention_heads": "6"}, "whole number"),
        ("llama-full", {"vocab_size": 38}, "contradicts the tensor"),
        ("llama-full", {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ("llama-full", {"attention_bias": True}, r"q_proj\.bias"),
        ("llama-biases-wide-heads", {"mlp_bias": False}, r"gate_proj\.bias"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_a_configuration_that_contradicts_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    tensors, config = parts(name)
    vw.open(tensors, config=config)
    with pytest.raises(ArchitectureError, match=message) as caught:
        vw.open(tensors, config={**config, **change})
    assert caught.value.exit_code == 3
    assert "to do:" in str(caught.value)


def test_buffers_and_prefixes_of_old_checkpoints_are_known() -> None:
    tensors, config = parts("gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    one, two = vw.Composition("K")(vw.open(bare, config=config)), vw.Composition("K")(vw.open(tensors, config=config))
    assert torch.equal(one["score"].nan_to_num(), two["score"].nan_to_num())


@pytest.mark.parametrize("name", ["L3H0", "L0H6", "L0N40", "L9.mlp", "L0.mlp.in", "L0H1.X"])
def test_components_that_are_not_there(name: str) -> None:
    with pytest.raises(UsageError):
        vw.open(tiny("llama-full"))[name]


def test_a_writer_that_comes_too_late_is_refused() -> None:
    stream = vw.open(tiny("llama-full"))
    for writer, reader in [("L1H0", "L1H1.K"), ("L2H0", "L1H1.K"), ("L1.mlp", "L1H0.Q"), ("L1.mlp", "L1.mlp.up")]:
        with pytest.raises(UsageError, match="cannot reach"):
            vw.virtual_weight(stream, writer, reader)
    assert vw.virtual_weight(stream, "L1H0", "L1.mlp.up").shape == (40, 24)
    parallel = vw.open(tiny("neox-parallel-partial-rotary"))
    with pytest.raises(UsageError, match="cannot reach"):
        vw.virtual_weight(parallel, "L1H0", "L1.mlp.in")


@pytest.mark.parametrize(
    ("writer", "reader", "message"),
    [
        ("unembed", "L1H0.K", "does not write"),
        ("L0H0.K", "L1H0.K", "does not write"),
        ("L0H0", "L1H0", "reading port"),
        ("L0H0", "embed", "does not read|cannot reach"),
        ("L0H0", "L1H0.O", "reading port"),
    ],
)
def test_virtual_weights_between_wrong_ends(writer: str, reader: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vw.virtual_weight(vw.open(tiny("llama-full")), writer, reader)


def test_neurons_are_rows_and_columns_of_their_mlp() -> None:
    stream = vw.open(tiny("llama-biases-wide-heads"))
    whole, neuron = stream["L1.mlp"], stream["L1N7"]
    assert torch.equal(whole.up.dense()[7:8], neuron.up.dense())
    assert torch.equal(whole.gate.dense()[7:8], stream["L1N7.gate"].dense())
    assert torch.equal(whole.out.dense()[:, 7:8], neuron.out.dense())
    assert torch.equal(whole.up_constant[7:8], neuron.up_constant)
