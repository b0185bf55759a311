"""``vweights ablate`` and ``attribute``: what removing edges from a running model costs, exactly or to first order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.by_token import edges_by_token
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb
from virtual_weights.errors import UsageError

_FIGURES = ("effect_nats", "verdict", "rank", "q", "loss_changed", "top_changed", "pattern_change", "output_change")
_SHOWN = ("writer", "reader", "effect_nats", "interval", *_FIGURES[1:], "group")
_SET = ("quantity", "value", "interval", "verdict", "loss_changed", "top_changed")
_EDGE = ("writer", "reader", "attribution", "group")


class Replaced(StrEnum):
    """What stands in for a writer that is removed."""

    mean = "mean"
    resample = "resample"
    partner = "partner"


_Writer = Annotated[str | None, typer.Argument(metavar="WRITER", help="e.g. L16H0, L3.mlp, L3N7, embed")]
_Reader = Annotated[str | None, typer.Argument(metavar="READER", help="e.g. L18H6.K, L5.mlp.up, unembed")]
_Edges = Annotated[
    list[str] | None, typer.Option("--edge", metavar="WRITER,READER", help="another edge to remove; repeatable")
]
_Together = Annotated[
    bool, typer.Option("--together", help="also remove the edges at once, and all others into the same readers")
]
_ByToken = Annotated[
    bool, typer.Option("--by-token", help="show which tokens are predicted better or worse without each edge")
]
_Port = Annotated[
    o.PortName,
    typer.Option(
        "--port",
        metavar="PORT",
        help="without WRITER: remove the strongest edges into this port: Q, K, V, gate, up, in or unembed",
    ),
]
_Count = Annotated[int, typer.Option("--edges", metavar="N", min=1, help="without WRITER: how many edges to remove")]
_Random = Annotated[
    int, typer.Option("--random", metavar="N", min=0, help="remove N random edges of the same port for comparison")
]
_Least = Annotated[
    float, typer.Option("--least", metavar="NATS", min=0.0, help="the least effect that matters, for the verdict")
]
_Replaced = Annotated[
    Replaced | None,
    typer.Option(
        "--replace",
        help="what replaces the writer's output: its mean, its output on another sequence, or on the partner",
        show_default="partner with --pairs, else mean",
    ),
]
_Moving = Annotated[
    bool, typer.Option("--move-scalars", help="let norm scalars change with the removal, instead of holding them")
]
_Pairs = Annotated[
    Path | None,
    typer.Option(
        "--pairs", metavar="FILE", help="run on clean and corrupted prompts: JSON lines or tab-separated columns"
    ),
]
_Skip = Annotated[
    int, typer.Option("--skip", metavar="N", min=0, help="do not count what is predicted at the first N tokens")
]


@running_verb("text", "repeated", tokens=2048, length=64, batch=8)
def ablate(
    session: Session,
    context: typer.Context,
    writer: _Writer = None,
    reader: _Reader = None,
    edge: _Edges = None,
    together: _Together = False,
    by_token: _ByToken = False,
    port: _Port = o.PortName.K,
    top: _Count = 20,
    random: _Random = 20,
    least: _Least = 0.01,
    replaced: _Replaced = None,
    move: _Moving = False,
    pairs: _Pairs = None,
    token: o.Logit = None,
    against: o.Against = None,
    skip: _Skip = 0,
) -> Answer:
    """Remove connections while the model runs, one by one: what does each cost, and does it matter?

    Shows the effect on the loss, in nats with a 95% interval, on the reader's attention pattern and on its output. With
    --pairs, the model runs on clean and corrupted prompts, and a writer's output is replaced by its output on the
    partner.
    """
    from virtual_weights.survey.strongest import strongest

    named = [*([(writer, reader)] if writer and reader else []), *map(_pair, edge or ())]
    if (writer is None) != (reader is None):
        raise UsageError("a writer without a reader", expected="WRITER READER, or neither", do="name both")
    if named:
        o.refuse_unused(context, "where edges are named", "port", "top")
    if by_token:
        o.refuse_unused(context, "with --by-token", "together", "random", "least", "port", "top", "token", "against")
    run, metric = _on(session, context, pairs, token, against)
    survey = vw.Survey(session.stream, None, _after(run, skip), session.step)
    scores = {} if named or by_token else strongest(survey.ask(vw.Composition(port.value)), top, "score")
    scalars: Literal["held", "move"] = "move" if move else "held"
    replacement = replaced.value if replaced else "mean" if pairs is None else "partner"
    if by_token:
        return edges_by_token(session, survey, named, replacement, scalars)
    how: dict[str, Any] = {"replacement": replacement, "scalars": scalars, "least": least, "metric": metric}
    how["batch"] = session.options["batch"]
    edges = named or list(scores)
    sets = [survey.ask(vw.EdgeSetAblation(edges, **how))] if together else []  # first, since not every set can be
    record = survey.ask(vw.Ablation(edges, random, seed=session.options["seed"], **how))
    rows = [_row(row, scores) for row in record.rows()]
    more = [Answer(whole, _quantities(whole)) for whole in sets]
    verdicts = [row["verdict"] for row in rows if row["kind"] == "asked"]
    counts = {name: verdicts.count(name) for name in ("causal", "negligible", "inconclusive")}
    shown = [*_tables(session, rows, more), *_on_what(session, record, metric)]
    return Answer(record, rows, {"clean_loss": record.stamp["clean_loss"], **counts}, shown, more)


def _tables(session: Session, rows: list[dict[str, Any]], sets: list[Answer]) -> Iterator[Table]:
    for title, kind in (("edges removed one by one", "asked"), ("random edges of the same port", "random")):
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            yield Table(f"{title} · {session.name}", of_kind, _SHOWN)
    for answer in sets:
        yield Table(f"the edges as a set · {session.name}", answer.rows or (), _SET)


def _on_what(session: Session, record: vw.Record, metric: vw.LogitDifference | None) -> Iterator[str]:
    """On what effects were measured and by what verdicts go, in sentences."""
    stamp = record.stamp
    yield (
        f"loss with every edge in place: {stamp['clean_loss']:.4g} nats, on {stamp['sequences']} sequences of "
        f"{stamp['text']}, from token {stamp['first']} on (0 is the first); beginning token: {stamp['bos']}"
    )
    if metric is not None:
        yield f"effects are on {_named(session, metric)}, {stamp['clean_metric']:.4g} with every edge in place"
    yield stamp["rule"]


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


def _pair(edge: str) -> tuple[str, str]:
    """``"L16H0,L18H6.K"`` as writer and reader."""
    writer, _, reader = edge.partition(",")
    if not (writer and reader):
        raise UsageError(f"--edge {edge}", expected="WRITER,READER such as L16H0,L18H6.K", do="name both")
    return writer.strip(), reader.strip()


def _on(
    session: Session, context: typer.Context, pairs: Path | None, token: str | None, against: str | None
) -> tuple[vw.Run, vw.LogitDifference | None]:
    """What is run, and the metric where it is not the loss."""
    if pairs is None:
        o.refuse_unused(context, "without --pairs", "token", "against")
        return session.run, None
    o.refuse_unused(context, "with --pairs", "text", "repeated", "tokens", "length")
    lines = _lines(pairs)
    clean, corrupted = ([line[side] for line in lines.values()] for side in ("clean", "corrupted"))
    run = vw.Run.on_pairs(session.stream, clean, corrupted, session.options["bos"], **session.how)
    first, second = (
        _answers(session, pairs, lines, name, option) for name, option in (("token", token), ("against", against))
    )
    if first is None and second is not None:
        raise UsageError(
            f"'against' without 'token' in {str(pairs)!r}" if against is None else "--against without --token",
            expected="a token whose logit is asked for, and perhaps another against it",
            do="add the first, or leave the second out",
        )
    return run, None if first is None else vw.LogitDifference(first, second)


def _after(run: vw.Run, skip: int) -> vw.Run:
    """The same run, of which what is predicted at the first tokens does not count."""
    if skip and skip + 1 <= run.first:
        raise UsageError(
            f"--skip {skip} changes nothing: with --repeated the first copy does not count anyway",
            expected=f"at least {run.first}, or none",
            do="leave it out",
        )
    return replace(run, first=max(run.first, skip + 1))


def _answers(
    session: Session, path: Path, lines: Mapping[int, Mapping[str, Any]], name: str, option: str | None
) -> int | list[int] | None:
    """The token of that name: one for all pairs by the option, one for each by the file, or None."""
    given = {n: None if line.get(name) in (None, "") else str(line[name]) for n, line in lines.items()}
    missing = [n for n, text in given.items() if text is None]
    if len(missing) == len(given):
        return None if option is None else session.token(option)
    if option is not None:
        raise UsageError(f"--{name} beside answers in {str(path)!r}", expected="one of them", do="leave one out")
    if missing:
        raise UsageError(
            f"line {missing[0]} of {str(path)!r} has no {name!r}",
            expected="an answer for every pair, or for none",
            do="add what is missing",
        )
    return [session.token(text) for text in given.values() if text is not None]


def _lines(path: Path) -> dict[int, dict[str, Any]]:
    """Pairs of prompts by the number of their line: a JSON object each, or columns between tabs below their names.

    Raises:
        UsageError: the file cannot be read, or a line is no pair.
    """
    from virtual_weights.runtime.running.text import texts

    try:
        text = next(texts(path)) if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise _no_pairs(path, getattr(error, "strerror", None) or str(error)) from error
    lines = {n: line for n, line in enumerate(text.split("\n"), 1) if line.strip()}
    names: list[str] | None = None
    rows = dict[int, dict[str, Any]]()
    for n, line in lines.items():
        try:
            if names is None and not rows and not line.lstrip().startswith(("{", "[")):
                names = line.split("\t")
                _check_names(names)
            else:
                rows[n] = _pair_of(line, names)
        except ValueError as error:
            raise _no_pairs(path, f"line {n}: {error}") from error
    if not rows:
        raise _no_pairs(path, "no pairs")
    return rows


def _pair_of(line: str, names: Sequence[str] | None) -> dict[str, Any]:
    """A pair of prompts, of a JSON object, or of columns with these names.

    Raises:
        ValueError: it is none, and why.
    """
    if names is None:
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise ValueError("no JSON object")
        _check_names(row)
    else:
        cells = line.split("\t")
        if len(cells) != len(names):
            raise ValueError(f"{len(cells)} columns below {len(names)} names")
        row = dict(zip(names, cells, strict=True))
    if not (row.get("clean") and row.get("corrupted")):
        raise ValueError("a prompt is missing")
    return row


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name not in ("clean", "corrupted", "token", "against"):
            raise ValueError(f"unknown {name!r}")


def _no_pairs(path: Path, why: str) -> UsageError:
    return UsageError(
        f"no pairs of prompts in {str(path)!r}: {why}",
        expected='lines such as {"clean": "...", "corrupted": "...", "token": " a", "against": " b"}, or columns of '
        "these names between tabs; answers are optional",
        do="correct the file",
    )


def _quantities(record: vw.Record) -> list[dict[str, Any]]:
    """What is said of the edges as a set, each quantity with its interval."""
    return [
        {**{name: value for name, value in row.items() if name not in ("low", "high")}, "interval": _interval(row)}
        for row in record.rows()
    ]


def _interval(row: dict[str, Any]) -> list[float] | None:
    return None if row["low"] is None else [row["low"], row["high"]]


def _row(row: dict[str, Any], scores: dict[tuple[str, str], float]) -> dict[str, Any]:
    """One edge with its interval, who shares it, and its score where it was chosen by one."""
    edge = {"writer": row["writer"], "reader": row["reader"], "kind": row["kind"], "effect_nats": row["effect_nats"]}
    edge |= {"interval": _interval(row), **{name: row[name] for name in _FIGURES[1:]}}
    edge |= {"group": row["group"], "shared_with": row["shared_with"].split()}
    score = scores.get((row["writer"], row["reader"]))
    return edge if score is None or row["kind"] == "random" else edge | {"score": score}


def _largest(session: Session, record: vw.Record, top: int) -> list[dict[str, Any]]:
    """The edges of one port, largest first."""
    from virtual_weights.runtime.edges.edge import Edge
    from virtual_weights.survey.strongest import distinct

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
    if not (isinstance(metric.token, int) and isinstance(metric.against, int | None)):
        return "the logit of each prompt's own answer" + ("" if metric.against is None else " less that of its other")
    ids = [token for token in (metric.token, metric.against) if token is not None]
    names = [str(i) if (text := text_of(texts, i)) is None else repr(text) for i in ids]
    return f"the logit of {' less that of '.join(names)}"
