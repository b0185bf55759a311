"""Records over one axis, and neurons counted, as plain JSON columns."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
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


def statements(record: Record) -> dict[str, Any]:
    """A record over ``statement``: ``run``, what was run for it, and ``rows`` of id, texts and evidence."""
    values = {column.name: list(column.values) for column in record.columns}
    evidence = [_evidence(text) for text in values.get("evidence", [None] * record.size)]
    rows = [
        {"id": label, **{name: values[name][i] for name in _TEXTS if name in values}, "evidence": evidence[i]}
        for i, label in enumerate(record.axes[0].labels)
    ]
    return {"run": record.stamp.get("run"), "rows": rows}


def plain(value: Any) -> Any:
    """The same as JSON values; a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(values: Any, digits: int = 4) -> list[Any]:
    """Numbers with so many significant digits; None where there is none."""
    return [digits_of(value, digits) for value in np.asarray(values, dtype=np.float64).tolist()]


def digits_of(value: Any, digits: int = 4) -> Any:
    """A number with so many significant digits, a whole one without a point; None of what is not finite."""
    if value is None or not np.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


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


BINS = (96, 72)
CLASSES = ("weakening", "between", "strengthening")
_LEAST_SHARE = 1e-4  # gains below this share of the largest are counted in the lowest row


def density(record: Record) -> dict[str, Any]:
    """A Neurons record, counted.

    Returns:
        ``counts``: cosine (rows, ascending) by log10 |gain| (columns, ascending), little-endian uint32 in base64;
        ``cosine`` and ``log_gain``, the ranges that the bins divide evenly; ``layers`` and ``classes``, a list a class
        with its count in every layer; ``threshold``, ``null``, ``classes_by``, ``absent``.
    """
    cosine, gain = (np.asarray(record[name], dtype=np.float64) for name in ("cosine", "gain"))
    there = ~np.isnan(cosine)
    cosine, size = cosine[there], np.abs(gain[there])
    threshold = float(record.parameters["threshold"])
    side = min(1.0, max(float(np.abs(cosine).max(initial=0.0)), threshold) * 1.04)
    largest = float(size.max(initial=0.0)) or 1.0
    lowest, highest = np.log10(largest * _LEAST_SHARE), np.log10(largest) + 0.04
    height = np.log10(np.maximum(size, largest * _LEAST_SHARE))
    counts, _, _ = np.histogram2d(cosine, height, BINS, [[-side, side], [lowest, highest]])
    layer = np.asarray(record["layer"])
    layers, classes = np.unique(layer), np.array([name or "" for name in record["class"]])
    return {
        "counts": base64.b64encode(counts.astype("<u4").tobytes()).decode(),
        "bins": list(BINS),
        "cosine": [-side, side],
        "log_gain": [float(lowest), float(highest)],
        "below": int((size < largest * _LEAST_SHARE).sum()),
        "layers": layers.tolist(),
        "classes": {c: [int(((layer == i) & (classes == c)).sum()) for i in layers] for c in CLASSES},
        "threshold": threshold,
        "absent": int((~there).sum()),
        "classes_by": record.stamp.get("classes_by"),
        "null": plain(dict(record.stamp.get("null", {}))),
    }
