"""All pairs by the product itself: rows of readers times columns of writers, squared and summed over (k, k) blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.linalg.lapack import square_roots
from virtual_weights.linalg.numerics import accumulate
from virtual_weights.linalg.pairing import Pairing, Progress, Side

_MOST_ROWS = 4096  # beyond this a larger tile makes the matrix product no faster


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
        total = readers.count * _root_flops(readers, d)
        for maps in _cuts(0, readers.count, self._maps(readers)):
            reach = self._reach(maps)
            pairs = (maps.stop - maps.start) * reach
            total += 2.0 * pairs * readers.stack.inner * writers.stack.inner * d + reach * _root_flops(writers, d)
        return total

    def compute(self, device: torch.device, progress: Progress | None) -> Tensor:
        """(readers, writers) float64 in the pairing's order; entries outside all groups are 0."""
        readers, writers = self.pairing.sides
        squared = torch.zeros((readers.count, writers.count), dtype=accumulate, device=device)
        read_roots, write_roots = (_roots(side, self.dtype, device) for side in self.pairing.sides)
        done, total = 0.0, self.flops
        for maps in _cuts(0, readers.count, self._maps(readers)):
            rows = _factor(readers, maps, read_roots, self.dtype, device)
            done += (maps.stop - maps.start) * _root_flops(readers, readers.stack.width)
            for partners in _cuts(0, self._reach(maps), self._maps(writers)):
                columns = _factor(writers, partners, write_roots, self.dtype, device)
                energy = (rows @ columns.T).square_().view(-1, partners.stop - partners.start, writers.stack.inner)
                per_row = energy.sum(dim=2, dtype=accumulate).view(-1, readers.stack.inner, energy.shape[1])
                squared[maps, partners] = per_row.sum(dim=1)
                done += 2.0 * rows.numel() * columns.shape[0] + energy.shape[1] * _root_flops(writers, rows.shape[1])
                if progress is not None:
                    progress(done, total)
        return squared

    def _maps(self, side: Side) -> int:
        return max(1, min(side.count, self.rows // max(1, side.stack.inner)))

    def _reach(self, maps: slice) -> int:
        """Writers that reach at least one of these readers: the last group that the readers touch."""
        return max(
            group.writers for group in self.pairing.groups if group.first < maps.stop and group.last > maps.start
        )


def _factor(side: Side, maps: slice, roots: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(maps * k, d): the rows of ``root @ outer``, one map under the other."""
    outer = side.outer(maps, slice(0, side.stack.width), dtype, device)
    return (outer if roots is None else roots[maps] @ outer).flatten(0, 1)


def _roots(side: Side, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """L with ``L^T L = metric`` for every map, or None where the metric is the identity."""
    metric = side.metric(slice(0, side.count), accumulate, device)
    if metric is None:
        return None
    return square_roots(metric).to(dtype)


def _root_flops(side: Side, d: int) -> float:
    return 0.0 if side.stack.metric is None else 2.0 * side.stack.inner**2 * d


def _cuts(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]
