"""``vweights vector``: who reads a direction of the stream, and who writes along it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb
from virtual_weights.errors import UsageError

KeptIn = Annotated[
    Path | None,
    typer.Option(
        "-a", "--atlas", metavar="ATLAS", help="also keep the answers in this atlas of the model, for its explorer"
    ),
]
_KINDS = ("head", "neuron", "feature", "token")


@running_verb(
    "text", "repeated", always=False, opening=("partial", "allow_non_finite"), tokens=2048, length=64, batch=8
)
def vector(
    session: Session,
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="a vector: .npy, .safetensors, or a control vector in .gguf")
    ],
    at: Annotated[
        str,
        typer.Option("--at", metavar="STATE", help="where it is: a state by number, or what reads it: L12, L12.mlp"),
    ] = "0",
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="which tensor of the file, such as direction.12")
    ] = None,
    row: Annotated[int | None, typer.Option("--row", metavar="N", min=0, help="which row of a tensor (k, d)")] = None,
    add: Annotated[
        str | None,
        typer.Option("--add", metavar="AMOUNTS", help="multiples that are added while the model runs, 1 by default"),
    ] = None,
    atlas: KeptIn = None,
    top: o.Top = 10,
) -> Answer:
    """Rank who reads a direction of the stream from a state on, and who writes along it up to there.

    A probe, a steering vector, a row of a dictionary: what it is called does not matter, only where it is. On a text,
    also what each reader receives along it (root mean square over tokens), and what adding it to that state of every
    token does to the loss, beside what the gradient predicts.
    """
    from virtual_weights.stream.vector import open_vector

    given = open_vector(file, name, row)
    if not session.runs:
        o.refuse_unused(context, "without a text", "add")
    with _survey(session, atlas) as survey:
        readers, writers = survey.answers([vw.VectorReaders(given, at, top), vw.VectorWriters(given, at, top)])
        activity = survey.ask(vw.VectorActivity(given)) if session.runs else None
        adding = vw.VectorEffect(given, at, _amounts(add or "1"), batch=session.options["batch"])
        effect = survey.ask(adding) if session.runs else None
    state = readers.stamp["state"]
    shown: list[Table | str] = []
    rows = dict[str, list[dict[str, Any]]]()
    for record, side, about in ((readers, "reader", "reads"), (writers, "writer", "writes along")):
        for kind in _KINDS:
            best = _foremost(record, kind, top)
            if activity is not None and side == "reader":
                best = [_on_text(session.stream, row, activity, readers.stamp["norm_of_vector"]) for row in best]
            rows[f"{side}s_{kind}s"] = best
            names = dict.fromkeys((side, "sign", *_columns(record), *(best[0] if best else ())))
            heads = {name: name.replace("_", " ") for name in names}
            title = f"which {kind} {about} {given.name} at state {state} · {session.name}"
            shown += [Table(title, best, heads)] if best else []
    if effect is not None:
        rows["effects"] = list(effect.rows())
        heads = {column: column for column in ("amount", *(c.name for c in effect.columns))}
        title = f"adding {given.name} to state {state} of every token: change of the loss in nats · {session.name}"
        shown.append(Table(title, rows["effects"], heads))
    if atlas is not None:
        shown.append(f"its page: vweights serve {atlas}, #/vector")
    summary = {"vector": given.name, "state": state, "norm": readers.stamp["norm_of_vector"]}
    return Answer(readers, rows["readers_heads"], {**summary, **rows}, shown)


@contextmanager
def _survey(session: Session, atlas: Path | None) -> Generator[vw.Survey]:
    """What answers the questions, and where an atlas is named keeps the answers there and writes its pages anew."""
    from virtual_weights.report import report
    from virtual_weights.survey.plan import filling

    run = session.run if session.runs else None
    if atlas is None:
        yield vw.Survey(session.stream, None, run, session.step)
        return
    vw.Atlas.open(atlas)  # refuses a folder that is none
    with filling(atlas, session.stream, run, session.name, session.step) as survey:
        yield survey
        assert survey.atlas is not None
        report(survey.atlas)


def _on_text(stream: vw.Stream, row: dict[str, Any], activity: vw.Record, norm: float) -> dict[str, Any]:
    """A reader with what it receives along the vector on a text, root mean square."""
    name = str(row["reader"])
    group = stream.groups["unembed"] if name.startswith("unembed") else stream.groups.of(name)
    along = activity[str(group.reads),]["raw" if group.norm is None else "rms"]
    return {**row, "contribution": row["strength"] / norm * along}


def _amounts(text: str) -> tuple[float, ...]:
    """``"1,-2"`` as numbers."""
    try:
        return tuple(float(part) for part in o.listed("--add", text, expected="numbers such as 1,-2"))
    except ValueError:
        raise UsageError(f"--add {text}", expected="numbers such as 1,-2", do="correct them") from None


def _columns(record: vw.Record) -> list[str]:
    return [column.name for column in record.columns if column.name not in ("kind", "sign")]


def _foremost(record: vw.Record, kind: str, top: int) -> list[dict[str, Any]]:
    """The rows of a kind by descending score."""
    rows: list[dict[str, Any]] = [row for row in record.rows() if row["kind"] == kind and row["score"] is not None]
    rows.sort(key=lambda row: -row["score"])
    return [{name: value for name, value in row.items() if name != "kind"} for row in rows[:top]]
