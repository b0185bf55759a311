"""Interference: how the disturbance between superposed signals grows with their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.crowding.directions import DirectionKind, check_kind, directions
from virtual_weights.errors import UsageError
from virtual_weights.linalg import ZERO, accumulate, random_generator
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream

FEWEST = 8
"""Fewest signals: for fewer, n(n - 1) is visibly different from a power of n."""
_BOOTSTRAP = 400


@final
@dataclass(frozen=True)
class Interference(Question[Stream]):
    """n directions of the model, each carrying a random sign at once: what a matched filter gets wrong.

    With unit directions ``u_i`` and signs ``s_i``, ``x = sum_i s_i u_i`` and the estimate ``u_i . x``:

    - ``total``: ``sum_(i < j) <u_i, u_j>^2``, over ``n (n - 1)/2`` pairs: grows as n^2;
    - ``error``: mean over i of ``(u_i . x - s_i)^2 = sum_(j != i) <u_i, u_j>^2`` in expectation: grows as n.

    For random directions ``total = n (n - 1)/(2 d)`` and ``error = (n - 1)/d``. ``exponents`` fits both powers, and
    the same to these: n - 1 is not a power of n, and counts from 8 to 1024 give 2.023 and 1.023 instead of 2 and 1.

    Invariant under scaling of a direction and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        kind: which directions, see ``directions``.
        most: largest number of signals; numbers double from 8.
        trials: seeded choices of directions and signs.
        seed: of these.
    """

    question: ClassVar[str] = "interference"
    kind: DirectionKind = "out"
    most: int = 1024
    trials: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.most < 4 * FEWEST or self.trials < 2:
            raise UsageError(
                f"most={self.most}, trials={self.trials}",
                expected=f"at least {4 * FEWEST} signals and 2 trials",
                do="pass for example most=1024, trials=16",
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Superpose more and more signals.

        Returns:
            A Record over ``n`` with ``total`` and ``error``, means over trials, and ``random_total`` and
            ``random_error``, the same expected of random directions. ``stamp["exponents"]`` has for both the power
            ``exponent``, its 95 % interval ``low``, ``high`` and what ``random`` directions give; None where nothing
            interferes.

        Raises:
            UsageError: the model has fewer than 32 directions of this kind.
        """
        _, unit = directions(stream, self.kind)
        counts = [n for n in (FEWEST * 2**i for i in range(32)) if n <= min(self.most, len(unit))]
        if len(counts) < 3:
            raise UsageError(
                f"{len(unit)} directions of kind {self.kind!r}",
                expected=f"at least {4 * FEWEST}",
                do="choose another kind",
            )
        generator = random_generator(self.seed)
        sums = torch.zeros(self.trials, 2, len(counts), dtype=accumulate)
        for trial in range(self.trials):
            indices = torch.randperm(len(unit), generator=generator)[: counts[-1]]
            signs = torch.randint(2, (counts[-1],), generator=generator).to(accumulate) * 2 - 1
            sums[trial] = _total_and_error(unit[indices].to(accumulate), signs, counts)
            progress(trial + 1, self.trials)
        n, d = torch.tensor(counts, dtype=accumulate), stream.d_model
        total, error = sums.mean(0)
        return stream.record(
            self,
            (Axis("n", tuple(map(str, counts))),),
            (
                Column("total", total, "1", "sum over pairs of squared cosines"),
                Column("error", error, "1", "mean squared error of one signal by matched filter"),
                Column("random_total", n * (n - 1) / (2 * d), "1", "the same expected of random directions"),
                Column("random_error", (n - 1) / d, "1", "the same expected of random directions"),
            ),
            exponents=_exponents(sums, counts, generator),
        )


def _total_and_error(unit: Tensor, signs: Tensor, counts: list[int]) -> Tensor:
    """Total and error of the first n directions, for every n: (2, counts)."""
    gram = unit @ unit.T
    squares = gram.square()
    rows = list[Tensor]()
    for n in counts:
        total = (squares[:n, :n].sum() - squares.diagonal()[:n].sum()) / 2
        error = ((gram[:n, :n] @ signs[:n] - gram.diagonal()[:n] * signs[:n]).square()).mean()
        rows.append(torch.stack([total.clamp_min(0), error]))
    return torch.stack(rows, 1)


def _exponents(sums: Tensor, counts: list[int], generator: torch.Generator) -> dict[str, Any]:
    """Least-squares slopes of both quantities in log-log, with 95 % intervals by bootstrap over trials."""
    n = torch.tensor(counts, dtype=accumulate)
    chance = ((n * (n - 1)).log(), (n - 1).log())
    n = n.log() - n.log().mean()
    exponents: dict[str, Any] = {}
    for name, trials, random in zip(("total", "error"), sums.unbind(1), chance, strict=True):
        draws = torch.randint(len(trials), (_BOOTSTRAP, len(trials)), generator=generator)
        means = torch.cat([trials.mean(0, keepdim=True), trials[draws].mean(1)])
        if bool((means < ZERO).any()):
            exponents[name] = None  # without interference there is no power
            continue
        slopes = (means.log() @ n) / n.square().sum()
        low, high = slopes[1:].quantile(torch.tensor([0.025, 0.975], dtype=accumulate)).tolist()
        expected = float(random @ n / n.square().sum())
        exponents[name] = {"exponent": float(slopes[0]), "low": low, "high": high, "random": expected}
    return exponents
