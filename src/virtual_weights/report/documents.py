"""What the explorer shows, as JSON documents: the map of a model, and all pairs of every port."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from virtual_weights.record import Record
from virtual_weights.record.durable import replacing
from virtual_weights.report.format import FORMAT, INDEX
from virtual_weights.report.pairs import pair_documents
from virtual_weights.report.parts import carried, heads
from virtual_weights.report.structure import structure
from virtual_weights.report.tables import plain, statements, table
from virtual_weights.report.vectors import vectors
from virtual_weights.stream.names import parse

_CARRIED = ("channel", "channel_tokens", "offset_profile", "pair_angles", "edge_tokens")
_TABLES = {"bandwidth": table, "statements": statements}


def documents(
    records: Iterable[Record], manifest: Mapping[str, Any], compared: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The documents of a model.

    Args:
        records: answers, of which those that a page shows are taken; of several to one question the last.
        manifest: the model's name, sizes, components and provenance.
        compared: what ``against`` says of another atlas: its documents are among these, its summary is in the map.

    Returns:
        By name: ``"map"``; ``"pairs-K"`` and the like for every port with a composition, see ``pair_documents``;
        where they are stored ``"bandwidth"`` and ``"statements"``, see ``tables``, ``"heads"`` and ``"structure"``, see
        there; ``"pair-0"`` and the like, what an edge carries, see ``carried``; ``"vector-0"`` and the like, see
        ``vectors``. The map's ``"stored"`` has the names of those between, of an edge by ``"L16H0/L18H6.K"``, its
        ``"vectors"`` those of directions by their names: a name that somebody gave never becomes that of a file.
    """
    records = list(records)
    by_question: dict[tuple[str, str], Record] = {}
    of_edges = list[Record]()
    for record in records:
        if record.question in _CARRIED and record.parameters.get("reader") is not None:
            of_edges.append(record)
        else:
            by_question[record.question, str(record.parameters.get("port", ""))] = record
    edges = carried(of_edges)
    ports = [port for question, port in by_question if question == "composition"]
    tables = {name: make(by_question[name, ""]) for name, make in _TABLES.items() if (name, "") in by_question}
    if details := heads(by_question):
        tables["heads"] = details
    if whole := structure(records):
        tables["structure"] = whole
    numbers = {pair: f"pair-{i}" for i, pair in enumerate(edges)}
    attached = vectors(records)
    named = {name: f"vector-{i}" for i, name in enumerate(attached)}
    beside = {"stored": {name: name for name in tables} | numbers, "vectors": named}
    pages = dict(compared or {})
    return {
        "map": {**_map(by_question, manifest, ports), **beside, "against": pages.pop("against", None)},
        **{name: content for port in ports for name, content in pair_documents(by_question, port)},
        **tables,
        **{numbers[pair]: content for pair, content in edges.items()},
        **{named[name]: content for name, content in attached.items()},
        **pages,
    }


def write_documents(folder: Path, shown: Mapping[str, Any]) -> None:
    """Write documents into a folder, each whole, then their index with sizes and checksums, and remove all others."""
    folder.mkdir(exist_ok=True)
    entries: dict[str, Any] = {}
    for name, document in shown.items():
        content = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        file = f"{name.lower()}.json"
        _write(folder / file, content)
        entries[name] = {"file": file, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(folder / INDEX, json.dumps({"format": FORMAT, "documents": entries}).encode())
    for stale in {path.name for path in folder.glob("*.json")} - {
        INDEX,
        *(entry["file"] for entry in entries.values()),
    }:
        (folder / stale).unlink()


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as aside:
        aside.write_bytes(content)


def _map(
    records: Mapping[tuple[str, str], Record], manifest: Mapping[str, Any], ports: Sequence[str]
) -> dict[str, Any]:
    """Model, parts, behaviours of heads and effects of removed edges."""
    labels = records.get(("labels", ""))
    sizes = manifest["sizes"]
    run = next((record.stamp for record in records.values() if "text" in record.stamp), None)
    return {
        "model": str(manifest["model"]),
        "width": sizes["d_model"],
        "layers": sizes["n_layers"],
        "norm": str(manifest.get("norm", "")),
        "version": str(manifest.get("version", "")),
        "parts": [_part(component) for component in manifest["components"]],
        "ports": list(ports),
        "behaviours": {} if labels is None else _behaviours(labels),
        "threshold": None if labels is None else labels.parameters.get("threshold"),
        "effects": [effect for (question, _), r in records.items() if question == "ablation" for effect in _effects(r)],
        "ablation": _manner(records.get(("ablation", ""))),
        "run": None if run is None else {name: plain(run.get(name)) for name in ("text", "tokens", "sequences")},
    }


def _part(component: Mapping[str, Any]) -> dict[str, Any]:
    label = parse(str(component["label"]))
    names = ("label", "kind", "layer", "reads", "writes", "group")
    return {**{name: component[name] for name in names}, "head": label.index if label.kind == "head" else None}


def _behaviours(record: Record) -> dict[str, Any]:
    """Of every head its label, and its attention to each kind of place."""
    names = [column.name for column in record.columns if column.name != "label"]
    scores = {name: np.asarray(record[name], dtype=np.float64) for name in names}
    labels = list(record["label"])
    return {
        head: {"label": labels[i], "scores": {name: plain(float(scores[name][i])) for name in names}}
        for i, head in enumerate(record.axes[0].labels)
    }


def _effects(record: Record) -> list[dict[str, Any]]:
    """Removed edges, those asked about and those drawn at random."""
    effects: list[dict[str, Any]] = []
    for row in record.rows():
        reader, _, port = str(row["reader"]).partition(".")
        effects.append(
            {
                "port": port or reader,
                "writer": row["writer"],
                "reader": reader,
                "shared": [name.partition(".")[0] for name in str(row["shared_with"] or "").split()],
                "kind": row["kind"],
                "effect": row["effect_nats"],
                "low": row["low"],
                "high": row["high"],
                "verdict": row["verdict"],
                "changed": row["loss_changed"],
            }
        )
    return effects


def _manner(record: Record | None) -> dict[str, Any] | None:
    """How edges were removed, and by what rule."""
    if record is None:
        return None
    settings = {**record.parameters, **record.stamp}
    return {name: plain(settings.get(name)) for name in ("least", "sequences", "replacement", "text", "clean_loss")}
