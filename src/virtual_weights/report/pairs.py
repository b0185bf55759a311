"""Readers against writers: quantised matrices to look at and the strongest edges to name."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np

from virtual_weights.record import Axis, Column, Record

EDGES_PER_PORT = 150
MOST_ROWS = 600
_STEPS = 65534  # 0 is "cannot reach"


def drawn(record: Record) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Maps and edges of a Composition or Overlap record.

    Heads as writers and everything else (embeddings, MLPs, biases) are kept apart: a matrix and
    ``EDGES_PER_PORT`` edges each, so that neither crowds out the other.
    """
    maps, edges = [], []
    for writers, part in _by_writers(record):
        maps.append(_matrix(part, "score" if record.question == "composition" else "overlap") | {"from": writers})
        if record.question == "composition":
            edges += _edges(part)
    return maps, edges


def _by_writers(record: Record) -> Iterator[tuple[str, Record]]:
    axis = record.axis("writer")
    for name in ("heads", "others"):
        places = [i for i, label in enumerate(axis.labels) if ("H" in label) == (name == "heads")]
        if len(places) == len(axis.labels):
            yield name, record
        elif places:
            yield name, _only(record, axis, places)


def _only(record: Record, writers: Axis, places: list[int]) -> Record:
    """The same record with some of its writers."""
    columns = []
    for column in record.columns:
        assert not isinstance(column.values, tuple), "two axes: every column is a tensor"
        columns.append(Column(column.name, column.values[:, places], column.unit, column.meaning))
    channels = tuple(writers.channels[i] for i in places) if writers.channels else ()
    kept = Axis(writers.name, tuple(writers.labels[i] for i in places), channels)
    axes = record.axis("reader"), kept
    return Record(record.question, axes, tuple(columns), record.parameters, record.stamp, record.provenance)


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
