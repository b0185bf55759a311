"""Records over one axis, and the strongest entries of larger ones, as plain JSON columns."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from virtual_weights.record import Axis, Column, Record

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


EDGES_PER_PORT = 150
MOST_ROWS = 600
_STEPS = 65534  # 0 is "no number": cannot reach, or where listed undefined


def drawn(record: Record) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Maps and edges of a Composition or Overlap record.

    Heads as writers and everything else (embeddings, MLPs, biases) are kept apart: a matrix, and ``EDGES_PER_PORT``
    edges each by score, by lift and by strength, so that neither crowds out the other.
    """
    maps, edges = [], []
    for writers, part in _by_writers(_without_port(record)):
        maps.append(_matrix(part, "score" if record.question == "composition" else "overlap") | {"from": writers})
        if record.question == "composition":
            edges += _edges(part)
    return maps, edges


def _without_port(record: Record) -> Record:
    """The same with readers named as components: the page shows the port beside them, in its colour."""
    readers = record.axis("reader")
    names = tuple(label.removesuffix(f".{record.parameters['port']}") for label in readers.labels)
    named = replace(readers, labels=names)
    return replace(record, axes=tuple(named if axis is readers else axis for axis in record.axes))


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
    groups = tuple(writers.groups[i] for i in places) if writers.groups else ()
    chosen = Axis(writers.name, tuple(writers.labels[i] for i in places), groups)
    axes = record.axis("reader"), chosen
    return Record(record.question, axes, tuple(columns), record.parameters, record.stamp, record.provenance)


def _matrix(record: Record, column: str) -> dict[str, Any]:
    readers, writers = record.axis("reader"), record.axis("writer")
    values = np.asarray(record[column], dtype=np.float64)
    names = readers.labels, writers.labels
    by_layer = max(values.shape) > MOST_ROWS
    if by_layer:
        values, names = _strongest_by_layer(values, readers, writers)
    undefined = [] if by_layer else np.flatnonzero(np.isnan(values).ravel() & record.present().numpy()).tolist()
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    steps = np.where(np.isnan(values), 0, 1 + np.round(np.nan_to_num(values) / (largest or 1.0) * _STEPS))
    return {
        "question": record.question,
        "port": record.parameters["port"],
        "by_layer": by_layer,
        "readers": list(names[0]),
        "writers": list(names[1]),
        "groups": [] if by_layer else list(readers.groups),
        "largest": largest,
        "undefined": undefined,
        "steps": base64.b64encode(steps.astype("<u2").tobytes()).decode(),
    }


def _strongest_by_layer(values: np.ndarray, readers: Axis, writers: Axis) -> tuple[np.ndarray, tuple[Any, Any]]:
    """The largest entry of every pair of layers, where a map of all heads would be too large to look at."""
    rows, columns = ([label.split("H")[0] for label in axis.labels] for axis in (readers, writers))
    row_names, column_names = list(dict.fromkeys(rows)), list(dict.fromkeys(columns))
    largest = np.full((len(row_names), len(column_names)), np.nan)
    filled = np.where(np.isnan(values), -np.inf, values)
    row_of, column_of = np.array([row_names.index(r) for r in rows]), np.array([column_names.index(c) for c in columns])
    for i in range(len(row_names)):
        per_writer = filled[row_of == i].max(axis=0)
        for j in range(len(column_names)):
            best = per_writer[column_of == j].max()
            largest[i, j] = best if np.isfinite(best) else np.nan
    return largest, (tuple(row_names), tuple(column_names))


def _edges(record: Record) -> list[dict[str, Any]]:
    port = record.parameters["port"]
    members: dict[str, list[str]] = {}
    axis = record.axis("reader")
    for label, group in zip(axis.labels, axis.groups, strict=False):
        members.setdefault(group, []).append(label)
    known = [column.name for column in record.columns]
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    for by in ("score", "lift", "strength"):
        if by in known:
            rows |= {(row["reader"], row["writer"]): row for row in record.top(EDGES_PER_PORT, by).rows()}
    edges = []
    for row in rows.values():
        edge = {
            key: row[key] for key in ("writer", "reader", "score", "strength", "lift", "null_ratio", "z") if key in row
        }
        group = row.get("reader_group")
        if group:
            edge |= {"group": group, "shared": members[str(group)]}
        edges.append({"port": port, **edge})
    return edges
