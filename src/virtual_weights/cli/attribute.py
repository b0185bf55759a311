"""``vweights attribute``: what removing each edge would cost, all edges at once, to first order."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.prove import per_channel
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.cli.tokens import Length, Sequences, TextFile, passage
from virtual_weights.runtime import load
from virtual_weights.runtime.attribute import attribute
from virtual_weights.runtime.edge import Edge, next_token_loss

_NAMES = ("writer", "reader", "attribution", "channel")


class HeadPort(StrEnum):
    """Through what a head reads."""

    Q = "Q"
    K = "K"
    V = "V"


def attribute_edges(
    model: o.ModelArgument,
    port: Annotated[HeadPort | None, typer.Option("--port", help="Q, K or V; without it all three")] = None,
    top: o.Top = 20,
    text: TextFile = None,
    sequences: Sequences = 8,
    length: Length = 64,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens")] = 0,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="sequences in one backward pass")] = 2,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """First-order effect on the loss of removing every direct edge between heads, from one backward pass per batch."""
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        words = passage(stream, text, sequences, length, seed)
        loss = partial(next_token_loss, first=words.first)
        records = attribute(stream, words.tokens, loss, load(stream, device=device), batch, step("attribute"))
    if port is not None:
        records = {port.value: records[port.value]}
    edges = [
        _edge(Edge.of(stream, row["writer"], f"{row['reader']}.{name}"), row["attribution"])
        for name, record in records.items()
        for row in per_channel(record, top, "size")
    ]
    edges = sorted(edges, key=lambda edge: -abs(edge["attribution"]))[:top]
    stamp = next(iter(records.values())).stamp
    found = {"model": model, "text": words.told, **stamp, "edges": edges, "provenance": stream.provenance}
    if as_json:
        put_json(found)
        return
    table(f"edges of largest first-order effect on the loss · {model}", _NAMES, [[e[n] for n in _NAMES] for e in edges])
    line(f"attribution in nats, to first order, on {words.told}; prove an edge to see what removing it does in full")


def _edge(edge: Edge, attribution: float) -> dict[str, Any]:
    shared = {"channel": edge.channel, "shared_with": list(edge.shared_with)}
    return {"writer": str(edge.writer), "reader": str(edge.reader), "attribution": attribution, **shared}
