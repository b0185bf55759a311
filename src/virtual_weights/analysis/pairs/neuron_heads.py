"""Heads that write to single neurons, and single neurons that write to heads: all pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import reading_circuits, writing_circuits
from virtual_weights.analysis.maps.map_side import component_axis
from virtual_weights.analysis.maps.neuron_side import (
    NeuronRange,
    NeuronRows,
    NeuronSide,
    check_neuron_port,
    neuron_side,
)
from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    MapStack,
    accumulate,
    beyond_rounding,
    haar_moments,
    in_full_float32,
    one_thread,
    self_moments,
    standardised,
)
from virtual_weights.linalg.decompose import square_roots
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Block, Blocked, Stream, Work, cost
from virtual_weights.stream.effective import as_seen
from virtual_weights.stream.group import HEAD_PORTS, HeadPort, NeuronPort

_ROWS = 512  # neurons in one product with heads


class HeadPairs(Blocked[Stream]):
    """Every head with every neuron; a block is one MLP, or a piece of it where it has more than 8,192 neurons."""

    device: str
    memory_mb: int

    @abstractmethod
    def neurons(self, stream: Stream) -> NeuronSide:
        """One side."""

    @abstractmethod
    def heads(self, stream: Stream) -> Heads:
        """The other."""

    def blocks(self, subject: Stream) -> tuple[str, ...]:
        """All MLPs, or pieces of them, in order of depth.

        Raises:
            UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
        """
        return tuple(part.name for part in self.neurons(subject).ranges)

    @classmethod
    def compute(cls, work: Work, subject: Any, progress: Progress = silent) -> Iterator[tuple[Any, str, Block]]:
        """Compare the neurons of each block with all heads; progress is in pairs.

        A block holds ``score`` (heads, n), NaN of pairs that cannot reach, and ``norms`` (n,) of the neurons' vectors.
        """
        sides = {question: (question.heads(subject), question.neurons(subject)) for question, _ in work}
        count = {
            (q, part.name): part.count * heads.stack.count for q, (heads, ns) in sides.items() for part in ns.ranges
        }
        done, total = 0, sum(count[question, name] for question, name in work)
        for question, (heads, neurons) in sides.items():
            names = {name for other, name in work if other == question}
            for batch in _batches([part for part in neurons.ranges if part.name in names], heads, question.memory_mb):
                loaded = [neurons.load(part, question.device) for part in batch]
                for part, rows, score in zip(batch, loaded, _scores(heads, neurons, loaded), strict=True):
                    done += count[question, part.name]
                    progress(done, total)
                    yield question, part.name, {"score": score, "norms": rows.norms.cpu()}

    def _score(self, stream: Stream, blocks: Iterable[Block]) -> tuple[NeuronSide, Heads, Tensor, Tensor]:
        """Both sides, (heads, neurons) of scores, and the norms of the neurons' vectors.

        Norms are (1, neurons), or (heads, neurons) where a cross-layer dictionary's vectors differ between heads.
        """
        neurons, heads = self.neurons(stream), self.heads(stream)
        score = torch.full((heads.stack.count, neurons.count), torch.nan)
        norms = torch.full((1, neurons.count), torch.nan, dtype=accumulate)
        for part, block in zip(neurons.ranges, blocks, strict=True):
            rows = torch.ones(heads.stack.count, dtype=torch.bool)
            if neurons.port == "out" and part.grows:
                rows = (heads.stack.position >= part.position) & (heads.stack.position < part.end)
                norms = norms.expand(heads.stack.count, -1).clone()
            score[rows, part.numbers] = block["score"][rows]
            norms[rows if len(norms) > 1 else slice(None), part.numbers] = block["norms"]
        return neurons, heads, score, norms


@final
@dataclass(frozen=True)
class HeadNeuron(HeadPairs):
    """How strongly what a head writes, by its OV circuit, enters what a single later neuron reads.

    ``||w^T OV||`` where w is the neuron's row of the port with the norm folded and ``OV = W_O W_V``.

    Columns, float32: ``score`` ``= ||w^T OV|| / (||w|| ||OV||_F)``, in [0, 1]; ``strength``, its numerator;
    ``null_ratio`` ``= score sqrt(d)``; ``z``, the squared strength against its mean and deviation when the neuron's
    direction is turned at random. Of a head or neuron that is 0, strength is 0 and score undefined; a pair that cannot
    reach is absent. A weighted sum of few squares is skewed: even at chance ``z`` reaches further above 0 than below.

    Invariant under re-basing of heads, re-ordering of neurons and, with RMSNorm folded, rotation of the stream.

    Attributes:
        port: through which the neurons read: ``"in"``, or where gated ``"up"`` or ``"gate"``.
        reader: only this neuron, e.g. ``"L18N5"``; None for all.
        writer: only this head, e.g. ``"L16H0"``; None for all.
        device: any torch device.
        memory_mb: of blocks at work at once; where all do not fit, heads are prepared several times.

    Reference: Elhage et al. 2021, for composition; here the reading circuit is a single row.
    """

    question: ClassVar[str] = "head_neuron"
    port: NeuronPort = "up"
    reader: str | None = None
    writer: str | None = None
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        check_neuron_port(self.port)

    def neurons(self, stream: Stream) -> NeuronSide:
        return neuron_side(stream, self.port, self.reader)

    def heads(self, stream: Stream) -> Heads:
        axis = component_axis("head", stream.groups.heads)
        return some_heads(as_seen(stream, self.port), axis, writing_circuits, self.writer)

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """A Record over (neuron, head), both in order of depth."""
        neurons, heads, score, norms = self._score(subject, blocks)
        columns = columns_of(score.T, norms.T * heads.norms, heads.deviation, subject.d_model)
        return subject.record(self, (Axis("neuron", neurons.labels), heads.axis), columns, **STAMP)


@final
@dataclass(frozen=True)
class NeuronHead(HeadPairs):
    """How strongly what a single neuron writes enters what a later head reads, by its circuit.

    ``||C w_out||`` with ``C = QK^T`` for port Q, ``QK`` for K (``QK = W_Q^T W_K``, rotary offset 0) and ``OV`` for V.
    Columns, absence and invariances are those of :class:`HeadNeuron`. Where query heads share keys and values, the
    axis of heads names their groups.

    Attributes:
        port: ``"Q"``, ``"K"`` or ``"V"``.
        reader: only this head, e.g. ``"L18H6"``; None for all.
        writer: only this neuron, e.g. ``"L16N9"``; None for all.
        device: any torch device.
        memory_mb: of blocks at work at once.
    """

    question: ClassVar[str] = "neuron_head"
    port: HeadPort = "K"
    reader: str | None = None
    writer: str | None = None
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        if self.port not in HEAD_PORTS:
            raise UsageError(f"no head reads through port {self.port!r}", expected="Q, K or V", do="choose one")

    def neurons(self, stream: Stream) -> NeuronSide:
        return neuron_side(stream, "out", self.writer)

    def heads(self, stream: Stream) -> Heads:
        axis = component_axis("head", stream.groups.heads, self.port)
        return some_heads(stream, axis, partial(reading_circuits, port=self.port), self.reader)

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """A Record over (head, neuron), both in order of depth."""
        neurons, heads, score, norms = self._score(subject, blocks)
        columns = columns_of(score, heads.norms[:, None] * norms, heads.deviation[:, None], subject.d_model)
        axes = heads.axis, Axis("neuron", neurons.labels)
        return subject.record(self, axes, columns, **STAMP, rotary_offset=0)


STAMP = {"gauge": "heads by circuits, neurons by their own basis", "compute_dtype": "float32"}


@final
@dataclass(frozen=True, eq=False)
class Heads:
    """Some heads' circuits on one side of the stream.

    Attributes:
        axis: their names, and the key/value groups where heads share the maps.
        stack: the circuits.
        norms: (m,) float64, Frobenius norms.
        deviation: (m,) float64, of the squared score, at random orientation.
    """

    axis: Axis
    stack: MapStack
    norms: Tensor
    deviation: Tensor

    def unit(self, heads: Tensor, device: torch.device) -> Tensor:
        """(heads, k, d) float32: thin maps with the Grams of these heads' circuits, each of Frobenius norm 1."""
        stack = self.stack
        assert stack.metric is not None
        norms = self.norms[heads, None, None]
        with one_thread():
            roots = square_roots(stack.metric[heads]) / torch.where(norms > 0, norms, 1.0)
            return (roots.to(device) @ stack.outer[stack.index[heads]].to(device=device, dtype=accumulate)).float()


def some_heads(stream: Stream, axis: Axis, circuits: Callable[[Stream], MapStack], only: str | None) -> Heads:
    """All heads of an axis, or the one of this name."""
    row = slice(None)
    if only is not None:
        names = [label if "." in only else label.partition(".")[0] for label in axis.labels]
        if only not in names:
            raise UsageError(
                f"this model has no head {only!r}",
                expected=f"a name from {axis.labels[0]} to {axis.labels[-1]}",
                do="correct the name, or leave its port out",
            )
        row = slice(names.index(only), names.index(only) + 1)
        axis = Axis(axis.name, axis.labels[row], axis.groups[row])
    with one_thread():
        stack = circuits(stream)
        metric = None if stack.metric is None else stack.metric[row]
        stack = MapStack(stack.outer, stack.index[row], metric, stack.position[row])
        trace, square = self_moments(stack)
        _, variance = haar_moments(1.0, 1.0, 1.0, square / trace**2, stream.d_model)
    return Heads(axis, stack, trace.sqrt(), variance.sqrt())


def _batches(parts: Sequence[NeuronRange], heads: Heads, memory_mb: int) -> Iterator[Sequence[NeuronRange]]:
    """Consecutive parts whose directions and scores fit into memory together, at least one at a time."""
    width = 4 * (heads.stack.outer.shape[-1] + heads.stack.count)
    step = max(1, memory_mb * 2**20 // (width * max((part.count for part in parts), default=1)))
    return (parts[i : i + step] for i in range(0, len(parts), step))


def _scores(heads: Heads, neurons: NeuronSide, loaded: Sequence[NeuronRows]) -> list[Tensor]:
    """Scores of all heads with some neurons, (heads, n), NaN of pairs that cannot reach."""
    scores = [torch.full((heads.stack.count, len(rows.norms)), torch.nan) for rows in loaded]
    for state in heads.stack.position.unique().tolist():
        chosen = (heads.stack.position == state).nonzero()[:, 0]
        partners = [
            (rows, score)
            for rows, score in zip(loaded, scores, strict=True)
            if (rows.position <= state < rows.end if neurons.port == "out" else state <= rows.position)
        ]
        unit = heads.unit(chosen, loaded[0].unit.device) if partners else torch.empty(0)
        for rows, score in partners:
            score[chosen] = _products(unit, rows.unit.nan_to_num(0.0)).cpu()
    return scores


@in_full_float32()
def _products(unit: Tensor, rows: Tensor) -> Tensor:
    """``||A_i w_j||`` of maps (m, k, d) with rows (n, d), as (m, n)."""
    batch = unit.expand(max(2, len(unit)), -1, -1).mT  # one product alone would be divided among threads
    parts = (torch.bmm(part.expand(len(batch), -1, -1), batch) for part in rows.split(_ROWS))
    return torch.cat([torch.linalg.vector_norm(part, dim=2) for part in parts], dim=1)[: len(unit)]


def columns_of(score: Tensor, norms: Tensor, deviation: Tensor, d: int) -> Iterator[Column]:
    """All columns in float32; ``norms`` and ``deviation`` broadcast against the score."""
    score = beyond_rounding(score, 1.0, torch.finfo(score.dtype).eps)
    strength = norms.float() * score
    score = score.masked_fill(norms == 0, torch.nan)
    yield Column("score", score, "1, in [0, 1]", "strength over both Frobenius norms")
    yield Column("strength", strength, "weights", "norm of the neuron's vector through the circuit")
    yield Column("null_ratio", score * d**0.5, "1 (ratio)", "score over its root mean square at random, 1/sqrt(d)")
    z = standardised(score.square(), torch.tensor(1 / d), deviation.square().float())
    yield Column("z", z, "standard deviations", "strength^2 against its Haar mean and deviation")
