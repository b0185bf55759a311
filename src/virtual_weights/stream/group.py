"""Components in order of depth, with the state of the stream they read and the one they write into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from virtual_weights.architecture import Model
from virtual_weights.stream.names import Kind, Label

HeadPort = Literal["Q", "K", "V"]
Port = Literal["Q", "K", "V", "gate", "up", "in", "unembed"]
Writers = Literal["heads", "all"]

HEAD_PORTS: tuple[HeadPort, ...] = ("Q", "K", "V")
PORTS: tuple[Port, ...] = (*HEAD_PORTS, "gate", "up", "in", "unembed")


@dataclass(frozen=True)
class Component:
    """A part of the model that reads from the stream, writes to it, or both.

    Positions count the states of the stream along depth: 0 is the embedding. A component reads
    state ``reads``; what it writes first appears in state ``writes``. A writer reaches a reader iff
    ``writer.writes <= reader.reads``.

    Attributes:
        channel: name of the key/value head it shares with others, None where it shares none.
    """

    label: Label
    reads: int | None
    writes: int | None
    channel: str | None = None

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.label.kind


def states(model: Model) -> int:
    """How many states the stream passes through, the embedding and the last one included."""
    return 1 + model.spec.n_layers * (1 if model.spec.parallel else 2)


def attention_reads(model: Model, layer: int) -> int:
    """The state that the attention of a layer reads."""
    return layer if model.spec.parallel else 2 * layer


def mlp_reads(model: Model, layer: int) -> int:
    """The state that the MLP of a layer reads: the attention's own in a parallel block, else the next."""
    return layer if model.spec.parallel else 2 * layer + 1


def components(model: Model) -> tuple[Component, ...]:
    """Every component that the checkpoint holds, in order of depth; neurons are not listed one by one."""
    found: list[Component] = [Component(Label(kind), None, 0) for kind in ("embed", "pos") if model.has(kind)]
    for layer in range(model.spec.n_layers):
        found += _attention(model, layer)
        found += _mlp(model, layer)
    if model.has("unembed"):
        found.append(Component(Label("unembed"), states(model) - 1, None))
    return tuple(found)


def channel_name(model: Model, layer: int, head: int) -> str | None:
    """Name of the key/value head that query head ``head`` uses; None where it has its own."""
    return f"L{layer}.kv{head // model.spec.group}" if model.spec.group > 1 else None


def _attention(model: Model, layer: int) -> list[Component]:
    if not model.has("o", layer):
        return []
    reads = attention_reads(model, layer)
    heads = [
        Component(Label("head", layer, head), reads, reads + 1, channel_name(model, layer, head))
        for head in range(model.spec.n_heads)
    ]
    if model.has("o_bias", layer):
        heads.append(Component(Label("attn_bias", layer), None, reads + 1))
    return heads


def _mlp(model: Model, layer: int) -> list[Component]:
    if not model.has("down", layer):
        return []
    reads = mlp_reads(model, layer)
    found = [Component(Label("mlp", layer), reads, reads + 1)]
    if model.has("down_bias", layer):
        found.append(Component(Label("mlp_bias", layer), None, reads + 1))
    return found
