"""What to erase from the stream: the best policy at every price of interference, and where the model's own stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.units import Units, units
from virtual_weights.stream import Stream

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
STAMP = {
    "utility": "first-order change of the sequence's summed next-token loss when replaced by the mean over tokens",
    "interference": "energy on reading blocks but for the intended one, each over the mean energy it receives",
    "intended": "the reading block of largest mean share",
    "model": "clamp(-<x_final - x_q, y> / |y|^2, 0, 1), x_q the state in which y first appears",
}


@final
@dataclass(frozen=True, eq=False)
class Frontier:
    """Two Records of the same units.

    Attributes:
        frontier: over ``price``; values are nats, mean over units.
        policy: over ``writer``; means over its tokens.
    """

    frontier: Record
    policy: Record


def optimum(found: Units, price: float) -> Tensor:
    """``m = 1 iff U < price I``, (writers, tokens): what maximises ``value``, unit by unit."""
    return (found.utility < price * found.interference).to(found.utility)


def value(found: Units, policy: Tensor, price: float) -> float:
    """``E[(1 - m)(U - price I)]``, nats, mean over units, for a policy m (writers, tokens) in 0 .. 1; 1 erases."""
    return float(((1 - policy) * (found.utility - price * found.interference)).double().nanmean())


def frontier(
    stream: Stream,
    tokens: Tensor,
    model: nn.Module | None = None,
    *,
    batch: int = 2,
    prices: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """The policy that maximises ``E[(1 - m)(U - price I)]`` at each price, beside what the model does.

    A unit is what one writer wrote at one token; U, I and the model's own m are the estimators of ``Units``, named in
    the stamp. What is kept is worth U and costs price times I, what is erased neither, so that the best policy is the
    threshold ``m = 1 iff U < price I``.

    Args:
        stream: the model, with the norm's gain in its readers.
        tokens: (sequences, tokens) ids; nothing is padded. Some 500 tokens: all that flows is held at once.
        model: what runs; loaded in float32 where None.
        batch: sequences in one backward pass.
        prices: nats for one reader's whole input, at least 0; None takes 0 and quantiles of U/I where both are
            positive, at which so much of what helps is no longer worth its disturbance.
        progress: called with (steps done, steps).

    Returns:
        The frontier over prices, and per writer what the policy does at the median of U/I and what the model does.

    Raises:
        UsageError: readers without gain, tokens of another shape, prices below 0, or no unit both helps and
            disturbs.
    """
    if prices is not None and (
        not prices or len(set(prices)) < len(prices) or not all(0 <= p < math.inf for p in prices)
    ):
        raise UsageError(f"prices {list(prices)}", expected="different numbers >= 0", do="pass such, or none")
    found = units(stream, tokens, model, batch, progress)
    both = (found.utility > 0) & (found.interference > 0)
    if not both.any():
        raise UsageError("no unit helps and disturbs", expected="text on which some do", do="pass other tokens")
    ratios = (found.utility[both].double() / found.interference[both].double()).sort().values
    at = {f"{q:.0%}": float(ratios[round(q * (len(ratios) - 1))]) for q in QUANTILES}
    listed = {"0": 0.0, **at} if prices is None else {repr(float(p)): float(p) for p in prices}
    parameters = {
        "sequences": len(tokens),
        "length": tokens.shape[1],
        "units": int((~found.utility.isnan()).sum()),
        "median_price": at["50%"],
    }
    stamp = {"norm": stream.norm_stamp, "tokens": tokens.numel(), **STAMP}
    shared: dict[str, Any] = {"parameters": parameters, "stamp": stamp, "provenance": stream.provenance}
    return Frontier(_over_prices(found, listed, shared), _over_writers(found, at["50%"], shared))


def _over_prices(found: Units, prices: dict[str, float], shared: dict[str, Any]) -> Record:
    there = ~found.utility.isnan()
    own, keep = found.erased, torch.zeros_like(found.erased)
    share = float(own.double().nanmean())
    often = float((own > 0.5)[there].double().mean())
    rows: list[tuple[float, ...]] = []
    for price in prices.values():
        best = optimum(found, price)
        kept = value(found, keep, price)
        erased = float(best[there].double().mean())
        same = float(((own > 0.5) == (best > 0.5))[there].double().mean())
        chance = erased * often + (1 - erased) * (1 - often)
        values = value(found, best, price), value(found, own, price), (1 - share) * kept, kept, 0.0
        rows.append((price, *values, erased, share, same, chance))
    nats = "nats, mean over units"
    said = (
        ("lambda", "nats for a reader's whole input", "the price itself"),
        ("optimal", nats, "value of m = 1 iff U < price I"),
        ("model", nats, "value of what the model erases"),
        ("shuffled", nats, "expected value of the model's m dealt out to units at random"),
        ("keep_all", nats, "value of m = 0"),
        ("erase_all", nats, "value of m = 1"),
        ("erased_by_optimal", "share of units", "mean m of the optimum"),
        ("erased_by_model", "share", "mean m of the model"),
        ("agreement", "share of units", "(m of the model > 1/2) = optimum"),
        ("chance", "share of units", "agreement of independent policies that erase as often"),
    )
    values = torch.tensor(rows, dtype=torch.float64).T
    columns = tuple(Column(name, v, unit, text) for (name, unit, text), v in zip(said, values, strict=True))
    return Record("frontier", (Axis("price", tuple(prices)),), columns, **shared)


def _over_writers(found: Units, price: float, shared: dict[str, Any]) -> Record:
    best = optimum(found, price).masked_fill(found.utility.isnan(), torch.nan)
    utility, interference, by_best, by_model = (
        x.double().nanmean(1) for x in (found.utility, found.interference, best, found.erased)
    )
    columns = (
        Column("utility", utility, "nats", "mean U over its tokens"),
        Column("interference", interference, "readers' inputs", "mean I over its tokens"),
        Column("intended", found.intended, "", "the reading block of largest mean share"),
        Column("erased_by_optimal", by_best, "share of tokens", "U < median price * I"),
        Column("erased_by_model", by_model, "share", "mean m of the model"),
        Column("excess", by_model - by_best, "share", "what the model erases beyond the policy; below 0 less"),
    )
    return Record("policy", (Axis("writer", found.writers),), columns, **shared)
