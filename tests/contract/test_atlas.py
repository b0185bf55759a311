"""The contract of the store: whole or not at all, found by what was asked, resumed, shared, and honest when broken."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from virtual_weights.atlas import Atlas, task_key
from virtual_weights.errors import RecordError, ResourceError, UsageError
from virtual_weights.record import Axis, Column, Record
from virtual_weights.record.durable import write_folder

NAN = math.nan
MANIFEST = {"reference": "tiny", "fingerprint": "f00d", "family": "llama", "sizes": {"d_model": 8}}


def matrix(port: str = "K", **stamp: object) -> Record:
    """A record over two axes whose columns share memory, one of them transposed."""
    values = torch.tensor([[NAN, 0.5], [0.25, 0.125]], dtype=torch.float64)
    axes = (Axis("reader", ("R0", "R1"), ("g", "g")), Axis("writer", ("W0", "W1")))
    columns = (Column("score", values, "1", "a ratio"), Column("z", values.T))
    return Record("composition", axes, columns, {"port": port, "rotary_offset": None}, stamp, {"fingerprint": "f00d"})


def table() -> Record:
    columns = (
        Column("angle", torch.tensor([0.5, NAN, -math.inf], dtype=torch.float64), "radian"),
        Column("half", torch.tensor([0.1, 2.0, -3.0], dtype=torch.bfloat16)),
        Column("S", torch.tensor([1, 2, 3], dtype=torch.int32)),
        Column("s", torch.tensor([True, False, True])),
        Column("text", ("a", None, "'; --")),
        Column("flag", (True, None, False)),
        Column("count", (1, None, -3)),
        Column("big", (2**70, None, 1)),
        Column("mixed", (1, "1", 1.5)),
        Column("unsure", (NAN, None, 0.5)),
        Column("nothing", (None, None, None)),
    )
    return Record("channel", (Axis("direction", ("1", "2", "3")),), columns, {"n": 3}, {"norm": "folded"}, {})


def same(a: Record, b: Record) -> bool:
    def values(x, y) -> bool:
        if isinstance(x, torch.Tensor):
            return (
                isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.equal(y)
                if not x.is_floating_point()
                else (
                    isinstance(y, torch.Tensor)
                    and x.dtype == y.dtype
                    and torch.equal(x.nan_to_num(9e9), y.nan_to_num(9e9))
                )
            )
        return repr(x) == repr(y)

    columns = len(a.columns) == len(b.columns) and all(
        (x.name, x.unit, x.meaning) == (y.name, y.unit, y.meaning) and values(x.values, y.values)
        for x, y in zip(a.columns, b.columns, strict=True)
    )
    whole = (a.question, a.axes, a.parameters, a.stamp, a.provenance)
    return columns and whole == (b.question, b.axes, b.parameters, b.stamp, b.provenance)


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    return Atlas.create(tmp_path / "atlas", MANIFEST)


# --- what goes in comes out


@pytest.mark.parametrize("record", [matrix(), table()], ids=["matrix", "table"])
def test_a_record_comes_back_as_it_was(atlas: Atlas, record: Record):
    found = Atlas.open(atlas.path).get(atlas.put(record))
    assert same(found, record)
    assert not same(found, replace(record, question="other"))
    assert not same(found, replace(record, columns=record.columns[:1]))


def test_scalars_and_cubes_come_back_too(atlas: Atlas):
    scalar = Record("rank", (), (Column("x", torch.tensor(2.5)),))
    cube = Record("q", tuple(Axis(n, ("0", "1")) for n in "abc"), (Column("x", torch.arange(8).view(2, 2, 2)),))
    for record in (scalar, cube):
        assert same(atlas.get(atlas.put(record)), record)


numbers = st.one_of(st.just(NAN), st.floats(width=32, allow_nan=False))
cells = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec="utf-8")))


@given(st.lists(st.tuples(numbers, cells, st.none() | st.floats()), min_size=1, max_size=5))
@settings(max_examples=15)
def test_any_table_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list):
    floats, mixed, optional = zip(*rows, strict=True)
    axis = Axis("part", tuple(f"é'{i}" for i in range(len(rows))))
    record = Record("q", (axis,), (Column("x", torch.tensor(floats)), Column("y", mixed), Column("z", optional)))
    atlas = Atlas.create(tmp_path_factory.mktemp("any"), MANIFEST)
    assert same(atlas.get(atlas.put(record)), record)


def test_the_table_is_plain_parquet_for_others(atlas: Atlas):
    import duckdb

    key = atlas.put(table())
    with duckdb.connect() as database:
        found = database.read_parquet(str(atlas.path / "records" / key / "table.parquet"))
        assert found.columns[:4] == ["direction", "angle", "half", "S"]
        assert found.fetchall()[1][:2] == ("2", None)


# --- addresses


def test_an_address_depends_on_all_that_was_asked_and_on_nothing_else():
    asked = {"port": "K", "offsets": [1, 2]}
    base = task_key("f", "q", asked, {"norm": "folded"})
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert base == task_key("f", "q", {"offsets": (1, 2), "port": "K"}, {"norm": "folded"})
    others = {
        task_key("g", "q", asked, {"norm": "folded"}),
        task_key("f", "r", asked, {"norm": "folded"}),
        task_key("f", "q", {**asked, "port": "Q"}, {"norm": "folded"}),
        task_key("f", "q", asked, {"norm": "left out"}),
        task_key("f", "q", {**asked, "offsets": "[1,2]"}, {"norm": "folded"}),
        base,
    }
    assert len(others) == 6


def test_an_address_depends_on_the_version(monkeypatch: pytest.MonkeyPatch):
    before = task_key("f", "q", {}, {})
    monkeypatch.setattr("virtual_weights.atlas.stored.VERSION", "0.0.0")
    assert task_key("f", "q", {}, {}) != before


@pytest.mark.parametrize("bad", [NAN, math.inf, torch.ones(1), {1: "x"}, [{2: "x"}], {"x"}], ids=repr)
def test_what_is_not_plain_json_has_no_address(bad):
    with pytest.raises(UsageError):
        task_key("f", "q", {"x": bad}, {})


def test_records_are_found_by_question_and_parameters(atlas: Atlas):
    first, second = atlas.put(matrix("Q")), atlas.put(matrix("K"))
    assert atlas.keys() == atlas.keys("composition") == (first, second)
    assert atlas.keys("composition", port="K") == (second,)
    assert atlas.find("composition", port="Q", rotary_offset=None).parameters["port"] == "Q"
    assert atlas.find("composition", port="V") is None
    assert atlas.find("composition", flavour=None) is None
    assert atlas.find("overlap") is None


def test_the_newest_of_several_is_found(atlas: Atlas):
    atlas.put(matrix("K", norm="gain folded"))
    atlas.put(matrix("K", norm="left out"))
    assert atlas.find("composition", port="K").stamp["norm"] == "left out"


def test_an_address_chosen_beforehand_is_where_the_record_lies(atlas: Atlas):
    key = task_key("f00d", "composition", {"port": "K", "memory_mb": 256}, {"norm": "gain folded"})
    assert not atlas.finished(key)
    assert atlas.put(matrix(), key=key) == key
    assert atlas.finished(key)
    assert same(atlas.get(key), matrix())


def test_a_cut_of_a_record_does_not_take_its_place(atlas: Atlas):
    whole, cut = atlas.put(matrix()), atlas.put(matrix().top(1))
    assert whole != cut
    assert same(atlas.get(cut), matrix().top(1))


@pytest.mark.parametrize("key", ["", "../../etc", "0" * 63, "g" * 64, "0" * 64 + "/.."])
def test_what_is_no_key_reaches_no_file(atlas: Atlas, key: str):
    for ask in (atlas.get, atlas.finished):
        with pytest.raises(UsageError, match="is not a key"):
            ask(key)


def test_an_unknown_key_is_refused(atlas: Atlas):
    with pytest.raises(UsageError, match="no record"):
        atlas.get("0" * 64)


# --- one atlas, one checkpoint


def test_create_goes_on_with_the_atlas_of_the_same_model(atlas: Atlas):
    key = atlas.put(matrix())
    (atlas.path / "report.html").write_text("a view lies beside the records")
    again = Atlas.create(atlas.path, {**MANIFEST, "reference": "the same under another name"})
    assert again.finished(key)
    assert again.manifest["reference"] == "tiny"


def test_create_refuses_the_atlas_of_another_model(atlas: Atlas):
    with pytest.raises(UsageError, match="another checkpoint: tiny"):
        Atlas.create(atlas.path, {**MANIFEST, "fingerprint": "beef", "reference": "other"})
    assert Atlas.open(atlas.path).fingerprint == "f00d"


def test_a_record_of_another_model_is_refused(atlas: Atlas):
    with pytest.raises(UsageError, match="cannot be stored"):
        atlas.put(replace(matrix(), provenance={"fingerprint": "beef"}))
    assert atlas.keys() == ()


def test_create_touches_no_other_folder_and_no_file(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="neither empty nor an atlas"):
        Atlas.create(tmp_path, MANIFEST)
    with pytest.raises(UsageError, match="is a file"):
        Atlas.create(tmp_path / "thesis.tex", MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_create_takes_an_empty_folder_even_one_where_it_crashed_before(tmp_path: Path):
    (tmp_path / ".tmp-0123").write_text('{"form')
    assert Atlas.create(tmp_path, MANIFEST).manifest["sizes"] == {"d_model": 8}


def test_open_needs_an_atlas(tmp_path: Path):
    with pytest.raises(UsageError, match="no atlas"):
        Atlas.open(tmp_path)
    with pytest.raises(UsageError, match="no atlas"):
        Atlas.open(tmp_path / "nowhere")


# --- whole or not at all


def names(atlas: Atlas) -> list[str]:
    return sorted(path.name for path in (atlas.path / "records").iterdir())


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(atlas: Atlas, monkeypatch: pytest.MonkeyPatch, interruption):
    def stop(*_: object) -> None:
        raise interruption

    monkeypatch.setattr("virtual_weights.atlas.stored.write_safetensors", stop)
    with pytest.raises((KeyboardInterrupt, ResourceError)):
        atlas.put(matrix())
    assert names(atlas) == []
    assert atlas.ledger() == []


def test_leftovers_of_a_crash_are_ignored_and_swept_when_old(atlas: Atlas):
    key = atlas.put(matrix())
    old, young = (atlas.path / "records" / name for name in (".tmp-old", ".tmp-young"))
    for folder in (old, young):
        shutil.copytree(atlas.path / "records" / key, folder)
    os.utime(old, (time.time() - 7200,) * 2)
    assert atlas.keys() == (key,)
    Atlas.create(atlas.path, MANIFEST)
    assert names(atlas) == sorted([key, ".tmp-young"])


def test_the_second_of_two_writers_of_one_record_gives_way(tmp_path: Path):
    target = tmp_path / "record"

    def fill(text: str):
        return lambda folder: (folder / "f").write_text(text)

    def late(folder: Path) -> None:
        (folder / "f").write_text("second")
        assert write_folder(target, fill("first"))

    assert not write_folder(target, late)
    assert (target / "f").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_many_writers_of_the_same_records_all_end_well(tmp_path: Path):
    ports = ("Q", "K", "V")

    def work(_: int) -> list[str]:
        mine = Atlas.create(tmp_path / "atlas", MANIFEST)
        return [mine.put(matrix(port), seconds=1.0) for port in ports]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(work, range(6)))
    atlas = Atlas.open(tmp_path / "atlas")
    assert all(keys == found[0] for keys in found)
    assert names(atlas) == sorted(found[0])
    assert sorted(row["key"] for row in atlas.ledger()) == sorted(found[0])
    assert all(same(atlas.get(key), matrix(port)) for key, port in zip(found[0], ports, strict=True))


def test_a_stored_record_never_changes(atlas: Atlas):
    key = atlas.put(matrix(), seconds=2.0)
    before = (atlas.path / "records" / key / "record.json").read_bytes()
    assert atlas.put(matrix(), seconds=9.0) == key
    assert (atlas.path / "records" / key / "record.json").read_bytes() == before
    assert [(row["key"], row["seconds"]) for row in atlas.ledger()] == [(key, 2.0)]


def test_the_ledger_tells_what_was_done_and_can_be_lost(atlas: Atlas):
    key = atlas.put(matrix(), seconds=2.0)
    (row,) = atlas.ledger()
    assert (row["question"], json.loads(row["parameters"])) == ("composition", {"port": "K", "rotary_offset": None})
    assert row["finished"].endswith("+00:00")
    (atlas.path / "ledger.sqlite").unlink()
    assert atlas.ledger() == []
    assert atlas.finished(key)
    atlas.put(matrix())
    assert [row["key"] for row in atlas.ledger()] == [key]


# --- honest when broken


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGE = {
    "arrays gone": lambda f: (f / "arrays.safetensors").unlink(),
    "arrays cut": lambda f: truncate(f / "arrays.safetensors"),
    "arrays of another shape": lambda f: save_file(
        {"score": torch.ones(3), "z": torch.ones(3)}, f / "arrays.safetensors"
    ),
    "a column gone": lambda f: save_file({"score": torch.ones(2, 2)}, f / "arrays.safetensors"),
    "header cut": lambda f: truncate(f / "record.json"),
    "header a list": lambda f: (f / "record.json").write_text("[]"),
    "header deep": lambda f: (f / "record.json").write_text("[" * 100_000),
    "header no text": lambda f: (f / "record.json").write_bytes(b"\xff\xfe\x00"),
    "header without columns": lambda f: edit(f / "record.json", columns=None),
    "header without axes": lambda f: edit(f / "record.json", axes=[{"name": "reader"}]),
}
TABLE_DAMAGE = {
    "table gone": lambda f: (f / "table.parquet").unlink(),
    "table cut": lambda f: truncate(f / "table.parquet"),
    "table no parquet": lambda f: (f / "table.parquet").write_text("direction,angle\n1,2\n"),
    "more columns than the table": lambda f: edit(
        f / "record.json", columns=[{"name": str(i), "kind": "str", "unit": "", "meaning": ""} for i in range(40)]
    ),
    "an unknown kind": lambda f: edit(
        f / "record.json", columns=[{"name": "x", "kind": "torch.load", "unit": "", "meaning": ""}]
    ),
}


@pytest.mark.parametrize(
    ("record", "damage"),
    [*((matrix(), d) for d in DAMAGE.values()), *((table(), d) for d in TABLE_DAMAGE.values())],
    ids=[*DAMAGE, *TABLE_DAMAGE],
)
def test_a_broken_record_says_so_and_what_to_do(atlas: Atlas, record: Record, damage):
    key = atlas.put(record)
    damage(atlas.path / "records" / key)
    with pytest.raises(RecordError, match=key[:12]) as caught:
        Atlas.open(atlas.path).get(key)
    assert "remove the folder" in caught.value.do


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 4, "fingerprint": "f00d"}', '{"format": 3, "fingerprint": 3}', "\x00"]
)
def test_a_broken_or_later_manifest_is_refused(atlas: Atlas, text: str):
    (atlas.path / "manifest.json").write_text(text)
    for ask in (Atlas.open, lambda path: Atlas.create(path, MANIFEST)):
        with pytest.raises(RecordError, match="cannot be used"):
            ask(atlas.path)


def test_a_broken_ledger_says_that_no_result_is_lost(atlas: Atlas):
    (atlas.path / "ledger.sqlite").write_text("not a database, but long enough to be taken for one" * 50)
    with pytest.raises(RecordError, match="ledger") as caught:
        atlas.ledger()
    assert "no result is lost" in caught.value.do
