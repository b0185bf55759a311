"""Vectors of features as they lie in files: by rows, by columns, or as planes of a stack; read when they are used."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Rows
from virtual_weights.checkpoint.folder import MAX_CONFIG, MAX_CONFIG_ITEMS, pin_inside, read_json_object
from virtual_weights.checkpoint.safetensors_source import open_safetensors_file
from virtual_weights.checkpoint.source import Opening, Source
from virtual_weights.errors import CheckpointError, MalformedCheckpointError, MissingTensorError, UnsafeCheckpointError

_VALUES_AT_ONCE = 1 << 24  # 64 MiB in float32
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

Layout = Literal["rows", "columns", "row planes", "column planes", "row slots"]
"""``(F, d)``; ``(d, F)``; ``(n, F, d)``; ``(n, d, F)``; ``(F, n, d)``: in the last three, one of n is meant."""

_AXES: dict[Layout, tuple[int, int]] = {
    "rows": (0, 1),
    "columns": (1, 0),
    "row planes": (1, 2),
    "column planes": (2, 1),
    "row slots": (0, 2),
}
"""Which axes of a tensor are F and d."""


@final
@dataclass(frozen=True, eq=False)
class Table:
    """The vectors (F, d) of all features, read anew whenever some are asked for.

    Only where features come first are no more bytes read than asked for; columns cost the whole tensor in bounded
    pieces, planes their plane.

    Attributes:
        source, name: the tensor.
        layout: of the tensor.
        features, width: F and d.
        index: which plane or slot.
        factor: all vectors come times this, in float64 unless it is 1.
        factors: (F,), by which each feature's vector is multiplied besides; None for none.
    """

    source: Source
    name: str
    layout: Layout
    features: int
    width: int
    index: int = 0
    factor: float = 1.0
    factors: Tensor | None = None

    def __call__(self, rows: slice) -> Tensor:
        """The vectors of a contiguous range of features, (n, d)."""
        start, stop, _ = rows.indices(self.features)
        if self.layout == "rows":
            vectors = self.source.read(self.name, slice(start, stop))
        elif self.layout == "row slots":
            vectors = self.source.read(self.name, slice(start, stop))[:, self.index]
        elif self.layout == "row planes":
            vectors = self.source.read(self.name, slice(self.index, self.index + 1))[0, start:stop]
        else:
            pieces = [piece[:, start:stop] for _, piece in self._pieces()]
            vectors = torch.cat(pieces).T
        if self.factor != 1:
            vectors = vectors.double() * self.factor
        return vectors if self.factors is None else vectors.double() * self.factors[start:stop, None]

    def product(self, vector: Tensor) -> Tensor:
        """The inner product of every feature's vector with one of (d,), in float64, (F,); without ``factors``."""
        vector = vector.double() * self.factor
        result = torch.zeros(self.features, dtype=torch.float64)
        for begin, piece in self._pieces():
            if self._by_columns:
                result += vector[begin : begin + len(piece)] @ piece.double()
            else:
                result[begin : begin + len(piece)] = piece.double() @ vector
        return result

    def squared_norms(self) -> Tensor:
        """Of every feature's vector, in float64, (F,); without ``factors``."""
        result = torch.zeros(self.features, dtype=torch.float64)
        for begin, piece in self._pieces():
            squares = piece.double().square() * self.factor**2
            if self._by_columns:
                result += squares.sum(0)
            else:
                result[begin : begin + len(piece)] = squares.sum(1)
        return result

    def times(self, factor: float) -> Table:
        """The same vectors times a factor."""
        return replace(self, factor=self.factor * factor)

    def scaled(self, factors: Tensor) -> Table:
        """The same vectors, each feature's times a factor of its own, (F,)."""
        return replace(self, factors=factors if self.factors is None else self.factors * factors)

    def at(self, index: int) -> Table:
        """The vectors in another plane or slot of the same tensor."""
        return replace(self, index=index)

    def shape(self) -> tuple[int, int]:
        """(F, d)."""
        return self.features, self.width

    @property
    def _by_columns(self) -> bool:
        features, width = _AXES[self.layout]
        return width < features

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Begin and content of parts, along features (part, d), or along the width (part, F) where columns lie so."""
        if self.layout in ("row planes", "column planes"):
            plane = self.source.read(self.name, slice(self.index, self.index + 1))[0]
            yield from ((rows.start, plane[rows]) for rows in _ranges(len(plane), plane.shape[1]))
            return
        shape = self.source.tensors[self.name].shape
        for rows in _ranges(shape[0], math.prod(shape[1:])):
            piece = self.source.read(self.name, rows)
            yield rows.start, piece[:, self.index] if self.layout == "row slots" else piece


def _ranges(length: int, width: int) -> Iterator[slice]:
    step = max(1, _VALUES_AT_ONCE // max(1, width))
    return (slice(begin, min(begin + step, length)) for begin in range(0, length, step))


def joined(tables: Sequence[Table]) -> Rows:
    """The features of several tables, one after the other."""
    if len(tables) == 1:
        return tables[0]
    total = sum(table.features for table in tables)

    def read(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(total)
        parts, begin = list[Tensor](), 0
        for table in tables:
            first, last = max(start - begin, 0), min(stop - begin, table.features)
            if first < last:
                parts.append(table(slice(first, last)))
            begin += table.features
        return torch.cat(parts)

    return read


@final
@dataclass(frozen=True, eq=False)
class Tensors:
    """The tensors of one file of a dictionary, asked for with the shapes that they must have.

    Attributes:
        source: the file.
        where: its path, for messages.
    """

    source: Source
    where: str

    def __contains__(self, name: object) -> bool:
        return name in self.source.tensors

    def shape(self, name: str, *sizes: int | None) -> tuple[int, ...]:
        """The shape of a tensor of floating-point numbers; None allows any size.

        Raises:
            MissingTensorError: there is no such tensor.
            MalformedCheckpointError: it has another shape, a size of 0, or holds integers.
        """
        info = self.source.tensors.get(name)
        if info is None:
            others = ", ".join(sorted(self.source.tensors)[:12])
            raise MissingTensorError(
                f"there is no tensor {name!r} in {self.where!r} (it holds {others})",
                expected="every tensor of its format",
                do="fetch the file again; if it stays so, it is of another format or version",
            )
        agree = len(info.shape) == len(sizes) and all(s in (None, n) for s, n in zip(sizes, info.shape, strict=True))
        if not agree or 0 in info.shape or info.dtype not in _FLOATS:
            sizes_text = ", ".join("any" if size is None else str(size) for size in sizes)
            raise malformed(self.where, f"{name!r} is {info.dtype} {info.shape}", f"floating point ({sizes_text})")
        return info.shape

    def vector(self, name: str, size: int) -> Tensor:
        """A tensor (size,)."""
        self.shape(name, size)
        return self.source.read(name)

    def matrix(self, name: str, rows: int, columns: int) -> Tensor:
        """A tensor (rows, columns)."""
        self.shape(name, rows, columns)
        return self.source.read(name)

    def number(self, name: str) -> float:
        """The one value of a tensor, of whatever shape and type.

        Raises:
            MalformedCheckpointError: it has several values.
        """
        if name not in self:
            self.shape(name)
        if math.prod(self.source.tensors[name].shape) != 1:
            raise malformed(self.where, f"{name!r} has shape {self.source.tensors[name].shape}", "a single number")
        return float(self.source.read(name).reshape(-1)[0])

    def table(self, name: str, layout: Layout, features: int | None = None, width: int | None = None) -> Table:
        """The vectors in a tensor of this layout, of plane or slot 0; None takes the sizes that it has.

        Raises:
            CheckpointError: it is missing, or of another shape.
        """
        f, d = _AXES[layout]
        sizes: list[int | None] = [None] * (max(f, d) + 1)
        sizes[f], sizes[d] = features, width
        shape = self.shape(name, *sizes)
        return Table(self.source, name, layout, shape[f], shape[d])


def open_tensors(path: Path, settings: Mapping[str, Any] | None = None) -> Tensors:
    """Open a safetensors file of a dictionary; the settings count in its fingerprint."""
    return Tensors(open_safetensors_file(path, Opening(str(path), settings or {}, False)), str(path))


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a folder, of a sensible size."""
    return read_json_object(pin_inside(folder, name), MAX_CONFIG, MAX_CONFIG_ITEMS)


def numbers_in(names: Iterable[str], pattern: re.Pattern[str]) -> list[int]:
    """The numbers in those names of files that a pattern with one group describes, sorted."""
    return sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)


def inner_folder(folder: Path, name: str) -> Path:
    """A folder in a folder, which must not lead out of it.

    Raises:
        UnsafeCheckpointError: it is a link to somewhere else.
    """
    inner = folder / name
    if not inner.resolve().is_relative_to(folder.resolve()):
        raise UnsafeCheckpointError(
            f"{name!r} in {str(folder)!r} is a link to {str(inner.resolve())!r}",
            expected="a folder inside the folder",
            do="copy it there, or open what the link leads to by its own path",
        )
    return inner


def folded_bias(bias: Tensor | None, encoder: Table, subtracted: Tensor) -> Tensor | None:
    """The bias of an encoder that reads x as it is, where the file subtracts a vector from it: ``b - W_enc v``."""
    if not bool(subtracted.any()):
        return bias
    shift = encoder.product(subtracted)
    return -shift if bias is None else bias.double() - shift


def unscaled(offset: Tensor | None, factor: float) -> Tensor | None:
    """What a decoder adds where its output is divided by a factor."""
    return offset if offset is None or factor == 1 else offset.double() / factor


def gated_activation(
    tensors: Tensors, bias_name: str, encoder: Table, gate_bias: Tensor | None, subtracted: Tensor | None
) -> Activation:
    """The activation of a gate and of a magnitude ``exp(r_mag) W_enc (x - v) + b_mag``, from the gate's pre-activation.

    With t the shift ``W_enc v`` the magnitude is ``exp(r_mag) (W_enc x - t) + b_mag``, and an activation computes
    ``scale (gate - offset) + shift`` with offset the gate's bias, hence shift = b_mag - exp(r_mag) t.

    Args:
        tensors: with ``r_mag``.
        bias_name: of b_mag.
        encoder: W_enc.
        gate_bias: as it is folded.
        subtracted: v; None where nothing.
    """
    scale = tensors.vector("r_mag", encoder.features).double().exp()
    shift = tensors.vector(bias_name, encoder.features)
    if subtracted is not None and bool(subtracted.any()):
        shift = shift.double() - scale * encoder.product(subtracted)
    return Activation("gated", scale=scale, offset=gate_bias, shift=shift)


def refuse_factor(tensors: Tensors, name: str, save: str) -> None:
    """Refuse a tensor of factors of the activations that are not all 1.

    Args:
        tensors: of the dictionary.
        name: of the factors, which need not be there.
        save: what to do once they are in the decoder.

    Raises:
        CheckpointError: there are such factors.
    """
    if name in tensors and not bool((tensors.source.read(name) == 1).all()):
        raise unsupported(
            tensors.where,
            f"scales its activations by {name!r} before they are decoded",
            "no such factor, or ones",
            f"multiply W_dec by it row by row, and {save} without it",
        )


def switch_setting(where: str, name: str, value: object) -> bool:
    """A setting that must be true or false.

    Raises:
        MalformedCheckpointError: it is something else.
    """
    if not isinstance(value, bool):
        raise malformed(where, f"{name} is {value!r}", "true or false")
    return value


def count_setting(where: str, name: str, value: object, most: int) -> int:
    """A setting that must be a whole number from 1 to ``most``.

    Raises:
        MalformedCheckpointError: it is missing (None) or something else.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise malformed(where, f"{name} is {value!r}", f"a whole number from 1 to {most:,}")
    return value


def malformed(where: str, what: str, expected: str, do: str | None = None) -> MalformedCheckpointError:
    """The error of a dictionary's file that contradicts its format."""
    again = "fetch it again; if it stays so, it was written wrongly, or by a version whose files this does not read"
    return MalformedCheckpointError(f"in the dictionary {where!r}, {what}", expected=expected, do=do or again)


def unsupported(where: str, what: str, expected: str, do: str) -> CheckpointError:
    """The error of a dictionary that is sound and computes what no ``DictionaryPart`` can say."""
    return CheckpointError(f"the dictionary {where!r} {what}", expected=expected, do=do)
