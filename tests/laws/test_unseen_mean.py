"""With LayerNorm a constant added to all that a component writes is seen by no reader: no figure of memory moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import norms_in_full_precision, tiny
from torch import nn

import virtual_weights as vw
from virtual_weights.analysis.crowding.coherence import Coherence
from virtual_weights.analysis.crowding.interference import Interference
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.record import Record
from virtual_weights.runtime.fate.erased import Erased
from virtual_weights.runtime.fate.persistence import ErasedBy, Persistence, PersistenceSummary
from virtual_weights.runtime.fate.written_units import written_units
from virtual_weights.runtime.running.run import Run

TOKENS = [torch.tensor([3, 17, 5, 5, 30, 1, 22, 8, 9]), torch.tensor([4, 28, 11, 0, 12, 2, 2, 7, 9])]


def lifted(model: nn.Module) -> nn.Module:
    """The same model to every reader: each neuron, head, embedding and bias writes a constant more."""
    other: Any = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight += torch.linspace(-1, 2, part.weight.shape[0], dtype=part.weight.dtype)[:, None]
                part.bias += 0.7
        other.transformer.wte.weight += 0.3
        other.transformer.wpe.weight -= 0.2
    return other


def models() -> tuple[Any, Any]:
    model = tiny("gpt2-untied-narrow", dtype=torch.float64)
    other = lifted(model)
    with norms_in_full_precision():
        torch.testing.assert_close(other(TOKENS[0][None]).logits, model(TOKENS[0][None]).logits, rtol=1e-8, atol=1e-8)
    return model, other


def equal(one: Record, other: Record) -> None:
    for column in one.columns:
        if isinstance(column.values, torch.Tensor) and column.values.is_floating_point():
            torch.testing.assert_close(
                other[column.name], column.values, rtol=1e-6, atol=1e-8, equal_nan=True, msg=column.name
            )


@pytest.mark.parametrize("question", [Neurons(), HeadErasers(draws=2), vw.Erasure(), Interference(most=32, trials=2)])
def test_no_figure_of_the_weights_moves(question: Any) -> None:
    streams = [vw.open(model).to(torch.float64) for model in models()]
    equal(*(question(stream) for stream in streams))


def test_coherence_does_not_move() -> None:
    one, other = (Coherence()(vw.open(model)).stamp for model in models())
    assert other["mean_square"] == pytest.approx(one["mean_square"], rel=1e-5)


@pytest.mark.parametrize(
    "question", [Persistence(), Persistence(centred=True), ErasedBy(), PersistenceSummary(), Erased()]
)
def test_no_figure_of_a_run_moves(question: Any) -> None:
    equal(*(question(Run.on_tokens(vw.open(model).to(torch.float64), TOKENS, model=model)) for model in models()))


def test_what_is_erased_of_single_units_does_not_move() -> None:
    one, other = (written_units(Run.on_tokens(vw.open(m).to(torch.float64), TOKENS, model=m)) for m in models())
    for name in ("utility", "interference", "erased"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-6, atol=1e-8, equal_nan=True)
