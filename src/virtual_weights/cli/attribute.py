"""``vweights attribute``: what removing each edge would cost, all edges at once, to first order."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.prove import per_channel, ported
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.cli.tokens import (
    Length,
    Passage,
    Repeated,
    Sequences,
    TextFile,
    passage,
    prompt_tokens,
    token_named,
)
from virtual_weights.errors import UsageError
from virtual_weights.runtime import load
from virtual_weights.runtime.edges.attribution import Metric, attribute, logit_difference
from virtual_weights.runtime.edges.edge import Edge, next_token_loss
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HEAD_PORTS

_NAMES = ("writer", "reader", "attribution", "channel")
Ports = Annotated[
    list[o.PortName] | None, typer.Option("--port", help="of the readers, more than once for several; Q, K and V")
]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="one prompt in place of text")]
PromptIds = Annotated[
    str | None, typer.Option("--prompt-ids", metavar="IDS", help="the same by token ids, e.g. 3,17,5")
]


def attribute_edges(
    model: o.ModelArgument,
    port: Ports = None,
    writers: o.WriterOption = o.WriterSet.heads,
    top: o.Top = 20,
    prompt: Prompt = None,
    ids: PromptIds = None,
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="TOKEN", help="the logit of ' Paris' (or of an id) after the prompt, not loss"),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="TOKEN", help="with --token: less the logit of this one")
    ] = None,
    text: TextFile = None,
    repeated: Repeated = False,
    sequences: Sequences = 8,
    length: Length = 64,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens")] = 0,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="sequences in one backward pass")] = 2,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """First-order effect on the loss, or on a logit, of removing every direct edge; one backward pass per batch."""
    prompted = prompt is not None or ids is not None
    if prompted and (text is not None or repeated or (prompt is not None and ids is not None)):
        raise UsageError(
            "more than one kind of text", expected="one of --text, --repeated, --prompt and --prompt-ids", do="choose"
        )
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        words = (
            Passage(prompt_tokens(stream, prompt, ids)[None], 1, "the prompt")
            if prompted
            else passage(stream, text, sequences, length, seed if repeated else None)
        )
        metric, told = _metric(stream, words.first, token, against, prompted)
        ports: Any = [each.value for each in port or []] or HEAD_PORTS
        runs = load(stream, device=device)
        records = attribute(
            stream, words.tokens, metric, runs, batch, step("attribute"), ports=ports, writers=writers.value
        )
    edges = [
        _edge(Edge.of(stream, row["writer"], ported(row["reader"], name)), row["attribution"])
        for name, record in records.items()
        for row in per_channel(record, top, "size")
    ]
    edges = sorted(edges, key=lambda edge: -abs(edge["attribution"]))[:top]
    stamp = next(iter(records.values())).stamp
    found = {"model": model, "text": words.told, "metric": told, **stamp, "edges": edges}
    if as_json:
        put_json({**found, "provenance": stream.provenance})
        return
    table(f"edges of largest first-order effect · {model}", _NAMES, [[e[n] for n in _NAMES] for e in edges])
    line(f"attribution: change of {told} without the edge, to first order, on {words.told}")
    line("prove an edge to see what removing it does in full")


def _metric(stream: Stream, first: int, token: str | None, against: str | None, prompted: bool) -> tuple[Metric, str]:
    """The mean next-token loss, or a logit after the prompt; and what it is, in words."""
    if token is None and against is None:
        return partial(next_token_loss, first=first), "the mean next-token loss in nats"
    if token is None or not prompted:
        raise UsageError(
            "--against without --token" if token is None else "--token without a prompt",
            expected='--prompt TEXT --token " Paris" --against " Rome"',
            do="add what is missing",
        )
    own, other = token_named(stream, token), None if against is None else token_named(stream, against)
    texts = stream.source.token_texts()
    names = [repr(texts[i]) if texts else str(i) for i in (own, other) if i is not None]
    return partial(logit_difference, token=own, against=other), f"the logit of {' less that of '.join(names)}"


def _edge(edge: Edge, attribution: float) -> dict[str, Any]:
    shared = {"channel": edge.channel, "shared_with": list(edge.shared_with)}
    return {"writer": str(edge.writer), "reader": str(edge.reader), "attribution": attribution, **shared}
