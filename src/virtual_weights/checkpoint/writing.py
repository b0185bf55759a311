"""Writing a checkpoint: safetensors files tensor by tensor, so that no more than one tensor is in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a new safetensors file tensor by tensor, with the permissions of any new file.

    The format's own library makes files that nobody but their owner may read.

    Args:
        path: the file, which does not exist.
        shapes: type and shape of every tensor by name.
        tensors: the tensors in the same order.
        metadata: what else its header says.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for (name, (dtype, shape)), tensor in zip(shapes.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name}: {tensor.dtype} {tensor.shape}"
            file.write(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> memoryview:
    """A dense tensor's values as they are stored, in row order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _fill(
    folder: Path,
    files: Sequence[Mapping[str, Planned]],
    dtype: torch.dtype,
    config: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    total, weight_map = sum(map(len, files)), dict[str, str]()

    def made(tensors: Mapping[str, Planned], shard: str) -> Iterator[Tensor]:
        for name, planned in tensors.items():
            yield planned.make().to(dtype)
            weight_map[name] = shard
            if progress is not None:
                progress(len(weight_map), total)

    for number, tensors in enumerate(files, 1):
        shard = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        shapes = {name: (dtype, planned.shape) for name, planned in tensors.items()}
        write_safetensors(folder / shard, shapes, made(tensors, shard), {"format": "pt"})
    if len(files) > 1:
        size = sum(math.prod(planned.shape) for tensors in files for planned in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
