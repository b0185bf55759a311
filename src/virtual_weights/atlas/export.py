"""Stored edges as one file for other programs: Parquet, CSV, or a graph that networkx reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtual_weights.atlas.atlas import Atlas
from virtual_weights.atlas.edges import Pairs, common_stamp, pairs_of, plain
from virtual_weights.atlas.parts import PAIR, ROW, disk_errors
from virtual_weights.errors import UsageError
from virtual_weights.record.durable import replacing
from virtual_weights.stream import parse
from virtual_weights.stream.group import READINGS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation


class Format(StrEnum):
    """What a file of edges is."""

    parquet = "parquet"
    csv = "csv"
    graph = "graph"


_SUFFIXES = {".parquet": Format.parquet, ".csv": Format.csv, ".json": Format.graph}
_COPIES = {
    Format.parquet: "COPY exported TO $path (FORMAT parquet, COMPRESSION zstd)",
    Format.csv: "COPY exported TO $path (FORMAT csv, HEADER true)",
}
_LABELLED = """
SELECT edges.*, w.label AS writer_label, r.label AS reader_label FROM edges
LEFT JOIN labels AS w ON split_part(edges.writer, '.', 1) = w.head
LEFT JOIN labels AS r ON split_part(edges.reader, '.', 1) = r.head
"""
_BATCH = 10_000  # rows of a graph that are in memory at a time
_OF_THE_FORM = {"source", "target"}  # names that mean something else in a graph


def export(  # noqa: PLR0913 - which edges, by keyword only
    atlas: Atlas,
    path: str | Path,
    reader: str | None = None,
    writer: str | None = None,
    *,
    question: str = "composition",
    by: str | None = None,
    top: int | None = None,
    where: Mapping[str, Any] | None = None,
    format: Format | str | None = None,
) -> int:
    """Write stored edges to a file, with the columns that ``edges`` gives.

    Parquet and CSV are written as they are read, however many edges there are; what is not finite stays as it is. A
    graph is JSON for ``networkx.node_link_graph(..., edges="edges")``: directed, a node per component with label, kind
    and layer, an edge per pair of a writer and a reader with its columns as attributes (what is not finite is null, the
    record's ``key`` is called ``record``), from the writer to the component that reads, whose port is an attribute.

    Args:
        atlas: the atlas.
        path: the file; an existing one is replaced, whole or not at all.
        reader: as in ``edges``, and so are writer and question.
        writer: a label; None for all.
        question: name of a question whose records are over pairs.
        by: with ``top``: the column to order by; None takes the first of the question's columns.
        top: only so many of the largest, largest first; None writes all, in no order.
        where: as in ``edges``.
        format: ``"parquet"``, ``"csv"`` or ``"graph"``; None goes by the file's ending, ``.json`` for a graph.

    Returns:
        How many edges were written.

    Raises:
        UsageError: nothing fits, as in ``edges``; the file cannot be written; its ending says no format.
        RecordError: a table of pairs cannot be read, or was changed since it was stored.
        ResourceError: the disk is full.

    Example:
        >>> vw.export(atlas, "edges.parquet", question="overlap")  # doctest: +SKIP
    """
    kind = format_of(Path(path), format)
    if by is not None and top is None:
        raise UsageError(f"by={by!r} without top", expected="top too", do="say how many of the largest are wanted")
    with pairs_of(atlas, question, where or {}, {"reader": reader, "writer": writer}) as pairs:
        chosen = pairs.all() if top is None else pairs.strongest(by, top)
        if chosen is None or not chosen.limit(1).fetchall():
            pairs.check_known()
            expected, do = "a reader that the writer reaches", "name other ends, or leave one out"
            raise UsageError(f"there are no edges of {question!r} between these ends", expected=expected, do=do)
        if top is None:  # in order, much of a large file would wait in memory
            pairs.database.execute("SET preserve_insertion_order = false")
        rows = _labelled(pairs, chosen, None if top is None else pairs.column(by))
        rows.create_view("exported")
        with replacing(Path(path)) as aside, disk_errors():
            if kind is not Format.graph:
                counts = pairs.database.execute(_COPIES[kind], {"path": str(aside)}).fetchall()
                return int(counts[0][0])
            return _write_graph(aside, atlas, pairs, rows, question)


def format_of(path: Path, format: Format | str | None) -> Format:
    """The format that is named, or that the file's ending says.

    Raises:
        UsageError: it is none of them, or the ending says none.
    """
    try:
        return _SUFFIXES[path.suffix.lower()] if format is None else Format(format)
    except (KeyError, ValueError):
        raise UsageError(
            f"format {format!r}" if format is not None else f"what {path.name} is to be is not clear from its ending",
            expected=f"one of {', '.join(Format)}, or a file called {', '.join(f'*{suffix}' for suffix in _SUFFIXES)}",
            do="name the format, or call the file otherwise",
        ) from None


def _labelled(pairs: Pairs, chosen: DuckDBPyRelation, by: str | None) -> DuckDBPyRelation:
    """Edges with what both ends do, where heads are labelled; in order, where it is by a column."""
    from duckdb import ColumnExpression as Col
    from duckdb import StarExpression

    if pairs.labels is not None:
        heads = pairs.database.read_parquet(pairs.labels, hive_partitioning=False)
        heads.select(Col("head"), Col("label")).create_view("labels")
        chosen.create_view("edges")
        chosen = pairs.database.sql(_LABELLED)
    if by is not None:
        chosen = chosen.sort(Col(by).desc(), Col("key"), Col(ROW))
    return chosen.select(StarExpression(exclude=[ROW]))


def _write_graph(path: Path, atlas: Atlas, pairs: Pairs, rows: DuckDBPyRelation, question: str) -> int:
    """Write edges as a graph, a batch at a time; how many there are."""
    manifest, stamp = atlas.manifest, common_stamp([header.stamp for header in pairs.headers.values()])
    about = {name: manifest.get(name) for name in ("model", "reference", "fingerprint", "version")}
    about |= {"question": question, "stamp": stamp}
    ends = {side: [name for (name,) in rows.select(side).distinct().fetchall()] for side in PAIR}
    names = {*ends["writer"], *(_component(reader) for reader in ends["reader"])}
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"directed": true, "multigraph": true, "graph": ' + json.dumps(about))
        file.write(',\n"nodes": [\n' + ",\n".join(map(json.dumps, _nodes(manifest, names))) + '\n],\n"edges": [')
        for row in _batches(pairs.database):
            edge = _edge(count, plain(dict(zip(rows.columns, row, strict=True))))
            file.write((",\n" if count else "\n") + json.dumps(edge, allow_nan=False))
            count += 1
        file.write("\n]}\n")
    return count


def _batches(database: DuckDBPyConnection) -> Iterator[Sequence[Any]]:
    """The rows to export, of which a batch is in memory at a time."""
    result = database.execute("FROM exported")
    while batch := result.fetchmany(_BATCH):
        yield from batch


def _edge(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """An edge from a component to a component, by a number of its own."""
    attributes = {f"{name}_" if name in _OF_THE_FORM else name: value for name, value in row.items() if name != "key"}
    ends = {"source": row["writer"], "target": _component(row["reader"]), "key": number}
    return {**ends, "record": row["key"], **attributes}


def _component(reader: str) -> str:
    """The component that a reader belongs to: ``L18H6`` of ``L18H6.K``."""
    name, _, port = reader.rpartition(".")
    return name if name and port in READINGS else reader


def _nodes(manifest: Mapping[str, Any], names: set[str]) -> Iterator[dict[str, Any]]:
    """The components of these names, in the order of the model, then what it does not list, such as neurons."""
    listed = {c["label"]: c for c in manifest.get("components", ()) if c["label"] in names}
    for name in (*listed, *sorted(names - listed.keys())):
        component = listed.get(name) or _parsed(name)
        yield {"id": name, "label": name, "kind": component.get("kind"), "layer": component.get("layer")}


def _parsed(name: str) -> dict[str, Any]:
    try:
        label = parse(name)
    except UsageError:
        return {}
    return {"kind": label.kind, "layer": label.layer}
