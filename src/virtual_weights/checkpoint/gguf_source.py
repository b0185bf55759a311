"""A checkpoint in a GGUF file, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from virtual_weights.checkpoint.gguf_header import (
    GgufHeader,
    GgufTensor,
    LargeArray,
    large_numbers,
    large_strings,
    read_gguf_header,
)
from virtual_weights.checkpoint.pinned_file import PinnedFile, allocate, pin, read_tensor
from virtual_weights.checkpoint.source import (
    STORAGE_DTYPES,
    AtRest,
    Source,
    TensorInfo,
    check_finite,
    find_tensor,
    fingerprint,
    row_span,
)
from virtual_weights.checkpoint.token_text import texts_of_gguf

_VALUES_AT_ONCE = 1 << 22
_LITERAL_TOKENS = (3, 4)  # control and user-defined, in llama.cpp's count of token types


class GgufSource(Source):
    """Tensors of a GGUF file; plain types in storage dtype, block-quantised ones as float32.

    ``config`` is the metadata under its own dotted keys, without the vocabulary.

    Args:
        file: the file.
        header: its header.
        config: replaces the metadata as configuration; None keeps it.
        reference: the name to open it again.
        allow_non_finite: do not refuse NaN and infinity.
    """

    def __init__(
        self,
        file: PinnedFile,
        header: GgufHeader,
        config: Mapping[str, Any] | None,
        reference: str,
        *,
        allow_non_finite: bool = False,
    ) -> None:
        self._file = file
        self._header = header
        self._reference = reference
        self._allow_non_finite = allow_non_finite
        self._config = MappingProxyType(dict(_config(header.metadata) if config is None else config))
        self._tensors = MappingProxyType({name: tensor.info for name, tensor in header.tensors.items()})

    @property
    def reference(self) -> str:
        return self._reference

    @property
    def dialect(self) -> str:
        return "gguf"

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.dialect, self._config, self._tensors, self._read_bytes)

    @property
    def at_rest(self) -> AtRest:
        return AtRest((tuple(self._tensors),), {}, self._file.path)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        info = find_tensor(self._tensors, name)
        stored = self._header.tensors[name]
        span = row_span(name, info.shape, rows)
        shape, offset = info.shape, stored.offset
        if span is not None:
            offset += span[0] * (info.nbytes // shape[0])
            shape = (span[1] - span[0], *shape[1:])
        if stored.kind.quantised:
            tensor = _dequantise(self._file, stored, offset, shape)
        else:
            tensor = read_tensor(self._file, offset, shape, STORAGE_DTYPES[info.dtype])
        return tensor if self._allow_non_finite else check_finite(tensor, name, span[0] if span else 0)

    def token_texts(self) -> tuple[str, ...] | None:
        model = self._header.metadata.get("tokenizer.ggml.model")
        tokens = self._array("tokenizer.ggml.tokens")
        if not isinstance(model, str) or tokens is None:
            return None
        kinds = self._array("tokenizer.ggml.token_type") or []
        literal = [kind in _LITERAL_TOKENS for kind in kinds[: len(tokens)]]
        literal += [False] * (len(tokens) - len(literal))
        return texts_of_gguf(model, [str(token) for token in tokens], literal)

    def _array(self, key: str) -> list[Any] | None:
        """An array of the metadata, fetched from the file if it was passed over."""
        value = self._header.metadata.get(key)
        if isinstance(value, LargeArray):
            raw = self._file.read(value.offset, value.nbytes)
            strings = value.kind == 8
            return large_strings(raw, value.count) if strings else large_numbers(raw, value.kind, value.count)
        return value if isinstance(value, list) else None

    def _read_bytes(self, name: str, begin: int, end: int) -> bytes:
        return self._file.read(self._header.tensors[name].offset + begin, end - begin)


def open_gguf(
    path: Path, *, reference: str, config: Mapping[str, Any] | None = None, allow_non_finite: bool = False
) -> GgufSource:
    """Open a GGUF file.

    Raises:
        CheckpointError: it cannot be read, or contradicts its format.
        UnsafeCheckpointError: it is no regular file.
    """
    file = pin(path)
    return GgufSource(file, read_gguf_header(file), config, reference, allow_non_finite=allow_non_finite)


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in metadata.items()
        if not isinstance(value, LargeArray) and not (key.startswith("tokenizer.") and isinstance(value, list))
    }


def _dequantise(file: PinnedFile, stored: GgufTensor, offset: int, shape: tuple[int, ...]) -> Tensor:
    """Dequantise block rows group by group, so that only the result takes memory."""
    import gguf

    kind, type_ = stored.kind, gguf.GGMLQuantizationType(stored.type_id)
    row_bytes = shape[-1] // kind.values * kind.nbytes
    result = allocate(shape, torch.float32)
    flat = result.reshape(-1, shape[-1])
    group = max(1, _VALUES_AT_ONCE // shape[-1])
    for begin in range(0, len(flat), group):
        count = min(group, len(flat) - begin)
        raw = file.read(offset + begin * row_bytes, count * row_bytes)
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(count, row_bytes)
        with np.errstate(all="ignore"):  # an infinite scale gives NaN, which is judged after
            flat[begin : begin + count] = torch.from_numpy(gguf.dequantize(blocks, type_))
    return result
