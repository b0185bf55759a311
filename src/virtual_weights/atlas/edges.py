"""Edges: who writes to whom, asked of the stored pairs without loading a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from virtual_weights.atlas.atlas import Atlas
from virtual_weights.atlas.stored import PAIR, Header
from virtual_weights.errors import RecordError, UsageError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT", "UTINYINT")
_ROW = "file_row_number"


def edges(  # noqa: PLR0913 - which edges, by keyword only
    atlas: Atlas,
    reader: str | None = None,
    writer: str | None = None,
    *,
    question: str = "composition",
    by: str | None = None,
    top: int = 20,
    moments: str | None = None,
) -> list[dict[str, Any]]:
    """The strongest stored edges of a reader, a writer, or all.

    Args:
        atlas: the atlas.
        reader: a label, with its port or without (``"L18H6.K"``, ``"L18H6"``); None for all.
        writer: a label; None for all.
        question: name of a question whose records are over (reader, writer), or tables with these two columns.
        by: the numeric column to order by, largest first; None takes the first of the question's columns.
        top: how many at most.
        moments: of ``"delivered"``, only what was computed from the moments of this identity.

    Returns:
        One dictionary per edge: ``key`` of its record, question, port, reader and writer (with
        ``reader_channel``, ``writer_channel`` where several names are one channel) and the question's
        numeric columns. Where the atlas holds labels of heads, ``writer_label`` and ``reader_label``: what each
        end does, None for what is no head or does none of it. Equal values of one record stay in its order; a
        pair that cannot reach is not there.

    Raises:
        UsageError: no such label or column, nothing stored for the question, or ``top`` below 1.
        RecordError: a table of pairs cannot be read.
    """
    if top < 1:
        raise UsageError(f"top={top}", expected="1 or more", do="pass how many edges to list")
    pairs = _pairs(atlas, question, moments)
    named = {side: label for side, label in (("reader", reader), ("writer", writer)) if label is not None}
    asked = {side: _End(label, *label.rpartition(".")[::2]) for side, label in named.items()}
    first = next(iter(pairs.values())).columns
    by = by or next(column.name for column in first if column.kind.startswith("torch"))
    tables = [str(atlas.edge_table(key)) for key in pairs]
    told = atlas.keys("labels")[-1:]
    import duckdb  # here, since importing the package is cheap by promise

    try:
        with duckdb.connect() as database:
            found = _strongest(database, tables, asked, by, top)
            for side, end in ({} if found else asked).items():
                _check_known(database, tables, pairs.values(), side, end)
            return _labelled(database, str(atlas.table(told[0])), found) if told else found
    except duckdb.Error as error:
        raise RecordError(
            f"a table of pairs or of labels in {atlas.path} cannot be read: {error}",
            expected="Parquet files as this package writes them",
            do="remove the record's folder and run the question again",
        ) from error


def _pairs(atlas: Atlas, question: str, moments: str | None) -> dict[str, Header]:
    """The stored records of a question over pairs, by key."""
    keys = atlas.keys(question) if moments is None else atlas.keys(question, moments=moments)
    pairs = {key: header for key in keys if (header := atlas.header(key)).is_pairs}
    if not pairs:
        stored = atlas.keys()
        raise UsageError(
            f"this atlas has no edges of {question!r}" + (f" from moments {moments[:12]}..." if moments else ""),
            expected=f"one of {sorted({atlas.header(key).question for key in stored})}",
            do="compute it first, for example with vweights map",
        )
    return pairs


@dataclass(frozen=True)
class _End:
    """A label to look for: as it stands, or with its last part as the port."""

    label: str
    stem: str
    port: str


def _check_known(
    database: DuckDBPyConnection, tables: list[str], headers: Iterable[Header], side: str, end: _End
) -> None:
    """Nothing was found: refuse a label that stands nowhere, rather than pass a slip of the pen for silence."""
    from duckdb import ColumnExpression as Col
    from duckdb import ConstantExpression as Const

    known = {name for header in headers for axis in header.axes if axis.name == side for name in axis.labels}
    if end.label in known or end.stem in known:
        return
    pairs = database.read_parquet(tables, union_by_name=True)
    if pairs.filter((Col(side) == Const(end.label)) | (Col(side) == Const(end.stem))).limit(1).fetchall():
        return
    raise UsageError(
        f"no {side} {end.label!r} in this atlas",
        expected=f"a label that it has, such as {', '.join(sorted(known)[:4])}, with a port or without",
        do="correct the label",
    )


def _strongest(
    database: DuckDBPyConnection, tables: list[str], asked: Mapping[str, _End], by: str, top: int
) -> list[dict[str, Any]]:
    """The query as expressions: what the user says is a value in it, never text of it."""
    from duckdb import ColumnExpression as Col
    from duckdb import ConstantExpression as Const

    pairs = database.read_parquet(tables, union_by_name=True, file_row_number=True)
    numeric = [n for n, t in zip(pairs.columns, pairs.types, strict=True) if str(t) in _NUMBERS and n != _ROW]
    if by not in numeric:
        raise UsageError(f"edges have no number {by!r}", expected=f"one of {numeric}", do="name one of these with by=")
    found = pairs.filter(Col(by).isnotnull())
    for side, end in asked.items():
        with_port = (Col(side) == Const(end.stem)) & (Col("port") == Const(end.port))
        found = found.filter((Col(side) == Const(end.label)) | with_port)
    ranked = found.sort(Col(by).desc(), Col("key"), Col(_ROW)).limit(top)
    return [_plain(dict(zip(ranked.columns, row, strict=True))) for row in ranked.fetchall()]


def _labelled(database: DuckDBPyConnection, table: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what both ends do, by the labels of the heads that they name."""
    from duckdb import ColumnExpression as Col
    from duckdb import ConstantExpression as Const

    heads = {row[side].partition(".")[0] for row in rows for side in PAIR}  # L18H6 of L18H6.K
    if not heads:
        return rows
    named = database.read_parquet(table).filter(Col("head").isin(*map(Const, sorted(heads))))
    labels = dict(named.select(Col("head"), Col("label")).fetchall())
    return [row | {f"{side}_label": labels.get(row[side].partition(".")[0]) for side in PAIR} for row in rows]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can say it, without the columns that say nothing about it."""
    silent = {name for name, value in row.items() if name == _ROW or (name.endswith("_channel") and value is None)}
    finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    return {name: value for name, value in finite.items() if name not in silent}
