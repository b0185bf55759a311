"""``vweights ablate --by-token``: at which tokens of a text the loss changes without an edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import virtual_weights as vw
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session
from virtual_weights.errors import UsageError

_SHOWN = {
    "sequence": "sequence",
    "position": "position",
    "token": "token",
    "change": "change of loss",
    "loss": "loss",
    "likeliest": "predicted",
    "likeliest_without": "predicted without",
}


def edges_by_token(
    session: Session,
    survey: vw.Survey,
    edges: Sequence[tuple[str, str]],
    replacement: Literal["mean", "resample", "partner"],
    scalars: Literal["held", "move"],
) -> Answer:
    """What each of some edges does at every token of a run.

    Raises:
        UsageError: no edge is named.
    """
    if not edges:
        raise UsageError("--by-token without an edge", expected="WRITER READER, or --edge", do="name an edge")
    batch = session.options["batch"]
    records = survey.answers([vw.EdgeTokens(*edge, replacement, scalars, batch=batch) for edge in edges])
    first, *rest = (_answer(session, record) for record in records)
    return replace(first, more=rest)


def _answer(session: Session, record: vw.Record) -> Answer:
    """Every token as JSON; those whose loss changes much as a table."""
    from virtual_weights.runtime.edges.passes import CHANGED

    rows = [_with_change(row) for row in record.rows()]
    changed = [_shown(row) for row in rows if row["change"] is not None and abs(row["change"]) > CHANGED]
    stamp = record.stamp
    sequences = "one sequence" if stamp["sequences"] == 1 else f"{stamp['sequences']} sequences"
    counted = sum(row["change"] is not None for row in rows)
    line = (
        f"{len(changed)} of {counted} counted tokens change by more than {CHANGED} nats without {stamp['edge']}; mean "
        f"change of loss {_figure(stamp['effect_nats'])} nats, on {sequences} of {stamp['text']}, from token "
        f"{stamp['first']} on (0 is the first)"
    )
    summary = {name: stamp[name] for name in ("effect_nats", "loss_changed", "clean_loss")}
    table = Table(f"tokens that change without {stamp['edge']} · {session.name}", changed, _SHOWN)
    return Answer(record, rows, summary, [table, line])


def _with_change(row: dict[str, Any]) -> dict[str, Any]:
    loss, without = row["loss"], row["loss_without"]
    return row | {"change": None if loss is None or without is None else without - loss}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with texts where there are some, else with ids."""
    names = {"token": "text", "likeliest": "likeliest_text", "likeliest_without": "likeliest_text_without"}
    return row | {id: row[id] if row[text] is None else repr(row[text]) for id, text in names.items()}


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3g}"
