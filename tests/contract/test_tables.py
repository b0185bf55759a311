"""Tables of one's own: what they may say, how they are checked, and that results say which table they are read by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.cli.app import run as command
from virtual_weights.errors import ArchitectureError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama under another model type, with a note that nobody knows."""
    monkeypatch.setenv("VWEIGHTS_CACHE", str(tmp_path / "cache"))
    model: Any = tiny("llama-grouped-untied")
    model.save_pretrained(tmp_path / "mine")
    config = tmp_path / "mine" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mine", "note": 7}))
    return tmp_path / "mine"


def table(folder: Path, *lines: str) -> Path:
    path = folder.parent / "mine.toml"
    path.write_text("\n".join(["[mine]", *lines]))
    return path


def test_a_model_opens_by_a_table_of_its_own(folder: Path) -> None:
    with pytest.raises(ArchitectureError, match="no table for model_type = 'mine'"):
        vw.open(folder)
    stream = vw.open(folder, table=table(folder, 'like = "llama"', 'neutral = ["note"]'))
    twin = vw.open(tiny("llama-grouped-untied"))
    assert stream.read("Q", "L1.attn").maps.equal(twin.read("Q", "L1.attn").maps)
    assert stream.provenance["table"] == "mine.toml, never checked"
    assert twin.provenance["table"].startswith("built in, ")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['like = "lama"'], "is like 'lama', of which there is no other entry"),
        (['like = "mine"'], "is like 'mine'"),
        (['qk_nrom = "head"'], "has qk_nrom"),
        (['neutral = "note"'], "has neutral"),
        (['names = "nobody"'], "no names 'nobody'"),
        (['scale = "$a$b"', 'neutral = ["note"]'], r"says '\$a\$b'"),
        (['eps = "$nowhere"', 'neutral = ["note", "rms_norm_eps"]'], "nowhere"),
        ([], "no row of the mine table accounts for: note"),
        (["= 3"], "cannot be read"),
    ],
)
def test_what_no_table_can_say_is_refused_by_name(lines: list[str], message: str, folder: Path) -> None:
    with pytest.raises(ArchitectureError, match=message):
        vw.open(folder, table=table(folder, *lines))


def test_a_table_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ArchitectureError, match="cannot be read"):
        vw.open(folder, table=folder / "nowhere.toml")


def test_a_check_stands_in_the_provenance_afterwards(folder: Path, capsys: Capture) -> None:
    path = table(folder, 'like = "llama"', 'neutral = ["note"]')
    assert command(["check", str(folder), "--table", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["summary"]["largest_error"] < 1e-5
    assert {row["step"] for row in answer["rows"]} >= {"written", "Q", "K", "V", "pattern", "unembed"}
    told = vw.open(folder, table=path).provenance["table"]
    assert told == answer["summary"]["table"] == f"mine.toml, exact to {answer['summary']['largest_error']:.1e}"
    other = table(folder, 'like = "llama"', 'neutral = ["note", "another"]')
    assert vw.open(folder, table=other).provenance["table"] == "mine.toml, never checked"


def test_a_check_that_fails_says_where(folder: Path, capsys: Capture) -> None:
    path = table(folder, 'like = "llama"', 'neutral = ["note"]', "scale = 1.0")
    assert command(["check", str(folder), "--table", str(path)]) != 0
    said = capsys.readouterr().err
    assert "the pattern of L" in said
    assert "correct the table" in said
    assert vw.open(folder, table=path).provenance["table"] == "mine.toml, never checked"
