"""What is written into a state of the stream and what is read from it, as thin maps free of heads' inner bases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, accumulate, tolerance
from virtual_weights.linalg.decompose import square_roots
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HeadPort

HeadRole = Literal["Q", "K", "V", "O"]


def circuits(stream: Stream, role: HeadRole, layer: int) -> Tensor:
    """The heads of one layer by their circuits, as far as the stream can tell them: thin maps with the same Gram.

    A head's ``W_O`` alone depends on its arbitrary inner basis; ``OV = W_O W_V`` does not. Each map ``C`` below has
    ``C^T C`` equal to the circuit's own Gram on the side of the stream (QK at rotary offset 0):

    ====  =====================================  ============================================
    role  thin map                               Gram
    ====  =====================================  ============================================
    Q     ``(W_K W_K^T)^(1/2) W_Q``              ``QK QK^T``, one per query head
    K     ``(sum_h W_Qh W_Qh^T)^(1/2) W_K``      sum of ``QK^T QK`` over the queries it serves
    V     ``(sum_h W_Oh^T W_Oh)^(1/2) W_V``      sum of ``OV^T OV`` over the heads it serves
    O     ``(W_V W_V^T)^(1/2) W_O^T``            ``OV OV^T``, one per query head
    ====  =====================================  ============================================

    Args:
        stream: the model.
        role: ``"Q"``, ``"K"``, ``"V"`` (what is read) or ``"O"`` (what is written).
        layer: a layer with attention.

    Returns:
        (m, d_head, d) float64; m counts heads, or key/value heads for K and V. Row spaces, singular values and Grams
        are invariant under re-basing of heads; the rows themselves are not.
    """
    if role == "O":
        thin, other = stream.write("head", layer).mT, stream.read("V", layer).maps
    elif role == "V":
        thin, other = stream.read("V", layer).maps, stream.write("head", layer).mT
    else:
        thin, other = (stream.read(port, layer).maps for port in (("Q", "K") if role == "Q" else ("K", "Q")))
    other = other.to(accumulate)
    metric = other @ other.mT
    if len(metric) < len(thin):
        metric = metric.repeat_interleave(stream.spec.group, 0)
    elif len(metric) > len(thin):
        metric = metric.unflatten(0, (len(thin), -1)).sum(1)
    return square_roots(metric) @ thin.to(accumulate)


def writes_into(stream: Stream, state: int) -> Iterator[Tensor]:
    """Everything that first appears in a state, as stacks (m, k, d) of transposed write maps.

    Heads by their OV circuits, an MLP by its neurons, embeddings by tokens or positions, a bias by its one vector.
    """
    for kind, layer in _parts(stream, "writes", state):
        if kind == "head":
            assert layer is not None
            yield circuits(stream, "O", layer)
        elif kind in ("attn_bias", "mlp_bias"):
            bias = stream.weight("o_bias" if kind == "attn_bias" else "down_bias", layer)
            assert bias is not None
            yield bias[None, None]
        elif kind == "mlp":
            yield stream.write("mlp", layer).mT
        else:
            yield stream.write("embed" if kind == "embed" else "pos").mT


def reads_from(stream: Stream, state: int) -> Iterator[Tensor]:
    """Everything by which a block reads a state, as stacks (m, k, d) of read maps; the unembedding is not a block.

    Queries by head and keys and values by key/value head, each by its circuit; an MLP's gate and up apart.
    """
    for kind, layer in _parts(stream, "reads", state):
        if kind == "head":
            assert layer is not None
            roles: tuple[HeadRole, ...] = ("Q", "K", "V")
            yield from (circuits(stream, role, layer) for role in roles)
        elif kind == "mlp" and stream.spec.gated:
            yield stream.read("gate", layer).maps
            yield stream.read("up", layer).maps
        elif kind == "mlp":
            yield stream.read("in", layer).maps


def unembedding(stream: Stream) -> Tensor | None:
    """The read map of the unembedding, (1, tokens, d); None where a partial checkpoint has none."""
    return stream.read("unembed").maps if stream.model.has("unembed") else None


def last_written(stream: Stream, state: int) -> str:
    """What first appears in a state: ``embed``, ``L3.attn``, ``L3.mlp``, or ``L3`` of a parallel block."""
    kinds = {(c.label.layer, c.kind) for c in stream.components if c.writes == state}
    layers = {layer for layer, _ in kinds if layer is not None}
    if not layers:
        return "embed" if kinds else ""
    layer, parts = layers.pop(), {"attn" if kind in ("head", "attn_bias") else "mlp" for _, kind in kinds}
    return f"L{layer}" if len(parts) > 1 else f"L{layer}.{parts.pop()}"


def rank_cut(stream: Stream) -> float:
    """Below which share of the largest a singular value counts as zero, when it is taken from a Gram matrix.

    ``max(eps(c) d, sqrt(eps(float64) n))``: c is the dtype in which the norm is folded into readers (``stream.dtype``,
    or float64 where all weights are), whose rounding a rank must not count; n is the largest side of any tensor, and
    the root is there because a Gram matrix in float64 squares the singular values.
    """
    placed = [stream.source.tensors[place.tensor] for place in stream.model.placements.values()]
    computed = torch.float64 if all(info.dtype == "F64" for info in placed) else stream.dtype
    longest = max(max(info.shape, default=1) for info in placed)
    return max(tolerance(computed, (stream.d_model,)), tolerance(accumulate, (longest,)) ** 0.5)


def _parts(stream: Stream, side: Literal["reads", "writes"], state: int) -> dict[tuple[str, int | None], None]:
    """Kinds and layers of the components at a state, each once, in order."""
    at = (c for c in stream.components if (c.reads if side == "reads" else c.writes) == state)
    return dict.fromkeys((c.kind, c.label.layer) for c in at)


def reading_circuits(stream: Stream, port: HeadPort, offset: int = 0) -> MapStack:
    """Every head's circuit as seen from one port, one map per query head.

    With the outer factor replaced by its metric, ``||A W||_F^2 = tr(W^T (A^T A) W)``:

    ====  ======================  ===========  ==========================
    port  circuit                 thin factor  metric
    ====  ======================  ===========  ==========================
    Q     ``W_K^T Rot W_Q``       ``W_Q``      ``Rot^T W_K W_K^T Rot``
    K     ``W_Q^T Rot^T W_K``     ``W_K``      ``Rot W_Q W_Q^T Rot^T``
    V     ``W_O W_V``             ``W_V``      ``W_O^T W_O``
    ====  ======================  ===========  ==========================

    Args:
        stream: the model.
        port: the reading port.
        offset: rotary offset, for ports Q and K.

    Returns:
        The stack; shared keys and values are held once.
    """
    turn = stream.rotation(offset) if offset and port != "V" else None

    def thin(layer: int) -> Tensor:
        return stream.read(port, layer).maps

    def metric(layer: int) -> Tensor:
        if port == "V":
            out = stream.write("head", layer).double()
            return out.transpose(1, 2) @ out
        other = stream.read("Q" if port == "K" else "K", layer).maps.double()
        square = other @ other.transpose(1, 2)
        if turn is not None:
            square = turn @ square @ turn.T if port == "K" else turn.T @ square @ turn
        return square if port == "K" else square.repeat_interleave(stream.spec.group, 0)

    shared = 1 if port == "Q" else stream.spec.group
    return _stack(stream, thin, metric, shared, "reads")


def writing_circuits(stream: Stream) -> MapStack:
    """Every head's OV circuit as a writer: thin factor ``W_O^T``, metric ``W_V W_V^T``."""

    def thin(layer: int) -> Tensor:
        return stream.write("head", layer).transpose(1, 2)

    def metric(layer: int) -> Tensor:
        value = stream.read("V", layer).maps.double()
        return (value @ value.transpose(1, 2)).repeat_interleave(stream.spec.group, 0)

    return _stack(stream, thin, metric, 1, "writes")


def need_heads(stream: Stream) -> None:
    """Refuse a checkpoint without any attention head."""
    if not stream.heads:
        raise UsageError(
            "this checkpoint holds no attention head",
            expected="at least one layer with an output projection",
            do="open a checkpoint with its attention tensors",
        )


def _stack(
    stream: Stream,
    thin: Callable[[int], Tensor],
    metric: Callable[[int], Tensor],
    shared: int,
    side: Literal["reads", "writes"],
) -> MapStack:
    need_heads(stream)
    layers, heads = stream.attention_layers, stream.spec.n_heads
    outer: Tensor | None = None
    metrics = []
    for i, layer in enumerate(layers):
        own = thin(layer)
        if outer is None:
            outer = torch.empty((len(layers) * len(own), *own.shape[1:]), dtype=own.dtype)
        outer[i * len(own) : (i + 1) * len(own)] = own
        metrics.append(metric(layer))
    assert outer is not None
    index = torch.arange(len(layers) * heads) // shared
    position = torch.tensor([_position(stream, layer, side) for layer in layers]).repeat_interleave(heads)
    return MapStack(outer, index, torch.cat(metrics), position)


def _position(stream: Stream, layer: int, side: Literal["reads", "writes"]) -> int:
    head = stream.heads_of(layer)[0]
    position = head.reads if side == "reads" else head.writes
    assert position is not None
    return position


@final
@dataclass(frozen=True, eq=False)
class Frames:
    """Subspaces of several heads: directions in order of gain, zero where they are cut.

    Attributes:
        basis: (n, k, d) float64, orthonormal rows up to the rank, zero rows after it.
        gains: (n, k), the circuit's singular values, zero after the rank.
        rank: (n,) float64, dimension of each subspace.
    """

    basis: Tensor
    gains: Tensor
    rank: Tensor

    @property
    def count(self) -> int:
        """How many subspaces."""
        return len(self.rank)

    def to(self, device: str) -> Frames:
        """The same on another device."""
        return Frames(self.basis.to(device), self.gains.to(device), self.rank.to(device))


@final
@dataclass(frozen=True, eq=False)
class HeadSide:
    """The heads of one role: names, shared channels, the state each reads or writes, and how many stand in a layer."""

    names: tuple[str, ...]
    channels: tuple[str, ...]
    position: Tensor
    per_layer: int


def frames(stream: Stream, role: HeadRole, layers: Sequence[int], cut: float, energy: float | None = None) -> Frames:
    """Frames of all heads of some layers in one role.

    Args:
        stream: the model.
        role: what of a head.
        layers: layers with attention.
        cut: singular values up to this share of the largest are dropped.
        energy: also drop what exceeds this share of the squared singular values.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        q, r = torch.linalg.qr(circuits(stream, role, layer).mT)
        u, s, _ = torch.linalg.svd(r)
        kept = (s > cut * s[:, :1]) & _within(s, energy)
        parts.append(((q @ u * kept[:, None, :]).mT, s * kept))
    gains = torch.cat([s for _, s in parts])
    return Frames(torch.cat([basis for basis, _ in parts]), gains, (gains > 0).sum(1).double())


def heads_in(stream: Stream, role: HeadRole) -> HeadSide:
    """Who has a subspace of this role: all heads, or the first of those that share a key or value."""
    step = stream.spec.group if role in ("K", "V") else 1
    first = stream.heads[::step]
    positions = [c.writes if role == "O" else c.reads for c in first]
    return HeadSide(
        tuple(f"{c.label}.{role}" for c in first),
        tuple(c.channel or "" for c in first) if step > 1 else (),
        torch.tensor(positions, dtype=torch.int64),
        stream.spec.n_heads // step,
    )


def _within(s: Tensor, energy: float | None) -> Tensor:
    """The fewest leading directions that hold a share of the energy."""
    if energy is None:
        return torch.ones_like(s, dtype=torch.bool)
    share = s.square() / s.square().sum(1, keepdim=True)
    # the slack is the rounding of a cumulative sum, as in Spectrum.energy_rank
    before = share.cumsum(1) - share
    return before < energy * (1 - tolerance(s.dtype, s.shape))
