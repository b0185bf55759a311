"""The files of a checkpoint folder, read within bounds, none of which may lead out of it."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from virtual_weights.checkpoint.pinned_file import PinnedFile, pin
from virtual_weights.errors import CheckpointError, MalformedCheckpointError, MissingTensorError, UnsafeCheckpointError

INDEX = "model.safetensors.index.json"
MAX_CONFIG = 16 << 20
MAX_INDEX = 100 << 20
MAX_DEPTH = 64
MAX_ITEMS = 4_000_000
MAX_NAME = 1024


def pin_inside(folder: Path, name: str) -> PinnedFile:
    """Pin a file of a folder by its bare name.

    The folder itself may be reached through links. A file in it may be a link only to a place inside
    the same folder, or, in a Hugging Face cache (``models--*/snapshots/<revision>``), to that model's
    own ``blobs``: so no checkpoint that was unpacked here can make us read anything else.

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
        raise CheckpointError(
            f"{name!r} in {str(folder)!r} cannot be reached: {error}",
            expected="a file that this user may read",
            do="check the links and permissions",
        ) from error
    if not any(real_file.is_relative_to(root) for root in (real_folder, *_hub_blobs(real_folder))):
        raise UnsafeCheckpointError(
            f"{name!r} in {str(folder)!r} is a link to {str(real_file)!r}",
            expected="a file inside the folder",
            do="copy the file into the folder, or open the folder that it lies in",
        )
    return pin(real_file)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        MissingTensorError: there is none.
        MalformedCheckpointError: it is not a JSON object of a sensible size.
    """
    if not (folder / "config.json").exists():
        raise MissingTensorError(
            f"there is no config.json in {str(folder)!r}",
            expected="the model's configuration beside its weights",
            do="fetch config.json into that folder, or pass `config`",
        )
    return read_json_object(pin_inside(folder, "config.json"), MAX_CONFIG)


def read_index(file: PinnedFile) -> dict[str, str]:
    """Read which shard holds which tensor.

    Returns:
        The ``weight_map``: tensor name to file name, both unchecked.

    Raises:
        MalformedCheckpointError: there is no such map.
    """
    weight_map = read_json_object(file, MAX_INDEX).get("weight_map")
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


def read_json_object(file: PinnedFile, limit: int) -> dict[str, Any]:
    """Read a whole file that holds one JSON object of at most ``limit`` bytes.

    Raises:
        MalformedCheckpointError: too large, not JSON, a key twice, nested too deeply, not an object.
    """
    if file.size > limit:
        raise MalformedCheckpointError(
            f"{str(file.path)!r} has {file.size:,} bytes",
            expected=f"at most {limit:,} bytes of JSON",
            do="check that this is the file it should be",
        )
    return parse_json_object(file.read(0, file.size), str(file.path))


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; ``where`` names it in errors.

    Raises:
        MalformedCheckpointError: not JSON, a key twice, nested too deeply, too many items, not an object.
    """
    # every item but the first of its container follows a comma, so this bounds the memory before it is taken
    if raw.count(b",") > MAX_ITEMS:
        raise _malformed(f"{where!r} has more than {MAX_ITEMS:,} items", "the sizes of a real model")
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


def _hub_blobs(folder: Path) -> tuple[Path, ...]:
    model = folder.parent.parent
    if folder.parent.name == "snapshots" and model.name.startswith("models--"):
        return (model / "blobs",)
    return ()


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


def _too_deep(where: str) -> MalformedCheckpointError:
    return _malformed(f"the JSON of {where!r} is nested too deeply", f"at most {MAX_DEPTH} levels")


def _malformed(what: str, expected: str) -> MalformedCheckpointError:
    return MalformedCheckpointError(what, expected=expected, do="fetch the file again from where it was published")
