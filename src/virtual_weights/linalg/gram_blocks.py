"""Gram matrices of many maps, formed tile by tile, and the inner products of all of one side with all of another.

::

    ||R O||_F^2 = tr(R^T R O O^T) = <G_r, G_w>        G_r = R^T R,  G_w = O O^T, both (d, d)

Every Gram is scaled to trace 1 and stands without its multiple of the identity, ``G / tr G - I / d``, so that no scale
of a map matters and what is summed in float32 is only what differs from an isotropic map. Products of some 2,000 terms
are taken in float32 and summed in float64. All shapes follow from the maps alone, and all products are batched: the
bits depend neither on memory nor on the number of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg.decompose import square_roots
from virtual_weights.linalg.numerics import WORKSPACE_BYTES, accumulate, in_full_float32, one_thread
from virtual_weights.linalg.pairing import MapStack, Tile, cuts, inner_grams, traces_through
from virtual_weights.progress import Progress, silent

_BAND = 64  # rows of a tile: the doubly computed diagonal is ~ 64/d of the work
_PANEL = 500  # columns of a tile: tiles of a hundred maps stay in a cache, and rows lie at no power of two
_SLICES = 16  # a product over a tile is a batch of so many, each ~ 2,000 terms long
_OCTET = 8  # sums of blocks multiplied at once
_SPARE = 16  # entries between lines of what is multiplied: at distances of powers of two they would share cache lines
_EXTREME = 40  # binary exponent of a map's largest entry beyond which its Gram may leave float32
ROWS = 8192
"""Rows of a wide map that are worked on at once."""
_CONDITION = 32.0  # of ||metric|| ||W|| / tr(metric W): beyond it float32 would lose digits to cancellation
_FAINT = 1e-2
"""Share of the mean product at random orientation, tr G_r tr G_w / d, below which a pair is computed again in float64:
there the root of a float32 error of 1e-7 is no longer small beside the root of the product."""


def bands(d: int) -> Iterator[list[Tile]]:
    """The upper triangle of (d, d), band by band: each begins with its tile on the diagonal."""
    for rows in cuts(0, d, _BAND):
        rest = d - rows.stop
        right = cuts(rows.stop, d, -(-rest // max(1, -(-rest // _PANEL)))) if rest else []
        yield [Tile(rows, rows, 1.0), *(Tile(rows, columns, 2.0) for columns in right)]


def tile_entries(d: int) -> int:
    """Entries of the largest tile."""
    return min(d, _BAND) * min(d, _PANEL)


def triangle(d: int) -> int:
    """Entries of (d, d) that are computed: the upper triangle, and the rest of the tiles on the diagonal."""
    return sum(tile.area for band in bands(d) for tile in band)


class GramBlock(ABC):
    """Some maps of one side, ready to have their Grams formed.

    Attributes:
        moments: (2, n) float64 on the CPU, ``tr G`` and ``tr G^2`` of every map.
        width: d.
        dtype: of the tiles.
        device: of the tiles.
    """

    moments: Tensor
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def count(self) -> int:
        """Number of maps."""
        return self.moments.shape[1]

    @property
    def workspace(self) -> int:
        """Entries of the largest tile of every map, and of their sum."""
        return (self.count + 1) * tile_entries(self.width)

    @property
    def shift(self) -> Tensor:
        """(n,) what is taken from every diagonal entry: 1/d, and 0 of a map that is zero."""
        return ((self.moments[0] > 0).to(self.dtype) / self.width).to(self.device)

    @abstractmethod
    def begin(self, rows: slice) -> None:
        """Prepare the tiles of a band."""

    @abstractmethod
    def form(self, out: Tensor, tile: Tile) -> None:
        """``G / tr G - I / d`` of every map on a tile of the band begun, into (n, rows, columns)."""

    @abstractmethod
    def factor(self, i: int) -> Tensor:
        """C (k, d) float64 with ``C^T C = G_i / tr G_i``."""

    @abstractmethod
    def energy(self, i: int, columns: Tensor) -> Tensor:
        """``||C_i X||_F^2`` of columns X (d, m) float64."""


@final
class ThinBlock(GramBlock):
    """Maps in shared thin factors: ``G = outer^T metric outer``.

    Args:
        stack: the maps.
        dtype: float32 or float64, of the tiles.
        device: where they are computed.
    """

    def __init__(self, stack: MapStack, dtype: torch.dtype, device: torch.device | str) -> None:
        self.width, self.dtype, self.device, self._index = stack.width, dtype, torch.device(device), stack.index
        grams = inner_grams(stack)
        self.moments = torch.stack(traces_through(stack, grams, 2)).cpu()
        outer, powers = _scaled(stack.outer, dtype)
        metric = torch.eye(stack.inner, dtype=accumulate, device=stack.outer.device)
        metric = metric if stack.metric is None else stack.metric.to(accumulate)
        factors = _reciprocal(self.moments[0].to(metric.device)) * powers[stack.index] ** 2
        self._exact_metric = metric = metric * factors[:, None, None]
        self.outer, self.shared, self.metric = outer.to(self.device), 1, None
        # scaled by powers of two, and so without rounding, unless the dtype itself rounds
        lossless = torch.promote_types(stack.outer.dtype, dtype) == dtype
        self._exact = self.outer if lossless else _scaled(stack.outer, stack.outer.dtype)[0]
        shared, sizes = _shared(stack.index, len(outer)), torch.linalg.matrix_norm(metric)
        sizes *= torch.linalg.matrix_norm(grams / powers[:, None, None] ** 2)[stack.index]
        if shared is None or bool((sizes > _CONDITION).any()):
            self.outer = self._multiplied()
        else:
            self.shared, self.metric = shared, metric.to(dtype=dtype, device=self.device)
        self._left = torch.empty(0)

    def _multiplied(self) -> Tensor:
        """(n, k, d), every map by itself, whose Gram needs no metric."""
        k = self._exact.shape[1]
        maps = torch.empty(self.count, k, self.width, dtype=self.dtype, device=self.device)
        with one_thread():
            for start in range(0, self.count, step := max(1, WORKSPACE_BYTES // (8 * k * self.width))):
                cut = slice(start, start + step)
                roots = square_roots(self._exact_metric[cut])
                exact = self._exact[self._index[cut].to(self._exact.device)].to(accumulate)
                maps[cut] = torch.bmm(roots.to(exact.device), exact).to(self.dtype)
        return maps

    def begin(self, rows: slice) -> None:
        left = self.outer[:, :, rows]
        if self.metric is not None:
            left = torch.bmm(self.metric, left if self.shared == 1 else left.repeat_interleave(self.shared, 0))
        if self.shared > 1:
            left = left.unflatten(0, (-1, self.shared)).transpose(1, 2).flatten(2, 3)
        self._left = left.mT

    def form(self, out: Tensor, tile: Tile) -> None:
        torch.bmm(self._left, self.outer[:, :, tile.columns], out=out.view(len(self.outer), -1, out.shape[2]))
        if tile.rows == tile.columns:
            out.diagonal(dim1=1, dim2=2).sub_(self.shift[:, None])

    def factor(self, i: int) -> Tensor:
        roots = square_roots(self._exact_metric[i : i + 1]).cpu()
        return roots[0] @ self._exact[self._index[i]].cpu().to(accumulate)

    def energy(self, i: int, columns: Tensor) -> Tensor:
        return (self.factor(i) @ columns).square().sum()


@final
class WideBlock(GramBlock):
    """Maps about as wide as the stream or wider, by the upper triangles of their Grams.

    Args:
        maps: for every map its rows (m, d), in parts that may be made when they are needed; it is gone through again
            where a pair needs float64.
        width: d.
        dtype: float32 or float64, of the tiles.
        device: where they are computed.
    """

    def __init__(
        self, maps: Sequence[Iterable[Tensor]], width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.width, self.dtype, self.device = width, dtype, torch.device(device)
        self.maps = maps
        self.strips = [
            torch.empty(len(maps), rows.stop - rows.start, width - rows.start, dtype=dtype, device=device)
            for rows in cuts(0, width, _BAND)
        ]
        self.moments = torch.stack([self._add(i, rows) for i, rows in enumerate(maps)], 1)
        self._strip, self._start = self.strips[0], 0

    @in_full_float32()
    def _add(self, i: int, parts: Iterable[Tensor]) -> Tensor:
        """Keep the Gram of one map; its moments."""
        rows_of_bands = cuts(0, self.width, _BAND)
        grams = [torch.zeros(strip.shape[1:], dtype=accumulate, device=self.device) for strip in self.strips]
        for rows, scale in self._batches(parts):
            for cut, gram in zip(rows_of_bands, grams, strict=True):
                product = torch.bmm(rows[:, :, cut].mT, rows[:, :, cut.start :])
                gram.add_(product.sum(0, dtype=accumulate), alpha=scale**2)
        trace = torch.stack([gram.diagonal().sum() for gram in grams]).sum()
        inverse, square = _reciprocal(trace), torch.zeros_like(trace)
        shift = float(trace > 0) / self.width
        for gram, strip in zip(grams, self.strips, strict=True):
            gram.mul_(inverse)
            height = len(gram)
            rows = 2 * gram.square().sum(1) - gram[:, :height].square().sum(1)
            square = square + rows.sum()
            gram.diagonal().sub_(shift)
            strip[i] = gram
        return torch.stack([trace, square * trace.square()]).cpu()

    def _batches(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, float]]:
        """Rows as (batch, rows, d) with a power of two taken out, zero rows filling the last."""
        for part in parts:
            for rows in part.split(ROWS) if len(part) else ():
                batch, size = self._sliced(rows := rows.to(self.device))
                scale = 1.0
                if not 2.0**-_EXTREME <= size <= 2.0**_EXTREME:
                    outer, scales = _scaled(rows[None], self.dtype)
                    (batch, _), scale = self._sliced(outer[0]), float(scales[0])
                yield batch, scale

    def _sliced(self, rows: Tensor) -> tuple[Tensor, float]:
        """A copy of rows (m, d) as (batch, rows, d), and the size of its largest entry.

        The copy keeps their order in memory, and none of its lines lies at a power of two.
        """
        length, width = -(-len(rows) // _SLICES), self.width
        whole, rest = divmod(len(rows), length)
        upright = rows.stride(0) == 1 and len(rows) > 1
        shape = (_SLICES, width, length + _SPARE) if upright else (_SLICES, length, width + _SPARE)
        store = torch.zeros(shape, dtype=self.dtype, device=self.device)
        batch = store[:, :, :length].mT if upright else store[:, :, :width]
        batch[:whole] = rows[: whole * length].unflatten(0, (whole, length))
        if rest:
            batch[whole, :rest] = rows[whole * length :]
        return batch, max(abs(float(bound)) for bound in torch.aminmax(store))

    def begin(self, rows: slice) -> None:
        self._strip, self._start = self.strips[rows.start // _BAND], rows.start

    def form(self, out: Tensor, tile: Tile) -> None:
        columns = slice(tile.columns.start - self._start, tile.columns.stop - self._start)
        out.copy_(self._strip[:, :, columns])

    def factor(self, i: int) -> Tensor:
        rows = torch.cat([part.to(accumulate) for part in self.maps[i]])
        return rows / self.moments[0, i].sqrt()

    def energy(self, i: int, columns: Tensor) -> Tensor:
        parts = [(part.to(accumulate) @ columns).square().sum() for part in self.maps[i]]
        return torch.stack(parts).sum() / self.moments[0, i]


@in_full_float32()
def gram_products(
    readers: Sequence[GramBlock],
    writers: Sequence[GramBlock],
    reach: Sequence[Sequence[bool]],
    progress: Progress = silent,
) -> list[list[Tensor]]:
    """``<G_r, G_w> / (tr G_r tr G_w)`` of every map of every block with every map of the blocks of the other side.

    Args:
        readers: blocks of one side, all on one device and in one dtype.
        writers: of the other.
        reach: for every pair of blocks, whether the pairs in it are wanted; of the others only the sums are formed.
        progress: called with (flops done, flops in all).

    Returns:
        For every pair of blocks (n_r + 1, n_w + 1) float64 on the CPU: the products, and in the last row and column
        their sums over all maps of the block, wanted or not; maps that are zero have products 0.
    """
    if not readers or not writers:
        return [[] for _ in readers]
    totals = [
        [torch.zeros(r.count + 1, w.count + 1, dtype=accumulate, device=r.device) for w in writers] for r in readers
    ]
    blocks = (*readers, *writers)
    buffers = [torch.empty(block.workspace, dtype=block.dtype, device=block.device) for block in blocks]
    done, total = 0.0, float(triangle(blocks[0].width))
    for band in bands(blocks[0].width):
        for block in blocks:
            block.begin(band[0].rows)
        for tile in band:
            tiles = [_formed(block, buffer, tile) for block, buffer in zip(blocks, buffers, strict=True)]
            _add_products(totals, tiles[: len(readers)], tiles[len(readers) :], reach, tile.weight)
            done += tile.area
            progress(done, total)
    return [
        [_completed(totals[i][j].cpu(), r, w, reach[i][j]) for j, w in enumerate(writers)]
        for i, r in enumerate(readers)
    ]


def _formed(block: GramBlock, buffer: Tensor, tile: Tile) -> Tensor:
    """(n + 1, slices, terms): a tile of every map and of their sum."""
    height = tile.rows.stop - tile.rows.start
    out = buffer[: (block.count + 1) * tile.area].view(block.count + 1, height, -1)
    block.form(out[:-1], tile)
    torch.sum(out[:-1], 0, out=out[-1])
    return out.view(block.count + 1, _SLICES if height % _SLICES == 0 else height, -1)


def _add_products(
    totals: list[list[Tensor]], left: list[Tensor], right: list[Tensor], reach: Sequence[Sequence[bool]], weight: float
) -> None:
    """Add the products over a tile: of everything where pairs are wanted, elsewhere of every map with sums alone."""
    for i, reader in enumerate(left):
        for j, writer in enumerate(right):
            if reach[i][j]:
                totals[i][j].add_(_product(reader, writer), alpha=weight)
        for some in _octets([j for j in range(len(right)) if not reach[i][j]]):
            columns = _product(reader, _sums(right, some))
            for j, column in zip(some, columns.T, strict=False):
                totals[i][j][:, -1].add_(column, alpha=weight)
    for j, writer in enumerate(right):
        for some in _octets([i for i in range(len(left)) if not reach[i][j]]):
            rows = _product(_sums(left, some), writer[:-1])
            for i, row in zip(some, rows, strict=False):
                totals[i][j][-1, :-1].add_(row, alpha=weight)


def _octets(indices: list[int]) -> list[list[int]]:
    return [indices[start : start + _OCTET] for start in range(0, len(indices), _OCTET)]


def _sums(tiles: list[Tensor], some: list[int]) -> Tensor:
    """The sums of some blocks, in a matrix of one height, since the height of a product may change its bits."""
    sums = tiles[0].new_zeros(_OCTET, *tiles[0].shape[1:])
    for place, i in enumerate(some):
        sums[place] = tiles[i][-1]
    return sums


def _product(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0)).sum(0, dtype=accumulate)


def _completed(total: Tensor, reader: GramBlock, writer: GramBlock, wanted: bool) -> Tensor:
    """Products with what the identity's multiples add, those too faint for float32 computed again."""
    mass = [
        torch.cat([(b.moments[0] > 0).to(accumulate), (b.moments[0] > 0).sum()[None].to(accumulate)])
        for b in (reader, writer)
    ]
    total += mass[0][:, None] * mass[1][None, :] / reader.width
    if wanted and reader.dtype != accumulate:
        faint = (total[:-1, :-1] < _FAINT / reader.width) & (mass[0][:-1, None] * mass[1][None, :-1] > 0)
        with one_thread():
            for i, j in faint.nonzero().tolist():
                thin, a, wide, b = (reader, i, writer, j) if isinstance(reader, ThinBlock) else (writer, j, reader, i)
                total[i, j] = wide.energy(b, thin.factor(a).T).cpu()
    return total


def _scaled(outer: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(m, k, d) in a dtype, and (m,) float64 powers of two that were taken out of maps of extreme scale."""
    sizes = torch.linalg.vector_norm(outer.flatten(1), ord=torch.inf, dim=1).to(accumulate)
    powers = torch.where(sizes > 0, torch.exp2(torch.floor(torch.log2(sizes))), 1.0)
    powers = torch.where(powers.log2().abs() > _EXTREME, powers, 1.0)
    if bool((powers != 1.0).any()):
        wide = torch.promote_types(outer.dtype, torch.float32)
        outer = outer.to(wide) / powers[:, None, None].to(wide)
    return outer.to(dtype), powers


def _reciprocal(traces: Tensor) -> Tensor:
    """1 over a trace, 0 where it is 0."""
    return torch.where(traces > 0, 1 / traces, 0.0)


def _shared(index: Tensor, outers: int) -> int | None:
    """How many maps in a row share each outer; None where they do not lie so."""
    shared = len(index) // max(outers, 1)
    regular = outers * shared == len(index) and torch.equal(index.cpu(), torch.arange(outers).repeat_interleave(shared))
    return shared if regular else None
