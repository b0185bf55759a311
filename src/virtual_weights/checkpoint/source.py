"""The port through which every weight enters: names to tensors, lazily."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
