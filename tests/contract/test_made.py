"""A model that is made on demand: small here, by the same code as the built-in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import virtual_weights as vw
from virtual_weights.checkpoint import catalog, is_cached, locate
from virtual_weights.checkpoint.making import Recipe, make
from virtual_weights.cli import run

SMALL = Recipe(vocabulary=260, width=16, heads=2, length=12, batch=4, steps=3)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    entry = catalog.Made("small", "for tests", "none", SMALL)
    monkeypatch.setattr(catalog, "_BUILT_IN", (entry,))
    monkeypatch.setattr("virtual_weights.checkpoint.making._text", lambda: "one two three four five six seven " * 20)
    monkeypatch.setenv("VWEIGHTS_CACHE", str(tmp_path / "cache"))
    return entry.name


def test_it_is_made_once_and_stays(small: str) -> None:
    assert not is_cached(small)
    steps: list[tuple[float, float]] = []
    folder = locate(small, offline=True, progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert locate(small, progress=lambda *step: steps.append(step)) == folder
    assert len(steps) == 3
    assert is_cached(small)
    assert [path.name for path in folder.parent.iterdir()] == [SMALL.identity]


def test_it_opens_by_its_name_and_runs_on_text_with_its_own_tokenizer(small: str) -> None:
    stream = vw.open(small)
    assert (stream.source.reference, len(stream.heads)) == (small, 4)
    measured = vw.Run.on_text(stream, tokens=24)
    assert measured.runner.exactness_error < 1e-5
    assert stream.source.tokenizer().decode([stream.source.tokenizer().encode("six").ids[0]]).strip()  # type: ignore[union-attr]


def test_fetching_it_says_how_it_was_made(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "fetch", small, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["summary"]["made"]
    assert (made["steps"], made["torch"]) == (3, torch.__version__)
    assert 0 < made["loss_on_text"] < 10


@pytest.mark.usefixtures("small")
def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    contents = set[bytes]()
    for name in "ab":
        make(tmp_path / name, SMALL)
        contents.add((tmp_path / name / "model.safetensors").read_bytes())
    make(tmp_path / "c", Recipe(**{**SMALL.__dict__, "seed": 1}))
    assert len(contents) == 1
    assert (tmp_path / "c" / "model.safetensors").read_bytes() not in contents
