"""What is stored is found without reading the rest; its ledger may be lost, out of date, locked away or forged."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from virtual_weights.atlas import Atlas, edges
from virtual_weights.errors import RecordError
from virtual_weights.record import Axis, Column, Record
from virtual_weights.survey.plan import shown_of

MANIFEST = {"fingerprint": "f00d"}


def pairs(port: str = "K", size: int = 2) -> Record:
    axes = (
        Axis("reader", tuple(f"L1H{i}" for i in range(size))),
        Axis("writer", tuple(f"L0H{i}" for i in range(size))),
    )
    return Record("composition", axes, (Column("score", torch.rand(size, size)),), {"port": port})


def other(n: int) -> Record:
    return Record("channel", (Axis("direction", ("1", "2")),), (Column("gain", torch.ones(2)),), {"n": n})


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    """Pairs of two ports among records of another question, whose headers cannot be read any more."""
    atlas = Atlas.create(tmp_path / "atlas", MANIFEST)
    atlas.put(pairs("Q"))
    unrelated = [atlas.put(other(n)) for n in range(5)]
    atlas.put(pairs("K"))
    for key in unrelated:
        break_header(atlas, key)
    return atlas


def break_header(atlas: Atlas, key: str) -> None:
    (atlas.path / "records" / key / "record.json").write_text("broken")


def ports(atlas: Atlas) -> list[Any]:
    return [atlas.header(key).parameters["port"] for key in atlas.keys("composition")]


def test_a_query_reads_only_headers_of_records_that_fit(atlas: Atlas):
    assert ports(atlas) == ["Q", "K"], "oldest first"
    assert len(atlas.keys()) == 7
    assert len(atlas.keys("channel", n=3)) == 1
    found = atlas.find("composition", port="Q")
    assert found is not None
    assert found.parameters["port"] == "Q"
    assert {row["port"] for row in edges(atlas, "L1H0")} == {"Q", "K"}
    with pytest.raises(RecordError, match=r"record\.json cannot be used"):
        atlas.find("channel", n=3)


def test_what_a_report_shows_is_chosen_without_reading_the_rest(tmp_path: Path):
    atlas = Atlas.create(tmp_path, MANIFEST)
    key = atlas.put(Record("pairs nobody draws", (), (Column("x", torch.ones(())),)))
    atlas.put(pairs("K", 3))
    atlas.put(Record(**{**vars(pairs("K", 2)), "stamp": {"norm": "left out"}}))  # newer, and covers less
    break_header(atlas, key)
    assert [len(record.axes[0].labels) for record in shown_of(atlas)] == [3]


def test_a_record_that_the_ledger_does_not_know_is_found_and_then_known(atlas: Atlas, tmp_path: Path):
    elsewhere = Atlas.create(tmp_path / "elsewhere", MANIFEST)
    key = elsewhere.put(pairs("V"))
    shutil.copytree(elsewhere.path / "records" / key, atlas.path / "records" / key)
    assert ports(atlas) == ["Q", "K", "V"]
    break_header(atlas, key)
    assert len(atlas.keys("composition")) == 3, "it is in the index now"
    shutil.rmtree(atlas.path / "records" / key)
    assert ports(atlas) == ["Q", "K"]
    assert atlas.find("composition", port="V") is None


def test_a_lost_ledger_is_made_again(tmp_path: Path):
    atlas = Atlas.create(tmp_path, MANIFEST)
    keys = [atlas.put(pairs("K")), atlas.put(other(1)), atlas.put(pairs("Q"))]
    (tmp_path / "ledger.sqlite").unlink()
    assert list(Atlas.open(tmp_path).keys()) == keys
    assert (tmp_path / "ledger.sqlite").exists()
    break_header(atlas, keys[1])
    assert ports(atlas) == ["K", "Q"]
    assert atlas.ledger() == []


def test_a_record_put_again_after_its_folder_was_removed_is_the_newest(atlas: Atlas):
    (first, _) = atlas.keys("composition")
    shutil.rmtree(atlas.path / "records" / first)
    assert atlas.put(pairs("Q")) == first
    assert ports(atlas) == ["K", "Q"]


@pytest.mark.parametrize("code", [sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR])
def test_where_the_ledger_cannot_be_used_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    atlas = Atlas.create(tmp_path, MANIFEST)
    keys = [atlas.put(pairs("K")), atlas.put(other(1))]

    def refuse(*_: object, **__: object) -> None:
        error = sqlite3.OperationalError("refused by the system")
        error.sqlite_errorcode = code
        raise error

    monkeypatch.setattr("sqlite3.connect", refuse)
    assert list(atlas.keys()) == keys
    assert edges(atlas, "L1H0", top=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path):
    atlas = Atlas.create(tmp_path / "atlas", MANIFEST)
    key = atlas.put(pairs("K"))
    (atlas.path / "ledger.sqlite").unlink()
    for folder in (atlas.path, atlas.path / "records"):
        folder.chmod(0o555)
    try:
        assert Atlas.open(atlas.path).keys("composition") == (key,)
    finally:
        atlas.path.chmod(0o755)


# -- forged


def forge(atlas: Atlas, change: Callable[[list[Any]], None], sealed: bool = True) -> None:
    """Change the entry of the first pairs, with a checksum that is right again or not."""
    with closing(sqlite3.connect(atlas.path / "ledger.sqlite")) as database, database:
        row = list(database.execute("SELECT * FROM records WHERE question = 'composition'").fetchone())
        database.execute("DELETE FROM records WHERE key = ?", (row[0],))
        *values, checksum = row
        change(values)
        checksum = hashlib.sha256(repr(tuple(values)).encode()).hexdigest() if sealed else checksum
        database.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, checksum))


def put(place: int, value: Any) -> Callable[[list[Any]], None]:
    return lambda values: values.__setitem__(place, value)


def test_a_changed_entry_of_the_index_is_refused(atlas: Atlas):
    forge(atlas, put(2, '{"port": "V"}'), sealed=False)
    with pytest.raises(RecordError, match="entry was changed") as caught:
        atlas.keys("composition")
    assert "no result is lost" in caught.value.do


@pytest.mark.parametrize(
    "parameters", ['{"port":"V"}', "[]", "1", "{", "[" * 100_000, b"\xff"], ids=lambda v: repr(v)[:9]
)
def test_an_entry_that_is_not_what_its_record_says_is_refused(atlas: Atlas, parameters: Any):
    forge(atlas, put(2, parameters))
    with pytest.raises(RecordError, match="ledger"):
        edges(atlas, "L1H0")


def test_an_entry_of_another_question_is_refused_when_its_record_is_used(atlas: Atlas):
    forge(atlas, put(1, "overlap"))
    for use in (lambda: edges(atlas, question="overlap"), lambda: atlas.find("overlap")):
        with pytest.raises(RecordError, match="not what the ledger says") as caught:
            use()
        assert "ledger.sqlite" in caught.value.do


@pytest.mark.parametrize("key", ["../../elsewhere", "0" * 64, "", None])
def test_an_entry_without_a_folder_leads_nowhere(atlas: Atlas, tmp_path: Path, key: Any):
    shutil.copytree(atlas.path / "records" / atlas.keys("composition")[0], tmp_path / "elsewhere")
    forge(atlas, put(0, key))
    assert sorted(ports(atlas)) == ["K", "Q"], "the record itself is found in the folder"
