"""The port through which every weight enters: names to tensors, lazily."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from virtual_weights.checkpoint.pinned_file import PinnedFile, recall, remember
from virtual_weights.errors import MissingTensorError, NonFiniteError, UsageError
from virtual_weights.progress import Progress, silent

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in STORAGE_DTYPES.items()}

_BYTES_AT_ONCE = 8 << 20
_VALUES_AT_ONCE = 1 << 22


@final
@dataclass(frozen=True, slots=True)
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

    def begin_of(self, row: int) -> int:
        """The byte at which a row begins, counted from the tensor's first."""
        return row * self.nbytes // self.shape[0] if row else 0


@final
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


@final
@dataclass(frozen=True)
class Opening:
    """The options with which a checkpoint file or folder is opened.

    Attributes:
        reference: the name under which it can be opened again.
        config: replaces the checkpoint's configuration; None keeps it.
        allow_non_finite: do not refuse NaN and infinity.
    """

    reference: str
    config: Mapping[str, Any] | None
    allow_non_finite: bool


class Source(ABC):
    """Names to tensors of one checkpoint; knows files and formats, not models.

    A source opens cheaply, reads no tensor before it is asked to, and never changes. A format adds how it reads rows
    and stored bytes; looking up, checking and hashing are the same for all.

    Args:
        reference, dialect, config, tensors: as the properties of these names; the configuration in plain JSON values.
        allow_non_finite: do not refuse NaN and infinity.
    """

    def __init__(
        self,
        reference: str,
        dialect: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        *,
        allow_non_finite: bool,
    ) -> None:
        self._reference = reference
        self._dialect = dialect
        self._config = MappingProxyType(dict(config))
        self._tensors = MappingProxyType(dict(tensors))
        self._allow_non_finite = allow_non_finite
        self._identity: tuple[object, str] | None = None

    @property
    def reference(self) -> str:
        """The name under which a user can open this checkpoint again."""
        return self._reference

    @property
    def recipe(self) -> dict[str, Any]:
        """What ``open_source`` takes to open it again, of files alone."""
        config = dict(self._config) if self._dialect == "hf" else None
        return {"reference": self._reference, "config": config, "allow_non_finite": self._allow_non_finite}

    @property
    def dialect(self) -> str:
        """Whose tensor names these are: ``"hf"``, ``"gguf"`` or ``"transformer_lens"``."""
        return self._dialect

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration in the vocabulary of the format: ``config.json``, or GGUF's metadata by dotted keys."""
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, without reading any."""
        return self._tensors

    @property
    def fingerprint(self) -> str:
        """A hex sha256 of the dialect, the configuration and every tensor's name, type, shape and content.

        Every byte counts, so that a model in which one head was replaced is another one. File names, times and the
        division into files do not count: the same weights have the same fingerprint wherever they lie. Only in the
        hub's own cache, whose files are named by the sha256 of their content, content is what that name says, unread.

        It is computed when somebody first asks for it, which reads every tensor, and remembered on this machine by the
        files' paths, sizes, times and inodes.
        """
        state = self._state()
        if self._identity is None or self._identity[0] != state:
            self._identity = state, self._remembered(silent)
        return self._identity[1]

    def identify(self, progress: Progress = silent) -> str:
        """The fingerprint; of tensors in memory computed anew, since they may have been changed without a trace.

        Args:
            progress: called with (bytes hashed, bytes in all).

        Raises:
            MalformedCheckpointError: the file changed or shrank after it was opened.
        """
        if self._identity is None or not self.files:
            self._identity = self._state(), self._remembered(progress)
        return self._identity[1]

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        """The files that tensors are read from, each of which must stay what it was; none where they are in memory."""
        return ()

    def _state(self) -> object:
        """What differs where the content may differ; files that change are refused when they are read."""
        return None

    def _remembered(self, progress: Progress) -> str:
        """The fingerprint as it was computed before of the same files, or computed now."""
        if not self.files:
            return self._hashed(progress)
        stamps = [file.identity() for file in self.files]
        key = sha256(_canonical(["fingerprint 2", self._dialect, self._config, stamps])).hexdigest()
        fingerprint = recall(key)
        if fingerprint is None:
            fingerprint = self._hashed(progress)
            if stamps == [file.identity() for file in self.files] and all(file.is_settled() for file in self.files):
                remember(key, fingerprint)
        return fingerprint

    def _hashed(self, progress: Progress) -> str:
        total = sha256(_canonical(["virtual-weights 2", self._dialect, self._config]))
        done, size = 0, sum(info.nbytes for info in self._tensors.values())
        for name, info in sorted(self._tensors.items()):
            digest = self._published(name)
            if digest is None:
                content = sha256()
                for begin in range(0, info.nbytes, _BYTES_AT_ONCE):
                    content.update(self._stored_bytes(name, begin, min(begin + _BYTES_AT_ONCE, info.nbytes)))
                    progress(done + min(begin + _BYTES_AT_ONCE, info.nbytes), size)
                digest = content.hexdigest()
            total.update(_canonical([name, info.dtype, info.shape, digest]))
            done += info.nbytes
        progress(size, size)
        return total.hexdigest()

    def _published(self, name: str) -> str | None:  # noqa: ARG002
        """What stands for a tensor's content where its publisher has hashed the file that holds it."""
        return None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor, or some of its first axis, in storage dtype.

        What torch cannot multiply as stored comes with the same values in another type: block-quantised types as
        float32, float8 as float64, in which its products with float32 gains are exact.

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
        if name not in self._tensors:
            raise _missing(name, self._tensors)
        first_row, shape = _span(name, self._tensors[name].shape, rows)
        tensor = self._read(name, first_row, shape)
        if not self._allow_non_finite:
            _check_finite(tensor, name, first_row)
        return tensor.to(torch.float64) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and values; read in parts, up to the first that differs."""
        one, two = self._tensors[first], self._tensors[second]
        if one.shape != two.shape:
            return False
        step = max(1, _VALUES_AT_ONCE // max(1, math.prod(one.shape[1:])))
        for begin in range(0, one.shape[0] if one.shape else 1, step):
            shape = (min(step, one.shape[0] - begin), *one.shape[1:]) if one.shape else ()
            parts = [self._read(name, begin, shape).to(torch.float64) for name in (first, second)]
            if not torch.equal(parts[0], parts[1]):
                return False
        return True

    def zero(self, name: str) -> bool:
        """Whether a tensor holds nothing but zeros."""
        return not bool(self.read(name).any())

    @property
    @abstractmethod
    def at_rest(self) -> AtRest:
        """Division into files, and what lies beside them."""

    @abstractmethod
    def token_texts(self) -> tuple[str, ...] | None:
        """The text of every token id, or None when the checkpoint carries no tokenizer."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """A tokenizer made of what the checkpoint carries, ``tokenizer().encode(text).ids``; None where it has none.

        Raises:
            UsageError: it carries one that cannot be read, or the tokenizers library is not installed.
            MalformedCheckpointError: it is not a sound one.
        """

    @abstractmethod
    def _read(self, name: str, first_row: int, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor, or a span of its rows, into fresh memory of the CPU.

        Args:
            name: one of ``tensors``.
            first_row: the first row of the span; 0 for a whole tensor.
            shape: of what is read: the tensor's, with the number of rows of the span.
        """

    @abstractmethod
    def _stored_bytes(self, name: str, begin: int, end: int) -> bytes:
        """The bytes [begin, end) of a tensor as stored."""


def text_of(texts: Sequence[str] | None, token: int) -> str | None:
    """A token's text; None where there is no tokenizer, or it has no such token, as of rows that pad a vocabulary."""
    return (texts[token] or None) if texts is not None and token < len(texts) else None


_WRAPPERS = ("module.", "language_model.", "_forward_module.", "base_model.model.")
_MARKS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names of tensors without what wrapping a model has put before or into them.

    ``_orig_mod.`` (torch.compile) and the like go wherever they stand; ``module.`` (data parallel), ``language_model.``
    (the text model of a larger one) and the like only where every name begins so. Where two names would become one,
    all stay as they are.

    Example:
        >>> plain_names(["module._orig_mod.embed.weight", "module._orig_mod.norm.weight"])
        {'embed.weight': 'module._orig_mod.embed.weight', 'norm.weight': 'module._orig_mod.norm.weight'}
    """
    stored = list(names)
    plain = [_MARKS.sub("", name) for name in stored]
    while prefix := next((p for p in _WRAPPERS if plain and all(name.startswith(p) for name in plain)), ""):
        plain = [name.removeprefix(prefix) for name in plain]
    result = dict(zip(plain, stored, strict=True))
    return result if len(result) == len(stored) and "" not in result else {name: name for name in stored}


def _missing(name: str, tensors: Mapping[str, TensorInfo]) -> MissingTensorError:
    near_names = get_close_matches(str(name), tensors, n=3, cutoff=0.5) or sorted(tensors)[:3]
    return MissingTensorError(
        f"there is no tensor {name!r} among {len(tensors)}",
        expected=f"one of the checkpoint's names, such as {', '.join(map(repr, near_names))}",
        do="take a name from the source's `tensors`",
    )


def _span(name: str, shape: tuple[int, ...], rows: slice | None) -> tuple[int, tuple[int, ...]]:
    """First row and shape of what a slice of the first axis selects; refuses all but 0 <= start < stop <= rows."""
    if rows is None:
        return 0, shape
    length = shape[0] if shape else 0
    start = 0 if rows.start is None else rows.start
    stop = length if rows.stop is None else rows.stop
    if rows.step in (None, 1) and 0 <= start < stop <= length:
        return start, (stop - start, *shape[1:])
    raise UsageError(
        f"rows {rows.start}:{rows.stop}:{rows.step} of {name!r}, whose shape is {shape}",
        expected=f"0 <= start < stop <= {length}, step 1",
        do="ask for rows that the tensor has, or leave `rows` out to read all of it",
    )


def _check_finite(tensor: Tensor, name: str, first_row: int) -> None:
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for begin in range(0, flat.numel(), _VALUES_AT_ONCE):
        chunk = flat[begin : begin + _VALUES_AT_ONCE]
        if chunk.dtype.itemsize == 1:
            chunk = chunk.float()  # torch compares no float8
        # both ends of the range are NaN if any value is: one pass, nothing allocated
        if not torch.stack(torch.aminmax(chunk)).isfinite().all():
            offender = begin + int((~chunk.isfinite()).nonzero()[0])
            raise _non_finite(tensor, offender, name, first_row)


def _non_finite(tensor: Tensor, flat_index: int, name: str, first_row: int) -> NonFiniteError:
    value = float(tensor.reshape(-1)[flat_index])
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat_index), tensor.shape)]
    if index:
        index[0] += first_row
    return NonFiniteError(
        f"{name}[{', '.join(map(str, index))}] is {value}",
        expected="finite weights",
        do="repair the checkpoint, or allow non-finite values if they are meant",
    )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict).encode("ascii")
