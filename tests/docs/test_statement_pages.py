"""Every statement has a page whose Python proves what it says, and whose sections are where a reader looks for them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pages import run_blocks

from virtual_weights.statements import STATEMENTS

ROOT = Path(__file__).parents[2]
SECTIONS = ["As stated", "What is true", "On a model", "References"]


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.id)
def test_what_the_page_says_is_so(statement: object) -> None:
    page = ROOT / statement.page
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {statement.id}: {statement.title}\n")
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [name for name in SECTIONS if name in sections] == SECTIONS
    assert f"--only {statement.id}" in text
    assert run_blocks(page) >= 1
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    claims = sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code)))
    assert claims + code.count("assert_close") >= 3


def test_the_index_has_them_all() -> None:
    text = (ROOT / "docs" / "statements" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| ([^|]+) \|", text, re.MULTILINE)
    assert rows == [(s.id, s.id, s.title) for s in STATEMENTS]
