"""Weights in TransformerLens's shapes: acting from the left they give what transformers' own modules give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.checkpoints import build, flavours
from tiny_models import SHAPES, tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.runtime import Run
from virtual_weights.runtime.running.activations import Activations, prompted
from virtual_weights.runtime.running.hooks import activation
from virtual_weights.stream.lens_shapes import in_lens_shapes

TOKENS = torch.tensor([3, 17, 5, 5, 30, 1, 22])
LN = {"Q": "ln1", "K": "ln1", "V": "ln1", "gate": "ln2", "in": "ln2"}
MLP = {True: (("gate", "gate"), ("in", "up")), False: (("in", "in"),)}  # TransformerLens's name of a map, and our port


def activations_of(name: str, fold: bool) -> Activations:
    model: Any = tiny(name, seed=2)
    return prompted(Run.on_prompt(vw.open(model, fold=fold), TOKENS, model=model))


def normed(stream: vw.Stream, state: Tensor, weights: dict[str, Tensor], place: str) -> Tensor:
    """By the definition; without gain and shift where the weights have none."""
    centred = state - state.mean(-1, keepdim=True) if sizes(stream).norm == "layer" else state
    x = centred / (centred.square().mean(-1, keepdim=True) + sizes(stream).norm_eps).sqrt()
    return x * weights.get(f"{place}.w", torch.ones(())) + weights.get(f"{place}.b", torch.zeros(()))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_they_give_what_the_model_computes(name: str, folded: bool) -> None:
    activations = activations_of(name, folded)
    stream, signals = activations.stream, activations.signals
    weights, spec = in_lens_shapes(stream, folded=folded), stream.spec
    close = {"rtol": 1e-4, "atol": 1e-4}

    def read(x: Tensor, key: str) -> Tensor:
        bias = weights.get(key.replace(".W_", ".b_"), torch.zeros(()))
        return torch.einsum("td,...dk->t...k", x, weights[key]) + bias

    for layer in range(spec.n_layers):
        for lens, port in (*zip("QKV", "QKV", strict=True), *MLP[spec.gated]):
            place = "attn" if port in "QKV" else "mlp"
            state = layer if sizes(stream).parallel else 2 * layer + (place == "mlp")
            x = normed(stream, signals["state", state], weights, f"blocks.{layer}.{LN[lens]}")
            values = read(x, f"blocks.{layer}.{place}.W_{lens}")
            torch.testing.assert_close(values, signals[port, f"L{layer}.{place}"], **close)  # type: ignore[index]
        inner, neurons = signals["inner", f"L{layer}.attn"], signals["inner", f"L{layer}.mlp"][:, 0]
        attention = torch.einsum("thk,hkd->td", inner, weights[f"blocks.{layer}.attn.W_O"])
        mlp = neurons @ weights[f"blocks.{layer}.mlp.W_out"]
        torch.testing.assert_close(mlp, signals["written", f"L{layer}.mlp"], **close)
        added = attention + weights.get(f"blocks.{layer}.attn.b_O", torch.zeros(()))
        if sizes(stream).parallel:
            added = added + mlp + weights.get(f"blocks.{layer}.mlp.b_out", torch.zeros(()))
        state = layer if sizes(stream).parallel else 2 * layer
        before, after = (activations.state(number).float() for number in (state, state + 1))
        torch.testing.assert_close(after - before, added, **close)
        act = activation(stream, stream.groups["L0.mlp"])
        first, *rest = (signals[port, f"L{layer}.mlp"] for _, port in MLP[spec.gated])  # type: ignore[index]
        torch.testing.assert_close(neurons, act(first) * rest[0] if spec.gated else act(first))
    embedded = weights["embed.W_E"][TOKENS]
    if "pos_embed.W_pos" in weights:
        embedded = embedded + weights["pos_embed.W_pos"][: len(TOKENS)]
    torch.testing.assert_close(embedded, activations.state(0).float())
    x = normed(stream, signals["state", stream.states - 1], weights, "ln_final")
    torch.testing.assert_close(read(x, "unembed.W_U"), activations.logits, **close)
    assert any("ln" in key for key in weights) == (not folded)


@pytest.mark.parametrize("folded", [False, True])
def test_shapes_names_and_views(folded: bool) -> None:
    model: Any = tiny("llama-biases-wide-heads")
    stream = vw.open(model, fold=not folded)  # the stream's own choice does not matter
    weights = in_lens_shapes(stream, folded=folded)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    block = {
        "attn.W_Q": (6, 24, 8),
        "attn.b_Q": (6, 8),
        "attn.W_K": (2, 24, 8),
        "attn.b_K": (2, 8),
        "attn.W_V": (2, 24, 8),
        "attn.b_V": (2, 8),
        "attn.W_O": (6, 8, 24),
        "attn.b_O": (24,),
        "mlp.W_gate": (24, 40),
        "mlp.b_gate": (40,),
        "mlp.W_in": (24, 40),
        "mlp.b_in": (40,),
        "mlp.W_out": (40, 24),
        "mlp.b_out": (24,),
        **({} if folded else {"ln1.w": (24,), "ln2.w": (24,)}),
    }
    ends = {"embed.W_E": (37, 24), "unembed.W_U": (24, 37), **({} if folded else {"ln_final.w": (24,)})}
    assert shapes == {f"blocks.{i}.{key}": shape for i in range(3) for key, shape in block.items()} | ends
    only = in_lens_shapes(stream, [2, 0], folded=folded)
    assert list(only) == [key for i in (2, 0) for key in weights if key.startswith(f"blocks.{i}.")]
    assert in_lens_shapes(stream, []) == {}
    if not folded:
        layer = model.model.layers[2]
        assert torch.equal(only["blocks.2.attn.W_K"][1], layer.self_attn.k_proj.weight[8:].T)
        assert torch.equal(only["blocks.2.mlp.W_gate"], layer.mlp.gate_proj.weight.T)
        assert torch.equal(only["blocks.2.mlp.W_in"], layer.mlp.up_proj.weight.T)


def test_what_a_checkpoint_lacks_has_no_key() -> None:
    model = tiny("gpt2")
    tensors = {key: x for key, x in model.state_dict().items() if "h.1.attn" not in key and "wpe" not in key}
    config = vw.open(model).source.config
    weights = in_lens_shapes(vw.open(tensors, config=config, partial=True))
    assert "pos_embed.W_pos" not in weights
    assert not [key for key in weights if key.startswith("blocks.1.attn")]
    assert {"blocks.0.attn.W_Q", "blocks.1.mlp.W_in", "unembed.W_U"} <= set(weights)
    assert not {"unembed.b_U", "blocks.1.mlp.W_gate"} & set(weights)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(UsageError, match=f"no layer {layer}"):
        in_lens_shapes(vw.open(tiny("gpt2")), [layer])


def test_norms_around_parts_and_on_queries_and_keys_have_their_names(tmp_path: Path) -> None:
    build("gemma3_text", flavours("gemma3_text")[0], tmp_path)
    stream = vw.open(tmp_path)
    unfolded, folded = in_lens_shapes(stream, [1]), in_lens_shapes(stream, [1], folded=True)
    gains = {f"blocks.1.{name}.w" for name in ("ln1", "ln1_post", "ln2", "ln2_post", "attn.q_norm", "attn.k_norm")}
    assert unfolded.keys() - folded.keys() == gains
    post = stream.weight("after", "L1.attn")
    assert post is not None
    torch.testing.assert_close(unfolded["blocks.1.ln1_post.w"], post + 1)  # stored less 1
    whole = unfolded["blocks.1.ln1_post.w"] * unfolded["blocks.1.attn.W_O"].flatten(0, 1)
    torch.testing.assert_close(folded["blocks.1.attn.W_O"].flatten(0, 1), whole)
