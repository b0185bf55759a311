"""What is written into a state of the stream and what is read from it, as thin maps free of heads' inner bases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from virtual_weights.linalg import accumulate, tolerance
from virtual_weights.linalg.lapack import square_roots
from virtual_weights.stream import Stream

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
