"""What single heads do and single edges carry, as documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from virtual_weights.record import Record
from virtual_weights.report.tables import digits_of, rounded, table

_OF_TOKENS = ("sequence", "position", "token", "text", "share", "loss", "loss_without")
_LIKELIEST = ("likeliest_text", "likeliest_text_without")


def heads(records: Mapping[tuple[str, str], Record]) -> dict[str, Any]:
    """Details of all heads.

    Args:
        records: by question and port.

    Returns:
        As far as there are records: ``circuits``, with ``labels`` and of each head the gains ``ov`` and ``qk``, without
        those beyond its rank; ``erasers``, with ``labels``, ``copying`` and ``negative_share``; ``tokens``, by head the
        first directions of its OV, see ``directions``.
    """
    shown: dict[str, Any] = {}
    if (circuits := records.get(("head_circuits", ""))) is not None:
        shown["circuits"] = {
            "labels": list(circuits.axis("head").labels),
            **{name: [_present(row) for row in np.asarray(circuits[name]).tolist()] for name in ("ov", "qk")},
        }
    if (erasers := records.get(("head_erasers", ""))) is not None:
        shown["erasers"] = {
            "labels": list(erasers.axis("head").labels),
            **{name: rounded(erasers[name]) for name in ("copying", "negative_share")},
        }
    if (tokens := records.get(("head_tokens", ""))) is not None:
        shown["tokens"] = directions(tokens, "head")
    return shown


def carried(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """What edges carry and do, by writer and reader as ``"L16H0/L18H6.K"``.

    Args:
        records: of one edge each; of ``edge_tokens`` there may be several texts, shortest first.

    Returns:
        By question a ``table``; of ``channel_tokens`` its ``directions``; of ``edge_tokens`` a list of tables, one a
        text.
    """
    edges: dict[str, dict[str, Any]] = {}
    for record in records:
        writer = record.parameters.get("writer") or record.parameters.get("name")
        edge = edges.setdefault(f"{writer}/{record.parameters['reader']}", {})
        if record.question == "edge_tokens":
            edge.setdefault(record.question, []).append(_by_token(record))
        elif record.question == "channel_tokens":
            edge[record.question] = directions(record).get("", [])
        else:
            edge[record.question] = table(record)
    for edge in edges.values():
        edge.get("edge_tokens", []).sort(key=lambda text: len(text["labels"]))
    return edges


def directions(record: Record, by: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Singular directions and the tokens nearest to them, in the order of the record.

    Args:
        record: of ``channel_tokens`` or ``head_tokens``.
        by: a column by which they are divided.

    Returns:
        By the values of that column, or under ``""``, of each block of directions ``directions`` (``"1"`` or
        ``"2-4"``), ``gain``, ``written_read``, ``random`` and ``ends``: by end lists of ``[text, id, cosine]``, each
        token once, at the side where it lies nearest, nearest first.
    """
    nothing = [""] * record.size
    names = ("directions", "end", "token", "text", "cosine", "gain", "random")
    columns = [_list(record, name) for name in names]
    between = _list(record, "written_read") if any(c.name == "written_read" for c in record.columns) else nothing
    blocks: dict[tuple[Any, Any], dict[str, Any]] = {}
    for place, which, cosine_of_ends, *row in zip(
        _list(record, by) if by else nothing, columns[0], between, *columns[1:], strict=True
    ):
        end, token, text, cosine, gain, random = row
        block = blocks.setdefault(
            (place, which),
            {"directions": which, "gain": digits_of(gain), "random": digits_of(random), "ends": {}},
        )
        if cosine_of_ends != "":
            block["written_read"] = digits_of(cosine_of_ends)
        nearest = block["ends"].setdefault(end, {})
        if token not in nearest or abs(nearest[token][2]) < abs(cosine):
            nearest[token] = [text, token, digits_of(cosine)]
    divided: dict[str, list[dict[str, Any]]] = {}
    for (place, _), block in blocks.items():
        ends = {end: sorted(tokens.values(), key=lambda t: -abs(t[2])) for end, tokens in block["ends"].items()}
        divided.setdefault(place, []).append(block | {"ends": ends})
    return divided


def _list(record: Record, name: str) -> list[Any]:
    values = record[name]
    return list(values) if isinstance(values, tuple) else np.asarray(values).tolist()


def _by_token(record: Record) -> dict[str, Any]:
    """The table of an edge's tokens, without what a page does not show, numbers to four digits."""
    shown = table(record)
    shown["columns"] = [column for column in shown["columns"] if column["name"] in (*_OF_TOKENS, *_LIKELIEST)]
    for column in shown["columns"]:
        column["values"] = [digits_of(value) if isinstance(value, float) else value for value in column["values"]]
    return shown


def _present(row: list[float]) -> list[float | None]:
    return [digits_of(value) for value in row if value == value]
