"""Composition: how strongly what one part of the model writes enters what a later part reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import reading_circuits, writing_circuits
from virtual_weights.analysis.maps.map_side import (
    Met,
    Side,
    by_depth,
    check_port,
    heads_side,
    meet,
    wide_readers,
    with_parts,
)
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress, haar_moments
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers
from virtual_weights.stream.question import Question

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Composition(Question):
    """Composition of every writer with every later reader of one port.

    For writer a and reader b, with ``QK = W_Q^T Rot(D)^T W_K`` and ``OV = W_O W_V``::

        Q: ||QK_b^T OV_a||_F / (||QK_b||_F ||OV_a||_F)
        K: ||QK_b   OV_a||_F / (||QK_b||_F ||OV_a||_F)
        V: ||OV_b   OV_a||_F / (||OV_b||_F ||OV_a||_F)

    and for parts with an inner basis of their own the same with their own maps: ``||R~ O||_F / (||R~||_F ||O||_F)``,
    where ``O`` is the output map of an MLP (one column a neuron), an embedding (one a token or position) or a bias (one
    column), and ``R~`` an MLP's gate, up or in (one row a neuron) or the unembedding (one row a token).

    Columns: ``score`` (the above, in [0, 1]); ``strength`` (its numerator); ``null_ratio``, the score over
    ``1/sqrt(d)``, its root mean square for independent random orientations; ``z``, the squared strength standardised by
    its closed-form mean and deviation when one of the two maps is turned by a Haar-random rotation of the stream. A
    pair that cannot reach is absent.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream. With a rotary offset
    other than 0 only re-basings that turn rotary planes leave Q and K unchanged.

    Attributes:
        port: ``"Q"``, ``"K"``, ``"V"`` (readers are heads), ``"gate"``, ``"up"``, ``"in"`` (MLPs) or ``"unembed"``.
        rotary_offset: query position minus key position; None is offset 0, no rotation.
        compute_dtype: of heads with heads, ``"float64"`` or ``"float32"``; sums accumulate in float64 either way, and
            whatever meets an MLP, an embedding or a bias is computed in float64.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and biases too.

    Reference: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """

    question: ClassVar[str] = "composition"
    port: Port = "K"
    rotary_offset: int | None = None
    compute_dtype: str = "float64"
    device: str = "cpu"
    memory_mb: int = 256
    writers: Writers = "heads"

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.writers not in ("heads", "all"):
            raise UsageError(f"no writers {self.writers!r}", expected="heads or all", do="choose one of these")
        if self.compute_dtype not in DTYPES:
            raise UsageError(
                f"no compute dtype {self.compute_dtype!r}", expected="float64 or float32", do="choose one of these"
            )

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (done, total) as the kernel goes on.

        Returns:
            A Record over (reader, writer), both in order of depth.

        Raises:
            UsageError: the model has no such port, or the checkpoint holds no reader or no writer.
        """
        readers, writers = self._readers(stream), self._writers(stream)
        found = meet(
            readers,
            writers,
            dtype=DTYPES[self.compute_dtype],
            device=self.device,
            memory=self.memory_mb * 2**20,
            progress=progress,
        )
        order = by_depth(writers)
        rotary = "no rotary embedding" if stream.spec.rotary is None else self.rotary_offset or 0
        return Record(
            self.question,
            (
                Axis("reader", readers.labels, readers.channels),
                Axis("writer", tuple(writers.labels[i] for i in order.tolist())),
            ),
            tuple(_columns(found, order, stream.d_model)),
            parameters={"port": self.port, "rotary_offset": self.rotary_offset, "writers": self.writers},
            stamp={
                "norm": stream.norm_stamp,
                "rotary_offset": rotary,
                "gauge": "circuits: free of heads' inner bases",
                "compute_dtype": self.compute_dtype,
                "form": found.form,
                "flops": found.flops,
            },
            provenance=stream.provenance,
        )

    def _readers(self, stream: Stream) -> Side:
        if self.port not in HEAD_PORTS:
            return wide_readers(stream, self.port)
        stack = reading_circuits(stream, self.port, self.rotary_offset or 0)
        shared = self.port != "Q" and stream.spec.group > 1
        channels = tuple(c.channel or "" for c in stream.heads) if shared else ()
        return heads_side(stream, stack, _names(stream), channels)

    def _writers(self, stream: Stream) -> Side:
        alone = self.writers == "heads"
        stack = writing_circuits(stream) if alone or stream.heads else None
        heads = heads_side(stream, stack, _names(stream))
        return heads if alone else with_parts(stream, heads)


def _names(stream: Stream) -> tuple[str, ...]:
    return tuple(str(c.label) for c in stream.heads)


def _columns(found: Met, order: Tensor, d: int) -> Iterator[Column]:
    (trace_r, square_r), (trace_w, square_w) = found.readers[:, :, None], found.writers[:, None, order]
    squared = found.squared[:, order]
    mean, variance = haar_moments(trace_r, square_r, trace_w, square_w, d)
    score = squared.sqrt() / (trace_r * trace_w).sqrt()
    yield Column("score", score, "1, in [0, 1]", "||R O||_F / (||R||_F ||O||_F) over circuits")
    yield Column("strength", squared.sqrt(), "weights", "||R O||_F over circuits")
    ratio = "score over its root mean square at random orientation, 1/sqrt(d)"
    yield Column("null_ratio", score * d**0.5, "1 (ratio)", ratio)
    z = (squared - mean) / variance.sqrt()
    yield Column("z", z, "standard deviations", "||R O||_F^2 against its Haar mean and deviation")
