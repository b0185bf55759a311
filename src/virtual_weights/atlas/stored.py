"""One stored Record: a folder of ``record.json``, the dense columns or the table, and the edges.

::

    record.json          question, parameters, stamp, provenance, axes, columns without their values
    arrays.safetensors   the columns of a record that is not over exactly one axis
    table.parquet        the labels and columns of a record over one axis
    edges.parquet        of pairs (a record over reader and writer, or a table with these columns): a row per pair
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record import Record, Values
from virtual_weights.record.axes import Header as RecordHeader
from virtual_weights.record.record import record_of
from virtual_weights.record.table import long_form, read_table, restore, write_parquet
from virtual_weights.version import VERSION

KEY = re.compile(r"[0-9a-f]{64}")


def task_key(fingerprint: str, question: str, parameters: Mapping[str, Any], stamp: Mapping[str, Any]) -> str:
    """The address of a task's result.

    ``sha256`` over the canonical JSON of the arguments and the version of this package: names sorted,
    no spaces, tuples as lists. Any change of the model, the question, a parameter, a convention or the
    code's version is another address.

    Args:
        fingerprint: the checkpoint's fingerprint.
        question: name of the question.
        parameters: its parameters, plain JSON values.
        stamp: the conventions in force that the asker knows beforehand.

    Returns:
        64 lower-case hex digits.

    Raises:
        UsageError: a value is not plain JSON.

    Example:
        >>> a = task_key("f00d", "composition", {"port": "K", "memory_mb": 256}, {})
        >>> a == task_key("f00d", "composition", {"memory_mb": 256, "port": "K"}, {})
        True
    """
    task = [fingerprint, question, dict(parameters), dict(stamp), VERSION]
    return hashlib.sha256(canonical(task).encode()).hexdigest()


def canonical(value: Any) -> str:
    """A plain value as JSON that is equal for equal values.

    Raises:
        UsageError: the value is not plain JSON: NaN, infinity, a tensor, a name that is not text.
    """
    _refuse_other_names(value)
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"a parameter cannot be written as JSON: {error}",
            expected="finite numbers, text, true, false, null, lists and objects of these",
            do="pass plain values; name a file or tensor instead of holding it",
        ) from None


def _refuse_other_names(value: Any) -> None:
    """Refuse ``{1: ...}``: JSON would write it as ``{"1": ...}``, and two tasks would share an address."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise UsageError(
                    f"a parameter is named {name!r}", expected="names that are text", do=f"use {str(name)!r}"
                )
            _refuse_other_names(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_names(inner)


HEADER, ARRAYS, TABLE, EDGES = "record.json", "arrays.safetensors", "table.parquet", "edges.parquet"
PAIR = ("reader", "writer")


@dataclass(frozen=True)
class Header(RecordHeader):
    """A stored Record without its values.

    Attributes:
        written: when it was stored, ISO 8601 in UTC: the order of the text is the order in time.
    """

    written: str

    @property
    def is_pairs(self) -> bool:
        """Whether the record is about pairs, which are kept as edges: over (reader, writer), or a table of both."""
        return tuple(axis.name for axis in self.axes) == PAIR or set(PAIR) <= {column.name for column in self.columns}


def write_record(record: Record, folder: Path, key: str) -> None:
    """Write a Record's files into an empty folder.

    Args:
        record: the record.
        folder: an existing empty folder.
        key: the record's address, repeated in its edges.
    """
    header = Header.of(record, written=datetime.now(UTC).isoformat(timespec="microseconds"))
    (folder / HEADER).write_text(header.to_json(), encoding="utf-8")
    if len(record.axes) == 1:
        write_parquet(folder / TABLE, long_form(record.axes, record.columns, torch.arange(record.size)))
    else:
        save_file({column.name: _dense(column.values) for column in record.columns}, folder / ARRAYS)
    if header.is_pairs:
        port = record.parameters.get("port")
        origin = {"key": key, "question": record.question, "port": None if port is None else str(port)}
        places = record.present().nonzero().flatten()
        write_parquet(folder / EDGES, long_form(record.axes, record.columns, places, origin))


def read_header(folder: Path) -> Header:
    """What is known of a stored Record without its values.

    Raises:
        RecordError: the header is missing or malformed.
    """
    try:
        return Header.parse((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(folder, f"{HEADER} cannot be read ({error})") from error


def read_record(folder: Path) -> Record:
    """A stored Record; dense columns are mapped from the file and read as they are touched.

    Raises:
        RecordError: a file is missing, malformed, or contradicts another.
    """
    header = read_header(folder)
    values = _table(folder, header) if len(header.axes) == 1 else _arrays(folder, header)
    for column, value in zip(header.columns, values, strict=True):
        shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
        if shape != header.shape:
            raise _broken(folder, f"column {column.name!r} has shape {shape}, its axes have {header.shape}")
    return record_of(header, values)


def _arrays(folder: Path, header: Header) -> list[Values]:
    try:
        arrays = load_file(folder / ARRAYS)
        return [arrays[column.name] for column in header.columns]
    except (OSError, SafetensorError, KeyError) as error:
        raise _broken(folder, f"{ARRAYS} cannot be read ({error!r})") from error


def _table(folder: Path, header: Header) -> list[Values]:
    import duckdb  # here, since importing the package is cheap by promise

    try:
        values = list(read_table(folder / TABLE).values())
        last = values[len(values) - len(header.columns) :]  # labels come first; by place, as names lose their case
        return [restore(value, column.kind) for value, column in zip(last, header.columns, strict=True)]
    except (duckdb.Error, ValueError, AttributeError) as error:
        raise _broken(folder, f"{TABLE} cannot be read ({error!r})") from error


def _dense(values: Values) -> Tensor:
    assert isinstance(values, Tensor), "text columns are for records over one axis"
    return values.detach().cpu().clone(memory_format=torch.contiguous_format)  # no two columns may share memory


def _broken(folder: Path, what: str) -> RecordError:
    return RecordError(
        f"stored record {folder.name[:12]}: {what}",
        expected=f"a folder as this package writes it: {HEADER} with {ARRAYS} or {TABLE}",
        do=f"remove the folder {folder} and run the question again: only what is missing is computed",
    )
