"""What the explorer shows of the stream as a whole: how crowded it is, what is kept and erased in it, and its basis."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from virtual_weights.record import Record
from virtual_weights.report.tables import density, digits_of, plain, rounded

HEADS, PAIRS, MASSIVE = 4096, 300, 50
"""The most heads, erasing pairs and massive coordinates that a document lists; beside each is how many there are."""

_HEAD = ("copying", "negative_share", "complex_share", "trace_z", "kept", "token_copying", "token_negative_share")
_PAIR = ("alignment", "z", "erasure", "baseline")
_CROWD = (
    *("directions", "dimension", "welch", "largest", "largest_pair", "mean_square"),
    *("random_largest", "random_mean_square"),
)
_COORDINATE = ("write_energy", "write_kurtosis", "read_energy", "read_kurtosis")
_EVERY_DIGIT = 17


def structure(records: Iterable[Record]) -> dict[str, Any]:
    """The document of the page Structure.

    Numbers have four significant digits; what is absent is None, and of a question without an answer there is no entry.

    Args:
        records: any Records, of which it takes its own.

    Returns:
        ``crowds``: of every kind of directions what was answered: ``coherence`` (its figures, and pairs of directions
        by ``|cos|`` as ``count`` and ``random``), ``interference`` (by number of signals ``n``, with ``exponents``) and
        ``recovery`` (fidelity by ``n`` and method, with what each method is). ``neurons``, see ``tables.density``.
        ``heads``: the ``HEADS`` of largest ``|trace_z|`` in order of depth, columns by name, of ``of`` heads, with the
        null. ``erasure``: the ``PAIRS`` of largest alignment among ``of``, and the largest of every pair of layers.
        ``basis``: energy and kurtosis of every coordinate, the rotated kurtosis by quantiles, the ``MASSIVE`` largest
        massive coordinates.
    """
    contents: dict[str, Any] = {}
    makers = {"neurons": density, "head_erasers": _heads, "erasure": _erasure, "basis": _basis}
    crowds = {"coherence": _coherence, "interference": _interference, "recovery": _recovery}
    for record in records:
        if record.question in makers:
            contents[record.question.replace("head_erasers", "heads")] = makers[record.question](record)
        elif record.question in crowds:
            kind = str(record.parameters["kind"])
            content = contents.setdefault("crowds", {}).setdefault(kind, {})
            content[record.question] = crowds[record.question](record)
    return contents


def _coherence(record: Record) -> dict[str, Any]:
    figures = {name: plain(record.stamp.get(name)) for name in _CROWD}
    return figures | {name: rounded(record[name], _EVERY_DIGIT) for name in ("count", "random")}


def _interference(record: Record) -> dict[str, Any]:
    names = [column.name for column in record.columns]
    values = {name: rounded(record[name]) for name in names}
    return {"n": _counts(record), **values, "exponents": plain(dict(record.stamp["exponents"]))}


def _recovery(record: Record) -> dict[str, Any]:
    methods = [{"name": c.name, "meaning": c.meaning, "fidelity": rounded(c.values)} for c in record.columns]
    return {"n": _counts(record), "directions": record.stamp["directions"], "methods": methods}


def _counts(record: Record) -> list[int]:
    return [int(label) for label in record.axes[0].labels]


def _heads(record: Record) -> dict[str, Any]:
    labels, size = record.axes[0].labels, np.abs(np.asarray(record["trace_z"], dtype=np.float64))
    chosen = np.sort(np.argsort(-np.nan_to_num(size), kind="stable")[:HEADS])
    known = [column.name for column in record.columns]
    return {
        "labels": [labels[i] for i in chosen],
        "of": len(labels),
        "columns": {name: rounded(np.asarray(record[name])[chosen]) for name in _HEAD if name in known},
        "null": plain(dict(record.stamp.get("null", {}))),
    }


def _erasure(record: Record) -> dict[str, Any]:
    """The strongest pairs, and the strongest of every pair of layers; what no layer has stands before the first."""
    values = np.asarray(record["alignment"], dtype=np.float64)
    erasers, writers = record.axis("reader").labels, record.axis("writer").labels
    rows, columns = _layers(erasers), _layers(writers)
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), axis=None, kind="stable")
    pairs = [
        {"writer": row["writer"], "eraser": row["reader"], **{name: digits_of(row[name]) for name in _PAIR}}
        for row in record.top(PAIRS, by="alignment").rows()
    ]
    first = min(rows + columns)
    depths = 1 + max(rows + columns) - first
    cells = (np.array(rows)[:, None] - first) * depths + np.array(columns) - first
    there = order[: int(np.isfinite(values).sum())]
    cell, place = np.unique(cells.ravel()[there], return_index=True)  # the first of a cell is its largest
    best = there[place]
    return {
        "pairs": pairs,
        "of": len(there),
        "erasing": (cell // depths + first).tolist(),
        "writing": (cell % depths + first).tolist(),
        "largest": rounded(values.ravel()[best]),
        "eraser": [erasers[flat // len(writers)] for flat in best],
        "writer": [writers[flat % len(writers)] for flat in best],
        "norm_scalar": record.stamp.get("norm_scalar"),
    }


def _basis(record: Record) -> dict[str, Any]:
    energy = np.fmax(*(np.asarray(record[name], dtype=np.float64) for name in ("write_energy", "read_energy")))
    massive = [int(i) for i in np.argsort(-energy, kind="stable") if float(np.asarray(record["massive"])[i]) > 0]
    turned = {side: np.asarray(record[f"{side}_kurtosis_turned"], dtype=np.float64) for side in ("write", "read")}
    return {
        "columns": {name: rounded(record[name]) for name in _COORDINATE},
        "means": {
            side: {
                "trained": digits_of(float(np.mean(np.asarray(record[f"{side}_kurtosis"])))),
                "turned": digits_of(float(np.mean(values))),
                "quantiles": rounded(np.quantile(values, (0.01, 0.5, 0.99))),
            }
            for side, values in turned.items()
        },
        "gaussian": digits_of(record.stamp["gaussian"]),
        "threshold": record.parameters["massive"],
        "massive": massive[:MASSIVE],
        "of_massive": len(massive),
    }


def _layers(labels: Sequence[str]) -> list[int]:
    """Layers of components, -1 of what stands in none."""
    matches = (re.match(r"L(\d+)", label) for label in labels)
    return [-1 if match is None else int(match[1]) for match in matches]
