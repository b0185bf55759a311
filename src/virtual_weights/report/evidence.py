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
"""Edges between heads that each port shows, by composition score, one per channel."""

_HEAD_PORTS = ("K", "Q", "V")
_PROVED = {"effect_nats": "effect", "low": "low", "high": "high", "p": "p", "verdict": "verdict"}
_Key = tuple[str, str, str]  # port, writer, and the reader or the channel that several readers share


def evidence(records: Iterable[Record]) -> dict[str, Any] | None:
    """The strongest edges and all that were removed, each with what is known of it from weights, text and removal.

    Of several records of one question and port the last counts.

    Args:
        records: Composition, Delivered, attribution and prove records are taken; others are passed over.

    Returns:
        ``rows``, see ``_row``; ``ports``, by question those there are records of; ``units`` of delivered energy by
        port; ``stamps``, with parameters, of delivered energy, attribution and proofs. None without text.
    """
    found = _Found()
    for record in records:
        if record.question == "prove":
            found.proofs.append(record)
        elif record.question in found.pairs:
            found.pairs[record.question][str(record.parameters["port"])] = _Pairs(record)
    told = found.told()
    edges = dict.fromkeys(found.leading()) | told
    if not edges or not (found.proofs or found.pairs["delivered"] or found.pairs["attribution"]):
        return None
    return {
        "rows": [_row(found, key, proof or {}) for key, proof in edges.items()],
        "ports": {question: list(of) for question, of in found.pairs.items()} | {"prove": sorted({k[0] for k in told})},
        "units": {port: each.record.columns[0].unit for port, each in found.pairs["delivered"].items()},
        "stamps": {question: _stamp(found.pairs[question].values()) for question in ("delivered", "attribution")}
        | {"prove": [plain({**record.parameters, **record.stamp}) for record in found.proofs]},
    }


class _Pairs:
    """A record over (reader, writer), asked pair by pair."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.columns = {column.name: np.asarray(column.values, dtype=np.float64) for column in record.columns}
        readers, writers = record.axis("reader"), record.axis("writer")
        self.readers, self.writers = ({name: i for i, name in enumerate(axis.labels)} for axis in (readers, writers))
        self.channel = dict(zip(readers.labels, readers.channels, strict=False))
        self.members: dict[str, list[str]] = {}
        for reader, channel in self.channel.items():
            self.members.setdefault(channel, []).append(reader)

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
class _Found:
    """The records, by question and port."""

    pairs: dict[str, dict[str, _Pairs]] = field(
        default_factory=lambda: {question: {} for question in ("composition", "delivered", "attribution")}
    )
    proofs: list[Record] = field(default_factory=list[Record])

    def of(self, question: str, port: str, column: str, reader: str, writer: str) -> float | None:
        """What a question says of a pair."""
        pairs = self.pairs[question].get(port)
        return None if pairs is None else pairs.value(column, reader, writer)

    def leading(self) -> Iterator[_Key]:
        """The strongest edges between heads of each port by score, one per channel."""
        for port in _HEAD_PORTS:
            if port not in self.pairs["composition"]:
                continue
            pairs = self.pairs["composition"][port]
            heads = [name for name in pairs.writers if "H" in name]
            most = TOP * max((len(shared) for shared in pairs.members.values()), default=1)
            rows = pairs.record.select("writer", heads).top(most, "score").rows()
            keys = ((port, str(row["writer"]), str(row.get("reader_channel") or row["reader"])) for row in rows)
            yield from list(dict.fromkeys(keys))[:TOP]

    def told(self) -> dict[_Key, dict[str, Any]]:
        """What was proved of each edge that was asked about, with the range of the random edges it was held against."""
        found: dict[_Key, dict[str, Any]] = {}
        for record in self.proofs:
            rows = list(record.rows())
            for row in rows:
                if row["kind"] != "asked":
                    continue
                reader, port = _end(str(row["reader"]))
                random = (r["effect_nats"] for r in rows if r["kind"] == "random" and _match(r) == _match(row))
                like = [effect for effect in random if isinstance(effect, float)]
                shared = [name.partition(".")[0] for name in str(row["shared_with"] or "").split()]
                found[port, str(row["writer"]), str(row["channel"] or reader)] = {
                    "readers": [reader, *shared],
                    **{name: row[column] for column, name in _PROVED.items()},
                    "random": {"low": min(like), "high": max(like), "count": len(like)} if like else None,
                }
        return found


def _row(found: _Found, key: _Key, proof: Mapping[str, Any]) -> dict[str, Any]:
    """An edge: its ends, ``score``, ``z``; ``delivered``, ``share``, ``rank`` ``of`` how many; and what removing does.

    A channel comes once: ``reader`` is the one of its readers with the highest score, whose score and delivered energy
    these are, and ``shared`` all of them. Attribution and effect are of the channel. What is not known is None.
    """
    port, writer, end = key
    readers = _readers(found, port, end) or list(proof.get("readers", [end]))
    scores = [found.of("composition", port, "score", reader, writer) for reader in readers]
    reader = max(zip(scores, readers, strict=True), key=lambda each: -1.0 if each[0] is None else each[0])[1]
    delivered = found.pairs["delivered"].get(port)
    rank, of = (None, None) if delivered is None else delivered.rank("delivered", reader, writer)
    several = len(readers) > 1
    return {
        "port": port,
        "writer": writer,
        "reader": reader,
        "channel": end if several else None,
        "shared": readers if several else [],
        **{name: found.of("composition", port, name, reader, writer) for name in ("score", "null_ratio", "z")},
        **{name: found.of("delivered", port, name, reader, writer) for name in ("delivered", "share")},
        "rank": rank,
        "of": of,
        "attribution": found.of("attribution", port, "attribution", reader, writer),
        **{name: proof.get(name) for name in (*_PROVED.values(), "random")},
    }


def _readers(found: _Found, port: str, end: str) -> list[str]:
    """All names of a channel, by any record that knows it."""
    members = (of[port].members.get(end, []) for of in found.pairs.values() if port in of)
    return next((each for each in members if each), [])


def _end(reader: str) -> tuple[str, str]:
    """A reader without its port, and the port: ``L18H6`` and ``K`` of ``L18H6.K``, twice itself of ``unembed``."""
    label = parse(reader)
    return str(replace(label, port=None)), label.port or reader


def _match(row: Mapping[str, Any]) -> tuple[str, str]:
    """What an edge has in common with its random ones: kind of writer, and port."""
    return parse(str(row["writer"])).kind, _end(str(row["reader"]))[1]


def _stamp(pairs: Iterable[_Pairs]) -> dict[str, Any] | None:
    """Conventions and plain parameters of the first of some records, which share them."""
    first: Sequence[_Pairs] = list(pairs)[:1]
    return next((plain({**each.record.parameters, **each.record.stamp}) for each in first), None)
