"""Cosines of all pairs of unit vectors, a tile at a time: strongest partners, a histogram, the sum of squares.

The matrix of cosines is never held, and no bit depends on the number of threads: products have fixed shapes and are
taken in batches, sums run along rows, and of equal cosines the one with the smaller number comes first.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg.numerics import in_full_float32

BINS = 200
"""Bins of the histogram of cosines, of equal width from -1 to 1."""

_TILE = 2**22
"""Cosines at once."""
_CACHED = 2**17
"""Of these, so many are looked at together, so that they stay near the processor."""
_ROWS = 256
"""Rows of one product of a batch."""
_GROUP = 16
"""Neighbours of which at first only the largest is looked at."""
_WIDEST = 8192
"""Columns of a tile at most: sums along longer rows might be divided among threads."""
_DEVICE_TILE = 2**26
"""Cosines at once on an accelerator, all looked at together: there few large steps are faster. They take 512 MiB."""
_LAST = 2**31 - 1


@final
class Workspace:
    """Memory for one tile, used again and again: new pages for every tile would cost as much time as a pass over it.

    Attributes:
        entries: of a tile.
        together: of these, how many are looked at together.
    """

    def __init__(self, device: torch.device) -> None:
        self.entries, self.together = (_TILE, _CACHED) if device.type == "cpu" else (_DEVICE_TILE, _DEVICE_TILE)
        self._tile, self._part = (torch.empty(size, device=device) for size in (self.entries, self.together))

    def tile(self, *shape: int) -> Tensor:
        """A tensor of this shape, until the next one."""
        return _shaped(self._tile, shape)

    def part(self, *shape: int) -> Tensor:
        """The same for what is looked at together."""
        return _shaped(self._part, shape)


@final
class CosineTable:
    """What is kept of the cosines of fixed unit rows with ever more unit columns.

    Partners are kept as whole numbers, ``keys``, which order them by ``|cos|``, then by the partner's number, smallest
    first; :func:`partners` reads them. A place without a partner holds -1.

    Args:
        rows: (n, d) float32.
        numbers: (n,) int64, names of the rows, in [0, 2^31).
        top: how many partners of each are kept.

    Attributes:
        strongest: (n, top) int64, keys of every row's strongest columns so far.
        counts: (BINS,) int64, how many pairs have which cosine.
        squares: sum of squared cosines, () float64.
    """

    def __init__(self, rows: Tensor, numbers: Tensor, top: int) -> None:
        n, d = rows.shape
        batch = max(2, -(-n // _ROWS))  # one product alone would be divided among threads
        self._rows = rows.new_zeros(batch, _padded(-(-n // batch)), d)
        self._rows.flatten(0, 1)[:n] = rows
        self._numbers, self._top = numbers, top
        self.strongest = torch.full((n, top), -1, device=rows.device)
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=rows.device)
        self.squares = torch.zeros((), dtype=torch.float64, device=rows.device)

    @in_full_float32()
    def add(self, columns: Tensor, numbers: Tensor, scratch: Workspace | None = None) -> Tensor:
        """Compare all rows with these columns.

        Args:
            columns: (m, d) float32.
            numbers: (m,) int64, names of the columns, ascending from call to call.
            scratch: to be shared by several tables and calls.

        Returns:
            (m, top) int64: keys of every column's strongest rows.
        """
        strongest = torch.full((len(columns), self._top), -1, device=columns.device)
        if not len(self.strongest):
            return strongest
        scratch = Workspace(columns.device) if scratch is None else scratch
        widest = max(_GROUP, min(_WIDEST, scratch.entries // self._rows[..., 0].numel()))
        tiles = max(1, -(-len(columns) // widest))
        step = max(_GROUP, _padded(-(-len(columns) // tiles)))
        for start in range(0, len(columns), step):
            cut = slice(start, start + step)
            self._tile(columns[cut], numbers[cut], strongest[cut], scratch)
        return strongest

    def _tile(self, columns: Tensor, numbers: Tensor, strongest: Tensor, scratch: Workspace) -> None:
        n, m = len(self.strongest), len(columns)
        width = _padded(m)
        columns = columns if width == m else torch.nn.functional.pad(columns, (0, 0, 0, width - m))
        tile = scratch.tile(len(self._rows), self._rows.shape[1], width)
        cosine = torch.bmm(self._rows, columns.T.expand(len(self._rows), -1, -1), out=tile).flatten(0, 1)
        of_rows, of_columns = list[Tensor](), list[Tensor]()
        for start in range(0, len(cosine), height := max(_GROUP, scratch.together // width // _GROUP * _GROUP)):
            part = cosine[start : start + height]
            size = torch.abs(part, out=scratch.part(len(part), width))
            of_rows.append(size.unflatten(1, (_GROUP, -1)).amax(1))
            of_columns.append(size.unflatten(0, (-1, _GROUP)).amax(1))
            self.squares += torch.linalg.vector_norm(part, dim=1).double().square().sum()
            self._count(torch.mul(part, BINS / 2, out=size)[: max(0, n - start), :m].add_(BINS / 2))
        weakest = self.strongest[:, -1]
        least = torch.where(
            weakest < 0, 0.0, _sizes(weakest).nextafter(torch.full_like(weakest, 2, dtype=torch.float32))
        )
        best = torch.cat(of_rows)[:n]
        if bool((weakest < 0).any()):
            least = torch.maximum(least, _largest(best, self._top))
        row, place, group, value = _above(cosine[:n].unflatten(1, (_GROUP, -1)), best, least)
        column = place * best.shape[1] + group
        row, column, value = _inside(column < m, row, column, value)
        _merge(self.strongest, row, _keys(value, numbers[column]))
        best = torch.cat(of_columns).T.contiguous()[:m]
        groups = cosine.unflatten(0, (-1, _GROUP)).permute(2, 1, 0)[:m]
        column, place, group, value = _above(groups, best, _largest(best, self._top))
        row = group * _GROUP + place
        row, column, value = _inside(row < n, row, column, value)
        _merge(strongest, column, _keys(value, self._numbers[row]))

    def _count(self, places: Tensor) -> None:
        bins = places.to(torch.uint8).flatten().bincount(minlength=BINS + 1)
        self.counts += bins[:BINS]
        self.counts[-1] += bins[BINS]  # the last bin holds its upper end


def partners(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Partner's number, int64, and cosine, float32, in [-1, 1]; both are meaningless where a key is -1."""
    sign = 1.0 - 2.0 * (keys & 1).float()
    return _LAST - ((keys >> 1) & _LAST), sign * _sizes(keys.clamp(min=0))


def merged(keys: Tensor, more: Tensor) -> Tensor:
    """The strongest of two sets of partners of the same vectors, both (n, top)."""
    return torch.cat([keys, more], dim=1).topk(keys.shape[1], dim=1).values


def _shaped(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    return (memory[:count] if count <= len(memory) else memory.new_empty(count)).view(shape)


def _padded(count: int) -> int:
    return -(-count // _GROUP) * _GROUP


def _keys(cosine: Tensor, partner: Tensor) -> Tensor:
    """Bits of ``|cos|``, then the partner's number, backwards, then the sign."""
    bits = cosine.clamp(-1.0, 1.0).view(torch.int32).long()
    return ((bits & _LAST) << 32) | ((_LAST - partner) << 1) | (bits < 0)


def _sizes(keys: Tensor) -> Tensor:
    return (keys >> 32).int().view(torch.float32)


def _largest(best: Tensor, top: int) -> Tensor:
    """At most the ``top``-th largest of every row, at least 0, from the largest of groups (n, groups) of its entries.

    So many groups each have one entry that is at least this. Groups are joined while four times as many remain.
    """
    joined = 1
    while best.shape[1] % (2 * joined) == 0 and best.shape[1] >= 8 * joined * top:
        joined *= 2
    best = best.unflatten(1, (joined, -1)).amax(1)
    if best.shape[1] < top:
        return best.new_zeros(len(best))
    return best.topk(top, dim=1).values[:, -1].clamp(max=1.0)


def _above(groups: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, place in its group, group and value of every entry with ``|value| >= least``, rows ascending.

    Args:
        groups: (n, entries of a group, groups), of any strides.
        best: (n, groups), the largest ``|value|`` of every group.
        least: (n,).
    """
    row, group = (best >= least[:, None]).nonzero(as_tuple=True)
    values = groups[row, :, group]
    above, place = (values.abs() >= least[row, None]).nonzero(as_tuple=True)
    return row[above], place, group[above], values[above, place]


def _inside(there: Tensor, *entries: Tensor) -> tuple[Tensor, ...]:
    """Entries without those of rows or columns that only fill a tile up."""
    return entries if bool(there.all()) else tuple(entry[there] for entry in entries)


def _merge(strongest: Tensor, row: Tensor, keys: Tensor) -> None:
    """Let keys of these rows, ascending, into the strongest, (n, top), in place."""
    if not len(row):
        return
    rows, place, counts = row.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[place]
    new = torch.full((len(rows), int(counts.max())), -1, device=row.device)
    new[place, rank] = keys
    strongest[rows] = merged(strongest[rows], new)
