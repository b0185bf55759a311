"""``vweights validate``: how far a score from weights, or moments of another text, can be trusted on this model."""

from __future__ import annotations

from typing import Annotated

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.running.run import Run
from virtual_weights.survey import Validation
from virtual_weights.survey.survey import Survey

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
        bool, typer.Option("--centred", help="leave out what a writer writes alike at every token")
    ] = False,
    edges: Annotated[
        int, typer.Option("--edges", metavar="N", min=0, help="of each port: edges to ablate, drawn at random; 0: none")
    ] = 48,
    memory_mb: o.MemoryMb = None,
) -> Answer:
    """Rank correlation of each predictor of edges into heads with the contributions on a text, and with ablations.

    The moments that predict are of other text: the default text where --text names one, or of --repeated tokens another
    seed's; else the tokens that come before those of the target.
    """
    before, target = _texts(session)
    memory = memory_mb or 1024
    moments = Observation(memory).moments(before, session.step("observation of another text"))
    question = Validation(
        moments,
        writers.value,
        centred,
        edges,
        session.options["seed"],
        memory_mb=memory,
        device=session.options["device"],
    )
    record = Survey(session.stream, None, target, session.step).ask(question)
    rows = list(record.rows())
    title = f"rank correlation with contributions and with the effects of ablating edges · {session.name}"
    shown = [
        Table(title, rows, _FIGURES),
        f"contribution: {target.count} tokens of {target.text}; data-aware: {moments.tokens} of {moments.text}",
    ]
    if edges:
        shown.append(
            f"effect: edges drawn at random, ablated one by one on {question.sequences} chunks of "
            f"{question.length} tokens of the former text"
        )
    return Answer(record, rows, {"predicted_from": moments.text, "target_text": target.text}, shown)


def _texts(session: Session) -> tuple[Run, Run]:
    """The run whose moments predict, and the run that is predicted."""
    options = session.options
    size = options["tokens"], options["length"]
    how = {"batch": options["batch"]}
    if options["repeated"]:
        target = session.run
        return Run.on_repeats(session.stream, *size, options["seed"] + 1, model=target.runner, **how), target
    if options["text"] is not None:
        target = session.run
        return Run.on_text(session.stream, None, *size, model=target.runner, **how), target
    both = Run.on_text(
        session.stream,
        None,
        2 * options["tokens"],
        options["length"],
        dtype=options["dtype"].torch,
        device=options["device"],
        **how,
    )
    return both.halves()
