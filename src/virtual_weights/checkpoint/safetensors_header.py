"""The header of a safetensors file, read by ourselves and bounded.

The library's own reader accepts a key twice and takes any length that fits its type; this one holds
a header to the format and to the file: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from virtual_weights.checkpoint.json_text import parse_json_object
from virtual_weights.checkpoint.names import check_name
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.checkpoint.source import STORAGE_DTYPES, TensorInfo
from virtual_weights.errors import MalformedCheckpointError

MAX_HEADER = 100_000_000
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes begin in its file."""

    info: TensorInfo
    offset: int


def read_safetensors_header(file: PinnedFile) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file.

    Returns:
        Every tensor by name, in the order of the header.

    Raises:
        MalformedCheckpointError: the header contradicts the format or the file.
    """
    if file.size < 8:
        raise _malformed(file, f"it has {file.size} bytes", "at least the 8 bytes of a header length")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise _malformed(file, f"its header claims {length:,} bytes", f"at most {MAX_HEADER:,}")
    if length > file.size - 8:
        raise _malformed(file, f"its header claims {length:,} bytes of {file.size - 8:,}", "a header inside the file")
    header = parse_json_object(file.read(8, length), f"{file.path.name} (header)")
    _check_metadata(file, header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise _malformed(file, f"it claims {len(header):,} tensors", f"at most {MAX_TENSORS:,}")
    start = 8 + length
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    _check_tiling(file, tensors, start)
    return tensors


def _check_metadata(file: PinnedFile, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(file, "its __metadata__ is not a map of strings", "strings to strings")


def _tensor(file: PinnedFile, name: str, entry: Any, start: int) -> StoredTensor:
    check_name(name, file.path.name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(file, f"the entry of {name!r} is {entry!r:.200}", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE_DTYPES:
        raise _malformed(file, f"{name!r} has the type {dtype!r:.50}", f"one of {', '.join(STORAGE_DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _malformed(file, f"{name!r} has the shape {shape!r:.200}", "a list of non-negative sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(file, f"{name!r} has the offsets {offsets!r:.200}", "[begin, end] with 0 <= begin <= end")
    begin, end = offsets
    if end > file.size - start:
        raise _malformed(file, f"{name!r} ends at byte {end:,} of {file.size - start:,}", "data inside the file")
    extent = math.prod(shape) * STORAGE_DTYPES[dtype].itemsize
    if extent != end - begin:
        raise _malformed(
            file, f"{name!r} takes {end - begin:,} bytes", f"the {extent:,} bytes of {dtype} in the shape {shape}"
        )
    return StoredTensor(TensorInfo(tuple(shape), dtype, extent), start + begin)


def _check_tiling(file: PinnedFile, tensors: dict[str, StoredTensor], start: int) -> None:
    """The format leaves no byte unused and none used twice."""
    reached, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)):
        if tensor.offset != reached:
            how = "overlaps" if tensor.offset < reached else "leaves a hole after"
            raise _malformed(file, f"{name!r} {how} {before}", "tensors one behind the other without hole or overlap")
        reached, before = tensor.offset + tensor.info.nbytes, repr(name)
    if reached != file.size:
        raise _malformed(
            file, f"{file.size - reached:,} bytes follow the last tensor", "a file that ends with its data"
        )


def _are_counts(value: Any) -> bool:
    # 2**63: what JSON may claim and no file can hold, kept from being multiplied or printed
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _malformed(file: PinnedFile, what: str, expected: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(
        f"{str(file.path)!r} is not a sound safetensors file: {what}",
        expected=expected,
        do="fetch the file again; if it stays so, it was written wrongly or truncated",
    )
