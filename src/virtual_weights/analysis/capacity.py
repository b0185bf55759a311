"""How many directions, or signals, fit into d dimensions: three counts that are often taken for one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from virtual_weights.errors import UsageError


@final
@dataclass(frozen=True)
class Capacity:
    """Counts for directions of R^d whose cosines stay within eps.

    Attributes:
        published: ``d / eps^2``, which has been stated as an upper bound of the number of directions. It is none.
        log10_random_code: of ``(1 - eps^2)^(-(d - 1)/4)``: so many directions with all ``|cos| < eps`` exist, since of
            N random ones the expected number of closer pairs is at most ``N^2/2 (1 - eps^2)^((d - 1)/2)``, here 1/2.
            For small eps it is about ``exp(eps^2 d / 4)``; there are more, but this many surely.
        active_signals: ``1 + eps^2 d``: so many random-sign signals, active at once along random directions, leave a
            matched filter an error of variance ``(n - 1)/d <= eps^2`` each. This, not the number of directions, is
            linear in d.
        welch: ``d (1 - eps^2) / (1 - d eps^2)`` where ``eps^2 < 1/d``: no more directions than that (the Welch bound
            solved for N). Above, None: it bounds nothing.
    """

    published: float
    log10_random_code: float
    active_signals: float
    welch: float | None


def capacity(d: int, eps: float) -> Capacity:
    """The counts for cosines up to eps in d dimensions.

    Args:
        d: dimension, >= 1.
        eps: largest tolerated ``|cos|``, in (0, 1).

    Raises:
        UsageError: d or eps outside these.

    Reference: Welch 1974; the bound on ``P(|cos| >= eps)`` is proved in docs/statements/T5.md.

    Example:
        >>> capacity(100, 0.5).published
        400.0
    """
    if d < 1 or not 0.0 < eps < 1.0:
        raise UsageError(f"d={d}, eps={eps}", expected="d >= 1 and eps in (0, 1)", do="pass for example eps=0.1")
    square = eps**2
    return Capacity(
        published=d / square,
        log10_random_code=-(d - 1) / 4 * math.log10(1 - square),
        active_signals=1 + square * d,
        welch=d * (1 - square) / (1 - d * square) if d * square < 1 else None,
    )
