"""Refusing NaN and infinity as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.errors import NonFiniteError

_CHUNK = 1 << 22


def check_finite(tensor: Tensor, name: str, first_row: int = 0) -> Tensor:
    """Return the tensor as it is.

    Args:
        tensor: what was read.
        name: its name, for the error.
        first_row: which row of the named tensor its first row is.

    Raises:
        NonFiniteError: a value is NaN or infinite; the error says which.
    """
    if not tensor.is_floating_point():
        return tensor
    flat = tensor.reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        if chunk.dtype.itemsize == 1:
            chunk = chunk.float()  # torch compares no float8
        # both ends of the range are NaN if any value is: one pass, nothing allocated
        if not torch.stack(torch.aminmax(chunk)).isfinite().all():
            bad = begin + int((~chunk.isfinite()).nonzero()[0])
            raise _refusal(tensor, bad, name, first_row)
    return tensor


def _refusal(tensor: Tensor, flat_index: int, name: str, first_row: int) -> NonFiniteError:
    value = float(tensor.reshape(-1)[flat_index])
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat_index), tensor.shape)]
    if index:
        index[0] += first_row
    return NonFiniteError(
        f"{name}[{', '.join(map(str, index))}] is {value}",
        expected="finite weights",
        do="repair the checkpoint, or allow non-finite values if they are meant",
    )
