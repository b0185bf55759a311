"""Answers on stdout, as one JSON object or as tables for people, and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as Drawn

from virtual_weights.cli.options import ProgressMode
from virtual_weights.record import Record
from virtual_weights.survey.survey import Step, quiet

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows to look at.

    Attributes:
        title: what they are.
        rows: the rows.
        columns: which of their values are shown, by name, each under its head; None shows all.
    """

    title: str
    rows: Sequence[Row]
    columns: Mapping[str, str] | Sequence[str] | None = None

    @property
    def heads(self) -> dict[str, str]:
        """Names of values to heads of columns."""
        if isinstance(self.columns, Mapping):
            return dict(self.columns)
        names = list(self.rows[0]) if self.columns is None and self.rows else list(self.columns or ())
        return {name: name.replace("_", " ") for name in names}

    def show(self) -> None:
        """Draw it; numbers are right-aligned."""
        drawn = Drawn(title=escape(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        body = [[_text(row.get(name)) for name in self.heads] for row in self.rows]
        for i, head in enumerate(self.heads.values()):
            numeric = bool(body) and all(_numeric(row[i]) for row in body)
            drawn.add_column(escape(head), justify="right" if numeric else "left", no_wrap=True)
        for row in body:
            drawn.add_row(*map(escape, row))
        console().print(drawn)


@dataclass(frozen=True)
class Answer:
    """What a verb answers: a record as JSON, and what a person is shown of it.

    Attributes:
        record: question, parameters, stamp and provenance come from it.
        rows: the rows; None for all that the record has.
        summary: its figures in short.
        shown: tables and lines, in order.
        more: answers to further questions of the same verb.
    """

    record: Record
    rows: Sequence[Row] | None = None
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shown: Sequence[Table | str] = ()
    more: Sequence[Answer] = ()

    def as_json(self, model: str) -> dict[str, Any]:
        """The answer in the one shape that all verbs have."""
        record = self.record
        shape: dict[str, Any] = {"model": model, "question": record.question, "parameters": dict(record.parameters)}
        shape |= {"stamp": dict(record.stamp), "provenance": dict(record.provenance), "summary": dict(self.summary)}
        shape["rows"] = list(record.rows()) if self.rows is None else list(self.rows)
        return shape | ({"more": [answer.as_json(model) for answer in self.more]} if self.more else {})

    def show(self) -> None:
        """Everything that a person is shown."""
        for part in self.shown:
            if isinstance(part, Table):
                part.show()
            else:
                line(part)
        for answer in self.more:
            answer.show()


def put_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; NaN never appears."""
    print(json.dumps(value, allow_nan=False))


def line(text: str) -> None:
    """A line on stdout."""
    console().print(escape(text), highlight=False, soft_wrap=True)


def console() -> Console:
    """The console of stdout; wide where the output is not a terminal, so that nothing is cut."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


@contextmanager
def steps(mode: ProgressMode) -> Generator[Step]:
    """Give what begins a step by name: bars with the time left on a terminal, JSON lines on request, else silence."""
    if mode is ProgressMode.json:
        yield _json_step
    elif mode is ProgressMode.auto and sys.stderr.isatty():
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:

            def begin(name: str) -> Any:
                task = bars.add_task(name, total=None)
                return lambda done, total: bars.update(task, completed=done, total=total)

            yield begin
    else:
        yield quiet


def _json_step(name: str) -> Any:
    def report(done: float, total: float) -> None:
        print(json.dumps({"step": name, "done": done, "total": total}), file=sys.stderr, flush=True)

    return report


def _text(cell: object) -> str:
    if isinstance(cell, list | tuple):
        return " .. ".join(map(_text, cell)) if all(isinstance(x, float) for x in cell) else " ".join(map(_text, cell))
    return f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell)


def _numeric(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
