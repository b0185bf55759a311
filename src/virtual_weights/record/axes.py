"""What a Record is made of: labelled axes, columns of values over them, and the header that describes both."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from virtual_weights.errors import UsageError

if TYPE_CHECKING:
    from virtual_weights.record.record import Record

Value = float | int | str | bool | None
Values = Tensor | tuple[Value, ...]


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        groups = f"; groups: {len(set(self.groups))}" if self.groups else ""
        return one_line(f"Axis {self.name!r} ({len(self.labels)}){groups}: {shortened(self.labels)}")

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


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        shape = tuple(self.values.shape) if isinstance(self.values, Tensor) else (len(self.values),)
        unit, meaning = self.unit and f" [{self.unit}]", self.meaning and f": {self.meaning}"
        return one_line(f"Column {self.name!r}{unit}, {self.kind} {shape}{meaning}")

    @property
    def kind(self) -> str:
        """How files keep the values: ``"torch.<dtype>"``, ``"str"``, ``"bool"``, ``"int"``, ``"float"`` or ``"json"``.

        A tuple of one type besides None keeps that type; whatever is mixed is JSON text, value by value.
        """
        if isinstance(self.values, Tensor):
            return str(self.values.dtype)
        types = {type(value) for value in self.values if value is not None}
        if types == {int} and any(abs(value) >= 2**63 for value in self.values if isinstance(value, int)):
            return "json"
        if types == {float} and any(isinstance(value, float) and math.isnan(value) for value in self.values):
            return "json"  # in Parquet NaN and None would become the same NULL
        return types.pop().__name__ if len(types) == 1 else "json"


@dataclass(frozen=True)
class Described:
    """A column without its values.

    Attributes:
        name: its name.
        kind: how its values are kept, as of `Column.kind`.
        unit: its unit.
        meaning: its meaning.
    """

    name: str
    kind: str
    unit: str
    meaning: str

    @classmethod
    def of(cls, column: Column) -> Described:
        """What a column is without its values."""
        return cls(column.name, column.kind, column.unit, column.meaning)


@dataclass(frozen=True)
class Header:
    """A Record without its values, as files keep it in JSON.

    Attributes:
        question: name of the question.
        axes: the axes.
        columns: the columns without their values.
        parameters: the question's parameters.
        stamp: the conventions in force.
        provenance: the checkpoint.
    """

    question: str
    axes: tuple[Axis, ...]
    columns: tuple[Described, ...]
    parameters: Mapping[str, Any]
    stamp: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @classmethod
    def of(cls, record: Record, **more: Any) -> Self:
        """The header of a Record; ``more`` are the fields that a subclass adds."""
        columns = tuple(map(Described.of, record.columns))
        plain = (dict(record.parameters), dict(record.stamp), dict(record.provenance))
        return cls(record.question, record.axes, columns, *plain, **more)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The header that ``to_json`` wrote.

        Raises:
            ValueError: the text is not JSON, or a field is missing or of another type.
        """
        try:
            return cls.of_fields(json.loads(text))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The header of plain values.

        Raises:
            ValueError: a field is missing or of another type.
        """
        try:
            plain: dict[str, Any] = {f.name: fields[f.name] for f in dataclasses.fields(cls)}
            axes = tuple(Axis(a["name"], tuple(a["labels"]), tuple(a["groups"])) for a in plain.pop("axes"))
            columns = (Described(c["name"], c["kind"], c["unit"], c["meaning"]) for c in plain.pop("columns"))
            header = cls(axes=axes, columns=tuple(columns), **plain)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a field is missing or of another type: {error!r}") from error
        if any(len(axis.groups) not in (0, len(axis.labels)) for axis in header.axes):
            raise ValueError("an axis has groups for some labels only")
        return header

    def to_json(self) -> str:
        """The header as strict JSON.

        Raises:
            UsageError: a parameter, the stamp or the provenance is not plain JSON.
        """
        try:
            return json.dumps(_fields(self), allow_nan=False, default=_fields)  # indented, it would be ten times slower
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"what describes this record cannot be written as JSON: {error}",
                expected="parameters, stamp and provenance of finite numbers, text, true, false, null, lists, objects",
                do="pass plain values",
            ) from None

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis."""
        return tuple(len(axis.labels) for axis in self.axes)


def _fields(part: Any) -> dict[str, Any]:
    """A part of a header, its fields as they are."""
    if not dataclasses.is_dataclass(part):
        raise TypeError(f"{type(part).__name__} is not plain JSON")
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}


def shortened(names: tuple[str, ...], n: int = 4) -> str:
    """The first of some names, with dots where there are more."""
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def one_line(text: str) -> str:
    """A line of a repr: at most 120 columns, with control characters escaped."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= 120 else f"{text[:117]}..."
