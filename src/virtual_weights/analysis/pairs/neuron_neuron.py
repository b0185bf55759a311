"""Which neuron writes to which later neuron: all pairs, without ever forming their matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.neuron_side import (
    UNITS,
    NeuronRange,
    NeuronRows,
    NeuronSide,
    Units,
    check_neuron_port,
    neuron_side,
)
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.linalg.cosines import BINS, CosineTable, Workspace, merged, partners
from virtual_weights.linalg.null import cosine_tail
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Block, Blocked, Stream, Work, cost
from virtual_weights.stream.effective import as_seen
from virtual_weights.stream.group import NeuronPort


@dataclass(frozen=True)
class NeuronPairs(Blocked[Stream]):
    """Virtual weights between single neurons: ``<w_in, w_out>`` of every neuron with every later one.

    What neuron a writes, ``w_out`` times its activation, adds ``<w_in, w_out>`` times that to what neuron b reads
    through the port, up to the norm's scalar; ``w_in`` is b's row with the norm folded. The virtual weight is one
    signed number. Cosines are products of unit vectors in float32, good to about 1e-6. A neuron that reads or writes
    nothing has no direction and no edge.

    One pass over all pairs answers the three questions of this form: :class:`NeuronNeuron`, :class:`NeuronReaders` and
    :class:`NeuronCosines`. A block is what one MLP reads, or a piece of it where it has more than 8,192 neurons; of
    equal cosines the neuron that comes first in depth is the stronger one.

    Attributes:
        port: through which the readers read: ``"in"``, or where gated ``"up"`` or ``"gate"``.
        top: how many edges the tables hold for each reader or each writer.
        reader: only edges into this neuron, e.g. ``"L18N5"``; None for all.
        writer: only edges out of this neuron; None for all.
        writers: ``"neurons"``, ``"features"`` of attached dictionaries, or ``"all"`` of both.
        device: any torch device.
        memory_mb: of blocks at work at once; where all do not fit, writers are read several times.
    """

    port: NeuronPort = "up"
    top: int = 10
    reader: str | None = None
    writer: str | None = None
    writers: Units = "all"
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        check_neuron_port(self.port)
        if self.writers not in UNITS:
            raise UsageError(f"writers={self.writers!r}", expected=", ".join(UNITS), do="choose one of these")
        if self.top < 1 or self.memory_mb < 1:
            raise UsageError(
                f"top={self.top}, memory_mb={self.memory_mb}", expected="at least 1 each", do="pass for example top=10"
            )

    @property
    def basis(self) -> NeuronCosines:
        """The histogram, whose blocks hold the strongest edges too."""
        return NeuronCosines(**{f.name: getattr(self, f.name) for f in fields(self)})

    def blocks(self, subject: Stream) -> tuple[str, ...]:
        """MLPs that some writer reaches, or pieces of them, in order of depth.

        Raises:
            UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
        """
        return tuple(part.name for part, _ in self._sides(subject).reached())

    @classmethod
    def compute(cls, work: Work, subject: Any, progress: Progress = silent) -> Iterator[tuple[Any, str, Block]]:
        """Compare the readers of each block with all writers that reach them; progress is in pairs.

        A block holds ``writers`` and ``readers``, the strongest of every reader (n, top) and of every writer that
        reaches them (m, top), as :func:`partners` reads them; ``norm_in`` (n,) and ``norm_out`` (m,), the lengths of
        the neurons' vectors; ``counts`` (BINS,), ``squares`` and ``pairs``.
        """
        done, total, sides = 0, 0, dict[NeuronPairs, _Sides]()
        tasks: list[_Task] = []
        for question, name in work:
            if question not in sides:
                sides[question] = question._sides(subject)
            read, writers = next(pair for pair in sides[question].reached() if pair[0].name == name)
            tasks.append(_Task(question, sides[question], read, writers))
            total += tasks[-1].pairs
        for batch in _batches(tasks):
            for pairs, comparison, complete in _compare(batch):
                done += pairs
                progress(done, total)
                if complete:
                    yield comparison.task.question, comparison.task.read.name, comparison.block()

    def _sides(self, stream: Stream) -> _Sides:
        stream = as_seen(stream, self.port)
        return _Sides(
            neuron_side(stream, self.port, self.reader), neuron_side(stream, "out", self.writer, self.writers)
        )

    def _edges(self, stream: Stream, blocks: Iterable[Block], of: Literal["reader", "writer"]) -> Record:
        """The strongest edges of every reader or every writer."""
        sides = self._sides(stream)
        labels = sides.readers.labels, sides.writers.labels
        # NaN never shows, since a neuron without direction has no edge
        norm_in = torch.full((sides.readers.count,), torch.nan, dtype=accumulate)
        norms_out = list[tuple[NeuronRange, NeuronRange, Tensor]]()  # of every writer, as every reader sees it
        keys = torch.full((sides.readers.count if of == "reader" else sides.writers.count, self.top), -1)
        for (read, writers), block in zip(sides.reached(), blocks, strict=True):
            norm_in[read.numbers] = block["norm_in"]
            counts = [part.count for part in writers]
            norms_out += [
                (read, part, norm) for part, norm in zip(writers, block["norm_out"].split(counts), strict=True)
            ]
            if of == "reader":
                keys[read.numbers] = block["writers"]
            else:
                keys[_numbers(writers)] = merged(keys[_numbers(writers)], block["readers"])
        neuron, place = (keys >= 0).nonzero(as_tuple=True)
        partner, score = partners(keys[neuron, place])
        reader, writer = (neuron, partner) if of == "reader" else (partner, neuron)
        strength = (score * norm_in[reader] * _lengths(norms_out, reader, writer, sides.writers.count)).float()
        columns = (
            Column("reader", tuple(labels[0][i] for i in reader.tolist()), "", "the reading neuron"),
            Column("writer", tuple(labels[1][i] for i in writer.tolist()), "", "the writing neuron"),
            Column("score", score, "1, in [-1, 1]", "cos(w_in, w_out)"),
            Column("strength", strength, "weights", "<w_in, w_out>, the virtual weight"),
            Column("z", score * stream.d_model**0.5, "standard deviations", "cos sqrt(d)"),
            Column("magnitude", score.abs(), "1, in [0, 1]", "|cos|"),
            Column("rank", place + 1, "place, from 1", f"among the edges of its {of}, by magnitude"),
        )
        return stream.record(self, (Axis("edge", tuple(map(str, range(1, len(score) + 1)))),), columns, **_STAMP)


@final
@dataclass(frozen=True)
class NeuronNeuron(NeuronPairs):
    """The strongest writers of every reading neuron, by ``|cosine|``; see :class:`NeuronPairs` for the fields.

    A Record over ``edge``, readers in order of depth. Columns: ``reader``, ``writer``; ``score``
    ``= cos(w_in, w_out)``, in [-1, 1]; ``strength`` ``= <w_in, w_out>``; ``z`` ``= cos sqrt(d)``, its distance from
    chance in deviations, since independent directions have mean square cosine 1/d; ``magnitude`` ``= |cos|``, for
    ordering; ``rank``, 1 for the largest. Of N independent pairs the largest ``|z|`` is near ``sqrt(2 ln N)``, 6.4 for
    1e9: compare ``z`` with that, not with 3.

    Invariant under re-ordering of neurons (but for equal cosines) and, with RMSNorm folded, under rotation of the
    stream; all but ``strength`` also under scaling of either vector by a positive factor.

    Example:
        >>> NeuronNeuron("up")(stream).top(10, by="magnitude")  # doctest: +SKIP
    """

    question: ClassVar[str] = "neuron_edges"

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """The ``top`` writers of every reader."""
        return self._edges(subject, blocks, "reader")


@final
@dataclass(frozen=True)
class NeuronReaders(NeuronPairs):
    """The strongest readers of every writing neuron, with the columns and invariances of :class:`NeuronNeuron`.

    A Record over ``edge``, writers in order of depth.
    """

    question: ClassVar[str] = "neuron_edges_of_writers"

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """The ``top`` readers of every writer."""
        return self._edges(subject, blocks, "writer")


@final
@dataclass(frozen=True)
class NeuronCosines(NeuronPairs):
    """A histogram of ``cos(w_in, w_out)`` over all pairs; see :class:`NeuronPairs` for the fields.

    A Record over ``bin``: ``count``, ``expected`` of independent directions, ``low``. In the stamp ``pairs``, and
    ``mean_square`` of the cosine beside ``null_mean_square``, 1/d. Invariant as :class:`NeuronNeuron` is.
    """

    question: ClassVar[str] = "neuron_cosines"

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """The histogram, beside what chance would give."""
        counts, squares, pairs = torch.zeros(BINS, dtype=torch.int64), 0.0, 0
        for block in blocks:
            counts += block["counts"]
            squares, pairs = squares + float(block["squares"]), pairs + int(block["pairs"])
        half, d = BINS // 2, subject.d_model
        edges = torch.arange(-half, half + 1, dtype=torch.float64) / half
        tail = [*(cosine_tail(t, d) for t in edges[half:-1].tolist()), 0.0]
        right = pairs * -torch.tensor(tail, dtype=torch.float64).diff()
        bounds = [f"{edge:.2f}" for edge in edges.tolist()]
        return subject.record(
            self,
            (Axis("bin", tuple(f"{low} to {high}" for low, high in pairwise(bounds))),),
            (
                Column("count", counts, "pairs", "pairs whose cos(w_in, w_out) lies in the bin"),
                Column("expected", torch.cat([right.flip(0), right]), "pairs", "the same of independent directions"),
                Column("low", edges[:-1], "1", "where the bin begins"),
            ),
            **_STAMP,
            pairs=pairs,
            mean_square=squares / pairs if pairs else None,
            null_mean_square=1 / d,
        )


_STAMP = {"gauge": "neurons: their own basis", "compute_dtype": "float32"}


@final
@dataclass(frozen=True)
class _Sides:
    readers: NeuronSide
    writers: NeuronSide

    def reached(self) -> Iterator[tuple[NeuronRange, tuple[NeuronRange, ...]]]:
        """Readers that some writer reaches, and all these writers, both in order of depth."""
        for read in self.readers.ranges:
            writers = tuple(part for part in self.writers.ranges if part.meets(read))
            if writers:
                yield read, writers


@final
@dataclass(frozen=True)
class _Task:
    """One block to compute."""

    question: NeuronPairs
    sides: _Sides
    read: NeuronRange
    writers: tuple[NeuronRange, ...]

    @property
    def pairs(self) -> int:
        return self.read.count * sum(part.count for part in self.writers)

    @property
    def bytes(self) -> int:
        """Of its readers' directions, and of what is kept."""
        width = 4 * self.sides.readers.stream.d_model + 8 * self.question.top
        return width * self.read.count + 8 * self.question.top * sum(part.count for part in self.writers)


def _batches(tasks: Sequence[_Task]) -> Iterator[list[_Task]]:
    """Tasks that share writers and fit into memory together, at least one at a time."""
    batch: list[_Task] = []
    for task in tasks:
        first = batch[0].question if batch else task.question
        alike = all(getattr(task.question, name) == getattr(first, name) for name in ("writer", "writers", "device"))
        if batch and not (alike and sum(other.bytes for other in (*batch, task)) <= first.memory_mb * 2**20):
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


@final
class _Comparison:
    """A block at work: its readers, and what they and their writers so far give."""

    def __init__(self, task: _Task) -> None:
        self.task = task
        self._all = task.sides.readers.load(task.read, task.question.device)
        self._readers = self._all.nonzero()
        self._table = CosineTable(self._readers.unit, self._readers.number, task.question.top)
        self._pairs, self._of_writers = 0, list[tuple[Tensor, Tensor]]()

    def add(self, writers: NeuronRows, scratch: Workspace) -> None:
        """Compare all readers with these writers."""
        alive = writers.nonzero()
        keys = torch.full((len(writers.norms), self.task.question.top), -1)
        keys[(alive.number - writers.number[0]).cpu()] = self._table.add(alive.unit, alive.number, scratch).cpu()
        self._of_writers.append((keys, writers.norms.cpu()))
        self._pairs += len(alive.norms) * len(self._readers.norms)

    def block(self) -> Block:
        keys = torch.full((self.task.read.count, self.task.question.top), -1)
        keys[self._readers.number.cpu() - self.task.read.first] = self._table.strongest.cpu()
        of_writers, norm_out = (torch.cat(parts) for parts in zip(*self._of_writers, strict=True))
        return {
            "writers": keys,
            "readers": of_writers,
            "norm_in": self._all.norms.cpu(),
            "norm_out": norm_out,
            "counts": self._table.counts.cpu(),
            "squares": self._table.squares.cpu(),
            "pairs": torch.tensor(self._pairs),
        }


def _compare(tasks: Sequence[_Task]) -> Iterator[tuple[int, _Comparison, bool]]:
    """Blocks of equal writers side by side: pairs that were just compared, the block, and whether it is complete."""
    writers, device = tasks[0].sides.writers, tasks[0].question.device
    active, scratch = [_Comparison(task) for task in tasks], Workspace(torch.device(device))
    for part in writers.ranges:
        reached = [comparison for comparison in active if part.meets(comparison.task.read)]
        if not reached:
            continue
        rows = writers.load(part, device)
        for comparison in reached:
            comparison.add(rows, scratch)
            complete = part.name == comparison.task.writers[-1].name
            if complete:
                active.remove(comparison)
            yield part.count * comparison.task.read.count, comparison, complete


def _numbers(parts: Sequence[NeuronRange]) -> Tensor:
    return torch.cat([torch.arange(part.first, part.first + part.count) for part in parts])


def _lengths(
    norms: Sequence[tuple[NeuronRange, NeuronRange, Tensor]], reader: Tensor, writer: Tensor, count: int
) -> Tensor:
    """The length of what each writer has written, as its reader sees it, in float64."""
    first = torch.full((count,), torch.nan, dtype=accumulate)
    for _, part, norm in norms:
        if part.position == part.mlp.first:
            first[part.numbers] = norm
    lengths = first[writer]
    for read, part, norm in norms:
        if part.position != part.mlp.first:  # of a cross-layer dictionary, which has written more since
            pairs = (reader >= read.first) & (reader < read.first + read.count)
            pairs &= (writer >= part.first) & (writer < part.first + part.count)
            lengths[pairs] = norm[writer[pairs] - part.first]
    return lengths
