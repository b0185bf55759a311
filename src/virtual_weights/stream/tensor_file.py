"""Tensors of a run in one safetensors file that knows its format, the checkpoint that ran, and its own checksum."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from virtual_weights.checkpoint.writing import bytes_of, write_safetensors
from virtual_weights.errors import RecordError
from virtual_weights.record.durable import reading, replacing

Result = TypeVar("Result")
MAX_HEADER = 8 << 20


def write_tensors(path: str | Path, form: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one file, whole or not at all; its metadata hold the format, a checksum and what is given.

    Raises:
        UsageError: the file's folder does not exist, or the system does not let us write there.
        ResourceError: the disk is full.
    """
    metadata = {"format": form, **metadata}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    shapes = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
    with replacing(Path(path)) as aside:
        checksum = _checksum(tensors, metadata)
        write_safetensors(aside, shapes, (tensors[name] for name in names), {**metadata, "checksum": checksum})


def read_tensors(
    path: str | Path, form: str, make: Callable[[dict[str, dict[str, Tensor]], dict[str, str]], Result], what: str
) -> Result:
    """Read what ``write_tensors`` wrote.

    Args:
        path: the file.
        form: the format that it must have.
        make: makes the result of tensors by kind and key (``"kind/key"`` in the file) and of the metadata.
        what: what is expected there, for the error.

    Raises:
        RecordError: the file is not there, has another format, was changed since it was written, or ``make`` misses
            something.
    """
    from safetensors import SafetensorError  # here, since importing the package is cheap by promise
    from safetensors.torch import load

    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with reading(Path(path)) as file:  # not mapped: a mapped file that shrinks ends the process
            raw = file.read()
        length = int.from_bytes(raw[:8], "little")
        if length > MAX_HEADER:
            raise ValueError(f"its header claims {length:,} bytes")
        tensors, header = load(raw), json.loads(raw[8 : 8 + length])
        metadata: dict[str, str] = header.get("__metadata__") or {}
        if metadata.get("format") != form:
            raise ValueError(f"format {metadata.get('format')!r:.100}")
        if metadata.pop("checksum", None) != _checksum(tensors, metadata):
            raise ValueError("it was changed after it was written: its checksum differs")
        for name, tensor in tensors.items():
            if tensor.itemsize < 2:  # torch can neither compare nor multiply float8
                raise ValueError(f"{name!r} has the type {tensor.dtype}")
            kind, _, key = name.partition("/")
            parts.setdefault(kind, {})[key] = tensor
        return make(parts, metadata)
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read: {error.strerror or error}",
            expected=f"a file of {what}",
            do=f"name the file in which vweights observe wrote its {what}",
        ) from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise RecordError(
            f"{path} is not a file of {what}: {error}",
            expected=f"a safetensors file of format {form!r}",
            do=f"name the file in which vweights observe wrote its {what}",
        ) from error


def identity(tensors: Mapping[str, Tensor], description: str) -> str:
    """A hex sha256 of tensors and of a text."""
    return _checksum(tensors, {"of": description})


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    total = sha256(json.dumps(dict(metadata), sort_keys=True).encode("ascii"))
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode("ascii"))
        total.update(bytes_of(tensor))
    return total.hexdigest()
