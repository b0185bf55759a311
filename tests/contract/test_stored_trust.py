"""What was stored is what is read: a changed byte is refused and named, nothing foreign is followed or waited for."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
import torch
from fuzz import Tally, attempt
from fuzz_stored import make_atlas, make_moments
from safetensors.torch import load_file, save_file
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.atlas import Atlas, edges
from virtual_weights.checkpoint import catalog
from virtual_weights.checkpoint.hub import HubModel, fetch_snapshot
from virtual_weights.errors import RecordError, ResourceError, UsageError, VirtualWeightsError
from virtual_weights.record import Axis, Column, Record
from virtual_weights.record.durable import reading, replacing
from virtual_weights.stream.moments import Moments


@pytest.fixture
def atlas(tmp_path: Path) -> Atlas:
    make_atlas(tmp_path / "atlas", 0)
    return Atlas.open(tmp_path / "atlas")


def read_all(folder: Path) -> None:
    store = Atlas.open(folder)
    for key in store.keys():  # noqa: SIM118 (no mapping)
        store.get(key)
    for question in ("composition", "ablation"):
        edges(store, question=question)
    store.ledger()


def place(atlas: Atlas, question: str, name: str) -> Path:
    return atlas.path / "records" / atlas.keys(question)[0] / name


# -- changed files


def double_arrays(path: Path) -> None:
    save_file({name: values * 2 for name, values in load_file(path).items()}, path)


def double_table(column: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with duckdb.connect() as database:
            rows = database.read_parquet(str(path)).project(f"* REPLACE ({column} * 2 AS {column})").fetchnumpy()
            database.register("rows", rows)
            database.view("rows").write_parquet(str(path), compression="zstd")

    return change


def edit(field: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    return change


@pytest.mark.parametrize(
    ("question", "name", "change"),
    [
        ("composition", "arrays.safetensors", double_arrays),
        ("composition", "edges-00000.parquet", double_table("score")),
        ("labels", "table.parquet", double_table("x")),
        ("ablation", "edges-00000.parquet", double_table("effect")),
        ("composition", "record.json", edit("parameters", {"port": "Q"})),
        ("labels", "record.json", edit("stamp", {"norm": "left out"})),
        ("ablation", "record.json", edit("checksum", "0" * 64)),
    ],
)
def test_a_changed_file_of_a_record_is_refused_and_named(
    atlas: Atlas, question: str, name: str, change: Callable[[Path], None]
) -> None:
    path = place(atlas, question, name)
    key = path.parent.name
    read_all(atlas.path)
    change(path)
    with pytest.raises(RecordError, match="checksum differs") as caught:
        read_all(atlas.path)
    assert name in caught.value.what
    assert key[:12] in caught.value.what


def test_a_record_in_the_place_of_another_is_refused(atlas: Atlas) -> None:
    one, other = (place(atlas, question, "").parent / atlas.keys(question)[0] for question in ("labels", "ablation"))
    shutil.rmtree(other)
    shutil.copytree(one, other)
    with pytest.raises(RecordError, match="of another record"):
        read_all(atlas.path)


def test_a_changed_manifest_is_refused(atlas: Atlas) -> None:
    edit("sizes", {"d_model": 9})(atlas.path / "manifest.json")
    with pytest.raises(RecordError, match=r"manifest\.json cannot be used .*checksum"):
        Atlas.open(atlas.path)


def test_only_what_is_touched_is_checked(atlas: Atlas) -> None:
    place(atlas, "labels", "table.parquet").write_bytes(b"changed")
    assert Atlas.open(atlas.path).get(atlas.keys("composition")[0])["score"].shape == (6, 6)


@pytest.mark.parametrize("place", [0, 9, 40, 200, -1])
def test_a_changed_byte_of_moments_is_refused(tmp_path: Path, place: int) -> None:
    make_moments(tmp_path, 0)
    path = tmp_path / "moments.safetensors"
    Moments.load(path)
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RecordError, match=r"moments\.safetensors is not a file of moments"):
        Moments.load(path)


def test_moments_of_an_atlas_are_refused_if_changed_and_get_their_record(
    tmp_path: Path,
) -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    run, store = vw.Run.on_repeats(stream, 32, 16), Atlas.create(tmp_path, {"fingerprint": stream.source.fingerprint})
    moments = vw.Survey(stream, store, run).moments()
    (key,) = store.keys()
    shutil.rmtree(store.table(key).parent)  # as if the run had ended between the file and the record
    assert vw.Survey(stream, store, run).moments().identity == moments.identity
    assert store.keys() == (key,)
    (path,) = tmp_path.glob("moments-*.safetensors")
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(RecordError, match="checksum differs"):
        vw.Survey(stream, store, run).moments()
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    with pytest.raises(RecordError, match="is a link"):
        vw.Survey(stream, store, run).moments()


@pytest.mark.parametrize(("target", "tries"), [("atlas", 60), ("moments", 150)])
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_refused_by_type(target: str, tries: int, tmp_path: Path) -> None:
    tally = Tally()
    for number in range(tries):
        attempt(target, number, tally, tmp_path)
    assert not tally.wrong, tally.first
    assert 0 < tally.opened < tries // 2


# -- foreign files


@pytest.mark.parametrize("name", ["manifest.json", "records", "ledger.sqlite"])
def test_a_link_out_of_an_atlas_is_not_followed(atlas: Atlas, tmp_path: Path, name: str) -> None:
    (atlas.path / name).rename(tmp_path / name)
    (atlas.path / name).symlink_to(tmp_path / name)
    before = (tmp_path / "ledger.sqlite").read_bytes() if name == "ledger.sqlite" else b""
    with pytest.raises(RecordError):
        read_all(atlas.path)
    with pytest.raises(RecordError):
        Atlas.create(atlas.path, {"fingerprint": "f00d"}).put(Record("q", (), (Column("x", torch.ones(())),)))
    assert before == b"" or before == (tmp_path / "ledger.sqlite").read_bytes()


@pytest.mark.parametrize("whole", [False, True], ids=["its header", "its folder"])
def test_a_link_in_place_of_a_record_is_not_followed(atlas: Atlas, tmp_path: Path, whole: bool) -> None:
    path = place(atlas, "labels", "record.json")
    path = path.parent if whole else path
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    with pytest.raises(RecordError):
        read_all(atlas.path)


@pytest.mark.parametrize("name", ["record.json", "table.parquet"])
def test_a_pipe_is_refused_without_waiting(atlas: Atlas, name: str) -> None:
    path = place(atlas, "labels", name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RecordError):
        read_all(atlas.path)


def test_moments_from_a_pipe_or_a_device_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(RecordError):
            Moments.load(path)
    with pytest.raises(UsageError, match="is not a file"), replacing(tmp_path / "pipe") as aside:
        aside.write_text("x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t BEFORE INSERT ON tasks BEGIN DELETE FROM tasks; END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE other (a)",
        "DROP TABLE tasks",
    ],
)
def test_a_ledger_that_defines_more_is_not_touched(atlas: Atlas, statement: str) -> None:
    path = atlas.path / "ledger.sqlite"
    with sqlite3.connect(path) as database:
        database.execute(statement)
        if statement.startswith("DROP"):
            database.execute("CREATE VIEW tasks AS SELECT 1 AS key")
    database.close()
    before = path.read_bytes()
    for use in (atlas.ledger, lambda: atlas.put(Record("q", (), (Column("x", torch.ones(())),)))):
        with pytest.raises(RecordError, match="other tables, views or triggers"):
            use()
    assert path.read_bytes() == before


def test_a_changed_entry_of_the_ledger_is_refused(atlas: Atlas) -> None:
    with sqlite3.connect(atlas.path / "ledger.sqlite") as database:
        database.execute("UPDATE tasks SET seconds = 9")
    database.close()
    with pytest.raises(RecordError, match="entry was changed"):
        atlas.ledger()


@pytest.mark.parametrize("name", ["a[b]", "a*", "a?b", "port=K", "a'b;--"])
def test_the_name_of_a_folder_is_no_pattern(tmp_path: Path, name: str) -> None:
    for seed, folder in enumerate(("ab", "axb", name)):
        make_atlas(tmp_path / folder / "atlas", seed)
    store = Atlas.open(tmp_path / name / "atlas")
    score = store.find("composition")["score"]
    assert edges(store, top=1)[0]["score"] == score[~score.isnan()].max()
    assert store.find("labels").axes[0].labels[0] == "L0H0"
    read_all(store.path)


# -- writing


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make_atlas(tmp_path / "atlas", 0)
        make_moments(tmp_path, 0)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_what_does_not_fit_is_a_typed_error_and_leaves_nothing(atlas: Atlas) -> None:
    names = sorted(path.name for path in (atlas.path / "records").iterdir())
    axes = (Axis("reader", tuple(map(str, range(90)))), Axis("writer", tuple(map(str, range(90)))))
    large = Record("overlap", axes, (Column("x", torch.rand(90, 90)),), {"port": "K"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="File too large"):
            atlas.put(large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in (atlas.path / "records").iterdir()) == names


@pytest.mark.parametrize(
    ("code", "kind"),
    [("ENOSPC", ResourceError), ("EDQUOT", ResourceError), ("EACCES", UsageError), ("EROFS", UsageError)],
)
def test_the_systems_refusals_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, kind: type[VirtualWeightsError]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(kind, match="cannot be written"):
        make_moments(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(kind, match="cannot be written"):
        Atlas.create(tmp_path / "atlas", {"fingerprint": "f00d"})


@pytest.mark.parametrize(
    ("message", "kind"), [("database or disk is full", ResourceError), ("file is not a database", RecordError)]
)
def test_nobody_is_told_to_remove_a_ledger_for_a_full_disk(
    atlas: Atlas, monkeypatch: pytest.MonkeyPatch, message: str, kind: type[VirtualWeightsError]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        error = sqlite3.DatabaseError(message)
        error.sqlite_errorcode = sqlite3.SQLITE_FULL if kind is ResourceError else sqlite3.SQLITE_NOTADB
        raise error

    monkeypatch.setattr("sqlite3.connect", refuse)
    with pytest.raises(kind) as caught:
        atlas.ledger()
    assert ("remove" in caught.value.do) == (kind is RecordError)


def test_a_disk_that_is_full_while_a_model_is_fetched_is_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("VWEIGHTS_CACHE", str(tmp_path))
    monkeypatch.setattr(catalog, "_candidates", lambda _: ())
    monkeypatch.setattr(catalog, "_download", refuse)
    with pytest.raises(ResourceError, match="No space left"):
        catalog.locate("smollm2-135m")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: refuse())
    with pytest.raises(ResourceError, match="No space left"):
        fetch_snapshot(HubModel("org/name", None))


def test_a_file_is_opened_by_its_names_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with reading(tmp_path / "link", "b") as file:
        assert file.read() == b"text"
    with pytest.raises(OSError), reading(tmp_path, "link", "b"):
        pass


def test_killed_anywhere_the_next_run_finishes_with_the_same_records() -> None:
    script = Path(__file__).parents[1] / "kill.py"
    command = [sys.executable, str(script), "--records", "--boundaries", "6", "--moments", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] >= 6
    assert (found["failed"], found["different"]) == (0, 0)
