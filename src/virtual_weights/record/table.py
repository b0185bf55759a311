"""A Record as one long table, a row per entry: for Arrow, pandas and Parquet."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record.axes import Axis, Column, Header, Value, Values
from virtual_weights.record.durable import replacing

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from pandas import DataFrame

    from virtual_weights.record.record import Record

AsNumpy = NDArray[Any] | np.ma.MaskedArray[Any, Any]
Table = dict[str, AsNumpy]
METADATA = b"virtual_weights"
"""The key under which a Parquet file's metadata hold the header of its Record."""
_FORMAT = 1
_PLAIN = {"str": "object", "json": "object", "bool": "bool", "int": "int64", "float": "float64"}
_NULLABLE = {"b": "boolean", "i": "Int64"}


@dataclass(frozen=True)
class FileHeader(Header):
    """What the metadata of a Parquet file say: a Record without its values, and how many rows the file has."""

    rows: int
    format: int = _FORMAT


def long_form(axes: Sequence[Axis], columns: Sequence[Column], places: Tensor) -> Table:
    """Entries of a Record as numpy columns of one length: labels, groups, values.

    Args:
        axes: the axes.
        columns: the columns over them.
        places: which entries, as flat places in row order.

    Returns:
        Name to column, in the order axes (``<axis>_group`` after the axis that has groups), columns. Missing
        values are masked, or NaN in floating columns; floats narrower than float32 are widened to it.
    """
    rows = places.numpy()
    table: Table = {}
    shape = tuple(len(axis.labels) for axis in axes)
    indices = np.unravel_index(rows, shape) if shape else ()
    for axis, index in zip(axes, indices, strict=True):
        table[axis.name] = _text(axis.labels)[index]
        if axis.groups:
            table[f"{axis.name}_group"] = _text(axis.groups)[index]
    for column in columns:
        table[column.name] = picker(column)(rows)
    return table


def picker(column: Column) -> Callable[[NDArray[np.int64]], AsNumpy]:
    """What gives the entries of a column at flat places; tensors are neither copied nor widened as a whole."""
    if isinstance(column.values, Tensor):
        flat = column.values.detach().cpu().flatten()
        dtype = flat.dtype
        if not _narrow(flat):
            return lambda rows: flat.numpy()[rows]
        bits = flat.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).numpy()
        return lambda rows: _as_numpy(torch.from_numpy(bits[rows]).view(dtype))
    values = _plain_values(column)
    return lambda rows: values[rows]


def arrow_stream(record: Record, requested_schema: object | None) -> object:
    """The rows of a Record as a PyCapsule with an ArrowArrayStream, which owns its data; what is missing is null."""
    with _database(_rows(record)) as database:
        return database.view("entries").__arrow_c_stream__(requested_schema)


def to_frame(record: Record) -> DataFrame:
    """The rows of a Record for pandas; a column of integers or truth values is nullable where some are missing.

    Raises:
        UsageError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UsageError(
            "pandas is not installed", expected="pandas, which nothing else here needs", do="pip install pandas"
        ) from None
    columns: dict[str, Any] = {}
    for name, values in _rows(record).items():
        nullable = _NULLABLE.get(values.dtype.kind) if np.ma.is_masked(values) else None
        columns[name] = pandas.array(values.tolist(), dtype=nullable) if nullable else values
    frame = pandas.DataFrame(columns)
    described = {name: dict(getattr(record, name)) for name in ("parameters", "stamp", "provenance")}
    frame.attrs = {"question": record.question, **described}
    return frame


def write_parquet(path: Path, table: Table, header: FileHeader | None = None) -> None:
    """Write a table as a Parquet file, with a header in the file's key-value metadata; an existing file is replaced."""
    with _database(table) as database:
        if header is None:
            database.view("entries").write_parquet(str(path), compression="zstd")
        else:
            copy = "COPY entries TO $path (FORMAT parquet, COMPRESSION zstd, KV_METADATA {virtual_weights: $header})"
            database.execute(copy, {"path": str(path), "header": header.to_json()})


def save_parquet(record: Record, path: str | Path) -> None:
    """Write a Record as a Parquet file that ``load_parquet`` reads; see ``Record.to_parquet``."""
    for axis in record.axes:
        if len(set(axis.labels)) < len(axis.labels):
            raise UsageError(f"axis {axis.name!r} repeats a label", expected="labels that differ", do="rename one")
    with replacing(Path(path)) as aside:
        write_parquet(aside, _rows(record), FileHeader.of(record, rows=len(record)))


def read_table(path: Path) -> Table:
    """The columns of a Parquet file, missing values masked; a ``duckdb.Error`` where it cannot be read."""
    import duckdb  # here, since importing the package is cheap by promise

    with duckdb.connect() as database:
        return database.read_parquet(glob.escape(str(path)), hive_partitioning=False).fetchnumpy()


def load_parquet(path: str | Path) -> tuple[Header, list[Values]]:
    """What ``save_parquet`` wrote: the header, and the values of every column over all axes.

    An entry that has no row is NaN in floating columns, 0 or False in those that cannot hold NaN, None in tuples.

    Raises:
        RecordError: there is no such file, it has no header, or its rows contradict the header.
    """
    import duckdb

    try:
        header = _file_header(Path(path))
        table = read_table(Path(path))
        places = _places(header, table)
        found = list(table.values())[len(table) - len(header.columns) :]
        values = [restore(value, column.kind) for value, column in zip(found, header.columns, strict=True)]
    except (duckdb.Error, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise RecordError(
            f"{path} cannot be read as a record: {error}",
            expected="a file that Record.to_parquet wrote, unchanged",
            do="write it again, or read it as a plain table with pandas, polars or duckdb",
        ) from error
    return header, [_spread(value, places, header.shape) for value in values]


def restore(values: AsNumpy, kind: str) -> Values:
    """The values of a column as they were before ``long_form``, given its ``kind``.

    Raises:
        ValueError: the kind is none of ``Column.kind``, or the values are of another.
    """
    dtype = getattr(torch, kind.removeprefix("torch."), None) if kind.startswith("torch.") else None
    if isinstance(dtype, torch.dtype):
        whole = _with_nan(values)
        if whole.dtype != _as_numpy(torch.empty(0, dtype=dtype)).dtype or np.ma.is_masked(whole):
            raise ValueError(f"a column of kind {kind} holds {values.dtype}, or nothing in some rows")
        return torch.from_numpy(np.array(whole)).to(dtype)
    if values.dtype != _PLAIN.get(kind):
        raise ValueError(f"a column of kind {kind} holds {values.dtype}")
    plain: list[Value] = values.tolist()
    if kind == "json":
        return tuple(None if value is None else json.loads(str(value)) for value in plain)
    return tuple(plain)


def _rows(record: Record) -> Table:
    return long_form(record.axes, record.columns, record.present().nonzero().flatten())


@contextmanager
def _database(table: Table) -> Generator[DuckDBPyConnection]:
    """A database in memory in which a table is called ``entries``."""
    with _engine(os.getpid()).cursor() as database:
        database.register("entries", table)
        yield database


@cache
def _engine(process: int) -> DuckDBPyConnection:
    """The engine of this process, since to start one takes ten times as long as to write a record.

    It has no threads of its own, which a process that is forked from this one would not have.
    """
    import duckdb

    del process  # distinguishes a forked one
    return duckdb.connect(config={"pandas_analyze_sample": 0, "threads": 1})  # type "object" is text, never guessed


def _file_header(path: Path) -> FileHeader:
    import duckdb

    if not path.is_file():
        raise ValueError("there is no such file")
    with duckdb.connect() as database:
        query = database.execute("SELECT key, value FROM parquet_kv_metadata(?)", [glob.escape(str(path))])
        metadata: dict[bytes, bytes] = dict(query.fetchall())
    if METADATA not in metadata:
        raise ValueError("its metadata do not describe a record")
    header = FileHeader.parse(metadata[METADATA].decode())
    if header.format != _FORMAT:
        raise ValueError(f"its format is {header.format}, this version reads {_FORMAT}")
    return header


def _places(header: FileHeader, table: Table) -> NDArray[np.int64]:
    """The flat place of every row, by its labels.

    Raises:
        ValueError: the rows are not those that the header describes.
    """
    named = long_form(header.axes, (), torch.empty(0, dtype=torch.int64))
    names = [*named, *(column.name for column in header.columns)]
    found = dict(zip(names, list(table.values())[-len(names) :], strict=False))
    cased = len({name.casefold() for name in names}) == len(names)  # else the database has renamed some
    if len(found) < len(names) or (cased and list(table)[-len(names) :] != names):
        raise ValueError(f"its columns are {', '.join(table)}, those of its record {', '.join(names)}")
    rows = len(next(iter(found.values())))
    flat = np.zeros(rows, dtype=np.int64)
    for axis in header.axes:
        place = {label: i for i, label in enumerate(axis.labels)}
        labels = found[axis.name].tolist()
        if unknown := set(labels) - place.keys():
            raise ValueError(f"its record has no {axis.name} {min(map(str, unknown))}")
        flat = flat * len(place) + np.array([place[label] for label in labels], dtype=np.int64)
    if rows != header.rows or len(np.unique(flat)) != rows:
        raise ValueError(f"its rows are {rows}, of which {len(np.unique(flat))} differ; its record has {header.rows}")
    expected = long_form(header.axes, (), torch.from_numpy(flat))
    if any(found[name].tolist() != expected[name].tolist() for name in expected):
        raise ValueError("its groups are not those of its labels")
    return flat


def _spread(values: Values, places: NDArray[np.int64], shape: tuple[int, ...]) -> Values:
    """Values of some entries over all of them; the others are NaN, 0 or None."""
    index = np.full(math.prod(shape), len(places))
    index[places] = np.arange(len(places))
    if isinstance(values, Tensor):
        absent = values.new_full((1,), math.nan if values.is_floating_point() else 0)
        return torch.cat([values, absent])[torch.from_numpy(index)].view(shape)
    padded = (*values, None)
    return tuple(padded[i] for i in index)


def _with_nan(values: AsNumpy) -> AsNumpy:
    """Floats with NaN where they are masked."""
    return np.ma.filled(values, np.nan) if values.dtype.kind == "f" else values


def _plain_values(column: Column) -> AsNumpy:
    values: Any = column.values
    if column.kind == "str":
        return _text(values)
    if column.kind == "json":
        return _text([None if value is None else json.dumps(value) for value in values])
    filled = [0 if value is None else value for value in values]
    mask = [value is None for value in values]
    return np.ma.masked_array(np.array(filled, dtype=_PLAIN[column.kind]), mask)


def _as_numpy(values: Tensor) -> NDArray[Any]:
    return (values.float() if _narrow(values) else values).numpy()


def _narrow(values: Tensor) -> bool:
    """Whether these are floats that are widened."""
    return values.is_floating_point() and values.dtype.itemsize < 4


def _text(values: Any) -> AsNumpy:
    return np.array([*values], dtype=object)
