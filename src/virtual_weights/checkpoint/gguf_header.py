"""The header of a GGUF file (versions 2 and 3, little-endian), read by ourselves and bounded.

gguf's own reader loops on a hostile header of 49 bytes and accepts overlapping tensors.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtual_weights.checkpoint.folder import check_name
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.checkpoint.source import TensorInfo
from virtual_weights.errors import MalformedCheckpointError


@dataclass(frozen=True)
class BlockType:
    """How a tensor's values are stored.

    Attributes:
        name: the name in ggml.
        values: values per block; the last axis is a multiple of it.
        nbytes: bytes per block.
    """

    name: str
    values: int
    nbytes: int

    @property
    def quantised(self) -> bool:
        """Whether values share a block, so that they must be dequantised."""
        return self.values > 1


# Only what gguf's dequantisers can undo; ggml's types for intermediate results (Q8_1, Q8_K) lie in no file.
GGUF_TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
}


MAX_HEADER = 256 << 20
_AHEAD = 1 << 20
_COUNT, _TYPE = struct.Struct("<Q"), struct.Struct("<I")


class HeaderCursor:
    """Reads on from the start of a file; every length is held against the bytes that remain.

    Args:
        file: the file.
    """

    def __init__(self, file: PinnedFile) -> None:
        self._file = file
        self._buffer = bytearray()
        self._position = 0

    @property
    def position(self) -> int:
        """How many bytes have been taken."""
        return self._position

    @property
    def path(self) -> Path:
        """The file, for errors."""
        return self._file.path

    def take(self, length: int, what: str) -> bytes:
        """Take the next bytes.

        Raises:
            MalformedCheckpointError: the file, or what a header may take of it, ends before.
        """
        self.skip(length, what)
        return bytes(memoryview(self._buffer)[self._position - length : self._position])

    def skip(self, length: int, what: str) -> None:
        """Pass over the next bytes; raises as ``take`` does."""
        end = self._position + length
        if end > len(self._buffer):
            self._fetch(end, length, what)
        self._position = end

    def _fetch(self, end: int, length: int, what: str) -> None:
        if end > self._file.size:
            left = self._file.size - self._position
            raise malformed_gguf(self.path, f"{what} claims {length:,} bytes", f"at most the {left:,} that remain")
        if end > MAX_HEADER:
            raise malformed_gguf(self.path, f"its header passes {MAX_HEADER:,} bytes at {what}", "a smaller header")
        have = len(self._buffer)
        self._buffer += self._file.read(have, min(max(end - have, _AHEAD), self._file.size - have))

    def type_id(self, what: str) -> int:
        """Take an unsigned 32-bit integer."""
        return int(_TYPE.unpack(self.take(4, what))[0])

    def count(self, what: str) -> int:
        """Take an unsigned 64-bit integer."""
        return int(_COUNT.unpack(self.take(8, what))[0])

    def string(self, what: str) -> str:
        """Take a length and that many bytes of UTF-8."""
        raw = self.take(self.count(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise malformed_gguf(self.path, f"{what} is not UTF-8: {raw[:50]!r}", "text in UTF-8") from error

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over that many strings."""
        for _ in range(count):
            # inlined from `count` and `skip`: a vocabulary has half a million of these
            if self._position + 8 > len(self._buffer):
                self._fetch(self._position + 8, 8, what)
            end = self._position + 8 + _COUNT.unpack_from(self._buffer, self._position)[0]
            if end > len(self._buffer):
                self._fetch(end, end - self._position, what)
            self._position = end


def malformed_gguf(path: Path, what: str, expected: str) -> MalformedCheckpointError:
    """The error of a GGUF file that contradicts its format."""
    return MalformedCheckpointError(
        f"{str(path)!r} is not a sound GGUF file: {what}",
        expected=expected,
        do="fetch the file again; if it stays so, it was written wrongly or truncated",
    )


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


MAGIC = b"GGUF"
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """A tensor, how its values are stored, and where its bytes begin in the file."""

    info: TensorInfo
    kind: BlockType
    type_id: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (large arrays still in the file) and every tensor by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(file: PinnedFile) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        MalformedCheckpointError: the header contradicts the format or the file.
    """
    cursor = HeaderCursor(file)
    if cursor.take(4, "the magic number") != MAGIC:
        raise malformed_gguf(file.path, "it does not begin with GGUF", "the four letters GGUF")
    _check_version(cursor)
    tensor_count, pair_count = cursor.count("the tensor count"), cursor.count("the metadata count")
    if tensor_count > MAX_TENSORS:
        raise malformed_gguf(file.path, f"it claims {tensor_count:,} tensors", f"at most {MAX_TENSORS:,}")
    metadata = read_metadata(cursor, pair_count)
    alignment = _alignment(cursor, metadata)
    relative = _read_infos(cursor, tensor_count, alignment)
    start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: GgufTensor(item.info, item.kind, item.type_id, start + item.offset) for name, item in relative.items()
    }
    _check_extents(file, tensors)
    return GgufHeader(metadata, tensors)


def _check_version(cursor: HeaderCursor) -> None:
    raw = cursor.take(4, "the version")
    version, swapped = int.from_bytes(raw, "little"), int.from_bytes(raw, "big")
    if version in (2, 3):
        return
    if swapped in (2, 3):
        raise malformed_gguf(cursor.path, "it is big-endian", "a little-endian file, as nearly all are")
    raise malformed_gguf(cursor.path, f"it has version {version}", "version 2 or 3")


def _alignment(cursor: HeaderCursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise malformed_gguf(
            cursor.path, f"its alignment is {alignment!r:.50}", f"a power of two up to {MAX_ALIGNMENT:,}"
        )
    return alignment


def _read_infos(cursor: HeaderCursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = cursor.string("a tensor name")
        check_name(name, cursor.path.name)
        if name in tensors:
            raise malformed_gguf(cursor.path, f"the tensor {name!r} occurs twice", "every name once")
        tensors[name] = _read_info(cursor, name, alignment)
    return tensors


def _read_info(cursor: HeaderCursor, name: str, alignment: int) -> GgufTensor:
    dimensions = cursor.type_id(f"the dimensions of {name!r}")
    if dimensions > MAX_DIMENSIONS:
        raise malformed_gguf(cursor.path, f"{name!r} has {dimensions:,} dimensions", f"at most {MAX_DIMENSIONS}")
    # the file names the fastest axis first; rows first is the reverse
    shape = tuple(cursor.count(f"the shape of {name!r}") for _ in range(dimensions))[::-1]
    type_id, offset = cursor.type_id(f"the type of {name!r}"), cursor.count(f"the offset of {name!r}")
    kind = GGUF_TYPES.get(type_id)
    if kind is None:
        known = ", ".join(known.name for known in GGUF_TYPES.values())
        raise malformed_gguf(cursor.path, f"{name!r} has the tensor type {type_id}", f"one of {known}")
    if 0 in shape or (kind.quantised and (not shape or shape[-1] % kind.values)):
        raise malformed_gguf(
            cursor.path, f"{name!r} has the shape {shape} as {kind.name}", f"rows of a multiple of {kind.values}"
        )
    if offset % alignment:
        raise malformed_gguf(cursor.path, f"{name!r} begins at {offset:,}", f"a multiple of {alignment}")
    nbytes = math.prod(shape) // kind.values * kind.nbytes
    return GgufTensor(TensorInfo(shape, kind.name, nbytes), kind, type_id, offset)


def _check_extents(file: PinnedFile, tensors: dict[str, GgufTensor]) -> None:
    reached, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        end = tensor.offset + tensor.info.nbytes
        if tensor.offset < reached:
            raise malformed_gguf(file.path, f"{name!r} overlaps {before!r}", "tensors that share no byte")
        if end > file.size:
            raise malformed_gguf(file.path, f"{name!r} ends at byte {end:,} of {file.size:,}", "data inside the file")
        reached, before = end, name
