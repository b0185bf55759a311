"""The budgets of the house style, on the tail: no module, function or class that one cannot take in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "virtual_weights"
MODULES = sorted(SOURCE.rglob("*.py"))
MODULE_LINES, FUNCTION_LINES, PUBLIC_METHODS = 400, 60, 15
VAGUE = {"utils", "util", "helpers", "common", "misc", "base", "manager"}


def over_budget(text: str) -> Iterator[str]:
    if (lines := text.count("\n")) > MODULE_LINES:
        yield f"module: {lines} lines, budget {MODULE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name}: {lines} lines, budget {FUNCTION_LINES}"
        if isinstance(node, ast.ClassDef):
            public = [f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
            if len(public) > PUBLIC_METHODS:
                yield f"{node.name}: {len(public)} public methods, budget {PUBLIC_METHODS}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_is_within_its_budgets(module: Path):
    assert list(over_budget(module.read_text(encoding="utf-8"))) == []
    assert module.stem not in VAGUE, "name the idea that the module is about"


def test_the_budgets_can_be_exceeded():
    long_function = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
    wide_class = "class C:\n" + "".join(f"    def m{i}(self): ...\n" for i in range(PUBLIC_METHODS + 1))
    assert [found.split(":")[0] for found in over_budget(long_function + wide_class)] == ["f", "C"]
    assert len(list(over_budget("x = 1\n" * (MODULE_LINES + 1)))) == 1
    assert len(MODULES) > 10
