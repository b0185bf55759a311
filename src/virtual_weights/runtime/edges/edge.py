"""An edge: one writer, one port of one later reader, and what of the model's run belongs to each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.runtime.running.hooks import Kind
from virtual_weights.stream import Label, Stream, parse
from virtual_weights.stream.group import Port

Place = tuple[Kind, int]
"""What ``watching`` tells: a kind and its layer."""

_PORTS = {"head": "Q, K or V", "mlp": "gate, up or in", "neuron": "gate, up or in"}
ROLES: dict[Port, str] = {"Q": "q", "K": "k", "V": "v", "gate": "gate", "up": "up", "in": "up", "unembed": "unembed"}


@dataclass(frozen=True)
class Edge:
    """The direct edge of a writer into one port of a reader, and nothing else of either.

    Attributes:
        writer: a head, an MLP, a neuron or an embedding.
        reader: a head's ``Q``, ``K`` or ``V``, an MLP's or neuron's ``gate``, ``up`` or ``in``, or the unembedding.
        port: the reader's port.
        state: number of the state of the stream that the reader reads.
        channel: the shared key/value head that is the reader in truth, None where the reader is its own.
        shared_with: the other heads that read through it.
    """

    writer: Label
    reader: Label
    port: Port
    state: int
    channel: str | None = None
    shared_with: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``"L16H0 -> L18H6.K"``."""
        return f"{self.writer} -> {self.reader}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for edges that are one channel under several names."""
        return str(self.writer), self.channel or str(self.reader), self.port

    @classmethod
    def of(cls, stream: Stream, writer: str, reader: str) -> Edge:
        """The edge between two names, e.g. ``Edge.of(stream, "L16H0", "L18H6.K")``.

        Raises:
            UsageError: a name is no writer or no port of this model, the writer cannot reach the reader, or it writes
                the same at every token, so that its mean replaces nothing.
        """
        source, target = parse(writer), parse(reader)
        places = {c.label: c for c in stream.components}
        written = places.get(_whole(stream, source))
        read = places.get(_whole(stream, replace(target, port=None)))
        wanted = "unembed" if target.kind == "unembed" else target.port
        port: Port | None = next((each for each in ROLES if each == wanted), None)
        if written is None or written.writes is None or source.port or source.kind in ("attn_bias", "mlp_bias"):
            raise UsageError(
                f"{writer} is no writer that differs between tokens",
                expected="a head, an MLP, a neuron or an embedding of this model, such as L5H3, L5.mlp, L5N7 or embed",
                do="name one of these",
            )
        allowed = ("Q", "K", "V") if target.kind == "head" else ("gate", "up") if stream.spec.gated else ("in",)
        if read is None or read.reads is None or port is None or (port != "unembed" and port not in allowed):
            raise UsageError(
                f"{reader} is no port that reads the stream",
                expected=f"a part of this model with its port ({_PORTS.get(target.kind, 'none')}), such as L5H3.K",
                do="name one of these",
            )
        if written.writes > read.reads:
            raise UsageError(f"{writer} cannot reach {reader}", expected="an earlier writer", do="turn the edge round")
        shared = read.channel if port in ("K", "V") else None
        others = (c.label for c in stream.heads if shared and c.channel == shared and c.label != read.label)
        return cls(source, target, port, read.reads, shared, tuple(map(str, others)))

    def maps(self, stream: Stream, like: Tensor) -> Tensor:
        """The reader's effective map R~, (k, d), in the dtype and on the device of ``like``."""
        maps = stream.read(self.port, self.reader.layer).maps.to(like)
        return maps[self.row(stream), self.inner]

    def row(self, stream: Stream) -> int:
        """Which of the port's heads it is."""
        index = self.reader.index
        if self.reader.kind != "head" or index is None:
            return 0
        return index if self.port == "Q" else index // stream.spec.group

    @property
    def inner(self) -> slice:
        """Which of the head's or MLP's rows it is: all, or a neuron's."""
        return _neuron(self.reader)

    @property
    def role(self) -> str:
        """The role of the tables whose module computes the port."""
        return ROLES[self.port]


@dataclass(frozen=True, eq=False)
class Written:
    """What some parts of one layer write: ``O z`` for z that the model's run shows.

    Attributes:
        place: where z is seen; of embeddings ``O z`` itself.
        maps: O, (d, columns), None for embeddings.
        columns: which of the layer's inner activations, heads after one another.
    """

    place: Place
    maps: Tensor | None
    columns: slice

    @classmethod
    def of(cls, stream: Stream, label: Label, heads: slice | None = None) -> Written:
        """What one part writes; ``heads`` names several heads of its layer instead of its own."""
        layer = label.layer
        if label.kind in ("embed", "pos"):
            return cls(("pos" if label.kind == "pos" else "embed", 0), None, slice(None))
        assert layer is not None
        if label.kind == "head":
            assert label.index is not None
            own = heads or slice(label.index, label.index + 1)
            maps, k = stream.write("head", layer)[own], stream.spec.d_head
            return cls(("inner", layer), maps.transpose(0, 1).flatten(1), slice(own.start * k, own.stop * k))
        columns = _neuron(label)
        return cls(("neurons", layer), stream.write("mlp", layer)[0][:, columns], columns)

    def __call__(self, seen: Tensor) -> Tensor:
        """``O z``, (B, T, d), of what was seen at ``place``."""
        if self.maps is None:
            return seen
        z = seen.flatten(2) if self.place[0] == "inner" else seen
        return z[..., self.columns] @ self.maps.to(z).T


def affected(stream: Stream, edge: Edge) -> Written | None:
    """What the heads (or MLP, or neuron) that read through an edge write; None of the unembedding."""
    if edge.port == "unembed":
        return None
    row, group = edge.row(stream), stream.spec.group
    shared = edge.reader.kind == "head" and edge.port != "Q"
    return Written.of(stream, edge.reader, slice(row * group, (row + 1) * group) if shared else None)


def channel_readers(stream: Stream, port: str) -> tuple[str, ...]:
    """The readers of one port, of those that share a channel the first alone: ``("L0H0.K", "L0H3.K", ...)``."""
    if port in ("Q", "K", "V"):
        step = 1 if port == "Q" else stream.spec.group
        return tuple(
            f"{c.label}.{port}" for c in stream.heads if c.label.index is not None and not c.label.index % step
        )
    if port == "unembed":
        return ("unembed",)
    return tuple(f"{c.label}.{port}" for c in stream.components if c.kind == "mlp")


def check_tokens(tokens: Tensor) -> Tensor:
    """Check (N, T) token ids.

    Raises:
        UsageError: they are not, or there is nothing to predict.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2 or not len(tokens) or tokens.min() < 0:
        raise UsageError(
            f"tokens of shape {tuple(tokens.shape)}, {tokens.dtype}",
            expected="token ids (sequences, tokens), two tokens or more, no padding",
            do="cut the text into sequences of one length",
        )
    return tokens


def next_token_loss(logits: Tensor, tokens: Tensor, first: int = 1) -> Tensor:
    """Mean loss in nats of predicting tokens ``first``, ``first + 1``, ... of each sequence, (B,).

    Args:
        logits: (B, T, V).
        tokens: (B, T).
        first: the first token that counts, at least 1; half the length where the second half repeats the first.
    """
    wide = logits[:, first - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide.mT, tokens[:, first:], reduction="none").mean(1)


def _whole(stream: Stream, label: Label) -> Label:
    """The component under which a neuron is listed, where there is such a neuron."""
    if label.kind == "neuron" and label.index is not None and label.index < stream.spec.d_mlp:
        return Label("mlp", label.layer)
    return label if label.kind != "mlp" else replace(label, port=None)


def _neuron(label: Label) -> slice:
    if label.kind != "neuron" or label.index is None:
        return slice(None)
    return slice(label.index, label.index + 1)
