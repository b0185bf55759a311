"""The header of a GGUF file (versions 2 and 3, little-endian), read by ourselves and bounded.

gguf's own reader loops on a hostile header of 49 bytes and accepts overlapping tensors.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from virtual_weights.checkpoint.folder import check_name
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.checkpoint.source import TensorInfo
from virtual_weights.errors import MalformedCheckpointError

MAGIC = b"GGUF"
MAX_HEADER = 128 << 20
MAX_PAIRS = 65_536
MAX_TEXT = 8 << 20  # of all texts together; a chat template has some thousand letters
MAX_ARRAY_ITEMS = 4_000_000  # of all arrays together; a large vocabulary with its merges has one million
MAX_ARRAY_DEPTH = 4
SMALL_ARRAY = 1_024  # larger arrays are vocabularies: they stay in the file until they are needed
MAX_KEPT_ITEMS = 65_536  # of all small arrays together; what is beyond stays in the file too
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20

_AHEAD = 1 << 20
_LEAST_ENTRY = 8 + 1 + 4 + 4 + 8  # a tensor's name of one letter, its dimensions, type and offset
_COUNT, _TYPE = struct.Struct("<Q"), struct.Struct("<I")
_EXTENTS = tuple(struct.Struct(f"<{dimensions}QIQ") for dimensions in range(MAX_DIMENSIONS + 1))
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@final
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


@final
@dataclass(frozen=True)
class LargeArray:
    """An array that was passed over: the type of its items, how many there are, and where they lie in the file."""

    item_type: int
    count: int
    offset: int
    nbytes: int

    def read(self, file: PinnedFile) -> list[Any]:
        """Read its strings or numbers; a string that is not UTF-8 shows its bytes in hexadecimal."""
        raw = file.read(self.offset, self.nbytes)
        if self.item_type != _STRING:
            return list(struct.unpack(f"<{self.count}{_SCALARS[self.item_type]}", raw))
        strings: list[str] = []
        position = 0
        for _ in range(self.count):
            begin = position + _COUNT.size
            position = begin + _COUNT.unpack_from(raw, position)[0]
            strings.append(raw[begin:position].decode("utf-8", errors="backslashreplace"))
        return strings


@final
@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor, how its values are stored, and where its bytes begin, counted from where the data begin."""

    info: TensorInfo
    block_type: BlockType
    offset: int


@final
@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (large arrays still in the file), every tensor by name, and where in the file the data begin."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    start: int


def read_gguf_header(file: PinnedFile) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Returns:
        The header; its metadata are numbers, booleans, strings, lists of these, or a LargeArray.

    Raises:
        MalformedCheckpointError: the header contradicts the format or the file.
    """
    cursor = _HeaderCursor(file)
    if cursor.take(4, "the magic number") != MAGIC:
        raise _malformed(file, "it does not begin with GGUF", "the four letters GGUF")
    _check_version(cursor)
    tensor_count, pair_count = cursor.count("the tensor count"), cursor.count("the metadata count")
    if tensor_count > MAX_TENSORS:
        raise _malformed(file, f"it claims {tensor_count:,} tensors", f"at most {MAX_TENSORS:,}")
    metadata = _read_metadata(cursor, pair_count)
    alignment = _alignment(file, metadata)
    if tensor_count * (_LEAST_ENTRY + alignment) > file.size + alignment:  # the last one need not fill its place
        raise _malformed(file, f"it claims {tensor_count:,} tensors", f"as many as {file.size:,} bytes can hold")
    tensors = _read_tensors(cursor, tensor_count, alignment)
    start = -(-cursor.position // alignment) * alignment
    _check_extents(file, tensors, start)
    return GgufHeader(metadata, tensors, start)


@final
class _HeaderCursor:
    """Reads on from the start of a file and checks every length against what remains.

    Attributes:
        file: the file.
        position: how many bytes have been taken.
        kept_items_left: how many more items of arrays may be kept in memory.
    """

    def __init__(self, file: PinnedFile) -> None:
        self.file = file
        self.position = 0
        self.kept_items_left = MAX_KEPT_ITEMS
        self._buffer = b""  # a stretch of the file that begins at _begin
        self._begin = 0
        self._array_items_left = MAX_ARRAY_ITEMS
        self._text_left = MAX_TEXT

    def take(self, length: int, what: str) -> bytes:
        """Take the next bytes.

        Raises:
            MalformedCheckpointError: the file, or what a header may take of it, ends before.
        """
        begin = self.position
        self.skip(length, what)
        if not self._begin <= begin <= self.position <= self._begin + len(self._buffer):
            self._begin = begin
            self._buffer = self.file.read(begin, min(max(length, _AHEAD), self.file.size - begin))
        return self._buffer[begin - self._begin : self.position - self._begin]

    def skip(self, length: int, what: str) -> None:
        """Pass over the next bytes, unread; raises as ``take`` does."""
        end = self.position + length
        if end > self.file.size:
            left = self.file.size - self.position
            raise _malformed(self.file, f"{what} claims {length:,} bytes", f"at most the {left:,} that remain")
        if end > MAX_HEADER:
            raise _malformed(self.file, f"its header passes {MAX_HEADER:,} bytes at {what}", "a smaller header")
        self.position = end

    def type_id(self, what: str) -> int:
        """Take an unsigned 32-bit integer."""
        return int(_TYPE.unpack(self.take(_TYPE.size, what))[0])

    def count(self, what: str) -> int:
        """Take an unsigned 64-bit integer."""
        return int(_COUNT.unpack(self.take(_COUNT.size, what))[0])

    def item_count(self, what: str) -> int:
        """Take how many items an array has, and deduct it from what all arrays together may have."""
        count = self.count(what)
        if count > self._array_items_left:
            allowed = f"at most {MAX_ARRAY_ITEMS:,} in all arrays together"
            raise _malformed(self.file, f"{what} claims {count:,} items", allowed)
        self._array_items_left -= count
        return count

    def string(self, what: str) -> str:
        """Take a length and that many bytes of UTF-8."""
        length = self.count(what)
        if length > self._text_left and length <= self.file.size - self.position:
            raise _malformed(self.file, f"{what} has {length:,} bytes", f"at most {MAX_TEXT:,} in all texts together")
        raw = self.take(length, what)
        self._text_left -= length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _malformed(self.file, f"{what} is not UTF-8: {raw[:50]!r}", "text in UTF-8") from error

    def name(self, what: str) -> str:
        """Take a string that is safe to print."""
        name = self.string(what)
        check_name(name, self.file.path.name)
        return name

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over that many strings."""
        for _ in range(count):
            # inlined from `count` and `skip`: a vocabulary has half a million of these
            place = self.position - self._begin
            if place + 8 <= len(self._buffer):
                end = self.position + 8 + _COUNT.unpack_from(self._buffer, place)[0]
                if end <= self._begin + len(self._buffer):
                    self.position = end
                    continue
            self.skip(self.count(what), what)


def _check_version(cursor: _HeaderCursor) -> None:
    raw = cursor.take(4, "the version")
    version, swapped = int.from_bytes(raw, "little"), int.from_bytes(raw, "big")
    if version in (2, 3):
        return
    if swapped in (2, 3):
        raise _malformed(cursor.file, "it is big-endian", "a little-endian file, as nearly all are")
    raise _malformed(cursor.file, f"it has version {version}", "version 2 or 3")


def _read_metadata(cursor: _HeaderCursor, count: int) -> dict[str, Any]:
    if count > MAX_PAIRS:
        raise _malformed(cursor.file, f"it claims {count:,} metadata keys", f"at most {MAX_PAIRS:,}")
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise _malformed(cursor.file, f"the metadata key {key!r} occurs twice", "every key once")
        what = f"the value of {key!r}"
        metadata[key] = _read_value(cursor, cursor.type_id(what), what)
    return metadata


def _read_value(cursor: _HeaderCursor, value_type: int, what: str, depth: int = 0) -> Any:
    if value_type == _STRING:
        return cursor.string(what)
    if value_type == _ARRAY:
        return _read_array(cursor, what, depth + 1)
    if value_type not in _SCALARS:
        raise _malformed(cursor.file, f"{what} has the type {value_type}", "one of GGUF's types 0 to 12")
    form = "<" + _SCALARS[value_type]
    return struct.unpack(form, cursor.take(struct.calcsize(form), what))[0]


def _read_array(cursor: _HeaderCursor, what: str, depth: int) -> list[Any] | LargeArray:
    item_type, count = cursor.type_id(what), cursor.item_count(what)
    if depth > MAX_ARRAY_DEPTH:
        raise _malformed(cursor.file, f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}", "flat arrays")
    if item_type not in (_STRING, _ARRAY, *_SCALARS):
        raise _malformed(cursor.file, f"{what} has items of type {item_type}", "one of GGUF's types 0 to 12")
    if item_type == _ARRAY and count > cursor.kept_items_left:
        raise _malformed(cursor.file, f"{what} nests {count:,} arrays as items", f"at most {MAX_KEPT_ITEMS:,}")
    if item_type == _ARRAY or count <= min(SMALL_ARRAY, cursor.kept_items_left):
        cursor.kept_items_left -= count
        return [_read_value(cursor, item_type, what, depth) for _ in range(count)]
    begin = cursor.position
    if item_type == _STRING:
        cursor.skip_strings(count, what)
    else:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[item_type]), what)
    return LargeArray(item_type, count, begin, cursor.position - begin)


def _alignment(file: PinnedFile, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _malformed(file, f"its alignment is {alignment!r:.50}", f"a power of two up to {MAX_ALIGNMENT:,}")
    return alignment


def _read_tensors(cursor: _HeaderCursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    """Every tensor by name, its offset counted from where the data begin."""
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = cursor.name("a tensor name")
        if name in tensors:
            raise _malformed(cursor.file, f"the tensor {name!r} occurs twice", "every name once")
        tensors[name] = _read_tensor(cursor, name, alignment)
    return tensors


def _read_tensor(cursor: _HeaderCursor, name: str, alignment: int) -> GgufTensor:
    dimensions = cursor.type_id("the dimensions of a tensor")
    if dimensions > MAX_DIMENSIONS:
        raise _malformed(cursor.file, f"{name!r} has {dimensions:,} dimensions", f"at most {MAX_DIMENSIONS}")
    form = _EXTENTS[dimensions]
    *sizes, type_id, offset = form.unpack(cursor.take(form.size, "a tensor's shape, type and offset"))
    shape = tuple(sizes[::-1])  # the file names the fastest axis first; rows first is the reverse
    block_type = GGUF_TYPES.get(type_id)
    if block_type is None:
        known = ", ".join(known.name for known in GGUF_TYPES.values())
        raise _malformed(cursor.file, f"{name!r} has the tensor type {type_id}", f"one of {known}")
    if 0 in shape or (block_type.quantised and (not shape or shape[-1] % block_type.values)):
        rows = f"rows of a multiple of {block_type.values}"
        raise _malformed(cursor.file, f"{name!r} has the shape {shape} as {block_type.name}", rows)
    if offset % alignment:
        raise _malformed(cursor.file, f"{name!r} begins at {offset:,}", f"a multiple of {alignment}")
    nbytes = math.prod(shape) // block_type.values * block_type.nbytes
    return GgufTensor(TensorInfo(shape, block_type.name, nbytes), block_type, offset)


def _check_extents(file: PinnedFile, tensors: dict[str, GgufTensor], start: int) -> None:
    previous_end, previous = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        end = tensor.offset + tensor.info.nbytes
        if tensor.offset < previous_end:
            raise _malformed(file, f"{name!r} overlaps {previous!r}", "tensors that share no byte")
        if end > file.size - start:
            raise _malformed(file, f"{name!r} ends at byte {start + end:,} of {file.size:,}", "data inside the file")
        previous_end, previous = end, name


def _malformed(file: PinnedFile, what: str, expected: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(
        f"{str(file.path)!r} is not a sound GGUF file: {what}",
        expected=expected,
        do="fetch the file again; if it stays so, it was written wrongly or truncated",
    )
