"""Many maps on one stream side, held in shared thin factors, and their own moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg.numerics import accumulate

_MOMENT_BYTES = 64 * 2**20  # converted factors held at once by self_moments


@final
@dataclass(frozen=True, eq=False)
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
    """``tr G_i`` and ``tr G_i^2`` of every map, through (k, k) matrices only.

    With ``W = outer outer^T``: ``tr G = tr(M W)`` and ``tr G^2 = tr(M W M W)``.

    Args:
        stack: n maps.

    Returns:
        (trace, square), each (n,) float64, >= 0: the squared Frobenius norm of each map, and the sum of the fourth
        powers of its singular values. Invariant under rotation of the stream and re-basing inside the map.
    """
    k, device = stack.inner, stack.outer.device
    step = max(1, _MOMENT_BYTES // max(1, 8 * k * max(stack.width, k)))
    cuts = [slice(i, i + step) for i in range(0, stack.outer.shape[0], step)]
    gram = torch.empty((stack.outer.shape[0], k, k), dtype=accumulate, device=device)
    for cut in cuts:
        block = stack.outer[cut].to(accumulate)
        torch.bmm(block, block.mT, out=gram[cut])
    trace = torch.empty(stack.count, dtype=accumulate, device=device)
    square = torch.empty_like(trace)
    for start in range(0, stack.count, step):
        cut = slice(start, start + step)
        product = gram[stack.index[cut].to(device)]
        if stack.metric is not None:
            product = stack.metric[cut].to(device=device, dtype=accumulate) @ product
        trace[cut] = product.diagonal(dim1=1, dim2=2).sum(dim=1)
        square[cut] = (product * product.mT).sum(dim=(1, 2))
    return trace, square
