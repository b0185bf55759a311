"""Files that are there whole or not at all: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from virtual_weights.errors import UsageError

ASIDE = ".tmp-"
ABANDONED_AFTER = 3600.0
"""Seconds after which what lies aside is taken for the leftover of a crash; a record is written in seconds."""


@contextmanager
def replacing(target: Path) -> Generator[Path]:
    """Give a temporary name beside a file; what was written there takes its place at the end, whole or not at all.

    Raises:
        UsageError: the file's folder does not exist.
    """
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", expected="an existing folder", do="make it first")
    aside = target.parent / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        yield aside
        _flush(aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    _flush(target.parent)


def write_folder(target: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a folder aside and put it in place atomically, unless somebody else has.

    Args:
        target: where the folder shall be; its parent exists.
        fill: writes the files into the folder that it is given.

    Returns:
        Whether this call put the folder there; False when another writer was first.
    """
    aside = target.parent / f"{ASIDE}{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        fill(aside)
        for path in sorted(aside.iterdir()):
            _flush(path)
        _flush(aside)
        try:
            aside.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
        _flush(target.parent)
        return True
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sweep_aside(folder: Path) -> None:
    """Remove what crashed writers left aside in a folder; what is young may be another writer's work."""
    for path in _aside(folder):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_vacant(folder: Path) -> bool:
    """Whether a folder holds nothing but what lies aside."""
    return all(path.name.startswith(ASIDE) for path in folder.iterdir())


def _aside(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name.startswith(ASIDE))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
