"""What the page shows, as plain JSON: rows and quantised matrices picked from Records, nothing computed."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from virtual_weights.record import Axis, Record

EDGES_PER_PORT = 150
MOST_ROWS = 600
_STEPS = 65534  # 0 is "cannot reach"


def payload(records: Iterable[Record], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page needs.

    Args:
        records: answers of ``Composition`` and ``Overlap``; others are passed over.
        manifest: the model's name, sizes, components and provenance.

    Returns:
        A JSON-able dictionary: ``model``, ``maps`` (a quantised matrix per question and port) and
        ``edges`` (the strongest of every port).
    """
    maps, edges, stamps = [], [], {}
    for record in records:
        if record.question == "composition":
            maps.append(_matrix(record, "score"))
            edges += _edges(record)
            stamps[str(record.parameters["port"])] = dict(record.stamp)
        elif record.question == "overlap":
            maps.append(_matrix(record, "overlap"))
    return {"model": dict(manifest), "maps": maps, "edges": edges, "stamps": stamps}


def _matrix(record: Record, column: str) -> dict[str, Any]:
    readers, writers = record.axis("reader"), record.axis("writer")
    values = np.asarray(record[column], dtype=np.float64)
    names = readers.labels, writers.labels
    by_layer = max(values.shape) > MOST_ROWS
    if by_layer:
        values, names = _strongest_by_layer(values, readers, writers)
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    steps = np.where(np.isnan(values), 0, 1 + np.round(np.nan_to_num(values) / (largest or 1.0) * _STEPS))
    return {
        "question": record.question,
        "port": record.parameters["port"],
        "by_layer": by_layer,
        "readers": list(names[0]),
        "writers": list(names[1]),
        "channels": [] if by_layer else list(readers.channels),
        "largest": largest,
        "steps": base64.b64encode(steps.astype("<u2").tobytes()).decode(),
    }


def _strongest_by_layer(values: np.ndarray, readers: Axis, writers: Axis) -> tuple[np.ndarray, tuple[Any, Any]]:
    """The largest entry of every pair of layers, where a map of all heads would be too large to look at."""
    rows, columns = ([label.split("H")[0] for label in axis.labels] for axis in (readers, writers))
    row_names, column_names = list(dict.fromkeys(rows)), list(dict.fromkeys(columns))
    found = np.full((len(row_names), len(column_names)), np.nan)
    filled = np.where(np.isnan(values), -np.inf, values)
    row_of, column_of = np.array([row_names.index(r) for r in rows]), np.array([column_names.index(c) for c in columns])
    for i in range(len(row_names)):
        per_writer = filled[row_of == i].max(axis=0)
        for j in range(len(column_names)):
            best = per_writer[column_of == j].max()
            found[i, j] = best if np.isfinite(best) else np.nan
    return found, (tuple(row_names), tuple(column_names))


def _edges(record: Record) -> list[dict[str, Any]]:
    port = record.parameters["port"]
    members: dict[str, list[str]] = {}
    axis = record.axis("reader")
    for label, channel in zip(axis.labels, axis.channels, strict=False):
        members.setdefault(channel, []).append(label)
    edges = []
    for row in record.top(EDGES_PER_PORT).rows():
        edge = {key: row[key] for key in ("writer", "reader", "score", "strength", "null_ratio", "z")}
        channel = row.get("reader_channel")
        if channel:
            edge |= {"channel": channel, "shared": members[str(channel)]}
        edges.append({"port": port, **edge})
    return edges
