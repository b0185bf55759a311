"""``vweights ablate`` and ``attribute``: what removing edges from a running model costs, exactly or to first order."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from itertools import chain
from typing import Annotated, Any, Literal

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb
from virtual_weights.errors import UsageError

_FIGURES = ("effect_nats", "verdict", "p", "pattern_change", "output_change", "top_changed", "group")
_EDGE = ("writer", "reader", "attribution", "group")


class Replaced(StrEnum):
    """What stands in for a writer that is removed."""

    mean = "mean"
    resample = "resample"


@running_verb("text", "repeated", tokens=1024, length=128, batch=8)
def ablate(
    session: Session,
    context: typer.Context,
    writer: Annotated[str | None, typer.Argument(metavar="WRITER", help="e.g. L16H0, L3.mlp, L3N7, embed")] = None,
    reader: Annotated[str | None, typer.Argument(metavar="READER", help="e.g. L18H6.K, L5.mlp.up, unembed")] = None,
    port: Annotated[
        o.PortName,
        typer.Option(
            "--port",
            metavar="PORT",
            help="without WRITER: remove the strongest edges into this port: Q, K, V, gate, up, in or unembed",
        ),
    ] = o.PortName.K,
    top: Annotated[
        int, typer.Option("--edges", metavar="N", min=1, help="without WRITER: how many edges to remove")
    ] = 20,
    random: Annotated[
        int, typer.Option("--random", metavar="N", min=0, help="remove N matched random edges, too, for comparison")
    ] = 20,
    replaced: Annotated[
        Replaced,
        typer.Option(
            "--replace", help="what replaces the writer's output: its mean, or its output on another sequence"
        ),
    ] = Replaced.mean,
    move: Annotated[
        bool, typer.Option("--move-scalars", help="let norm scalars change with the removal, instead of holding them")
    ] = False,
) -> Answer:
    """Remove connections while the model runs, one by one, and compare with random ones: what does each cost?

    Shows the effect on the loss, in nats with a 95% interval, on the reader's attention pattern and on its output.
    """
    from virtual_weights.survey.edges import strongest

    if (writer is None) != (reader is None):
        raise UsageError("a writer without a reader", expected="WRITER READER, or neither", do="name both")
    scalars: Literal["held", "move"] = "move" if move else "held"
    if writer is not None and reader is not None:
        o.refuse_unused(context, "with WRITER and READER", "port", "top")
        scores, edges = {}, [(writer, reader)]
    else:
        scores = strongest(session.ask(vw.Composition(port.value)), top, "score")
        edges = list(scores)
    seed, batch = session.options["seed"], session.options["batch"]
    record = session.ask(vw.Ablation(edges, random, replaced.value, scalars, seed=seed, batch=batch))
    rows = [_row(row, scores) for row in record.rows()]
    names = ("writer", "reader", "effect_nats", "interval", *_FIGURES[1:])
    shown: list[Table | str] = []
    for title, kind in (("edges removed one by one", "asked"), ("matched random edges", "random")):
        of_kind = [row for row in rows if row["kind"] == kind]
        shown += [Table(f"{title} · {session.name}", of_kind, names)] if of_kind else []
    shown += [
        f"loss with every edge in place: {record.stamp['clean_loss']:.4g} nats, on {record.stamp['sequences']} "
        f"sequences of {record.stamp['text']}",
        record.stamp["rule"],
    ]
    summary = {"clean_loss": record.stamp["clean_loss"], "causal": sum(row["verdict"] == "causal" for row in rows)}
    return Answer(record, rows, summary, shown)


@running_verb(tokens=1024, length=128, batch=2)
def attribute(
    session: Session,
    port: Annotated[
        list[o.PortName] | None,
        typer.Option(
            "--port",
            metavar="PORT",
            help="port of the readers: Q, K, V, gate, up, in or unembed; repeat it for several; by default Q, K and V",
        ),
    ] = None,
    writers: o.WriterOption = o.WriterSet.heads,
    token: o.Logit = None,
    against: o.Against = None,
    top: o.Top = 20,
) -> Answer:
    """Estimate what removing each connection would cost, all at once: the change of the loss, or of a logit.

    The estimate is of first order and takes one backward pass per batch.
    """
    from virtual_weights.stream.group import HEAD_PORTS

    metric = _metric(session, token, against)
    ports: list[Any] = list(dict.fromkeys(name.value for name in port or [])) or list(HEAD_PORTS)
    questions = [vw.Attribution(name, writers.value, metric, batch=session.options["batch"]) for name in ports]
    records = session.survey.answers(questions)
    largest = [_largest(session, record, top) for record in records]
    rows = sorted(chain.from_iterable(largest), key=_by_size)[:top]
    what = "the mean next-token loss in nats" if metric is None else _named(session, metric)
    shown = [
        Table(f"the {len(rows)} edges with the largest first-order effects · {session.name}", rows, _EDGE),
        f"attribution: change of {what} without the edge, to first order, on {session.run.text}",
        "to see what removing an edge does in full: vweights ablate",
    ]
    first, *rest = (Answer(r, edges, {"metric": what}) for r, edges in zip(records, largest, strict=True))
    return replace(first, shown=shown, more=rest)


def _row(row: dict[str, Any], scores: dict[tuple[str, str], float]) -> dict[str, Any]:
    """One edge with its interval, who shares it, and its score where it was chosen by one."""
    edge = {"writer": row["writer"], "reader": row["reader"], "kind": row["kind"], "effect_nats": row["effect_nats"]}
    edge |= {"interval": None if row["low"] is None else [row["low"], row["high"]]}
    edge |= {name: row[name] for name in _FIGURES[1:]}
    edge |= {"shared_with": row["shared_with"].split()}
    score = scores.get((row["writer"], row["reader"]))
    return edge if score is None or row["kind"] == "random" else edge | {"score": score}


def _largest(session: Session, record: vw.Record, top: int) -> list[dict[str, Any]]:
    """The edges of one port, largest first."""
    from virtual_weights.runtime.edges.edge import Edge
    from virtual_weights.survey.edges import distinct

    rows: list[dict[str, Any]] = []
    for row in distinct(record, top, "size"):
        edge = Edge.of(session.stream, row["writer"], row["reader"])
        shown = {name: row[name] for name in ("writer", "reader", "attribution")}
        rows.append(shown | {"group": edge.kv_group, "shared_with": list(edge.shared_with)})
    return rows


def _by_size(row: dict[str, Any]) -> float:
    return -abs(row["attribution"])


def _metric(session: Session, token: str | None, against: str | None) -> vw.LogitDifference | None:
    """A logit after the prompt; None is the mean next-token loss."""
    if token is None and against is None:
        return None
    prompted = session.options["prompt"] is not None or session.options["prompt_ids"] is not None
    if token is None or not prompted:
        raise UsageError(
            "--against without --token" if token is None else "--token without a prompt",
            expected='--prompt TEXT --token " Paris" --against " Rome"',
            do="add what is missing",
        )
    return vw.LogitDifference(session.token(token), None if against is None else session.token(against))


def _named(session: Session, metric: vw.LogitDifference) -> str:
    from virtual_weights.checkpoint import text_of

    texts = session.stream.source.token_texts()
    ids = [token for token in (metric.token, metric.against) if token is not None]
    names = [str(i) if (text := text_of(texts, i)) is None else repr(text) for i in ids]
    return f"the logit of {' less that of '.join(names)}"
