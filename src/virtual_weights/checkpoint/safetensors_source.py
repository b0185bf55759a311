"""A checkpoint in safetensors files: one, or several with an index."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from virtual_weights.checkpoint.folder import check_name, parse_json_object, pin_inside, read_config, read_index
from virtual_weights.checkpoint.pinned_file import PinnedFile, pin, read_tensor
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
from virtual_weights.checkpoint.token_text import texts_of_tokenizer_json
from virtual_weights.errors import MalformedCheckpointError, MissingTensorError, UnsafeCheckpointError

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
