"""A Record: the answer to a question, as labelled columns over labelled axes."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.record.axes import Axis, Column, Header, Value, Values, one_line
from virtual_weights.record.table import arrow_stream, load_parquet, save_parquet, to_frame

if TYPE_CHECKING:
    from pandas import DataFrame

Named = TypeVar("Named", Axis, Column)
SIZES = ("strength", "dimensions")
"""Columns that tell what reads or writes nothing (0, without a score) from what cannot be (NaN)."""
_COMPLETED = 100_000  # entries up to which a shell offers the labels of rows


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """The typed result of a question; nothing in it changes after construction.

    Attributes:
        question: name of the question, e.g. ``"composition"``.
        axes: the axes that every column runs over, outermost first.
        columns: the quantities.
        parameters: the question's own parameters, plain JSON values.
        stamp: conventions in force: norm folding, rotary offset, gauge, dtype.
        provenance: checkpoint reference and fingerprint, package version.

    A record over two axes is a matrix per column (readers by writers); over one axis it is a table.
    A pair that cannot reach is NaN in every column of the matrix and no row in the table. A pair of which one side
    reads or writes nothing has a row, with strength 0 and without a score (None).
    """

    question: str
    axes: tuple[Axis, ...]
    columns: tuple[Column, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stamp: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(len(axis.labels) for axis in self.axes)
        for column in self.columns:
            found = tuple(column.values.shape) if isinstance(column.values, Tensor) else (len(column.values),)
            assert found == shape, f"column {column.name!r} has shape {found}, axes have {shape}"
            complex_ = isinstance(column.values, Tensor) and column.values.is_complex()
            assert not complex_, f"column {column.name!r} is complex: give its parts or its modulus and angle"
        for axis in self.axes:
            assert len(axis.groups) in (0, len(axis.labels)), f"axis {axis.name!r} has groups for some labels only"
        names = [item.name for item in self.axes] + [item.name for item in self.columns]
        assert len(set(names)) == len(names), f"names of axes and columns repeat: {names}"

    def axis(self, name: str) -> Axis:
        """The axis called ``name``."""
        return _named(self.axes, name, "axis")

    def column(self, name: str) -> Column:
        """The column called ``name``."""
        return _named(self.columns, name, "column")

    @overload
    def __getitem__(self, name: str) -> Values: ...
    @overload
    def __getitem__(self, name: tuple[str, ...]) -> dict[str, Value]: ...
    def __getitem__(self, name: str | tuple[str, ...]) -> Values | dict[str, Value]:
        """The values of the column called ``name``; of a label of every axis, the row, as ``rows()`` gives it.

        ``record["L16H0", "L18H6.K"]`` is innermost axis first (writer, reader); the other order is understood too. A
        reader's port may be left out where the record was asked for one. Tables of edges are asked in the same way.

        Raises:
            UsageError: there is no such column or label, or nothing at this place, or what is named is no text.
        """
        return self.column(name).values if isinstance(name, str) else self._row(name)

    def _row(self, labels: Any) -> dict[str, Value]:
        names = self._names()
        expected = f"a label of each: {', '.join(name for name, _ in reversed(names))}"
        if not isinstance(labels, tuple) or not all(isinstance(label, str) for label in labels):  # pyright: ignore
            do = "name a column or labels; list(record.rows()) has rows by their place"
            raise UsageError(f"record[{labels!r}]", expected=f"the name of a column, or {expected}", do=do)
        absent = False
        for order in (names[::-1], names):
            flat = self._place(order, labels) if len(labels) == len(names) else None
            if flat is not None and bool(self.present()[flat]):
                shape = tuple(len(axis.labels) for axis in self.axes)
                values = {c.name: _absent(_at(c.values, flat)) for c in self.columns}
                return {**self._labels(flat, shape), **values}
            absent = absent or flat is not None
        known = list(dict.fromkeys(str(label) for _, column in names for label in column))
        unknown = [label for label in labels if not {label, f"{label}.{self.parameters.get('port')}"} & {*known}]
        near = [f"{label!r}: {get_close_matches(label, known) or known[:4]}" for label in unknown]
        names_like_it = f"names like it, {'; '.join(near)}" if near else "list what it has with record.rows()"
        raise UsageError(
            f"this record has {'no value' if absent else 'no row'} at {', '.join(labels)}",
            expected=expected,
            do="the first cannot reach the second" if absent else names_like_it,
        )

    def _names(self) -> list[tuple[str, tuple[Value, ...]]]:
        """What a row is found by: the labels of its axes; in a table of edges, reader and writer of every row."""
        ends = [(c.name, c.values) for name in ("reader", "writer") for c in self.columns if c.name == name]
        if len(self.axes) == 1 and len(ends) == 2:
            return [(name, values) for name, values in ends if isinstance(values, tuple)]
        return [(axis.name, axis.labels) for axis in self.axes]

    def _place(self, names: Sequence[tuple[str, tuple[Value, ...]]], labels: tuple[str, ...]) -> int | None:
        """The flat place of a row, with labels in the order of the names, with or without the port asked for."""
        found = [{label, f"{label}.{self.parameters.get('port')}"} for label in labels]
        if len(self.axes) != len(names):  # a table of edges
            rows = zip(*(column for _, column in names), strict=True)
            return next((i for i, row in enumerate(rows) if all(map(lambda v, of: v in of, row, found))), None)
        place = dict(zip((name for name, _ in names), found, strict=True))
        flat = 0
        for axis in self.axes:
            i = next((i for i, label in enumerate(axis.labels) if label in place[axis.name]), None)
            if i is None:
                return None
            flat = flat * len(axis.labels) + i
        return flat

    def numbers(self, name: str) -> Tensor:
        """The values of a numeric column in float64, absent ones NaN.

        Raises:
            UsageError: there is no such column, or it holds text.
        """
        return self._numbers(name)[1].detach().double()

    def __len__(self) -> int:
        return int(self.present().sum())

    def __bool__(self) -> bool:
        return True  # an answer without rows is an answer

    def __iter__(self) -> Iterator[dict[str, Value]]:
        return self.rows()

    def __eq__(self, other: object) -> bool:
        """Equal in question, parameters, stamp and axes, and in columns where an entry is present; NaN equals NaN.

        Provenance does not count, nor what a column holds at an absent entry.
        """
        if not isinstance(other, Record):
            return NotImplemented
        mine, theirs = (
            (r.question, dict(r.parameters), dict(r.stamp), r.axes, [(c.name, c.unit, c.meaning) for c in r.columns])
            for r in (self, other)
        )
        present = self.present()
        if mine != theirs or not torch.equal(present, other.present()):
            return False
        order = present.nonzero().flatten()
        columns = zip(self.columns, other.columns, strict=True)
        return all(_equal(_pick(a.values, order), _pick(b.values, order)) for a, b in columns)

    def __hash__(self) -> int:
        return hash((self.question, self.axes, tuple(column.name for column in self.columns)))

    def __repr__(self) -> str:
        axes = " x ".join(f"{axis.name} ({len(axis.labels)})" for axis in self.axes)
        columns = ", ".join(f"{c.name} [{c.unit}]" if c.unit else c.name for c in self.columns)
        numeric = any(isinstance(c.values, Tensor) for c in self.columns)
        rows = list(islice((self.top(5) if numeric and len(self.axes) > 1 else self).rows(), 5))
        table = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)] if rows else []
        widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        head = [f"Record {self.question!r} over {axes}, {len(self)} rows", f"columns: {columns}"]
        return "\n".join(map(one_line, head + lines))

    def _ipython_key_completions_(self) -> list[str | tuple[str, ...]]:
        names = [name for name, _ in reversed(self._names())]
        rows = self.rows() if len(names) > 1 and self.size <= _COMPLETED else ()
        return [*(column.name for column in self.columns), *(tuple(str(row[name]) for name in names) for row in rows)]

    @property
    def size(self) -> int:
        """How many entries there are, absent ones too."""
        return math.prod(len(axis.labels) for axis in self.axes)

    def present(self) -> Tensor:
        """Which entries are there, flat, in row order: those with a number as first float or in one of ``SIZES``."""
        tensors = [(c.name, c.values) for c in self.columns if isinstance(c.values, Tensor)]
        floats = [(name, values) for name, values in tensors if values.is_floating_point()]
        present = torch.full((self.size,), not floats)
        for _, values in (*floats[:1], *(pair for pair in floats if pair[0] in SIZES)):
            present |= ~torch.isnan(values.detach().flatten().cpu())
        return present

    def rows(self) -> Iterator[dict[str, Value]]:
        """Every entry that is present as a dictionary: axis labels, groups where shared, column values.

        A value that is not finite is None.
        """
        shape = tuple(len(axis.labels) for axis in self.axes)
        lists = [(c.name, _flat(c.values)) for c in self.columns]
        for flat, there in enumerate(self.present().tolist()):
            if there:
                yield {**self._labels(flat, shape), **{name: _absent(column[flat]) for name, column in lists}}

    def _labels(self, flat: int, shape: tuple[int, ...]) -> dict[str, Value]:
        place: dict[str, Value] = {}
        for axis, size in zip(reversed(self.axes), reversed(shape), strict=True):
            flat, i = divmod(flat, size)
            if axis.groups:
                place[f"{axis.name}_group"] = axis.groups[i]
            place[axis.name] = axis.labels[i]
        return dict(reversed(place.items()))  # outermost axis first, its group after it

    def top(self, n: int = 10, by: str | None = None, *, largest: bool = True) -> Record:
        """The ``n`` entries with the largest (or smallest) value of ``by``, as a table.

        Args:
            n: how many at most; absent (NaN) entries never count.
            by: a numeric column; the first one when None.
            largest: False for the smallest.

        Returns:
            A Record over one axis ``"place"`` whose columns are the axis labels and all columns; equal
            values keep their order in the record. The places of an earlier ``top`` give way. The cut
            is told in its parameters (``top``, ``by``, ``largest``).

        Raises:
            UsageError: there is no such column, or it holds text.
        """
        name, values = self._numbers(by)
        flat = values.detach().flatten().cpu().double()
        order = torch.argsort(flat, descending=largest, stable=True)
        order = order[~torch.isnan(flat[order])][: max(n, 0)]
        shape = tuple(len(axis.labels) for axis in self.axes)
        places = [self._labels(int(i), shape) for i in order]
        named = self._labels(0, shape) if self.size else [axis.name for axis in self.axes]
        labels = tuple(Column(k, tuple(place[k] for place in places)) for k in named if k != "place")
        picked = tuple(Column(c.name, _pick(c.values, order), c.unit, c.meaning) for c in self.columns)
        place = Axis("place", tuple(str(i + 1) for i in range(len(order))))
        cut = {**self.parameters, "top": n, "by": name, "largest": largest}
        return Record(self.question, (place,), labels + picked, cut, self.stamp, self.provenance)

    def select(self, axis: str, labels: Iterable[str]) -> Record:
        """The same record with some entries of one axis, in the order asked for.

        Args:
            axis: name of the axis.
            labels: labels to keep.

        Raises:
            UsageError: there is no such axis or label.
        """
        own = self.axis(axis)
        place = {label: i for i, label in enumerate(own.labels)}
        wanted = tuple(labels)
        at = torch.tensor([place[label] if label in place else own.index(label) for label in wanted], dtype=torch.int64)
        kept = Axis(own.name, wanted, tuple(own.groups[int(i)] for i in at) if own.groups else ())
        along = self.axes.index(own)
        columns = tuple(replace(column, values=_along(column.values, along, at)) for column in self.columns)
        axes = tuple(kept if each is own else each for each in self.axes)
        return replace(self, axes=axes, columns=columns)

    def _numbers(self, name: str | None) -> tuple[str, Tensor]:
        numeric = [(c.name, c.values) for c in self.columns if isinstance(c.values, Tensor)]
        if name is None and numeric:
            return numeric[0]
        values = None if name is None else self.column(name).values
        if name is None or not isinstance(values, Tensor):
            raise UsageError(
                "this record has no numbers" if name is None else f"column {name!r} holds text, not numbers",
                expected=f"one of {[each for each, _ in numeric]}",
                do="name a numeric column",
            )
        return name, values

    def to_json(self) -> str:
        """The record as one JSON object: question, parameters, stamp, provenance and rows."""
        return json.dumps(
            {
                "question": self.question,
                "parameters": dict(self.parameters),
                "stamp": dict(self.stamp),
                "provenance": dict(self.provenance),
                "rows": list(self.rows()),
            },
            allow_nan=False,
        )

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The rows for whatever takes Arrow data: ``polars.DataFrame(record)``, ``pyarrow.table(record)``, DuckDB."""
        return arrow_stream(self, requested_schema)

    def to_pandas(self) -> DataFrame:
        """The rows as a pandas DataFrame; question, parameters, stamp and provenance are in its ``attrs``.

        Raises:
            UsageError: pandas is not installed.
        """
        return to_frame(self)

    def to_parquet(self, path: str | Path) -> None:
        """Write the rows as a Parquet file, from which ``from_parquet`` makes the same record again.

        Whatever else the record holds is in the file's metadata, as JSON under ``virtual_weights``.

        Args:
            path: the file to write; an existing one is replaced.

        Raises:
            UsageError: its folder does not exist, an axis repeats a label, or a parameter is not plain JSON.
        """
        save_parquet(self, path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> Record:
        """The record that ``to_parquet`` wrote; an entry without a row is NaN, in columns without NaN 0 or None.

        Raises:
            RecordError: there is no such file, ``to_parquet`` did not write it, or it has been altered.
        """
        return record_of(*load_parquet(path))

    def _repr_html_(self) -> str:
        """A table for notebooks: the first twenty entries, of a matrix the twenty with the largest first column."""
        numeric = any(isinstance(c.values, Tensor) for c in self.columns)
        shown = list((self.top(20) if numeric and len(self.axes) > 1 else self).rows())[:20]
        if not shown:
            return f"<p>{html.escape(self.question)}: no entries</p>"
        head = "".join(f"<th>{html.escape(str(name))}</th>" for name in shown[0])
        body = "".join("<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row.values()) + "</tr>" for row in shown)
        caption = html.escape(f"{self.question} · " + ", ".join(f"{k}={v}" for k, v in self.parameters.items()))
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def record_of(header: Header, values: Sequence[Values]) -> Record:
    """A Record from its header and the values of its columns."""
    columns = tuple(Column(c.name, v, c.unit, c.meaning) for c, v in zip(header.columns, values, strict=True))
    return Record(header.question, header.axes, columns, header.parameters, header.stamp, header.provenance)


def _named(items: tuple[Named, ...], name: str, kind: str) -> Named:
    for item in items:
        if item.name == name:
            return item
    raise UsageError(
        f"this record has no {kind} {name!r}",
        expected=f"one of {', '.join(item.name for item in items)}",
        do=f"choose one of these {kind} names",
    )


def _flat(values: Values) -> list[Value]:
    return values.detach().flatten().tolist() if isinstance(values, Tensor) else list(values)


def _equal(a: Values, b: Values) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.detach().cpu(), b.detach().cpu()
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _at(values: Values, flat: int) -> Value:
    return values.detach().flatten()[flat].item() if isinstance(values, Tensor) else values[flat]


def _pick(values: Values, order: Tensor) -> Values:
    if isinstance(values, Tensor):
        return values.detach().flatten()[order.to(values.device)]
    return tuple(values[int(i)] for i in order)


def _along(values: Values, axis: int, at: Tensor) -> Values:
    if isinstance(values, Tensor):
        return values.index_select(axis, at.to(values.device))
    return tuple(values[int(i)] for i in at)


def _absent(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
