"""The only epsilons of the package, and the dtype in which sums and decompositions are taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch

accumulate = torch.float64
"""Decompositions and long sums are taken in float64: cores are at most a few hundred wide, so the cost is small, and
what a figure says never depends on the rounding of the storage dtype."""

converted = 64 * 2**20
"""Bytes of rows converted to float64 at once: a vocabulary never is as a whole."""

same_direction = torch.finfo(accumulate).eps ** 0.5
"""Angle in radians below which two directions count as one: there ``cos`` differs from 1 by less than eps. Bases from
separate decompositions of one space differ by many eps, so a cut at eps itself would tell equals apart."""


def tolerance(dtype: torch.dtype, shape: Sequence[int]) -> float:
    """Relative cut below which a singular value is rounding: ``eps(dtype) * max(shape)``.

    Args:
        dtype: the dtype in which the decomposition was **computed** (not stored: stored entries are taken as exact,
            and eps(bfloat16) * 4096 would cut everything).
        shape: shape of the map.

    Returns:
        The cut relative to the largest singular value, dimensionless, > 0.

    Reference: Golub and Van Loan, *Matrix Computations*, section 5.4; the rule of LAPACK-based rank functions.

    Example:
        >>> tolerance(torch.float64, (4, 8)) == 8 * 2.0**-52
        True
    """
    # backward error of an SVD is a modest multiple of eps times S_1, growing no faster than the larger side
    return torch.finfo(dtype).eps * max((1, *shape))
