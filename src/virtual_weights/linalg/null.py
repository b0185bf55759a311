"""The matched null: what ``||A U B||`` is when only the orientation U between two maps is random (Haar on O(d)).

A score cannot be read without it. Both moments are closed form; draws are seeded and need only singular values. Of two
vectors the null is the law of their cosine, whose tail is closed form too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg.decompose import gains, singular_values
from virtual_weights.linalg.linear_map import Dense, LinearMap
from virtual_weights.linalg.numerics import ROUNDINGS, WORKSPACE_BYTES, accumulate, random_generator, tolerance

_NORMAL = 1e-6  # skewness up to which a gamma law is a normal one, its shape being too large to compute with
_LOG_EPS = math.log(torch.finfo(accumulate).eps)


def haar_moments(
    trace_a: Tensor | float, square_a: Tensor | float, trace_b: Tensor | float, square_b: Tensor | float, d: int
) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``X = ||A U B||_F^2 = tr(G_A U G_B U^T)`` over Haar-random orthogonal U.

    ::

        E X   = tr G_A tr G_B / d
        Var X = 2 (tr G_A^2 - (tr G_A)^2/d) (tr G_B^2 - (tr G_B)^2/d) / ((d - 1) (d + 2))

    with ``G_A = A^T A`` and ``G_B = B B^T``, both (d, d): the traceless symmetric matrices are one irreducible
    representation of O(d), of dimension (d - 1)(d + 2)/2.

    Args:
        trace_a: ``tr G_A``; tensors broadcast over pairs.
        square_a: ``tr G_A^2``.
        trace_b: ``tr G_B``.
        square_b: ``tr G_B^2``.
        d: dimension of the space that U turns, >= 1.

    Returns:
        (mean, variance) as float64 tensors, >= 0; the variance is 0 for d = 1, where U is a sign, and where G_A or G_B
        is a multiple of the identity up to rounding: then no orientation is different from another.

    Reference: Collins and Sniady 2006 (integration over O(d)); for projectors: James 1954.

    Example:
        >>> haar_moments(2.0, 2.0, 2.0, 2.0, 8)[0]
        tensor(0.5000, dtype=torch.float64)
    """
    if d < 1:
        raise UsageError(f"d={d}", expected="a dimension >= 1", do="pass the width of the stream")
    t_a, s_a, t_b, s_b = (torch.as_tensor(x, dtype=accumulate) for x in (trace_a, square_a, trace_b, square_b))
    mean = t_a * t_b / d
    if d == 1:
        return mean, torch.zeros_like(mean + s_a + s_b)
    return mean, 2.0 * _spread(t_a, s_a, d) * _spread(t_b, s_b, d) / ((d - 1) * (d + 2))


def _spread(trace: Tensor, square: Tensor, d: int) -> Tensor:
    """``tr G^2 - (tr G)^2/d``, >= 0 by Cauchy-Schwarz; 0 where it is what weights in float32 leave of an isometry."""
    cut = max(tolerance(accumulate, (d,)), (ROUNDINGS * torch.finfo(torch.float32).eps) ** 2)
    spread = square - trace**2 / d
    return spread.masked_fill(spread <= cut * square, 0.0)


def standardised(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``(value - mean) / deviation``; NaN where the variance is 0, since then the null leaves no choice."""
    return ((values - mean) / variance.sqrt()).masked_fill(variance == 0, torch.nan)


def haar_tail(values: Tensor, a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor], d: int) -> Tensor:
    """``P(X >= value)`` for X of :func:`haar_moments`, by the gamma law with its mean, variance and third moment.

    ::

        E (X - E X)^3 = 8 d tr A^3 tr B^3 / ((d - 2)(d - 1)(d + 2)(d + 4)),    A = G_A - tr G_A/d, B likewise

    since the traceless symmetric matrices have a single cubic invariant. X is a sum of few squares, so that its tail is
    that of a chi-square law rather than a normal one: of two lines in d = 64, P(z > 3) is .02, not .001. Where the
    third moment is not above 0 the upper tail is lighter than a normal one, which is then what is given.

    Args:
        values: observed ``||A U B||_F^2``; broadcasts against the traces.
        a: ``tr G_A``, ``tr G_A^2`` and ``tr G_A^3``.
        b: those of G_B.
        d: dimension of the space that U turns, >= 3.

    Returns:
        Probabilities in [0, 1], float64; NaN where the variance is 0. Approximate where spectra are uneven: compare
        :func:`draw_null`.

    Reference: Pearson 1895 (type III); Buckley and Eagleson 1988 (sums of squares by three moments).
    """
    mean, variance = haar_moments(a[0], a[1], b[0], b[1], d)
    scale = 8 * d / ((d - 2) * (d - 1) * (d + 2) * (d + 4))
    third = scale * _third(*a, d) * _third(*b, d)
    z = standardised(values, mean, variance)
    skewness = (third / variance**1.5).nan_to_num(0.0)
    normal = torch.special.erfc(z / 2**0.5) / 2
    skewed = skewness > _NORMAL
    shape = 4 / torch.where(skewed, skewness, 1.0).square()
    tail = torch.special.gammaincc(shape, (shape + z * shape.sqrt()).clamp(min=0.0))
    return torch.where(skewed, tail, normal).masked_fill(z.isnan(), torch.nan)


def _third(trace: Tensor, square: Tensor, cube: Tensor, d: int) -> Tensor:
    """``tr (G - tr G/d)^3``."""
    return cube - 3 * trace * square / d + 2 * trace**3 / d**2


def overlap_moments(r1: Tensor | int, r2: Tensor | int, d: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the overlap ``||Q1^T Q2||_F^2 / min(r1, r2)`` of independent random subspaces.

    Args:
        r1: dimensions of the first subspaces, >= 1; broadcasts.
        r2: dimensions of the second, >= 1.
        d: dimension of the space.

    Returns:
        (mean, variance), float64; the mean is ``max(r1, r2) / d``.
    """
    first, second = torch.as_tensor(r1, dtype=accumulate), torch.as_tensor(r2, dtype=accumulate)
    mean, variance = haar_moments(first, first, second, second, d)
    least = torch.minimum(first, second)
    return mean / least, variance / least**2


def haar_orthogonal(d: int, generator: torch.Generator) -> Tensor:
    """A (d, d) orthogonal matrix from the Haar measure on O(d), float64 (QR of a Gaussian; Mezzadri 2007)."""
    return _haar_frames(1, d, d, generator)[0]


def draw_null(A: LinearMap, B: LinearMap, draws: int, seed: int) -> Tensor:
    """Seeded draws of ``||A U B||_F^2``, U Haar on O(d), through the singular values alone.

    Args:
        A: map reading R^d, shape (., d).
        B: map writing R^d, shape (d, .).
        draws: how many.
        seed: of the generator; the same seed gives the same draws.

    Returns:
        (draws,) float64 >= 0.

    Raises:
        UsageError: A and B do not meet in one R^d.
    """
    return torch.cat([core.square().sum(dim=(1, 2)) for core in _null_cores(A, B, draws, seed)])


def spectrum_null_edge(A: LinearMap, B: LinearMap, draws: int, seed: int, quantile: float = 0.99) -> float:
    """The edge of the matched null: this quantile of the largest singular value of ``A U B``, from seeded draws.

    Args:
        A: map reading R^d.
        B: map writing R^d.
        draws: how many, >= 1; the quantile is interpolated between them.
        seed: of the generator.
        quantile: in [0, 1].

    Returns:
        The edge, in units of gain; singular values of ``A B`` above it are aligned beyond chance.
    """
    # a slice, not a maximum: the zero map has no singular value, and its edge is the empty sum
    largest = torch.cat([gains(core)[:, :1].sum(dim=1) for core in _null_cores(A, B, draws, seed)])
    return float(torch.quantile(largest, quantile))


@lru_cache(maxsize=16)
def random_cosines(r1: int, r2: int, d: int, draws: int, seed: int) -> Tensor:
    """Cosines of the principal angles of independent random subspaces of R^d, seeded draws.

    Args:
        r1: dimension of the first.
        r2: dimension of the second.
        d: dimension of the space, at least as large as both.
        draws: how many, >= 1.
        seed: of the generator.

    Returns:
        (draws, min(r1, r2)) float64 in [0, 1], descending in each draw.
    """
    rows, columns = Dense(torch.eye(r1, d, dtype=accumulate)), Dense(torch.eye(d, r2, dtype=accumulate))
    return torch.cat([gains(core) for core in _null_cores(rows, columns, draws, seed)]).clamp(max=1.0)


def cosine_tail(threshold: float, d: int) -> float:
    """``P(c > threshold)`` for the cosine c of two independent directions, at least one of them uniform in R^d.

    c has density proportional to ``(1 - c^2)^((d - 3)/2)``: mean 0, mean square 1/d, ``c^2 ~ Beta(1/2, (d - 1)/2)``,
    so with the regularised incomplete beta function I

    ::

        P(c > t) = I_(1 - t^2)((d - 1)/2, 1/2) / 2 = P(c < -t)

    Args:
        threshold: t in [0, 1).
        d: dimension, >= 2.

    Returns:
        The probability, in [0, 1/2], to about 1e-12 relative however small it is (down to underflow).

    Raises:
        UsageError: a threshold outside [0, 1) or a dimension below 2.

    Reference: Abramowitz and Stegun 26.5.4 (the series; every term is positive, so nothing cancels).

    Example:
        >>> round(cosine_tail(0.5, 3), 12)  # on the sphere of R^3 a cosine is uniform: Archimedes
        0.25
    """
    if not 0.0 <= threshold < 1.0 or d < 2:
        raise UsageError(
            f"the tail beyond cosine {threshold} in {d} dimensions",
            expected="a threshold in [0, 1) and at least 2 dimensions",
            do="pass for example 0.5 and the width of the stream",
        )
    if threshold == 0.0:
        return 0.5
    square, half = threshold**2, (d - 1) / 2
    # the side on which the series converges fast and the answer is no difference of nearly equal numbers
    if square * d < 1.0:
        return (1.0 - _regularised_beta(square, 0.5, half)) / 2
    return _regularised_beta(1.0 - square, half, 0.5) / 2


def _null_cores(A: LinearMap, B: LinearMap, draws: int, seed: int) -> Iterator[Tensor]:
    """Batches of matrices with the singular values of A U B: ``diag(Sa) H diag(Sb)``, H a corner of U."""
    if A.shape[1] != B.shape[0] or draws < 1:
        raise UsageError(
            f"{draws} draws for maps of shapes {A.shape} and {B.shape}",
            expected="at least one draw, and inner dimensions that agree",
            do="pass the reader first and the writer second",
        )
    d = A.shape[1]
    s_a, s_b = (s[s > 0] for s in (singular_values(A).cpu(), singular_values(B).cpu()))
    # U^T is as Haar as U: only the thinner side needs a frame
    wide, thin = (s_a, s_b) if len(s_a) >= len(s_b) else (s_b, s_a)
    generator = random_generator(seed)
    batch = max(1, WORKSPACE_BYTES // max(1, 8 * d * len(thin)))
    for start in range(0, draws, batch):
        frames = _haar_frames(min(batch, draws - start), d, len(thin), generator)
        yield wide[:, None] * frames[:, : len(wide)] * thin


def _haar_frames(count: int, d: int, r: int, generator: torch.Generator) -> Tensor:
    """(count, d, r) Haar frames; without the sign fix their law would depend on LAPACK's signs."""
    gaussian = torch.randn(count, d, r, dtype=accumulate, generator=generator, device=generator.device)
    q, upper = torch.linalg.qr(gaussian)
    diagonal = upper.diagonal(dim1=1, dim2=2)
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(accumulate)[:, None, :]


def _regularised_beta(x: float, a: float, b: float) -> float:
    """``I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) * sum_n prod_(m < n) (a + b + m)/(a + 1 + m) x``."""
    terms = max(64, math.ceil(_LOG_EPS / math.log(x)))
    n = torch.arange(terms, dtype=accumulate)
    series = 1.0 + float(((a + b + n) / (a + 1.0 + n) * x).cumprod(0).sum())
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - math.log(a) - log_beta) * series
