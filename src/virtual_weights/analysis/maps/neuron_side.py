"""Single neurons as readers and writers: unit directions and lengths, one MLP at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.stream import Group, Stream
from virtual_weights.stream.group import NEURON_PORTS, NeuronPort, no_mlps

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
    """

    number: Tensor
    position: int
    unit: Tensor
    norms: Tensor

    def nonzero(self) -> NeuronRows:
        """Only the neurons that have a direction."""
        rows = ((self.norms > 0) & self.norms.isfinite()).nonzero()[:, 0]
        if len(rows) == len(self.norms):
            return self
        return NeuronRows(self.number[rows], self.position, self.unit[rows], self.norms[rows])


@final
@dataclass(frozen=True)
class NeuronRange:
    """Some neurons of one MLP: a slice of them, numbered from ``first`` among all of their side."""

    name: str
    mlp: Group
    position: int
    neurons: slice
    first: int

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
    """All neurons of a model, or a single one, as readers of a port or as writers (``"out"``).

    Attributes:
        stream: the model.
        port: ``"in"``, ``"up"``, ``"gate"`` or ``"out"``.
        ranges: their MLPs, in order of depth, wide ones in several pieces.
    """

    stream: Stream
    port: NeuronPort | Literal["out"]
    ranges: tuple[NeuronRange, ...]

    @property
    def count(self) -> int:
        """How many neurons."""
        return sum(part.count for part in self.ranges)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Their names, in order of depth; of readers with the port."""
        end = "" if self.port == "out" else f".{self.port}"
        names = {part.mlp.id: part.mlp.neurons for part in self.ranges}
        return tuple(f"{name}{end}" for part in self.ranges for name in names[part.mlp.id][part.neurons])

    @property
    def positions(self) -> Tensor:
        """(count,) the state that each neuron reads, or in which it first appears."""
        positions = torch.tensor([part.position for part in self.ranges])
        return positions.repeat_interleave(torch.tensor([part.count for part in self.ranges]))

    def rows(self, part: NeuronRange) -> Tensor:
        """The vectors of one range, (n, d) as stored, read anew each time."""
        if self.port == "out":
            return self.stream.write(part.mlp)[0].T[part.neurons]
        return self.stream.read(self.port, part.mlp).maps[0, part.neurons]

    def load(self, part: NeuronRange, device: str) -> NeuronRows:
        """The neurons of one range as directions and lengths."""
        rows = self.rows(part).to(device).contiguous()
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulate)
        number = torch.arange(part.first, part.first + len(rows), device=device)
        return NeuronRows(number, part.position, rows.float() / norms[:, None].float(), norms)


def neuron_side(stream: Stream, port: NeuronPort | Literal["out"], only: str | None = None) -> NeuronSide:
    """All neurons on one side, or only the one of this name; as readers they bear the port, ``"L5N3.up"``.

    Raises:
        UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
    """
    mlps = stream.groups.mlps if port == "out" else stream.groups.readers(port)
    if not mlps:
        raise no_mlps()
    if only is not None and port != "out":
        only = only.removesuffix(f".{port}")
    ranges, first = list[NeuronRange](), 0
    for mlp in mlps:
        position = mlp.first if port == "out" else mlp.reads
        assert position is not None
        if only is not None and only in mlp.neurons:
            i = mlp.neurons.index(only)
            return NeuronSide(stream, port, (NeuronRange(mlp.id, mlp, position, slice(i, i + 1), 0),))
        for start in range(0, mlp.width, _PIECE):
            neurons = slice(start, min(start + _PIECE, mlp.width))
            name = mlp.id if mlp.width <= _PIECE else f"{mlp.id}.{start}"
            ranges.append(NeuronRange(name, mlp, position, neurons, first + start))
        first += mlp.width
    side = NeuronSide(stream, port, tuple(ranges))
    if only is not None:
        raise UsageError(
            f"this model has no neuron {only!r}",
            expected=f"a name from {side.labels[0]} to {side.labels[-1]}",
            do="correct the name, or leave its port out",
        )
    return side


def check_neuron_port(port: str) -> None:
    """Refuse what no neuron reads through."""
    if port not in NEURON_PORTS:
        raise UsageError(
            f"no neuron reads through port {port!r}", expected=", ".join(NEURON_PORTS), do="choose one of these ports"
        )
