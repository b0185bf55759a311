"""Writing a checkpoint: safetensors files tensor by tensor, so that no more than one tensor is in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.checkpoint.source import STORAGE_DTYPES
from virtual_weights.errors import UsageError
from virtual_weights.record.durable import write_folder

_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_INDEX = "model.safetensors.index.json"


@final
@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its shape is known before it is computed."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_checkpoint(
    folder: Path,
    files: Sequence[Mapping[str, Planned]],
    dtype: torch.dtype,
    config: Mapping[str, Any],
    companions: Mapping[str, Path],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint folder that transformers can load, whole or not at all.

    Args:
        folder: where; it must not exist, or be empty.
        files: tensors by name, file by file; an index is written where there are several.
        dtype: of every tensor.
        config: what goes into ``config.json``.
        companions: files to copy, by the name they get.
        progress: called with (tensors written, tensors in all).

    Raises:
        UsageError: the folder holds something already, or its parent is missing.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is there already", expected="a new folder, or an empty one", do="name another, or remove it"
        )
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"no folder {folder.parent}", expected="one that exists", do="make it, or name another")

    def fill(aside: Path) -> None:
        _fill(aside, files, dtype, config, progress)
        for name, path in companions.items():
            shutil.copyfile(path, aside / name)

    write_folder(folder.absolute(), fill)


def _fill(
    folder: Path,
    files: Sequence[Mapping[str, Planned]],
    dtype: torch.dtype,
    config: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    total, done, places, size = sum(map(len, files)), 0, dict[str, str](), 0
    for i, tensors in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        with (folder / name).open("wb") as file:
            size += file.write(_header(tensors, dtype)) and sum(map(_count, tensors.values())) * dtype.itemsize
            for tensor, planned in tensors.items():
                made = planned.make().to(dtype).contiguous()
                assert tuple(made.shape) == planned.shape, f"{tensor}: {tuple(made.shape)}, planned {planned.shape}"
                file.write(made.flatten().view(torch.uint8).numpy().data)
                places[tensor], done = name, done + 1
                if progress is not None:
                    progress(done, total)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, Planned], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file: length, then JSON padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, planned in tensors.items():
        end = at + _count(planned) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(planned.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _count(planned: Planned) -> int:
    return int(torch.Size(planned.shape).numel())
