"""Files that are there whole or not at all, and that are read without following links or waiting for a pipe."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest
from io import BufferedReader
from pathlib import Path

from virtual_weights.errors import UsageError, writing

ASIDE = ".tmp-"
ABANDONED_AFTER = 3600.0
"""Seconds after which what lies aside is taken for the leftover of a crash; a record is written in seconds."""


@contextmanager
def replacing(target: Path) -> Generator[Path]:
    """Give a temporary name beside a file; what was written there takes its place at the end, whole or not at all.

    Raises:
        UsageError: the file's folder does not exist, the system does not let us write there, or a device, a pipe or a
            folder has that name.
        ResourceError: the disk is full.
    """
    with writing(target):
        if not target.parent.is_dir():
            raise UsageError(f"there is no folder {target.parent}", expected="an existing folder", do="make it first")
        if target.exists() and not target.is_file():
            raise UsageError(f"{target} is not a file", expected="a new or regular file", do="name another file")
        aside = target.parent / f"{ASIDE}{uuid.uuid4().hex}"
        try:
            yield aside
            _flush(aside)
            aside.replace(target)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        _flush(target.parent)


def write_folder(target: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a folder aside and put it in place atomically, unless somebody else has.

    Args:
        target: where the folder shall be; its parent exists.
        fill: writes the files into the folder that it is given.

    Returns:
        Whether this call put the folder there; False when another writer was first.

    Raises:
        UsageError: the system does not let us write there.
        ResourceError: the disk is full.
    """
    aside = target.parent / f"{ASIDE}{uuid.uuid4().hex}"
    with writing(target):
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


@contextmanager
def reading(path: Path, *inside: str) -> Generator[BufferedReader]:
    """Open a regular file to read.

    Args:
        path: a file as the user names it, which may be a link; or a folder.
        inside: names that lead from that folder to the file, none of which may be a link.

    Raises:
        OSError: it is not there, or is a link, a pipe, a device or anything but a regular file.
    """
    # O_NONBLOCK: a pipe would otherwise wait for somebody to write
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in inside:
            outer = descriptor
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=outer)
            os.close(outer)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            yield file
    finally:
        os.close(descriptor)


def sha256_of(path: Path, *inside: str) -> str:
    """A hex sha256 of a file's content, the file named as for ``reading``."""
    with reading(path, *inside) as file:
        return file_digest(file, "sha256").hexdigest()


def sweep_aside(folder: Path) -> None:
    """Remove what crashed writers left aside in a folder; what is young may be another writer's work."""
    for path in _aside(folder):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
