"""``vweights trace``: one prompt taken apart, writer by writer."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table, figure
from virtual_weights.cli.verb import Session, running_verb
from virtual_weights.errors import UsageError

_LENS = 5  # tokens of every state, at most


@running_verb("prompt")
def trace(
    session: Session,
    context: typer.Context,
    reader: Annotated[
        str,
        typer.Option(
            "--reader",
            metavar="NAME",
            help="explain what this reads, e.g. L17H3.K or L5N7.up; unembed is the logit of a token",
        ),
    ] = "unembed",
    token: o.Logit = None,
    against: o.Against = None,
    through: Annotated[
        str | None,
        typer.Option(
            "--through",
            metavar="NAME",
            help="show what one component contributes, e.g. L17H3, L17.mlp or L17N5, and from which writers",
        ),
    ] = None,
    position: o.Position = -1,
    lens: Annotated[
        bool, typer.Option("--lens", help="show what the model would predict from every state of the stream")
    ] = False,
    top: o.Top = 20,
) -> Answer:
    """Explain a prediction: what each component contributes to the next token of a prompt.

    With --reader, it shows what each contributes to another reader; with --through, what one component contributes, and
    from which writers; with --lens, what the model would predict from every state of the stream.
    """
    if not session.runs:
        raise UsageError("there is no prompt", expected="--prompt or --prompt-ids", do="add one of them")
    if lens:
        o.refuse_unused(context, "with --lens", "reader", "token", "against", "through")
    if reader != "unembed":
        o.refuse_unused(context, f"with --reader {reader}", "token", "against", "through")
    if through is not None:
        session.stream.groups.of(through)  # refuses a wrong name before the model runs
    place = _place(session.run.count, position)
    if lens:
        return _states(session, session.ask(vw.Lens(min(top, _LENS), place)), place)
    other = None if against is None else session.token(against)
    logit = None if reader != "unembed" else _likeliest(session, place) if token is None else session.token(token)
    title = reader if logit is None else f"the logit of {session.named(logit)}"
    title += "" if other is None else f" less that of {session.named(other)}"
    if through is not None and logit is not None:
        record = session.ask(vw.Route(through, logit, other, place))
        return _routed(session, record, top, f"what {through} contributes to {title}", place)
    record = session.ask(vw.Trace(reader, logit, other)).select("token", [str(place)])
    rows = [{name: value for name, value in row.items() if name != "token"} for row in record.rows()]
    rows = sorted(rows, key=lambda row: -abs(float(row["share"] or 0.0)))[:top]
    line = f"the sum over all writers differs from what the model computes by a share of {record.stamp['error']:.1g}"
    columns = None if logit is None else ("writer", "logit", "share")  # a logit's norm is its size
    return _answer(session, record, rows, Table(title, rows, columns), place, line)


def _place(count: int, position: int) -> int:
    """A position in a prompt of ``count`` tokens, counted from its beginning."""
    if not -count <= position < count:
        raise UsageError(
            f"--position {position} in a prompt of {count} tokens",
            expected=f"a number from 0 to {count - 1}, or from -{count} to -1",
            do="correct it",
        )
    return position % count


def _likeliest(session: Session, place: int) -> int:
    """The token that the model itself ranks first."""
    lens = session.ask(vw.Lens(1, place))
    return int([row["token"] for row in lens.rows()][-1] or 0)


def _routed(session: Session, record: vw.Record, top: int, title: str, place: int) -> Answer:
    from virtual_weights.checkpoint import text_of

    best = sorted(record.rows(), key=lambda row: -abs(float(row["logit"] or 0.0)))[:top]
    tokens, texts = session.run.chunks[0].tolist(), session.stream.source.token_texts()
    rows = [{**row, "text": text_of(texts, tokens[int(str(row["token"]))])} for row in best]
    direct, error = record.stamp["direct"], record.stamp["error"]
    through = record.parameters["through"]
    line = f"{through} adds {direct:.4g}, from which the sum over all paths differs by a share of {error:.1g}"
    shown = [{**row, "text": None if row["text"] is None else repr(row["text"])} for row in rows]
    heads = {"writer": "writer", "token": "position", "text": "token", "logit": "logit"}
    return _answer(session, record, rows, Table(title, shown, heads), place, line)


def _states(session: Session, record: vw.Record, place: int) -> Answer:
    from virtual_weights.checkpoint import text_of

    texts = session.stream.source.token_texts()
    rows = [{name: value for name, value in row.items() if name != "row"} for row in record.rows()]
    rows = [{**row, "text": text_of(texts, int(str(row["token"])))} for row in rows]
    tokens: dict[Any, list[str]] = {}
    for row in rows:
        text = row["token"] if row["text"] is None else repr(row["text"])
        tokens.setdefault(row["state"], []).append(f"{text} {figure(float(row['probability'] or 0))}")
    shown = [{"state": state, "tokens": "  ".join(items)} for state, items in tokens.items()]
    table = Table("logit lens", shown, {"state": "state", "tokens": "likeliest tokens and their probabilities"})
    return _answer(session, record, rows, table, place)


def _answer(
    session: Session,
    record: vw.Record,
    rows: list[dict[str, Any]],
    table: Table,
    place: int,
    line: str | None = None,
) -> Answer:
    """The answer with a table whose title also names the token and the model, and with a line below it."""
    from virtual_weights.checkpoint import text_of

    tokens, texts = session.run.chunks[0].tolist(), session.stream.source.token_texts()
    last = session.named(tokens[place])
    titled = replace(table, title=f"{table.title} at position {place}, token {last} · {session.name}")
    prompt = [{"token": token, "text": text_of(texts, token)} for token in tokens]
    summary = {"tokens": prompt, "position": place, "error": record.stamp.get("error")}
    return Answer(record, rows, summary, [titled] if line is None else [titled, line])
