"""Directions of the stream that are no part of the model: probes, steering vectors, rows of a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from virtual_weights.checkpoint import Source, open_source
from virtual_weights.errors import MalformedCheckpointError, MissingTensorError, UsageError
from virtual_weights.stream.stream import Stream


@final
@dataclass(frozen=True, eq=False)
class Vector:
    """One vector of the stream.

    Attributes:
        values: (d,), as they were given.
        name: how results call it.
        identity: a hex sha256 of values and name, by which two are the same vector.
    """

    values: Tensor
    name: str = "vector"
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        values = self.values.detach().to("cpu", torch.float64)
        if values.ndim != 1 or not len(values) or not bool(values.isfinite().all()) or not bool(values.any()):
            raise UsageError(
                f"{self.name} has shape {tuple(values.shape)}, or is not finite, or zero",
                expected="one vector (d,) of finite numbers that points somewhere",
                do="name one row of a file with several, or correct it",
            )
        object.__setattr__(self, "values", values)
        content = self.name.encode() + b"\0" + values.numpy().tobytes()
        object.__setattr__(self, "identity", f"{self.name}, sha256 {sha256(content).hexdigest()[:16]}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vector) and other.identity == self.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __repr__(self) -> str:
        return f"Vector {self.name} ({len(self.values)}), norm {float(self.values.norm()):.4g}"

    def of(self, stream: Stream) -> Tensor:
        """The values, (d,) float64.

        Raises:
            UsageError: it has another width than the stream.
        """
        if len(self.values) != stream.d_model:
            raise UsageError(
                f"{self.name} has {len(self.values)} coordinates",
                expected=f"{stream.d_model}, the width of this stream",
                do="take a vector that belongs to this model",
            )
        return self.values


def open_vector(path: str | Path, name: str | None = None, row: int | None = None) -> Vector:
    """A vector from a file: ``.npy``, ``.safetensors``, or a control vector in ``.gguf``.

    Args:
        path: the file.
        name: of the tensor, where there are several, such as ``"direction.12"`` or ``"W_dec"``.
        row: which row, of a tensor (k, d).

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: it holds several tensors or rows, or not the one that is named.

    Example:
        >>> open_vector("happy.gguf", "direction.12")  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    if path.suffix == ".npy":
        if name is not None:
            raise UsageError(
                f"tensor {name!r} of {path.name}", expected="no name: it holds one array", do="leave it out"
            )
        values, label = _array(path), path.stem
    else:
        source = open_source(path, config={})
        chosen = _chosen(source, path, name)
        values, label = source.read(chosen), f"{path.stem}:{chosen}" if name else path.stem
    if row is not None and (values.ndim != 2 or not 0 <= row < len(values)):
        raise UsageError(f"row {row} of a tensor {tuple(values.shape)}", expected="a row of (k, d)", do="correct it")
    if row is None and values.ndim == 2 and len(values) > 1:
        raise UsageError(
            f"{path.name} holds {len(values)} vectors", expected="the number of one row", do="name it: row=0, --row 0"
        )
    values = values if values.ndim == 1 else values[row or 0]
    return Vector(values, label if row is None else f"{label}[{row}]")


def _array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float64))
    except FileNotFoundError as error:
        raise MissingTensorError(f"there is no file {str(path)!r}", expected="a vector", do="check the path") from error
    except (OSError, ValueError, TypeError) as error:
        raise MalformedCheckpointError(
            f"{str(path)!r} is no array of numbers: {error}", expected="what numpy.save writes", do="save it again"
        ) from error


def _chosen(source: Source, path: Path, name: str | None) -> str:
    names: Sequence[str] = list(source.tensors)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        raise UsageError(
            f"{path.name} holds {len(names)} tensors" if name is None else f"{path.name} has no tensor {name!r}",
            expected=f"one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}",
            do="name one: name=..., --name NAME",
        )
    assert name is not None
    return name


def state_of(stream: Stream, place: str | int) -> int:
    """A state by its number, or by what reads it: ``"L12"`` (its first part), ``"L12.mlp"``, ``"unembed"``.

    Raises:
        UsageError: this model has no such state.
    """
    text = str(place)
    if text.isdecimal() and int(text) < stream.states:
        return int(text)
    reads = [g.reads for g in stream.groups if g.reads is not None and (g.id == text or g.id.startswith(f"{text}."))]
    if not reads:
        raise UsageError(
            f"no state {text!r} in this stream",
            expected=f"a number from 0 to {stream.states - 1}, or what reads it: L3, L3.mlp, unembed",
            do="correct it",
        )
    return min(reads)
