"""Every public question, small: for laws that hold of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

import virtual_weights as vw
from virtual_weights.checkpoint.dictionaries import Decoder, DictionaryPart
from virtual_weights.runtime.flow.observation import operating_point
from virtual_weights.stream import Question
from virtual_weights.stream.attached import Attached, AttachedPart
from virtual_weights.stream.hook_points import hook_point

TOKENS = torch.tensor([[3, 17, 5, 5, 30, 1, 22, 9], [8, 2, 30, 36, 11, 0, 4, 12]])
KINDS = (
    *("pairs", "contribution", "channels", "crowding", "memory", "flow", "ablation", "fate", "statements"),
    "features",
)
EDGES = [("L0H1", "L1H2.K"), ("L0H0", "L1H1.V"), ("embed", "unembed")]


class Subject:
    """A model in float64, its stream, runs of it and its moments.

    Args:
        model: in float64; a module, or tensors with their ``config``, of which what runs is made.
        how: how runs run, as in ``Run.on_tokens``; by default the model itself.
    """

    def __init__(self, model: Any, config: Mapping[str, Any] | None = None, **how: Any) -> None:
        how = how or ({"model": model} if config is None else {"dtype": torch.float64})
        self.stream = vw.open(model, config=config).to(torch.float64)
        self.run = vw.Run.on_tokens(self.stream, TOKENS, **how)
        self.prompt = vw.Run.on_prompt(self.stream, TOKENS[0], **how)
        self.repeats = vw.Run.on_repeats(self.stream, 32, 16, **how)
        self.pairs = vw.Run.on_pairs(self.stream, list(TOKENS), list(TOKENS.flip(0)), **how)
        self.moments = vw.Observation().moments(self.run)
        self.point = operating_point(self.prompt)
        self.borrowed = borrowed(self.stream) if self.stream.groups.mlps else self.stream
        self.halves = ()
        if self.stream.groups.mlps:
            halves = replace(self.run, stream=self.borrowed).halves()
            self.halves = tuple(vw.coactivations(half, without_sinks=False) for half in halves)

    def answers(self, question: Question[Any]) -> Iterator[vw.Record]:
        """Asked of the stream, of the run that it needs, or of both where it takes either."""
        subjects = get_args(question.subject) or (question.subject,)
        if vw.Stream in subjects:
            yield question(self.borrowed if question.question.startswith("feature_") else self.stream)
        if vw.Run in subjects:
            yield question(self._run(question))

    def _run(self, question: Question[Any]) -> vw.Run:
        if getattr(question, "replacement", None) == "partner":
            return self.pairs
        prompted = question.question in ("lens", "trace", "route")
        return self.prompt if prompted else self.repeats if question.question == "labels" else self.run


def borrowed(stream: vw.Stream, count: int = 6) -> vw.Stream:
    """With the first neurons of every MLP attached as the features of transcoders, as the model has them."""
    parts = list[AttachedPart]()
    for mlp in stream.groups.mlps:
        rows, columns, bias = (stream.weight(role, mlp) for role in ("up", "down", "up_bias"))
        assert rows is not None
        assert columns is not None
        decoder = Decoder(f"{mlp.id}.output", partial(_some, columns.T[:count]))
        part = DictionaryPart(
            mlp.layer,
            count,
            f"{mlp.id}.normed",
            partial(_some, rows[:count]),
            None if bias is None else bias[:count],
            decoders=(decoder,),
        )
        reading, writing = hook_point(f"{mlp.id}.normed", stream.model), hook_point(decoder.writes, stream.model)
        parts.append(AttachedPart(f"own{mlp.layer}", part, reading, ((writing, decoder),)))
    return replace(stream, attached=Attached(parts=tuple(parts)))


def _some(rows: Tensor, some: slice) -> Tensor:
    return rows[some]


def _embedding(subject: Subject) -> vw.Vector:
    """A direction that turns with the stream."""
    return vw.Vector(subject.stream.write("embed")[0][:, 3], "embed[3]")


def questions(subject: Subject) -> dict[str, list[Question[Any]]]:
    """Public questions of the weights and of a run, by ``KINDS``; of MLPs where the model has them."""
    mlps = bool(subject.stream.groups.mlps)
    ports, moments, point = subject.stream.groups.ports, subject.moments, subject.point
    neurons: list[Any] = [port for port in ports if port in ("gate", "up", "in")]
    asked: dict[str, list[Question[Any]]] = {
        "pairs": [
            *(question for port in ports for question in (vw.Composition(port, None, "all"), vw.Overlap(port, "all"))),
            *(question for port in neurons for question in (vw.NeuronNeuron(port), vw.NeuronReaders(port))),
            *(question for port in neurons for question in (vw.NeuronCosines(port), vw.HeadNeuron(port))),
            *([vw.NeuronHead("V"), vw.NeuronHead("K"), vw.HeadUnits("V"), vw.HeadUnits(neurons[0])] if mlps else []),
            *(vw.Subspaces("O", "K"), vw.Subspaces("O", "O"), vw.CompositionSketch("K", None, "all")),
            *(vw.ComponentComposition("L0H1"), vw.ComponentComposition("L0H1", "unembed")),
            *(vw.VectorReaders(_embedding(subject), "L1"), vw.VectorWriters(_embedding(subject))),
        ],
        "contribution": [vw.Contribution(port, moments, c, "all") for port in ports for c in (False, True)],
        "channels": [
            *(vw.Circuit("L0H1.ov"), vw.Circuit("L1H1.qk"), vw.Channel("L0.mlp" if mlps else "L0H2", "L1H1.K")),
            *(vw.Channel("embed", "unembed"), vw.ChannelTokens("L0H1", "L1H2.V"), vw.OffsetProfile("L0H1", "L1H2.K")),
            *(vw.HeadCircuits(), vw.HeadTokens(), vw.PairAngles("L0H1", "L1H2.K")),
            *(vw.MeanCircuit("L1H2"), vw.LinearComposition(), vw.Paths("L0H1", "unembed")),
            *(vw.LinearComposition(point), vw.Paths("L0H1", "unembed", point=point)),
        ],
        "crowding": [
            *([vw.Coherence(), vw.Interference(), vw.Recovery()] if mlps else [vw.Coherence("ov")]),
            *(vw.Bandwidth(), vw.Basis()),
        ],
        "memory": [
            *(vw.Clearing("L0H1"), vw.Erasure(), vw.HeadErasers()),
            *([vw.Clearing("L0.mlp"), vw.Neurons()] if mlps else []),
        ],
        "flow": [
            *(vw.Lens(), vw.Trace(token=3), vw.Trace(f"L1.mlp.{neurons[0]}" if mlps else "L1H1.K")),
            *(vw.Route("L1H1", 3), vw.Labels()),
            *(vw.Observation(), vw.Attribution("K", "all"), vw.Attribution("unembed", "all")),
            *(vw.Attribution("unembed", "all", vw.LogitDifference(3)), vw.EdgeAblation("L0H1", "L1H2.K")),
            *(vw.EdgeTokens("L0H1", "L1H2.K"), vw.EdgeTokens("L0H0", "L1H1.Q", "resample", "move")),
            *(vw.EdgeTokens("embed", "L1H1.V"), vw.EdgeTokens("L0H1", "unembed")),
            vw.VectorEffect(_embedding(subject), "L1", (0.5,), metric=vw.LogitDifference(3)),
            vw.VectorActivity(_embedding(subject)),
        ],
        "ablation": [
            *(vw.Ablation(EDGES, 2, replacement=how) for how in ("mean", "resample", "partner")),
            vw.EdgeSetAblation(EDGES, "ports", scalars="move", metric=vw.LogitDifference(3)),
            vw.Validation(moments, edges=6, length=8),
        ],
        "fate": [
            *(vw.Erased(), vw.Persistence(), vw.Persistence(True), vw.PersistenceSummary(), vw.ErasedBy()),
            *(vw.Frontier(), vw.ErasurePolicy()),
        ],
        "statements": [vw.Statements(), vw.Statements(("L3", "T7"), point=point)],
        "features": [],
    }
    if mlps:
        first, second = subject.halves
        asked["features"] = [vw.FeatureEdges(first, least=1), vw.FeatureInterference(first, second, 5, 1)]
    assert tuple(asked) == KINDS
    return asked


_BY_BASIS = ("estimate", "error")
"""Of a sketch: what comes of random signs along the axes of the stream, and is another number in another basis."""
_COUNTS = ("erased_by_optimal", "agreement", "chance")
"""Shares of units beyond a threshold that is one unit's own ratio: on which side that unit falls is rounding."""


def unlike(here: Subject, there: Subject, kind: str, loose: float = 1.0) -> Iterator[str]:
    """What two subjects answer differently to the questions of a kind: the question with the columns, or the error."""
    for one, other in zip(questions(here)[kind], questions(there)[kind], strict=True):
        try:
            given = list(there.answers(other))
        except Exception as error:  # noqa: BLE001 - all of them are listed, not the first alone
            yield f"{one.question} {one.parameters}: {type(error).__name__}: {error}"
            continue
        for a, b in zip(here.answers(one), given, strict=True):
            if columns := list(different(a, b, loose)):
                yield f"{one.question} {one.parameters}: {', '.join(columns)}"


def different(one: vw.Record, two: vw.Record, loose: float = 1.0) -> Iterator[str]:
    """Columns that differ by more than rounding, or so many times it; of text, the words."""
    single = one.stamp.get("compute_dtype") == "float32"
    for column in one.columns:
        a, b = one[column.name], two[column.name]
        if isinstance(b, torch.Tensor) and b.device.type != "cpu":
            yield f"{column.name} on {b.device}"
            continue
        if column.name in _BY_BASIS:
            continue
        if isinstance(a, tuple) or isinstance(b, tuple):
            if a != b and column.name not in ("evidence", "why", "witnesses", "condition"):
                yield column.name
            continue
        if column.name in _COUNTS:
            assert torch.allclose(a.double(), b.double(), atol=2 / len(TOKENS.flatten()))
            continue
        size = float(a.double().nan_to_num().abs().max())
        absolute = 1e-12 + loose * (1e-5 if single else 1e-7) * size
        if not torch.allclose(a.double(), b.double(), loose * 1e-6, absolute, True):
            yield column.name
