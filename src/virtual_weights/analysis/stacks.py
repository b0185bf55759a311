"""Heads as stacks of thin maps: the form in which the all-pairs kernel takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack
from virtual_weights.stream import Stream
from virtual_weights.stream.ports import HeadPort


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
