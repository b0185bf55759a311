"""The strongest edges of records: as rows, one for each map that heads share, and those that are worth removing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from virtual_weights.record import Record
from virtual_weights.runtime.edges.edge import Edge
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HEAD_PORTS


def edges_of(record: Record, top: int, by: str | None = None) -> list[dict[str, Any]]:
    """The strongest edges as plain rows: writer, reader, the columns, and who shares the reader's key/value group."""
    axis = record.axis("reader")
    members: dict[str, list[str]] = {}
    for label, group in zip(axis.labels, axis.groups, strict=False):
        members.setdefault(group, []).append(label)
    rows = []
    for row in record.top(top, by).rows():
        edge: dict[str, Any] = {"writer": row["writer"], "reader": row["reader"]}
        edge |= {c.name: row[c.name] for c in record.columns}
        if group := row.get("reader_group"):
            others = [name.partition(".")[0] for name in members[str(group)] if name != row["reader"]]
            edge |= {"group": group, "shared_with": others}
        rows.append(edge)
    return rows


def groups_of(edges: Iterable[Mapping[str, Any]], by: str = "score") -> list[dict[str, Any]]:
    """Edges that are one edge under several names, put together: writer, group, readers, largest value of a column."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for edge in edges:
        name = str(edge.get("group") or edge["reader"])
        first = {"writer": edge["writer"], "group": name, "readers": [], by: edge[by]}
        entry = merged.setdefault((str(edge["writer"]), name), first)
        entry["readers"].append(edge["reader"])
        entry[by] = max(entry[by], edge[by])
    return list(merged.values())


def distinct(record: Record, top: int, by: str) -> list[dict[str, Any]]:
    """The largest entries of a record over (reader, writer), each key/value group under the first of its names."""
    groups = record.axis("reader").groups
    size = max((groups.count(group) for group in set(groups)), default=1)
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in record.top(top * size, by).rows():
        rows.setdefault((row["writer"], row.get("reader_group") or row["reader"]), row)
    return list(rows.values())[:top]


def strongest(record: Record, top: int, by: str) -> dict[tuple[str, str], float]:
    """The edges of highest value of a column, writer and reader, one for each group, with the value."""
    return {(str(row["writer"]), str(row["reader"])): row[by] for row in distinct(record, top, by)}


def among_heads(stream: Stream, records: Iterable[Record]) -> dict[str, Record]:
    """Compositions of heads with heads, by port."""
    names = [str(head.label) for head in stream.heads]
    compositions = (r for r in records if r.question == "composition" and r.parameters["port"] in HEAD_PORTS)
    return {str(record.parameters["port"]): record.select("writer", names) for record in compositions}


def foremost(
    stream: Stream, scored: Mapping[str, Record], attributed: Iterable[Record], count: int
) -> list[tuple[str, str]]:
    """The edges that are worth removing: half by composition score, the same number of each port, half by attribution.

    Args:
        stream: the model.
        scored: compositions by port, see ``among_heads``.
        attributed: attributions.
        count: how many in all.
    """
    share = count // 2 // max(len(scored), 1)
    edges = [edge for record in scored.values() for edge in strongest(record, share, "score")]
    sized = [(size, edge) for record in attributed for edge, size in strongest(record, count, "size").items()]
    edges += [edge for _, edge in sorted(sized, reverse=True)]
    return list(once(stream, edges))[:count]


def once(stream: Stream, edges: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each edge under the first of its names."""
    keys = set[Any]()
    for edge in edges:
        key = Edge.of(stream, *edge).key
        if key not in keys:
            keys.add(key)
            yield edge
