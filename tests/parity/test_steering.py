"""A vector added to a running model: as transformers' own hook adds it, and to first order as the gradient says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import norms_in_full_precision, tiny

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.losses import next_token_loss

TOKENS = torch.randint(0, 37, (5, 7), generator=torch.Generator().manual_seed(6))
LAYERS = {
    "llama-grouped-untied": lambda model: model.model.layers,
    "gpt2-untied-narrow": lambda model: model.transformer.h,
    "neox-parallel-partial-rotary": lambda model: model.gpt_neox.layers,
}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with norms_in_full_precision():
        yield


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_the_effect_is_that_of_a_hook_and_small_amounts_are_predicted(name: str, batch: int) -> None:
    model = tiny(name, seed=5, dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    run = vw.Run.on_tokens(stream, TOKENS, model=model)
    vector = torch.randn(stream.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    amounts = (2.0, 1e-3, -1e-3)
    record = vw.VectorEffect(vw.Vector(vector), "L1", amounts, batch=batch)(run)
    layer = LAYERS[name](model)[1]
    with torch.no_grad():
        before = next_token_loss(model(TOKENS).logits, TOKENS)
        for amount in amounts:
            hook = layer.register_forward_pre_hook(lambda _, given, a=amount: (given[0] + a * vector, *given[1:]))
            after = next_token_loss(model(TOKENS).logits, TOKENS)
            hook.remove()
            effect = float((after - before).mean())
            assert record[f"{amount:g}",]["effect"] == pytest.approx(effect, rel=1e-6, abs=1e-12)
    # what bends is the same on both sides; the softmax of transformers is in float32
    slope = (float(record["0.001",]["effect"]) - float(record["-0.001",]["effect"])) / 2
    assert record["0.001",]["predicted"] == pytest.approx(slope, rel=2e-3)
    assert record["2",]["predicted"] == pytest.approx(2000 * record["0.001",]["predicted"])
    assert record.stamp["state"] == stream.groups["L1.attn"].reads


def test_a_state_in_the_middle_of_a_block_is_refused() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    run, vector = vw.Run.on_tokens(stream, TOKENS, model=model), vw.Vector(torch.ones(stream.d_model))
    with pytest.raises(UsageError, match="no block begins"):
        vw.VectorEffect(vector, "L1.mlp")(run)
    last = vw.VectorEffect(vector, "unembed", (0.5,))(run)
    assert last["0.5",]["effect"] is not None
    with pytest.raises(UsageError, match="amounts"):
        vw.VectorEffect(vector, "L1", (0.0,))
