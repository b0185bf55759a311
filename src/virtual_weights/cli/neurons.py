"""``vweights neurons``: the strongest edges at the level of single neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, verb
from virtual_weights.errors import UsageError

if TYPE_CHECKING:
    from virtual_weights.stream.names import Label


class UnitKind(StrEnum):
    """What writes: neurons, the features of attached dictionaries, or both."""

    all = "all"
    neurons = "neurons"
    features = "features"


@verb("no_fold", "partial", "offline", "allow_non_finite")
def neurons(
    session: Session,
    reader: Annotated[
        str | None, typer.Option("--reader", metavar="NAME", help="only edges into it, e.g. L18N5, L18N5.gate, L18H6.K")
    ] = None,
    writer: Annotated[
        str | None, typer.Option("--writer", metavar="NAME", help="only edges out of it, e.g. L16N9 or L16H0")
    ] = None,
    port: Annotated[
        o.PortName | None,
        typer.Option(
            "--port",
            metavar="PORT",
            help="port of the readers: Q, K, V, gate, up, in or enc; by default up or in, and of a head Q, K and V",
        ),
    ] = None,
    units: Annotated[
        UnitKind, typer.Option("--units", help="which write, of edges between units: neurons, features or all")
    ] = UnitKind.all,
    top: o.Top = 20,
    device: o.Device = "cpu",
    memory_mb: o.Memory = None,
) -> Answer:
    """Find the strongest connections of single neurons, with each other and with attention heads.

    Features of attached dictionaries write like neurons, and read through the port enc.
    """
    from virtual_weights.stream.group import HEAD_PORTS, NEURON_PORTS

    ends = _Ends(_end(reader, (*HEAD_PORTS, *NEURON_PORTS)), _end(writer, ("out", "O", "dec")))
    ports = ends.ports(session.stream, None if port is None else port.value)
    cost = {"device": device, "memory_mb": memory_mb or 512, "units": units.value}
    answers = [_answer(session, ends, name, kinds, top, cost) for name in ports for kinds in ends.kinds(name)]
    first, *rest = answers
    return replace(first, more=rest)


@dataclass(frozen=True)
class _Ends:
    """What is asked about: a head or a neuron at either end, None for all."""

    reader: Label | None
    writer: Label | None

    def ports(self, stream: vw.Stream, port: str | None) -> tuple[str, ...]:
        """The port that is named, or those that go with the reader."""
        from virtual_weights.stream.group import HEAD_PORTS

        named = None if self.reader is None else self.reader.port
        if named is not None and port not in (None, named):
            raise UsageError(f"reader {self.reader} and port {port}", expected="one port", do="leave --port out")
        if named or port:
            return (str(named or port),)
        if self.reader is not None and self.reader.kind == "head":
            return HEAD_PORTS
        if self.reader is not None and self.reader.kind == "feature":
            return ("enc",)
        return tuple(stream.groups.mlps[0].ports[-1:]) if stream.groups.mlps else ("in",)

    def kinds(self, port: str) -> list[tuple[str, str]]:
        """Which kinds of writer and reader fit a port and the ends that are named."""
        from virtual_weights.stream.group import HEAD_PORTS, NEURON_PORTS

        into = "head" if port in HEAD_PORTS else "neuron" if port in NEURON_PORTS else None
        kinds = [
            (source, target)
            for source, target in (("neuron", "neuron"), ("head", "neuron"), ("neuron", "head"))
            if target == into and _fits(self.writer, source) and _fits(self.reader, target)
        ]
        if not kinds:
            raise UsageError(
                f"no edges of single neurons from {self.writer or 'any'} to {self.reader or 'any'}, port {port}",
                expected="a neuron or head into a neuron (in, up, gate), or a neuron into a head (Q, K, V)",
                do="name other ends or another port; between heads use vweights composition",
            )
        return kinds


def _answer(session: Session, ends: _Ends, port: Any, kinds: tuple[str, str], top: int, cost: dict[str, Any]) -> Answer:
    """The edges of one kind through one port."""
    names = {"reader": _name(ends.reader), "writer": _name(ends.writer)}
    summary: dict[str, Any] = {"from": kinds[0], "to": kinds[1], "port": port}
    if kinds == ("neuron", "neuron"):
        both: dict[str, Any] = {**names, "writers": cost["units"]}
        both |= {name: cost[name] for name in ("device", "memory_mb")}
        question = vw.NeuronNeuron(port, top, **both)
        record, cosines = session.survey.answers([question, vw.NeuronCosines(port, top, **both)])
        best = record.top(top, "magnitude")
        summary |= {name: cosines.stamp[name] for name in ("pairs", "mean_square", "null_mean_square")}
    else:
        record = session.ask(vw.HeadUnits(port, top, **names, **cost))
        best = record.top(top, "score")
        summary["pairs"] = record.stamp["pairs"]
    rows = [_edge(session.stream, row, port) for row in best.rows()]
    named = {"all": "neurons and features" if session.stream.groups.dictionaries else "neurons"}
    source = named.get(cost["units"], cost["units"]) if kinds[0] == "neuron" else "heads"
    target = "features" if port == "enc" else f"{kinds[1]}s"
    title = f"the {len(rows)} strongest edges from {source} to {target}, port {port} · {session.name}"
    table = Table(f"{title} · norm {record.stamp['norm']}", rows, None if rows else ("writer", "reader", "score"))
    return Answer(record, rows, summary, [table, *_chance(summary)])


def _chance(summary: dict[str, Any]) -> list[str]:
    pairs = summary["pairs"]
    if not pairs:
        return []
    lines = [f"{pairs:,} pairs; of so many at random orientation the largest |z| is near {_largest_z(pairs):.2g}"]
    if "mean_square" in summary:
        square, null = summary["mean_square"], summary["null_mean_square"]
        lines.append(f"mean square cosine {square:.4g}; independent directions would have {null:.4g}")
    return lines


def _largest_z(pairs: int) -> float:
    """About the largest of so many normal deviates."""
    return math.sqrt(2 * math.log(pairs))


def _end(name: str | None, ports: tuple[str, ...]) -> Label | None:
    """A named head or neuron, with a port that fits its side or none."""
    from virtual_weights.stream.names import parse

    label = None if name is None else parse(name)
    if label is not None and (label.kind not in ("head", "neuron", "feature") or label.port not in (None, *ports)):
        raise UsageError(
            f"{name!r} cannot be that end of an edge",
            expected=f"a head, a neuron or a feature, with port {', '.join(ports)} or none",
            do="name for example L16H0 or L18N5; for MLPs and embeddings as wholes use vweights composition",
        )
    return label


def _edge(stream: vw.Stream, row: dict[str, Any], port: Any) -> dict[str, Any]:
    """One edge, with the heads that share its map."""
    reader = str(row["reader"])
    edge = {name: row[name] for name in ("writer", "reader", "score", "strength", "z")}
    if row.get("group") is None:
        return edge
    group = stream.groups.of(reader)
    heads = zip(group.labels, group.kv_groups(port), strict=True)
    shared = [head for head, name in heads if name == row["group"] and head != reader.partition(".")[0]]
    return edge | {"group": row["group"], "shared_with": shared}


def _fits(label: Label | None, kind: str) -> bool:
    return label is None or ("neuron" if label.kind == "feature" else label.kind) == kind


def _name(label: Label | None) -> str | None:
    return None if label is None else str(replace(label, port=None))
