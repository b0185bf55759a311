"""Which checkpoint a result is of, and how exact its reading was when it was last checked on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from virtual_weights.architecture import Entry
from virtual_weights.checkpoint.pinned_file import recall, remember

if TYPE_CHECKING:
    from virtual_weights.stream.stream import Stream


def fingerprint_of(stream: Stream) -> str:
    """A hex sha256 of all weights, and of what is attached, by which results of another stream are told apart."""
    if not stream.attached:
        return stream.source.fingerprint
    return sha256(f"{stream.source.fingerprint} {stream.attached.identity}".encode()).hexdigest()


class Provenance(Mapping[str, Any]):
    """Which checkpoint a result is of; what lies in files is hashed when somebody looks at its fingerprint.

    Tensors in memory can change, so theirs is of the time of the result.
    """

    def __init__(self, stream: Stream, table: Entry) -> None:
        self._stream, self._table = stream, table
        source = stream.source
        self._known = {"model": source.reference, "fingerprint": None, "family": stream.model.family, "table": None}
        if stream.attached:
            self._known["attached"] = ", ".join(part.name for part in stream.attached.parts)
        if not source.files:
            self._known["fingerprint"] = fingerprint_of(stream)

    def __getitem__(self, name: str) -> Any:
        value = self._known[name]
        if name == "fingerprint" and value is None:
            return fingerprint_of(self._stream)
        return checked_table(self._table, self._stream.source.fingerprint) if name == "table" else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return repr(dict(self))


_CHECKED = r"\d\.\de[-+]\d\d"


def checked_table(table: Entry, fingerprint: str, error: float | None = None) -> str:
    """Which table a checkpoint was read by, and how exact its reading was when it was checked.

    Args:
        table: the entry.
        fingerprint: of the checkpoint.
        error: of a check that was made now, to be remembered on this machine; None recalls the last one.
    """
    key = sha256(f"check {table.identity} {fingerprint}".encode()).hexdigest()
    if error is not None:
        remember(key, f"{error:.1e}")
    known = recall(key, _CHECKED)
    return f"{table.origin}, {'never checked' if known is None else f'exact to {known}'}"
