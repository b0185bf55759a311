"""The cosine of two independent random directions: what any measured alignment is to be compared with."""

from __future__ import annotations

import math

import torch

from virtual_weights.errors import UsageError
from virtual_weights.linalg.numerics import accumulate

_LEAST = math.log(torch.finfo(accumulate).eps)


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


def _regularised_beta(x: float, a: float, b: float) -> float:
    """``I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) * sum_n prod_(m < n) (a + b + m)/(a + 1 + m) x``."""
    terms = max(64, math.ceil(_LEAST / math.log(x)))
    n = torch.arange(terms, dtype=accumulate)
    series = 1.0 + float(((a + b + n) / (a + 1.0 + n) * x).cumprod(0).sum())
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - math.log(a) - log_beta) * series
