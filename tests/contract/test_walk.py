"""The explorer in a real browser, served and as one file: its questions, its tables, and texts that would be code."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import walking
from golden.poison import POISONS, Poison, poisoned
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.report.documents import documents, write_documents
from virtual_weights.report.format import FOLDER
from virtual_weights.report.page import page
from virtual_weights.survey.plan import Part, Plan, map_model, shown_of

ELSEWHERE = "http://elsewhere.invalid/"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        walking.browser()
        return walking.scripts(tmp_path_factory.mktemp("walk"))
    except walking.Unwalkable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def atlas(scripts: Path, tmp_path_factory: pytest.TempPathFactory) -> vw.Atlas:
    path = tmp_path_factory.mktemp("walked")
    tiny("llama-grouped-untied").save_pretrained(path / "model")
    stream = vw.open(path / "model")
    run = vw.Run.on_repeats(stream, 64, 16)
    map_model(stream, path / "atlas", plan=Plan((Part.composition, Part.statements), edges=4), run=run)
    atlas = vw.Atlas.open(path / "atlas")
    vw.report(atlas)
    return atlas


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


def test_five_questions_by_three_steps_each(scripts: Path, atlas: vw.Atlas) -> None:
    heads = heads_of(atlas)
    with walking.served(atlas.path) as address:
        targets = [
            {"name": "report", "address": (atlas.path / "report.html").as_uri()},
            {"name": "server", "address": address},
        ]
        answer = walking.walk(scripts / "walk.mjs", targets=targets, edge=stored_pair(atlas), heads=heads, axe=True)
    assert answer["failures"] == []
    assert check_tables(atlas, answer["tables"], heads) > 500


def poisoned_documents(atlas: vw.Atlas, intact: bool) -> tuple[dict[str, Any], list[str]]:
    """Documents with a poison in every text, and those of the texts that some page must show."""
    shown = documents(shown_of(atlas), atlas.manifest)
    carried = [content for content in shown.values() if "channel_tokens" in content]
    for content in carried:
        column = next(one for one in content["channel_tokens"]["columns"] if one["name"] == "text")
        column["values"] = [f"token {i}" for i in range(len(column["values"]))]
    labels = {part["label"] for part in shown["map"]["parts"]} | {part["group"] for part in shown["map"]["parts"]}
    words = {"written", "read", "source", "target"}
    poison = Poison(cycle(poisoned(ELSEWHERE)), labels | words if intact else ())
    result = poison.into(shown)
    texts = [shown["map"]["model"], shown["map"]["run"]["text"], *(row["title"] for row in shown["statements"]["rows"])]
    if intact:
        texts += column["values"]
    return result, [poison.known[text] for text in texts]


@pytest.fixture(params=[True, False], ids=["labels are labels", "labels too"])
def hostile(atlas: vw.Atlas, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Any]]:
    contents, texts = poisoned_documents(atlas, request.param)
    (tmp_path / "report.html").write_text(page(contents), encoding="utf-8")
    write_documents(tmp_path / FOLDER, contents)
    writer, reader, port = stored_pair(atlas)
    pages = [f"#/head/{reader}", f"#/pair/{writer}/{reader}.{port}"]
    with walking.served(tmp_path) as address:
        targets = [
            {"name": "report", "address": (tmp_path / "report.html").as_uri()},
            {"name": "server", "address": address},
        ]
        yield {"targets": targets, "pages": pages, "texts": texts}


def test_no_text_becomes_code(scripts: Path, hostile: dict[str, Any]) -> None:
    assert len(POISONS) >= 44
    answer = walking.walk(scripts / "poisoned.mjs", **hostile)
    assert answer["failures"] == []
    assert answer["missing"] == []
    assert answer["pages"] >= 12


def test_what_becomes_code_is_seen(scripts: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    bad = "".join(poisoned(ELSEWHERE)[n] for n in (0, 9))
    links = '<header><nav><a href="#/map">Map</a></nav></header>'
    file.write_text(f"<html><body>{links}<div id=content><main>{bad}</main></div></body></html>")
    targets = [{"name": "page", "address": file.as_uri()}]
    answer = walking.walk(scripts / "poisoned.mjs", targets=targets, pages=[], texts=["what is nowhere"])
    said = "\n".join(answer["failures"])
    assert all(
        words in said for words in ("poison 0 ran", f"request: {ELSEWHERE}0", f"request: {ELSEWHERE}9", "not ours")
    )
    assert answer["missing"] == ["what is nowhere"]
