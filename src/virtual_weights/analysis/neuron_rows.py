"""Single neurons as unit vectors of the stream: what each reads through a port, or what it writes, by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.sides import parts_reading
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.stream import Stream

NeuronPort = Literal["in", "up", "gate"]
NEURON_PORTS: tuple[NeuronPort, ...] = ("in", "up", "gate")


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """The neurons of one layer.

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

    def alive(self) -> Rows:
        """Only the neurons that have a direction."""
        at = ((self.norms > 0) & self.norms.isfinite()).nonzero()[:, 0]
        return Rows(self.number[at], self.position, self.unit[at], self.norms[at])


@final
@dataclass(frozen=True)
class Place:
    """Where the neurons of one layer are: ``neurons`` of the layer, numbered from ``first`` among all of the side."""

    layer: int
    position: int
    neurons: slice
    first: int


@final
@dataclass(frozen=True, eq=False)
class NeuronSide:
    """All neurons of a model, or a single one, as readers of a port or as writers (``"out"``).

    Attributes:
        stream: the model.
        port: ``"in"``, ``"up"``, ``"gate"`` or ``"out"``.
        labels: their names, in order of depth.
        places: their layers, in order of depth.
    """

    stream: Stream
    port: NeuronPort | Literal["out"]
    labels: tuple[str, ...]
    places: tuple[Place, ...]

    def load(self, place: Place, device: str) -> Rows:
        """The neurons of one layer; nothing of it is kept."""
        if self.port == "out":
            rows = self.stream.write("mlp", place.layer)[0].T[place.neurons]
        else:
            rows = self.stream.read(self.port, place.layer).maps[0, place.neurons]
        rows = rows.to(device)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=accumulate)
        number = torch.arange(place.first, place.first + len(rows), device=device)
        return Rows(number, place.position, rows.float() / norms[:, None].float(), norms)

    def groups(self, memory: int) -> Iterator[tuple[Place, ...]]:
        """Consecutive layers whose directions fit into so many bytes together, at least one at a time."""
        each = 4 * self.stream.d_model * max(1, self.stream.spec.d_mlp)
        step = max(1, memory // each)
        return (self.places[i : i + step] for i in range(0, len(self.places), step))


def neuron_side(stream: Stream, port: NeuronPort | Literal["out"], only: str | None = None) -> NeuronSide:
    """All neurons on one side, or only the one of this name.

    Raises:
        UsageError: the model has no such port or neuron, or the checkpoint holds no MLP.
    """
    width, reads = stream.spec.d_mlp, port != "out"
    mlps = parts_reading(stream, port) if port != "out" else [c for c in stream.components if c.kind == "mlp"]
    if not mlps:
        raise UsageError("this checkpoint holds no MLP", expected="at least one", do="open the complete checkpoint")
    places: list[Place] = []
    labels: list[str] = []
    for c in mlps:
        position = c.reads if reads else c.writes
        assert c.label.layer is not None
        assert position is not None
        names = [f"L{c.label.layer}N{i}" for i in range(width)]
        if only is None:
            places.append(Place(c.label.layer, position, slice(0, width), len(labels)))
            labels += names
        elif only in names:
            at = names.index(only)
            return NeuronSide(stream, port, (only,), (Place(c.label.layer, position, slice(at, at + 1), 0),))
    if only is not None:
        raise UsageError(
            f"this model has no neuron {only!r}",
            expected=f"a name from L{mlps[0].label.layer}N0 to L{mlps[-1].label.layer}N{width - 1}",
            do="correct the name, or leave its port out",
        )
    return NeuronSide(stream, port, tuple(labels), tuple(places))


def check_neuron_port(port: str) -> None:
    """Refuse what no neuron reads through."""
    if port not in NEURON_PORTS:
        raise UsageError(
            f"no neuron reads through port {port!r}", expected=", ".join(NEURON_PORTS), do="choose one of these ports"
        )
