"""What a Record is made of: labelled axes, and columns of values over them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from virtual_weights.errors import UsageError

Value = float | int | str | bool | None
Values = Tensor | tuple[Value, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a Record.

    Attributes:
        name: what runs along it, e.g. ``"reader"``.
        labels: one label per entry, unique.
        groups: for entries that are one group under several names (query heads sharing one
            key/value head), the name of the group; empty where every entry is its own.
    """

    name: str
    labels: tuple[str, ...]
    groups: tuple[str, ...] = ()

    def index(self, label: str) -> int:
        """Place of ``label``; a UsageError that names the axis if it is not there."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise UsageError(
                f"no {self.name} {label!r} in this record",
                expected=f"one of {len(self.labels)} labels, {', '.join(self.labels[:4])}, ...",
                do=f"list them with record.axis({self.name!r}).labels",
            ) from None


@dataclass(frozen=True)
class Column:
    """One quantity over all axes of a Record.

    Attributes:
        name: short name, used as the column's key everywhere.
        values: a real tensor, or a tuple of plain values where there is one axis; floating NaN = absent.
        unit: unit in words, e.g. ``"1 (ratio)"``.
        meaning: one sentence or formula.
    """

    name: str
    values: Values
    unit: str = ""
    meaning: str = ""
