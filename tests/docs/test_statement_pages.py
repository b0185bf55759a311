"""Every statement has a page whose Python shows what it says, and whose sections are where a reader looks for them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from pages import run_blocks

from virtual_weights.statements import STATEMENTS, Statement

ROOT = Path(__file__).parents[2]
SECTIONS = ["As stated", "What is true", "On a model", "References"]

# One premise of each page and its negation, under which the checks of the page must not hold.
FLIPS = {
    "L1": ("turn = torch.linalg.qr(random(d, d)).Q", "turn = random(d, d)"),  # not orthogonal
    "L2": ("d = 12", "d = 15"),  # room for all five
    "L3": ("y = x + t1 @ x\ny = y + t2 @ y", "y = x + t2 @ x\ny = y + t1 @ y"),  # the other order
    "L4": ("hidden = torch.linalg.svd(value).Vh[k:].T", "hidden = torch.linalg.svd(out.T).Vh[k:].T"),  # of the write
    "L5": ("copy = basis @ basis.T", "copy = out_j @ read_j"),  # a head that does not copy
    "L6": ("symmetric = v + v.T", "symmetric = v"),  # not normal
    "L7": ("e[:, [0, 2]]", "e[:, [2, 3]]"),  # direct with the first
    "L8": ("d, k = 20, 4", "d, k = 20, 1"),  # lines, of which the bound is a proportion
    "L9": (
        "[:4]\n    recovered += pursue(random(4) @ both[active], 4)",
        "[:24]\n    recovered += pursue(random(24) @ both[active], 24)",
    ),
    "L10": ("(positive @ gram)", "(signs @ gram)"),  # no common mean
    "L11": ("out = -gain * w / w.square().sum()", "out = -gain * w / w.norm()"),  # same direction, other gain
    "L12": ("best[price] = (utility < price", "best[price] = (utility > price"),  # keeps what it should erase
    "T1": ("composed = (eye + second) @ (eye + first)", "composed = second @ first"),  # without the stream
    "T2": ("unseen = torch.linalg.svd(read).Vh[6:].T", "unseen = torch.linalg.svd(read).Vh[:2].T"),  # seen
    "T3": ("apart = read - written @ (written.T @ read)", "apart = read"),  # not orthogonal
    "T4": ("min(4 * layer, 4 * (50 - layer))", "min(8 * layer, 8 * (50 - layer))"),  # twice the width
    "T5": ("% 2 == 0]", "< 8]"),  # both cosets: more lines, closer than eps
    "T6": ("best = torch.linalg.pinv(read)", "best = 2 * torch.linalg.pinv(read)"),  # reflects
    "T7": ("gate(z @ x) * (u @ x)", "(u @ x)"),  # no gate
    "C1": ("projector = write @ torch.linalg.pinv(write)", "projector = 0 * eye"),  # layers that take it up
    "C2": ("null(reads.flatten(0, 1))[0]", "null(reads[0])[0]"),  # unread by the first only
    "C3": ("noisy, weak = signal(5.0) + noise", "noisy, weak = signal(0.2) + noise"),  # below the noise
    "C4": ("(3, 5, 8)", "(3, 5, 9)"),  # more than d
    "C5": ("q_o @ (q_o.T @ q_r)", "0 * q_o @ (q_o.T @ q_r)"),  # left as it was
    "C6": ("torch.linalg.qr(directions(d)).Q", "directions(d)"),  # not orthogonal
}


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.id)
def test_what_the_page_says_is_so(statement: Statement) -> None:
    page = ROOT / statement.page
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {statement.id}: {statement.title}\n")
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [name for name in SECTIONS if name in sections] == SECTIONS
    assert f"--only {statement.id}" in text
    assert run_blocks(page) >= 1
    checks = (ROOT / "tests" / "docs" / "checks" / f"{statement.id}.py").read_text(encoding="utf-8")
    claims = sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(checks)))
    assert claims + checks.count("assert_close") >= 3


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.id)
def test_the_page_fails_without_its_premise(statement: Statement) -> None:
    page, (premise, negation) = ROOT / statement.page, FLIPS[statement.id]
    text = page.read_text(encoding="utf-8")
    assert text.count(premise) == 1
    with pytest.raises(AssertionError):
        run_blocks(page, text.replace(premise, negation), outputs=False)


def test_the_index_has_them_all() -> None:
    text = (ROOT / "docs" / "statements" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| ([^|]+) \|", text, re.MULTILINE)
    assert rows == [(s.id, s.id, s.title) for s in STATEMENTS]


def test_no_page_is_without_a_statement() -> None:
    pages = {page.stem for page in (ROOT / "docs" / "statements").glob("[LTC]*.md")}
    assert pages == {s.id for s in STATEMENTS}
