"""Heads that write to single neurons, and single neurons that write to heads: all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import reading_circuits, writing_circuits
from virtual_weights.analysis.pairs.neuron_neuron import NeuronPort, NeuronSide, check_neuron_port, neuron_side
from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, Progress, accumulate, haar_moments, self_moments
from virtual_weights.linalg.decompose import square_roots
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HeadPort
from virtual_weights.stream.question import Question

_TILE_BYTES = 32 * 2**20  # of products of heads' rows with neurons, at once


@final
@dataclass(frozen=True)
class HeadNeuron(Question):
    """How strongly what a head writes, by its OV circuit, enters what a single later neuron reads.

    ``||w^T OV||`` where w is the neuron's row of the port with the norm folded and ``OV = W_O W_V``.

    Columns, float32: ``score`` ``= ||w^T OV|| / (||w|| ||OV||_F)``, in [0, 1]; ``strength``, its numerator;
    ``null_ratio`` ``= score sqrt(d)``; ``z``, the squared strength against its mean and deviation when the neuron's
    direction is turned at random. A pair that cannot reach, and a head or neuron that is 0, is absent. A weighted
    sum of few squares is skewed: even at chance ``z`` reaches further above 0 than below.

    Invariant under re-basing of heads, re-ordering of neurons and, with RMSNorm folded, rotation of the stream.

    Attributes:
        port: through which the neurons read: ``"in"``, or where gated ``"up"`` or ``"gate"``.
        reader: only this neuron, e.g. ``"L18N5"``; None for all.
        writer: only this head, e.g. ``"L16H0"``; None for all.
        device: any torch device.
        memory_mb: of neurons' directions held at once; where all do not fit, heads are prepared several times.

    Reference: Elhage et al. 2021, for composition; here the reading circuit is a single row.
    """

    question: ClassVar[str] = "head_neuron"
    port: NeuronPort = "up"
    reader: str | None = None
    writer: str | None = None
    device: str = "cpu"
    memory_mb: int = 512

    def __post_init__(self) -> None:
        check_neuron_port(self.port)

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters on which the answer depends, as plain values."""
        return {"port": self.port, "reader": self.reader, "writer": self.writer}

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (pairs done, pairs in all).

        Returns:
            A Record over (neuron, head), both in order of depth.

        Raises:
            UsageError: the model has no such port, neuron or head, or the checkpoint holds no MLP or no head.
        """
        neurons = neuron_side(stream, self.port, self.reader)
        heads = _heads(stream, writing_circuits(stream), self.writer)
        score = torch.full((len(neurons.labels), heads.stack.count), float("nan"))
        norms = _fill(score.T, heads, neurons, self.device, self.memory_mb, progress)
        return Record(
            self.question,
            (Axis("neuron", neurons.labels), Axis("head", heads.labels)),
            tuple(_columns(score, norms[:, None] * heads.norms, heads.deviation, stream.d_model)),
            parameters=self.parameters,
            stamp=_stamp(stream),
            provenance=stream.provenance,
        )


@final
@dataclass(frozen=True)
class NeuronHead(Question):
    """How strongly what a single neuron writes enters what a later head reads, by its circuit.

    ``||C w_out||`` with ``C = QK^T`` for port Q, ``QK`` for K (``QK = W_Q^T W_K``, rotary offset 0) and ``OV`` for V.
    Columns, absence and invariances are those of :class:`HeadNeuron`. Where query heads share keys and values, the
    readers of one channel are told by the head axis.

    Attributes:
        port: ``"Q"``, ``"K"`` or ``"V"``.
        reader: only this head, e.g. ``"L18H6"``; None for all.
        writer: only this neuron, e.g. ``"L16N9"``; None for all.
        device: any torch device.
        memory_mb: of neurons' directions held at once.
    """

    question: ClassVar[str] = "neuron_head"
    port: HeadPort = "K"
    reader: str | None = None
    writer: str | None = None
    device: str = "cpu"
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if self.port not in ("Q", "K", "V"):
            raise UsageError(f"no head reads through port {self.port!r}", expected="Q, K or V", do="choose one")

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters on which the answer depends, as plain values."""
        return {"port": self.port, "reader": self.reader, "writer": self.writer}

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (pairs done, pairs in all).

        Returns:
            A Record over (head, neuron), both in order of depth.

        Raises:
            UsageError: the model has no such neuron or head, or the checkpoint holds no MLP or no head.
        """
        neurons = neuron_side(stream, "out", self.writer)
        heads = _heads(stream, reading_circuits(stream, self.port), self.reader)
        score = torch.full((heads.stack.count, len(neurons.labels)), float("nan"))
        norms = _fill(score, heads, neurons, self.device, self.memory_mb, progress)
        channels = heads.channels if self.port != "Q" and stream.spec.group > 1 else ()
        return Record(
            self.question,
            (Axis("head", heads.labels, channels), Axis("neuron", neurons.labels)),
            tuple(_columns(score, heads.norms[:, None] * norms, heads.deviation[:, None], stream.d_model)),
            parameters=self.parameters,
            stamp=_stamp(stream) | {"rotary_offset": 0 if stream.spec.rotary else "no rotary embedding"},
            provenance=stream.provenance,
        )


@final
@dataclass(frozen=True, eq=False)
class _Heads:
    """Some heads' circuits on one side of the stream.

    Attributes:
        labels, channels: (m,) names.
        stack: the circuits.
        norms: (m,) float64, Frobenius norms.
        deviation: (m,) float64, of the squared score, at random orientation.
    """

    labels: tuple[str, ...]
    channels: tuple[str, ...]
    stack: MapStack
    norms: Tensor
    deviation: Tensor

    def unit(self, at: Tensor, device: str) -> Tensor:
        """(len(at), k, d) float32: thin maps with the Grams of these circuits, each of Frobenius norm 1."""
        stack = self.stack
        assert stack.metric is not None
        roots = square_roots(stack.metric[at]) / self.norms[at, None, None]
        return (roots.to(device) @ stack.outer[stack.index[at]].to(device=device, dtype=accumulate)).float()


def _heads(stream: Stream, stack: MapStack, only: str | None) -> _Heads:
    labels = tuple(str(c.label) for c in stream.heads)
    channels = tuple(c.channel or "" for c in stream.heads)
    if only is not None:
        if only not in labels:
            raise UsageError(
                f"this model has no head {only!r}",
                expected=f"a name from {labels[0]} to {labels[-1]}",
                do="correct the name, or leave its port out",
            )
        i = labels.index(only)
        labels, channels, at = (only,), (channels[i],), torch.tensor([i])
        metric = None if stack.metric is None else stack.metric[at]
        stack = MapStack(stack.outer, stack.index[at], metric, stack.position[at])
    trace, square = self_moments(stack)
    _, variance = haar_moments(1.0, 1.0, 1.0, square / trace**2, stream.d_model)
    return _Heads(labels, channels, stack, trace.sqrt(), variance.sqrt())


def _fill(
    score: Tensor, heads: _Heads, neurons: NeuronSide, device: str, memory_mb: int, progress: Progress | None
) -> Tensor:
    """Fill (heads, neurons) in with the scores of all pairs that reach; returns the neurons' norms."""
    norms = torch.empty(len(neurons.labels), dtype=accumulate)
    reading, done = neurons.port != "out", 0
    for group in neurons.groups(memory_mb * 2**20):
        held = [neurons.load(place, device) for place in group]
        for rows in held:
            norms[rows.number.cpu()] = rows.norms.cpu()
        for position in heads.stack.position.unique().tolist():
            at = (heads.stack.position == position).nonzero()[:, 0]
            met = [r for r in held if (position <= r.position if reading else r.position <= position)]
            unit = heads.unit(at, device) if met else None
            for rows in met:
                assert unit is not None
                for cut, found in _products(unit, rows.unit):
                    score[at[:, None], rows.number[cut].cpu()] = found.cpu()
            done += len(at) * sum(len(rows.norms) for rows in held)
            if progress is not None:
                progress(done, score.numel())
    return norms


def _products(unit: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``||A_i w_j||`` of maps (m, k, d) with rows (n, d), as (m, rows), some rows at a time."""
    flat = unit.flatten(0, 1)
    step = max(1, _TILE_BYTES // (4 * len(flat)))
    for start in range(0, len(rows), step):
        cut = slice(start, start + step)
        yield cut, (flat @ rows[cut].T).unflatten(0, unit.shape[:2]).square_().sum(dim=1).sqrt_()


def _columns(score: Tensor, norms: Tensor, deviation: Tensor, d: int) -> Iterator[Column]:
    """All columns in float32; ``norms`` and ``deviation`` broadcast against the score."""
    yield Column("score", score, "1, in [0, 1]", "strength over both Frobenius norms")
    yield Column("strength", norms.float().mul_(score), "weights", "norm of the neuron's vector through the circuit")
    yield Column("null_ratio", score * d**0.5, "1 (ratio)", "score over its root mean square at random, 1/sqrt(d)")
    z = score.square().sub_(1 / d).div_(deviation.float())
    yield Column("z", z, "standard deviations", "strength^2 against its Haar mean and deviation")


def _stamp(stream: Stream) -> dict[str, object]:
    return {
        "norm": stream.norm_stamp,
        "gauge": "heads by circuits, neurons by their own basis",
        "compute_dtype": "float32",
    }
