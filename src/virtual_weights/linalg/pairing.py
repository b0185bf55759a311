"""Which pairs of an all-pairs product are computed: maps in order of position, readers in groups of shared reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg.map_stack import MapStack

Progress = Callable[[float, float], None]
"""Called with (flops done, flops in all) after every tile."""

_MOST_GROUPS = 16  # the share of a triangular pattern computed in vain is at most 1/(2 groups)
_FEWEST_READERS = 32  # thinner matrix products run well below the machine's rate


@final
@dataclass(frozen=True, eq=False)
class Side:
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
        in_a_row = torch.equal(index, torch.arange(first, first + len(index)))
        rows = cut[first : first + len(index)] if in_a_row else cut.index_select(0, index.to(cut.device))
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

    readers: Side
    writers: Side
    groups: tuple[Group, ...]

    @property
    def sides(self) -> tuple[Side, Side]:
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
    return Pairing(_side(readers, reader_order), _side(writers, writer_order), _groups(reach))


def _side(stack: MapStack, order: Tensor) -> Side:
    index = MapStack(stack.outer, stack.index.cpu(), stack.metric, stack.position)
    return Side(index, order)


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
