"""Arrays that numpy wrote, read by byte range; nothing is unpickled.

The formats: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, and a zip archive of such files.
"""

from __future__ import annotations

import ast
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from virtual_weights.checkpoint.dictionaries.tables import Tensors, malformed
from virtual_weights.checkpoint.folder import pin_inside
from virtual_weights.checkpoint.mapping_source import MappingSource
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.checkpoint.safetensors_source import SafetensorsSource, StoredTensor
from virtual_weights.checkpoint.source import Opening, TensorInfo
from virtual_weights.errors import UnsafeCheckpointError

_MAX_HEADER = 1 << 16
_MAX_MEMBERS = 64
_MAX_PACKED = 8 << 30
_DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "|b1": "BOOL"}


def open_npy(path: Path) -> Tensors:
    """Open one array under the name ``"array"``.

    Raises:
        CheckpointError: it is not sound.
        UnsafeCheckpointError: it holds pickled objects.
    """
    file = pin_inside(path.parent, path.name)
    return _tensors(path, {"array": _array(file, "array", 0, file.size)}, {})


def open_npz(path: Path, settings: Mapping[str, Any]) -> Tensors:
    """Open an archive of arrays; those that are packed (``savez_compressed``) are unpacked into memory.

    Args:
        path: of the archive.
        settings: count in its fingerprint.

    Raises:
        CheckpointError: it is not sound.
        UnsafeCheckpointError: it holds pickled objects.
    """
    file = pin_inside(path.parent, path.name)
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = archive.infolist()
            if not 0 < len(members) <= _MAX_MEMBERS or len({member.filename for member in members}) != len(members):
                raise malformed(
                    str(path), f"it has {len(members)} members", f"1 to {_MAX_MEMBERS} with names of their own"
                )
            names = [member.filename.removesuffix(".npy") for member in members]
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                packed = {name: _unpacked(archive, member, path) for name, member in zip(names, members, strict=True)}
                return Tensors(MappingSource(packed, settings, reference=str(path)), str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise malformed(
            str(path), f"the archive cannot be read: {error!s:.200}", "an archive of numpy.savez"
        ) from error
    stored = {
        name: _array(file, name, _begin(file, member), member.file_size)
        for name, member in zip(names, members, strict=True)
    }
    return _tensors(path, stored, settings)


def _tensors(path: Path, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Tensors:
    return Tensors(SafetensorsSource(path.parent, stored, Opening(str(path), settings, False)), str(path))


def _begin(file: PinnedFile, member: zipfile.ZipInfo) -> int:
    """Where the content of an archive's member begins: behind its local header of 30 bytes, name and extra field."""
    if member.header_offset + 30 > file.size:
        raise malformed(str(file.path), f"{member.filename!r} lies outside it", "a whole archive")
    header = file.read(member.header_offset, 30)
    name, extra = struct.unpack("<HH", header[26:30])
    begin = member.header_offset + 30 + name + extra
    if header[:4] != b"PK\x03\x04" or begin + member.file_size > file.size:
        raise malformed(str(file.path), f"{member.filename!r} lies outside it", "a whole archive")
    return begin


def _array(file: PinnedFile, name: str, begin: int, length: int) -> StoredTensor:
    """An array by its header, without its values."""
    where = f"{file.path} ({name})"
    start = file.read(begin, min(12, length))
    if start[:6] != b"\x93NUMPY" or len(start) < 12 or start[6] not in (1, 2, 3):
        raise malformed(where, f"it begins with {start[:8]!r}", "an array of numpy")
    at, size = _header_span(start)
    if size > _MAX_HEADER or at + size > length:
        raise malformed(where, f"its header claims {size:,} bytes", f"at most {_MAX_HEADER:,}, inside the file")
    shape, dtype = _header(where, file.read(begin + at, size))
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if at + size + nbytes != length:
        raise malformed(
            where, f"{shape} of {dtype} take {nbytes:,} bytes of {length - at - size:,}", "as many as there are"
        )
    return StoredTensor(TensorInfo(shape, _DTYPES[dtype], nbytes), file, begin + at + size)


def _header_span(start: bytes) -> tuple[int, int]:
    """Where the header of an array begins, and its length: of 2 bytes in version 1 of the format, of 4 since."""
    at = 10 if start[6:7] == b"\x01" else 12
    return at, int.from_bytes(start[8:at], "little")


def _header(where: str, raw: bytes) -> tuple[tuple[int, ...], str]:
    try:
        header: Any = ast.literal_eval(raw.decode("latin-1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise malformed(where, "its header is no literal", "descr, fortran_order and shape") from error
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise malformed(where, f"its header is {header!r:.200}", "descr, fortran_order and shape")
    dtype, shape = header["descr"], header["shape"]
    if isinstance(dtype, str) and "O" in dtype:
        raise UnsafeCheckpointError(
            f"{where!r} holds pickled objects, which can run any code when they are opened",
            expected="arrays of numbers",
            do="write the numbers alone with numpy.savez where the file's origin is trusted",
        )
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise malformed(where, f"its type is {dtype!r:.100}", f"one of {', '.join(_DTYPES)}")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
        raise malformed(where, f"its shape is {shape!r:.200}", "a tuple of sizes")
    if header["fortran_order"] is True and len(shape) > 1:
        raise malformed(where, "its values lie in Fortran's order", "C order", "write numpy.ascontiguousarray of it")
    return shape, dtype


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Tensor:
    if member.file_size > _MAX_PACKED or member.compress_size * 1100 < member.file_size:
        raise malformed(
            str(path),
            f"{member.filename!r} unpacks from {member.compress_size:,} to {member.file_size:,} bytes",
            f"at most {_MAX_PACKED:,}",
            "write the arrays unpacked, with numpy.savez",
        )
    raw = archive.read(member)
    at, size = _header_span(raw)
    where = f"{path} ({member.filename})"
    if raw[:6] != b"\x93NUMPY" or size > _MAX_HEADER or at + size > len(raw):
        raise malformed(where, f"it begins with {raw[:8]!r}", "an array of numpy")
    shape, dtype = _header(where, raw[at : at + size])
    values = np.frombuffer(raw, dtype, offset=at + size)
    if values.size != math.prod(shape):
        raise malformed(where, f"{values.size:,} values for the shape {shape}", "as many as the shape says")
    return torch.from_numpy(values.reshape(shape).copy())
