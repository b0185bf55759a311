"""Many maps in shared thin factors, and which pairs of them are computed: readers in groups of shared reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg.numerics import WORKSPACE_BYTES, accumulate, beyond_rounding


@final
@dataclass(frozen=True, eq=False, repr=False)
class MapStack:
    """n maps between the stream R^d and something else, ``map_i = L_i @ outer[index[i]]``, seen from the stream.

    Only ``G_i = map_i^T map_i = outer^T metric_i outer`` (d, d) matters to a Frobenius norm, so L_i is given by its
    metric ``L_i^T L_i`` alone. For writers pass ``O^T``: their G is then ``O O^T``.

    Args:
        outer: (m, k, d) thin factors in storage dtype; rows read the stream (or, transposed, write it).
        index: (n,) integer, which outer each map uses; several maps may share one.
        metric: (n, k, k) symmetric positive semidefinite; None is the identity.
        position: (n,) integer: for readers the state read, for writers the state in which the write first appears.

    Raises:
        UsageError: shapes that contradict each other, or an index out of range.
    """

    outer: Tensor
    index: Tensor
    metric: Tensor | None
    position: Tensor

    def __post_init__(self) -> None:
        n, shape = self.index.shape[0] if self.index.ndim == 1 else -1, tuple(self.outer.shape)
        metric = None if self.metric is None else tuple(self.metric.shape)
        if len(shape) != 3 or tuple(self.position.shape) != (n,) or metric not in (None, (n, *shape[1:2] * 2)):
            raise UsageError(
                f"a stack of outer {shape}, index {tuple(self.index.shape)}, metric {metric}, "
                f"position {tuple(self.position.shape)}",
                expected="outer (m, k, d), index (n,), metric (n, k, k) or None, position (n,)",
                do="check which axis counts maps",
            )
        if n and not (0 <= int(self.index.min()) and int(self.index.max()) < shape[0]):
            raise UsageError(
                f"index from {int(self.index.min())} to {int(self.index.max())} into {shape[0]} outer factors",
                expected=f"numbers from 0 to {shape[0] - 1}",
                do="index counts along the first axis of outer",
            )

    @staticmethod
    def unplaced(outer: Tensor, metric: Tensor | None = None) -> MapStack:
        """Maps that all meet: as many metrics in a row share each outer as there are; one each without metrics."""
        n = len(outer) if metric is None else len(metric)
        index = torch.arange(n) // max(1, n // max(1, len(outer)))
        return MapStack(outer, index, metric, torch.zeros(n, dtype=torch.int64))

    def __repr__(self) -> str:
        metric = "" if self.metric is None else f", metric {tuple(self.metric.shape)}"
        return f"MapStack ({self.count}): outer {tuple(self.outer.shape)}, {self.outer.dtype}{metric}"

    @property
    def count(self) -> int:
        """n, the number of maps."""
        return self.index.shape[0]

    @property
    def inner(self) -> int:
        """k, the inner dimension of each map."""
        return self.outer.shape[1]

    @property
    def width(self) -> int:
        """d, the dimension of the stream."""
        return self.outer.shape[2]


def self_moments(stack: MapStack) -> tuple[Tensor, Tensor]:
    """``tr G_i`` and ``tr G_i^2`` of every map: the first two of :func:`power_traces`."""
    trace, square = traces_through(stack, inner_grams(stack), 2)
    return trace, square


def power_traces(stack: MapStack) -> tuple[Tensor, Tensor, Tensor]:
    """``tr G_i``, ``tr G_i^2`` and ``tr G_i^3`` of every map, through (k, k) matrices only.

    With ``W = outer outer^T``: ``tr G = tr(M W)``, ``tr G^2 = tr(M W M W)`` and so on.

    Args:
        stack: n maps.

    Returns:
        Three tensors (n,) float64, >= 0: sums of the second, fourth and sixth powers of each map's singular values; all
        0 where ``tr G`` is rounding of ``||M|| ||W||``. Invariant under rotation of the stream and re-basing inside the
        map.
    """
    trace, square, cube = traces_through(stack, inner_grams(stack), 3)
    return trace, square, cube


def inner_grams(stack: MapStack) -> Tensor:
    """``W = outer outer^T`` of every outer factor, (m, k, k) float64."""
    k = stack.inner
    grams = torch.empty((stack.outer.shape[0], k, k), dtype=accumulate, device=stack.outer.device)
    step = max(1, WORKSPACE_BYTES // max(1, 8 * k * max(stack.width, k)))
    for start in range(0, len(grams), step):
        block = stack.outer[start : start + step].to(accumulate)
        torch.bmm(block, block.mT, out=grams[start : start + step])
    return grams


def traces_through(stack: MapStack, grams: Tensor, powers: int) -> list[Tensor]:
    """``tr G_i^p`` for p up to 1, 2 or 3, from the ``inner_grams`` of the stack."""
    k, device = stack.inner, stack.outer.device
    step = max(1, WORKSPACE_BYTES // max(1, 8 * k * max(stack.width, k)))
    traces = [torch.empty(stack.count, dtype=accumulate, device=device) for _ in range(powers)]
    for start in range(0, stack.count, step):
        cut = slice(start, start + step)
        product = grams[stack.index[cut].to(device)]
        size = torch.linalg.matrix_norm(product)
        if stack.metric is not None:
            metric = stack.metric[cut].to(device=device, dtype=accumulate)
            product, size = metric @ product, size * torch.linalg.matrix_norm(metric)
        traces[0][cut] = beyond_rounding(product.diagonal(dim1=1, dim2=2).sum(dim=1), size)
        power = product
        for trace in traces[1:]:
            trace[cut] = (power * product.mT).sum(dim=(1, 2))
            power = power if trace is traces[-1] else power @ product
    return [trace.masked_fill(traces[0] <= 0, 0.0) for trace in traces]


_MOST_GROUPS = 16  # the share of a triangular pattern computed in vain is at most 1/(2 groups)
_FEWEST_READERS = 32  # thinner matrix products run well below the machine's rate


@final
@dataclass(frozen=True, eq=False)
class OrderedStack:
    """A stack with its maps in order of position: ``side_i = map_{order[i]}``, without moving their data."""

    stack: MapStack
    order: Tensor

    @property
    def count(self) -> int:
        """How many maps of the stack take part."""
        return self.order.shape[0]

    def outer(self, maps: slice, columns: slice, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Rows of ``outer`` for these maps, cut to a range of stream coordinates: (maps, k, columns).

        Converted after the cut, and a view of the storage where neither conversion nor gathering is needed.
        """
        index = self.stack.index[self.order[maps]]
        first = int(index[0])
        cut = self.stack.outer[:, :, columns]
        contiguous = torch.equal(index, torch.arange(first, first + len(index)))
        rows = cut[first : first + len(index)] if contiguous else cut.index_select(0, index.to(cut.device))
        return rows.to(device=device, dtype=dtype)

    def metric(self, maps: slice, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """(maps, k, k) metrics, or None where they are the identity."""
        if self.stack.metric is None:
            return None
        return self.stack.metric[self.order[maps].to(self.stack.metric.device)].to(device=device, dtype=dtype)


@final
@dataclass(frozen=True)
class Group:
    """Readers ``first .. last`` (in order of position), reached by writers ``0 .. writers``."""

    first: int
    last: int
    writers: int

    @property
    def pairs(self) -> int:
        """Pairs that one matrix product over the group computes."""
        return (self.last - self.first) * self.writers


@final
@dataclass(frozen=True, eq=False)
class Pairing:
    """Readers and writers in order, grouped so that each matrix product covers a prefix of the writers."""

    readers: OrderedStack
    writers: OrderedStack
    groups: tuple[Group, ...]

    @property
    def sides(self) -> tuple[OrderedStack, OrderedStack]:
        """Readers, then writers."""
        return self.readers, self.writers

    @property
    def pairs(self) -> int:
        """Pairs that are computed, those of a group's coarse reach among them."""
        return sum(group.pairs for group in self.groups)


def pairing(readers: MapStack, writers: MapStack) -> Pairing:
    """Drops maps without any partner, orders the others, and groups readers of nearly equal reach."""
    reads, writes = readers.position.cpu(), writers.position.cpu()
    writer_order = writes.argsort(stable=True)
    reader_order = reads.argsort(stable=True)
    reach = torch.searchsorted(writes[writer_order].contiguous(), reads[reader_order].contiguous(), right=True)
    reader_order, reach = reader_order[reach > 0], reach[reach > 0]
    writer_order = writer_order[: int(reach[-1]) if len(reach) else 0]
    return Pairing(_ordered(readers, reader_order), _ordered(writers, writer_order), _groups(reach))


def _ordered(stack: MapStack, order: Tensor) -> OrderedStack:
    return OrderedStack(replace(stack, index=stack.index.cpu()), order)


def _groups(reach: Tensor) -> tuple[Group, ...]:
    least = max(_FEWEST_READERS, len(reach) // _MOST_GROUPS)
    ends = [int(end) for end in (reach[1:] != reach[:-1]).nonzero()[:, 0] + 1]
    groups: list[Group] = []
    first = 0
    for end in [*ends, len(reach)]:
        if end - first >= least or (end == len(reach) and end > first):
            groups.append(Group(first, end, int(reach[end - 1])))
            first = end
    return tuple(groups)


@final
@dataclass(frozen=True)
class Tile:
    """Rows and columns of the d x d axis; off the diagonal a tile stands for its mirror image too (weight 2)."""

    rows: slice
    columns: slice
    weight: float

    @property
    def area(self) -> int:
        """Entries."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)


def cuts(start: int, stop: int, step: int) -> list[slice]:
    """A range in steps, the last as long as what is left."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]
