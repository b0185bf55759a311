"""Records over one axis, and the strongest entries of larger ones, as plain JSON columns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from virtual_weights.record import Column, Record

_TEXTS = ("title", "seed", "corrected", "verdict", "condition", "why", "witnesses")


def table(record: Record) -> dict[str, Any]:
    """A record over one axis: its labels, and its columns with name, unit, meaning and values (absent is None)."""
    (axis,) = record.axes
    return {
        "question": record.question,
        "parameters": plain(dict(record.parameters)),
        "stamp": plain(dict(record.stamp)),
        "axis": axis.name,
        "labels": list(axis.labels),
        "columns": [_column(column) for column in record.columns],
    }


def strongest(record: Record, by: Sequence[str], most: int) -> dict[str, Any]:
    """The ``most`` largest entries by each of several columns, as one table without repetition."""
    names = [axis.name for axis in record.axes]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for column in by:
        for row in record.top(most, by=column).rows():
            rows.setdefault(tuple(row[name] for name in names), {k: v for k, v in row.items() if k != "place"})
    return {
        "question": record.question,
        "stamp": plain(dict(record.stamp)),
        "most": most,
        "columns": [{"name": c.name, "unit": c.unit, "meaning": c.meaning} for c in record.columns],
        "rows": list(rows.values()),
    }


def statements(record: Record) -> dict[str, Any]:
    """A record over ``statement``: ``run``, what was run for it, and ``rows`` of id, texts and evidence."""
    found = {column.name: list(column.values) for column in record.columns}
    evidence = [_evidence(text) for text in found.get("evidence", [None] * record.size)]
    rows = [
        {"id": label, **{name: found[name][i] for name in _TEXTS if name in found}, "evidence": evidence[i]}
        for i, label in enumerate(record.axes[0].labels)
    ]
    return {"run": record.stamp.get("run"), "rows": rows}


def plain(value: Any) -> Any:
    """The same as JSON values; a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _column(column: Column) -> dict[str, Any]:
    values = column.values
    listed = list(values) if isinstance(values, tuple) else np.asarray(values.detach().cpu()).tolist()
    return {"name": column.name, "unit": column.unit, "meaning": column.meaning, "values": plain(listed)}


def _evidence(text: Any) -> Any:
    """What a JSON text says; any other text stays as it is."""
    try:
        return plain(json.loads(text))
    except (TypeError, ValueError):
        return text
