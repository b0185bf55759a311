"""The files of a checkpoint folder, read within bounds, none of which may lead out of it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from virtual_weights.checkpoint.pinned_file import PinnedFile, pin
from virtual_weights.errors import CheckpointError, MalformedCheckpointError, MissingTensorError, UnsafeCheckpointError

INDEX = "model.safetensors.index.json"
MAX_CONFIG = 4 << 20
MAX_CONFIG_ITEMS = 200_000
MAX_INDEX = 32 << 20
MAX_INDEX_ITEMS = 300_000
MAX_DEPTH = 64
MAX_ITEMS = 4_000_000
MAX_NAME = 1024

_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.+")
_IN_A_CACHE = re.compile(r"(models|datasets|spaces|kernels)--[^/]+/blobs/[^/]+|blobs/[0-9a-f]{2}/[0-9a-f]+")
"""Where the hub's library keeps the files of a cache: beside each repository, or once for all of them."""


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted.

    Raises:
        CheckpointError: the system does not let us list it.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise _unreachable(folder, error) from error


def pin_inside(folder: Path, name: str) -> PinnedFile:
    """Pin a file of a folder by its bare name.

    The folder itself may be reached through links. A file in it may be a link only to a place inside
    the same folder, or, anywhere below ``snapshots/<revision>`` of a Hugging Face cache, to where that cache keeps
    its files: so no checkpoint that was unpacked here can make us read anything else.

    Raises:
        UnsafeCheckpointError: the name is a path, or leads out of the folder, or to what is not a regular file.
        MissingTensorError: there is no such file.
    """
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise UnsafeCheckpointError(
            f"{str(folder)!r} names a file {name!r:.200}",
            expected="the bare name of a file in the folder",
            do="do not use this checkpoint: a published one has no reason to point elsewhere",
        )
    try:
        real_folder, real_file = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except FileNotFoundError as error:
        raise MissingTensorError(
            f"{name!r} is missing in {str(folder)!r}",
            expected="every file that the checkpoint names",
            do="fetch the missing file, or the whole checkpoint again",
        ) from error
    except (OSError, RuntimeError) as error:  # a loop of links: RuntimeError until Python 3.12
        raise _unreachable(folder / name, error) from error
    if not real_file.is_relative_to(real_folder) and not _is_in_its_cache(real_folder, real_file):
        raise UnsafeCheckpointError(
            f"{name!r} in {str(folder)!r} is a link to {str(real_file)!r}",
            expected="a file inside the folder, or in the Hugging Face cache that the folder belongs to",
            do="copy the file into the folder, or open what the link leads to by its own path",
        )
    return pin(real_file)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        MissingTensorError: there is none.
        MalformedCheckpointError: it is not a JSON object of a sensible size.
    """
    if not os.path.lexists(folder / "config.json"):
        raise MissingTensorError(
            f"there is no config.json in {str(folder)!r}",
            expected="the model's configuration beside its weights",
            do="fetch config.json into that folder, or pass `config`",
        )
    return read_json_object(pin_inside(folder, "config.json"), MAX_CONFIG, MAX_CONFIG_ITEMS)


def read_index(file: PinnedFile) -> dict[str, str]:
    """Read which shard holds which tensor.

    Returns:
        The ``weight_map``: tensor name to file name, both unchecked.

    Raises:
        MalformedCheckpointError: there is no such map.
    """
    weight_map = read_json_object(file, MAX_INDEX, MAX_INDEX_ITEMS).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(value, str) for value in weight_map.values())
    ):
        raise MalformedCheckpointError(
            f"{str(file.path)!r} has no map of tensors to files under 'weight_map'",
            expected='{"weight_map": {"tensor": "file.safetensors", ...}}',
            do="fetch the index again from where it was published",
        )
    return weight_map


def read_json_object(file: PinnedFile, limit: int, items: int = MAX_ITEMS) -> dict[str, Any]:
    """Read a whole file that holds one JSON object of at most ``limit`` bytes with at most ``items`` values.

    Raises:
        MalformedCheckpointError: too large, not JSON, a key twice, nested too deeply, not an object.
    """
    if file.size > limit:
        raise MalformedCheckpointError(
            f"{str(file.path)!r} has {file.size:,} bytes",
            expected=f"at most {limit:,} bytes of JSON",
            do="check that this is the file it should be",
        )
    return parse_json_object(file.read(0, file.size), str(file.path), items)


def parse_json_object(raw: bytes, where: str, items: int = MAX_ITEMS) -> dict[str, Any]:
    """Parse one JSON object of at most about ``items`` values; ``where`` names it in errors.

    Raises:
        MalformedCheckpointError: not JSON, a key twice, nested too deeply, too many items, not an object.
    """
    # every value follows a comma, or is the first of its container: this bounds the memory before it is taken
    if sum(map(raw.count, (b",", b"[", b"{"))) > items:
        raise _malformed(f"{where!r} has more than {items:,} items", "the sizes of a real model")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=partial(_without_duplicates, where))
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise _malformed(f"{where!r} is not JSON: {error!s:.200}", "valid JSON in UTF-8") from error
    if not isinstance(value, dict):
        raise _malformed(f"the JSON of {where!r} is a {type(value).__name__}", "a JSON object")
    _check_depth(value, where)
    return value


def check_name(name: str, where: str) -> None:
    """Refuse a name that is empty, endless, or could steer a terminal.

    Raises:
        MalformedCheckpointError: it is one of these.
    """
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise _malformed(
            f"{where!r} holds the name {name!r:.100} ({len(name):,} characters)",
            f"1 to {MAX_NAME} printable characters",
        )


def _is_in_its_cache(folder: Path, file: Path) -> bool:
    """Whether a folder lies in a snapshot of a Hugging Face cache, and a file where that cache keeps its files."""
    for parent in (folder, *folder.parents):
        repository = parent.parent
        if parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
            cache = repository.parent
            return file.is_relative_to(cache) and bool(_IN_A_CACHE.fullmatch(file.relative_to(cache).as_posix()))
    return False


def _without_duplicates(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _malformed(f"{where!r} has the key {key!r:.200} twice", "every key once")
    return entries


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise _too_deep(where)


def _children(node: Any) -> list[Any]:
    values = node.values() if isinstance(node, dict) else node
    return [value for value in values if isinstance(value, (dict, list))]


def _unreachable(path: Path, error: OSError | RuntimeError) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} cannot be reached: {getattr(error, 'strerror', None) or error}",
        expected="a file or folder that this user may read",
        do="check the links and permissions",
    )


def _too_deep(where: str) -> MalformedCheckpointError:
    return _malformed(f"the JSON of {where!r} is nested too deeply", f"at most {MAX_DEPTH} levels")


def _malformed(what: str, expected: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(what, expected=expected, do="fetch the file again from where it was published")
