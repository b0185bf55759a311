"""The two ways to all pairs, each a plan with its workspace and its cost.

Direct: rows of readers times columns of writers, squared and summed over (k, k) blocks. Gram: ``<G_r, G_w>`` tile by
tile of the upper triangle of all Gram matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.linalg.decompose import square_roots
from virtual_weights.linalg.numerics import accumulate
from virtual_weights.linalg.pairing import OrderedStack, Pairing, Tile, cuts
from virtual_weights.progress import Progress

_MOST_ROWS = 4096  # of a direct tile: beyond this a larger one makes the matrix product no faster
_GRAM_ROWS = 64  # of a Gram tile: thin enough that the doubly computed diagonal is ~ 64/d of the work
_CONVERTED_BYTES = 32 * 2**20  # factors gathered or converted at once


@final
@dataclass(frozen=True, eq=False)
class DirectForm:
    """One plan of the direct form: tiles of about ``rows`` factor rows on each side, at least one map.

    ::

        flops = sum over reader tiles of 2 (readers k_r) (writers k_w) d
                + 2 k^2 d per map and tile where there is a metric
    """

    pairing: Pairing
    dtype: torch.dtype
    rows: int

    name: ClassVar[Literal["direct"]] = "direct"

    @staticmethod
    def within(pairing: Pairing, dtype: torch.dtype, memory: int) -> DirectForm:
        """The plan with the largest tiles that stay within ``memory`` bytes."""
        rows = _MOST_ROWS
        while rows > 1 and DirectForm(pairing, dtype, rows).needed > memory:
            rows //= 2
        return DirectForm(pairing, dtype, rows)

    @property
    def needed(self) -> int:
        """Bytes of workspace: a tile of each side (converted and multiplied), their product, roots, and the result."""
        d = self.pairing.readers.stack.width
        a, b = (self._maps(side) * side.stack.inner for side in self.pairing.sides)
        roots = sum(
            3 * side.count * side.stack.inner**2 for side in self.pairing.sides if side.stack.metric is not None
        )
        result = self.pairing.readers.count * self.pairing.writers.count
        return (2 * (a + b) * d + 2 * a * b) * self.dtype.itemsize + 8 * (roots + 3 * result)

    @property
    def flops(self) -> float:
        """Multiplications and additions of this plan."""
        readers, writers = self.pairing.sides
        d = readers.stack.width
        total = readers.count * _metric_flops(readers, d)
        for maps in cuts(0, readers.count, self._maps(readers)):
            reach = self._reach(maps)
            pairs = (maps.stop - maps.start) * reach
            total += 2.0 * pairs * readers.stack.inner * writers.stack.inner * d + reach * _metric_flops(writers, d)
        return total

    def compute(self, device: torch.device, progress: Progress) -> Tensor:
        """(readers, writers) float64 in the pairing's order; entries outside all groups are 0."""
        readers, writers = self.pairing.sides
        squared = torch.zeros((readers.count, writers.count), dtype=accumulate, device=device)
        read_roots, write_roots = (_roots(side, self.dtype, device) for side in self.pairing.sides)
        done, total = 0.0, self.flops
        for maps in cuts(0, readers.count, self._maps(readers)):
            rows = _factor(readers, maps, read_roots, self.dtype, device)
            done += (maps.stop - maps.start) * _metric_flops(readers, readers.stack.width)
            for partners in cuts(0, self._reach(maps), self._maps(writers)):
                columns = _factor(writers, partners, write_roots, self.dtype, device)
                energy = (rows @ columns.T).square_().view(-1, partners.stop - partners.start, writers.stack.inner)
                per_row = energy.sum(dim=2, dtype=accumulate).view(-1, readers.stack.inner, energy.shape[1])
                squared[maps, partners] = per_row.sum(dim=1)
                done += 2.0 * rows.numel() * columns.shape[0] + energy.shape[1] * _metric_flops(writers, rows.shape[1])
                progress(done, total)
        return squared

    def _maps(self, side: OrderedStack) -> int:
        return max(1, min(side.count, self.rows // max(1, side.stack.inner)))

    def _reach(self, maps: slice) -> int:
        """Writers that reach at least one of these readers: the last group that the readers touch."""
        return max(
            group.writers for group in self.pairing.groups if group.first < maps.stop and group.last > maps.start
        )


@final
@dataclass(frozen=True, eq=False)
class GramForm:
    """One plan of the Gram form: tiles of ``rows`` x ``columns``, or of the smallest kind if nothing else fits.

    ::

        flops = sum over tiles of 2 pairs |I| |J|
                + sum over sides of n (2 k^2 d where there is a metric + sum over tiles of 2 k |I| |J|)

    which is about ``pairs d^2 + n k d^2``.
    """

    pairing: Pairing
    dtype: torch.dtype
    rows: int
    columns: int
    spare: int

    name: ClassVar[Literal["gram"]] = "gram"

    @staticmethod
    def within(pairing: Pairing, dtype: torch.dtype, memory: int) -> GramForm:
        """The plan with the widest tiles that stay within ``memory`` bytes; the smallest plan where none does."""
        generous = GramForm._widest(pairing, dtype, memory, min(_CONVERTED_BYTES, memory // 8))
        # where converted factors cannot have an eighth of the budget, they come one map at a time
        return generous if generous.needed <= memory else GramForm._widest(pairing, dtype, memory, 0)

    @staticmethod
    def _widest(pairing: Pairing, dtype: torch.dtype, memory: int, spare: int) -> GramForm:
        d = pairing.readers.stack.width
        rows = min(_GRAM_ROWS, d)
        while rows > 1 and GramForm(pairing, dtype, rows, rows, spare).needed > memory:
            rows = (rows + 1) // 2
        low, high = rows, d
        while low < high:
            middle = (low + high + 1) // 2
            fits = GramForm(pairing, dtype, rows, middle, spare).needed <= memory
            low, high = (middle, high) if fits else (low, middle - 1)
        return GramForm(pairing, dtype, rows, low, spare)

    @property
    def needed(self) -> int:
        """Bytes of workspace: Gram tiles, half-products, converted factors, and the result three times over."""
        tiles = sum(side.count * self.rows * self.columns for side in self.pairing.sides)
        halves = sum(side.count * side.stack.inner * self.rows for side in self.pairing.sides)
        converted = max(max(self.spare, self._converted(side, self.columns)) for side in self.pairing.sides)
        result = self.pairing.readers.count * self.pairing.writers.count
        return (tiles + halves + result) * self.dtype.itemsize + converted + 3 * 8 * result

    @property
    def flops(self) -> float:
        """Multiplications and additions of this plan."""
        d = self.pairing.readers.stack.width
        area = sum(tile.area for _, tiles in self._tiles() for tile in tiles)
        forming = sum(
            side.count * (2.0 * side.stack.inner * area + _metric_flops(side, d)) for side in self.pairing.sides
        )
        return 2.0 * self.pairing.pairs * area + forming

    def compute(self, device: torch.device, progress: Progress) -> Tensor:
        """(readers, writers) float64 in the pairing's order; entries outside all groups are 0."""
        readers, writers = sides = self.pairing.sides
        d = readers.stack.width
        squared = torch.zeros((readers.count, writers.count), dtype=accumulate, device=device)
        shifts = self._shifts(device)
        grams = [self._buffer(side.count * self.rows * self.columns, device) for side in sides]
        halves = [self._buffer(side.count * side.stack.inner * self.rows, device) for side in sides]
        done, total = 0.0, self.flops
        for rows, tiles in self._tiles():
            lefts = [self._left(side, rows, half, device) for side, half in zip(sides, halves, strict=True)]
            done += sum(side.count * _metric_flops(side, _length(rows)) for side in sides)
            for tile in tiles:
                flat: list[Tensor] = []
                for side, left, buffer, shift in zip(sides, lefts, grams, shifts, strict=True):
                    gram = self._gram(side, left, tile, buffer, device)
                    if tile.rows == tile.columns and shift is not None:
                        gram.diagonal(dim1=1, dim2=2).sub_(shift[:, None])
                    flat.append(gram.flatten(1))
                    done += side.count * 2.0 * side.stack.inner * tile.area
                for group in self.pairing.groups:
                    product = flat[0][group.first : group.last] @ flat[1][: group.writers].T
                    squared[group.first : group.last, : group.writers].add_(product, alpha=tile.weight)
                    done += 2.0 * group.pairs * tile.area
                progress(done, total)
        if shifts[0] is not None and shifts[1] is not None:
            squared.addr_(shifts[0], shifts[1], alpha=d)
        return squared

    def _shifts(self, device: torch.device) -> list[Tensor | None]:
        """``tr G / d`` of each map where sums are shorter than float64, else None.

        ``<G_r, G_w> = d s_r s_w + <G_r - s_r I, G_w - s_w I>`` exactly for s = tr G / d: the large part is then taken
        in float64, and what is summed in float32 is only the fluctuation around it.
        """
        if self.dtype == accumulate:
            return [None, None]
        return [self._traces(side, device) / side.stack.width for side in self.pairing.sides]

    def _traces(self, side: OrderedStack, device: torch.device) -> Tensor:
        """``tr G = sum(outer * (metric @ outer))`` of every map, float64."""
        traces = torch.zeros(side.count, dtype=accumulate, device=device)
        for rows, _ in self._tiles():
            for maps in self._chunks(side, rows):
                outer = side.outer(maps, rows, accumulate, device)
                metric = side.metric(maps, accumulate, device)
                traces[maps] += ((outer if metric is None else metric @ outer) * outer).sum(dim=(1, 2))
        return traces

    def _left(self, side: OrderedStack, rows: slice, buffer: Tensor, device: torch.device) -> Tensor:
        """``metric @ outer[:, :, rows]`` of every map: (n, k, rows), in the buffer."""
        left = buffer[: side.count * side.stack.inner * _length(rows)].view(side.count, side.stack.inner, -1)
        for maps in self._chunks(side, rows):
            outer = side.outer(maps, rows, self.dtype, device)
            metric = side.metric(maps, self.dtype, device)
            if metric is None:
                left[maps] = outer
            else:
                torch.bmm(metric, outer, out=left[maps])
        return left

    def _gram(self, side: OrderedStack, left: Tensor, tile: Tile, buffer: Tensor, device: torch.device) -> Tensor:
        """``left^T outer[:, :, columns]`` of every map: (n, rows, columns), in the buffer."""
        gram = buffer[: side.count * tile.area].view(side.count, _length(tile.rows), _length(tile.columns))
        for maps in self._chunks(side, tile.columns):
            torch.bmm(left[maps].mT, side.outer(maps, tile.columns, self.dtype, device), out=gram[maps])
        return gram

    def _tiles(self) -> Iterator[tuple[slice, list[Tile]]]:
        d = self.pairing.readers.stack.width
        for rows in cuts(0, d, self.rows):
            right = cuts(rows.stop, d, self.columns)
            yield rows, [Tile(rows, rows, 1.0), *(Tile(rows, columns, 2.0) for columns in right)]

    def _buffer(self, count: int, device: torch.device) -> Tensor:
        return torch.empty(count, dtype=self.dtype, device=device)

    def _chunks(self, side: OrderedStack, columns: slice) -> list[slice]:
        return cuts(0, side.count, max(1, self.spare // self._converted(side, _length(columns))))

    def _converted(self, side: OrderedStack, columns: int) -> int:
        # gathered, converted, multiplied: at most three float64 copies of a map's columns, two of its metric
        return 8 * max(1, side.stack.inner) * (3 * columns + 2 * side.stack.inner)


def _factor(side: OrderedStack, maps: slice, roots: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(maps * k, d): the rows of ``root @ outer``, one map under the other."""
    outer = side.outer(maps, slice(0, side.stack.width), dtype, device)
    return (outer if roots is None else roots[maps] @ outer).flatten(0, 1)


def _roots(side: OrderedStack, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """L with ``L^T L = metric`` for every map, or None where the metric is the identity."""
    metric = side.metric(slice(0, side.count), accumulate, device)
    if metric is None:
        return None
    return square_roots(metric).to(dtype)


def _length(cut: slice) -> int:
    return cut.stop - cut.start


def _metric_flops(side: OrderedStack, columns: int) -> float:
    return 0.0 if side.stack.metric is None else 2.0 * side.stack.inner**2 * columns
