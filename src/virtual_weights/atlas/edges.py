"""Edges: who writes to whom, asked of the stored pairs without loading a matrix."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from virtual_weights.atlas.atlas import Atlas
from virtual_weights.atlas.stored import EDGES, PAIR, TABLE, Header, checked_table
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.stream import parse
from virtual_weights.stream.group import READINGS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT", "UTINYINT")
_ROW = "file_row_number"
_TIMES = "times"  # how often an edge has come so far
_SLICES = ("port", "reader", "writer", "edges")  # parameters that say which pairs a record is about


def edges(  # noqa: PLR0913 - which edges, by keyword only
    atlas: Atlas,
    reader: str | None = None,
    writer: str | None = None,
    *,
    question: str = "composition",
    by: str | None = None,
    top: int = 20,
    where: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The strongest stored edges of a reader, a writer, or all.

    Args:
        atlas: the atlas.
        reader: a label, with its port or without (``"L18H6.K"``, ``"L18H6"`` or ``"18.6"``); None for all.
        writer: a label; None for all.
        question: name of a question whose records are over (reader, writer), or tables with these two columns.
        by: the numeric column to order by, largest first; None takes the first of the question's columns.
        top: how many at most.
        where: parameters of the records to ask, by name, such as ``{"rotary_offset": 2, "norm": "left out"}`` or
            ``{"port": "K"}``; needed where the atlas holds answers to the question under several conventions.

    Returns:
        One dictionary per edge: ``key`` of its record, question, port, reader and writer (with
        ``reader_group``, ``writer_group`` where several names are one group) and the question's
        numeric columns. Where the atlas holds labels of heads, ``writer_label`` and ``reader_label``: what each
        end does, None for what is no head or does none of it. Equal values of one record stay in its order; a
        pair that cannot reach is not there.

    Raises:
        UsageError: no such label or column, nothing stored for the question, answers under several conventions of
            which none was chosen, or ``top`` below 1.
        RecordError: a table of pairs cannot be read, or was changed since it was stored.
    """
    if top < 1:
        raise UsageError(f"top={top}", expected="1 or more", do="pass for example top=20")
    pairs = _pairs(atlas, question, where or {})
    named = {side: _label(name) for side, name in (("reader", reader), ("writer", writer)) if name is not None}
    ends = {side: [label, *(f"{label}.{port}" for port in READINGS)] for side, label in named.items()}
    first = next(iter(pairs.values())).columns
    by = by or next(column.name for column in first if column.kind.startswith("torch"))
    tables = [checked_table(atlas.edge_table(key).parent, header, EDGES) for key, header in pairs.items()]
    labels = [checked_table(atlas.table(k).parent, atlas.header(k), TABLE) for k in atlas.keys("labels")[-1:]]
    import duckdb  # here, since importing the package is cheap by promise

    try:
        with duckdb.connect() as database:
            rows = _strongest(database, tables, ends, by, top)
            for side, end in ({} if rows else ends).items():
                _check_known(database, tables, pairs.values(), side, end)
            return _labelled(database, labels[0], rows) if labels else rows
    except duckdb.Error as error:
        raise RecordError(
            f"a table of pairs or of labels in {atlas.path} cannot be read: {error}",
            expected="Parquet files as this package writes them",
            do="remove the record's folder and run the question again",
        ) from error


def _label(name: str) -> str:
    """The label that a name is short for, such as ``L5H3`` for ``5.3``; what is not of the grammar is its own label."""
    try:
        return str(parse(name))
    except UsageError:
        return name


def conventions(header: Header) -> dict[str, Any]:
    """What a record of pairs was computed under: its parameters and norm, but for what says which pairs it is about."""
    chosen = {name: value for name, value in header.parameters.items() if name not in _SLICES}
    return {**chosen, **{name: header.stamp[name] for name in ("norm", "run") if name in header.stamp}}


def _pairs(atlas: Atlas, question: str, where: Mapping[str, Any]) -> dict[str, Header]:
    """The stored records of a question over pairs, by key, all under one convention."""
    headers = {key: header for key in atlas.keys(question) if (header := atlas.header(key)).is_pairs}
    pairs = {key: header for key, header in headers.items() if where.items() <= _parameters(header).items()}
    if not pairs:
        raise _no_pairs(atlas, question, headers.values(), where)
    options = _options(pairs.values())
    if options:
        raise UsageError(
            f"this atlas has edges of {question!r} under several conventions",
            expected=f"one of them: {'; '.join(options)}",
            do="choose with where={...} in Python, or --where NAME=VALUE",
        )
    return pairs


def _parameters(header: Header) -> dict[str, Any]:
    """What a record of pairs can be chosen by: its conventions, and which pairs it is about."""
    return {**header.parameters, **conventions(header)}


def _no_pairs(atlas: Atlas, question: str, headers: Collection[Header], where: Mapping[str, Any]) -> UsageError:
    """What is said where nothing stored fits: the questions, the names or the values that there are."""
    if not headers:
        stored = {header.question for header in map(atlas.header, atlas.keys()) if header.is_pairs}
        expected = f"one of {', '.join(sorted(stored))}" if stored else "an atlas that has answers over pairs"
        do = "choose among these, or compute it first, for example with vweights map"
        return UsageError(f"this atlas has no edges of {question!r}", expected=expected, do=do)
    values = _values(map(_parameters, headers))
    unknown = [name for name in where if name not in values]
    if unknown:
        what = f"edges of {question!r} have no parameter {unknown[0]!r}"
        return UsageError(what, expected=f"one of {', '.join(sorted(values))}", do="choose by one of these")
    chosen = ", ".join(f"{name}={value}" for name, value in where.items())
    expected = "; ".join(" or ".join(values[name]) for name in where)
    return UsageError(
        f"this atlas has no edges of {question!r} with {chosen}", expected=expected, do="choose among these"
    )


def _options(headers: Iterable[Header]) -> list[str]:
    """The conventions in which records differ, each with the values that it has."""
    return [", ".join(choices) for choices in _values(map(conventions, headers)).values() if len(choices) > 1]


def _values(parameters: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Every parameter with the values that it has, each as ``NAME=VALUE``."""
    values: dict[str, list[str]] = {}
    for name, value in (item for named in parameters for item in named.items()):
        choice = f"{name}={'none' if value is None else value}"
        if choice not in values.setdefault(name, []):
            values[name].append(choice)
    return values


def _check_known(
    database: DuckDBPyConnection, tables: list[str], headers: Iterable[Header], side: str, labels: Sequence[str]
) -> None:
    """Nothing was found: refuse a label that stands nowhere, rather than pass a slip of the pen for silence."""
    from duckdb import ColumnExpression as Col
    from duckdb import ConstantExpression as Const

    known = {name for header in headers for axis in header.axes if axis.name == side for name in axis.labels}
    if known.intersection(labels):
        return
    pairs = database.read_parquet(tables, union_by_name=True, hive_partitioning=False)
    if pairs.filter(Col(side).isin(*map(Const, labels))).limit(1).fetchall():
        return
    raise UsageError(
        f"no {side} {labels[0]!r} in this atlas",
        expected=f"a label that it has, such as {', '.join(sorted(known)[:4])}, with a port or without",
        do="correct the label",
    )


def _strongest(
    database: DuckDBPyConnection, tables: list[str], ends: Mapping[str, Sequence[str]], by: str, top: int
) -> list[dict[str, Any]]:
    """The query as expressions: what the user says is a value in it, never text of it."""
    from duckdb import ColumnExpression as Col
    from duckdb import ConstantExpression as Const
    from duckdb import SQLExpression, StarExpression

    pairs = database.read_parquet(tables, union_by_name=True, file_row_number=True, hive_partitioning=False)
    numeric = [n for n, t in zip(pairs.columns, pairs.types, strict=True) if str(t) in _NUMBERS and n != _ROW]
    if by not in numeric:
        raise UsageError(
            f"edges have no column of numbers {by!r}", expected=f"one of {numeric}", do="sort by one of these"
        )
    present = pairs.filter(Col(by).isnotnull())
    for side, labels in ends.items():
        present = present.filter(Col(side).isin(*map(Const, labels)))
    if "kind" in pairs.columns and "rank" in pairs.columns:  # ablations: an edge once, as asked where it was
        times = "row_number() OVER (PARTITION BY reader, writer ORDER BY kind, key, file_row_number)"
        present = present.select(StarExpression(), SQLExpression(times).alias(_TIMES)).filter(Col(_TIMES) == Const(1))
    ranked = present.sort(Col(by).desc(), Col("key"), Col(_ROW)).limit(top)
    return [_plain(dict(zip(ranked.columns, row, strict=True))) for row in ranked.fetchall()]


def _labelled(database: DuckDBPyConnection, table: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what both ends do, by the labels of the heads that they name."""
    from duckdb import ColumnExpression as Col
    from duckdb import ConstantExpression as Const

    heads = {row[side].partition(".")[0] for row in rows for side in PAIR}  # L18H6 of L18H6.K
    if not heads:
        return rows
    named = database.read_parquet(table, hive_partitioning=False).filter(Col("head").isin(*map(Const, sorted(heads))))
    labels = dict(named.select(Col("head"), Col("label")).fetchall())
    return [row | {f"{side}_label": labels.get(row[side].partition(".")[0]) for side in PAIR} for row in rows]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can say it, without the columns that say nothing about it."""
    silent = {
        name for name, value in row.items() if name in (_ROW, _TIMES) or (name.endswith("_group") and value is None)
    }
    finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    return {name: value for name, value in finite.items() if name not in silent}
