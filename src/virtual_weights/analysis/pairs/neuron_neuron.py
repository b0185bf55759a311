"""Which neuron writes to which later neuron: all pairs, without ever forming their matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.map_side import parts_reading
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress, accumulate
from virtual_weights.linalg.null import cosine_tail
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream
from virtual_weights.stream.question import Question

NeuronPort = Literal["in", "up", "gate"]
NEURON_PORTS: tuple[NeuronPort, ...] = ("in", "up", "gate")


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """The neurons of one layer.

    Attributes:
        number: (n,) where each stands among the neurons of its side.
        position: the state of the stream that they read, or in which they first appear.
        unit: (n, d) float32, directions of length 1; NaN where a neuron reads or writes nothing.
        norms: (n,) float64, the lengths taken away.
    """

    number: Tensor
    position: int
    unit: Tensor
    norms: Tensor

    def alive(self) -> Rows:
        """Only the neurons that have a direction."""
        at = ((self.norms > 0) & self.norms.isfinite()).nonzero()[:, 0]
        return Rows(self.number[at], self.position, self.unit[at], self.norms[at])


@final
@dataclass(frozen=True)
class Place:
    """Where the neurons of one layer are: ``neurons`` of the layer, numbered from ``first`` among all of the side."""

    layer: int
    position: int
    neurons: slice
    first: int


@final
@dataclass(frozen=True, eq=False)
class NeuronSide:
    """All neurons of a model, or a single one, as readers of a port or as writers (``"out"``).

    Attributes:
        stream: the model.
        port: ``"in"``, ``"up"``, ``"gate"`` or ``"out"``.
        labels: their names, in order of depth.
        places: their layers, in order of depth.
    """

    stream: Stream
    port: NeuronPort | Literal["out"]
    labels: tuple[str, ...]
    places: tuple[Place, ...]

    def load(self, place: Place, device: str) -> Rows:
        """The neurons of one layer; nothing of it is kept."""
        if self.port == "out":
            rows = self.stream.write("mlp", place.layer)[0].T[place.neurons]
        else:
            rows = self.stream.read(self.port, place.layer).maps[0, place.neurons]
        rows = rows.to(device)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulate)
        number = torch.arange(place.first, place.first + len(rows), device=device)
        return Rows(number, place.position, rows.float() / norms[:, None].float(), norms)

    def groups(self, memory: int) -> Iterator[tuple[Place, ...]]:
        """Consecutive layers whose directions fit into so many bytes together, at least one at a time."""
        each = 4 * self.stream.d_model * max(1, self.stream.spec.d_mlp)
        step = max(1, memory // each)
        return (self.places[i : i + step] for i in range(0, len(self.places), step))


def neuron_side(stream: Stream, port: NeuronPort | Literal["out"], only: str | None = None) -> NeuronSide:
    """All neurons on one side, or only the one of this name.

    Raises:
        UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
    """
    width, reads = stream.spec.d_mlp, port != "out"
    mlps = parts_reading(stream, port) if port != "out" else [c for c in stream.components if c.kind == "mlp"]
    if not mlps:
        raise UsageError("this checkpoint holds no MLP", expected="at least one", do="open the complete checkpoint")
    places: list[Place] = []
    labels: list[str] = []
    for c in mlps:
        position = c.reads if reads else c.writes
        assert c.label.layer is not None
        assert position is not None
        names = [f"L{c.label.layer}N{i}" for i in range(width)]
        if only is None:
            places.append(Place(c.label.layer, position, slice(0, width), len(labels)))
            labels += names
        elif only in names:
            at = names.index(only)
            return NeuronSide(stream, port, (only,), (Place(c.label.layer, position, slice(at, at + 1), 0),))
    if only is not None:
        raise UsageError(
            f"this model has no neuron {only!r}",
            expected=f"a name from L{mlps[0].label.layer}N0 to L{mlps[-1].label.layer}N{width - 1}",
            do="correct the name, or leave its port out",
        )
    return NeuronSide(stream, port, tuple(labels), tuple(places))


def check_neuron_port(port: str) -> None:
    """Refuse what no neuron reads through."""
    if port not in NEURON_PORTS:
        raise UsageError(
            f"no neuron reads through port {port!r}", expected=", ".join(NEURON_PORTS), do="choose one of these ports"
        )


BINS = 200
"""Bins of the histogram of cosines, of equal width from -1 to 1."""

_TILE_BYTES = 16 * 2**20  # of cosines at once: they stay in or near a cache


@final
@dataclass(frozen=True)
class NeuronEdges:
    """What :meth:`NeuronNeuron.all` finds.

    Attributes:
        readers: for every reading neuron its strongest writers, a Record over ``edge``.
        writers: for every writing neuron its strongest readers, of the same columns.
        histogram: how many pairs have which cosine, a Record over ``bin``.
    """

    readers: Record
    writers: Record
    histogram: Record


@final
@dataclass(frozen=True)
class NeuronNeuron(Question):
    """Virtual weights between single neurons: ``<w_in, w_out>`` of every neuron with every later one.

    What neuron a writes, ``w_out`` times its activation, adds ``<w_in, w_out>`` times that to what neuron b reads
    through the port, up to the norm's scalar; ``w_in`` is b's row with the norm folded. The virtual weight is one
    signed number. Kept are the ``top`` writers of every reader and the ``top`` readers of every writer by ``|cosine|``,
    and a histogram of the cosine over all pairs. Cosines are products of unit vectors in float32, good to about 1e-6.

    Columns: ``score`` ``= cos(w_in, w_out)``, in [-1, 1]; ``strength`` ``= <w_in, w_out>``; ``z`` ``= cos sqrt(d)``,
    its distance from chance in deviations, since independent directions have mean square cosine 1/d; ``magnitude``
    ``= |cos|``, for ordering; ``rank``, 1 for the largest. Of N independent pairs the largest ``|z|`` is near
    ``sqrt(2 ln N)``, 6.4 for 1e9: compare ``z`` with that, not with 3.

    A neuron that reads or writes nothing has no direction and no edge. Invariant under re-ordering of neurons (but for
    equal cosines) and, with RMSNorm folded, under rotation of the stream; all but ``strength`` also under scaling of
    either vector by a positive factor.

    Attributes:
        port: through which the readers read: ``"in"``, or where gated ``"up"`` or ``"gate"``.
        top: how many edges to keep for each reader and each writer.
        reader: only edges into this neuron, e.g. ``"L18N5"``; None for all.
        writer: only edges out of this neuron; None for all.
        device: any torch device.
        memory_mb: of readers' directions held at once; where all do not fit, writers are read several times.

    Example:
        >>> NeuronNeuron("up")(stream).top(10, by="magnitude")  # doctest: +SKIP
    """

    question: ClassVar[str] = "neuron_edges"
    port: NeuronPort = "up"
    top: int = 10
    reader: str | None = None
    writer: str | None = None
    device: str = "cpu"
    memory_mb: int = 512

    def __post_init__(self) -> None:
        check_neuron_port(self.port)
        if self.top < 1 or self.memory_mb < 1:
            raise UsageError(
                f"top={self.top}, memory_mb={self.memory_mb}", expected="at least 1 each", do="pass for example top=10"
            )

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters on which the answer depends, as plain values."""
        return {"port": self.port, "top": self.top, "reader": self.reader, "writer": self.writer}

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """The strongest writers of every reader; :meth:`all` gives the other tables of the same pass.

        Args:
            stream: the model.
            progress: called with (pairs done, pairs in all).

        Returns:
            A Record over ``edge`` with columns ``reader``, ``writer`` and the above, readers in order of depth.

        Raises:
            UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
        """
        return self.all(stream, progress).readers

    def all(self, stream: Stream, progress: Progress | None = None) -> NeuronEdges:
        """Both tables and the histogram, in one pass over all pairs; see :meth:`__call__`."""
        readers = neuron_side(stream, self.port, self.reader)
        writers = neuron_side(stream, "out", self.writer)
        best_writers = _Best(len(readers.labels), self.top, self.device)
        best_readers = _Best(len(writers.labels), self.top, self.device)
        counts, squares, pairs = torch.zeros(BINS, dtype=torch.int64, device=self.device), 0.0, 0
        # by number; NaN never shows, since a neuron without direction has no edge
        norms = [torch.full((len(side.labels),), float("nan"), dtype=torch.float64) for side in (readers, writers)]
        total = _pairs(readers, writers)
        for done, read, written in _meetings(readers, writers, self.device, self.memory_mb * 2**20):
            for side, rows in zip(norms, (read, written), strict=True):
                side[rows.number.cpu()] = rows.norms.cpu()
            for at, cosine in _tiles(read.unit, written.unit):
                best_writers.take(read.number[at], written.number, cosine)
                best_readers.take(written.number, read.number[at], cosine.T)
                counts += torch.histc(cosine, BINS, -1.0, 1.0).long()
                squares += float(cosine.square().sum())  # cascaded: float32 suffices for one tile
                pairs += cosine.numel()
            if progress is not None:
                progress(done, total)
        names = (readers.labels, writers.labels)
        return NeuronEdges(
            self._table(stream, self.question, best_writers, names, norms, by_reader=True),
            self._table(stream, "neuron_edges_of_writers", best_readers, names, norms, by_reader=False),
            self._histogram(stream, counts.cpu(), squares, pairs),
        )

    def _stamp(self, stream: Stream) -> dict[str, object]:
        return {"norm": stream.norm_stamp, "gauge": "neurons: their own basis", "compute_dtype": "float32"}

    def _table(
        self,
        stream: Stream,
        question: str,
        best: _Best,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        norms: list[Tensor],
        *,
        by_reader: bool,
    ) -> Record:
        own, other, rank, score = best.edges()
        reader, writer = (own, other) if by_reader else (other, own)
        strength = (score * norms[0][reader] * norms[1][writer]).float()
        reading, writing = names
        return Record(
            question,
            (Axis("edge", tuple(map(str, range(1, len(score) + 1)))),),
            (
                Column("reader", tuple(reading[i] for i in reader.tolist()), "", "the reading neuron"),
                Column("writer", tuple(writing[i] for i in writer.tolist()), "", "the writing neuron"),
                Column("score", score, "1, in [-1, 1]", "cos(w_in, w_out)"),
                Column("strength", strength, "weights", "<w_in, w_out>, the virtual weight"),
                Column("z", score * stream.d_model**0.5, "standard deviations", "cos sqrt(d)"),
                Column("magnitude", score.abs(), "1, in [0, 1]", "|cos|"),
                Column("rank", rank, "", f"among the edges of its {'reader' if by_reader else 'writer'}, by magnitude"),
            ),
            parameters=self.parameters,
            stamp=self._stamp(stream),
            provenance=stream.provenance,
        )

    def _histogram(self, stream: Stream, counts: Tensor, squares: float, pairs: int) -> Record:
        half, d = BINS // 2, stream.d_model
        edges = torch.arange(-half, half + 1, dtype=torch.float64) / half
        tail = [*(cosine_tail(t, d) for t in edges[half:-1].tolist()), 0.0]
        right = pairs * -torch.tensor(tail, dtype=torch.float64).diff()
        bounds = [f"{edge:.2f}" for edge in edges.tolist()]
        return Record(
            "neuron_cosines",
            (Axis("bin", tuple(f"{low} to {high}" for low, high in pairwise(bounds))),),
            (
                Column("count", counts, "pairs", "pairs whose cos(w_in, w_out) lies in the bin"),
                Column("expected", torch.cat([right.flip(0), right]), "pairs", "the same of independent directions"),
                Column("low", edges[:-1], "1", "where the bin begins"),
            ),
            parameters=self.parameters,
            stamp=self._stamp(stream)
            | {"pairs": pairs, "mean_square": squares / pairs if pairs else None, "null_mean_square": 1 / d},
            provenance=stream.provenance,
        )


@final
class _Best:
    """The ``top`` partners of largest ``|cosine|`` met so far, of each of ``count`` neurons."""

    def __init__(self, count: int, top: int, device: str) -> None:
        self._score = torch.zeros(count, top, device=device)
        self._partner = torch.full((count, top), -1, device=device)

    def take(self, own: Tensor, partners: Tensor, cosine: Tensor) -> None:
        """Look at a tile (len(own), len(partners)) of cosines."""
        kept = self._score.shape[1]
        at = cosine.abs().topk(min(kept, len(partners)), dim=1).indices
        score = torch.cat([self._score[own], cosine.gather(1, at)], dim=1)
        partner = torch.cat([self._partner[own], partners[at]], dim=1)
        order = torch.where(partner < 0, -1.0, score.abs()).topk(kept, dim=1).indices
        self._score[own], self._partner[own] = score.gather(1, order), partner.gather(1, order)

    def edges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neuron, partner, rank (1 is the strongest) and cosine of every edge kept, neurons in order."""
        score, partner = self._score.cpu(), self._partner.cpu()
        own, place = (partner >= 0).nonzero(as_tuple=True)
        return own, partner[own, place], place + 1, score[own, place]


def _meetings(readers: NeuronSide, writers: NeuronSide, device: str, memory: int) -> Iterator[tuple[int, Rows, Rows]]:
    """Every layer of readers with every layer of writers that reaches it, and how many pairs there were so far."""
    done = 0
    for group in readers.groups(memory):
        held = [readers.load(place, device) for place in group]
        for place in writers.places:
            reached = [read for read in held if place.position <= read.position]
            written = writers.load(place, device) if reached else None
            for read in reached:
                assert written is not None
                done += len(read.norms) * len(written.norms)
                yield done, read.alive(), written.alive()


def _tiles(reads: Tensor, writes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of some readers with all of these writers, (readers, writers), a range of readers at a time."""
    step = max(1, _TILE_BYTES // (4 * max(1, len(writes))))
    for start in range(0, len(reads) if len(writes) else 0, step):
        at = slice(start, start + step)
        yield at, (reads[at] @ writes.T).clamp_(-1.0, 1.0)


def _pairs(readers: NeuronSide, writers: NeuronSide) -> int:
    sizes = [[(p.position, p.neurons.stop - p.neurons.start) for p in side.places] for side in (readers, writers)]
    return sum(n * m for reads, n in sizes[0] for writes, m in sizes[1] if writes <= reads)
