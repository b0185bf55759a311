"""What attention scores see of queries and of keys: a metric on each side, of what it meets on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import accumulate
from virtual_weights.stream.group import Group, Port
from virtual_weights.stream.stream import Stream


@final
@dataclass(frozen=True)
class Offsets:
    """Query positions minus key positions that are averaged over: one, or those of all causal pairs of a chunk.

    Attributes:
        length: tokens of a chunk.
        offset: the only one; None for all causal pairs.
    """

    length: int
    offset: int | None = None

    @property
    def weights(self) -> Tensor:
        """The share of every offset, (length,), among the causal pairs of a chunk."""
        pairs = torch.arange(self.length, 0, -1, dtype=accumulate)
        return pairs / pairs.sum()


def score_metric(stream: Stream, reader: tuple[Port, Group], second: Tensor, mean: Tensor, offsets: Offsets) -> Tensor:
    """``A^T A`` of queries or keys, with which ``x^T A^T A x`` is the mean squared score of x, in squared logits.

    ``Q: Cov(Rot^T k) scale^2``, without what all keys have in common, which softmax does not see;
    ``K: E[Rot q q^T Rot^T] scale^2``; as if queries and keys of a pair were independent.

    Args:
        stream: the model.
        reader: the port, ``"Q"`` or ``"K"``, and its attention.
        second: of the other side, ``E[x x^T]``, (m, k, k).
        mean: of the other side, ``E[x]``, (m, k).
        offsets: over which it is averaged.

    Returns:
        (m, k, k) float64.
    """
    port, group = reader
    metric = _turned(second.double(), stream, reader, offsets)
    if port == "Q":
        turned = mean_turn(stream, group, offsets).mT @ mean.double()[..., None]
        metric = metric - turned @ turned.mT
    assert group.attention is not None
    return metric * group.attention.scale**2


def mean_turn(stream: Stream, group: Group, offsets: Offsets) -> Tensor:
    """``E[Rot]`` over the offsets, (k, k) float64; the identity without rotary."""
    step = stream.rotation(1 if offsets.offset is None else offsets.offset, group)
    if step is None:
        return torch.eye(group.width, dtype=accumulate)
    if offsets.offset is not None:
        return step
    values, basis = torch.linalg.eig(step)
    powers = values[:, None] ** torch.arange(offsets.length, dtype=accumulate)
    return (basis * (powers * offsets.weights).sum(1) @ torch.linalg.inv(basis)).real


def _turned(square: Tensor, stream: Stream, reader: tuple[Port, Group], offsets: Offsets) -> Tensor:
    """``Rot^T C Rot`` for Q, ``Rot C Rot^T`` for K, at one offset or on average over the causal pairs of a chunk.

    ``Rot_D = Rot_1^D``: with ``Rot_1 = U diag(l) U^-1`` the average over D weighs entry (a, b) of C, in the basis U, by
    the mean of ``(l_a l_b)^D``.
    """
    port, group = reader
    turn = stream.rotation(1 if offsets.offset is None else offsets.offset, group)
    if turn is None:
        return square
    turn = turn.mT if port == "Q" else turn
    if offsets.offset is not None:
        return turn @ square @ turn.mT
    values, basis = torch.linalg.eig(turn)
    inverse = torch.linalg.inv(basis)
    powers = values[:, None] ** torch.arange(offsets.length, dtype=accumulate)  # (k, length)
    mean = (powers * offsets.weights) @ powers.mT
    return (basis @ ((inverse @ square.to(basis.dtype) @ inverse.mT) * mean) @ basis.mT).real
