"""All pairs of a port as documents: one that names them, and their numbers column by column, in windows of readers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from virtual_weights.record import Record
from virtual_weights.report.tables import plain

WINDOW = 1 << 18
"""Most numbers of one document, unless one reader has more writers than that."""

_COLUMNS = {"composition": ("score", "lift"), "contribution": ("share",), "attribution": ("attribution",)}


def pair_documents(
    records: Mapping[tuple[str, str], Record], port: str, of: str = "pairs"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The documents of one port.

    Args:
        records: by question and port; of compositions, contributions and attributions those of this port are taken.
        port: there is a composition of it.
        of: what their names begin with.

    Yields:
        Names with contents. First ``pairs-PORT``, or with what ``of`` says: ``readers``, ``writers`` and ``groups``;
        ``writer_effect`` and ``reader_effect``, see ``Composition``; ``windows``, the first reader of each window and
        where the last ends; ``columns``, by name the documents of all windows; ``stamp``. Then these: ``values``,
        readers by writers, of half precision, little-endian, in base64. NaN where a writer cannot reach or nothing is
        known; infinite where a pair reaches and has no score, since one of its ends is zero.
    """
    composition = records["composition", port]
    readers, writers = composition.axis("reader"), composition.axis("writer")
    step = max(1, WINDOW // max(1, len(writers.labels)))
    bounds = [*range(0, len(readers.labels), step), len(readers.labels)]
    columns = dict[str, list[str]]()
    numbers = dict[str, dict[str, Any]]()
    for name, values in _columns(records, port, readers.labels, writers.labels):
        columns[name] = [f"{of}-{port}-{name}-{i}" for i in range(len(bounds) - 1)]
        for document, start in zip(columns[name], bounds, strict=False):
            numbers[document] = {"values": halves(values[start : start + step])}
    yield (
        f"{of}-{port}",
        {
            "port": port,
            "readers": [label.removesuffix(f".{port}") for label in readers.labels],
            "writers": list(writers.labels),
            "groups": list(readers.groups),
            "writer_effect": _effects(composition, "writer_effect", 0),
            "reader_effect": _effects(composition, "reader_effect", 1),
            "windows": bounds,
            "columns": columns,
            "stamp": plain(dict(composition.stamp)),
        },
    )
    yield from numbers.items()


def halves(values: np.ndarray) -> str:
    """Numbers of half precision, little-endian, in base64."""
    with np.errstate(over="ignore"):
        return base64.b64encode(values.astype("<f2").tobytes()).decode()


def aligned(record: Record, column: str, readers: Sequence[str], writers: Sequence[str]) -> np.ndarray:
    """A column (readers, writers) in the order of other labels, NaN of what it has not."""
    values = np.asarray(record[column], dtype=np.float64)
    labels = record.axis("reader").labels, record.axis("writer").labels
    if (tuple(readers), tuple(writers)) == labels:
        return values
    result = np.full((len(readers), len(writers)), np.nan)
    rows, columns = _places(labels[0], readers), _places(labels[1], writers)
    result[np.ix_(rows >= 0, columns >= 0)] = values[np.ix_(rows[rows >= 0], columns[columns >= 0])]
    return result


def _columns(
    records: Mapping[tuple[str, str], Record], port: str, readers: Sequence[str], writers: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    for question, names in _COLUMNS.items():
        record = records.get((question, port))
        for name in names:
            if record is not None and name in [column.name for column in record.columns]:
                values = aligned(record, name, readers, writers)
                if name == "score":  # of a pair that reaches, no score is a fact of its own
                    values = np.where(
                        np.isnan(values) & np.asarray(record.present()).reshape(values.shape), np.inf, values
                    )
                yield name, values


def _effects(record: Record, column: str, axis: int) -> list[float | None]:
    """A column that is the same for all pairs of one writer, or of one reader, once for each."""
    if column not in [one.name for one in record.columns]:
        return []
    values = np.asarray(record[column], dtype=np.float64)
    places = np.expand_dims((~np.isnan(values)).argmax(axis), axis)
    first = np.take_along_axis(values, places, axis).squeeze(axis)
    return [None if value != value else float(f"{value:.5g}") for value in first.tolist()]


def _places(labels: Sequence[str], order: Sequence[str]) -> np.ndarray:
    """Where the labels of another order stand among these, -1 where they do not."""
    places = {label: place for place, label in enumerate(labels)}
    return np.array([places.get(label, -1) for label in order])
