"""How whatever takes long reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float], None]
"""Called with (done, in all); the unit is the caller's: operations, tokens, bytes or steps."""
Step = Callable[[str], Progress]
"""Begins a step of the work by name, and gives what its progress is reported to."""


def silent(done: float, total: float) -> None:
    """Report to nobody."""


def quiet(name: str) -> Progress:
    """A step that is reported to nobody."""
    del name
    return silent
