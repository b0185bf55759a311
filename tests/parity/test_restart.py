"""A pass that restarts at the reader's block gives what the full pass gives, on every family, and runs less."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import SHAPES, norms_in_full_precision, tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.runtime import module_of
from virtual_weights.runtime.edges.ablation import Trial, prove
from virtual_weights.runtime.edges.edge import Edge, next_token_loss
from virtual_weights.runtime.edges.removal import Removal, removed, restarted
from virtual_weights.runtime.running.hooks import watching
from virtual_weights.stream.group import attention_reads

TOKENS = torch.randint(0, 37, (4, 7), generator=torch.Generator().manual_seed(6))


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with norms_in_full_precision():
        yield


def edges(stream: vw.Stream) -> list[tuple[str, str]]:
    """Every kind of writer and port; writers before the restart, in the very block, and embeddings."""
    last = stream.spec.n_layers - 1
    mlp = "up" if stream.spec.gated else "in"
    found = [("L0H1", f"L{last}H2.{port}") for port in "QKV"] + [("L0N3", f"L{last}.mlp.{mlp}"), ("embed", "L0H0.K")]
    found += [("L0.mlp", f"L1N5.{mlp}"), (f"L{last}.mlp", "unembed"), ("embed", f"L{last}H0.V")]
    if not stream.spec.parallel:
        found.append((f"L{last}H1", f"L{last}.mlp.{mlp}"))
    return [*found, *([("pos", f"L{last}H1.K")] if stream.model.has("pos") else [])]


@pytest.mark.parametrize("name", SHAPES)
def test_proof_equals_the_full_pass(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    asked = edges(stream)
    alone = prove(stream, asked, TOKENS, Trial(random=0, batch=4), model)["effect_nats"]
    stacked = prove(stream, asked, TOKENS, Trial(random=0, batch=12), model)["effect_nats"]  # three edges at once
    expected: list[float] = []
    with torch.no_grad():
        clean = next_token_loss(model(TOKENS).logits, TOKENS)
        for edge in asked:
            with removed(model, stream, [Edge.of(stream, *edge)], Removal()):
                expected.append(float((next_token_loss(model(TOKENS).logits, TOKENS) - clean).mean()))
    for found in (alone, stacked):
        assert isinstance(found, Tensor)
        assert found.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-12)
    assert min(abs(each) for each in expected) > 1e-7


@pytest.mark.parametrize("name", SHAPES)
def test_restarted_at_any_block_the_logits_are_the_same_and_earlier_blocks_do_not_run(name: str) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    stream = vw.open(model)
    states: dict[int, Tensor] = {}
    with torch.no_grad(), watching(model, stream, ["state"], lambda _, i, x: states.update({i: x})):
        clean = model(TOKENS).logits
    ran: list[int] = []
    layers = stream.spec.n_layers
    modules = [module_of(model, stream, "o", i) for i in range(layers)]
    hooks = [each.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, each in enumerate(modules)]
    for layer in range(layers + 1):
        state = states[attention_reads(stream.model, layer)]
        with torch.no_grad():
            ran.clear()
            with restarted(model, stream, layer, state):
                torch.testing.assert_close(model(TOKENS).logits, clean, rtol=1e-12, atol=1e-12)
            assert ran == list(range(layer, layers))
            if layer:
                with restarted(model, stream, layer, state + 0.1 * state.roll(1, -1)):  # the state is what it goes by
                    assert (model(TOKENS).logits - clean).abs().max() > 1e-3
            torch.testing.assert_close(model(TOKENS).logits, clean, rtol=0, atol=0)  # all as before
    for hook in hooks:
        hook.remove()


def test_a_forward_of_the_models_own_comes_back() -> None:
    model: Any = tiny("gpt2")
    stream = vw.open(model)
    block = model.transformer.h[0]
    block.forward = placed = partial(block.forward)
    with restarted(model, stream, 1, torch.zeros(1)):
        assert block.forward is not placed
    assert block.forward is placed
    with pytest.raises(UsageError), restarted(model, stream, 2, torch.zeros(1)):
        raise UsageError("it fails", expected="", do="")
    assert block.forward is placed
    assert "forward" not in model.transformer.h[1].__dict__
