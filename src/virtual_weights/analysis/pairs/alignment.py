"""One record's column over the readers and writers of another, matched by label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import rank_correlation
from virtual_weights.record import Record


def beside(record: Record, other: Record, columns: Iterable[str]) -> Record:
    """A record over (reader, writer) with columns of another after its own, and the other's stamp under its question.

    Args:
        record: keeps its axes; a pair that the other lacks is absent in the new columns.
        other: of the same model and port.
        columns: of the other.
    """
    more = tuple(replace(other.column(name), values=aligned(other, record, name)) for name in columns)
    stamp = {**record.stamp, other.question: {**other.parameters, **other.stamp}}
    return replace(record, columns=(*record.columns, *more), stamp=stamp)


def aligned(record: Record, like: Record, column: str) -> Tensor:
    """A column over the readers and writers of ``like``, float64, NaN where the record has none.

    Edges are matched by label; a reader that the record does not name is taken as the one that shares its key/value
    group.
    """
    readers, writers, target = record.axis("reader"), record.axis("writer"), like.axis("reader")
    by_name = {label: i for i, label in enumerate(readers.labels)}
    by_group = {group: i for i, group in reversed(list(enumerate(readers.groups))) if group}
    groups = target.groups or ("",) * len(target.labels)
    rows = [by_name.get(name, by_group.get(group, -1)) for name, group in zip(target.labels, groups, strict=True)]
    by_writer = {label: i for i, label in enumerate(writers.labels)}
    columns = [by_writer.get(label, -1) for label in like.axis("writer").labels]
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
        overall: Spearman's rank correlation over all edges; None for fewer than three, or a constant measure.
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

    Edges are matched as by :func:`aligned`.

    Args:
        predictor: what predicts.
        target: what is predicted; its readers and writers are compared.
        column: of the predictor.
        of: column of the target.
        top: how many edges count as top; fewer where there are fewer.

    Raises:
        UsageError: the records have no edge in common.
    """
    truth, guess = target.numbers(of), aligned(predictor, target, column)
    common = ~(truth.isnan() | guess.isnan())
    if not bool(common.any()):
        raise UsageError(
            f"{predictor.question} and {target.question} have no edge in common",
            expected="records of one model and port",
            do="compare records over the same readers and writers",
        )
    rows = [value for pair in zip(guess, truth, strict=True) if (value := rank_correlation(*pair)) is not None]
    edges = int(common.sum())
    most = min(top, edges)
    best = [set(x[common].argsort(descending=True, stable=True)[:most].tolist()) for x in (guess, truth)]
    return Agreement(
        per_reader=sum(rows) / len(rows) if rows else None,
        readers=len(rows),
        overall=rank_correlation(guess, truth),
        edges=edges,
        precision=len(set.intersection(*best)) / most,
        top=most,
    )
