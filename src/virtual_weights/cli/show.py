"""Results on stdout: one JSON object, or tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from virtual_weights.record import Record


def put_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; NaN never appears."""
    print(json.dumps(value, allow_nan=False))


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; numbers are right-aligned."""
    drawn = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    body = [[_text(cell) for cell in row] for row in rows]
    for i, name in enumerate(head):
        numeric = bool(body) and all(_numeric(row[i]) for row in body)
        drawn.add_column(escape(name), justify="right" if numeric else "left", no_wrap=True)
    for row in body:
        drawn.add_row(*(escape(cell) for cell in row))
    console().print(drawn)


def line(text: str) -> None:
    """A line on stdout."""
    console().print(escape(text), highlight=False, soft_wrap=True)


def console() -> Console:
    """The console of stdout; wide where the output is no terminal, so that nothing is cut."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def edges_of(record: Record, top: int, by: str | None = None) -> list[dict[str, Any]]:
    """The strongest edges as plain rows: writer, reader, the columns, and who shares the reader's channel."""
    axis = record.axis("reader")
    members: dict[str, list[str]] = {}
    for label, channel in zip(axis.labels, axis.channels, strict=False):
        members.setdefault(channel, []).append(label)
    rows = []
    for row in record.top(top, by).rows():
        channel = row.get("reader_channel")
        edge: dict[str, Any] = {"writer": row["writer"], "reader": row["reader"]}
        edge |= {c.name: row[c.name] for c in record.columns}
        if channel:
            edge |= {"channel": channel, "shared_with": [x for x in members[str(channel)] if x != row["reader"]]}
        rows.append(edge)
    return rows


def channels_of(edges: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Edges that are one channel seen under several names, put together: writer, channel, readers, highest score."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for edge in edges:
        name = str(edge.get("channel") or edge["reader"])
        group = groups.setdefault(
            (str(edge["writer"]), name),
            {"writer": edge["writer"], "channel": name, "readers": [], "score": edge["score"]},
        )
        group["readers"].append(edge["reader"])
        group["score"] = max(group["score"], edge["score"])
    return list(groups.values())


def _text(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell)


def _numeric(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
