"""What an atlas holds, what is unfinished, whether anybody is at work on it, and whether it is what was written."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_stored import make_atlas, make_moments

import virtual_weights as vw
from virtual_weights.atlas.blocks import BlockStore, at_work
from virtual_weights.cli import run
from virtual_weights.errors import RecordError

KEY = "ab" * 32


@pytest.fixture
def atlas(tmp_path: Path) -> vw.Atlas:
    make_atlas(tmp_path / "atlas", 0)
    make_moments(tmp_path, 0)
    (tmp_path / "moments.safetensors").rename(tmp_path / "atlas" / "moments-0.safetensors")
    return vw.Atlas.open(tmp_path / "atlas")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_records_are_counted_by_question(atlas: vw.Atlas):
    found = vw.status(atlas)
    assert [row["question"] for row in found.records] == ["ablation", "composition", "labels"]
    _, composition, labels = found.records
    folder = atlas.path / "records" / atlas.keys("composition")[0]
    assert composition == {
        "question": "composition", "records": 1, "edges": 24, "bytes": size(folder), "seconds": 1.5
    }  # fmt: skip
    assert labels["edges"] is None
    assert (found.unfinished, found.at_work, found.checked, found.faults) == ((), None, None, ())


def begin(atlas: vw.Atlas, *names: str, answers: tuple[str, ...] = (KEY,)) -> Path:
    """Some finished blocks of an overlap of nine."""
    store = BlockStore(atlas.path / "blocks")
    store.begin(KEY, vw.Overlap("K"), [str(i) for i in range(9)], answers)
    for name in names:
        store.put(KEY, name, {"x": torch.ones(2)})
    return store.folder / KEY


def test_what_is_unfinished_is_counted_block_by_block(atlas: vw.Atlas):
    folder = begin(atlas, "3", "8")
    (folder / ".tmp-c").write_bytes(b"12345")
    (atlas.path / "blocks" / "not a key").mkdir()
    (row,) = vw.status(atlas).unfinished
    about = {"question": "overlap", "parameters": vw.Overlap("K").parameters, "blocks": 9}
    assert row == {**about, "done": 2, "bytes": size(folder), "key": KEY}


@pytest.mark.parametrize("text", ["", "[]", '{"question": 1, "blocks": 3, "answers": {}}', "[" * 100_000])
def test_unfinished_work_of_which_nobody_says_what_it_is_is_listed(atlas: vw.Atlas, text: str):
    (atlas.path / "blocks" / KEY).mkdir(parents=True)
    (atlas.path / "blocks" / KEY / "question.json").write_text(text)
    (row,) = vw.status(atlas).unfinished
    assert (row["question"], row["parameters"], row["blocks"], row["done"]) == (None, None, None, 0)
    assert run(["status", str(atlas.path)]) == 0


def test_blocks_of_answers_that_are_there_and_blocks_elsewhere_do_not_count(atlas: vw.Atlas, tmp_path: Path):
    keys = atlas.keys()
    begin(atlas, answers=keys[:2])
    assert vw.status(atlas).unfinished == ()
    begin(atlas, answers=(*keys[:2], KEY))
    assert len(vw.status(atlas).unfinished) == 1
    (atlas.path / "blocks").rename(tmp_path / "away")
    (atlas.path / "blocks").symlink_to(tmp_path / "away")
    assert vw.status(atlas).unfinished == ()


def test_who_is_at_work_is_seen_by_the_lock(atlas: vw.Atlas, capsys: pytest.CaptureFixture[str]):
    assert vw.status(atlas).at_work is None
    with at_work(atlas.path, pytest.fail):
        for _ in range(2):  # asking takes no lock away
            assert f"process {os.getpid()} on " in str(vw.status(atlas).at_work)
        assert run(["status", str(atlas.path)]) == 0
        assert "is at work on it" in capsys.readouterr().out
    assert vw.status(atlas).at_work is None


def test_a_sound_atlas_has_no_faults(atlas: vw.Atlas):
    found = vw.status(atlas, check=True)
    assert found.faults == ()
    files = [path for path in atlas.path.rglob("*") if path.is_file() and path.name != "ledger.sqlite"]
    assert found.checked == len(files)


def flip(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def change_ledger(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE tasks SET seconds = 9")
    database.close()


FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a column": ("records/*/arrays.safetensors", flip),
    "a table": ("records/*/table.parquet", flip),
    "edges": ("records/*/edges-00000.parquet", Path.unlink),
    "a header": ("records/*/record.json", flip),
    "moments": ("moments-0.safetensors", flip),
    "the ledger": ("ledger.sqlite", change_ledger),
    "no database": ("ledger.sqlite", lambda path: path.write_text("x" * 9999)),
}


@pytest.mark.parametrize(("pattern", "change"), FAULTS.values(), ids=list(FAULTS))
def test_every_changed_file_is_a_fault(
    atlas: vw.Atlas, pattern: str, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
):
    path = min(atlas.path.glob(pattern))
    change(path)
    (fault,) = vw.status(atlas, check=True).faults
    assert path.name in fault or path.parent.name[:12] in fault
    assert run(["status", str(atlas.path), "--check"]) == 1
    assert "1 faults" in capsys.readouterr().out
    assert run(["status", str(atlas.path), "--check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["summary"]["faults"] == [fault]


def test_without_a_check_a_ledger_that_cannot_be_used_is_an_error(atlas: vw.Atlas):
    change_ledger(atlas.path / "ledger.sqlite")
    with pytest.raises(RecordError, match="entry was changed"):
        vw.status(atlas)


def test_people_see_a_table(atlas: vw.Atlas, capsys: pytest.CaptureFixture[str]):
    begin(atlas, "1")
    assert run(["status", str(atlas.path)]) == 0
    out = capsys.readouterr().out
    assert "3 records" in out
    assert re.search(r"overlap +port=K.* 1 +9 ", out)
    assert "nobody is at work" in out
