"""Names that try to become code stay names: the report is opened in Chromium, its policy taken out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from golden.poison import POISONS, hits, poisoned

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def test_no_poison_runs_or_asks_for_anything(tmp_path: Path) -> None:
    found = hits(str(CHROMIUM), tmp_path)
    assert len(POISONS) >= 44
    assert found["sections"] > 4
    assert (found["ran"], found["elements"], found["requests"]) == ("", 0, [])


def test_what_runs_is_seen(tmp_path: Path) -> None:
    def write(path: Path, url: str) -> None:
        path.write_text(f"<html><body>{poisoned(url)[0]}<img onerror=1></body></html>")

    found = hits(str(CHROMIUM), tmp_path, write)
    assert (found["ran"], found["elements"], found["requests"]) == ("0", 1, ["/0"])
