"""Agreement: how well one measure of edges predicts another, reader by reader and over all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from virtual_weights.analysis.aligned import aligned
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.record import Record


@final
@dataclass(frozen=True)
class Agreement:
    """How far to trust a predictor of edges.

    Attributes:
        per_reader: mean over readers of Spearman's rank correlation over the writers that reach them, in [-1, 1]; of
            readers with at least three writers and no constant measure. None where there is no such reader.
        readers: how many these are.
        overall: Spearman's rank correlation over all edges; None where a measure is constant.
        edges: how many edges have both measures.
        precision: share of the predictor's top edges that are among the target's top ones, in [0, 1]; at random
            ``top / edges``.
        top: how many count as top.
    """

    per_reader: float | None
    readers: int
    overall: float | None
    edges: int
    precision: float
    top: int


def agreement(predictor: Record, target: Record, column: str, of: str, top: int = 20) -> Agreement:
    """Compare a column of one record over (reader, writer) with a column of another.

    Edges are matched by label, with or without the port; a reader that the predictor does not name is taken as the one
    that shares its channel.

    Args:
        predictor: what predicts.
        target: what is predicted; its readers and writers are compared.
        column: of the predictor.
        of: column of the target.
        top: how many edges count as top; fewer where there are fewer.

    Raises:
        UsageError: the records have no edge in common.
    """
    truth = target.numbers(of)
    guess = aligned(predictor, target, column)
    both = ~(truth.isnan() | guess.isnan())
    if not bool(both.any()):
        raise UsageError(
            f"{predictor.question} and {target.question} have no edge in common",
            expected="records of one model and port",
            do="compare records over the same readers and writers",
        )
    rows = [rank_correlation(g[b], t[b]) for g, t, b in zip(guess, truth, both, strict=True) if int(b.sum()) > 2]
    told = [r for r in rows if r is not None]
    g, t = guess[both], truth[both]
    k = min(top, len(t))
    first = (set(x.argsort(descending=True, stable=True)[:k].tolist()) for x in (g, t))
    return Agreement(
        sum(told) / len(told) if told else None,
        len(told),
        rank_correlation(g, t),
        len(t),
        len(set.intersection(*first)) / k,
        k,
    )


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank; None where one is constant."""
    x, y = (r - r.mean() for r in map(_ranks, (a, b)))
    size = x.norm() * y.norm()
    return float(x @ y / size) if size > 0 else None


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).to(accumulate)
    return (last - (count - 1) / 2)[place]
