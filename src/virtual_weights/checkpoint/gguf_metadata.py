"""The key-value part of a GGUF header."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from virtual_weights.checkpoint.gguf_bytes import HeaderCursor, malformed_gguf
from virtual_weights.checkpoint.names import check_name

MAX_PAIRS = 65_536
MAX_ARRAY_ITEMS = 4_000_000  # of all arrays together; a large vocabulary with its merges has one million
MAX_ARRAY_DEPTH = 4
SMALL_ARRAY = 4_096  # larger arrays are vocabularies: they stay in the file until asked for

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class LargeArray:
    """An array that was passed over: its item type, how many there are, and where they begin."""

    kind: int
    count: int
    offset: int
    nbytes: int


@dataclass
class _Budget:
    """How many array items the rest of the header may still have."""

    items: int


def read_metadata(cursor: HeaderCursor, count: int) -> dict[str, Any]:
    """Read that many key-value pairs.

    Returns:
        Values by key: numbers, booleans, strings, lists of these, or a LargeArray.

    Raises:
        MalformedCheckpointError: a count or length that cannot be, an unknown type, a key twice.
    """
    if count > MAX_PAIRS:
        raise malformed_gguf(cursor.path, f"it claims {count:,} metadata keys", f"at most {MAX_PAIRS:,}")
    metadata: dict[str, Any] = {}
    budget = _Budget(MAX_ARRAY_ITEMS)
    for _ in range(count):
        key = cursor.string("a metadata key")
        check_name(key, cursor.path.name)
        if key in metadata:
            raise malformed_gguf(cursor.path, f"the metadata key {key!r} occurs twice", "every key once")
        what = f"the value of {key!r}"
        metadata[key] = _value(cursor, cursor.type_id(what), what, budget, 0)
    return metadata


def large_strings(raw: bytes, count: int) -> list[str]:
    """Decode the bytes of a large array of strings; what is no UTF-8 shows in hexadecimal."""
    strings: list[str] = []
    position = 0
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, position)
        position += 8 + length
        strings.append(raw[position - length : position].decode("utf-8", errors="backslashreplace"))
    return strings


def large_numbers(raw: bytes, kind: int, count: int) -> list[Any]:
    """Decode the bytes of a large array of numbers."""
    return list(struct.unpack(f"<{count}{_SCALARS[kind]}", raw))


def _value(cursor: HeaderCursor, kind: int, what: str, budget: _Budget, depth: int) -> Any:
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _array(cursor, what, budget, depth + 1)
    if kind not in _SCALARS:
        raise malformed_gguf(cursor.path, f"{what} has the type {kind}", "one of GGUF's types 0 to 12")
    form = "<" + _SCALARS[kind]
    return struct.unpack(form, cursor.take(struct.calcsize(form), what))[0]


def _array(cursor: HeaderCursor, what: str, budget: _Budget, depth: int) -> Any:
    kind, count = cursor.type_id(what), cursor.count(what)
    if depth > MAX_ARRAY_DEPTH:
        raise malformed_gguf(cursor.path, f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}", "flat arrays")
    if count > budget.items:
        raise malformed_gguf(
            cursor.path, f"{what} claims {count:,} items", f"at most {MAX_ARRAY_ITEMS:,} in all arrays together"
        )
    budget.items -= count
    if kind not in (_STRING, _ARRAY) and kind not in _SCALARS:
        raise malformed_gguf(cursor.path, f"{what} has items of type {kind}", "one of GGUF's types 0 to 12")
    if count <= SMALL_ARRAY or kind == _ARRAY:
        return [_value(cursor, kind, what, budget, depth) for _ in range(count)]
    begin = cursor.position
    if kind == _STRING:
        cursor.skip_strings(count, what)
    else:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[kind]), what)
    return LargeArray(kind, count, begin, cursor.position - begin)
