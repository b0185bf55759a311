"""One stored Record: a folder of ``record.json``, the dense columns or the table, and the edges.

::

    record.json          question, parameters, stamp, provenance, axes, columns without their values
    arrays.safetensors   the columns of a record that is not over exactly one axis
    table.parquet        the labels and columns of a record over one axis
    edges-*.parquet      of pairs (a record over reader and writer, or a table with these columns): a row per pair

The header holds the sha256 of every other file and of itself; a file is checked against it whenever it is read.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from virtual_weights.atlas.parts import PAIR, Part, disk_errors, write_parts
from virtual_weights.checkpoint.writing import write_safetensors
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record import Record, Values
from virtual_weights.record.axes import Header as RecordHeader
from virtual_weights.record.durable import reading, sha256_of
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


HEADER, ARRAYS, TABLE = "record.json", "arrays.safetensors", "table.parquet"
MAX_HEADER = 64 << 20
MAX_ITEMS = 4_000_000


def sealed(fields: Mapping[str, Any]) -> str:
    """Plain values as JSON text with a checksum of themselves, for ``unsealed``."""
    plain = json.loads(json.dumps(dict(fields), allow_nan=False))
    return json.dumps({**plain, "checksum": _checksum(plain)}, allow_nan=False)


def parsed(raw: bytes) -> dict[str, Any]:
    """A JSON object of a size that this package writes.

    Raises:
        ValueError: it is not that.
    """
    # every value follows a comma, or is the first of its container: this bounds the memory before it is taken
    if len(raw) > MAX_HEADER or sum(map(raw.count, (b",", b"[", b"{"))) > MAX_ITEMS:
        raise ValueError("it is larger than any that this package writes")
    try:
        fields = json.loads(raw.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"it is a JSON {type(fields).__name__}")
    return fields


def unsealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What was given to ``sealed``.

    Args:
        fields: what it wrote, parsed.

    Raises:
        ValueError: it was changed since.
    """
    plain = {name: value for name, value in fields.items() if name != "checksum"}
    if fields.get("checksum") != _checksum(plain):
        raise ValueError("it was changed after it was written: its checksum differs")
    return plain


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Header(RecordHeader):
    """A stored Record without its values.

    Attributes:
        written: when it was stored, ISO 8601 in UTC: the order of the text is the order in time.
        key: the record's address.
        files: the sha256 of every other file by its name.
        parts: the files of its edges, where it is about pairs.
    """

    written: str
    key: str
    files: Mapping[str, str]
    parts: tuple[Part, ...]

    @property
    def is_pairs(self) -> bool:
        """Whether the record is about pairs, which are kept as edges: over (reader, writer), or a table of both."""
        return tuple(axis.name for axis in self.axes) == PAIR or set(PAIR) <= {column.name for column in self.columns}


def write_record(record: Record, folder: Path, key: str) -> Header:
    """Write a Record's files into an empty folder, column by column and edges part by part.

    Args:
        record: the record.
        folder: an existing empty folder.
        key: the record's address, repeated in its header and in its edges.

    Returns:
        The header that was written.

    Raises:
        OSError: the disk is full or fails.
    """
    if len(record.axes) == 1:
        with disk_errors():
            write_parquet(folder / TABLE, long_form(record.axes, record.columns, torch.arange(record.size)))
    else:
        columns = sorted(((c.name, _tensor(c.values)) for c in record.columns), key=lambda item: -item[1].itemsize)
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in columns}
        write_safetensors(folder / ARRAYS, shapes, (_dense(tensor) for _, tensor in columns), {})
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    header = Header.of(record, written=now, key=key, files={}, parts=())
    if header.is_pairs:
        port = record.parameters.get("port")
        origin = {"key": key, "question": record.question, "port": None if port is None else str(port)}
        header = replace(header, parts=write_parts(record, folder, origin))
    header = replace(header, files={path.name: sha256_of(path) for path in sorted(folder.iterdir())})
    (folder / HEADER).write_text(sealed(json.loads(header.to_json())), encoding="utf-8")
    return header


def read_header(folder: Path) -> Header:
    """What is known of a stored Record without its values.

    Raises:
        RecordError: the header is missing, malformed, changed, or of another record.
    """
    try:
        with reading(folder.parents[1], *folder.parts[-2:], HEADER) as file:
            header = Header.of_fields(unsealed(parsed(file.read(MAX_HEADER + 1))))
        header = replace(header, parts=tuple(map(Part.of_fields, header.parts)))
        fault = "is of another record" if header.key != folder.name else _fault(header)
    except (OSError, ValueError) as error:
        raise broken(folder, f"{HEADER} cannot be used ({error})") from error
    if fault:
        raise broken(folder, f"{HEADER} {fault}")
    return header


def _fault(header: Header) -> str | None:
    """What in a header contradicts itself or its form, though nobody changed it since it was written."""
    try:
        texts: list[Any] = [header.question, header.written, *header.files.values()]
        texts += [text for axis in header.axes for text in (axis.name, *axis.labels, *axis.groups)]
        texts += [text for column in header.columns for text in vars(column).values()]
        names = [item.name for item in (*header.axes, *header.columns)]
        if len(set(names)) < len(names):
            return "names axes or columns twice"
    except (AttributeError, TypeError):
        return "has fields of other types"
    mappings = (header.parameters, header.stamp, header.provenance)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(m, dict) for m in mappings):
        return "has fields of other types"
    return None


def read_record(folder: Path) -> Record:
    """A stored Record.

    Raises:
        RecordError: a file is missing, malformed, changed since it was stored, or contradicts another.
    """
    header = read_header(folder)
    values = _table(folder, header) if len(header.axes) == 1 else _arrays(folder, header)
    for column, value in zip(header.columns, values, strict=True):
        shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
        if shape != header.shape:
            raise broken(folder, f"column {column.name!r} has shape {shape}, its axes have {header.shape}")
    return record_of(header, values)


def checked_table(folder: Path, header: Header, name: str) -> str:
    """The path of a stored Record's Parquet file for a query, where no character of it is a pattern.

    Args:
        folder: the record's folder.
        header: its header.
        name: ``TABLE``, or the name of a part of its edges.

    Raises:
        RecordError: it is missing, or was changed since it was stored.
    """
    status = (folder / name).lstat() if (folder / name).exists() else None
    stamp = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) if status else None
    try:
        found = _sha256_of(folder.absolute(), name, stamp)
    except OSError as error:
        raise broken(folder, f"{name} cannot be read ({error})") from error
    if found != header.files.get(name):
        raise _changed(folder, name)
    return glob.escape(str(folder.absolute() / name))


@lru_cache(maxsize=4096)
def _sha256_of(folder: Path, name: str, stamp: tuple[int, ...] | None) -> str:
    """A stored file's sha256, computed once for what it is now, as ``stamp`` says."""
    del stamp
    return sha256_of(folder.parents[1], *folder.parts[-2:], name)


def _arrays(folder: Path, header: Header) -> list[Values]:
    try:
        with reading(folder.parents[1], *folder.parts[-2:], ARRAYS) as file:
            raw = file.read()
        if hashlib.sha256(raw).hexdigest() != header.files.get(ARRAYS):
            raise _changed(folder, ARRAYS)
        arrays = load(raw)
        if any(str(arrays[column.name].dtype) != column.kind for column in header.columns):
            raise broken(folder, f"{ARRAYS} has columns of other types than {HEADER}")
        return [arrays[column.name] for column in header.columns]
    except (OSError, SafetensorError, KeyError) as error:
        raise broken(folder, f"{ARRAYS} cannot be read ({error!r})") from error


def _table(folder: Path, header: Header) -> list[Values]:
    import duckdb  # here, since importing the package is cheap by promise

    checked_table(folder, header, TABLE)
    try:
        values = list(read_table(folder / TABLE).values())
        last = values[len(values) - len(header.columns) :]  # labels come first; by place, as names lose their case
        return [restore(value, column.kind) for value, column in zip(last, header.columns, strict=True)]
    except (duckdb.Error, ValueError, AttributeError) as error:
        raise broken(folder, f"{TABLE} cannot be read ({error!r})") from error


def _tensor(values: Values) -> Tensor:
    assert isinstance(values, Tensor), "text columns are for records over one axis"
    return values


def _dense(values: Tensor) -> Tensor:
    return values.detach().cpu().contiguous()


def _changed(folder: Path, name: str) -> RecordError:
    return broken(folder, f"{name} was changed after it was written: its checksum differs")


def broken(folder: Path, what: str) -> RecordError:
    """The refusal of a stored record.

    Args:
        folder: its folder.
        what: what is wrong with it.
    """
    return RecordError(
        f"stored record {folder.name[:12]}: {what}",
        expected=f"a folder as this package writes it: {HEADER} with {ARRAYS} or {TABLE}",
        do=f"remove the folder {folder} and run the question again: only what is missing is computed",
    )
