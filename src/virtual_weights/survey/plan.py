"""What a map asks of a model, part by part, the call that computes it, and the strongest edges of its answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, final

from virtual_weights.analysis.channels.channel import Channel
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens
from virtual_weights.analysis.channels.head_circuits import HeadCircuits
from virtual_weights.analysis.channels.head_tokens import HeadTokens
from virtual_weights.analysis.channels.offsets import OffsetProfile
from virtual_weights.analysis.channels.pair_angles import PairAngles
from virtual_weights.analysis.crowding.coherence import Coherence
from virtual_weights.analysis.crowding.interference import Interference
from virtual_weights.analysis.crowding.recovery import Recovery
from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.analysis.ledger.basis import Basis
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.analysis.pairs.contribution import Contribution
from virtual_weights.analysis.pairs.neuron_neuron import NeuronCosines, NeuronNeuron, NeuronReaders
from virtual_weights.analysis.pairs.overlap import Overlap
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.analysis.pairs.vectors import VectorReaders, VectorWriters
from virtual_weights.atlas import Atlas, Entry
from virtual_weights.atlas.blocks import BLOCKS, BlockStore, at_work
from virtual_weights.errors import UsageError
from virtual_weights.progress import Step, quiet
from virtual_weights.record import Record
from virtual_weights.runtime.edges.ablation import Ablation
from virtual_weights.runtime.edges.attribution import Attribution
from virtual_weights.runtime.edges.edge_tokens import EdgeTokens
from virtual_weights.runtime.flow.labels import Labels
from virtual_weights.runtime.running.run import Run
from virtual_weights.statements import Statements
from virtual_weights.stream import Component, Group, Question, Stream, open_stream
from virtual_weights.stream.group import HEAD_PORTS
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.provenance import fingerprint_of
from virtual_weights.survey.details import leading, of_edges, of_heads, texts
from virtual_weights.survey.estimate import Machine, estimates
from virtual_weights.survey.strongest import among_heads, foremost, once
from virtual_weights.survey.survey import ENDS, Survey, bars
from virtual_weights.version import VERSION

_NEURON_TABLES: tuple[Any, ...] = (NeuronNeuron, NeuronReaders, NeuronCosines)
_ASKED = frozenset(
    question.question
    for question in (
        *(Channel, ChannelTokens, OffsetProfile, PairAngles, EdgeTokens, HeadCircuits, HeadTokens),
        *(VectorReaders, VectorWriters),
        *(Composition, Overlap, Subspaces, Bandwidth, Basis, HeadErasers, Erasure, Neurons, *_NEURON_TABLES),
        *(Coherence, Interference, Recovery, Labels, Contribution, Attribution, Ablation, Statements),
    )
)
"""What a plan asks, and what is asked of attached directions, by name: a report shows these."""
_SEQUENCES = 8  # chunks on which edges are attributed
_LENGTH = 64  # tokens to which chunks are shortened on which edges are removed, since every edge is a run of its own
_RANDOM = 10  # random edges of every port


class Part(StrEnum):
    """What a map consists of, in the order of the report."""

    composition = "composition"
    overlap = "overlap"
    subspaces = "subspaces"
    bandwidth = "bandwidth"
    memory = "memory"
    neurons = "neurons"
    superposition = "superposition"
    basis = "basis"
    statements = "statements"


@final
@dataclass(frozen=True)
class Plan:
    """What is asked. What the checkpoint has nothing for is passed over.

    Attributes:
        parts: of the weights' side, and the statements.
        rotary_offset: as in ``Composition``.
        edges: with a run: how many edges are removed one by one.
        moments: contributions by these moments, where there is no run.
    """

    parts: Sequence[Part] = tuple(Part)
    rotary_offset: int | None = None
    edges: int = 16
    moments: Moments | None = None

    def records(self, survey: Survey) -> Iterator[Record]:
        """Ask everything; statements last, since they ask what the rest has answered."""
        if survey.step is not quiet:
            survey.expect(self._seconds(survey))
        for part in self.parts:
            if part is not Part.statements:
                yield from survey.answers(self.questions(part, survey.stream))
        removed = list[tuple[str, str]]()
        if survey.run is not None:
            for record in self._flow(survey, survey.run):
                if record.question == Ablation.question:
                    removed += [
                        (str(row["writer"]), str(row["reader"])) for row in record.rows() if row["kind"] == "asked"
                    ]
                yield record
        elif self.moments is not None:
            yield from survey.answers(_contributions(survey.stream, self.moments))
        if Part.composition in self.parts and survey.stream.heads:
            yield from self._details(survey, removed)
        if Part.statements in self.parts and survey.stream.folded:
            yield survey.ask(Statements())

    def questions(self, part: Part, stream: Stream) -> list[Question[Any]]:
        """The questions of one part of the weights' side, as far as they are known beforehand."""
        if part is Part.statements:
            return [Statements()] if stream.folded else []
        groups = stream.groups
        of_heads: dict[Part, Callable[[], list[Question[Any]]]] = {
            Part.overlap: lambda: [Overlap(port) for port in HEAD_PORTS],
            Part.subspaces: lambda: [Subspaces("O", "K"), Subspaces("O", "V")],
            Part.memory: lambda: [HeadErasers(), Erasure()],
        }
        of_mlps: dict[Part, Callable[[], list[Question[Any]]]] = {
            Part.memory: lambda: [Neurons()],
            Part.superposition: lambda: [Coherence(), Interference(), Recovery()],
            Part.neurons: lambda: [table(port) for port in groups.mlps[0].ports for table in _NEURON_TABLES],
        }
        of_all: dict[Part, Callable[[], list[Question[Any]]]] = {
            Part.composition: lambda: [self._composition(port) for port in groups.ports],
            Part.bandwidth: lambda: [Bandwidth()],
            Part.basis: lambda: [Basis()],
        }
        tables = (of_all, True), (of_mlps, bool(groups.mlps)), (of_heads, bool(groups.heads))
        return [question for table, present in tables if present and part in table for question in table[part]()]

    def _seconds(self, survey: Survey) -> dict[Question[Any], float]:
        """How long each question about the weights is expected to take on this machine."""
        asked = [question for part in self.parts for question in self.questions(part, survey.stream)]
        found = estimates(survey.adapted(asked), survey.stream, Machine.measured())
        return {question: e.seconds / len(e.questions) for e in found for question in e.questions}

    def _composition(self, port: Any) -> Composition:
        return Composition(port, self.rotary_offset, "all")

    def _details(self, survey: Survey, removed: Sequence[tuple[str, str]]) -> Iterator[Record]:
        """What heads do by their weights, and what the foremost edges and those that were removed carry."""
        stream, offset = survey.stream, self.rotary_offset
        scored = among_heads(stream, survey.answers([self._composition(port) for port in HEAD_PORTS]))
        edges = once(stream, [*removed, *leading(scored)])
        yield from survey.answers([*of_heads(stream, offset), *of_edges(stream, edges, offset)])
        if survey.run is not None and removed:
            for run, sequences in texts(survey.run, _LENGTH):
                yield from survey.answers([EdgeTokens(*edge, sequences=sequences) for edge in removed], run)

    def _flow(self, survey: Survey, run: Run) -> Iterator[Record]:
        """Labels of heads, contributions to every port, attribution and ablation of the foremost edges."""
        stream = survey.stream
        if stream.heads:  # on random tokens of their own, whatever the text
            yield survey.ask(Labels(), Run.on_repeats(stream, 512, 128, model=run.runner))
        yield from survey.answers(_contributions(stream, survey.moments()))
        if not stream.heads or max(len(chunk) for chunk in run.chunks) <= run.first:
            return
        attributed = survey.answers([Attribution(port, sequences=_SEQUENCES) for port in HEAD_PORTS])
        yield from attributed
        compositions = [self._composition(port) for port in HEAD_PORTS if Part.composition in self.parts]
        scored = among_heads(stream, survey.answers(compositions))
        edges = foremost(stream, scored, attributed, self.edges)
        if edges:
            yield survey.ask(Ablation(edges, _RANDOM), run.shortened(_LENGTH))


def map_model(
    model: Any,
    path: str | Path,
    *,
    run: Run | None = None,
    plan: Plan | None = None,
    name: str | None = None,
    progress: bool | Step | None = None,
    **manner: Any,
) -> Atlas:
    """Compute every connection of a model and store the answers in an atlas, but for what the atlas holds already.

    Args:
        model: a Stream, or whatever ``open`` takes.
        path: the folder of the atlas, new, empty, or an atlas of this model.
        run: also ask what flows on a text, what heads do and what removing edges costs.
        plan: what is asked; None is everything.
        name: what to call the model; None takes its reference.
        progress: whether to draw progress bars, on stderr; None draws them on a terminal and in a notebook. Or what
            begins a step of the progress by name.
        manner: ``device``, ``memory_mb`` and ``compute_dtype`` for every question that has them; and ``executor``, who
            computes pairs, block by block: ``"local"``, this process; ``"local:N"``, N processes; ``"dask"``, a cluster
            of our own on this machine; ``"dask:tls://host:port"``, one that is there. The answers are the same to the
            last bit.

    Raises:
        UsageError: the folder holds something else, or the run is of another model.

    Example:
        >>> atlas = vw.map("smollm2-135m", "atlas", run=vw.Run.on_repeats(stream))  # doctest: +SKIP
        >>> vw.edges(atlas, reader="L18H6.K")  # doctest: +SKIP
    """
    stream = model if isinstance(model, Stream) else open_stream(model) if run is None else run.stream
    with bars(progress) as step:
        called = name or (model if isinstance(model, str) else None)
        with filling(path, stream, run, called, step, **manner) as survey:
            for _ in (plan or Plan()).records(survey):
                pass
    assert survey.atlas is not None
    return survey.atlas


map = map_model  # its public name, virtual_weights.map, by which help() calls it
map.__name__ = map.__qualname__ = "map"


@contextmanager
def filling(
    path: str | Path,
    stream: Stream,
    run: Run | None,
    name: str | None,
    step: Step,
    **manner: Any,
) -> Generator[Survey]:
    """A survey that fills the atlas in a folder; another one of that atlas waits until this one is done.

    Raises:
        UsageError: as ``map_model``.
    """
    stream.source.identify(step("fingerprint"))
    other = run is not None and run.stream.source is not stream.source
    if run is not None and other and run.stream.source.fingerprint != stream.source.fingerprint:
        raise UsageError(
            f"a run of {run.stream.source.reference}",
            expected=f"a run of {stream.source.reference}",
            do="make a run of this model",
        )
    atlas = Atlas.create(path, manifest_of(stream, name))
    survey = Survey(stream, atlas, run, step, **manner)
    with at_work(atlas.path, lambda text: sys.stderr.write(f"{text}\n")):
        store = BlockStore(atlas.path / BLOCKS)
        store.sweep(atlas.finished)
        yield survey
        store.sweep(atlas.finished)


def shown_of(atlas: Atlas, records: Sequence[Record] = ()) -> list[Record]:
    """What a report of an atlas shows: answers to what a plan asks, one of each.

    Of several answers to one question about one port, writer and reader, under several conventions or of several runs,
    this is the one that covers most; the newest of those that cover the same.

    Args:
        atlas: the atlas.
        records: answers that come before the stored ones.
    """
    seen = {_about(record) for record in records}
    entries = [entry for entry in atlas.entries() if entry.question in _ASKED]  # oldest first
    chosen = {_about(entry): entry for entry in sorted(entries, key=lambda entry: entry.size)}
    return [
        *records,
        *(atlas.get(entry.key) for entry in entries if chosen[_about(entry)] is entry and _about(entry) not in seen),
    ]


def _about(answer: Record | Entry) -> tuple[Any, ...]:
    """A question and what it is about; of what an edge does token by token, also how long the text is."""
    size = answer.size if answer.question == EdgeTokens.question else 0
    return answer.question, size, *(str(answer.parameters.get(name)) for name in ENDS)


def manifest_of(stream: Stream, name: str | None = None) -> dict[str, Any]:
    """Name, fingerprint, family, sizes, norm and every component with its positions, as plain JSON values."""
    spec = stream.spec
    return {
        "model": name or stream.source.reference,
        "reference": stream.source.reference,
        "fingerprint": fingerprint_of(stream),
        "family": stream.model.family,
        "norm": stream.norm_stamp,
        "version": VERSION,
        "sizes": {
            "d_model": spec.d_model,
            "n_layers": spec.n_layers,
            "vocab": spec.vocab,
            "states": stream.states,
            "groups": [_sizes(group) for group in stream.groups if group.branch is not None and group.ports],
        },
        "components": [_component(component) for component in stream.components],
    }


def _sizes(group: Group) -> dict[str, Any]:
    """What an attention or MLP measures."""
    if group.attention is None:
        return {"id": group.id, "neurons": group.width, "gated": "gate" in group.ports}
    return {"id": group.id, "heads": group.attention.heads, "kv_heads": group.attention.kv_heads, "d_head": group.width}


def _component(component: Component) -> dict[str, Any]:
    return {
        "label": str(component.label),
        "kind": component.kind,
        "layer": component.label.layer,
        "reads": component.reads,
        "writes": component.writes,
        "group": component.kv_group,
    }


def _contributions(stream: Stream, moments: Moments) -> list[Question[Any]]:
    return [Contribution(port, moments, writers="all") for port in stream.groups.ports]
