"""Overlap of subspaces: whether what a head writes lies where another reads, whatever the gains."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from virtual_weights.analysis.stacks import HeadPort, read_spaces, write_spaces
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress, all_pairs, overlap_moments
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream


@dataclass(frozen=True)
class Overlap:
    """Mean squared cosine of the principal angles between every head's writes and a port's reads.

    With orthonormal bases ``Q_w`` of ``col(W_O)`` (dimension r_w) and ``Q_r`` of the port's row space
    (dimension r_r), ``overlap = ||Q_r^T Q_w||_F^2 / min(r_r, r_w)``, the projection kernel normalised
    to [0, 1]. Columns: ``overlap``; ``null_ratio``, over its Haar mean ``max(r_r, r_w)/d``; ``z``.
    Heads that share a key or value head are one reader, named after the first of them.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        port: ``"Q"``, ``"K"`` or ``"V"``.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.

    Reference: Hamm and Lee 2008, "Grassmann discriminant analysis" (projection kernel).
    """

    port: HeadPort = "K"
    device: str = "cpu"
    memory_mb: int = 256

    def __post_init__(self) -> None:
        if self.port not in ("Q", "K", "V"):
            raise UsageError(f"no port {self.port!r}", expected="Q, K or V", do="choose one of these ports")

    @property
    def question(self) -> str:
        """Name of the question."""
        return "overlap"

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Returns:
            A Record over (reader, writer): the distinct read maps of the port, and all heads.
        """
        readers, rank_r = read_spaces(stream, self.port)
        writers, rank_w = write_spaces(stream)
        device, memory = torch.device(self.device), self.memory_mb * 2**20
        kernel = all_pairs(readers, writers, device=device, memory=memory, progress=progress).squared
        r, w = rank_r[:, None].double(), rank_w[None, :].double()
        overlap = kernel / torch.minimum(r, w)
        mean, variance = overlap_moments(r, w, stream.d_model)
        step = 1 if self.port == "Q" else stream.spec.group
        first = stream.heads[::step]
        readers_axis = Axis(
            "reader",
            tuple(f"{c.label}.{self.port}" for c in first),
            tuple(c.channel or "" for c in first) if step > 1 else (),
        )
        return Record(
            self.question,
            (readers_axis, Axis("writer", tuple(str(c.label) for c in stream.heads))),
            (
                Column("overlap", overlap, "1, in [0, 1]", "mean cos^2 of principal angles"),
                Column("null_ratio", overlap / mean, "1 (ratio)", "over the Haar mean max(r_r, r_w)/d"),
                Column("z", (overlap - mean) / variance.sqrt(), "standard deviations", "against the Haar moments"),
            ),
            parameters={"port": self.port},
            stamp={"norm": stream.norm_stamp, "gauge": "subspaces: free of heads' inner bases"},
            provenance=stream.provenance,
        )

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters as plain values."""
        return asdict(self)
