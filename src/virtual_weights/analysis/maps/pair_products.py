"""Every reader of a port with every writer that reaches it: products of Grams in blocks, and what is read off them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.map_side import MapSide, Piece
from virtual_weights.errors import ResourceError
from virtual_weights.linalg import accumulate, beyond_rounding
from virtual_weights.linalg.device import check_device
from virtual_weights.linalg.gram_blocks import GramBlock, gram_products
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column
from virtual_weights.stream import Block, Blocked, Stream, Work, cost
from virtual_weights.stream.group import Port


@final
@dataclass(frozen=True, eq=False)
class PairProducts:
    """``<G_i, G_j>`` of readers with writers, both in order of depth.

    Attributes:
        axes: ``reader`` and ``writer``.
        squared: (n_r, n_w) float64, ``||R_i O_j||_F^2 = <G_i, G_j>``; NaN where the writer cannot reach, 0 where it is
            rounding of ``||G_i|| ||G_j||``, and where either map is 0.
        readers, writers: (2, n), ``tr G`` and ``tr G^2`` of every map.
        heard: (n_w,) ``<Gbar_r, G_w>``, where every G has trace 1 and Gbar is the mean over all maps of a side,
            whether they reach or not, of writers over those of one kind. A map that is zero is in no mean and has NaN.
        listening: (n_r, n_w) ``<G_r, Gbar_w>``, by the kind of w.
        both: (n_w,) ``<Gbar_r, Gbar_w>``, by the kind of w.
    """

    axes: tuple[Axis, Axis]
    squared: Tensor
    readers: Tensor
    writers: Tensor
    heard: Tensor
    listening: Tensor
    both: Tensor


@dataclass(frozen=True)
class AllPairs(Blocked[Stream]):
    """A question about every pair of a reader of a port with a writer that reaches it, in blocks of some readers."""

    port: Port = "K"
    _: KW_ONLY
    device: str = cost("cpu")
    memory_mb: int = cost(1024)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """In which pairs are multiplied."""

    @abstractmethod
    def readers(self, stream: Stream) -> MapSide:
        """What reads through the port.

        Raises:
            UsageError: the model has no such port, or the checkpoint holds no reader.
        """

    @abstractmethod
    def written(self, stream: Stream) -> MapSide:
        """What writes; questions that differ in the port alone have this in common."""

    def blocks(self, subject: Stream) -> tuple[str, ...]:
        """One for each piece of readers, with all writers."""
        return tuple(piece.name for piece in self.readers(subject).pieces)

    @classmethod
    def compute(cls, work: Work, subject: Any, progress: Progress = silent) -> Iterator[tuple[Any, str, Block]]:
        """Products of pairs; questions that have their writers in common form the writers' Grams once."""
        names: dict[AllPairs, list[str]] = {}
        for question, name in work:
            names.setdefault(question, []).append(name)
        alike: dict[AllPairs, list[AllPairs]] = {}
        for question in names:
            # an encoder that reads a state as it is may see more of what is written
            alike.setdefault(replace(question, port="enc" if question.port == "enc" else "K"), []).append(question)
        for questions in alike.values():
            first = questions[0]
            pieces = [(question, piece) for question in questions for piece in question.readers(subject).pieces]
            yield from piece_products(
                [(question, piece) for question, piece in pieces if piece.name in names[question]],
                first.written(subject),
                dtype=first.dtype,
                device=first.device,
                memory=first.memory_mb * 2**20,
                progress=progress,
            )

    def products(self, stream: Stream, blocks: Iterable[Block]) -> PairProducts:
        """All pairs, from all blocks in order."""
        return pair_products(self.readers(stream), self.written(stream), blocks)


Question = TypeVar("Question")


def piece_products(
    readers: Sequence[tuple[Question, Piece]],
    writers: MapSide,
    *,
    dtype: torch.dtype,
    device: str,
    memory: int,
    progress: Progress = silent,
) -> Iterator[tuple[Question, str, Block]]:
    """``<G_r, G_w>`` of pieces of readers with all writers, for ``pair_products``, by question and name of the piece.

    Args:
        readers: the pieces wanted, each with its question.
        writers: the writing side.
        dtype: of the products.
        device: any torch device.
        memory: bytes that pieces may take together; more pieces at once form each Gram fewer times.
        progress: called with (done, total).

    Raises:
        ResourceError: not even one piece of each side fits.
    """
    check_device(device)
    division = _division([piece for _, piece in readers], writers.pieces, memory, dtype.itemsize)
    meeting = _Meeting(writers.pieces, division, (dtype, device), progress)
    for number, reading in enumerate(division.reading):
        yield from meeting.products(number, readers[reading])


@final
class _Meeting:
    """One set of readers after the other with all writers; no more than one set of readers is in memory."""

    def __init__(
        self, writers: Sequence[Piece], division: _Division, how: tuple[torch.dtype, str], progress: Progress
    ) -> None:
        self._writers, self._division, self._how, self._progress = writers, division, how, progress
        self._loaded, self._done = dict[int, GramBlock](), 0
        self._total = len(division.reading) * len(division.passing)

    def products(self, number: int, readers: Sequence[tuple[Question, Piece]]) -> Iterator[tuple[Question, str, Block]]:
        """The blocks of one set of readers."""
        blocks = [piece.load(*self._how) for _, piece in readers]
        columns = [dict[int, Tensor]() for _ in readers]
        moments = dict[int, Tensor]()
        # to and fro, so that what passed last is what passes first
        for passing in self._division.passing[:: 1 if number % 2 == 0 else -1]:
            writers = {i: block for i, block in self._present(passing).items() if i not in moments}
            moments |= {i: block.moments for i, block in writers.items()}
            first = [int(self._writers[i].position.min()) for i in writers]
            reach = [[state <= int(piece.position.max()) for state in first] for _, piece in readers]
            step = partial(_step, self._progress, self._done, self._total)
            rows = gram_products(blocks, list(writers.values()), reach, step)
            for column, products in zip(columns, rows, strict=True):
                column.update(zip(writers, products, strict=True))
            self._done += 1
            del writers  # before others are made
        written = torch.cat([moments[i] for i in sorted(moments)], 1)
        for (question, piece), block, column in zip(readers, blocks, columns, strict=True):
            yield question, piece.name, _block(block.moments, written, [column[i] for i in sorted(column)])

    def _present(self, passing: Sequence[int]) -> dict[int, GramBlock]:
        """Writers that stay, and those that pass now; others go before these are made."""
        wanted = (*self._division.kept, *passing)
        self._loaded = {i: block for i, block in self._loaded.items() if i in wanted}
        for i in wanted:
            if i not in self._loaded:
                self._loaded[i] = self._writers[i].load(*self._how)
        return {i: self._loaded[i] for i in wanted}


def _step(progress: Progress, before: int, total: int, done: float, whole: float) -> None:
    progress(before + done / whole, total)


def _block(readers: Tensor, writers: Tensor, products: list[Tensor]) -> Block:
    return {
        "products": torch.cat([product[:-1, :-1] for product in products], 1),
        "heard": torch.cat([product[-1, :-1] for product in products]),
        "listening": torch.stack([product[:-1, -1] for product in products], 1),
        "both": torch.stack([product[-1, -1] for product in products]),
        "readers": readers,
        "writers": writers,
    }


@final
@dataclass(frozen=True)
class _Division:
    """What is in use together: some readers at a time, with writers that stay and writers that come and go.

    Attributes:
        reading: sets of readers.
        kept: indices of the writers that stay.
        passing: sets of the indices of the others, at least one set.
    """

    reading: list[slice]
    kept: tuple[int, ...]
    passing: list[tuple[int, ...]]


_TRIALS = 16  # ways to divide memory between readers and writers that come and go


def _division(readers: Sequence[Piece], writers: Sequence[Piece], memory: int, itemsize: int) -> _Division:
    """The division for so many bytes: writers that are dearest to make, by entry, stay; then fewest tiles formed."""
    reading, writing = ([piece.entries for piece in side] for side in (readers, writers))
    loading = max((piece.loading for piece in (*readers, *writers)), default=0)
    room, largest = memory // itemsize - loading, max(reading, default=0)
    least = largest + max(writing, default=0)
    if least > room:
        raise ResourceError(
            f"{memory >> 20} MiB for pairs of maps",
            expected=f"at least {((least + loading) * itemsize >> 20) + 1} MiB, for one piece of each side",
            do="raise the memory budget",
        )
    costly = sorted(range(len(writers)), key=lambda i: -writers[i].rows / writing[i])
    kept = set[int]()
    for place, i in enumerate(costly):
        beside = largest + max((writing[j] for j in costly[place + 1 :]), default=0)
        if sum(writing[j] for j in (*kept, i)) + beside > room:
            break
        kept.add(i)
    rest = [i for i in range(len(writers)) if i not in kept]
    room -= sum(writing[i] for i in kept)
    if not rest:
        return _Division(_filled(reading, room), tuple(sorted(kept)), [()])
    most = room - max(writing[i] for i in rest)
    trials = [largest + (most - largest) * step // _TRIALS for step in range(_TRIALS + 1)]
    sets = [(_filled(reading, share), _filled([writing[i] for i in rest], room - share)) for share in trials]
    some, others = min(sets, key=lambda pair: len(pair[1]) * sum(reading) + len(pair[0]) * sum(writing))
    return _Division(some, tuple(sorted(kept)), [tuple(rest[cut]) for cut in others])


def _filled(sizes: Sequence[int], room: int) -> list[slice]:
    """Consecutive numbers whose sizes fit into a room together."""
    cuts: list[slice] = []
    first, used = 0, 0
    for i, size in enumerate(sizes):
        if used + size > room and i > first:
            cuts.append(slice(first, i))
            first, used = i, 0
        used += size
    return [*cuts, slice(first, len(sizes))] if sizes else []


def pair_products(readers: MapSide, writers: MapSide, blocks: Iterable[Block]) -> PairProducts:
    """All pairs of two sides from the products of every piece of readers, in order."""
    pieces = list(blocks)
    traces = torch.cat([block["readers"] for block in pieces], 1), pieces[0]["writers"]
    trace_r, trace_w = traces[0][0], traces[1][0]
    reach = (writers.position <= readers.position[:, None]) & (readers.position[:, None] < writers.end)
    squared = torch.cat([block["products"] for block in pieces]) * trace_r[:, None] * trace_w
    # what is faint was computed in float64, whatever the rest was computed in
    squared = beyond_rounding(squared, (traces[0][1, :, None] * traces[1][1]).sqrt()).clamp_(min=0.0)
    heard = sum((block["heard"] for block in pieces), torch.zeros(len(trace_w), dtype=accumulate))
    kinds = [piece.kind for piece in writers.pieces]
    index = torch.arange(len(kinds)).repeat_interleave(torch.tensor([piece.count for piece in writers.pieces]))
    alike = torch.tensor([[a == b for a in kinds] for b in kinds], dtype=accumulate)
    counts = alike @ torch.zeros(len(kinds), dtype=accumulate).index_add_(0, index, (trace_w > 0).to(accumulate))
    listening = torch.cat([block["listening"] for block in pieces]) @ alike / counts
    both = sum((block["both"] for block in pieces), torch.zeros(len(kinds), dtype=accumulate)) @ alike / counts
    heard, both = (x / (trace_r > 0).sum() for x in (heard, both))
    order = torch.argsort(writers.position, stable=True)
    zero_r, zero_w = trace_r <= 0, trace_w <= 0
    return PairProducts(
        (readers.axis, replace(writers.axis, labels=tuple(writers.axis.labels[i] for i in order.tolist()))),
        squared.masked_fill(~reach, torch.nan)[:, order],
        traces[0],
        traces[1][:, order],
        heard.masked_fill(zero_w, torch.nan)[order],
        listening.masked_fill(zero_r[:, None], torch.nan)[:, index][:, order],
        both[index][order],
    )


def lift_columns(products: PairProducts, d: int, eps: float) -> Iterator[Column]:
    """The columns ``lift``, ``writer_effect`` and ``reader_effect``; absent where pairs are.

    With G of trace 1::

        lift = log2( <G_r, G_w> <Gbar_r, Gbar_w> / (<G_r, Gbar_w> <Gbar_r, G_w>) )
        writer_effect = log2( d <Gbar_r, G_w> )      reader_effect = log2( d <G_r, Gbar_w> )

    An effect is 0 where the other side is isotropic, G = I/d. All are undefined for a map that is zero, and lift for a
    product that is; lift of the only writer of its kind, or of the only reader, is 0.

    Args:
        products: of a port.
        d: width of the stream.
        eps: relative rounding of the products.
    """
    product = products.squared / (products.readers[0][:, None] * products.writers[0])
    lift = product * products.both / (products.listening * products.heard)
    yield _log2("lift", lift, eps, "<G_r, G_w> beyond what both ends explain")
    reachable = torch.where(products.squared.isnan(), torch.nan, 1.0)
    yield _log2("writer_effect", reachable * products.heard * d, eps, "how widely the writer is heard, d <Gbar_r, G_w>")
    yield _log2(
        "reader_effect", reachable * products.listening * d, eps, "how widely the reader listens, d <G_r, Gbar_w>"
    )


def _log2(name: str, ratio: Tensor, eps: float, description: str) -> Column:
    """Of a ratio that is 1 but for rounding the logarithm is 0."""
    return Column(name, beyond_rounding(torch.where(ratio > 0, ratio, torch.nan).log2(), 1.0, eps), "log2", description)
