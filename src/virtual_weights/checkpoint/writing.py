"""Writing a checkpoint: safetensors files tensor by tensor, so that no more than one tensor is in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.checkpoint.folder import INDEX
from virtual_weights.checkpoint.source import DTYPE_NAMES
from virtual_weights.errors import UsageError
from virtual_weights.progress import Progress
from virtual_weights.record.durable import write_folder


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
    progress: Progress | None = None,
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
            f"{folder} already exists", expected="a new folder, or an empty one", do="name another, or remove it"
        )
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"no folder {folder.parent}", expected="an existing folder", do="create it, or name another")

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
    progress: Progress | None,
) -> None:
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    total, size, weight_map = sum(map(len, files)), 0, dict[str, str]()
    for number, tensors in enumerate(files, 1):
        shard = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        with (folder / shard).open("wb") as file:
            file.write(_header(tensors, dtype))
            for name, planned in tensors.items():
                tensor = planned.make().to(dtype).contiguous()
                assert tuple(tensor.shape) == planned.shape, f"{name}: {tuple(tensor.shape)}, planned {planned.shape}"
                size += file.write(tensor.flatten().view(torch.uint8).numpy().data)
                weight_map[name] = shard
                if progress is not None:
                    progress(len(weight_map), total)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, Planned], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file: length, then JSON padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, planned in tensors.items():
        end = begin + math.prod(planned.shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(planned.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
