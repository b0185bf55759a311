"""One record's column over the readers and writers of another, matched by label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.record import Record


def beside(record: Record, other: Record, columns: Iterable[str]) -> Record:
    """A record over (reader, writer) with columns of another after its own, and the other's stamp under its question.

    Args:
        record: keeps its axes; a pair that the other lacks is absent in the new columns.
        other: of the same model and port.
        columns: of the other.
    """
    found = tuple(replace(other.column(name), values=aligned(other, record, name)) for name in columns)
    stamp = {**record.stamp, other.question: {**other.parameters, **other.stamp}}
    return replace(record, columns=(*record.columns, *found), stamp=stamp)


def aligned(record: Record, like: Record, column: str) -> Tensor:
    """A column over the readers and writers of ``like``, float64, NaN where the record has none.

    Edges are matched by label, with or without the port; a reader that the record does not name is taken as the one
    that shares its channel.
    """
    readers, writers = record.axis("reader"), record.axis("writer")
    port = f".{record.parameters.get('port')}"  # subspaces are named with their port, L5H3.K
    named = {label.removesuffix(port): i for i, label in enumerate(readers.labels)}
    shared = {channel: i for i, channel in reversed(list(enumerate(readers.channels))) if channel}
    wanted = like.axis("reader")
    channels = wanted.channels or ("",) * len(wanted.labels)
    stems = [label.removesuffix(port) for label in wanted.labels]
    rows = [named.get(stem, shared.get(c, -1)) for stem, c in zip(stems, channels, strict=True)]
    places = {label: i for i, label in enumerate(writers.labels)}
    columns = [places.get(label, -1) for label in like.axis("writer").labels]
    # the last row and column stand for what is not there
    padded = torch.nn.functional.pad(record.numbers(column), (0, 1, 0, 1), value=float("nan"))
    return padded[rows][:, columns]


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
