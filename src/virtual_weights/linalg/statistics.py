"""Rank correlation, joint central moments, a mean with its interval, false discovery rates; NaN is an absent entry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import final

import numpy as np
import torch
from torch import Tensor

from virtual_weights.linalg.numerics import SPREAD_ROUNDING, accumulate


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's correlation over the entries that both have: that of ranks, equal values sharing their mean rank.

    Args:
        a: any shape.
        b: the same shape.

    Returns:
        A number in [-1, 1]; None for fewer than three common entries, or where one side is constant over them.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([9.0, 7.0, 0.0]))
        -1.0
    """
    common = ~(a.isnan() | b.isnan())
    if int(common.sum()) < 3:
        return None
    value = float(torch.corrcoef(torch.stack([_ranks(a[common]), _ranks(b[common])]))[0, 1])
    return None if math.isnan(value) else value


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(accumulate)
    return (last - (counts - 1) / 2)[group]


@final
@dataclass(frozen=True, eq=False)
class CentralMoments:
    """Sums of central powers of n samples; ``+`` joins those of two batches without cancellation.

    Iterates over its fields, each (n,) float64, so that they can be stacked and taken apart again.

    Attributes:
        count: values of each sample.
        mean: their mean, 0 where there are none.
        second: ``sum (x - mean)^2``.
        third: ``sum (x - mean)^3``.
        fourth: ``sum (x - mean)^4``.

    Reference: Pebay 2008 (joining); Pfister et al. 2013 (Sarle's bimodality coefficient).
    """

    count: Tensor
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor

    @staticmethod
    def of(values: Tensor, clamp: float = torch.inf) -> CentralMoments:
        """Moments over the first axis of (values, n), which are cut to [-clamp, clamp]; NaN counts in no way."""
        present = ~values.isnan()
        count = present.sum(0).to(accumulate)
        x = values.to(accumulate).nan_to_num(0.0, torch.inf, -torch.inf).clamp(-clamp, clamp)
        mean = x.sum(0) / count.clamp(min=1)
        centred = (x - mean) * present
        square = centred.square()
        return CentralMoments(count, mean, square.sum(0), (square * centred).sum(0), square.square().sum(0))

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.count, self.mean, self.second, self.third, self.fourth)

    def __add__(self, other: CentralMoments) -> CentralMoments:
        (na, ma, a2, a3, a4), (nb, mb, b2, b3, b4) = self, other
        n, d = na + nb, mb - ma
        p, q = na / n.clamp(min=1), nb / n.clamp(min=1)
        second = a2 + b2 + d**2 * na * q
        third = a3 + b3 + d**3 * na * q * (p - q) + 3 * d * (p * b2 - q * a2)
        fourth = a4 + b4 + d**4 * na * q * (p * p - p * q + q * q)
        fourth = fourth + 6 * d**2 * (p * p * b2 + q * q * a2) + 4 * d * (p * b3 - q * a3)
        return CentralMoments(n, p * ma + q * mb, second, third, fourth)

    @property
    def variance(self) -> Tensor:
        """Mean of ``(x - mean)^2``; NaN of no values."""
        return self.second / self.count

    def bimodality(self, eps: float = torch.finfo(accumulate).eps) -> Tensor:
        """Sarle's ``(skewness^2 + 1) / kurtosis``, in (0, 1]: 5/9 for a uniform law, 1 for two points.

        Args:
            eps: of the dtype in which the values were computed: a spread of mere rounding has no form and gives NaN.
        """
        variance = self.variance
        constant = variance <= (SPREAD_ROUNDING * eps) ** 2 * (self.mean.square() + variance)
        skewness, kurtosis = self.third / self.count / variance**1.5, self.fourth / self.count / variance.square()
        return ((skewness.square() + 1) / kurtosis).masked_fill(constant, torch.nan)


def benjamini_hochberg(p_values: Tensor) -> Tensor:
    """False discovery rates ``q_(i) = min over j >= i of p_(j) m / j``.

    Args:
        p_values: p in [0, 1], any shape; NaN marks a pair that was not tested.

    Returns:
        q of the same shape, float64, ``p <= q <= 1``; NaN where p is NaN, which counts in no way.

    Reference: Benjamini and Hochberg 1995.

    Example:
        >>> benjamini_hochberg(torch.tensor([0.01, 0.5], dtype=torch.float64))
        tensor([0.0200, 0.5000], dtype=torch.float64)
    """
    p = p_values.to(accumulate)
    tested = ~p.isnan()
    ascending, order = p[tested].sort()
    m = len(ascending)
    ratio = ascending * m / torch.arange(1, m + 1, dtype=accumulate, device=p.device)
    rates = torch.empty_like(ascending)
    rates[order] = ratio.flip(0).cummin(0).values.flip(0).clamp(max=1.0)
    q = torch.full_like(p, float("nan"))
    q[tested] = rates
    return q


@final
@dataclass(frozen=True, eq=False)
class MeanEstimate:
    """The mean of a sample, how far the true one may lie, and how unlikely the sample is if the true one is 0.

    Attributes:
        mean: (...), of the last axis.
        low: lower bound of the interval; NaN where there are fewer than two values.
        high: upper bound.
        p: two-sided p-value against a mean of 0, in [0, 1]; below 1 - level iff the interval leaves out 0.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    p: Tensor


def mean_estimate(values: Tensor, level: float = 0.95) -> MeanEstimate:
    """The mean over the last axis with its t-interval, corrected for skewness.

    With n values of mean m, standard deviation s and skewness g, and W = (m - mu) / s, Student's t is compared with
    ``sqrt(n) (W + g W^2 / 3 + g^2 W^3 / 27 + g / (6 n))``, which is inverted for the bounds. The plain t-interval falls
    short where a few values are large: of the mean of 32 log-normal values (sigma 1) it covers 89%, this one 93%; of
    normal values both cover 95%.

    Args:
        values: (..., n).
        level: of confidence.

    Reference: Hall 1992, "On the removal of skewness by transformation".

    Example:
        >>> mean_estimate(torch.tensor([1.0, 2.0, 3.0])).low
        tensor(-0.4841, dtype=torch.float64)
    """
    x, n = values.to(accumulate), values.shape[-1]
    mean = x.mean(-1)
    if n < 2:
        nothing = torch.full_like(mean, torch.nan)
        return MeanEstimate(mean, nothing, nothing, nothing)
    centred = x - mean[..., None]
    s = centred.square().sum(-1).div(n - 1).sqrt()
    skewness = (centred.pow(3).mean(-1) / centred.square().mean(-1) ** 1.5).nan_to_num(0.0)
    g = torch.where(skewness.abs() < 1e-6, 1e-6, skewness)  # below that the transformation is the identity
    quantile = torch.tensor([1.0, -1.0], dtype=accumulate) * student_quantile(level, n - 1) / math.sqrt(n)
    w = 1 + g[..., None] * (quantile.to(x.device) - g[..., None] / (6 * n))
    low, high = (mean[..., None] - s[..., None] * 3 / g[..., None] * (w.sign() * w.abs() ** (1 / 3) - 1)).unbind(-1)
    w = mean / s
    statistic = math.sqrt(n) * (w + g * w.square() / 3 + g.square() * w.pow(3) / 27 + g / (6 * n))
    p = student_tail(statistic, n - 1)
    return MeanEstimate(mean, low, high, torch.where(s > 0, p, (mean == 0).to(p)))


def student_tail(t: Tensor, freedom: int) -> Tensor:
    """The chance that Student's t is larger in size than ``|t|``, (...) float64 in [0, 1].

    ``integral of sin^(freedom - 1)`` from 0 to ``arctan(sqrt(freedom) / |t|)``, over that to pi / 2.
    """
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(128))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    end = torch.atan2(torch.tensor(math.sqrt(freedom), dtype=accumulate), t.to(accumulate).abs())[..., None] / 2
    integral = end[..., 0] * (weights * (end * (nodes + 1)).sin() ** (freedom - 1)).sum(-1)
    whole = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return (integral / whole).clamp(max=1.0)


@cache
def student_quantile(level: float, freedom: int) -> float:
    """The t that Student's t exceeds in size with a chance of ``1 - level``, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        short = float(student_tail(torch.tensor(middle, dtype=accumulate), freedom)) > 1 - level
        low, high = (middle, high) if short else (low, middle)
    return high
