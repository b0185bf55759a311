"""A cursor over the header bytes of a GGUF file that never believes a length."""

from __future__ import annotations

import struct
from pathlib import Path

from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.errors import MalformedCheckpointError

MAX_HEADER = 256 << 20
_AHEAD = 1 << 20
_COUNT, _TYPE = struct.Struct("<Q"), struct.Struct("<I")


class HeaderCursor:
    """Reads on from the start of a file; every length is held against the bytes that remain.

    Args:
        file: the file.
    """

    def __init__(self, file: PinnedFile) -> None:
        self._file = file
        self._buffer = bytearray()
        self._position = 0

    @property
    def position(self) -> int:
        """How many bytes have been taken."""
        return self._position

    @property
    def path(self) -> Path:
        """The file, for errors."""
        return self._file.path

    def take(self, length: int, what: str) -> bytes:
        """Take the next bytes.

        Raises:
            MalformedCheckpointError: the file, or what a header may take of it, ends before.
        """
        self.skip(length, what)
        return bytes(memoryview(self._buffer)[self._position - length : self._position])

    def skip(self, length: int, what: str) -> None:
        """Pass over the next bytes; raises as ``take`` does."""
        end = self._position + length
        if end > len(self._buffer):
            self._fetch(end, length, what)
        self._position = end

    def _fetch(self, end: int, length: int, what: str) -> None:
        if end > self._file.size:
            left = self._file.size - self._position
            raise malformed_gguf(self.path, f"{what} claims {length:,} bytes", f"at most the {left:,} that remain")
        if end > MAX_HEADER:
            raise malformed_gguf(self.path, f"its header passes {MAX_HEADER:,} bytes at {what}", "a smaller header")
        have = len(self._buffer)
        self._buffer += self._file.read(have, min(max(end - have, _AHEAD), self._file.size - have))

    def type_id(self, what: str) -> int:
        """Take an unsigned 32-bit integer."""
        return int(_TYPE.unpack(self.take(4, what))[0])

    def count(self, what: str) -> int:
        """Take an unsigned 64-bit integer."""
        return int(_COUNT.unpack(self.take(8, what))[0])

    def string(self, what: str) -> str:
        """Take a length and that many bytes of UTF-8."""
        raw = self.take(self.count(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise malformed_gguf(self.path, f"{what} is not UTF-8: {raw[:50]!r}", "text in UTF-8") from error

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over that many strings."""
        for _ in range(count):
            # inlined from `count` and `skip`: a vocabulary has half a million of these
            if self._position + 8 > len(self._buffer):
                self._fetch(self._position + 8, 8, what)
            end = self._position + 8 + _COUNT.unpack_from(self._buffer, self._position)[0]
            if end > len(self._buffer):
                self._fetch(end, end - self._position, what)
            self._position = end


def malformed_gguf(path: Path, what: str, expected: str) -> MalformedCheckpointError:
    """The error of a GGUF file that contradicts its format."""
    return MalformedCheckpointError(
        f"{str(path)!r} is not a sound GGUF file: {what}",
        expected=expected,
        do="fetch the file again; if it stays so, it was written wrongly or truncated",
    )
