"""What to erase from the stream: the best policy at every price of interference, and where the model's own stands."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch

from virtual_weights.errors import UsageError
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.fate.written_units import WrittenUnits, written_units
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Question, cost

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
STAMP = {
    "utility": "first-order change of the sequence's summed next-token loss when replaced by the mean over tokens",
    "interference": "energy on reading groups except the intended one, each over the mean energy it receives",
    "intended": "the reading group of largest mean share",
    "model": "clamp(-<x_final - x_q, y> / |y|^2, 0, 1), x_q the state in which y first appears",
}
_PRICES = (
    ("lambda", "nats for a reader's whole input", "the price itself"),
    ("optimal", "nats, mean over units", "value of m = 1 iff U < price I"),
    ("model", "nats, mean over units", "value of what the model erases"),
    ("shuffled", "nats, mean over units", "expected value of the model's m dealt out to units at random"),
    ("keep_all", "nats, mean over units", "value of m = 0"),
    ("erase_all", "nats, mean over units", "value of m = 1"),
    ("erased_by_optimal", "share of units", "mean m of the optimum"),
    ("erased_by_model", "share", "mean m of the model"),
    ("agreement", "share of units", "(m of the model > 1/2) = optimum"),
    ("chance", "share of units", "agreement of independent policies that erase as often"),
)


class _OnUnits(Question[Run]):
    """Two questions about the units of the same run, which one pass over it answers."""

    sequences: int | None
    batch: int

    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Run the model, once forward and back.

        Args:
            run: the model, with the norm's gain in its readers. Some 500 tokens: all that flows is in memory at once.
            progress: called with (steps done, steps).

        Raises:
            UsageError: readers without gain, no token whose prediction counts, or no unit both helps and disturbs.
        """
        return next(record for _, record in self.together([self], run, progress))

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Any, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        """Answer several of them; those about as many sequences from one pass."""
        by_sequences: dict[int | None, list[_OnUnits]] = {}
        for question in questions:
            assert isinstance(question, _OnUnits)
            by_sequences.setdefault(question.sequences, []).append(question)
        for sequences, several in by_sequences.items():
            units = written_units(subject, sequences, min(question.batch for question in several), progress)
            for question in several:
                yield question, question._record(subject, units)

    def _record(self, run: Run, units: WrittenUnits) -> Record:
        tokens, prices = run.sequences(self.sequences), _prices(units)
        stamp = {
            "tokens": tokens.numel(),
            "sequences": len(tokens),
            "length": tokens.shape[1],
            "units": int((~units.utility.isnan()).sum()),
            "median_price": prices["50%"],
        }
        axis, columns = self._table(units, prices)
        return run.record(self, [axis], columns, **stamp, **STAMP)

    @abstractmethod
    def _table(self, units: WrittenUnits, prices: dict[str, float]) -> tuple[Axis, list[Column]]: ...


@final
@dataclass(frozen=True)
class Frontier(_OnUnits):
    """The policy that maximises ``E[(1 - m)(U - price I)]`` at each price, beside what the model does.

    A unit is what one writer wrote at one token; U, I and the model's own m are the estimators of ``WrittenUnits``,
    named in the stamp. What stays is worth U and costs price times I, what is erased neither, so that the best policy
    is the threshold ``m = 1 iff U < price I``. A record over ``price``; values are nats, mean over units.

    Attributes:
        prices: nats for one reader's whole input, at least 0; None takes 0 and quantiles of U/I where both are
            positive, at which so much of what helps is no longer worth its disturbance.
        sequences: how many of the run's whole chunks are used; None uses all.
        batch: sequences in one backward pass.

    Raises:
        UsageError: prices below 0, or the same twice, or none.
    """

    question: ClassVar[str] = "frontier"
    prices: tuple[float, ...] | None = None
    sequences: int | None = None
    batch: int = cost(2)

    def __post_init__(self) -> None:
        prices = self.prices
        if prices is None:
            return
        if not prices or len(set(prices)) < len(prices) or not all(0 <= price < math.inf for price in prices):
            raise UsageError(
                f"prices {list(prices)}", expected="different numbers >= 0", do="correct them, or leave them out"
            )

    def _table(self, units: WrittenUnits, prices: dict[str, float]) -> tuple[Axis, list[Column]]:
        prices = {"0": 0.0, **prices} if self.prices is None else {repr(float(p)): float(p) for p in self.prices}
        values = torch.tensor([_policies(units, price) for price in prices.values()], dtype=torch.float64).T
        columns = [Column(name, v, unit, text) for (name, unit, text), v in zip(_PRICES, values, strict=True)]
        return Axis("price", tuple(prices)), columns


@final
@dataclass(frozen=True)
class ErasurePolicy(_OnUnits):
    """What the best policy of ``Frontier`` at the median of U/I, and the model, erase of every writer's output.

    A record over ``writer``, means over its tokens.

    Attributes:
        sequences: how many of the run's whole chunks are used; None uses all.
        batch: sequences in one backward pass.
    """

    question: ClassVar[str] = "policy"
    sequences: int | None = None
    batch: int = cost(2)

    def _table(self, units: WrittenUnits, prices: dict[str, float]) -> tuple[Axis, list[Column]]:
        optimum = units.optimum(prices["50%"]).masked_fill(units.utility.isnan(), torch.nan)
        utility, interference, by_optimum, by_model = (
            values.double().nanmean(1) for values in (units.utility, units.interference, optimum, units.erased)
        )
        return Axis("writer", units.writers), [
            Column("utility", utility, "nats", "mean U over its tokens"),
            Column("interference", interference, "readers' inputs", "mean I over its tokens"),
            Column("intended", units.intended, "", "the reading group of largest mean share"),
            Column("erased_by_optimal", by_optimum, "share of tokens", "U < median price * I"),
            Column("erased_by_model", by_model, "share", "mean m of the model"),
            Column("excess", by_model - by_optimum, "share", "what the model erases beyond the policy; below 0 less"),
        ]


def _prices(units: WrittenUnits) -> dict[str, float]:
    """Quantiles of U/I over the units that both help and disturb."""
    both = (units.utility > 0) & (units.interference > 0)
    if not both.any():
        raise UsageError(
            "no unit both helps and interferes", expected="a text on which some do", do="pass other tokens"
        )
    ratios = (units.utility[both].double() / units.interference[both].double()).sort().values
    return {f"{q:.0%}": float(ratios[round(q * (len(ratios) - 1))]) for q in QUANTILES}


def _policies(units: WrittenUnits, price: float) -> tuple[float, ...]:
    """The figures of ``_PRICES`` at one price."""
    mask = ~units.utility.isnan()
    erases, optimum = units.erased[mask] > 0.5, units.optimum(price)
    share, often = float(units.erased[mask].double().mean()), float(erases.double().mean())
    by_optimum = float(optimum[mask].double().mean())
    keep_all = units.value(torch.zeros_like(optimum), price)
    values = units.value(optimum, price), units.value(units.erased, price), (1 - share) * keep_all, keep_all, 0.0
    agreement = float((erases == (optimum[mask] > 0.5)).double().mean())
    chance = by_optimum * often + (1 - by_optimum) * (1 - often)
    return price, *values, by_optimum, share, agreement, chance
