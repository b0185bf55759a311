"""Composition of heads: how strongly one head's output enters another head's query, key or value."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from virtual_weights.analysis.stacks import HeadPort, reading_circuits, writing_circuits
from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, Progress, all_pairs, haar_moments, self_moments
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Composition:
    """Q-, K- or V-composition of every head with every later head.

    For writer a and reader b, with ``QK = W_Q^T Rot(D)^T W_K`` and ``OV = W_O W_V``::

        Q: ||QK_b^T OV_a||_F / (||QK_b||_F ||OV_a||_F)
        K: ||QK_b   OV_a||_F / (||QK_b||_F ||OV_a||_F)
        V: ||OV_b   OV_a||_F / (||OV_b||_F ||OV_a||_F)

    Columns: ``score`` (the above, in [0, 1]); ``strength`` (its numerator); ``null_ratio``, the score
    over ``1/sqrt(d)``, its root mean square for independent random orientations; ``z``, the squared
    strength standardised by its closed-form mean and deviation when one of the two maps is turned by
    a Haar-random rotation of the stream. A pair that cannot reach is absent.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream. With a
    rotary offset other than 0 only re-basings that turn rotary planes leave Q and K unchanged.

    Attributes:
        port: ``"Q"``, ``"K"`` or ``"V"``.
        rotary_offset: query position minus key position; None is offset 0, no rotation.
        compute_dtype: ``"float64"`` or ``"float32"``; sums accumulate in float64 either way.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.

    Reference: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """

    port: HeadPort = "K"
    rotary_offset: int | None = None
    compute_dtype: str = "float64"
    device: str = "cpu"
    memory_mb: int = 256

    def __post_init__(self) -> None:
        if self.port not in ("Q", "K", "V"):
            raise UsageError(f"no port {self.port!r}", expected="Q, K or V", do="choose one of these ports")
        if self.compute_dtype not in DTYPES:
            raise UsageError(
                f"no compute dtype {self.compute_dtype!r}", expected="float64 or float32", do="choose one of these"
            )

    @property
    def question(self) -> str:
        """Name of the question."""
        return "composition"

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (done, total) as the kernel goes on.

        Returns:
            A Record over (reader, writer), both all heads in order of depth.
        """
        readers = reading_circuits(stream, self.port, self.rotary_offset or 0)
        writers = writing_circuits(stream)
        pairs = all_pairs(
            readers,
            writers,
            dtype=DTYPES[self.compute_dtype],
            device=torch.device(self.device),
            memory=self.memory_mb * 2**20,
            progress=progress,
        )
        names = tuple(str(c.label) for c in stream.heads)
        shared = self.port != "Q" and stream.spec.group > 1
        channels = tuple(c.channel or "" for c in stream.heads) if shared else ()
        rotary = "no rotary embedding" if stream.spec.rotary is None else self.rotary_offset or 0
        return Record(
            self.question,
            (Axis("reader", names, channels), Axis("writer", names)),
            _columns(pairs.squared, readers, writers, stream.d_model),
            parameters={"port": self.port, "rotary_offset": self.rotary_offset},
            stamp={
                "norm": stream.norm_stamp,
                "rotary_offset": rotary,
                "gauge": "circuits: free of heads' inner bases",
                "compute_dtype": self.compute_dtype,
                "form": pairs.form,
                "flops": pairs.flops,
            },
            provenance=stream.provenance,
        )

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters as plain values."""
        return asdict(self)


def _columns(squared: Tensor, readers: MapStack, writers: MapStack, d: int) -> tuple[Column, ...]:
    trace_r, square_r = self_moments(readers)
    trace_w, square_w = self_moments(writers)
    norms = (trace_r[:, None] * trace_w[None, :]).sqrt()
    mean, variance = haar_moments(trace_r[:, None], square_r[:, None], trace_w[None, :], square_w[None, :], d)
    strength = squared.clamp_min(0).sqrt()
    score = strength / norms
    z = (squared - mean) / variance.sqrt()
    return (
        Column("score", score, "1, in [0, 1]", "||R O||_F / (||R||_F ||O||_F) over circuits"),
        Column("strength", strength, "weights", "||R O||_F over circuits"),
        Column(
            "null_ratio",
            score * d**0.5,
            "1 (ratio)",
            "score over its root mean square at random orientation, 1/sqrt(d)",
        ),
        Column("z", z, "standard deviations", "||R O||_F^2 against its Haar mean and deviation"),
    )
