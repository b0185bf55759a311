"""``vweights trace``: one prompt taken apart, writer by writer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb
from virtual_weights.errors import UsageError

_LENS = 5  # tokens of every state, at most


@running_verb("prompt")
def trace(
    session: Session,
    reader: Annotated[
        str,
        typer.Option("--reader", metavar="NAME", help="e.g. L17H3.K or L5N7.up; unembed stands for a token's logit"),
    ] = "unembed",
    token: o.Logit = None,
    against: o.Against = None,
    through: Annotated[
        str | None,
        typer.Option(
            "--through",
            metavar="NAME",
            help="a component, e.g. L17H3, L17.mlp or L17N5: what it contributes, and from whom",
        ),
    ] = None,
    position: o.Position = -1,
    lens: Annotated[
        bool, typer.Option("--lens", help="show what the model would predict from every state of the stream")
    ] = False,
    top: o.Top = 20,
) -> Answer:
    """Explain a prediction: what each component contributes to the next token of a prompt.

    With --reader, what each writes to another reader; with --through, what one component contributes and from whom;
    with --lens, what the model would predict from every state of the stream.
    """
    if not session.runs:
        raise UsageError("no prompt", expected="--prompt or --prompt-ids", do="add one of them")
    if (through is not None and lens) or (reader != "unembed" and (through or token or against)):
        raise UsageError(
            "--lens with --through, or a token of a reader that is not the unembedding",
            expected="--token, --against and --through with --reader unembed alone",
            do="leave one out",
        )
    run = session.run
    if not -run.count <= position < run.count:
        raise UsageError(f"no token {position}", expected=f"a place in {run.count} tokens", do="correct --position")
    place = position % run.count
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
    line = f"all writers together miss what the model computes by {record.stamp['error']:.1g} of it"
    return _answer(session, record, rows, title, place, [line])


def _likeliest(session: Session, place: int) -> int:
    """The token that the model itself puts first."""
    lens = session.ask(vw.Lens(1, place))
    return int([row["token"] for row in lens.rows()][-1] or 0)


def _routed(session: Session, record: vw.Record, top: int, title: str, place: int) -> Answer:
    best = sorted(record.rows(), key=lambda row: -abs(float(row["logit"] or 0.0)))[:top]
    tokens = session.run.chunks[0].tolist()
    rows = [{**row, "text": session.named(tokens[int(str(row["token"]))])} for row in best]
    direct, error = record.stamp["direct"], record.stamp["error"]
    line = f"{record.parameters['through']} adds {direct:.4g}; all paths together miss it by {error:.1g}"
    return _answer(session, record, rows, title, place, [line])


def _states(session: Session, record: vw.Record, place: int) -> Answer:
    texts = session.stream.source.token_texts()
    rows = [{name: value for name, value in row.items() if name != "row"} for row in record.rows()]
    rows = [{**row, "text": texts[int(str(row["token"]))] if texts else None} for row in rows]
    return _answer(session, record, rows, "logit lens", place, [])


def _answer(
    session: Session, record: vw.Record, rows: list[dict[str, Any]], title: str, place: int, lines: list[str]
) -> Answer:
    names = [session.named(token) for token in session.run.chunks[0].tolist()]
    table = Table(f"{title} at token {place} ({names[place]}) · {session.name}", rows)
    return Answer(
        record, rows, {"tokens": names, "position": place, "error": record.stamp.get("error")}, [table, *lines]
    )
