"""Scripts of ``explorer/walk`` in a real browser, and what they walk through: a report, and a server of its own."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import virtual_weights as vw
from virtual_weights.report.format import FOLDER

EXPLORER = Path(__file__).parents[1] / "explorer"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Unwalkable(Exception):
    """What walking needs is not on this machine; the message says what."""


def browser() -> str:
    """The program of the system's browser.

    Raises:
        Unwalkable: there is none.
    """
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise Unwalkable(f"there is no browser here, none of {', '.join(BROWSERS)}")
    return program


def scripts(scratch: Path) -> Path:
    """The folder of the scripts, beside the packages that they need: in a copy, where these are not installed yet.

    Raises:
        Unwalkable: there is no node or npm, no folder ``explorer``, or npm cannot fetch the packages.
    """
    if shutil.which("node") is None or shutil.which("npm") is None or not EXPLORER.is_dir():
        raise Unwalkable("there is no node, no npm or no folder explorer")
    if all((EXPLORER / "node_modules" / name).is_dir() for name in ("playwright-core", "axe-core")):
        return EXPLORER / "walk"
    copy = scratch / "explorer"
    copy.mkdir()
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(EXPLORER / name, copy)
    shutil.copytree(EXPLORER / "walk", copy / "walk")
    done = subprocess.run(["npm", "ci"], cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise Unwalkable(f"npm could not fetch the packages of the walk: {done.stderr[-200:]}")
    return copy / "walk"


def walk(script: Path, **wanted: Any) -> dict[str, Any]:
    """What a script answers.

    Args:
        script: the file.
        wanted: what it takes, see its head; the browser is added.
    """
    done = subprocess.run(
        ["node", script],
        input=json.dumps({"browser": browser(), **wanted}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


@contextmanager
def served(atlas: Path) -> Iterator[str]:
    """The address, good for one browser, of ``vweights serve`` on an atlas."""
    line = [sys.executable, "-c", "from virtual_weights.cli import main; main()", "serve", str(atlas), "--no-browser"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]+", address), address
            yield address
        finally:
            process.kill()


def targets(folder: Path, address: str) -> list[dict[str, str]]:
    """What is walked through: the report in a folder, and a server."""
    addresses = {"report": (folder / "report.html").as_uri(), "server": address}
    return [{"name": name, "address": address} for name, address in addresses.items()]


def stored_pair(atlas: vw.Atlas) -> list[str]:
    """Writer, reader and port of the first pair of which is stored what it carries."""
    stored = json.loads((atlas.path / FOLDER / "map.json").read_text())["stored"]
    writer, _, target = next(name for name in stored if "/" in name).partition("/")
    return [writer, *target.split(".")]


def heads_of(atlas: vw.Atlas) -> list[str]:
    return [str(part["label"]) for part in atlas.manifest["components"] if part["kind"] == "head"]


def check_tables(atlas: vw.Atlas, tables: dict[str, str], heads: list[str]) -> int:
    """Compare the tables of heads with what ``vw.edges`` answers, edge by edge, and count the edges."""
    edges = 0
    for head in heads:
        for port in "QKV":
            for other, side, ask in (
                ("writer", "writers", {"reader": f"{head}.{port}"}),
                ("reader", "readers", {"writer": head}),
            ):
                expected = vw.edges(atlas, **ask, top=1 << 20, where={"port": port})
                scores = {str(edge[other]).removesuffix(f".{port}"): edge["score"] for edge in expected}
                name = f"{head}-{port}-{side}"
                rows = {row[other]: row["score"] for row in csv.DictReader(tables.get(name, "").splitlines())}
                assert rows.keys() == scores.keys(), name
                for label, score in scores.items():
                    half = np.float16(np.nan if score is None else score)
                    assert np.array_equal(np.float16(rows[label] or "nan"), half, equal_nan=True), (name, label)
                edges += len(rows)
    return edges
