"""How whatever takes long reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float], None]
"""Called with (done, in all); the unit is the caller's: operations, tokens, bytes or steps."""


def silent(done: float, total: float) -> None:
    """Report to nobody."""
