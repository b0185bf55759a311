"""Bytes of a pinned file as a tensor of a storage type."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.errors import ResourceError


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fresh memory for a tensor.

    Raises:
        ResourceError: there is no memory for it.
    """
    try:
        return torch.empty(shape, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        raise ResourceError(
            f"no memory for a tensor of shape {shape} and type {dtype}",
            expected="a tensor that fits into memory",
            do="read it by slices of rows",
        ) from error


def read_tensor(file: PinnedFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read a dense tensor from a byte range straight into its own fresh memory.

    Raises:
        MalformedCheckpointError: the file changed or shrank since it was pinned.
        ResourceError: there is no memory for it.
    """
    tensor = allocate(shape, torch.uint8 if dtype is torch.bool else dtype)
    if tensor.numel():
        file.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, offset)
    # any byte but 0 means true; a torch.bool made of other bytes than 0 and 1 misbehaves
    return tensor != 0 if dtype is torch.bool else tensor
