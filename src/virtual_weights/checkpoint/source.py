"""The port through which every weight enters: names to tensors, lazily."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from virtual_weights.errors import MissingTensorError, NonFiniteError, UsageError


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes:
        shape: its shape as stored, rows first (GGUF's reversed order is undone).
        dtype: the storage type by its own name (``"F32"``, ``"BF16"``, ``"Q4_K"``).
        nbytes: how many bytes it takes at rest.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class AtRest:
    """How a checkpoint lies on the disk, for whoever writes another one like it.

    Attributes:
        files: names of tensors, file by file; one group where nothing is divided.
        companions: further files of the checkpoint (tokenizer, generation settings) by their bare names.
        path: the folder of a checkpoint in safetensors, or the GGUF file; None for one in memory.
    """

    files: tuple[tuple[str, ...], ...]
    companions: Mapping[str, Path]
    path: Path | None


class Source(ABC):
    """Names to tensors of one checkpoint; knows files and formats, not models.

    A source opens cheaply, reads nothing until asked, and never changes. ``config`` is the
    configuration in the vocabulary of the format: the fields of ``config.json``, or the metadata
    of a GGUF file under its own dotted keys.
    """

    @property
    @abstractmethod
    def reference(self) -> str:
        """The name under which a user can open this checkpoint again."""

    @property
    @abstractmethod
    def dialect(self) -> str:
        """Whose tensor names these are: ``"hf"``, ``"gguf"`` or ``"transformer_lens"``."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The configuration, as plain JSON values."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, without reading any."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hex sha256 of the dialect, the configuration and every tensor's name, type, shape and content.

        Content is sampled, since hashing 16 GB at each start would cost more than most questions: all
        bytes of a tensor up to 192 KiB, else its first, middle and last 64 KiB as stored. A change that
        leaves all samples alone is therefore not seen. File names, times and the division into shards
        do not count, so that the same weights have the same fingerprint wherever they lie.
        """

    @property
    @abstractmethod
    def at_rest(self) -> AtRest:
        """Division into files, and what lies beside them."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor, or some of its first axis, in storage dtype (block-quantised types: float32).

        Args:
            name: one of ``tensors``.
            rows: a contiguous slice of the first axis, step 1; None reads all.

        Returns:
            A tensor on the CPU that does not alias the file.

        Raises:
            MissingTensorError: there is no such name (near names are listed).
            UsageError: the slice is empty, stepped, counts from the end, or leaves the tensor.
            NonFiniteError: a value is NaN or infinite and that was not allowed.
            MalformedCheckpointError: the file changed or shrank after it was opened.
        """

    @abstractmethod
    def token_texts(self) -> tuple[str, ...] | None:
        """The text of every token id, or None when the checkpoint carries no tokenizer."""


STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Every storage type that torch holds as it is, by its name in the safetensors format."""


def find_tensor(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    """Look up a tensor.

    Raises:
        MissingTensorError: there is no such name; near names are listed.
    """
    info = tensors.get(name)
    if info is not None:
        return info
    near = get_close_matches(str(name), tensors, n=3, cutoff=0.5)
    raise MissingTensorError(
        f"there is no tensor {name!r} among {len(tensors)}",
        expected=f"one of the checkpoint's names, such as {', '.join(map(repr, near or sorted(tensors)[:3]))}",
        do="take a name from the source's `tensors`",
    )


def row_span(name: str, shape: tuple[int, ...], rows: slice | None) -> tuple[int, int] | None:
    """Check a slice of the first axis.

    Returns:
        (start, stop) with 0 <= start < stop <= shape[0], or None when everything is asked for.

    Raises:
        UsageError: the slice is empty, stepped, counts from the end, or leaves the tensor.
    """
    if rows is None:
        return None
    length = shape[0] if shape else 0
    start = 0 if rows.start is None else rows.start
    stop = length if rows.stop is None else rows.stop
    if rows.step in (None, 1) and 0 <= start < stop <= length:
        return start, stop
    raise UsageError(
        f"rows {rows.start}:{rows.stop}:{rows.step} of {name!r}, whose shape is {shape}",
        expected=f"0 <= start < stop <= {length}, step 1",
        do="ask for rows that the tensor has, or leave `rows` out to read all of it",
    )


BLOCK = 64 * 1024


def fingerprint(
    dialect: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    read_bytes: Callable[[str, int, int], bytes],
) -> str:
    """Hash what ``Source.fingerprint`` promises.

    Args:
        dialect: whose names these are.
        config: plain JSON values.
        tensors: every tensor by name.
        read_bytes: gives bytes [begin, end) of a tensor as stored.

    Returns:
        A hex sha256.
    """
    total = sha256(_canonical(["virtual-weights 1", dialect, config]))
    for name in sorted(tensors):
        info = tensors[name]
        content = sha256()
        for begin, end in sampled_spans(info.nbytes):
            content.update(read_bytes(name, begin, end))
        total.update(_canonical([name, info.dtype, info.shape, content.hexdigest()]))
    return total.hexdigest()


def sampled_spans(nbytes: int) -> tuple[tuple[int, int], ...]:
    """The byte ranges of a tensor that count: all of it up to three blocks, else start, middle and end."""
    if nbytes <= 3 * BLOCK:
        return ((0, nbytes),) if nbytes else ()
    return tuple((begin, begin + BLOCK) for begin in (0, (nbytes - BLOCK) // 2, nbytes - BLOCK))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict).encode("ascii")


_CHUNK = 1 << 22


def check_finite(tensor: Tensor, name: str, first_row: int = 0) -> Tensor:
    """Return the tensor as it is.

    Args:
        tensor: what was read.
        name: its name, for the error.
        first_row: which row of the named tensor its first row is.

    Raises:
        NonFiniteError: a value is NaN or infinite; the error says which.
    """
    if not tensor.is_floating_point():
        return tensor
    flat = tensor.reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        if chunk.dtype.itemsize == 1:
            chunk = chunk.float()  # torch compares no float8
        # both ends of the range are NaN if any value is: one pass, nothing allocated
        if not torch.stack(torch.aminmax(chunk)).isfinite().all():
            bad = begin + int((~chunk.isfinite()).nonzero()[0])
            raise _refusal(tensor, bad, name, first_row)
    return tensor


def _refusal(tensor: Tensor, flat_index: int, name: str, first_row: int) -> NonFiniteError:
    value = float(tensor.reshape(-1)[flat_index])
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat_index), tensor.shape)]
    if index:
        index[0] += first_row
    return NonFiniteError(
        f"{name}[{', '.join(map(str, index))}] is {value}",
        expected="finite weights",
        do="repair the checkpoint, or allow non-finite values if they are meant",
    )
