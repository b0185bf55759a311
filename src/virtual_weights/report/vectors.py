"""What the explorer shows of a direction that somebody attached: who writes along it, and who reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from virtual_weights.record import Record
from virtual_weights.report.tables import rounded

HEADS, NEURONS = 4096, 300
"""The most heads, and the most neurons or features, that a document lists of each side by score; of neurons also the
foremost of every layer and port along the direction and against it."""

_SIDES = {"vector_writers": "writers", "vector_readers": "readers"}
_COLUMNS = ("score", "sign", "strength", "z", "lift")


def vectors(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """The documents of the pages of directions, by the directions' names.

    Args:
        records: any Records, of which those of ``VectorReaders`` and ``VectorWriters`` are taken.

    Returns:
        By name, of two directions of one name the second by its identity: ``name``, ``identity``, and ``writers`` and
        ``readers``, each where it was asked, with ``state``, ``norm`` (of the direction), ``of`` (how many there are of
        each kind), and in order of depth ``labels``, ``kinds`` and columns of four significant digits.
    """
    contents: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for record in records:
        if record.question not in _SIDES:
            continue
        identity = str(record.parameters["vector"])
        name = identity.rpartition(", sha256 ")[0] or identity
        name = names.setdefault(identity, identity if name in contents else name)
        content = contents.setdefault(name, {"name": name, "identity": identity})
        content[_SIDES[record.question]] = _side(record)
    return contents


def _side(record: Record) -> dict[str, Any]:
    (axis,) = record.axes
    kinds = [str(kind) for kind in record["kind"]]
    score = np.nan_to_num(np.asarray(record["score"], dtype=np.float64), nan=-1.0)
    places = _listed(axis.labels, kinds, score, np.asarray(record["sign"], dtype=np.float64))
    known = [column.name for column in record.columns]
    return {
        "state": record.stamp["state"],
        "norm": rounded([record.stamp["norm_of_vector"]])[0],
        "of": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "labels": [axis.labels[i] for i in places],
        "kinds": [kinds[i] for i in places],
        "columns": {name: rounded(np.asarray(record[name])[places]) for name in _COLUMNS if name in known},
    }


def _listed(labels: tuple[str, ...], kinds: list[str], score: np.ndarray, sign: np.ndarray) -> list[int]:
    """Places of the foremost of each kind, in order."""
    left = {"head": HEADS, "neuron": NEURONS, "feature": NEURONS}
    first = set[tuple[str, str, float]]()
    chosen: list[int] = []
    for place in np.argsort(-score, kind="stable").tolist():
        kind = kinds[place]
        if kind not in left:
            chosen.append(place)
            continue
        left[kind] -= 1
        group = re.sub(r"[NF]\d+", "", labels[place]), kind, float(sign[place])
        if left[kind] >= 0 or (kind != "head" and group not in first):
            chosen.append(place)
        first.add(group)
    return sorted(chosen)
