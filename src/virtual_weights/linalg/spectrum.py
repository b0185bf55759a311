"""How many directions a map really has: five ways of counting singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg.numerics import accumulate, tolerance


@final
@dataclass(frozen=True, eq=False)
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
