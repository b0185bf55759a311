"""What a reader may ask of a source: a name that is there, and rows that are."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from virtual_weights.checkpoint.source import TensorInfo
from virtual_weights.errors import MissingTensorError, UsageError


def find_tensor(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    """Look up a tensor.

    Raises:
        MissingTensorError: there is no such name; near names are listed.
    """
    info = tensors.get(name)
    if info is not None:
        return info
    near = get_close_matches(str(name), tensors, n=3, cutoff=0.5)
    raise MissingTensorError(
        f"there is no tensor {name!r} among {len(tensors)}",
        expected=f"one of the checkpoint's names, such as {', '.join(map(repr, near or sorted(tensors)[:3]))}",
        do="take a name from the source's `tensors`",
    )


def row_span(name: str, shape: tuple[int, ...], rows: slice | None) -> tuple[int, int] | None:
    """Check a slice of the first axis.

    Returns:
        (start, stop) with 0 <= start < stop <= shape[0], or None when everything is asked for.

    Raises:
        UsageError: the slice is empty, stepped, counts from the end, or leaves the tensor.
    """
    if rows is None:
        return None
    length = shape[0] if shape else 0
    start = 0 if rows.start is None else rows.start
    stop = length if rows.stop is None else rows.stop
    if rows.step in (None, 1) and 0 <= start < stop <= length:
        return start, stop
    raise UsageError(
        f"rows {rows.start}:{rows.stop}:{rows.step} of {name!r}, whose shape is {shape}",
        expected=f"0 <= start < stop <= {length}, step 1",
        do="ask for rows that the tensor has, or leave `rows` out to read all of it",
    )
