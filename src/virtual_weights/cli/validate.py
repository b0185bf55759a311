"""``vweights validate``: how far a score from weights, or moments of another text, can be trusted on this model."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb

_FIGURES = (
    "predictor",
    "port",
    "target",
    "per_reader_rank_correlation",
    "rank_correlation",
    "precision_at_20",
    "edges",
)


@running_verb("text", "repeated")
def validate(
    session: Session,
    writers: o.WriterOption = o.WriterSet.heads,
    centred: Annotated[
        bool, typer.Option("--centred", help="leave out what a writer writes equally at every token")
    ] = False,
    edges: Annotated[
        int,
        typer.Option("--edges", metavar="N", min=0, help="how many random edges to remove for each port; 0 for none"),
    ] = 48,
    memory_mb: o.Memory = None,
) -> Answer:
    """Measure how well scores from the weights predict what flows on a text, and what ablations show.

    Some predictors use moments of another text. With --text, that is the default text; with --repeated, other random
    tokens; otherwise, the tokens before those that are predicted.
    """
    before, target = _texts(session)
    memory = memory_mb or 1024
    moments = vw.Observation(memory).moments(before, session.step("observation of the other text"))
    question = vw.Validation(
        moments,
        writers.value,
        centred,
        edges,
        session.options["seed"],
        memory_mb=memory,
        device=session.options["device"],
    )
    record = vw.Survey(session.stream, None, target, session.step).ask(question)
    rows: list[dict[str, Any]] = list(record.rows())
    title = f"rank correlation of scores with contributions and with effects of ablation · {session.name}"
    shown: list[Table | str] = [
        Table(title, [_above_chance(row) for row in rows], _FIGURES),
        f"contributions are those of {target.count} tokens of {target.text}; data-aware predictors use "
        f"{moments.tokens} tokens of {moments.text}",
    ]
    effects = [int(row["edges"]) for row in rows if row["target"] == "effect"]
    if effects:
        chance = 1.96 / math.sqrt(max(min(effects) - 1, 1))
        shown.append(
            f"effects are those of ablating random edges one by one, on {question.sequences} chunks of "
            f"{question.length} tokens of the same text; over {min(effects)} edges a rank correlation within "
            f"±{chance:.2g} is not above chance"
        )
    shown.append("precision at 20 is blank where it is not above that of a random order")
    return Answer(record, rows, {"predicted_from": moments.text, "target_text": target.text}, shown)


def _above_chance(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose precision is left out where a random order would reach it, as with 20 edges or fewer."""
    precise = row["precision_at_20"] > row["precision_at_random"]
    return row if precise else {**row, "precision_at_20": None}


def _texts(session: Session) -> tuple[vw.Run, vw.Run]:
    """The run whose moments predict, and the run that is predicted."""
    options = session.options
    size = options["tokens"], options["length"]
    how = {"batch": options["batch"]}
    if options["repeated"]:
        target = session.run
        return vw.Run.on_repeats(session.stream, *size, options["seed"] + 1, model=target.runner, **how), target
    if options["text"] is not None:
        target = session.run
        return vw.Run.on_text(session.stream, None, *size, options["bos"], model=target.runner, **how), target
    both = vw.Run.on_text(
        session.stream,
        None,
        2 * options["tokens"],
        options["length"],
        options["bos"],
        **session.how,
    )
    return both.halves()
