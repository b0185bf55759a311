"""Relative links of the pages lead somewhere, and every command line that they show is one that the command takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.core

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`(vweights [^`]+)`")


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links whose file or anchor is not there, or is outside the repository."""
    broken = []
    for link in _LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = target.is_relative_to(ROOT) and target.exists()
        there = text if target == page else target.read_text(encoding="utf-8") if inside and anchor else ""
        if not inside or (anchor and anchor not in anchors(there)):
            broken.append(link)
    return broken


def command_lines(text: str) -> list[str]:
    """Every ``vweights ...`` of a page, in shell blocks and between backticks."""
    shell = "\n".join(body for kind, body in _FENCE.findall(text) if kind in ("sh", "console", "bash"))
    lines = [line.strip().removeprefix("$ ") for line in shell.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("vweights ")] + _INLINE.findall(prose(text))


def parse(line: str) -> None:
    """Let typer parse a command line without running it; it raises on an unknown verb, option or value."""
    from virtual_weights.cli.app import app

    command: Any = typer.main.get_command(app)
    arguments = shlex.split(line, comments=True)[1:]
    while arguments and isinstance(command, typer.core.TyperGroup):
        assert arguments[0] in command.commands, f"there is no verb {arguments[0]!r}"
        command = command.commands[arguments.pop(0)]
    if arguments not in (["--help"], ["-h"]):  # help prints and leaves
        command.make_context(line, arguments)


VERBS = (
    "map",
    "plan",
    "edges",
    "status",
    "export",
    "serve",
    "composition",
    "channel",
    "neurons",
    "subspaces",
    "vector",
    "report",
    "features",
    "train",
    "bandwidth",
    "superposition",
    "memory",
    "frontier",
    "persistence",
    "erased",
    "basis",
    "rotate",
    "linear",
    "paths",
    "statements",
    "trace",
    "labels",
    "graph",
    "observe",
    "validate",
    "ablate",
    "attribute",
    "check",
    "model",
)


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", NAMES)
def test_command_lines_are_what_the_command_takes(name: str) -> None:
    for line in command_lines((ROOT / name).read_text(encoding="utf-8")):
        parse(line)


def test_command_lines_are_found() -> None:
    shown = command_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {shlex.split(line)[1] for line in shown} == {*VERBS}


@pytest.mark.parametrize(
    "line",
    [
        "vweights maps smollm2-135m",
        "vweights composition smollm2-135m --ports K",
        "vweights composition smollm2-135m --port O",
        "vweights composition smollm2-135m --top many",
        "vweights paths smollm2-135m L16H0",
        "vweights model find smollm2-135m",
    ],
)
def test_a_wrong_command_line_would_be_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no verb|no such option|not one of|valid integer|missing"):
        parse(line)


def test_a_wrong_link_would_be_noticed() -> None:
    text = "# One\n[a](no-such-page.md) [b](#one) [c](#two) [d](https://example.org) [e](../../outside)\n"
    assert broken_links(ROOT / "README.md", text) == ["no-such-page.md", "#two", "../../outside"]


def test_every_page_is_in_the_index_once() -> None:
    links = _LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert len(links) == len(set(links))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    folders = {"statements/index.md", "decisions"}  # these list the pages in them
    assert pages | folders | {f"notebooks/{path.name}" for path in (ROOT / "docs").rglob("*.ipynb")} <= set(links)


@pytest.mark.real
def test_the_edges_of_the_readme_are_those_of_the_model() -> None:
    import virtual_weights as vw

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    row = r"^(L\d+H\d+) +(L\d+H\d+)\.K +([\d.]+) +[\d.]+ +([\d.]+)(?: +[-\d.]+)+ +(L\S+)$"
    shown = re.findall(row, text, re.MULTILINE)
    rows = vw.Composition(port="K")(vw.open("smollm2-135m")).top(5).rows()
    edges = [(r["writer"], r["reader"], r["score"], r["null_ratio"], r["reader_group"]) for r in rows]
    assert shown == [(w, r.removesuffix(".K"), f"{score:.4f}", f"{ratio:.3f}", g) for w, r, score, ratio, g in edges]


@pytest.mark.real
def test_the_figures_of_the_composition_page_are_those_of_the_model() -> None:
    import virtual_weights as vw

    text = " ".join((ROOT / "docs" / "composition.md").read_text(encoding="utf-8").split())
    stream = vw.open("smollm2-135m")
    z = vw.Composition(port="K")(stream)["z"]
    assert isinstance(z, torch.Tensor)
    z = z[~z.isnan()]
    assert f"{100 * float((z > 3).double().mean()):.0f} % of the {len(z):,} pairs have `z > 3`" in text
    ratios = []
    for group in stream.groups.heads:
        q, k = (stream.read(port, group).maps.double() for port in ("Q", "K"))
        k = k.repeat_interleave(group.sharing, 0)
        square = ((q @ q.mT) * (k @ k.mT)).sum((1, 2))
        ratios.append(torch.linalg.matrix_norm(q) * torch.linalg.matrix_norm(k) / square.sqrt())
    assert f"at most {float(torch.cat(ratios).max()):.1f} over the heads" in text
