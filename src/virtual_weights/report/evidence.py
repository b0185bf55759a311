"""Edges as potential, actual and causal: what weights could carry, what flowed on text, and what removing them does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from virtual_weights.record import Record
from virtual_weights.report.tables import plain
from virtual_weights.stream.names import parse

TOP = 20
"""Edges between heads that each port shows, by composition score, one per group."""

_HEAD_PORTS = ("K", "Q", "V")
_EFFECT = {"effect_nats": "effect", "low": "low", "high": "high", "verdict": "verdict", "loss_changed": "changed"}
_Key = tuple[str, str, str]  # port, writer, and the reader or the group that several readers share


def evidence(records: Iterable[Record]) -> dict[str, Any] | None:
    """The strongest edges and all that were removed, each with what is known of it from weights, text and removal.

    Of several records of one question and port the last counts.

    Args:
        records: Composition, Contribution, attribution and ablation records are taken; others are passed over.

    Returns:
        ``rows``, see ``_row``; ``ports``, by question those there are records of; ``units`` of contribution by
        port; ``stamps``, with parameters, of contribution, attribution and ablations. None without text.
    """
    evidence = _Evidence()
    for record in records:
        if record.question == "ablation":
            evidence.ablations.append(record)
        elif record.question in evidence.pairs:
            evidence.pairs[record.question][str(record.parameters["port"])] = _Pairs(record)
    effects = evidence.effects()
    edges = dict.fromkeys(evidence.leading()) | effects
    if not edges or not (evidence.ablations or evidence.pairs["contribution"] or evidence.pairs["attribution"]):
        return None
    return {
        "rows": [_row(evidence, key, effect or {}) for key, effect in edges.items()],
        "ports": {question: list(of) for question, of in evidence.pairs.items()}
        | {"ablation": sorted({k[0] for k in effects})},
        "units": {port: pairs.record.columns[0].unit for port, pairs in evidence.pairs["contribution"].items()},
        "stamps": {question: _stamp(evidence.pairs[question].values()) for question in ("contribution", "attribution")}
        | {"ablation": [plain({**record.parameters, **record.stamp}) for record in evidence.ablations]},
    }


class _Pairs:
    """A record over (reader, writer), asked pair by pair."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.columns = {column.name: np.asarray(column.values, dtype=np.float64) for column in record.columns}
        readers, writers = record.axis("reader"), record.axis("writer")
        ends = [name.removesuffix(f".{record.parameters['port']}") for name in readers.labels]
        self.readers, self.writers = ({name: i for i, name in enumerate(names)} for names in (ends, writers.labels))
        self.group_of = dict(zip(ends, readers.groups, strict=False))
        self.members: dict[str, list[str]] = {}
        for reader, group in self.group_of.items():
            self.members.setdefault(group, []).append(reader)

    def value(self, column: str, reader: str, writer: str) -> float | None:
        """What a column says of a pair, None where it says nothing."""
        if column not in self.columns or reader not in self.readers or writer not in self.writers:
            return None
        return plain(float(self.columns[column][self.readers[reader], self.writers[writer]]))

    def rank(self, column: str, reader: str, writer: str) -> tuple[int | None, int | None]:
        """The writer's place among all that reach the reader, the largest being 1, and how many these are."""
        value = self.value(column, reader, writer)
        if value is None:
            return None, None
        row = self.columns[column][self.readers[reader]]
        return 1 + int((row > value).sum()), int((~np.isnan(row)).sum())


@dataclass(frozen=True)
class _Evidence:
    """The records, by question and port."""

    pairs: dict[str, dict[str, _Pairs]] = field(
        default_factory=lambda: {question: {} for question in ("composition", "contribution", "attribution")}
    )
    ablations: list[Record] = field(default_factory=list[Record])

    def of(self, question: str, port: str, column: str, reader: str, writer: str) -> float | None:
        """What a question says of a pair."""
        pairs = self.pairs[question].get(port)
        return None if pairs is None else pairs.value(column, reader, writer)

    def leading(self) -> Iterator[_Key]:
        """The strongest edges between heads of each port by score, one per group."""
        for port in _HEAD_PORTS:
            if port not in self.pairs["composition"]:
                continue
            pairs = self.pairs["composition"][port]
            heads = [name for name in pairs.writers if "H" in name]
            most = TOP * max((len(shared) for shared in pairs.members.values()), default=1)
            rows = pairs.record.select("writer", heads).top(most, "score").rows()
            keys = ((port, str(row["writer"]), str(row.get("reader_group") or _end(row["reader"])[0])) for row in rows)
            yield from list(dict.fromkeys(keys))[:TOP]

    def effects(self) -> dict[_Key, dict[str, Any]]:
        """What ablation did to the edges that were asked about, with the range of the random ones beside."""
        effects: dict[_Key, dict[str, Any]] = {}
        for record in self.ablations:
            rows = list(record.rows())
            for row in rows:
                if row["kind"] != "asked":
                    continue
                reader, port = _end(row["reader"])
                random = (r["effect_nats"] for r in rows if r["kind"] == "random" and _match(r) == _match(row))
                like = [effect for effect in random if isinstance(effect, float)]
                shared = [name.partition(".")[0] for name in str(row["shared_with"] or "").split()]
                effects[port, str(row["writer"]), str(row["group"] or reader)] = {
                    "readers": [reader, *shared],
                    **{name: row[column] for column, name in _EFFECT.items()},
                    "random": {"low": min(like), "high": max(like), "count": len(like)} if like else None,
                }
        return effects


def _row(evidence: _Evidence, key: _Key, effect: Mapping[str, Any]) -> dict[str, Any]:
    """An edge: its ends, ``score``, ``z``; ``contribution``, ``share``, ``rank`` ``of`` how many; what ablation does.

    A group comes once: ``reader`` is the one of its readers with the highest score, whose score and contribution
    these are, and ``shared`` all of them. Attribution and effect are of the group. What is not known is None.
    """
    port, writer, end = key
    readers = _readers(evidence, port, end) or list(effect.get("readers", [end]))
    scores = [evidence.of("composition", port, "score", reader, writer) for reader in readers]
    reader = max(zip(scores, readers, strict=True), key=lambda pair: -1.0 if pair[0] is None else pair[0])[1]
    contribution = evidence.pairs["contribution"].get(port)
    rank, of = (None, None) if contribution is None else contribution.rank("contribution", reader, writer)
    several = len(readers) > 1
    return {
        "port": port,
        "writer": writer,
        "reader": reader,
        "group": end if several else None,
        "shared": readers if several else [],
        **{name: evidence.of("composition", port, name, reader, writer) for name in ("score", "null_ratio", "z")},
        **{name: evidence.of("contribution", port, name, reader, writer) for name in ("contribution", "share")},
        "rank": rank,
        "of": of,
        "attribution": evidence.of("attribution", port, "attribution", reader, writer),
        **{name: effect.get(name) for name in (*_EFFECT.values(), "random")},
    }


def _readers(evidence: _Evidence, port: str, end: str) -> list[str]:
    """All names of a group, by any record that knows it."""
    members = (of[port].members.get(end, []) for of in evidence.pairs.values() if port in of)
    return next((names for names in members if names), [])


def _end(reader: Any) -> tuple[str, str]:
    """A reader without its port, and the port: ``L18H6`` and ``K`` of ``L18H6.K``, twice itself of ``unembed``."""
    label = parse(str(reader))
    return str(replace(label, port=None)), label.port or str(label)


def _match(row: Mapping[str, Any]) -> tuple[str, str]:
    """What an edge has in common with its random ones: kind of writer, and port."""
    return parse(str(row["writer"])).kind, _end(row["reader"])[1]


def _stamp(pairs: Iterable[_Pairs]) -> dict[str, Any] | None:
    """Conventions and plain parameters of the first of some records, which share them."""
    first: Sequence[_Pairs] = list(pairs)[:1]
    return next((plain({**pair.record.parameters, **pair.record.stamp}) for pair in first), None)
