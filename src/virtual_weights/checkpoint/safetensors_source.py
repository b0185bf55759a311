"""A checkpoint in safetensors files: one, or several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from virtual_weights.checkpoint.byte_tensor import read_tensor
from virtual_weights.checkpoint.fingerprint import fingerprint
from virtual_weights.checkpoint.finite import check_finite
from virtual_weights.checkpoint.folder import pin_inside, read_config, read_index
from virtual_weights.checkpoint.pinned_file import PinnedFile, pin
from virtual_weights.checkpoint.request import find_tensor, row_span
from virtual_weights.checkpoint.safetensors_header import StoredTensor, read_safetensors_header
from virtual_weights.checkpoint.source import STORAGE_DTYPES, AtRest, Source, TensorInfo
from virtual_weights.checkpoint.token_text import texts_of_tokenizer_json
from virtual_weights.errors import MalformedCheckpointError, MissingTensorError, UnsafeCheckpointError

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that belong to a model without holding weights."""

Placed = Mapping[str, tuple[PinnedFile, StoredTensor]]


class SafetensorsSource(Source):
    """Tensors in safetensors files, read by byte range; names and configuration as Hugging Face gives them.

    Args:
        placed: every tensor by name, with the file that holds it.
        config: the configuration.
        reference: the name to open it again.
        folder: where ``tokenizer.json`` would lie.
        allow_non_finite: do not refuse NaN and infinity.
    """

    def __init__(
        self, placed: Placed, config: Mapping[str, Any], reference: str, folder: Path, *, allow_non_finite: bool = False
    ) -> None:
        self._placed = placed
        self._config = MappingProxyType(dict(config))
        self._reference = reference
        self._folder = folder
        self._allow_non_finite = allow_non_finite
        self._tensors = MappingProxyType({name: stored.info for name, (_, stored) in placed.items()})

    @property
    def reference(self) -> str:
        return self._reference

    @property
    def dialect(self) -> str:
        return "hf"

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
        files: dict[PinnedFile, list[str]] = {}
        for name, (file, _) in self._placed.items():
            files.setdefault(file, []).append(name)
        companions = {
            name: pin_inside(self._folder, name).path for name in COMPANIONS if (self._folder / name).exists()
        }
        return AtRest(tuple(map(tuple, files.values())), companions, self._folder)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        info = find_tensor(self._tensors, name)
        file, stored = self._placed[name]
        span = row_span(name, info.shape, rows)
        shape, offset = info.shape, stored.offset
        if span is not None:
            offset += span[0] * (info.nbytes // shape[0])
            shape = (span[1] - span[0], *shape[1:])
        tensor = read_tensor(file, offset, shape, STORAGE_DTYPES[info.dtype])
        return tensor if self._allow_non_finite else check_finite(tensor, name, span[0] if span else 0)

    def token_texts(self) -> tuple[str, ...] | None:
        if not (self._folder / "tokenizer.json").exists():
            return None
        return texts_of_tokenizer_json(pin_inside(self._folder, "tokenizer.json"))

    def _read_bytes(self, name: str, begin: int, end: int) -> bytes:
        file, stored = self._placed[name]
        return file.read(stored.offset + begin, end - begin)


def open_safetensors_file(
    path: Path, *, reference: str, config: Mapping[str, Any] | None = None, allow_non_finite: bool = False
) -> SafetensorsSource:
    """Open one safetensors file, with ``config.json`` beside it unless ``config`` is given.

    Raises:
        CheckpointError: it cannot be read, or contradicts its format.
        UnsafeCheckpointError: it is no regular file.
    """
    file = pin(path)
    placed = {name: (file, stored) for name, stored in read_safetensors_header(file).items()}
    found = read_config(path.parent) if config is None else config
    return SafetensorsSource(placed, found, reference, path.parent, allow_non_finite=allow_non_finite)


def open_safetensors_index(
    path: Path, *, reference: str, config: Mapping[str, Any] | None = None, allow_non_finite: bool = False
) -> SafetensorsSource:
    """Open the shards that an index names, all of which must lie in its folder.

    Raises:
        CheckpointError: a shard is missing, or index and shards contradict each other.
        UnsafeCheckpointError: a shard's name leads out of the folder.
    """
    folder = path.parent
    weight_map = read_index(pin_inside(folder, path.name))
    shards = {name: _open_shard(folder, name) for name in sorted(set(weight_map.values()))}
    placed = _place(path.name, weight_map, shards)
    found = read_config(folder) if config is None else config
    return SafetensorsSource(placed, found, reference, folder, allow_non_finite=allow_non_finite)


def _open_shard(folder: Path, name: str) -> tuple[PinnedFile, dict[str, StoredTensor]]:
    if not name.endswith(".safetensors"):
        raise UnsafeCheckpointError(
            f"the index names a shard {name!r:.200}",
            expected="shards that end in .safetensors",
            do="convert the checkpoint to safetensors; other formats can run code when opened",
        )
    file = pin_inside(folder, name)
    return file, read_safetensors_header(file)


def _place(
    index: str, weight_map: Mapping[str, str], shards: Mapping[str, tuple[PinnedFile, dict[str, StoredTensor]]]
) -> Placed:
    """Every tensor with its file; index and shards must say the same."""
    for name, shard in weight_map.items():
        if name not in shards[shard][1]:
            raise MissingTensorError(
                f"{name!r:.200} is not in {shard!r}, where {index} has it",
                expected="every tensor of the index in its shard",
                do="fetch the shard and the index again; they may be of different versions",
            )
    for shard, (_, tensors) in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise MalformedCheckpointError(
                    f"{shard!r} holds {name!r}, which {index} has in {weight_map.get(name, 'no shard')!r}",
                    expected="every tensor in one shard, the one of the index",
                    do="fetch the shards and the index again; they may be of different versions",
                )
    return {name: (shards[shard][0], shards[shard][1][name]) for name, shard in weight_map.items()}
