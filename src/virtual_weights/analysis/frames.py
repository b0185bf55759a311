"""Orthonormal frames of heads' subspaces, with the gains of their circuits along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.analysis.traffic import HeadRole, circuits
from virtual_weights.linalg import tolerance
from virtual_weights.stream import Stream


@final
@dataclass(frozen=True, eq=False)
class Frames:
    """Subspaces of several heads: directions in order of gain, zero where they are cut.

    Attributes:
        basis: (n, k, d) float64, orthonormal rows up to the rank, zero rows after it.
        gains: (n, k), the circuit's singular values, zero after the rank.
        rank: (n,) float64, dimension of each subspace.
    """

    basis: Tensor
    gains: Tensor
    rank: Tensor

    @property
    def count(self) -> int:
        """How many subspaces."""
        return len(self.rank)

    def to(self, device: str) -> Frames:
        """The same on another device."""
        return Frames(self.basis.to(device), self.gains.to(device), self.rank.to(device))


@final
@dataclass(frozen=True, eq=False)
class HeadSide:
    """The heads of one role: names, shared channels, the state each reads or writes, and how many stand in a layer."""

    names: tuple[str, ...]
    channels: tuple[str, ...]
    position: Tensor
    per_layer: int


def frames(stream: Stream, role: HeadRole, layers: Sequence[int], cut: float, energy: float | None = None) -> Frames:
    """Frames of all heads of some layers in one role.

    Args:
        stream: the model.
        role: what of a head.
        layers: layers with attention.
        cut: singular values up to this share of the largest are dropped.
        energy: also drop what exceeds this share of the squared singular values.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        q, r = torch.linalg.qr(circuits(stream, role, layer).mT)
        u, s, _ = torch.linalg.svd(r)
        kept = (s > cut * s[:, :1]) & _within(s, energy)
        parts.append(((q @ u * kept[:, None, :]).mT, s * kept))
    gains = torch.cat([s for _, s in parts])
    return Frames(torch.cat([basis for basis, _ in parts]), gains, (gains > 0).sum(1).double())


def heads_in(stream: Stream, role: HeadRole) -> HeadSide:
    """Who has a subspace of this role: all heads, or the first of those that share a key or value."""
    step = stream.spec.group if role in ("K", "V") else 1
    first = stream.heads[::step]
    positions = [c.writes if role == "O" else c.reads for c in first]
    return HeadSide(
        tuple(f"{c.label}.{role}" for c in first),
        tuple(c.channel or "" for c in first) if step > 1 else (),
        torch.tensor(positions, dtype=torch.int64),
        stream.spec.n_heads // step,
    )


def _within(s: Tensor, energy: float | None) -> Tensor:
    """The fewest leading directions that hold a share of the energy."""
    if energy is None:
        return torch.ones_like(s, dtype=torch.bool)
    share = s.square() / s.square().sum(1, keepdim=True)
    # the slack is the rounding of a cumulative sum, as in Spectrum.energy_rank
    before = share.cumsum(1) - share
    return before < energy * (1 - tolerance(s.dtype, s.shape))
