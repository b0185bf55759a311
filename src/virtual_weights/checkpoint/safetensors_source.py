"""A checkpoint in safetensors files: one, or several with an index."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from virtual_weights.checkpoint.folder import check_name, parse_json_object, pin_inside, read_config, read_index
from virtual_weights.checkpoint.hub import published_sha256
from virtual_weights.checkpoint.pinned_file import PinnedFile, read_tensor
from virtual_weights.checkpoint.source import STORAGE_DTYPES, AtRest, Opening, Source, TensorInfo, plain_names
from virtual_weights.checkpoint.tokenizer import texts_of_tokenizer_json, tokenizer_of_folder
from virtual_weights.errors import MalformedCheckpointError, MissingTensorError, UnsafeCheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_HEADER = 100_000_000
MAX_TENSORS = 250_000
MAX_DIMENSIONS = 16
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


@final
@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, the file that holds it, and where its bytes begin in that file."""

    info: TensorInfo
    file: PinnedFile
    offset: int


@final
class SafetensorsSource(Source):
    """Tensors in safetensors files, read by byte range; names and configuration as Hugging Face gives them.

    Args:
        folder: where ``config.json`` and ``tokenizer.json`` would lie.
        stored: every tensor by its name in the files; prefixes of a wrapped model are taken off.
        opening: the options; without a configuration, ``config.json`` is read.
    """

    def __init__(self, folder: Path, stored: Mapping[str, StoredTensor], opening: Opening) -> None:
        config = read_config(folder) if opening.config is None else opening.config
        stored = {name: stored[at_rest] for name, at_rest in plain_names(stored).items()}
        tensors = {name: tensor.info for name, tensor in stored.items()}
        super().__init__(opening.reference, "hf", config, tensors, allow_non_finite=opening.allow_non_finite)
        self._folder = folder
        self._stored = stored
        self._digests: dict[Path, str] = {}

    @property
    def at_rest(self) -> AtRest:
        files: dict[PinnedFile, list[str]] = {}
        for name, tensor in self._stored.items():
            files.setdefault(tensor.file, []).append(name)
        companions = {
            name: pin_inside(self._folder, name).path for name in COMPANIONS if os.path.lexists(self._folder / name)
        }
        return AtRest(tuple(map(tuple, files.values())), companions, self._folder)

    @property
    def files(self) -> tuple[PinnedFile, ...]:
        return tuple(dict.fromkeys(tensor.file for tensor in self._stored.values()))

    def token_texts(self) -> tuple[str, ...] | None:
        if not os.path.lexists(self._folder / "tokenizer.json"):
            return None
        return texts_of_tokenizer_json(pin_inside(self._folder, "tokenizer.json"))

    def tokenizer(self) -> Tokenizer | None:
        def file(name: str) -> PinnedFile | None:
            return pin_inside(self._folder, name) if os.path.lexists(self._folder / name) else None

        return tokenizer_of_folder(file, str(self.config.get("model_type")))

    def _read(self, name: str, first_row: int, shape: tuple[int, ...]) -> Tensor:
        stored = self._stored[name]
        offset = stored.offset + stored.info.begin_of(first_row)
        return read_tensor(stored.file, offset, shape, STORAGE_DTYPES[stored.info.dtype])

    def _stored_bytes(self, name: str, begin: int, end: int) -> bytes:
        stored = self._stored[name]
        return stored.file.read(stored.offset + begin, end - begin)

    def _published(self, name: str) -> str | None:
        stored = self._stored[name]
        digest = self._digests.get(stored.file.path)
        if digest is None:
            digest = self._digests[stored.file.path] = published_sha256(stored.file) or ""
        return f"{digest} {stored.offset} {stored.info.nbytes}" if digest else None


def open_safetensors_file(path: Path, opening: Opening) -> SafetensorsSource:
    """Open one safetensors file.

    Raises:
        CheckpointError: it cannot be read, or contradicts its format.
        UnsafeCheckpointError: it is not a regular file.
    """
    return SafetensorsSource(path.parent, _read_header(pin_inside(path.parent, path.name)), opening)


def open_safetensors_index(path: Path, opening: Opening) -> SafetensorsSource:
    """Open the shards that an index names, all of which must lie in its folder.

    Raises:
        CheckpointError: a shard is missing, or index and shards contradict each other.
        UnsafeCheckpointError: a shard's name leads out of the folder.
    """
    folder = path.parent
    weight_map = read_index(pin_inside(folder, path.name))
    shards = {name: _read_shard(folder, name) for name in sorted(set(weight_map.values()))}
    _check_index(path.name, weight_map, shards)
    stored = {name: shards[shard][name] for name, shard in weight_map.items()}
    return SafetensorsSource(folder, stored, opening)


def _read_shard(folder: Path, name: str) -> dict[str, StoredTensor]:
    if not name.endswith(".safetensors"):
        raise UnsafeCheckpointError(
            f"the index names a shard {name!r:.200}",
            expected="shards that end in .safetensors",
            do="convert the checkpoint to safetensors; other formats can run code when opened",
        )
    return _read_header(pin_inside(folder, name))


def _check_index(index: str, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Refuse an index and shards that disagree on which shard holds which tensor."""
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise MissingTensorError(
                f"{name!r:.200} is not in {shard!r}, where {index} has it",
                expected="every tensor of the index in its shard",
                do="fetch the shard and the index again; they may be of different versions",
            )
    for shard, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise MalformedCheckpointError(
                    f"{shard!r} holds {name!r}, which {index} has in {weight_map.get(name, 'no shard')!r}",
                    expected="every tensor in one shard, the one of the index",
                    do="fetch the shards and the index again; they may be of different versions",
                )


def _read_header(file: PinnedFile) -> dict[str, StoredTensor]:
    """Every tensor by name, in the order of the header; refuses what contradicts the format or the file."""
    if file.size < 8:
        raise _malformed(file, f"it has {file.size} bytes", "at least the 8 bytes of a header length")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise _malformed(file, f"its header claims {length:,} bytes", f"at most {MAX_HEADER:,}")
    if length > file.size - 8:
        raise _malformed(file, f"its header claims {length:,} bytes of {file.size - 8:,}", "a header inside the file")
    start = 8 + length
    raw = file.read(8, length)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in _entries(file, raw):
        if len(tensors) == MAX_TENSORS:
            raise _malformed(file, f"it holds more than {MAX_TENSORS:,} tensors", f"at most {MAX_TENSORS:,}")
        if name in tensors:
            raise _malformed(file, f"the key {name!r:.200} occurs twice", "every key once")
        tensors[name] = _tensor(file, name, entry, start)
    _check_tiling(file, tensors, start)
    return tensors


_SPACE = rb"[ \t\r\n]*+"
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_PAIR = _STRING + _SPACE + b":" + _SPACE + _STRING + _SPACE
_OPEN = re.compile(_SPACE + rb"\{" + _SPACE)
_KEY = re.compile(rb"(" + _STRING + rb")" + _SPACE + b":" + _SPACE)
_ENTRY = re.compile(rb"\{[^{}]{0,8000}+\}")
_METADATA = re.compile(rb"\{" + _SPACE + rb"(?:" + _PAIR + rb"(?:," + _SPACE + _PAIR + rb")*+)?+\}")
_NEXT = re.compile(_SPACE + rb"(,|\}" + _SPACE + rb"$)" + _SPACE)
_SMALL_HEADER = 1 << 20


def _entries(file: PinnedFile, raw: bytes) -> Iterator[tuple[str, Any]]:
    """Every tensor's name and entry, one by one: as JSON objects all at once they take twenty times the header."""
    position = _after(file, raw, _OPEN.match(raw))
    if raw[position : position + 1] == b"}" and not raw[position + 1 :].strip():
        return
    while True:
        key = _KEY.match(raw, position)
        position = _after(file, raw, key)
        name = _parsed(file, raw, key[1] if key else b"")
        if name == "__metadata__":
            value = _METADATA.match(raw, position)
            if value is None:
                raise _malformed(file, "its __metadata__ is not a map of strings", "strings to strings")
        else:
            value = _ENTRY.match(raw, position)
            yield name, _parsed(file, raw, value[0] if value else b"")
        position = _after(file, raw, value)
        end = _NEXT.match(raw, position)
        position = _after(file, raw, end)
        if end and end[1] != b",":
            return


def _after(file: PinnedFile, raw: bytes, match: re.Match[bytes] | None) -> int:
    """The place behind what was matched; refuses a header that is not what was looked for."""
    if match is not None:
        return match.end()
    if len(raw) <= _SMALL_HEADER:  # small enough to ask what is wrong with it
        parse_json_object(raw, f"{file.path.name} (header)")
    raise _malformed(file, "its header holds what is not a tensor's entry", "names with dtype, shape and data_offsets")


def _parsed(file: PinnedFile, raw: bytes, part: bytes) -> Any:
    try:
        return _DECODER.decode(part.decode("utf-8"))
    except (ValueError, RecursionError):
        return _after(file, raw, None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    return dict(pairs) if len({key for key, _ in pairs}) == len(pairs) else None


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


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
    nbytes = math.prod(shape) * STORAGE_DTYPES[dtype].itemsize
    if nbytes != end - begin:
        expected = f"the {nbytes:,} bytes of {dtype} in the shape {shape}"
        raise _malformed(file, f"{name!r} takes {end - begin:,} bytes", expected)
    return StoredTensor(TensorInfo(tuple(shape), sys.intern(dtype), nbytes), file, start + begin)


def _check_tiling(file: PinnedFile, tensors: dict[str, StoredTensor], start: int) -> None:
    """The format leaves no byte unused and none used twice."""
    previous_end, previous = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].info.nbytes)):
        if tensor.offset != previous_end:
            fault = "overlaps" if tensor.offset < previous_end else "leaves a hole after"
            expected = "tensors one behind the other without hole or overlap"
            raise _malformed(file, f"{name!r} {fault} {previous}", expected)
        previous_end, previous = tensor.offset + tensor.info.nbytes, repr(name)
    if previous_end != file.size:
        surplus = file.size - previous_end
        raise _malformed(file, f"{surplus:,} bytes follow the last tensor", "a file that ends with its data")


def _are_counts(value: Any) -> bool:
    # 2**63: JSON may claim what no file can hold; refused here, before it is multiplied or printed
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _malformed(file: PinnedFile, what: str, expected: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(
        f"{str(file.path)!r} is not a sound safetensors file: {what}",
        expected=expected,
        do="fetch the file again; if it stays so, it was written wrongly or truncated",
    )
