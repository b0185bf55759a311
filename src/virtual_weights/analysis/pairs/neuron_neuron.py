"""Which neuron writes to which later neuron: all pairs, without ever forming their matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.neuron_side import NeuronRows, NeuronSide, check_neuron_port, neuron_side
from virtual_weights.errors import UsageError
from virtual_weights.linalg.null import cosine_tail
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, cost
from virtual_weights.stream.group import NeuronPort

BINS = 200
"""Bins of the histogram of cosines, of equal width from -1 to 1."""

_TILE_BYTES = 16 * 2**20  # of cosines at once: they stay in or near a cache


@dataclass(frozen=True)
class NeuronPairs(Question[Stream]):
    """Virtual weights between single neurons: ``<w_in, w_out>`` of every neuron with every later one.

    What neuron a writes, ``w_out`` times its activation, adds ``<w_in, w_out>`` times that to what neuron b reads
    through the port, up to the norm's scalar; ``w_in`` is b's row with the norm folded. The virtual weight is one
    signed number. Cosines are products of unit vectors in float32, good to about 1e-6. A neuron that reads or writes
    nothing has no direction and no edge.

    One pass over all pairs answers the three questions of this form: :class:`NeuronNeuron`, :class:`NeuronReaders` and
    :class:`NeuronCosines`.

    Attributes:
        port: through which the readers read: ``"in"``, or where gated ``"up"`` or ``"gate"``.
        top: how many edges the tables hold for each reader or each writer.
        reader: only edges into this neuron, e.g. ``"L18N5"``; None for all.
        writer: only edges out of this neuron; None for all.
        device: any torch device.
        memory_mb: of readers' directions held at once; where all do not fit, writers are read several times.
    """

    port: NeuronPort = "up"
    top: int = 10
    reader: str | None = None
    writer: str | None = None
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        check_neuron_port(self.port)
        if self.top < 1 or self.memory_mb < 1:
            raise UsageError(
                f"top={self.top}, memory_mb={self.memory_mb}", expected="at least 1 each", do="pass for example top=10"
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compare all pairs.

        Args:
            stream: the model.
            progress: called with (pairs done, pairs in all).

        Raises:
            UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
        """
        ((_, record),) = self.together([self], stream, progress)
        return record

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Any, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        """Answer several questions about pairs of neurons, those of equal parameters in one pass."""
        passes: dict[tuple[Any, ...], list[NeuronPairs]] = {}
        for question in questions:
            assert isinstance(question, NeuronPairs)
            passes.setdefault(tuple(question.parameters.values()), []).append(question)
        for alike in passes.values():
            comparison = _compare(alike[0], subject, progress)
            yield from ((question, question.answer(subject, comparison)) for question in alike)

    @abstractmethod
    def answer(self, stream: Stream, comparison: Comparison) -> Record:
        """This question's answer, read off a pass over all pairs."""


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

    def answer(self, stream: Stream, comparison: Comparison) -> Record:
        """The ``top`` writers of every reader."""
        return _edge_record(self, stream, comparison, "reader")


@final
@dataclass(frozen=True)
class NeuronReaders(NeuronPairs):
    """The strongest readers of every writing neuron, with the columns and invariances of :class:`NeuronNeuron`.

    A Record over ``edge``, writers in order of depth.
    """

    question: ClassVar[str] = "neuron_edges_of_writers"

    def answer(self, stream: Stream, comparison: Comparison) -> Record:
        """The ``top`` readers of every writer."""
        return _edge_record(self, stream, comparison, "writer")


@final
@dataclass(frozen=True)
class NeuronCosines(NeuronPairs):
    """A histogram of ``cos(w_in, w_out)`` over all pairs; see :class:`NeuronPairs` for the fields.

    A Record over ``bin``: ``count``, ``expected`` of independent directions, ``low``. In the stamp ``pairs``, and
    ``mean_square`` of the cosine beside ``null_mean_square``, 1/d. Invariant as :class:`NeuronNeuron` is.
    """

    question: ClassVar[str] = "neuron_cosines"

    def answer(self, stream: Stream, comparison: Comparison) -> Record:
        """The histogram, beside what chance would give."""
        half, d, pairs = BINS // 2, stream.d_model, comparison.pairs
        edges = torch.arange(-half, half + 1, dtype=torch.float64) / half
        tail = [*(cosine_tail(t, d) for t in edges[half:-1].tolist()), 0.0]
        right = pairs * -torch.tensor(tail, dtype=torch.float64).diff()
        bounds = [f"{edge:.2f}" for edge in edges.tolist()]
        return stream.record(
            self,
            (Axis("bin", tuple(f"{low} to {high}" for low, high in pairwise(bounds))),),
            (
                Column("count", comparison.counts, "pairs", "pairs whose cos(w_in, w_out) lies in the bin"),
                Column("expected", torch.cat([right.flip(0), right]), "pairs", "the same of independent directions"),
                Column("low", edges[:-1], "1", "where the bin begins"),
            ),
            **_STAMP,
            pairs=pairs,
            mean_square=comparison.squares / pairs if pairs else None,
            null_mean_square=1 / d,
        )


_STAMP = {"gauge": "neurons: their own basis", "compute_dtype": "float32"}


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """What one pass over all pairs of neurons gives.

    Attributes:
        labels: of readers and of writers.
        norms: of readers' and writers' vectors; NaN of a neuron that no pair has.
        strongest: the strongest writers of every ``"reader"``, and readers of every ``"writer"``.
        counts: (BINS,) int64, how many pairs have which cosine.
        squares: sum of the squared cosines.
        pairs: how many pairs.
    """

    labels: tuple[tuple[str, ...], tuple[str, ...]]
    norms: tuple[Tensor, Tensor]
    strongest: Mapping[str, Strongest]
    counts: Tensor
    squares: float
    pairs: int


@final
class Strongest:
    """The ``top`` partners of largest ``|cosine|`` so far, of each of ``count`` neurons."""

    def __init__(self, count: int, top: int, device: str) -> None:
        self._score = torch.zeros(count, top, device=device)
        self._partner = torch.full((count, top), -1, device=device)

    def update(self, neurons: Tensor, partners: Tensor, cosine: Tensor) -> None:
        """Look at a tile (neurons, partners) of cosines."""
        top = self._score.shape[1]
        columns = cosine.abs().topk(min(top, len(partners)), dim=1).indices
        score = torch.cat([self._score[neurons], cosine.gather(1, columns)], dim=1)
        partner = torch.cat([self._partner[neurons], partners[columns]], dim=1)
        order = torch.where(partner < 0, -1.0, score.abs()).topk(top, dim=1).indices
        self._score[neurons], self._partner[neurons] = score.gather(1, order), partner.gather(1, order)

    def edges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neuron, partner, rank and cosine of every edge, neurons in order."""
        score, partner = self._score.cpu(), self._partner.cpu()
        neuron, place = (partner >= 0).nonzero(as_tuple=True)
        return neuron, partner[neuron, place], place + 1, score[neuron, place]


def _edge_record(
    question: NeuronPairs, stream: Stream, comparison: Comparison, of: Literal["reader", "writer"]
) -> Record:
    neuron, partner, rank, score = comparison.strongest[of].edges()
    reader, writer = (neuron, partner) if of == "reader" else (partner, neuron)
    (reading, writing), (norm_in, norm_out) = comparison.labels, comparison.norms
    strength = (score * norm_in[reader] * norm_out[writer]).float()
    columns = (
        Column("reader", tuple(reading[i] for i in reader.tolist()), "", "the reading neuron"),
        Column("writer", tuple(writing[i] for i in writer.tolist()), "", "the writing neuron"),
        Column("score", score, "1, in [-1, 1]", "cos(w_in, w_out)"),
        Column("strength", strength, "weights", "<w_in, w_out>, the virtual weight"),
        Column("z", score * stream.d_model**0.5, "standard deviations", "cos sqrt(d)"),
        Column("magnitude", score.abs(), "1, in [0, 1]", "|cos|"),
        Column("rank", rank, "place, from 1", f"among the edges of its {of}, by magnitude"),
    )
    return stream.record(question, (Axis("edge", tuple(map(str, range(1, len(score) + 1)))),), columns, **_STAMP)


def _compare(question: NeuronPairs, stream: Stream, progress: Progress) -> Comparison:
    """One pass over all pairs."""
    device = question.device
    readers = neuron_side(stream, question.port, question.reader)
    writers = neuron_side(stream, "out", question.writer)
    of_readers, of_writers = (Strongest(len(side.labels), question.top, device) for side in (readers, writers))
    counts, squares, pairs = torch.zeros(BINS, dtype=torch.int64, device=device), 0.0, 0
    labels = readers.labels, writers.labels
    # NaN never shows, since a neuron without direction has no edge
    norm_in, norm_out = (torch.full((len(names),), float("nan"), dtype=torch.float64) for names in labels)
    total = _count_pairs(readers, writers)
    for done, read, written in _blocks(readers, writers, device, question.memory_mb * 2**20):
        norm_in[read.number.cpu()], norm_out[written.number.cpu()] = read.norms.cpu(), written.norms.cpu()
        for rows, cosine in _tiles(read.unit, written.unit):
            of_readers.update(read.number[rows], written.number, cosine)
            of_writers.update(written.number, read.number[rows], cosine.T)
            counts += torch.histc(cosine, BINS, -1.0, 1.0).long()
            squares += float(cosine.square().sum())  # cascaded: float32 suffices for one tile
            pairs += cosine.numel()
        progress(done, total)
    strongest = {"reader": of_readers, "writer": of_writers}
    return Comparison(labels, (norm_in, norm_out), strongest, counts.cpu(), squares, pairs)


def _blocks(
    readers: NeuronSide, writers: NeuronSide, device: str, memory: int
) -> Iterator[tuple[int, NeuronRows, NeuronRows]]:
    """Every MLP of readers with every MLP of writers that reaches it, and how many pairs there were so far."""
    done = 0
    for batch in readers.batches(memory):
        loaded = [readers.load(part, device) for part in batch]
        for part in writers.ranges:
            reached = [read for read in loaded if part.position <= read.position]
            if not reached:
                continue
            written = writers.load(part, device)
            for read in reached:
                done += len(read.norms) * len(written.norms)
                yield done, read.nonzero(), written.nonzero()


def _tiles(reads: Tensor, writes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of some readers with all of these writers, (readers, writers), a range of readers at a time."""
    step = max(1, _TILE_BYTES // (4 * max(1, len(writes))))
    for start in range(0, len(reads) if len(writes) else 0, step):
        rows = slice(start, start + step)
        yield rows, (reads[rows] @ writes.T).clamp_(-1.0, 1.0)


def _count_pairs(readers: NeuronSide, writers: NeuronSide) -> int:
    return sum(r.count * w.count for r in readers.ranges for w in writers.ranges if w.position <= r.position)
