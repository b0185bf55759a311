"""Two atlases side by side: the pairs of another one in the order of this one, and what only one of them has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from virtual_weights.atlas import Atlas
from virtual_weights.record import Column, Record
from virtual_weights.report.pairs import aligned, pair_documents
from virtual_weights.report.tables import plain

NAMED = 200
"""The most parts and ports that are named of those that only one atlas has; beside them is how many there are."""

_COLUMNS = ("score", "lift", "strength")  # the last says which pairs reach


def against(records: Iterable[Record], manifest: Mapping[str, Any], other: Atlas) -> dict[str, Any]:
    """The documents that compare an atlas with another one.

    Pairs are the same where the names of their ends are: of two checkpoints of one architecture every pair, of two
    models those that both have, whether or not these do the same.

    Args:
        records: answers of this atlas, of which the compositions are taken.
        manifest: of this atlas.
        other: the other one; of its answers those under the same conventions, else the newest.

    Returns:
        ``"against-K"`` and the like for every port with a composition in both, see ``pair_documents``: ``score`` and
        ``lift`` of the other atlas by this one's readers and writers, NaN where the other has no such pair. And
        ``"against"``, for the map: the other ``model``, its ``norm``, the ``ports`` compared,
        ``only_here`` and ``only_there`` (parts and ports, ``names`` of so many as ``of`` says), and ``conventions``: by
        name, of this and of the other, where they differ.
    """
    here = {str(record.parameters["port"]): record for record in records if record.question == "composition"}
    there: dict[str, Record] = {}
    for port, record in here.items():
        same = other.find("composition", **record.parameters) or other.find("composition", port=port)
        if same is not None:
            there[port] = same
    ends, others = _ends(manifest, here), _ends(other.manifest, there)
    documents: dict[str, Any] = {}
    for port, record in there.items():
        documents |= pair_documents({("composition", port): _as_here(here[port], record)}, port, "against")
    documents["against"] = {
        "model": str(other.manifest["model"]),
        "norm": str(other.manifest.get("norm", "")),
        "ports": list(there),
        "only_here": _only(ends, others),
        "only_there": _only(others, ends),
        "conventions": {name: pair for port in there for name, pair in _differing(here[port], there[port]).items()},
    }
    return documents


def _as_here(here: Record, there: Record) -> Record:
    """The other's pairs in this one's order."""
    ends = here.axis("reader").labels, here.axis("writer").labels
    columns = list[Column]()
    for column in there.columns:
        if column.name in _COLUMNS and not isinstance(column.values, tuple):
            columns.append(replace(column, values=column.values.new_tensor(aligned(there, column.name, *ends))))
    return replace(there, axes=here.axes, columns=tuple(columns))


def _ends(manifest: Mapping[str, Any], compositions: Iterable[str]) -> list[str]:
    """Parts of a model, and the ports that are compared."""
    return [*(str(component["label"]) for component in manifest["components"]), *(f"port {p}" for p in compositions)]


def _only(ends: Sequence[str], others: Iterable[str]) -> dict[str, Any]:
    known = set(others)
    names = [name for name in ends if name not in known]
    return {"names": names[:NAMED], "of": len(names)}


def _differing(here: Record, there: Record) -> dict[str, list[Any]]:
    """Conventions under which two answers were computed, where they are not the same."""
    settings = [{**record.parameters, "norm": record.stamp.get("norm")} for record in (here, there)]
    return {
        name: plain([settings[0].get(name), settings[1].get(name)])
        for name in ("norm", "rotary_offset")
        if settings[0].get(name) != settings[1].get(name)
    }
