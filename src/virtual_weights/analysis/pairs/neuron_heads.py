"""Heads that write to single neurons, and single neurons that write to heads: all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import reading_circuits, writing_circuits
from virtual_weights.analysis.maps.map_side import component_axis
from virtual_weights.analysis.maps.neuron_side import NeuronSide, check_neuron_port, neuron_side
from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, accumulate, beyond_rounding, haar_moments, self_moments, standardised
from virtual_weights.linalg.decompose import square_roots
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, cost
from virtual_weights.stream.group import HEAD_PORTS, HeadPort, NeuronPort

_TILE_BYTES = 32 * 2**20  # of products of heads' rows with neurons, at once


@final
@dataclass(frozen=True)
class HeadNeuron(Question[Stream]):
    """How strongly what a head writes, by its OV circuit, enters what a single later neuron reads.

    ``||w^T OV||`` where w is the neuron's row of the port with the norm folded and ``OV = W_O W_V``.

    Columns, float32: ``score`` ``= ||w^T OV|| / (||w|| ||OV||_F)``, in [0, 1]; ``strength``, its numerator;
    ``null_ratio`` ``= score sqrt(d)``; ``z``, the squared strength against its mean and deviation when the neuron's
    direction is turned at random. Of a head or neuron that is 0, strength is 0 and score undefined; a pair that cannot
    reach is absent. A weighted
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
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        check_neuron_port(self.port)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
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
        heads = _heads(stream, component_axis("head", stream.groups.heads), writing_circuits(stream), self.writer)
        score = torch.full((len(neurons.labels), heads.stack.count), float("nan"))
        norms = _fill(score.T, heads, neurons, (self.device, self.memory_mb, progress))
        columns = _columns(score, norms[:, None] * heads.norms, heads.deviation, stream.d_model)
        return stream.record(self, (Axis("neuron", neurons.labels), heads.axis), columns, **_STAMP)


@final
@dataclass(frozen=True)
class NeuronHead(Question[Stream]):
    """How strongly what a single neuron writes enters what a later head reads, by its circuit.

    ``||C w_out||`` with ``C = QK^T`` for port Q, ``QK`` for K (``QK = W_Q^T W_K``, rotary offset 0) and ``OV`` for V.
    Columns, absence and invariances are those of :class:`HeadNeuron`. Where query heads share keys and values, the
    axis of heads names their groups.

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
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        if self.port not in HEAD_PORTS:
            raise UsageError(f"no head reads through port {self.port!r}", expected="Q, K or V", do="choose one")

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
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
        axis = component_axis("head", stream.groups.heads, self.port)
        heads = _heads(stream, axis, reading_circuits(stream, self.port), self.reader)
        score = torch.full((heads.stack.count, len(neurons.labels)), float("nan"))
        norms = _fill(score, heads, neurons, (self.device, self.memory_mb, progress))
        columns = _columns(score, heads.norms[:, None] * norms, heads.deviation[:, None], stream.d_model)
        axes = heads.axis, Axis("neuron", neurons.labels)
        return stream.record(self, axes, columns, **_STAMP, rotary_offset=0)


_STAMP = {"gauge": "heads by circuits, neurons by their own basis", "compute_dtype": "float32"}


@final
@dataclass(frozen=True, eq=False)
class _Heads:
    """Some heads' circuits on one side of the stream.

    Attributes:
        axis: their names, and the key/value groups where heads share the maps.
        stack: the circuits.
        norms: (m,) float64, Frobenius norms.
        deviation: (m,) float64, of the squared score, at random orientation.
    """

    axis: Axis
    stack: MapStack
    norms: Tensor
    deviation: Tensor

    def unit(self, heads: Tensor, device: str) -> Tensor:
        """(heads, k, d) float32: thin maps with the Grams of these heads' circuits, each of Frobenius norm 1."""
        stack = self.stack
        assert stack.metric is not None
        norms = self.norms[heads, None, None]
        roots = square_roots(stack.metric[heads]) / torch.where(norms > 0, norms, 1.0)
        return (roots.to(device) @ stack.outer[stack.index[heads]].to(device=device, dtype=accumulate)).float()


def _heads(stream: Stream, axis: Axis, stack: MapStack, only: str | None) -> _Heads:
    if only is not None:
        names = [label if "." in only else label.partition(".")[0] for label in axis.labels]
        if only not in names:
            raise UsageError(
                f"this model has no head {only!r}",
                expected=f"a name from {axis.labels[0]} to {axis.labels[-1]}",
                do="correct the name, or leave its port out",
            )
        row = slice(names.index(only), names.index(only) + 1)
        axis = Axis(axis.name, axis.labels[row], axis.groups[row])
        metric = None if stack.metric is None else stack.metric[row]
        stack = MapStack(stack.outer, stack.index[row], metric, stack.position[row])
    trace, square = self_moments(stack)
    _, variance = haar_moments(1.0, 1.0, 1.0, square / trace**2, stream.d_model)
    return _Heads(axis, stack, trace.sqrt(), variance.sqrt())


def _fill(score: Tensor, heads: _Heads, neurons: NeuronSide, workspace: tuple[str, int, Progress]) -> Tensor:
    """Fill (heads, neurons) in with the scores of all pairs that reach; returns the neurons' norms.

    Args:
        score: to be filled in.
        heads: one side.
        neurons: the other.
        workspace: device, MiB of neurons' directions held at once, and progress.
    """
    device, memory_mb, progress = workspace
    norms = torch.empty(len(neurons.labels), dtype=accumulate)
    reading, done = neurons.port != "out", 0
    for batch in neurons.batches(memory_mb * 2**20):
        loaded = [neurons.load(part, device) for part in batch]
        for rows in loaded:
            norms[rows.number.cpu()] = rows.norms.cpu()
        for state in heads.stack.position.unique().tolist():
            chosen = (heads.stack.position == state).nonzero()[:, 0]
            partners = [rows for rows in loaded if (state <= rows.position if reading else rows.position <= state)]
            unit = heads.unit(chosen, device) if partners else torch.empty(0)
            for rows in partners:
                for cut, products in _products(unit, rows.unit.nan_to_num(0.0)):
                    score[chosen[:, None], rows.number[cut].cpu()] = products.cpu()
            done += len(chosen) * sum(len(rows.norms) for rows in loaded)
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
    score = beyond_rounding(score, 1.0, torch.finfo(score.dtype).eps)
    strength = norms.float() * score
    score = score.masked_fill(norms == 0, torch.nan)
    yield Column("score", score, "1, in [0, 1]", "strength over both Frobenius norms")
    yield Column("strength", strength, "weights", "norm of the neuron's vector through the circuit")
    yield Column("null_ratio", score * d**0.5, "1 (ratio)", "score over its root mean square at random, 1/sqrt(d)")
    z = standardised(score.square(), torch.tensor(1 / d), deviation.square().float())
    yield Column("z", z, "standard deviations", "strength^2 against its Haar mean and deviation")
