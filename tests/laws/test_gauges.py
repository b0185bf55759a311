"""What changes no probability of a model changes no answer about it: constants that no reader and no softmax sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import norms_in_full_precision, tiny
from torch import nn

import virtual_weights as vw
from virtual_weights.stream import Question

TOKENS = torch.tensor([[3, 17, 5, 5, 30, 1, 22, 9], [8, 2, 30, 36, 11, 0, 4, 12]])
MODELS = ("gpt2-untied-narrow", "neox-parallel-partial-rotary", "llama-grouped-untied")


def disguised(model: nn.Module, seed: int) -> nn.Module:
    """The same model otherwise written down.

    With LayerNorm a constant in all coordinates is added to whatever is written; to all rows of the unembedding the
    same vector; to all keys the same vector, where nothing rotates them (GPT-2).
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)

    def random(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "lm_head.weight" or name == "embed_out.weight":
                weight += random(weight.shape[1])
            elif name.endswith((".c_proj.weight", "wte.weight", "wpe.weight", "embed_in.weight")):
                weight += random(len(weight))[:, None]  # stored (in, out): the last axis is the stream
            elif name.endswith((".c_proj.bias", ".dense.bias", ".dense_4h_to_h.bias")):
                weight += random(1)
            elif name.endswith((".dense.weight", ".dense_4h_to_h.weight")):
                weight += random(weight.shape[1])
            elif name.endswith(".c_attn.bias"):
                weight.view(3, -1)[1] += random(len(weight) // 3)
    return model


class Subject:
    """A model in float64, its stream, runs of it and its moments."""

    def __init__(self, model: nn.Module) -> None:
        self.stream = vw.open(model).to(torch.float64)
        self.run = vw.Run.on_tokens(self.stream, TOKENS, model=model)
        self.prompt = vw.Run.on_prompt(self.stream, TOKENS[0], model=model)
        self.repeats = vw.Run.on_repeats(self.stream, 32, 16, model=model)
        self.moments = vw.Observation().moments(self.run)
        self.probabilities = model(TOKENS).logits.log_softmax(-1).detach()

    def answer(self, question: Question[Any]) -> vw.Record:
        """Asked of the stream, or of the run that it needs."""
        if question.subject is not vw.Run:
            return question(self.stream)
        prompted = question.question in ("lens", "trace", "route")
        return question(self.prompt if prompted else self.repeats if question.question == "labels" else self.run)


def questions(subject: Subject) -> dict[str, list[Question[Any]]]:
    """Public questions of the weights and of a run, in kinds."""
    ports, moments = subject.stream.groups.ports, subject.moments
    neurons: list[Any] = [port for port in ports if port in ("gate", "up", "in")]
    return {
        "pairs": [
            *(question for port in ports for question in (vw.Composition(port, None, "all"), vw.Overlap(port, "all"))),
            *(question for port in neurons for question in (vw.NeuronNeuron(port), vw.NeuronReaders(port))),
            *(question for port in neurons for question in (vw.NeuronCosines(port), vw.HeadNeuron(port))),
            *(vw.NeuronHead("V"), vw.NeuronHead("K"), vw.Subspaces("O", "K"), vw.Subspaces("O", "O")),
            *(vw.ComponentComposition("L0H1"), vw.ComponentComposition("L0H1", "unembed")),
        ],
        "contribution": [vw.Contribution(port, moments, c, "all") for port in ports for c in (False, True)],
        "channels": [
            *(vw.Circuit("L0H1.ov"), vw.Circuit("L1H1.qk"), vw.Channel("L0.mlp", "L1H1.K")),
            *(vw.Channel("embed", "unembed"), vw.ChannelTokens("L0H1", "L1H2.V"), vw.OffsetProfile("L0H1", "L1H2.K")),
            *(vw.MeanCircuit("L1H2"), vw.LinearComposition(), vw.Paths("L0H1", "unembed")),
        ],
        "crowding": [vw.Coherence(), vw.Interference(), vw.Recovery(), vw.Bandwidth(), vw.Basis()],
        "memory": [vw.Clearing("L0H1"), vw.Clearing("L0.mlp"), vw.Erasure(), vw.HeadErasers(), vw.Neurons()],
        "flow": [
            *(vw.Lens(), vw.Trace(token=3), vw.Trace(f"L1.mlp.{neurons[0]}"), vw.Route("L1H1", 3), vw.Labels()),
            *(vw.Observation(), vw.Attribution("K", "all"), vw.Attribution("unembed", "all")),
            *(vw.Attribution("unembed", "all", vw.LogitDifference(3)), vw.EdgeAblation("L0H1", "L1H2.K")),
        ],
        "fate": [
            *(vw.Erased(), vw.Persistence(), vw.Persistence(True), vw.PersistenceSummary(), vw.ErasedBy()),
            *(vw.Frontier(), vw.ErasurePolicy()),
        ],
        "statements": [vw.Statements()],
    }


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Subject, Subject]]:
    """A model, and the same in disguise."""
    model = tiny(request.param, seed=1, dtype=torch.float64)
    with norms_in_full_precision():
        yield Subject(model), Subject(disguised(model, seed=2))


def test_the_disguise_changes_the_weights_and_no_probability(pair: tuple[Subject, Subject]) -> None:
    plain, other = pair
    torch.testing.assert_close(plain.probabilities, other.probabilities, rtol=0, atol=1e-10)
    assert plain.stream.source.fingerprint != other.stream.source.fingerprint


@pytest.mark.parametrize(
    "kind", ["pairs", "contribution", "channels", "crowding", "memory", "flow", "fate", "statements"]
)
def test_no_answer_sees_the_disguise(pair: tuple[Subject, Subject], kind: str) -> None:
    asked = [questions(subject)[kind] for subject in pair]
    moved = [
        f"{plain.question} {plain.parameters}: {', '.join(columns)}"
        for plain, other in zip(*asked, strict=True)
        if (columns := list(different(pair[0].answer(plain), pair[1].answer(other))))
    ]
    assert not moved, "\n".join(moved)


@pytest.mark.parametrize("seed", range(20))
def test_twenty_disguises_of_one_model(seed: int) -> None:
    model = tiny("gpt2-untied-narrow", seed=1, dtype=torch.float64)
    plain, other = (vw.open(m).to(torch.float64) for m in (model, disguised(model, seed)))
    for question in (vw.Composition("K", None, "all"), vw.Composition("unembed", None, "all"), vw.Neurons()):
        assert not list(different(question(plain), question(other)))


def test_left_in_the_constants_show() -> None:
    model = tiny("gpt2-untied-narrow", seed=1, dtype=torch.float64)
    for port in ("K", "unembed"):
        plain, other = (vw.Composition(port)(vw.open(m, fold=False)) for m in (model, disguised(model, 0)))
        assert "score" in list(different(plain, other))


_COUNTS = ("erased_by_optimal", "agreement", "chance")
"""Shares of units beyond a threshold that is one unit's own ratio: on which side that unit falls is rounding."""


def different(one: vw.Record, two: vw.Record) -> Iterator[str]:
    """Columns that differ by more than rounding; of text, the words."""
    single = one.stamp.get("compute_dtype") == "float32"
    for column in one.columns:
        a, b = one[column.name], two[column.name]
        if isinstance(a, tuple) or isinstance(b, tuple):
            if a != b and column.name not in ("evidence", "why", "witnesses", "condition"):
                yield column.name
            continue
        if column.name in _COUNTS:
            assert torch.allclose(a.double(), b.double(), atol=2 / len(TOKENS.flatten()))
            continue
        size = float(a.double().nan_to_num().abs().max())
        if not torch.allclose(a.double(), b.double(), 1e-6, 1e-12 + (1e-5 if single else 1e-7) * size, True):
            yield column.name
