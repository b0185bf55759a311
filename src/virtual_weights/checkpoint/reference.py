"""From whatever a user names a checkpoint by to a Source."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from virtual_weights.checkpoint.catalog import built_in, locate
from virtual_weights.checkpoint.folder import INDEX, names_in, pin_inside
from virtual_weights.checkpoint.gguf_header import MAGIC
from virtual_weights.checkpoint.gguf_source import open_gguf
from virtual_weights.checkpoint.hub import fetch_snapshot, parse_hub_reference
from virtual_weights.checkpoint.mapping_source import MappingSource, NnsightModel, is_model, open_module
from virtual_weights.checkpoint.safetensors_source import open_safetensors_file, open_safetensors_index
from virtual_weights.checkpoint.source import Opening, Source
from virtual_weights.errors import CheckpointError, MissingTensorError, UnsafeCheckpointError, UsageError
from virtual_weights.progress import Progress

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json")
_FORMATS = "a folder or file of safetensors, or a .gguf file"


def open_source(
    reference: str | Path | Source | Mapping[str, Tensor] | nn.Module | NnsightModel,
    *,
    offline: bool = False,
    allow_non_finite: bool = False,
    progress: Progress | None = None,
    config: Mapping[str, Any] | None = None,
) -> Source:
    """Open a checkpoint; its headers are read and checked, its tensors are not read yet.

    Args:
        reference: a built-in name, a folder, a ``.safetensors`` file (``config.json`` beside it), an index
            of shards, a ``.gguf`` file, ``hf://org/name@revision``, a state dict (with ``config``), a
            transformers model, a TransformerLens bridge, an nnsight model, or a source, which is returned as it is.
            A string that is a built-in name means that; write ``./name`` for a folder called so.
        offline: never fetch anything.
        allow_non_finite: do not refuse NaN and infinity.
        progress: called with (done, total) while something is fetched.
        config: replaces the checkpoint's configuration.

    Returns:
        The source.

    Raises:
        CheckpointError: it cannot be read, or contradicts its format.
        UnsafeCheckpointError: opening it could do harm: a pickle, or a name that leaves its folder.
        OfflineError: it must be fetched, and that is forbidden or failed.
        UsageError: something other than these was given.

    Example:
        >>> import torch
        >>> open_source({"w": torch.ones(2, 3)}, config={}).tensors["w"].shape
        (2, 3)
    """
    if isinstance(reference, Source):
        return reference
    if is_model(reference):
        return open_module(reference, config, allow_non_finite=allow_non_finite)
    if isinstance(reference, Mapping):
        return _open_state_dict(reference, config, allow_non_finite)
    if not isinstance(reference, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f"a {type(reference).__name__} is not a checkpoint",
            expected=f"a built-in name, {_FORMATS}, hf://org/name, a state dict or a module",
            do="pass one of these",
        )
    if isinstance(reference, str) and reference in {model.name for model in built_in()}:
        path = locate(reference, offline=offline, progress=progress)
        opening = Opening(reference, config, allow_non_finite)
        # its content is known by its hash, so a link may lead to it, as some installers make them
        return _open_folder(path, opening) if path.is_dir() else open_gguf(path.resolve(), opening)
    if isinstance(reference, str) and reference.startswith("hf:"):
        model = parse_hub_reference(reference)
        folder = fetch_snapshot(model, offline=offline, progress=progress)
        return _open_folder(folder, Opening(f"hf://{model.repo}@{folder.name}", config, allow_non_finite))
    return _open_path(str(reference), config, allow_non_finite)


def _open_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, non_finite: bool) -> Source:
    if config is None:
        raise UsageError(
            "a state dict came without a configuration",
            expected="the fields of the model's config.json as `config`",
            do="pass config={...}, or the module itself",
        )
    return MappingSource(tensors, config, allow_non_finite=non_finite)


def _open_path(reference: str, config: Mapping[str, Any] | None, allow_non_finite: bool) -> Source:
    path = Path(reference).expanduser().absolute()
    try:
        exists = path.exists()
    except OSError as error:
        raise CheckpointError(
            f"{reference!r:.200} cannot be reached: {error}",
            expected=_FORMATS,
            do="check the path and its permissions",
        ) from error
    if not exists:
        raise _unknown(reference)
    opening = Opening(str(path), config, allow_non_finite)
    return _open_folder(path, opening) if path.is_dir() else _open_file(path, opening)


def _open_file(path: Path, opening: Opening) -> Source:
    if path.name.endswith(_PICKLE_SUFFIXES):
        raise _pickled(path)
    file = pin_inside(path.parent, path.name)
    if path.name.endswith(".index.json"):
        return open_safetensors_index(path, opening)
    if path.suffix == ".safetensors":
        return open_safetensors_file(path, opening)
    start = file.read(0, min(4, file.size))
    if path.suffix == ".gguf" or start == MAGIC:
        return open_gguf(path, opening)
    if start[:1] == b"\x80":  # how every pickle of protocol 2 and later begins
        raise _pickled(path)
    raise CheckpointError(
        f"{str(path)!r} is in no format that can be read (it begins with {start!r})",
        expected=_FORMATS,
        do="convert the checkpoint to safetensors, or open the folder that holds it",
    )


def _open_folder(folder: Path, opening: Opening) -> Source:
    """Choose as transformers does: the one file before the index; then whatever single file there is."""
    names = names_in(folder)
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{str(folder)!r} holds an adapter (adapter_config.json)",
            expected="a whole model",
            do="open its base and attach it: --attach FOLDER, or vw.open(base, attach=[folder]); or merge both first: "
            "peft's merge_and_unload(), then save_pretrained()",
        )
    if "model.safetensors" in names:
        return open_safetensors_file(folder / "model.safetensors", opening)
    if INDEX in names:
        return open_safetensors_index(folder / INDEX, opening)
    readable = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if len(readable) == 1:
        return _open_file(folder / readable[0], opening)
    if readable:
        raise MissingTensorError(
            f"{str(folder)!r} holds several checkpoints: {', '.join(readable[:10])}",
            expected=f"one file, or {INDEX}, which says how they belong together",
            do="open one of the files by its path, or fetch the index",
        )
    if any(name.endswith(_PICKLE_SUFFIXES) for name in names):
        raise _pickled(folder)
    raise MissingTensorError(
        f"{str(folder)!r} holds no checkpoint (it holds {', '.join(names[:10]) or 'nothing'})",
        expected=_FORMATS,
        do="open the folder with the weights in it",
    )


def _pickled(path: Path) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{str(path)!r} holds pickled weights, which can run any code when they are opened",
        expected=_FORMATS,
        do="take the safetensors version of the model, or convert it where its origin is trusted: "
        "load it with transformers and call save_pretrained",
    )


def _unknown(reference: str) -> MissingTensorError:
    names = [model.name for model in built_in()]
    near_names = get_close_matches(reference, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near_names)}? " if near_names else ""
    hub = f"a model of the hub is written hf://{reference}; " if reference.count("/") == 1 else ""
    return MissingTensorError(
        f"there is no checkpoint {reference!r:.200}",
        expected=f"a path, hf://org/name, or a built-in name ({', '.join(names)})",
        do=f"{hint}{hub}check the spelling and the path",
    )
