"""Answers on stdout, as one JSON object or as tables for people, and progress on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from virtual_weights.cli.options import ProgressMode
from virtual_weights.errors import printable

if TYPE_CHECKING:  # the package is slow to import, and help needs none of it
    from virtual_weights.record import Header, Record
    from virtual_weights.stream import Stream
    from virtual_weights.survey.survey import Step

Row = Mapping[str, Any]
IDENTITY = frozenset(
    "writer reader readers verdict kind id neuron component head eraser first second path predictor port target "
    "state block offset n direction directions coordinate end side token quantity value name".split()
)
"""Columns that say what a row is about, or what the verdict on it is: these are never left out."""
UNLIMITED = 1_000_000  # columns of a pipe that names no width
_GAP = 2  # columns between columns
_PROSE = 24  # columns that a text keeps while it is wrapped, if its longest word is no longer


@dataclass(frozen=True)
class Table:
    """Rows to look at.

    Attributes:
        title: what they are.
        rows: the rows.
        columns: which of their values are shown, by name, each under its head, most important first; None shows all.
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

    def show(self, on: Console | None = None) -> None:
        """Draw it: identity columns stay whole; where there is no room, other columns are left out from the right.

        Args:
            on: the console; that of stdout without one.
        """
        out = on or console()
        if self.title:
            line(self.title, out, "italic")
        if not self.rows:
            line("none", out)
            return out.print()
        heads = {name: printable(head, keep="") for name, head in self.heads.items()}
        columns = [_Column.of(name, head, [row.get(name) for row in self.rows]) for name, head in heads.items()]
        columns, absent = _fitting([c for c in columns if any(c.cells)], out.width)
        spare = out.width - _width(columns)
        drawn = Drawn(box=box.SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
        texts = list[list[Text]]()
        for column in columns:
            width = min(column.natural, column.least + max(spare, 0))
            spare -= width - column.least
            drawn.add_column(Text(column.head, "bold", justify="right" if column.right else "left"), width=width)
            cells = (cell.rjust(width) if column.right else "\n".join(_broken(cell, width)) for cell in column.cells)
            texts.append([Text(cell) for cell in cells])
        for cells in zip(*texts, strict=True):
            drawn.add_row(*cells)
        width, out.width = out.width, max(out.width, _width(columns))
        with out.capture() as drawing:
            out.print(drawn)
        out.width = width
        out.file.writelines(f"{row.rstrip()}\n" for row in drawing.get().removesuffix("\n").split("\n"))
        if absent:
            names = ", ".join(column.name for column in absent)
            line(f"not shown, for lack of room: {names}; a wider terminal or --json shows them", out)
        return out.print()


@dataclass(frozen=True)
class Answer:
    """What a verb answers: a record as JSON, and what a person is shown of it.

    Attributes:
        record: question, parameters, stamp and provenance come from it; a header where the answer is no record.
        rows: the rows; None for all that the record has, of a header none.
        summary: its figures in short.
        shown: tables and lines, in order.
        more: answers to further questions of the same verb.
    """

    record: Record | Header
    rows: Sequence[Row] | None = None
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shown: Sequence[Table | str] = ()
    more: Sequence[Answer] = ()

    def as_json(self, model: str | None) -> dict[str, Any]:
        """The answer in the one shape that all verbs have."""
        record = self.record
        shape: dict[str, Any] = {"model": model, "question": record.question, "parameters": dict(record.parameters)}
        shape |= {"stamp": dict(record.stamp), "provenance": dict(record.provenance), "summary": dict(self.summary)}
        rows = getattr(record, "rows", tuple)() if self.rows is None else self.rows  # a header has none
        shape["rows"] = list(rows)
        return shape | ({"more": [answer.as_json(model) for answer in self.more]} if self.more else {})

    def give(self, model: str | None, as_json: bool) -> None:
        """One JSON object, or what a person is shown."""
        if as_json:
            put_json(self.as_json(model))
        else:
            self.show()

    def show(self) -> None:
        """Everything that a person is shown; an empty line sets tables apart."""
        parts = self._parts()
        for before, part in zip([None, *parts], parts, strict=False):
            if isinstance(part, str):
                line(part)
                continue
            if isinstance(before, str):
                line("")
            part.show()

    def _parts(self) -> list[Table | str]:
        """What is shown of this answer and of the further ones."""
        return [*self.shown, *(part for answer in self.more for part in answer._parts())]


def header_of(question: str, parameters: Mapping[str, Any], stream: Stream | None = None) -> Header:
    """The header of an answer that is no record: about an opened model, or about none."""
    from virtual_weights.record import Header

    stamp, provenance = ({}, {}) if stream is None else ({"norm": stream.norm_stamp}, stream.provenance)
    return Header(question, (), (), parameters, stamp, provenance)


def put_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; NaN never appears, nor what steers a terminal."""
    print(json.dumps(value, allow_nan=False, default=dict).replace("\x7f", "\\u007f"))


def line(text: str, on: Console | None = None, style: str = "") -> None:
    """A line on stdout, broken between words alone; what follows a label at its beginning is indented below itself."""
    out, text = on or console(), printable(text, keep="\n\t")
    label = re.match(r"\s*(\S+\s{2,})?", text)
    for part in _filled(re.findall(r"\s*\S+", text), out.width, " " * (label.end() if label else 0)):
        out.print(Text(part, style), soft_wrap=True)


def console() -> Console:
    """The console of stdout: as wide as the terminal or as COLUMNS says; a pipe that names no width has no limit."""
    plain = Console()
    return plain if plain.is_terminal or os.environ.get("COLUMNS", "").isdigit() else Console(width=UNLIMITED)


@contextmanager
def steps(mode: ProgressMode) -> Generator[Step]:
    """Give what begins a step by name: bars with the time left on a terminal, JSON lines on request, else silence."""
    from virtual_weights.survey.survey import bars, quiet

    if mode is ProgressMode.json:
        yield _json_step
    elif mode is ProgressMode.auto and sys.stderr.isatty():
        with bars(shown=True) as step:
            yield step
    else:
        yield quiet


def _json_step(name: str) -> Any:
    def report(done: float, total: float) -> None:
        with suppress(BrokenPipeError):  # nobody listens any longer: the work goes on
            print(json.dumps({"step": name, "done": done, "total": total}), file=sys.stderr, flush=True)

    return report


@dataclass(frozen=True)
class _Column:
    """One column as it is drawn.

    Attributes:
        name: name of the values.
        head: what stands above them.
        cells: the values as texts; numbers padded so that their points stand below each other.
        right: whether it is set to the right.
        least: the fewest columns of the terminal in which no word is broken.
        natural: how many it takes where no cell is wrapped.
    """

    name: str
    head: str
    cells: list[str]
    right: bool
    least: int
    natural: int

    @staticmethod
    def of(name: str, head: str, values: Sequence[object]) -> _Column:
        """The column of some values."""
        cells, right = _aligned(values)
        words = max(map(cell_len, head.split()), default=0)
        widest = max([words, *map(cell_len, cells)])
        longest = max([words, *(cell_len(part.strip()) for cell in cells for part in _unbroken(cell))])
        prose = not right and name not in IDENTITY and any(" " in cell for cell in cells)
        least = min(max(longest, _PROSE), widest) if prose else widest
        return _Column(name, head, cells, right, least, max(widest, cell_len(head)))


def _unbroken(cell: str) -> list[str]:
    """The parts of a cell between which it may be broken: words, or items where two spaces set these apart."""
    return re.findall(r"\s*\S+(?: \S+)*" if "  " in cell else r"\s*\S+", cell)


def _broken(cell: str, width: int) -> list[str]:
    """The lines of a cell."""
    return [cell] if cell_len(cell) <= width else _filled(_unbroken(cell), width)


def _filled(parts: Iterable[str], width: int, indent: str = "") -> list[str]:
    """Lines of parts, each with the spaces before it; a line is as wide as allowed, or it is one part."""
    rows, row = list[str](), ""
    for part in parts:
        if row.strip() and cell_len(row + part) > width:
            rows, row = [*rows, row], indent + part.lstrip()
        else:
            row += part
    return [*rows, row]


def _width(columns: Sequence[_Column]) -> int:
    return sum(column.least for column in columns) + _GAP * max(len(columns) - 1, 0)


def _fitting(columns: list[_Column], width: int) -> tuple[list[_Column], list[_Column]]:
    """The columns for which there is room, and those for which there is none: identity first, then from the left."""
    chosen = [column for i, column in enumerate(columns) if i == 0 or column.name in IDENTITY]
    for column in columns:
        if column not in chosen and _width([*chosen, column]) <= width:
            chosen.append(column)
    return [column for column in columns if column in chosen], [c for c in columns if c not in chosen]


def _aligned(values: Sequence[object]) -> tuple[list[str], bool]:
    """Values as texts, and whether they are numbers; these are padded to have their points below each other."""
    given = [value for value in values if value is not None]
    pairs = [value for value in given if isinstance(value, list | tuple) and _floats(value) and len(value) == 2]
    if given and len(pairs) == len(given):  # intervals
        low, high = ([None if v is None else v[i] for v in values] for i in (0, 1))  # pyright: ignore
        ends = zip(_points(_numbers(low)), _points(_numbers(high)), strict=True)
        return [f"{a} .. {b}" if a.strip() else "" for a, b in ends], True
    if given and all(isinstance(v, int | float) and not isinstance(v, bool) for v in given):
        return _points(_numbers(values)), True
    texts = [_text(value) for value in values]
    numeric = 2 * sum(map(_numeric, texts)) > sum(map(bool, texts))
    return (_points(texts), True) if numeric else (texts, False)


def _numbers(values: Iterable[Any]) -> list[str]:
    """Numbers as texts: floats in four digits, but whole where all of them are."""
    numbers = list(values)
    whole = all(value is None or (float(value).is_integer() and abs(value) < 1e15) for value in numbers)
    return ["" if v is None else str(int(v)) if whole or isinstance(v, int) else figure(v) for v in numbers]


def _points(texts: list[str]) -> list[str]:
    """Texts of numbers, padded to the right of their points."""
    tails = [len(text) - len(text.partition(".")[0]) for text in texts]
    return [text + " " * (max(tails) - tail) for text, tail in zip(texts, tails, strict=True)]


def figure(value: float) -> str:
    """A number in four digits, trailing zeros among them; whole from 1000 on."""
    size = abs(value)
    if size == 0:
        return "0"
    if not 1e-4 <= size < 1e7:
        return f"{value:.3e}"
    return f"{value:.0f}" if size >= 1000 else f"{value:#.4g}".rstrip(".")


def _text(cell: object) -> str:
    if isinstance(cell, list | tuple):
        return (" .. " if _floats(cell) else " ").join(map(_text, cell))
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return figure(cell) if isinstance(cell, float) else "" if cell is None else printable(str(cell), keep="")


def _floats(cell: Iterable[object]) -> bool:
    return all(isinstance(value, float) for value in cell)


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
