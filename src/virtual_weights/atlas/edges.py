"""Edges: who writes to whom, asked of the stored pairs without loading a matrix."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from virtual_weights.atlas.atlas import Atlas
from virtual_weights.atlas.parts import PAIR, ROW, Part, numeric_columns
from virtual_weights.atlas.stored import TABLE, Header, checked_table
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.stream import parse
from virtual_weights.stream.group import READINGS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

_FEW = 64  # parts that are read at once, without a look at the best of them first
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
    with pairs_of(atlas, question, where or {}, {"reader": reader, "writer": writer}) as pairs:
        ranked = pairs.strongest(by, top)
        rows = [] if ranked is None else [dict(zip(ranked.columns, row, strict=True)) for row in ranked.fetchall()]
        if not rows:
            pairs.check_known()
        return [plain(row) for row in pairs.labelled(rows)]


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


def _chosen(atlas: Atlas, question: str, where: Mapping[str, Any]) -> dict[Path, Header]:
    """The stored records of a question over pairs, by folder, all under one convention."""
    headers = dict[Path, Header]()
    for entry in atlas.entries(question):
        header = atlas.header(entry.key) if entry.is_pairs else None
        if header is not None:
            entry.confirm(header)
            headers[atlas.table(entry.key).parent] = header
    pairs = {folder: header for folder, header in headers.items() if where.items() <= _parameters(header).items()}
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
        stored = {entry.question for entry in atlas.entries() if entry.is_pairs}
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


@final
@dataclass(frozen=True)
class Pairs:
    """The stored edges that a query is about. What the user says is a value in an expression, never text of a query.

    Attributes:
        database: what reads them.
        headers: the records, with the folder of each.
        ends: sides, reader and writer, to the labels that are asked for.
        labels: the Parquet file of the newest labels of heads.
    """

    database: DuckDBPyConnection
    headers: Mapping[Path, Header]
    ends: Mapping[str, Sequence[str]]
    labels: str | None

    def strongest(self, by: str | None, top: int) -> DuckDBPyRelation | None:
        """The largest values of a column, the first of the question's columns by default; None where nothing fits.

        Only parts are opened whose largest value may be among them.

        Raises:
            UsageError: there is no such column of numbers, or ``top`` is below 1.
        """
        from duckdb import ColumnExpression as Col

        if top < 1:
            raise UsageError(f"top={top}", expected="1 or more", do="pass for example top=20")
        by = self.column(by)
        parts = [(folder, part) for folder, part in self._parts() if by in part.largest]
        if len(parts) > _FEW and not self._repeated:
            parts.sort(key=lambda item: item[1].reach(by), reverse=True)
            some = self._read(parts[:top]).filter(Col(by).isnotnull()).select(Col(by)).sort(Col(by).desc()).limit(top)
            values = some.fetchall()
            if len(values) == top:
                parts = [(folder, part) for folder, part in parts if part.reach(by) >= values[-1][0]]
        if not parts:
            return None
        present = self._once(self._read(parts).filter(Col(by).isnotnull()))
        return present.sort(Col(by).desc(), Col("key"), Col(ROW)).limit(top)

    def column(self, by: str | None) -> str:
        """The column to order by, the first of the question's columns by default.

        Raises:
            UsageError: there is no such column of numbers.
        """
        numeric = list(dict.fromkeys(name for h in self.headers.values() for name in numeric_columns(h.columns)))
        first = next(iter(self.headers.values())).columns
        by = by or next(column.name for column in first if column.kind.startswith("torch"))
        if by not in numeric:
            what = f"edges have no column of numbers {by!r}"
            raise UsageError(what, expected=f"one of {numeric}", do="sort by one of these")
        return by

    def all(self) -> DuckDBPyRelation | None:
        """Every edge, in no order; None where nothing fits."""
        parts = self._parts()
        return self._once(self._read(parts)) if parts else None

    def check_known(self) -> None:
        """Refuse a label that stands nowhere, rather than pass a slip of the pen for silence.

        Raises:
            UsageError: there is such a label among the ends.
        """
        from duckdb import ColumnExpression as Col

        for side, labels in self.ends.items():
            axes = [axis for header in self.headers.values() for axis in header.axes if axis.name == side]
            known = {name for axis in axes for name in axis.labels}
            parts = [] if known.intersection(labels) else self._parts(side)
            if known.intersection(labels) or (parts and self._read(parts, side).select(Col(side)).limit(1).fetchall()):
                continue
            raise UsageError(
                f"no {side} {labels[0]!r} in this atlas",
                expected=f"a label that it has, such as {', '.join(sorted(known)[:4])}, with a port or without",
                do="correct the label",
            )

    def labelled(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with what both ends do, by the labels of the heads that they name."""
        from duckdb import ColumnExpression as Col
        from duckdb import ConstantExpression as Const

        heads = {row[side].partition(".")[0] for row in rows for side in PAIR}  # L18H6 of L18H6.K
        if not heads or self.labels is None:
            return rows
        table = self.database.read_parquet(self.labels, hive_partitioning=False)
        named = table.filter(Col("head").isin(*map(Const, sorted(heads))))
        labels = dict(named.select(Col("head"), Col("label")).fetchall())
        return [row | {f"{side}_label": labels.get(row[side].partition(".")[0]) for side in PAIR} for row in rows]

    @property
    def _repeated(self) -> bool:
        """Whether several records may have the same edge: ablations, which say of which kind it was."""
        return all({"kind", "rank"} <= {column.name for column in h.columns} for h in self.headers.values())

    def _parts(self, *sides: str) -> list[tuple[Path, Part]]:
        """The files that may have edges of these ends, or of all."""
        ends = {side: labels for side, labels in self.ends.items() if side in (sides or PAIR)}
        located = ((folder, part) for folder, header in self.headers.items() for part in header.parts)
        return [item for item in located if all(item[1].may_have(side, labels) for side, labels in ends.items())]

    def _read(self, parts: Iterable[tuple[Path, Part]], *sides: str) -> DuckDBPyRelation:
        """The edges of these ends, or of all, in some files, each of which is checked."""
        from duckdb import ColumnExpression as Col
        from duckdb import ConstantExpression as Const

        paths = [checked_table(folder, self.headers[folder], part.name) for folder, part in parts]
        pairs = self.database.read_parquet(paths, union_by_name=True, hive_partitioning=False)
        for side in sides or self.ends:
            pairs = pairs.filter(Col(side).isin(*map(Const, self.ends[side])))
        return pairs

    def _once(self, pairs: DuckDBPyRelation) -> DuckDBPyRelation:
        """Each edge once: of ablations as asked, where it was."""
        from duckdb import ColumnExpression as Col
        from duckdb import ConstantExpression as Const
        from duckdb import SQLExpression, StarExpression

        if not self._repeated:
            return pairs
        times = SQLExpression(f"row_number() OVER (PARTITION BY reader, writer ORDER BY kind, key, {ROW})")
        numbered = pairs.select(StarExpression(), times.alias(_TIMES)).filter(Col(_TIMES) == Const(1))
        return numbered.select(StarExpression(exclude=[_TIMES]))


@contextmanager
def pairs_of(atlas: Atlas, question: str, where: Mapping[str, Any], ends: Mapping[str, str | None]) -> Generator[Pairs]:
    """Open the stored edges of a question, under one convention, between some ends; see ``edges``.

    Raises:
        UsageError: nothing is stored for the question, or answers under several conventions of which none was chosen.
        RecordError: a table of pairs cannot be read, or was changed since it was stored.
    """
    headers = _chosen(atlas, question, where)
    named = {side: _label(name) for side, name in ends.items() if name is not None}
    labels = {side: [label, *(f"{label}.{port}" for port in READINGS)] for side, label in named.items()}
    table = [checked_table(atlas.table(k).parent, atlas.header(k), TABLE) for k in atlas.keys("labels")[-1:]]
    import duckdb  # here, since importing the package is cheap by promise

    try:
        with duckdb.connect() as database:
            yield Pairs(database, headers, labels, table[0] if table else None)
    except duckdb.Error as error:
        raise RecordError(
            f"a table of pairs or of labels in {atlas.path} cannot be read: {error}",
            expected="Parquet files as this package writes them",
            do="remove the record's folder and run the question again",
        ) from error


def common_stamp(stamps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several stamps say alike."""
    first, *rest = stamps or [{}]
    return {name: value for name, value in first.items() if all(name in s and s[name] == value for s in rest)}


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON can say it, without the columns that say nothing about it."""
    silent = {name for name, value in row.items() if name == ROW or (name.endswith("_group") and value is None)}
    finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    return {name: value for name, value in finite.items() if name not in silent}
