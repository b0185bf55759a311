"""Subspaces of R^d: what a map writes, what it reads, and the angles between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg.decompose import Spectrum, gains, svd
from virtual_weights.linalg.linear_map import LinearMap
from virtual_weights.linalg.numerics import ORTHONORMAL, SAME_DIRECTION, accumulate
from virtual_weights.linalg.numerics import tolerance as _rank_cut


@final
@dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """A subspace of R^d by an orthonormal basis in columns, (d, r) float64; r = 0 is the null space {0}.

    Raises:
        UsageError: the columns are not orthonormal (to ``ORTHONORMAL``) or not a matrix.
    """

    basis: Tensor

    def __post_init__(self) -> None:
        if self.basis.ndim != 2 or self.basis.shape[1] > self.basis.shape[0]:
            raise UsageError(
                f"a basis of shape {tuple(self.basis.shape)}",
                expected="a matrix (d, r) with r <= d, vectors in columns",
                do="transpose it, or take column_space of a map",
            )
        object.__setattr__(self, "basis", self.basis.to(accumulate))
        gram = self.basis.T @ self.basis
        if not torch.allclose(
            gram, torch.eye(self.rank, dtype=gram.dtype, device=gram.device), rtol=0.0, atol=ORTHONORMAL
        ):
            raise UsageError(
                "a basis whose columns are not orthonormal",
                expected="basis.T @ basis = I",
                do="take column_space(Dense(vectors)) to orthonormalise",
            )

    def __repr__(self) -> str:
        return f"Subspace of rank {self.rank} in R^{self.dim}; basis in columns: .basis"

    @property
    def rank(self) -> int:
        """Dimension of the subspace."""
        return self.basis.shape[1]

    @property
    def dim(self) -> int:
        """Dimension d of the space around it."""
        return self.basis.shape[0]

    def project(self, x: Tensor) -> Tensor:
        """Orthogonal projection ``Q Q^T x`` of the columns of x, (d,) or (d, n), float64."""
        return self.basis @ (self.basis.T @ x.to(accumulate))

    def contains(self, v: Tensor, tol: float = SAME_DIRECTION) -> bool:
        """Whether every column of v lies in the subspace: ``||v - Q Q^T v|| <= tol ||v||``."""
        v = v.to(accumulate)
        distance = torch.linalg.vector_norm(v - self.project(v), dim=0)
        return bool((distance <= tol * torch.linalg.vector_norm(v, dim=0)).all())


def column_space(map: LinearMap, energy: float | None = None, tolerance: float | None = None) -> Subspace:
    """What a map can write: the span of its leading left singular vectors.

    Args:
        map: any map, shape (d, in).
        energy: keep the fewest directions holding this fraction of ``sum S^2``.
        tolerance: keep singular values above ``tolerance * S_1``. With neither: the numerical rank in float64.

    Returns:
        Subspace of R^d. Invariant under re-basing inside the map and scaling.

    Raises:
        UsageError: both energy and tolerance are given.

    Example:
        >>> from virtual_weights.linalg import Dense
        >>> column_space(Dense(torch.tensor([[3.0], [4.0]]))).basis.flatten()
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    if energy is not None and tolerance is not None:
        raise UsageError(
            f"energy={energy} and tolerance={tolerance}", expected="one of them or neither", do="leave one out"
        )
    factors = svd(map)
    spectrum = Spectrum(factors.S)
    if energy is not None:
        return Subspace(factors.U[:, : spectrum.energy_rank(energy)])
    cut = _rank_cut(accumulate, map.shape) if tolerance is None else tolerance
    return Subspace(factors.U[:, : spectrum.numerical_rank(cut)])


def row_space(map: LinearMap, energy: float | None = None, tolerance: float | None = None) -> Subspace:
    """What a map can read: the span of its leading right singular vectors. Arguments as in :func:`column_space`."""
    return column_space(map.T, energy, tolerance)


def principal_angles(a: Subspace, b: Subspace) -> Tensor:
    """Principal angles between two subspaces, ascending, in radians.

    ``cos(theta) = singular values of Qa^T Qb``; angles below 45 degrees are taken from their sines, the singular values
    of ``Qb - Qa Qa^T Qb``, because acos loses half the digits near 0.

    Args:
        a: subspace of R^d of dimension r1.
        b: subspace of R^d of dimension r2.

    Returns:
        (min(r1, r2),) float64 in [0, pi/2]. Symmetric, invariant under an orthogonal map of both.

    Reference: Bjorck and Golub 1973; Knyazev and Argentati 2002.

    Example:
        >>> principal_angles(Subspace(torch.eye(3)[:, :1]), Subspace(torch.eye(3)[:, 1:2]))
        tensor([1.5708], dtype=torch.float64)
    """
    _require_same_space([a, b])
    if a.rank < b.rank:
        a, b = b, a
    cosines = gains(a.basis.T @ b.basis).clamp(max=1.0)
    sines = gains(b.basis - a.project(b.basis)).clamp(max=1.0).flip(0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def overlap(a: Subspace, b: Subspace) -> float:
    """Mean squared cosine of the principal angles, ``||Qa^T Qb||_F^2 / min(r1, r2)``.

    Returns:
        A number in [0, 1]; NaN if either subspace is {0}, which has no angle to anything. For independent random
        subspaces the mean is ``max(r1, r2) / d`` (:func:`~virtual_weights.linalg.null.overlap_moments`).
    """
    _require_same_space([a, b])
    least = min(a.rank, b.rank)
    return min(float((a.basis.T @ b.basis).square().sum()) / least, 1.0) if least else float("nan")


def complement(a: Subspace) -> Subspace:
    """The orthogonal complement, of dimension d - r."""
    return Subspace(torch.linalg.qr(a.basis, mode="complete")[0][:, a.rank :])


def sum_of(subspaces: Sequence[Subspace], tol: float = SAME_DIRECTION) -> Subspace:
    """The span of several subspaces of one R^d.

    Args:
        subspaces: at least one.
        tol: angle in radians within which two directions count as one: stacked bases of two lines at a small angle
            theta have the singular value ``theta / sqrt(2)``, which is cut.

    Returns:
        Subspace whose dimension is at most the sum of dimensions and at most d.
    """
    _require_same_space(subspaces)
    u, s, _ = torch.linalg.svd(torch.cat([space.basis for space in subspaces], dim=1), full_matrices=False)
    return Subspace(u[:, s > tol / 2**0.5])


def intersection(subspaces: Sequence[Subspace], tol: float = SAME_DIRECTION) -> Subspace:
    """The directions that all subspaces share, ``x`` with ``sum_i ||x - P_i x||^2 = 0``.

    Args:
        subspaces: at least one, of one R^d.
        tol: angle in radians (root of the summed squared sines) within which a direction counts as shared, so that
            ``dim(A + B) + dim(A & B) = dim A + dim B``.

    Returns:
        Subspace of the first of them, possibly {0}.
    """
    _require_same_space(subspaces)
    first = subspaces[0].basis
    residual = torch.cat([first - other.project(first) for other in subspaces[1:]] or [first * 0.0], dim=0)
    _, s, vh = torch.linalg.svd(residual)
    sines = torch.cat([s, s.new_zeros(first.shape[1] - len(s))])
    return Subspace(torch.linalg.qr(first @ vh.T[:, sines <= tol])[0])


def _require_same_space(subspaces: Sequence[Subspace]) -> None:
    dims = sorted({space.dim for space in subspaces})
    if len(dims) != 1:
        raise UsageError(
            f"subspaces of spaces of dimensions {dims}", expected="at least one, all of one R^d", do="check the stream"
        )
