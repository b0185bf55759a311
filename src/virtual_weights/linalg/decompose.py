"""Spectra, eigenvalues, norms and traces of a map through its factors, in float64; how many directions it has.

One algorithm: cut the chain at its narrowest dimension r (``halves``), QR of the two outer factors, and a small r x r
core that carries all singular values. Nothing of shape (out, in) is formed for a chain of low rank. Decompositions of
tensors that other modules share follow at the end.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg.linear_map import LinearMap, halves
from virtual_weights.linalg.numerics import (
    ROUNDINGS,
    STORED_ROUNDINGS,
    accumulate,
    beyond_rounding,
    random_generator,
    tolerance,
)

_EPS = torch.finfo(accumulate).eps


@final
@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Singular values of a map and the ranks that can be read from them.

    Every count is dimensionless, 0 for the zero map, unchanged when the map is scaled, and lies between 1 and
    ``numerical_rank()`` (up to rounding) otherwise. ``p = S^2 / sum(S^2)`` below.

    Args:
        S: (r,) singular values >= 0, in any order; kept descending in float64.

    Example:
        >>> round(Spectrum(torch.ones(3)).entropy_rank, 12)
        3.0
    """

    S: Tensor

    def __post_init__(self) -> None:
        values = self.S.to(accumulate)
        if values.ndim != 1 or not bool((values >= 0).all()):
            raise UsageError(
                f"a spectrum of shape {tuple(values.shape)} with a negative or NaN value, or not a vector",
                expected="a vector of singular values >= 0",
                do="pass singular_values(map)",
            )
        object.__setattr__(self, "S", values.sort(descending=True).values)

    def __repr__(self) -> str:
        return (
            f"Spectrum ({len(self.S)}): {_ends(self.S)}; numerical rank {self.numerical_rank()}, "
            f"stable rank {self.stable_rank:.4g}, entropy rank {self.entropy_rank:.4g}"
        )

    def numerical_rank(self, tol: float | None = None) -> int:
        """Number of singular values above ``tol * S_1``; tol None is ``tolerance(float64, (r,))``."""
        cut = tolerance(accumulate, self.S.shape) if tol is None else tol
        return int((self.S > cut * self.S[:1]).sum())

    @property
    def stable_rank(self) -> float:
        """``||S||^2 / S_1^2``: one strong direction hides weak ones (Rudelson and Vershynin 2007)."""
        return float((self._unit**2).sum())

    @property
    def entropy_rank(self) -> float:
        """``exp(H(p))``, H in nats (Roy and Vetterli 2007, on squared singular values)."""
        return float((-torch.xlogy(self._share, self._share)).sum().exp()) if self._nonzero else 0.0

    @property
    def participation_ratio(self) -> float:
        """``(sum S^2)^2 / sum S^4 = 1 / sum p^2``."""
        return float(1.0 / (self._share**2).sum()) if self._nonzero else 0.0

    def count_above(self, edge: float) -> int:
        """Number of singular values above an absolute edge, such as that of the matched null."""
        return int((self.S > edge).sum())

    def energy_rank(self, fraction: float) -> int:
        """Smallest number of directions that hold at least ``fraction`` of ``sum S^2``; fraction in [0, 1]."""
        if not 0.0 <= fraction <= 1.0:
            raise UsageError(f"energy fraction {fraction}", expected="a fraction in [0, 1]", do="pass e.g. 0.99")
        if not self._nonzero or fraction == 0.0:
            return 0
        # the slack is the rounding of a cumulative sum: without it fraction 1 could ask for more than there is
        enough = self._share.cumsum(0) >= fraction * (1.0 - tolerance(accumulate, self.S.shape))
        return int(enough.to(torch.int8).argmax()) + 1

    @property
    def _nonzero(self) -> bool:
        return self.S.numel() > 0 and float(self.S[0]) > 0.0

    @property
    def _unit(self) -> Tensor:
        # relative to S_1 before squaring: no overflow, no underflow
        return self.S / self.S[0] if self._nonzero else self.S

    @property
    def _share(self) -> Tensor:
        energy = self._unit**2
        return energy / energy.sum()


_SMALL = 256  # sides of matrices too small to share between threads


@final
@dataclass(frozen=True, eq=False, repr=False)
class SVD:
    """``map = U @ diag(S) @ V.T``: U (out, r) outputs, S (r,) gains, descending, V (in, r) inputs."""

    U: Tensor
    S: Tensor
    V: Tensor

    def __repr__(self) -> str:
        return f"SVD: U {tuple(self.U.shape)}, S ({len(self.S)}): {_ends(self.S)}, V {tuple(self.V.shape)}"


def _ends(S: Tensor) -> str:
    return f"{float(S[0]):.4g} to {float(S[-1]):.4g}" if len(S) else "empty"


def svd(map: LinearMap, rank: int | None = None) -> SVD:
    """Reduced singular value decomposition, ``map = U diag(S) V^T``, through the factors.

    Args:
        map: any map, shape (out, in); its narrowest inner dimension is r.
        rank: keep at most this many of the largest singular values; None keeps all r, zeros included.

    Returns:
        SVD with U (out, r), S (r,) descending and >= 0, V (in, r), all float64; S as in ``singular_values``.
        The sign of each pair is fixed: the entry of largest magnitude in a column of U is positive.

    Raises:
        UsageError: a negative rank.

    S is invariant under orthogonal maps on either side and under any re-basing between factors.

    Example:
        >>> from virtual_weights.linalg import Dense
        >>> svd(Dense(torch.tensor([[0.0, 2.0]]))).S
        tensor([2.], dtype=torch.float64)
    """
    if rank is not None and rank < 0:
        raise UsageError(f"rank={rank}", expected="a rank >= 0, or None for all", do="pass how many to keep")
    whole = product_svd(*halves(map, accumulate))
    u, s, v = whole.U[:, :rank], _beyond_rounding(whole.S, map)[:rank], whole.V[:, :rank]
    sign = _signs(u)
    return SVD(U=u * sign, S=s, V=v * sign)


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """Reduced singular value decomposition of ``left @ right``, or of each of a batch, which is not formed.

    Args:
        left: (..., out, k) float64.
        right: (..., k, in) float64.

    Returns:
        SVD with U (..., out, r), S (..., r) descending and V (..., in, r); signs as LAPACK gives them.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    core = r_left @ r_right.mT
    with _one_thread(core):
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return SVD(q_left @ u, s, q_right @ vh.mT)


def singular_values(map: LinearMap) -> Tensor:
    """The r singular values of a map whose narrowest inner dimension is r: float64, descending, >= 0.

    Those of a product are 0 where they are rounding of the product of its factors' largest: ``R O = 0`` has rank 0.
    """
    return _beyond_rounding(gains(_core(map)), map)


def spectral_norm(map: LinearMap) -> float:
    """``||map||_2``, the largest gain; 0 for an empty map."""
    s = singular_values(map)
    return float(s[0]) if s.numel() else 0.0


def frobenius_norm(map: LinearMap) -> float:
    """``||map||_F = sqrt(sum of squared entries)``, through the r x r core."""
    return float(_beyond_rounding(torch.linalg.vector_norm(_core(map)), map))


def eigenvalues(map: LinearMap, stored: float = _EPS) -> Tensor:
    """The r eigenvalues that a square map of inner dimension r can have beside zero; what is rounding of 0 is 0.

    ``eig(A B) = eig(B A)`` up to zeros, so an (n, n) map cut at its narrowest dimension r has the r eigenvalues of an
    r x r matrix and n - r further zeros, which are not returned.

    Args:
        map: a square map, shape (n, n).
        stored: eps of the dtype in which its factors are stored, see :func:`product_eigen`.

    Returns:
        (r,) complex128, by descending magnitude (then real, then imaginary part).

    Raises:
        UsageError: the map is not square.

    Invariant under a change of basis of the map and under re-basing between factors.
    Reference: Horn and Johnson, *Matrix Analysis*, theorem 1.3.22.

    Example:
        >>> from virtual_weights.linalg import Dense
        >>> eigenvalues(Dense(torch.tensor([[1.0], [0.0]])) @ Dense(torch.tensor([[3.0, 5.0]])))
        tensor([3.+0.j], dtype=torch.complex128)
    """
    _require_square(map, "eigenvalues")
    left, right = halves(map, accumulate)
    values = product_eigen(right, left, stored)
    order = sorted(range(len(values)), key=lambda i: _descending(complex(values[i].item())))
    return values[order]


def trace(map: LinearMap) -> float:
    """``tr(map)`` of a square map, through its factors: ``tr(A B) = sum(A * B^T)``."""
    _require_square(map, "trace")
    left, right = halves(map, accumulate)
    return float((left * right.T).sum())


def triangular(a: Tensor) -> Tensor:
    """R of ``a = Q R``, without Q."""
    return torch.linalg.qr(a, mode="r")[1]


def gains(a: Tensor) -> Tensor:
    """Singular values of the last two axes, descending."""
    with _one_thread(a):
        return torch.linalg.svdvals(a)


def largest_gains(matrices: Tensor) -> Tensor:
    """Largest singular value of each of a batch (n, a, b), from the smaller Gram: of the largest nothing is lost."""
    tall = matrices.shape[-2] >= matrices.shape[-1]
    grams = matrices.mT @ matrices if tall else matrices @ matrices.mT
    return torch.linalg.eigvalsh(grams)[:, -1].clamp_min(0).sqrt() if len(matrices) else matrices.new_empty(0)


def eigen(a: Tensor) -> Tensor:
    """Eigenvalues of a square matrix, complex, in no order."""
    return torch.linalg.eigvals(a)


def product_eigen(right: Tensor, left: Tensor, stored: float = _EPS) -> Tensor:
    """Eigenvalues of ``right @ left``, with 0 for those that rounding of the two factors can make 0.

    An eigenvalue 0 of a Jordan block of order n answers an error e by e^(1/n): the computed eigenvalues of a nilpotent
    matrix of order 8 are some .01 in float64. So zeros are taken off before eigenvalues are, in two ways. A matrix is
    nilpotent where every ``tr M^j`` is what an error of the size below makes of 0. Of any other, ``Z^T M Z`` has the
    eigenvalues of M but for zeros, Z an orthonormal basis of what M does not annul; repeated until nothing is annulled.
    What that leaves out is together no larger than the error. Real and imaginary parts are 0 within it, too.

    Args:
        right: (k, d).
        left: (d, k).
        stored: eps of the dtype in which the factors are stored. Their errors are independent of what they multiply, so
            that they leave ``stored ||right|| ||left|| / sqrt(d)`` in the product, as if turned at random.

    Returns:
        (k,) complex128, in no order.

    Reference: Golub and Wilkinson 1976 (staircase of the eigenvalue 0).
    """
    matrix = right @ left
    size = float(torch.linalg.vector_norm(right) * torch.linalg.vector_norm(left))
    error = size * (ROUNDINGS * _EPS + STORED_ROUNDINGS * stored / right.shape[1] ** 0.5)
    values = torch.zeros(len(matrix), dtype=torch.complex128, device=matrix.device)
    if not _nilpotent(matrix, error):
        core = _not_annulled(matrix, error)
        parts = torch.view_as_real(eigen(core).to(torch.complex128))
        within = parts.abs() <= 2 * error / len(matrix) ** 0.5  # the 2-norm of an error of even spectrum
        values[: len(core)] = torch.view_as_complex(parts.masked_fill(within, 0.0))
    return values


def _nilpotent(matrix: Tensor, error: float) -> bool:
    """Whether an error E of this Frobenius norm explains every ``tr M^j``: it makes some ``j tr(M^(j-1) E)`` of it."""
    power, k = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device), len(matrix)
    for j in range(1, k + 1):
        explained = 3 * j * torch.linalg.vector_norm(power) * error / k  # three deviations of independent entries
        power = power @ matrix
        if bool(power.trace().abs() > explained):
            return False
    return True


def _not_annulled(matrix: Tensor, error: float) -> Tensor:
    """The staircase: what is left of a matrix when its null space, that of the rest and so on are taken off."""
    dropped = 0.0
    while len(matrix):
        _, s, vh = torch.linalg.svd(matrix)
        spent = dropped + s.square().flip(0).cumsum(0).flip(0)  # in all, by dropping a singular value and those below
        rank = int((spent > error**2).sum())
        if rank == len(matrix):
            break
        dropped = float(spent[rank])
        matrix = vh[:rank] @ matrix @ vh[:rank].mT
    return matrix


def square_roots(metric: Tensor) -> Tensor:
    """L with ``L^T L = metric`` for each symmetric positive semidefinite (k, k) matrix of a batch.

    Cholesky where it exists; else the symmetric eigenvalues, those below 0 being rounding and dropped.
    """
    lower, failed = torch.linalg.cholesky_ex(metric)
    roots = lower.mT
    semidefinite = failed > 0
    if bool(semidefinite.any()):
        values, vectors = torch.linalg.eigh(metric[semidefinite])
        roots[semidefinite] = values.clamp(min=0.0).sqrt()[:, :, None] * vectors.mT
    return roots


@contextmanager
def _one_thread(a: Tensor) -> Generator[None]:
    """For a batch of small matrices: threads that share a small matrix wait for each other more than they work.

    Where other processes use the cores too, that waiting made such batches five times slower.
    """
    threads = torch.get_num_threads()
    if a.ndim < 3 or min(a.shape[-2:]) > _SMALL or a.device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_POWER_STEPS = 8  # they give a largest singular value to some per cent, which a cut does not need better


def _beyond_rounding(gains: Tensor, map: LinearMap) -> Tensor:
    """Gains of a product, 0 where its factors, in the dtype that they have, leave rounding of that size."""
    chain = map.chain()
    if len(chain) < 2:
        return gains
    eps = torch.finfo(torch.promote_types(map.dtype, torch.float32)).eps
    return beyond_rounding(gains, math.prod(_largest_gain(factor.to(accumulate)) for factor in chain), eps)


def _largest_gain(map: LinearMap) -> float:
    """``||map||_2`` by power iteration, slightly below it."""
    transposed, x = map.T, torch.randn(map.shape[1], 1, generator=random_generator(0), dtype=accumulate)
    x, size = x.to(map.device), x.new_zeros(())
    for _ in range(_POWER_STEPS):
        x = transposed.apply(map.apply(x / torch.linalg.vector_norm(x)))
        size = torch.linalg.vector_norm(x).sqrt()
        if not bool(size > 0):
            break
    return float(size)


def _core(map: LinearMap) -> Tensor:
    """(r, r) matrix with the singular values of the map."""
    left, right = halves(map, accumulate)
    return triangular(left) @ triangular(right.T).T


def _signs(u: Tensor) -> Tensor:
    if u.numel() == 0:
        return u.new_ones(u.shape[1])
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(u.dtype)


def _descending(value: complex) -> tuple[float, float, float]:
    # conjugates have equal magnitude only up to rounding: 12 digits keep their order the same on every machine
    return -float(f"{abs(value):.12g}"), -float(f"{value.real:.12g}"), -value.imag


def _require_square(map: LinearMap, name: str) -> None:
    if map.shape[0] != map.shape[1]:
        raise UsageError(
            f"{name} of a map of shape {map.shape}",
            expected="a square map (n, n)",
            do="compose it with a map back, or use singular_values",
        )
