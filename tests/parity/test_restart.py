"""A pass that restarts at the reader's block gives what the full pass gives, on every family, and runs less."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import SHAPES, norms_in_full_precision, tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.runtime import Run
from virtual_weights.runtime.edges.ablation import Ablation
from virtual_weights.runtime.edges.edge import Edge, Removal, removed
from virtual_weights.runtime.edges.losses import next_token_loss
from virtual_weights.runtime.edges.passes import restarted
from virtual_weights.runtime.running.hooks import Place, module_of, places, watched

TOKENS = torch.randint(0, 37, (4, 7), generator=torch.Generator().manual_seed(6))


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with norms_in_full_precision():
        yield


def edges(stream: vw.Stream) -> list[tuple[str, str]]:
    """Every kind of writer and port; writers before the restart, in the very block, and embeddings."""
    last = stream.spec.n_layers - 1
    mlp = "up" if stream.spec.gated else "in"
    pairs = [("L0H1", f"L{last}H2.{port}") for port in "QKV"] + [("L0N3", f"L{last}.mlp.{mlp}"), ("embed", "L0H0.K")]
    pairs += [("L0.mlp", f"L1N5.{mlp}"), (f"L{last}.mlp", "unembed"), ("embed", f"L{last}H0.V")]
    if not sizes(stream).parallel:
        pairs.append((f"L{last}H1", f"L{last}.mlp.{mlp}"))
    return [*pairs, *([("pos", f"L{last}H1.K")] if stream.model.has("pos", "pos") else [])]


@pytest.mark.parametrize("name", SHAPES)
def test_ablation_equals_the_full_pass(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    run, pairs = Run.on_tokens(stream, TOKENS, model=model), edges(stream)
    alone = Ablation(pairs, random=0, batch=4)(run)["effect_nats"]
    stacked = Ablation(pairs, random=0, batch=12)(run)["effect_nats"]  # three edges at once
    expected: list[float] = []
    with torch.no_grad():
        clean = next_token_loss(model(TOKENS).logits, TOKENS)
        for pair in pairs:
            with removed(model, stream, [Edge.of(stream, *pair)], Removal()):
                expected.append(float((next_token_loss(model(TOKENS).logits, TOKENS) - clean).mean()))
    for effects in (alone, stacked):
        assert isinstance(effects, Tensor)
        assert effects.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-12)
    assert min(abs(effect) for effect in expected) > 1e-7


@pytest.mark.parametrize("name", SHAPES)
def test_restarted_at_any_block_the_logits_are_the_same_and_earlier_blocks_do_not_run(name: str) -> None:
    model: Any = tiny(name, dtype=torch.float64)
    stream = vw.open(model)
    with torch.no_grad():
        states, clean = watched(model, stream, places(stream, "state"), TOKENS)
    ran: list[int] = []
    layers = stream.spec.n_layers
    modules = [module_of(model, stream, "o", group.id) for group in stream.groups.heads]
    hooks = [module.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, module in enumerate(modules)]
    for layer, group in enumerate((*stream.groups.heads, stream.groups["unembed"])):
        place: Place = ("state", group.reads or 0)
        with torch.no_grad():
            ran.clear()
            with restarted(model, stream, group, states[place]):
                torch.testing.assert_close(model(TOKENS).logits, clean, rtol=1e-12, atol=1e-12)
            assert ran == list(range(layer, layers))
            if layer:
                moved = states[place] + 0.1 * states[place].roll(1, -1)  # the state is what it goes by
                with restarted(model, stream, group, moved):
                    assert (model(TOKENS).logits - clean).abs().max() > 1e-3
            torch.testing.assert_close(model(TOKENS).logits, clean, rtol=0, atol=0)  # all as before
    for hook in hooks:
        hook.remove()


def test_a_forward_of_the_models_own_comes_back() -> None:
    model: Any = tiny("gpt2")
    stream = vw.open(model)
    block = model.transformer.h[0]
    block.forward = placed = partial(block.forward)
    with restarted(model, stream, stream.groups["L1.attn"], torch.zeros(1)):
        assert block.forward is not placed
    assert block.forward is placed
    with pytest.raises(UsageError), restarted(model, stream, stream.groups["L2.attn"], torch.zeros(1)):
        raise UsageError("it fails", expected="", do="")
    assert block.forward is placed
    assert "forward" not in model.transformer.h[1].__dict__
