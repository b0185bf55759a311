"""``vweights observe`` and ``labels``: run a model on text, and keep or show what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb


@running_verb(tokens=16384)
def observe(
    session: Session,
    context: typer.Context,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", callback=o.checked_file, help="safetensors file to write"),
    ],
    without_sinks: Annotated[
        bool,
        typer.Option(
            "--without-sinks", help="leave out first tokens, and tokens of more than 20 times their chunk's median norm"
        ),
    ] = False,
    memory_mb: o.Memory = None,
) -> Answer:
    """Run a model and store what other commands need: averages over a text, or one prompt in full.

    On a text it stores averages (moments), for the option --moments of composition, map and edges. With --prompt it
    stores the operating point of that prompt, for the option --point of linear, paths and statements.
    """
    from virtual_weights.record import Axis
    from virtual_weights.record.durable import replacing
    from virtual_weights.runtime.flow.observation import operating_point

    run = session.run
    if session.options["prompt"] is not None or session.options["prompt_ids"] is not None:
        o.refuse_unused(context, "with a prompt", "memory_mb", "without_sinks")
        point = operating_point(run)
        with replacing(output) as temporary:
            point.save(temporary)
        stamp = {"norm": session.stream.norm_stamp, "text": run.text, "tokens": run.count, "run": run.identity}
        record = vw.Record("operating_point", (Axis("row", ()),), (), {}, stamp, session.stream.provenance)
        summary = {"file": str(output), "kind": "operating point", "identity": point.identity, "tokens": run.count}
        return Answer(record, [], summary, [f"operating point of {run.count} tokens of {run.text} written to {output}"])
    question = vw.Observation(memory_mb or 1024, "left out" if without_sinks else "kept")
    moments = question.moments(run, session.step("observation"))
    with replacing(output) as temporary:
        moments.save(temporary)
    record, attention = question.record(run, moments), _attention(session, moments)
    rows = list(record.rows())
    summary = {"file": str(output), "kind": "moments", "identity": moments.identity, "tokens": moments.tokens}
    summary |= {"length": moments.length, "held": moments.held, "attention": attention}
    most = sorted(attention, key=lambda row: -row["previous"])[:10]
    shown = [
        Table(f"means over tokens, by state of the stream · {session.name}", rows),
        Table("the 10 heads that attend most to the previous token", most, ("head", "previous", "self", "first")),
        "second moments: " + "; ".join(f"{kind} {form}" for kind, form in moments.held.items()),
        f"moments of {moments.tokens} tokens of {moments.text} written to {output}",
    ]
    return Answer(record, rows, summary, shown)


@running_verb("repeated", tokens=512, length=128)
def labels(
    session: Session,
    threshold: Annotated[
        float, typer.Option("--threshold", metavar="X", help="mean attention above which a head gets a label")
    ] = 0.4,
    top: o.Top = 6,
) -> Answer:
    """Find induction, previous-token and other well-known heads, by their attention on repeated tokens."""
    from virtual_weights.runtime.flow.labels import BEHAVIOURS

    question = vw.Labels(threshold)
    record = session.survey.ask(question)
    rows = list(record.rows())
    shown: list[Table | str] = []
    for name, meaning in BEHAVIOURS.items():
        best = list(record.top(top, name).rows())
        shown.append(Table(f"{name.replace('_', ' ')}: {meaning} · {session.name}", best, ("head", name, "label")))
    count = sum(row["label"] is not None for row in rows)
    what = f"more than {threshold} of their attention goes to one kind of position"
    shown.append(f"{count} of {len(rows)} heads have a label: {what}")
    return Answer(record, rows, {"labelled": count, "heads": len(rows)}, shown)


def _attention(session: Session, moments: vw.Moments) -> list[dict[str, Any]]:
    """Mean attention of every head to self, previous and first token."""
    return [
        {"head": label, **dict(zip(("self", "previous", "first"), row, strict=True))}
        for group in session.stream.groups.heads
        for label, row in zip(group.labels, moments.attention[group.id].tolist(), strict=True)
    ]
