"""``vweights statements``: 25 published statements about the residual stream, and which of them hold on a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer
from virtual_weights.cli.verb import Session, running_verb


@running_verb(always=False)
def statements(
    session: Session,
    only: Annotated[
        str | None, typer.Option("--only", metavar="IDS", help="only these statements, separated by commas, e.g. L5,T3")
    ] = None,
    point: o.Point = None,
    sample: Annotated[
        int,
        typer.Option("--sample", metavar="N", min=1, help="use at most N pairs of heads in a check, drawn at random"),
    ] = 64,
) -> Answer:
    """Check 25 published statements about the residual stream on a model: verdicts with their evidence.

    Lemmas L1-L12, theorems T1-T7 and corollaries C1-C6. They are checked on the weights alone; with a text or a prompt
    the model also runs, for the statements about running models.
    """
    wanted = () if only is None else o.listed("--only", only, expected="statements such as L5,T3")
    question = vw.Statements(wanted, sample, session.options["seed"])  # refuses a wrong id before a model is opened
    if point is not None:
        question = replace(question, point=vw.OperatingPoint.load(point, session.stream))
    survey = vw.Survey(session.stream, None, session.run if session.runs else None, session.step)
    record = survey.ask(question)
    rows = rows_of(record)
    counts = dict(Counter(str(row["verdict"]) for row in rows))
    lines = [text for row in rows for text in _lines(row)]
    total = f"{len(rows)} statement{'' if len(rows) == 1 else 's'} on {session.name}: {counted(counts)}"
    return Answer(record, rows, {"verdicts": counts, "run": record.stamp["run"]}, [*lines, total])


def rows_of(record: vw.Record) -> list[dict[str, Any]]:
    """The statements of a record as plain rows: id first, evidence as an object, witnesses as a list."""
    rows = list[dict[str, Any]]()
    for row in record.rows():
        plain: dict[str, Any] = {"id": row["statement"], **{n: value for n, value in row.items() if n != "statement"}}
        plain["evidence"] = json.loads(str(row["evidence"]))
        plain["witnesses"] = [name for name in str(row["witnesses"]).split("; ") if name]
        rows.append(plain)
    return rows


def counted(verdicts: Mapping[str, int]) -> str:
    """How many statements have each verdict, in a line."""
    words = {"holds": "holds", "holds under": "holds under a condition", "fails": "fails", "cannot tell": "cannot tell"}
    return ", ".join(f"{words[name]} {verdicts[name]}" for name in words if name in verdicts)


def _lines(row: dict[str, Any]) -> list[str]:
    condition = f": {row['condition']}" if row["condition"] else ""
    return [
        f"{row['id']}  {row['title']}",
        f"    claim    {row['seed']}",
        f"    verdict  {row['verdict'].upper()}{condition}",
        f"    because  {row['why']}",
        *(f"    witness  {witness}" for witness in row["witnesses"]),
        "",
    ]
