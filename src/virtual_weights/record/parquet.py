"""Records as long tables: one row per entry, for Parquet and whatever asks it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from virtual_weights.record.axes import Axis, Column, Value, Values

AsNumpy = NDArray[Any] | np.ma.MaskedArray[Any, Any]
_WIDENED = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def write_parquet(
    path: str | Path,
    axes: Sequence[Axis],
    columns: Sequence[Column],
    places: Tensor,
    constants: Mapping[str, str | None],
) -> None:
    """Write entries of a Record as one Parquet table, a row per entry.

    Args:
        path: the file to write; an existing one is replaced.
        axes: the axes.
        columns: the columns over them.
        places: which entries, as flat places in row order.
        constants: text columns with one value throughout, put first.
    """
    import duckdb  # here, since importing the package is cheap by promise

    with duckdb.connect(config={"pandas_analyze_sample": 0}) as database:  # type "object" is text, never guessed
        database.register("entries", long_form(axes, columns, places, constants))
        database.view("entries").write_parquet(str(path), compression="zstd")


def long_form(
    axes: Sequence[Axis], columns: Sequence[Column], places: Tensor, constants: Mapping[str, str | None]
) -> dict[str, AsNumpy]:
    """Entries of a Record as numpy columns of one length: labels, groups, values; arguments as ``write_parquet``.

    Returns:
        Name to column, in the order constants, axes (``<axis>_group`` after the axis that has groups), columns. Missing
        values are masked, or NaN in floating columns.
    """
    rows = places.numpy()
    table: dict[str, AsNumpy] = {name: _text([value], len(rows)) for name, value in constants.items()}
    shape = tuple(len(axis.labels) for axis in axes)
    indices = np.unravel_index(rows, shape) if shape else ()
    for axis, index in zip(axes, indices, strict=True):
        table[axis.name] = _text(axis.labels)[index]
        if axis.groups:
            table[f"{axis.name}_group"] = _text(axis.groups)[index]
    for column in columns:
        table[column.name] = _column(column)[rows]
    return table


def restore(values: AsNumpy, kind: str) -> Values:
    """The values of a column as they were before ``long_form``, given its ``kind``.

    Raises:
        ValueError: the kind is none of ``kind_of``.
    """
    if kind.startswith("torch."):
        dtype = getattr(torch, kind.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no kind of column: {kind!r}")
        return torch.from_numpy(np.array(np.ma.filled(values, np.nan) if dtype.is_floating_point else values)).to(dtype)
    plain: list[Value] = values.tolist()
    if kind == "json":
        return tuple(None if value is None else json.loads(str(value)) for value in plain)
    return tuple(plain)


def kind_of(column: Column) -> str:
    """How a column is kept: ``"torch.<dtype>"``, ``"str"``, ``"bool"``, ``"int"``, ``"float"`` or ``"json"``.

    A tuple of one type besides None keeps that type; whatever is mixed is JSON text, value by value.
    """
    if isinstance(column.values, Tensor):
        return str(column.values.dtype)
    types = {type(value) for value in column.values if value is not None}
    if types == {int} and any(abs(value) >= 2**63 for value in column.values if isinstance(value, int)):
        return "json"
    if types == {float} and any(isinstance(value, float) and math.isnan(value) for value in column.values):
        return "json"  # in Parquet NaN and None would become the same NULL
    return types.pop().__name__ if len(types) == 1 else "json"


def _column(column: Column) -> AsNumpy:
    values = column.values
    if isinstance(values, Tensor):
        values = values.detach().cpu().flatten()
        return (values.float() if values.dtype in _WIDENED else values).numpy()
    kind = kind_of(column)
    if kind == "str":
        return _text(values)
    if kind == "json":
        return _text([None if value is None else json.dumps(value) for value in values])
    filled = [0 if value is None else value for value in values]
    mask = [value is None for value in values]
    return np.ma.masked_array(np.array(filled, dtype={"bool": "bool", "int": "int64", "float": "float64"}[kind]), mask)


def _text(values: Any, times: int = 1) -> AsNumpy:
    return np.array([*values] * times, dtype=object)
