"""What a tensor or a metadata key may be called."""

from __future__ import annotations

from virtual_weights.errors import MalformedCheckpointError

MAX_NAME = 1024


def check_name(name: str, where: str) -> None:
    """Refuse a name that is empty, endless, or could steer a terminal.

    Raises:
        MalformedCheckpointError: it is one of these.
    """
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise MalformedCheckpointError(
            f"{where!r} holds the name {name!r:.100} ({len(name):,} characters)",
            expected=f"1 to {MAX_NAME} printable characters",
            do="fetch the file again from where it was published",
        )
