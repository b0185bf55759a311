"""``vweights neurons``: the strongest edges at the level of single neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from virtual_weights.analysis.pairs.neuron_heads import HeadNeuron, NeuronHead
from virtual_weights.analysis.pairs.neuron_neuron import NeuronNeuron
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import Tick, steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.errors import UsageError
from virtual_weights.stream import Stream
from virtual_weights.stream.names import Label, parse

_OF_HEADS, _OF_NEURONS = ("Q", "K", "V"), ("in", "up", "gate")


def neurons(
    model: o.ModelArgument,
    reader: Annotated[
        str | None, typer.Option("--reader", metavar="NAME", help="only edges into it, e.g. L18N5, L18N5.gate, L18H6.K")
    ] = None,
    writer: Annotated[
        str | None, typer.Option("--writer", metavar="NAME", help="only edges out of it, e.g. L16N9 or L16H0")
    ] = None,
    port: Annotated[
        o.PortName | None,
        typer.Option("--port", help="through which readers read; without: up or in, and Q, K and V of a named head"),
    ] = None,
    top: o.Top = 20,
    no_fold: o.NoFold = False,
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 512,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """The strongest edges between neurons, from heads into neurons and from neurons into heads."""
    asked = _Asked(_end(reader), _end(writer, ("out", "O")), top, device, memory_mb)
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        tables: list[dict[str, Any]] = []
        for each in _ports(stream, asked.reader, None if port is None else port.value):
            tables += _tables(stream, asked, each, step(f"into {each}"))
    found = {
        "model": model,
        "norm": stream.norm_stamp,
        "reader": reader,
        "writer": writer,
        "tables": tables,
        "provenance": stream.provenance,
    }
    if as_json:
        put_json(found)
    else:
        _show(found)


@dataclass(frozen=True)
class _Asked:
    reader: Label | None
    writer: Label | None
    top: int
    device: str
    memory_mb: int


def _end(name: str | None, ports: tuple[str, ...] = (*_OF_HEADS, *_OF_NEURONS)) -> Label | None:
    """A named head or neuron, with a port that fits its side or none."""
    label = None if name is None else parse(name)
    if label is not None and (label.kind not in ("head", "neuron") or label.port not in (None, *ports)):
        raise UsageError(
            f"{name!r} is no such end of an edge",
            expected=f"a head or a neuron, with port {', '.join(ports)} or none",
            do="name for example L16H0 or L18N5; for MLPs and embeddings as wholes use vweights composition",
        )
    return label


def _ports(stream: Stream, reader: Label | None, port: str | None) -> tuple[str, ...]:
    """The port that is named, or those that go with the reader."""
    own = None if reader is None else reader.port
    if own is not None and port not in (None, own):
        raise UsageError(f"reader {reader} and port {port}", expected="one port", do="leave --port out")
    if own or port:
        return (str(own or port),)
    return _OF_HEADS if _kind(reader) == "head" else ("up",) if stream.spec.gated else ("in",)


def _tables(stream: Stream, asked: _Asked, port: str, tick: Tick) -> list[dict[str, Any]]:
    """The edges through one port, a table for each kind of ends that fits."""
    into = "head" if port in _OF_HEADS else "neuron" if port in _OF_NEURONS else None
    kinds = [
        (source, target)
        for source, target in (("neuron", "neuron"), ("head", "neuron"), ("neuron", "head"))
        if target == into and _kind(asked.writer) in (None, source) and _kind(asked.reader) in (None, target)
    ]
    if not kinds:
        raise UsageError(
            f"no edges of single neurons from {asked.writer or 'anywhere'} to {asked.reader or 'anywhere'} by {port}",
            expected="a neuron or head into a neuron (in, up, gate), or a neuron into a head (Q, K, V)",
            do="name other ends or another port; between heads use vweights composition",
        )
    return [_table(stream, asked, port, ends, tick) for ends in kinds]


def _table(stream: Stream, asked: _Asked, port: Any, ends: tuple[str, str], tick: Tick) -> dict[str, Any]:
    reader, writer = _name(asked.reader), _name(asked.writer)
    told: dict[str, Any] = {"from": ends[0], "to": ends[1], "port": port}
    if ends == ("neuron", "neuron"):
        each = NeuronNeuron(port, asked.top, reader, writer, asked.device, asked.memory_mb).all(stream, tick)
        strongest = each.readers.top(asked.top, "magnitude")
        names = ("pairs", "mean_square", "null_mean_square")
        told |= {name: each.histogram.stamp[name] for name in names}
    else:
        question = HeadNeuron if ends[1] == "neuron" else NeuronHead
        strongest = question(port, reader, writer, asked.device, asked.memory_mb)(stream, tick).top(asked.top, "score")
    return told | {"edges": [_edge(row, *ends) for row in strongest.rows()]}


def _edge(row: dict[str, Any], source: str, target: str) -> dict[str, Any]:
    """One edge, whatever the record calls its ends."""
    writer, reader = row.get("writer", row.get(source)), row.get("reader", row.get(target))
    numbers = {name: row[name] for name in ("score", "strength", "z")}
    channel = {"channel": row["head_channel"]} if "head_channel" in row else {}
    return {"writer": writer, "reader": reader, **numbers, **channel}


def _kind(label: Label | None) -> str | None:
    return None if label is None else label.kind


def _name(label: Label | None) -> str | None:
    return None if label is None else str(replace(label, port=None))


def _show(found: dict[str, Any]) -> None:
    for each in found["tables"]:
        rows = each["edges"]
        names = list(rows[0]) if rows else ["writer", "reader", "score"]
        title = f"{len(rows)} strongest edges from {each['from']} to {each['to']} by {each['port']}"
        table(f"{title} · {found['model']} · norm {found['norm']}", names, [[row[n] for n in names] for row in rows])
        if each.get("pairs"):
            line(
                f"{each['pairs']:,} pairs, mean square cosine {each['mean_square']:.4g}; independent directions: "
                f"{each['null_mean_square']:.4g}, and the largest |z| of so many near "
                f"{math.sqrt(2 * math.log(each['pairs'])):.2g}"
            )
