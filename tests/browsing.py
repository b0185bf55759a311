"""What a browser makes of a page of the explorer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import walking


def dom(path: Path, address: str) -> str:
    """What a browser makes of a page, as HTML."""
    try:
        browser = walking.browser()
    except walking.Unwalkable as missing:
        pytest.skip(str(missing))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--window-size=1440,1000"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run(
        [browser, *flags, profile, "--dump-dom", f"{path.as_uri()}{address}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout
