"""A regular file that is read by range and must stay what it was when it was opened.

Ranges are read, never mapped: a mapped file that shrinks kills the process by SIGBUS, a read one
gives an error.
"""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from platformdirs import user_cache_path
from torch import Tensor

from virtual_weights.errors import (
    CheckpointError,
    MalformedCheckpointError,
    MissingTensorError,
    ResourceError,
    UnsafeCheckpointError,
    VirtualWeightsError,
)
from virtual_weights.record.durable import reading, replacing

_MEMORY = "fingerprints"
_SETTLED_AFTER = 2 * 10**9
"""Nanoseconds after which a change of a file can no longer leave its times as they are, whatever the disk's clock."""


@final
@dataclass(frozen=True)
class PinnedFile:
    """A file by path, with what it was when it was pinned.

    Attributes:
        path: where it lies.
        size: its length in bytes.
        stamp: device, inode and time of change; any of them differing later is refused.
    """

    path: Path
    size: int
    stamp: tuple[int, int, int]

    def identity(self) -> list[Any]:
        """Path, size, inode and times of the file as it is now: where all are the same, it is the same content.

        Raises:
            CheckpointError: the system does not let us look.
        """
        try:
            now = self.path.stat()
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return [str(self.path), now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns]

    def is_settled(self) -> bool:
        """Whether its times are past: what changes it from now on will change them."""
        return time.time_ns() - max(self.identity()[3:]) > _SETTLED_AFTER

    def read(self, offset: int, length: int) -> bytes:
        """Read a range.

        Raises:
            MalformedCheckpointError: the file changed or shrank since it was pinned.
        """
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a writable buffer of bytes from a range that begins at ``offset``.

        Raises:
            MalformedCheckpointError: the file changed or shrank since it was pinned.
        """
        try:
            # O_NONBLOCK: a FIFO put in its place would otherwise hang us before the stamp is compared
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                now = os.fstat(descriptor)
                if (now.st_size, *_stamp(now)) != (self.size, *self.stamp):
                    raise _changed(self.path)
                file.seek(offset)
                done = 0
                while done < len(buffer):
                    count = file.readinto(buffer[done:])
                    if not count:
                        raise _changed(self.path)
                    done += count
        except OSError as error:
            raise _unreadable(self.path, error) from error


def pin(path: Path) -> PinnedFile:
    """Pin a file as it is now.

    Raises:
        MissingTensorError: there is no such file.
        UnsafeCheckpointError: it is a pipe, a device or anything but a regular file.
        CheckpointError: the system does not let us read it.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise MissingTensorError(
            f"there is no file {str(path)!r}",
            expected="a file of the checkpoint",
            do="check the path, or fetch the checkpoint again",
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeCheckpointError(
            f"{str(path)!r} is not a regular file",
            expected="a regular file; reading a pipe or a device may block or do harm",
            do="put the file itself there",
        )
    return PinnedFile(path, status.st_size, _stamp(status))


def cache_folder() -> Path:
    """``VWEIGHTS_CACHE``, else ``virtual-weights`` in the user's cache folder (on Linux XDG_CACHE_HOME or ~/.cache)."""
    folder = os.environ.get("VWEIGHTS_CACHE")
    return Path(folder) if folder else user_cache_path("virtual-weights", appauthor=False)


def remember(key: str, text: str) -> None:
    """Keep a short text in the user's cache; where that cannot be written, nothing is kept.

    Args:
        key: under which, 64 hex digits.
        text: the text.
    """
    path = cache_folder() / _MEMORY / key
    with suppress(OSError, VirtualWeightsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(text, encoding="utf-8")


def recall(key: str, pattern: str = r"[0-9a-f]{64}") -> str | None:
    """What was kept under a key, if it follows a pattern; None where nothing was, or it is no longer that."""
    with suppress(OSError, ValueError), reading(cache_folder() / _MEMORY, key) as file:
        text = file.read(65).decode("ascii")
        return text if re.fullmatch(pattern, text) else None
    return None


def read_tensor(file: PinnedFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read a dense tensor from a byte range straight into its own fresh memory.

    Raises:
        MalformedCheckpointError: the file changed or shrank since it was pinned.
        ResourceError: there is no memory for it.
    """
    tensor = allocate(shape, torch.uint8 if dtype is torch.bool else dtype)
    if tensor.numel():
        file.read_into(tensor.reshape(-1).view(torch.uint8).numpy().data, offset)
    # any byte but 0 means true; a torch.bool made of other bytes than 0 and 1 misbehaves
    return tensor != 0 if dtype is torch.bool else tensor


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fresh memory for a tensor.

    Raises:
        ResourceError: there is no memory for it.
    """
    try:
        return torch.empty(shape, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        raise ResourceError(
            f"no memory for a tensor of shape {shape} and type {dtype}",
            expected="a tensor that fits into memory",
            do="read it by slices of rows",
        ) from error


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _changed(path: Path) -> MalformedCheckpointError:
    return MalformedCheckpointError(
        f"{str(path)!r} changed after it was opened",
        expected="a checkpoint that nobody writes to while it is read",
        do="wait until the writing is over and open it again",
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} cannot be read: {error.strerror or error}",
        expected="a file that this user may read",
        do="check the permissions and the disk",
    )
