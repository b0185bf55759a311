"""What every question has: a name, parameters as plain values, and an answer for a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar

from virtual_weights.linalg import Progress
from virtual_weights.record import Record
from virtual_weights.stream import Stream


class Question(ABC):
    """A frozen dataclass of parameters that answers with a Record: a command's options, a task, a key in an atlas.

    Attributes:
        question: its name, in records and in an atlas.
    """

    question: ClassVar[str]

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters as plain values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @abstractmethod
    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """The answer.

        Args:
            stream: the model.
            progress: called with (done, total).
        """
