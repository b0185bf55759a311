"""Contribution: what every writer actually puts on every reader, averaged over the tokens of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.map_side import component_axis, read_gram, write_gram
from virtual_weights.analysis.maps.weighted_maps import Gram, WeightedMaps, energies_of
from virtual_weights.linalg import MapStack, accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Column, Record
from virtual_weights.stream import Group, Question, Stream, cost
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers, check_port, check_writers
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.score_metric import Offsets, mean_turn, score_metric

_Outer = Mapping[str, Tensor]
"""Of every attention its transposed write maps, (heads, k, d)."""


@final
@dataclass(frozen=True)
class Contribution(Question[Stream]):
    """Data-aware virtual weights: the energy ``E||A R~ O z/s||^2`` that each writer adds to each later reader.

    ``O z`` is what the writer wrote, s the reader's norm scalar, and A is what becomes of the reader's input::

        Q: A^T A = Cov(Rot^T k) / d_head    K: A^T A = E[Rot q q^T Rot^T] / d_head    V: A = W_O
        gate, up, in, unembed: A = 1

    so Q and K are in squared attention logits, as if queries and keys of a pair were independent of what is
    contributed; V in squared stream norm; the others in squared pre-activations or logits (less their mean over the
    vocabulary), summed over neurons or tokens. With ``C = E[z z^T/s^2]`` it is ``||A R~ O C^(1/2)||_F^2``, the same
    product as a composition score.

    Softmax does not see what adds the same to all scores of a query. Of the keys that a contribution to Q meets, only
    what differs between them counts: ``Cov(Rot^T k) = E[Rot^T k k^T Rot] - E[Rot]^T E[k] E[k]^T E[Rot]``, with E over
    keys and offsets. Of a contribution to K the column ``varying`` leaves out what all keys have in common,
    ``E_q <q, E[Rot]^T R~ O E[z/s]>^2``: without rotary embedding the mean over tokens, with it as much of that mean as
    rotation leaves on average over the offsets (all of it at one offset).

    ``activity`` is the baseline that any predictor of what flows should be held against: the root mean square of
    ``O z/s``, what the writer alone puts on the stream as the reader's norm shows it. No map of the reader is in it.

    Where queries and keys have a norm of their own, its scalar enters by its mean square alone, as if independent of
    what is contributed, and the energy of all that the port receives holds constants of the model too.

    C is exact or factorised by the kind of writer, as the moments hold it: the stamp says which under ``held``, see
    ``Moments``. Biases are exact.

    Invariant under re-basing of heads (Q, K: by bases in which rotary turns planes) and, with RMSNorm folded, under
    rotation of the stream.

    Attributes:
        port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` or ``"unembed"``.
        moments: of the text.
        centred: leave out the mean, ``C = Cov(z/s)``: what of a writer's output differs between tokens.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and biases too.
        rotary_offset: query position minus key position; None is the mean over all causal pairs of a chunk.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.
    """

    question: ClassVar[str] = "contribution"
    port: Port
    moments: Moments
    centred: bool = False
    writers: Writers = "heads"
    rotary_offset: int | None = None
    device: str = cost("cpu")
    memory_mb: int = cost(256)

    def __post_init__(self) -> None:
        check_port(self.port)
        check_writers(self.writers)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (states done, states in all).

        Returns:
            A Record over (reader, writer), both in order of depth: ``contribution``, ``activity``, and for Q, K and V
            ``share``, of the energy of all that the port receives (constants of the model apart). Contributions can
            cancel, so shares need not sum to 1. For K also ``varying``, unless ``centred`` has left the mean out
            already. A pair that cannot reach is absent.

        Raises:
            UsageError: the moments belong to another model, or the model has no such port.
        """
        ((_, record),) = self.together([self], stream, progress)
        return record

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Any, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        """All ports of the same moments in one pass: what writes arrives alike at all ports that read one state."""
        alike: dict[Contribution, list[Contribution]] = {}
        for question in questions:
            assert isinstance(question, Contribution)
            question.moments.check(subject)
            alike.setdefault(replace(question, port="K"), []).append(question)
        for done, some in enumerate(alike.values()):
            whole = partial(_part_of, progress, done, len(alike))
            yield from zip(some, _answers(some, subject, whole), strict=True)

    def fill(
        self,
        stream: Stream,
        sited: Sequence[tuple[_Table, Group]],
        writers: Sequence[Group],
        outer: _Outer,
    ) -> None:
        """What reads one state, of questions that differ in the port alone, with all writers that reach it."""
        sides: list[WeightedMaps] = []
        for table, group in sited:
            side, table.inputs[table.rows(group)] = table.question._reading(stream, group)
            sides.append(side)
        if not writers:
            return
        reader = sited[0][1]
        sources = self._writing(stream, writers, reader, outer)
        met = any(table.question.port == "K" for table, _ in sited)
        means = self._means(stream, writers, reader) if met or self.centred else torch.empty(0)
        activity = torch.cat([self._written(stream, writer, reader) for writer in writers])
        activity = (activity - means.square().sum(0) if self.centred else activity).clamp(min=0.0).sqrt()
        energies = energies_of(sides, sources, self.device, self.memory_mb * 2**20)
        names = [label for writer in writers for label in writer.labels]
        for (table, group), energy in zip(sited, energies, strict=True):
            rows, columns = table.rows(group), table.columns(names)
            table.energy[rows, table.columns(sources.labels)] = energy
            table.activity[rows, columns] = activity
            if table.question.port == "K" and not self.centred:
                table.common[rows, columns] = self._common(stream, group, means)

    def record(self, stream: Stream, table: _Table) -> Record:
        """The answer."""
        units = {"Q": "squared logits", "K": "squared logits", "V": "squared norm"}
        energy, unit = table.energy, units.get(self.port, "squared activations")
        columns = [Column("contribution", energy, unit, "E||A R~ O z/s||^2")]
        if self.port in HEAD_PORTS:
            share = "contribution over that of the port's whole input"
            columns.append(Column("share", energy / table.inputs[:, None], "1 (ratio), >= 0", share))
        activity = "root mean square of O z/s of the writer alone"
        columns.append(Column("activity", table.activity, "1 (ratio), >= 0", activity))
        if self.port == "K" and not self.centred:
            varying = "contribution without what is common to all keys of a query, which softmax does not see"
            columns.append(Column("varying", (energy - table.common).clamp(min=0.0), "squared logits", varying))
        raw = [group.id for group in stream.groups.readers(self.port) if self.port == "enc" and group.norm is None]
        weights = {"tokens_weighted": f"by 1/s^2 of the state's norm, which {', '.join(raw)} does not take"}
        return stream.record(
            self,
            table.axes,
            columns,
            **(weights if raw else {}),
            moment="centred" if self.centred else "uncentred",
            held=self.moments.held,
            tokens=self.moments.tokens,
            rotary_offset="mean over causal pairs" if self.rotary_offset is None else self.rotary_offset,
            gauge="free of heads' inner bases",
        )

    def _reading(self, stream: Stream, group: Group) -> tuple[WeightedMaps, Tensor]:
        """The readers of one group, weighted by A, and the energy of all that they receive."""
        if self.port not in HEAD_PORTS:
            gram = partial(read_gram, stream, self.port, group)
            return WeightedMaps(group.labels, None, (gram,)), torch.full((1,), float("nan"))
        read, shared, metric = stream.read(self.port, group), group.shared(self.port), self._metric(stream, group)
        id = f"{group.id}.{self.port}"
        scales = self.moments.port_scales.get(id)  # the scalar of a norm on the port, as if independent of the rest
        factor = 1.0 if scales is None else scales[:, 1].double().repeat_interleave(shared)[:, None, None]
        stack = MapStack.unplaced(read.maps, metric * factor)
        second, mean = self.moments.ports[id].double(), self.moments.port_means[id].double()
        if self.centred:
            second = second - _outer_product(mean, mean)
        elif read.constants is not None and id not in self.moments.port_scales:
            c = read.constants.double()
            cross = _outer_product(mean, c)
            second = second - cross - cross.mT + _outer_product(c, c)
        energy = (metric * second.repeat_interleave(shared, 0)).sum((1, 2))
        return WeightedMaps(group.labels, stack, ()), energy

    def _metric(self, stream: Stream, group: Group) -> Tensor:
        """``A^T A`` of every head, (heads, k, k) float64."""
        if self.port == "V":
            out = stream.write(group).double()
            return out.mT @ out
        opposite = "K" if self.port == "Q" else "Q"
        other = self.moments.ports[f"{group.id}.{opposite}"], self.moments.port_means[f"{group.id}.{opposite}"]
        metric = score_metric(stream, (self.port, group), *other, self._offsets)
        return metric.repeat_interleave(group.shared(opposite), 0)

    @property
    def _offsets(self) -> Offsets:
        return Offsets(self.moments.length, self.rotary_offset)

    def _means(self, stream: Stream, writers: Sequence[Group], reader: Group) -> Tensor:
        """``O E[z/s]`` of every writer as a reader receives it, (d, writers)."""
        assert reader.reads is not None
        means: list[Tensor] = []
        for group in writers:
            if group.constant:
                mean = stream.write(group)[0].double() * self.moments.states["inverse"][reader.reads].double()
            else:
                _, inner = self.moments.held_at(group.id, reader.reads - group.first)
                maps = stream.write(group).double() if group.kind == "head" else None
                mean = (inner if maps is None else torch.einsum("mdk,mk->md", maps, inner)).T
            means.append(mean)
        return torch.cat(means, 1)

    def _written(self, stream: Stream, group: Group, reader: Group) -> Tensor:
        """``E|O z/s|^2`` of the writers of one group as a reader receives them, (m,)."""
        assert reader.reads is not None
        if not group.constant:
            return self.moments.energy[group.id][reader.reads - group.first].double()
        square = stream.write(group)[0].double().square().sum(0)
        return square * self.moments.states["inverse_square"][reader.reads].double()

    def _common(self, stream: Stream, group: Group, means: Tensor) -> Tensor:
        """What means (d, writers) add alike to all scores of a query, (heads, writers) squared logits."""
        attention = group.attention
        assert attention is not None
        keys = stream.read("K", group).maps.double() @ means  # (shared heads, k, writers)
        scales = self.moments.port_scales.get(f"{group.id}.K")
        keys = keys if scales is None else keys * scales[:, :1, None].double()
        keys = (mean_turn(stream, group, self._offsets).mT @ keys).repeat_interleave(group.shared("K"), 0)
        queries = self.moments.ports[f"{group.id}.Q"].double() * attention.scale**2
        return (keys * (queries @ keys)).sum(1)

    def writing(self, stream: Stream) -> Sequence[Group]:
        """Heads, or all whose moments are known, in order of depth."""
        if self.writers == "heads":
            return stream.groups.readers("Q")
        return [g for g in stream.groups.writers if g.kind == "head" or g.constant or g.id in self.moments.second]

    def _writing(self, stream: Stream, writers: Sequence[Group], reader: Group, outer: _Outer) -> WeightedMaps:
        """Writers as a reader receives them: maps O, weighted by ``C^(1/2)``; heads first."""
        assert reader.reads is not None
        heads = [group for group in writers if group.kind == "head"]
        wide = [group for group in writers if group.kind != "head"]
        thin = None
        if heads:
            metric = torch.cat([self._second(group, reader.reads) for group in heads])
            thin = MapStack.unplaced(torch.cat([outer[group.id] for group in heads]), metric)
        grams = tuple(self._wide(stream, group, reader.reads) for group in wide)
        return WeightedMaps(tuple(label for group in (*heads, *wide) for label in group.labels), thin, grams)

    def _wide(self, stream: Stream, group: Group, state: int) -> Gram:
        if not group.constant:
            return lambda: self._second(group, state)[0]
        square, mean = (float(self.moments.states[name][state]) for name in ("inverse_square", "inverse"))
        weight = square - mean**2 if self.centred else square
        return lambda: write_gram(stream, group) * weight

    def _second(self, group: Group, state: int) -> Tensor:
        """C of a group as a state receives it."""
        second, mean = self.moments.held_at(group.id, state - group.first)
        return second - _outer_product(mean, mean) if self.centred else second


@final
class _Table:
    """What becomes the answer of one port, (readers, writers), NaN where a writer does not reach."""

    def __init__(self, question: Contribution, stream: Stream, writers: Sequence[Group]) -> None:
        self.question, self.groups = question, stream.groups.readers(question.port)
        self.axes = component_axis("reader", self.groups, question.port), component_axis("writer", writers)
        shape = tuple(len(axis.labels) for axis in self.axes)
        self.energy, self.activity, self.common = (torch.full(shape, torch.nan, dtype=accumulate) for _ in range(3))
        self.inputs = torch.full(shape[:1], torch.nan, dtype=accumulate)
        self._column = {label: i for i, label in enumerate(self.axes[1].labels)}

    def rows(self, group: Group) -> slice:
        """The rows of a group's readers."""
        first = self.axes[0].labels.index(group.readers(self.question.port)[0])
        return slice(first, first + len(group.components))

    def columns(self, writers: Sequence[str]) -> list[int]:
        """The columns of some writers."""
        return [self._column[label] for label in writers]


def _part_of(progress: Progress, before: int, passes: int, done: float, states: float) -> None:
    progress(before * states + done, passes * states)


def _answers(questions: Sequence[Contribution], stream: Stream, progress: Progress) -> Iterator[Record]:
    """Answers of several ports, state by state."""
    first, states = questions[0], range(stream.states)
    writers = first.writing(stream)
    outer = {group.id: stream.write(group).mT for group in writers if group.kind == "head"}
    tables = [_Table(question, stream, writers) for question in questions]
    for state in states:
        sited = [(table, group) for table in tables for group in table.groups if group.reads == state]
        if sited:
            reaching = [writer for writer in writers if writer.reaches(state)]
            first.fill(stream, sited, reaching, outer)
        progress(state + 1, len(states))
    for table in tables:
        yield table.question.record(stream, table)


def _outer_product(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]
