"""A checkpoint in a GGUF file, quantised or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from virtual_weights.checkpoint.folder import pin_inside
from virtual_weights.checkpoint.gguf_header import BlockType, GgufHeader, LargeArray, read_gguf_header
from virtual_weights.checkpoint.pinned_file import PinnedFile, allocate, read_tensor
from virtual_weights.checkpoint.source import STORAGE_DTYPES, AtRest, Opening, Source
from virtual_weights.checkpoint.tokenizer import LITERAL, texts_of_gguf, tokenizer_of_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_VALUES_AT_ONCE = 1 << 17  # what is in use while they are dequantised stays in a cache


@final
class GgufSource(Source):
    """Tensors of a GGUF file; plain types in storage dtype, block-quantised ones as float32.

    ``config`` is the metadata under its own dotted keys, without the vocabulary; of a large array it says the length.

    Args:
        file: the file.
        header: its header.
        opening: the options.
    """

    def __init__(self, file: PinnedFile, header: GgufHeader, opening: Opening) -> None:
        config = _config(header.metadata) if opening.config is None else opening.config
        tensors = {name: stored.info for name, stored in header.tensors.items()}
        super().__init__(opening.reference, "gguf", config, tensors, allow_non_finite=opening.allow_non_finite)
        self._file = file
        self._header = header

    @property
    def at_rest(self) -> AtRest:
        return AtRest((tuple(self.tensors),), {}, self._file.path)

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        return (self._file,)

    def token_texts(self) -> tuple[str, ...] | None:
        model = self._header.metadata.get("tokenizer.ggml.model")
        tokens = self._array("tokenizer.ggml.tokens")
        if not isinstance(model, str) or tokens is None:
            return None
        token_types = self._array("tokenizer.ggml.token_type") or []
        literal = [token_type in LITERAL for token_type in token_types[: len(tokens)]]
        literal += [False] * (len(tokens) - len(literal))
        return texts_of_gguf(model, [str(token) for token in tokens], literal)

    def tokenizer(self) -> Tokenizer:
        return tokenizer_of_gguf(str(self._file.path), self._header.metadata, self._array)

    def _read(self, name: str, first_row: int, shape: tuple[int, ...]) -> Tensor:
        stored = self._header.tensors[name]
        offset = self._header.start + stored.offset + stored.info.begin_of(first_row)
        if stored.block_type.quantised:
            return _dequantise(self._file, stored.block_type, offset, shape)
        return read_tensor(self._file, offset, shape, STORAGE_DTYPES[stored.info.dtype])

    def _stored_bytes(self, name: str, begin: int, end: int) -> bytes:
        return self._file.read(self._header.start + self._header.tensors[name].offset + begin, end - begin)

    def _array(self, key: str) -> list[Any] | None:
        """An array of the metadata, fetched from the file if it was passed over."""
        value = self._header.metadata.get(key)
        if isinstance(value, LargeArray):
            return value.read(self._file)
        return value if isinstance(value, list) else None


def open_gguf(path: Path, opening: Opening) -> GgufSource:
    """Open a GGUF file.

    Raises:
        CheckpointError: it cannot be read, or contradicts its format.
        UnsafeCheckpointError: it is not a regular file.
    """
    file = pin_inside(path.parent, path.name)
    return GgufSource(file, read_gguf_header(file), opening)


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: f"<an array of {value.count:,} items>" if isinstance(value, LargeArray) else value
        for key, value in metadata.items()
        if not (key.startswith("tokenizer.") and isinstance(value, (list, LargeArray)))
    }


def _dequantise(file: PinnedFile, block_type: BlockType, offset: int, shape: tuple[int, ...]) -> Tensor:
    """Dequantise block rows group by group, so that only the result takes memory, each group as one long row.

    (The library divides an array of many rows into groups of 16, which are short where a model is narrow.)
    """
    import gguf

    quantisation = gguf.GGMLQuantizationType[block_type.name]
    row_bytes = shape[-1] // block_type.values * block_type.nbytes
    result = allocate(shape, torch.float32)
    flat = result.reshape(-1, shape[-1])
    group = max(1, _VALUES_AT_ONCE // shape[-1])
    for begin in range(0, len(flat), group):
        count = min(group, len(flat) - begin)
        raw = file.read(offset + begin * row_bytes, count * row_bytes)
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(1, -1)
        with np.errstate(all="ignore"):  # an infinite scale gives NaN, which `Source.read` then refuses
            values = torch.from_numpy(gguf.dequantize(blocks, quantisation))
        flat[begin : begin + count] = values.view(count, -1)
    return result
