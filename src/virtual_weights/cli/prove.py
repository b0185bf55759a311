"""``vweights prove``: remove an edge from a running model and see what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer

from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import Tick, steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.cli.tokens import Length, Repeated, Sequences, TextFile, passage
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import load
from virtual_weights.runtime.edges.ablation import Trial, prove
from virtual_weights.stream import Stream

_SHOWN = ("effect_nats", "verdict", "p", "pattern_change", "output_change", "top_changed", "channel")


class Replaced(StrEnum):
    """What stands in for a writer that is removed."""

    mean = "mean"
    resample = "resample"


def prove_edges(
    model: o.ModelArgument,
    writer: Annotated[str | None, typer.Argument(help="e.g. L16H0, L3.mlp, L3N7, embed")] = None,
    reader: Annotated[str | None, typer.Argument(help="e.g. L18H6.K, L5.mlp.up, unembed")] = None,
    port: Annotated[
        o.PortName, typer.Option("--port", help="without WRITER: the port whose strongest edges are tried")
    ] = (o.PortName.K),
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=1, help="without WRITER: how many, one per channel")
    ] = 20,
    text: TextFile = None,
    repeated: Repeated = False,
    sequences: Sequences = 8,
    length: Length = 64,
    random: Annotated[
        int, typer.Option("--random", metavar="N", min=0, help="matched random edges to compare with")
    ] = 20,
    replaced: Annotated[Replaced, typer.Option("--replace", help="by the writer's mean, or by another sequence's")] = (
        Replaced.mean
    ),
    move: Annotated[
        bool, typer.Option("--move-scalars", help="let the norm scalar follow; it is held otherwise")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens, random edges and intervals")] = 0,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="sequences that run at once")] = 8,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Remove direct edges one by one while the model runs: loss, attention and output, against random edges."""
    if (writer is None) != (reader is None):
        raise UsageError("a writer without a reader", expected="WRITER READER, or neither", do="name both")
    scalars: Literal["held", "move"] = "move" if move else "held"
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        scores = {} if writer and reader else strongest(stream, port.value, top, step("composition"))
        edges = [(writer, reader)] if writer and reader else list(scores)
        words = passage(stream, text, sequences, length, seed if repeated else None)
        trial = Trial(replaced.value, scalars, words.first, random, seed, batch)
        record = prove(stream, edges, words.tokens, trial, load(stream, device=device), step("prove"))
    rows = [_edge(row) for row in record.rows()]
    asked = [row | _score(scores, row) for row in rows[: record.parameters["asked"]]]
    found: dict[str, Any] = {"model": model, "text": words.told, **record.stamp, "parameters": record.parameters}
    found |= {"edges": asked, "random": rows[len(asked) :], "provenance": record.provenance}
    if as_json:
        put_json(found)
    else:
        _show(found)


def strongest(stream: Stream, port: Any, top: int, tick: Tick) -> dict[tuple[str, str], float]:
    """The edges of highest composition score between heads and readers of a port, one per channel, with the score."""
    record = Composition(port)(stream, tick)
    return {
        (str(row["writer"]), ported(str(row["reader"]), port)): row["score"]
        for row in per_channel(record, top, "score")
    }


def per_channel(record: Record, top: int, by: str) -> list[dict[str, Any]]:
    """The largest entries of a record over (reader, writer), each channel under the first of its names."""
    group = max((record.axis("reader").channels.count(c) for c in set(record.axis("reader").channels)), default=1)
    kept: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in record.top(top * group, by).rows():
        kept.setdefault((row["writer"], row.get("reader_channel") or row["reader"]), row)
    return list(kept.values())[:top]


def ported(reader: str, port: str) -> str:
    """A reader with its port, ``"L5H3.K"``; the unembedding has none."""
    return reader if port == "unembed" or reader.endswith(f".{port}") else f"{reader}.{port}"


def _edge(row: Mapping[str, Any]) -> dict[str, Any]:
    edge = {"writer": row["writer"], "reader": row["reader"], "effect_nats": row["effect_nats"]}
    edge |= {"interval": None if row["low"] is None else [row["low"], row["high"]], **{n: row[n] for n in _SHOWN[1:]}}
    return edge | {"shared_with": row["shared_with"].split()}


def _score(scores: Mapping[tuple[str, str], float], row: Mapping[str, Any]) -> dict[str, float]:
    key = (row["writer"], row["reader"])
    return {"score": scores[key]} if key in scores else {}


def _show(found: Mapping[str, Any]) -> None:
    names = ("writer", "reader", "effect_nats", "interval", *_SHOWN[1:])
    for title, key in (("edges removed one by one", "edges"), ("matched random edges", "random")):
        rows = [[_told(row[name]) if name == "interval" else row[name] for name in names] for row in found[key]]
        if rows:
            table(f"{title} · {found['model']}", names, rows)
    line(f"loss with every edge {found['clean_loss']:.4g} nats on {found['text']}")
    line(found["rule"])


def _told(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}"
