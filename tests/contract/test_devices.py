"""Whatever a model runs on and wherever its tensors lie, the answers are those of the CPU, and lie on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from every_question import KINDS, Subject, different, unlike
from tiny_models import norms_in_full_precision, tiny

import virtual_weights as vw

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator")
MODELS = ("gpt2-untied-narrow", "neox-parallel-partial-rotary", "llama-grouped-untied")
PLACES = ("runs", "lies")  # a run there of a model opened on the CPU, or a model opened there

_ROTARY = 100.0
"""Transformers takes cosines of rotary angles in float32, whatever it is given; they differ by device."""


@pytest.fixture(scope="module", params=MODELS)
def here(request: pytest.FixtureRequest) -> Iterator[tuple[str, Subject]]:
    """The name of a model, and everything on the CPU."""
    with norms_in_full_precision():
        yield request.param, Subject(tiny(request.param, seed=1, dtype=torch.float64))


@pytest.fixture(scope="module", params=PLACES)
def there(request: pytest.FixtureRequest, here: tuple[str, Subject]) -> Subject:
    """The same model, run on an accelerator or lying there."""
    device = torch.accelerator.current_accelerator()
    model = tiny(here[0], seed=1, dtype=torch.float64)
    if request.param == "lies":
        return Subject(model.to(device))
    return Subject(model, dtype=torch.float64, device=str(device))


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_that_of_the_cpu(here: tuple[str, Subject], there: Subject, kind: str) -> None:
    assert not "\n".join(unlike(here[1], there, kind, loose=_ROTARY))


@pytest.mark.parametrize("question", ["composition", "overlap", "subspaces", "neurons", "coherence"])
def test_weights_are_multiplied_on_the_device(here: tuple[str, Subject], question: str) -> None:
    device = str(torch.accelerator.current_accelerator())
    stream = here[1].stream
    one, other = (
        {
            "composition": vw.Composition("K", None, "all", device=where),
            "overlap": vw.Overlap("K", "all", device=where),
            "subspaces": vw.Subspaces("O", "K", device=where),
            "neurons": vw.NeuronNeuron("up" if "up" in stream.groups.ports else "in", device=where),
            "coherence": vw.Coherence(device=where),
        }[question](stream)
        for where in ("cpu", device)
    )
    assert not list(different(one, other))
