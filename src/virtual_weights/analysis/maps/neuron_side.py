"""Single neurons and features as readers and writers: unit directions and lengths, one MLP or dictionary at a time."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.stream import Group, Stream, centred
from virtual_weights.stream.group import NEURON_PORTS, NO_END, NeuronPort, no_mlps, spans

Units = Literal["all", "neurons", "features"]
UNITS: tuple[Units, ...] = ("all", "neurons", "features")
_PIECE = 8192  # neurons at once, of MLPs that have more


@final
@dataclass(frozen=True, eq=False)
class NeuronRows:
    """The neurons of one range.

    Attributes:
        number: (n,) where each stands among the neurons of its side.
        position: the state of the stream that they read, or in which they first appear.
        unit: (n, d) float32, directions of length 1; NaN where a neuron reads or writes nothing.
        norms: (n,) float64, the lengths taken away.
        end: the state from which others stand for the same neurons.
    """

    number: Tensor
    position: int
    unit: Tensor
    norms: Tensor
    end: int = NO_END

    def nonzero(self) -> NeuronRows:
        """Only the neurons that have a direction."""
        rows = ((self.norms > 0) & self.norms.isfinite()).nonzero()[:, 0]
        if len(rows) == len(self.norms):
            return self
        return NeuronRows(self.number[rows], self.position, self.unit[rows], self.norms[rows], self.end)


@final
@dataclass(frozen=True)
class NeuronRange:
    """Some neurons of one MLP, or features of one dictionary: a slice of them, numbered from ``first`` on their side.

    What a cross-layer dictionary has written grows with depth: there is one range, of the same numbers, for each span
    of states in which it stays the same.
    """

    name: str
    mlp: Group
    position: int
    neurons: slice
    first: int
    end: int = NO_END

    @property
    def grows(self) -> bool:
        """Whether it is one of several that stand for the same writers."""
        return len(self.mlp.writes) > 1

    def meets(self, other: NeuronRange) -> bool:
        """Whether what these write is there, and in this form, in the state that others read."""
        return self.position <= other.position < self.end

    @property
    def count(self) -> int:
        """How many neurons."""
        return self.neurons.stop - self.neurons.start

    @property
    def numbers(self) -> slice:
        """Their numbers."""
        return slice(self.first, self.first + self.count)


@final
@dataclass(frozen=True, eq=False)
class NeuronSide:
    """All neurons of a model, or a single one, as readers of a port or as writers (``"out"``); features with them.

    Attributes:
        stream: the model.
        port: ``"in"``, ``"up"``, ``"gate"``, ``"enc"`` or ``"out"``.
        ranges: MLPs in order of depth and then dictionaries, wide ones in several pieces.
    """

    stream: Stream
    port: NeuronPort | Literal["out"]
    ranges: tuple[NeuronRange, ...]

    @property
    def count(self) -> int:
        """How many neurons."""
        return sum(part.count for part in self.first_ranges)

    @property
    def first_ranges(self) -> tuple[NeuronRange, ...]:
        """One range for every number: of a cross-layer dictionary what it writes first."""
        return tuple(part for part in self.ranges if self.port != "out" or part.position == part.mlp.first)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Their names, in order of their numbers; of readers with the port."""
        return self.names(self.first_ranges)

    def names(self, parts: Iterable[NeuronRange]) -> tuple[str, ...]:
        """The names of the neurons of some ranges; of readers with the port."""
        end = "" if self.port == "out" else f".{self.port}"
        names = {part.mlp.id: part.mlp.neurons for part in self.ranges}
        return tuple(f"{name}{end}" for part in parts for name in names[part.mlp.id][part.neurons])

    def name_of(self, number: int) -> str:
        """The name of one neuron by its number."""
        parts = self.first_ranges
        part = parts[bisect([part.first for part in parts], number) - 1]
        at = part.neurons.start + number - part.first
        stem = f"L{part.mlp.layer}N" if part.mlp.kind == "mlp" else f"{part.mlp.id}:F"
        return f"{stem}{at}" if self.port == "out" else f"{stem}{at}.{self.port}"

    @property
    def positions(self) -> Tensor:
        """(count,) the state that each neuron reads, or in which it first appears."""
        parts = self.first_ranges
        positions = torch.tensor([part.position for part in parts], dtype=torch.int64)
        return positions.repeat_interleave(torch.tensor([part.count for part in parts], dtype=torch.int64))

    def rows(self, part: NeuronRange) -> Tensor:
        """The vectors of one range, (n, d) as stored, read anew each time."""
        stream = self.stream
        if part.mlp.kind == "dictionary":
            features = stream.attached[part.mlp.id]
            if self.port == "out":
                return centred(stream, features.write(stream, part.position, part.neurons)[0].T, -1, stream.dtype)
            return features.read(stream, part.neurons).maps[0]
        if self.port == "out":
            return self.stream.write(part.mlp)[0].T[part.neurons]
        return self.stream.read(self.port, part.mlp).maps[0, part.neurons]

    def load(self, part: NeuronRange, device: str) -> NeuronRows:
        """The neurons of one range as directions and lengths."""
        rows = self.rows(part).to(device).contiguous()
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulate)
        number = torch.arange(part.first, part.first + len(rows), device=device)
        return NeuronRows(number, part.position, rows.float() / norms[:, None].float(), norms, part.end)


def neuron_side(
    stream: Stream, port: NeuronPort | Literal["out"], only: str | None = None, units: Units = "all"
) -> NeuronSide:
    """All neurons on one side, or only the one of this name; as readers they bear the port, ``"L5N3.up"``.

    Writers are neurons and the features of attached dictionaries, or those of one kind.

    Raises:
        UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
    """
    mlps = stream.groups.readers(port) if port != "out" else ()
    if port == "out":
        mlps = (*stream.groups.mlps * (units != "features"), *stream.groups.dictionaries * (units != "neurons"))
    if not mlps:
        raise no_mlps()
    if only is not None and port != "out":
        only = only.removesuffix(f".{port}")
    ranges, first = list[NeuronRange](), 0
    for mlp in mlps:
        if only is not None and only in mlp.neurons:
            i = mlp.neurons.index(only)
            return NeuronSide(stream, port, tuple(_spans(mlp, port, slice(i, i + 1), 0)))
        for start in range(0, mlp.width, _PIECE):
            ranges.extend(_spans(mlp, port, slice(start, min(start + _PIECE, mlp.width)), first + start))
        first += mlp.width
    side = NeuronSide(stream, port, tuple(ranges))
    if only is not None:
        raise UsageError(
            f"this model has no neuron {only!r}",
            expected=f"a name from {side.labels[0]} to {side.labels[-1]}",
            do="correct the name, or leave its port out",
        )
    return side


def _spans(mlp: Group, port: str, neurons: slice, first: int) -> Iterator[NeuronRange]:
    """The ranges of the same neurons: one, but of a cross-layer dictionary that writes."""
    whole = mlp.width <= _PIECE or neurons.stop - neurons.start == 1
    name = mlp.id if whole else f"{mlp.id}.{neurons.start}"
    if port != "out":
        assert mlp.reads is not None
        yield NeuronRange(name, mlp, mlp.reads, neurons, first)
        return
    for begin, end in spans(mlp):
        yield NeuronRange(name if len(mlp.writes) == 1 else f"{name}@{begin}", mlp, begin, neurons, first, end)


def check_neuron_port(port: str) -> None:
    """Refuse what no neuron reads through."""
    if port not in NEURON_PORTS:
        raise UsageError(
            f"no neuron reads through port {port!r}", expected=", ".join(NEURON_PORTS), do="choose one of these ports"
        )
