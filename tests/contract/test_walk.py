"""The explorer in a real browser, served and as one file: its questions, its tables, and texts that would be code."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
import walking
from golden.poison import POISONS, Poison, poisoned
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.report.against import against
from virtual_weights.report.documents import documents, write_documents
from virtual_weights.report.format import FOLDER
from virtual_weights.report.page import page
from virtual_weights.survey.plan import Part, Plan, map_model, shown_of

VECTOR = "happy"
POISONED = "<img src=x onerror=document.documentElement.dataset.ran=1>/../é%"
ELSEWHERE = "http://elsewhere.invalid/"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        walking.browser()
        return walking.scripts(tmp_path_factory.mktemp("walk"))
    except walking.Unwalkable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> vw.Atlas:
    """What another model of the same shape composes."""
    path = tmp_path_factory.mktemp("other")
    tiny("llama-grouped-untied", seed=1).save_pretrained(path / "model")
    return map_model(vw.open(path / "model"), path / "atlas", plan=Plan((Part.composition,)), name="other")


@pytest.fixture(scope="module")
def atlas(scripts: Path, tmp_path_factory: pytest.TempPathFactory, other: vw.Atlas) -> vw.Atlas:
    path = tmp_path_factory.mktemp("walked")
    tiny("llama-grouped-untied").save_pretrained(path / "model")
    stream = vw.open(path / "model")
    run = vw.Run.on_repeats(stream, 64, 16)
    parts = Part.composition, Part.bandwidth, Part.memory, Part.superposition, Part.basis, Part.statements
    atlas = map_model(stream, path / "atlas", plan=Plan(parts, edges=4), run=run, name="tiny")
    direction = vw.Vector(torch.arange(1.0, 25.0).double(), VECTOR)
    vw.Survey(stream, atlas).answers([vw.VectorReaders(direction, "L1", 5), vw.VectorWriters(direction, "L1", 5)])
    vw.report(atlas, against=other)
    return atlas


def test_five_questions_by_three_steps_each(scripts: Path, atlas: vw.Atlas) -> None:
    heads = walking.heads_of(atlas)
    with walking.served(atlas.path) as address:
        targets = walking.targets(atlas.path, address)
        edge = walking.stored_pair(atlas)
        answer = walking.walk(scripts / "walk.mjs", targets=targets, edge=edge, vector=VECTOR, heads=heads)
    assert answer["failures"] == []
    assert walking.check_tables(atlas, answer["tables"], heads) > 500


def _ends(block: dict[str, Any]) -> list[list[Any]]:
    return [token for tokens in block["ends"].values() for token in tokens]


def poisoned_documents(atlas: vw.Atlas, other: vw.Atlas, intact: bool) -> tuple[dict[str, Any], list[str]]:
    """Documents with a poison in every text, and those of the texts that some page must show."""
    answers = shown_of(atlas)
    shown = documents(answers, atlas.manifest, against(answers, atlas.manifest, other))
    nearest = [
        near for content in shown.values() for block in content.get("channel_tokens", []) for near in _ends(block)
    ]
    for i, token in enumerate(nearest):
        token[0] = f"token {i}"
    for table in (table for content in shown.values() for table in content.get("edge_tokens", [])):
        column = next(column for column in table["columns"] if column["name"] == "text")
        column["values"] = [f"word {i}" for i in range(len(column["values"]))]
    labels = {part["label"] for part in shown["map"]["parts"]} | {part["group"] for part in shown["map"]["parts"]}
    poison = Poison(cycle(poisoned(ELSEWHERE)), labels if intact else ())
    result = poison.into(shown)
    result["map"]["vectors"] = {POISONED: "vector-0"}
    result["vector-0"]["name"] = POISONED
    titles = [row["title"] for row in shown["statements"]["rows"]]
    texts = [shown["map"]["model"], shown["map"]["run"]["text"], shown["map"]["against"]["model"], *titles]
    if intact:  # else no page has the pair
        texts += [f"token {i}" for i in range(len(POISONS))]
    return result, [POISONED, *(poison.known[text] for text in texts)]


def test_no_text_becomes_code(scripts: Path, atlas: vw.Atlas, other: vw.Atlas, tmp_path: Path) -> None:
    """With poison behind every text but the labels of parts, so that all pages are there; then behind these too."""
    assert len(POISONS) >= 44
    targets = list[dict[str, Any]]()
    with ExitStack() as servers:
        for intact in (True, False):
            folder = tmp_path / f"labels intact {intact}"
            folder.mkdir()
            contents, texts = poisoned_documents(atlas, other, intact)
            (folder / "report.html").write_text(page(contents), encoding="utf-8")
            write_documents(folder / FOLDER, contents)
            address = servers.enter_context(walking.served(folder))
            targets += [{**target, "texts": texts} for target in walking.targets(folder, address)]
        writer, reader, port = walking.stored_pair(atlas)
        pages = [f"#/head/{reader}", f"#/pair/{writer}/{reader}.{port}", f"#/vector/{quote(POISONED)}"]
        answer = walking.walk(scripts / "poisoned.mjs", targets=targets, pages=pages)
    assert answer["failures"] == []
    assert answer["pages"] == 4 * (6 + len(pages))


def test_what_becomes_code_is_seen(scripts: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    bad = "".join(poisoned(ELSEWHERE)[n] for n in (0, 9))
    links = '<header><nav><a href="#/map">Map</a></nav></header>'
    file.write_text(f"<html><body>{links}<div id=content><main>{bad}</main></div></body></html>")
    targets = [{"name": "page", "address": file.as_uri(), "texts": ["what is nowhere"]}]
    said = "\n".join(walking.walk(scripts / "poisoned.mjs", targets=targets, pages=[])["failures"])
    for words in (
        "poison 0 ran",
        f"request: {ELSEWHERE}0",
        f"request: {ELSEWHERE}9",
        "not ours",
        "shows what is nowhere",
    ):
        assert words in said, words
