"""The edges of a record as Parquet files of bounded size, each with a small range of readers and of writers.

Rows are sorted by reader and cut into strips; within a strip they are sorted by writer and cut into parts (sort-tile-
recursive packing). So the edges of one reader lie in about the square root of all parts, those of one writer too, and
the header of the record says of each part between which labels its ends lie and how large its largest values are: a
query opens, and checks, only parts that can matter.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from virtual_weights.record import Axis, Record
from virtual_weights.record.axes import Described, Values
from virtual_weights.record.table import AsNumpy, picker

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

PAIR = ("reader", "writer")
ROW = "record_row"
"""The column that says in which row of the record an edge stands."""
PART_ROWS = 122_880
"""How many rows a part has at most: those of one row group as DuckDB writes it."""
_NAME = re.compile(r"edges-\d{5,9}\.parquet")
_NUMERIC = re.compile(r"int|float|torch\.(u?int|b?float).*")
Places = NDArray[np.int64]
Texts = NDArray[np.object_]


@dataclass(frozen=True)
class Part:
    """One file of a record's edges.

    Attributes:
        name: the file's name.
        rows: how many edges it has.
        reader: the first and the last of its readers in alphabetical order.
        writer: those of its writers.
        largest: the largest value of each column of numbers; None where it is infinite. A column without any is absent.
    """

    name: str
    rows: int
    reader: tuple[str, str]
    writer: tuple[str, str]
    largest: Mapping[str, float | None]

    @staticmethod
    def of_fields(fields: Any) -> Part:
        """The part that plain values describe.

        Raises:
            ValueError: they are something else, or name a file that is no part.
        """
        try:
            name, rows, largest = fields["name"], fields["rows"], dict(fields["largest"])
            (first, last), (low, high) = fields["reader"], fields["writer"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a part of its edges is malformed ({error!r})") from error
        numbers: list[Any] = [rows, *(value for value in largest.values() if value is not None)]
        texts = all(isinstance(text, str) for text in (name, first, last, low, high, *largest))
        if not texts or not all(isinstance(n, int | float) for n in numbers) or not _NAME.fullmatch(name):
            raise ValueError("a part of its edges is not described as this package does it")
        return Part(name, rows, (first, last), (low, high), largest)

    def may_have(self, side: str, labels: Iterable[str]) -> bool:
        """Whether one of some labels may be among its readers or writers."""
        first, last = self.reader if side == "reader" else self.writer
        return any(first <= label <= last for label in labels)

    def reach(self, column: str) -> float:
        """The largest value of a column."""
        largest = self.largest[column]
        return math.inf if largest is None else largest


def numeric_columns(columns: Iterable[Described]) -> list[str]:
    """The columns of numbers, which edges can be sorted by."""
    return [column.name for column in columns if _NUMERIC.fullmatch(column.kind)]


def write_parts(record: Record, folder: Path, origin: Mapping[str, str | None]) -> tuple[Part, ...]:
    """Write the edges of a record, part by part: no more than a strip of them is in memory besides the record.

    Args:
        record: a record over (reader, writer), or a table with these columns.
        folder: an existing folder.
        origin: columns with one value throughout, put first.

    Raises:
        OSError: the disk is full or fails.
    """
    import duckdb  # here, since importing the package is cheap by promise

    ends = _matrix(record) if len(record.axes) == 2 else _table(record)
    pick = {column.name: picker(column) for column in record.columns}
    numeric = numeric_columns(map(Described.of, record.columns))
    parts = list[Part]()
    with duckdb.connect(config={"pandas_analyze_sample": 0}) as database, disk_errors():
        for places in ends.parts():
            name = f"edges-{len(parts):05}.parquet"
            values = {column: take(places) for column, take in pick.items()}
            labels = ends.labels(places)
            _write(database, folder / name, origin, labels, {**values, ROW: places})
            reader, writer = (_bounds(_listed(labels.get(side, values.get(side, ())))) for side in PAIR)
            largest = {column: _largest(values[column]) for column in numeric}
            known = {column: value for column, value in largest.items() if value is not None}
            finite = {column: value if math.isfinite(value) else None for column, value in known.items()}
            parts.append(Part(name, len(places), reader, writer, finite))
    return tuple(parts)


@contextmanager
def disk_errors() -> Generator[None]:
    """Make an OSError of what DuckDB says of a full or failing disk."""
    import duckdb

    try:
        yield
    except duckdb.IOException as error:  # says the reason in words alone
        full = next((code for code in (errno.ENOSPC, errno.EDQUOT) if os.strerror(code) in str(error)), None)
        raise OSError(full or errno.EIO, os.strerror(full) if full else str(error)) from error


@dataclass(frozen=True)
class _Ends:
    """Readers and writers of the rows of a record.

    Attributes:
        parts: gives the places of the rows of each part.
        labels: gives the text columns of some rows that stand in no column of the record.
    """

    parts: Callable[[], Iterator[Places]]
    labels: Callable[[Places], dict[str, Texts]]


def _matrix(record: Record) -> _Ends:
    """Of a record over (reader, writer): strips are whole readers, and only one strip's places are made at a time."""
    present = record.present().numpy().reshape([len(axis.labels) for axis in record.axes])
    order = [_order(axis.labels) for axis in record.axes]
    rank = np.argsort(order[1])

    def parts() -> Iterator[Places]:
        counts = present.sum(axis=1, dtype=np.int64)[order[0]]
        before = np.cumsum(counts) - counts
        strips = before * _strips(int(counts.sum())) // max(int(counts.sum()), 1)
        for strip in np.unique(strips):
            readers = order[0][strips == strip]
            row, writer = present[readers].nonzero()
            yield from _cut(readers[row] * np.int64(present.shape[1]) + writer, rank[writer])

    texts = [_texts(axis) for axis in record.axes]

    def labels(places: Places) -> dict[str, Texts]:
        codes = np.divmod(places, present.shape[1])
        return {name: of[code] for side, code in zip(texts, codes, strict=True) for name, of in side.items()}

    return _Ends(parts, labels)


def _table(record: Record) -> _Ends:
    """Of a table with columns of readers and writers."""
    (axis,) = record.axes
    reader, writer = (_ranks(_listed(record.column(side).values)) for side in PAIR)

    def parts() -> Iterator[Places]:
        places = record.present().numpy().nonzero()[0]
        strips = _strips(len(places))
        for strip in np.array_split(places[np.argsort(reader[places], kind="stable")], strips):
            yield from _cut(strip, writer[strip])

    texts = _texts(axis)

    def labels(places: Places) -> dict[str, Texts]:
        return {name: of[places] for name, of in texts.items()}

    return _Ends(parts, labels)


def _strips(rows: int) -> int:
    """How many strips there are of so many rows: as many as a strip has parts."""
    return math.ceil(math.sqrt(math.ceil(rows / PART_ROWS))) or 1


def _cut(places: Places, writers: Places) -> Iterator[Places]:
    """The parts of a strip by its writers, each in the order of the record."""
    if len(places):
        ordered = places[np.argsort(writers, kind="stable")]
        yield from map(np.sort, np.array_split(ordered, math.ceil(len(places) / PART_ROWS)))


def _order(texts: Sequence[str | None]) -> Places:
    """The places of texts in alphabetical order."""
    return np.array(sorted(range(len(texts)), key=lambda i: texts[i] or ""), dtype=np.int64)


def _ranks(texts: Sequence[str | None]) -> Places:
    """The place of each text in the alphabetical order of all."""
    rank = {text: i for i, text in enumerate(sorted({text or "" for text in texts}))}
    return np.array([rank[text or ""] for text in texts], dtype=np.int64)


def _texts(axis: Axis) -> dict[str, Texts]:
    """Labels and groups of an axis, by the names of their columns."""
    texts = {axis.name: axis.labels, f"{axis.name}_group": axis.groups}
    return {name: np.array(of, dtype=object) for name, of in texts.items() if of}


def _listed(values: Values | AsNumpy) -> list[str | None]:
    plain: list[Any] = values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
    return [None if value is None else str(value) for value in plain]


def _bounds(texts: Sequence[str | None]) -> tuple[str, str]:
    names = [text or "" for text in texts]
    return min(names), max(names)


def _largest(values: AsNumpy) -> float | None:
    """The largest of some numbers; None where there is none."""
    there = np.ma.compressed(values)
    there = there[~np.isnan(there)] if there.dtype.kind == "f" else there
    return there.max().item() if len(there) else None


def _write(
    database: DuckDBPyConnection,
    path: Path,
    origin: Mapping[str, str | None],
    labels: Mapping[str, Texts],
    values: Mapping[str, AsNumpy],
) -> None:
    """One part. Names and texts are values of expressions, never text of a query."""
    from duckdb import ColumnExpression as Col
    from duckdb import ConstantExpression as Const

    columns = dict(zip(map(str, range(len(labels) + len(values))), (*labels.values(), *values.values()), strict=True))
    chosen = [Const(text).cast("VARCHAR").alias(name) for name, text in origin.items()]
    for place, name in zip(columns, (*labels, *values), strict=True):
        chosen.append((Col(place).cast("VARCHAR") if name in labels else Col(place)).alias(name))
    database.register("entries", columns)
    database.view("entries").select(*chosen).create_view("edges", replace=True)
    copy = "COPY edges TO $path (FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v2, ROW_GROUP_SIZE $rows)"
    database.execute(copy, {"path": str(path), "rows": PART_ROWS})
