"""Some hundred mutated files of every kind of source; `make fuzz` opens 10,000 of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import TARGETS, Tally, Target, attempt, fuzz

from virtual_weights.errors import CheckpointError


@pytest.mark.parametrize("target", ["safetensors", "gguf"])
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_right_or_refused_by_type(target: str, tmp_path: Path) -> None:
    tally = Tally()
    for number in range(150):
        attempt(target, number, tally, tmp_path)
    assert not tally.wrong, tally.first
    assert tally.opened > 5


class Unescaped(CheckpointError):
    def __str__(self) -> str:
        return "\x1b[2J"


@pytest.mark.parametrize("what", ["foreign_exceptions", "control_characters", "changed_figures"])
def test_what_goes_wrong_is_counted(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path, _kind: int) -> None:
        (folder / "file").write_bytes(b"bytes")

    def read(folder: Path) -> tuple[str, str]:
        if (folder / "file").read_bytes() == b"bytes":
            return "sound", "the same"
        if what == "foreign_exceptions":
            raise KeyError(what)
        if what == "control_characters":
            raise Unescaped("", expected="", do="")
        return "changed", "the same"

    monkeypatch.setitem(TARGETS, what, Target(make, read))
    tally = Tally()
    attempt(what, 0, tally, tmp_path)
    assert getattr(tally, what) == tally.wrong == 1


def test_a_worker_that_dies_is_counted_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, os\n"
        "first, tries = int(sys.argv[4]), int(sys.argv[6])\n"
        "for number in range(first, first + tries):\n"
        "    if number == 2:\n"
        "        os.abort()\n"
        "    print(number, '{\"tries\": 1}', flush=True)\n"
    )
    monkeypatch.setattr("fuzz.__file__", str(script))
    tally = fuzz("any", 5)
    assert (tally.tries, tally.deaths, tally.wrong) == (5, 1, 1)
