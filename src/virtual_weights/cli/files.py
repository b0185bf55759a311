"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from virtual_weights.errors import UsageError


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary name beside ``path``; what was written there takes the place of ``path`` at the end."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", expected="an existing folder", do="make it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
