"""What the page shows, as plain JSON: rows, counts and quantised matrices picked from Records, nothing computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from virtual_weights.record import Record
from virtual_weights.report.evidence import evidence
from virtual_weights.report.tables import EDGES_PER_PORT, density, drawn, plain, statements, strongest, table

MOST_LISTED = 200
_ERASURES = ("alignment", "z", "erasure")
_TABLES = ("bandwidth", "head_erasers", "channel", "labels")
_BESIDE = ("delivered", "attribution")  # matrices of which the page shows what it says of the leading edges


def payload(records: Iterable[Record], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page needs.

    Args:
        records: any Records. A question that the page knows gets a section of its own; of the others a table of at most
            ``MOST_LISTED`` rows is kept as it is, and of anything larger the name and the size.
        manifest: the model's name, sizes, components and provenance.

    Returns:
        A JSON-able dictionary: ``model``; ``maps`` (quantised matrices by question, port and kind of writer), ``edges``
        (the strongest of every port) and ``stamps`` (of every port); ``bandwidth``, ``head_erasers``, ``channel``,
        ``labels``, ``erasure``, ``neurons`` and ``statements`` (lists, one entry a record); ``evidence``, see there;
        ``others`` and ``too_large``.
    """
    records = list(records)
    found: dict[str, Any] = {"model": dict(manifest), "maps": [], "edges": [], "stamps": {}}
    found |= {name: [] for name in (*_TABLES, "erasure", "neurons", "statements", "others", "too_large")}
    for record in records:
        _pick(record, found)
    return found | {"evidence": evidence(records)}


def _pick(record: Record, found: dict[str, Any]) -> None:
    question = record.question
    if question in ("composition", "overlap"):
        maps, edges = drawn(record)
        found["maps"] += maps
        found["edges"] += edges
        if question == "composition":
            found["stamps"][str(record.parameters["port"])] = plain(dict(record.stamp))
    elif question in _TABLES:
        found[question].append(table(record))
    elif question == "erasure":
        found[question].append(strongest(record, _ERASURES, EDGES_PER_PORT))
    elif question == "neurons":
        found[question].append(density(record))
    elif question == "statements":
        found[question].append(statements(record))
    elif question in _BESIDE:
        return
    elif len(record.axes) == 1 and record.size <= MOST_LISTED:
        found["others"].append(table(record))
    else:
        found["too_large"].append({"question": question, "axes": {a.name: len(a.labels) for a in record.axes}})
