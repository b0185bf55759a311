"""The header of a GGUF file (versions 2 and 3, little-endian), read by ourselves and bounded.

gguf's own reader loops on a hostile header of 49 bytes and accepts overlapping tensors.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from virtual_weights.checkpoint.gguf_bytes import HeaderCursor, malformed_gguf
from virtual_weights.checkpoint.gguf_metadata import read_metadata
from virtual_weights.checkpoint.gguf_types import GGUF_TYPES, BlockType
from virtual_weights.checkpoint.names import check_name
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.checkpoint.source import TensorInfo

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
