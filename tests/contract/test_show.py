"""Tables for people: what says which row it is stays whole at every width, and numbers keep their digits."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from virtual_weights.cli import show
from virtual_weights.cli.show import Answer, Table, line
from virtual_weights.record import Axis, Record

EFFECTS = (0.17, -12.3456, 1e-6, 0.0)
ROWS: list[dict[str, Any]] = [
    {
        "writer": f"L1{i}N1234",
        "reader": f"L2{i}N5678.gate",
        "effect_nats": effect,
        "interval": [effect - 0.1, effect * 12],
        "verdict": "not shown",
        "p": 0.05,
        "pattern_change": 0.2 * effect,
        "output_change": effect**3,
        "top_changed": 0.25,
        "label": None,
        "meaning": "incomprehensibilities notwithstanding, what happens",
    }
    for i, effect in enumerate(EFFECTS)
]


def drawn(table: Table, width: int) -> list[str]:
    out = io.StringIO()
    table.show(Console(file=out, width=width))
    return out.getvalue().splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    """What stands below a head of one word, as far as the next head."""
    head = next(i for i, text in enumerate(lines) if name in text.split())
    rule = next(i for i, text in enumerate(lines) if "──" in text)
    start = lines[head].index(name)
    return [text[start:].split("  ")[0].strip() for text in lines[rule + 1 : rule + 1 + len(ROWS)]]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_identity_is_whole_at_every_width(width: int) -> None:
    lines = drawn(Table("edges that were removed one by one, with a title that is long", ROWS), width)
    text = "\n".join(lines)
    assert all(len(part) <= width and part == part.rstrip() for part in lines)
    assert "…" not in text
    for row in ROWS:
        whole = [part for part in lines if row["writer"] in part and row["reader"] in part]
        assert len(whole) == 1
        assert "not shown" in whole[0]
    hidden = [name for name in ROWS[0] if name != "label" and name.split("_")[0] not in text.partition("──")[0]]
    absent = re.search(r"not shown, for lack of room: ([^;]*); a wider\s+terminal or\s+--json", text)
    assert (absent is None) == (hidden == [])
    assert absent is None or absent[1].replace("\n", " ").split(", ") == hidden
    assert "label" not in text, "nothing in it"
    words = {word for part in lines for word in part.split()}
    assert ("incomprehensibilities" in words) == (width == 160)


def test_identity_that_is_wider_than_the_terminal_is_whole() -> None:
    lines = drawn(Table("", ROWS), 20)
    assert any(re.search(r"L10N1234 +L20N5678\.gate +not shown", part) for part in lines)


def test_numbers_stand_at_their_points_with_their_digits() -> None:
    lines = drawn(Table("", [{"x": value, "n": n} for value, n in zip(EFFECTS, (1, 20, 300, 4000), strict=True)]), 60)
    body = [part for part in lines if part and "──" not in part][1:]
    assert [part.split()[0] for part in body] == ["0.1700", "-12.35", "1.000e-06", "0"]
    assert len({part.index(".") for part in body[:3]}) == 1
    assert body[3].index("0") == body[0].index(".") - 1
    assert len({len(part.rstrip()) for part in body}) == 1, "whole numbers end together"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.16, "0.1600"), (1234.5, "1234"), (0.0, "0"), (1e-5, "1.000e-05"), (3e8, "3.000e+08"), (999.96, "1000")],
)
def test_a_figure_has_four_digits(value: float, text: str) -> None:
    assert show.figure(value) == text


@pytest.mark.parametrize("width", [20, 60])
def test_prose_is_broken_between_words_alone(width: int) -> None:
    out, text = (
        io.StringIO(),
        "    because  incomprehensibilities/notwithstanding are what a word longer than a line is",
    )
    line(text, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert " ".join(out.getvalue().split()) == " ".join(text.split())
    assert all(part.startswith(" " * 13) for part in lines[1:])
    assert all(len(part) <= width or len(part.split()) <= 2 for part in lines)


@pytest.mark.parametrize("width", [50, 70, 160])
def test_items_in_a_cell_are_broken_between_items_alone(width: int) -> None:
    items = [f"' {word} and more' 0.{i}234" for i, word in enumerate(("France", "it", "Switzerland", "me"))]
    lines = drawn(Table("", [{"state": i, "tokens": "  ".join(items)} for i in range(2)]), width)
    assert all(sum(item in part for part in lines) == 2 for item in items)
    assert (len(lines) == 5) == (width == 160), "head, rule, two rows and an empty line"


@pytest.mark.parametrize(("variables", "width"), [({"COLUMNS": "70"}, 70), ({}, show.UNLIMITED)])
def test_a_pipe_is_as_wide_as_columns_says(
    variables: Mapping[str, str], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert show.console().width == width


def test_a_table_without_rows_says_none(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record("nothing", (Axis("row", ()),), (), {}, {}, {})
    Answer(record, shown=["before", Table("rows", [], ("writer",))], more=[Answer(record, shown=["after"])]).show()
    assert capsys.readouterr().out == "before\n\nrows\nnone\n\nafter\n"
