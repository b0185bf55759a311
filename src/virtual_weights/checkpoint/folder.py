"""Files of a checkpoint folder, none of which may lead out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from virtual_weights.checkpoint.json_text import read_json_object
from virtual_weights.checkpoint.pinned_file import PinnedFile, pin
from virtual_weights.errors import CheckpointError, MalformedCheckpointError, MissingTensorError, UnsafeCheckpointError

INDEX = "model.safetensors.index.json"
MAX_CONFIG = 16 << 20
MAX_INDEX = 100 << 20


def pin_inside(folder: Path, name: str) -> PinnedFile:
    """Pin a file of a folder by its bare name.

    The folder itself may be reached through links. A file in it may be a link only to a place inside
    the same folder, or, in a Hugging Face cache (``models--*/snapshots/<revision>``), to that model's
    own ``blobs``: so no checkpoint that was unpacked here can make us read anything else.

    Raises:
        UnsafeCheckpointError: the name is a path, or leads out of the folder, or to no regular file.
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


def _hub_blobs(folder: Path) -> tuple[Path, ...]:
    model = folder.parent.parent
    if folder.parent.name == "snapshots" and model.name.startswith("models--"):
        return (model / "blobs",)
    return ()


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        MissingTensorError: there is none.
        MalformedCheckpointError: it is no JSON object of a sensible size.
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
