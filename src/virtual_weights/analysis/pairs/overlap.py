"""Overlap of subspaces: whether what a part writes lies where another reads, whatever the gains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import HeadRole, frames, heads_in, need_heads, rank_cut
from virtual_weights.analysis.maps.map_side import (
    Side,
    Square,
    by_depth,
    check_port,
    heads_side,
    meet,
    wide_readers,
    with_parts,
)
from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, Progress, Spectrum, overlap_moments
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers
from virtual_weights.stream.question import Question


@dataclass(frozen=True)
class Overlap(Question):
    """Mean squared cosine of the principal angles between what every writer can write and what a port can read.

    With orthonormal bases ``Q_w`` of a writer's column space (dimension r_w) and ``Q_r`` of a reader's row space
    (dimension r_r), ``overlap = ||Q_r^T Q_w||_F^2 / min(r_r, r_w)``, the projection kernel normalised to [0, 1].
    Columns: ``overlap``; ``null_ratio``, over its Haar mean ``max(r_r, r_w)/d``; ``z``. Heads enter by their circuits,
    those that share a key or value head are one reader, named after the first of them. A whole MLP or embedding spans
    the stream, and overlaps with everything, unless ``energy`` says how much of it is asked about.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` or ``"unembed"``.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and biases too.
        energy: keep of each map the fewest leading directions with this share of its squared gains, in (0, 1]; None
            keeps its whole numerical rank.

    Reference: Hamm and Lee 2008, "Grassmann discriminant analysis" (projection kernel).
    """

    question: ClassVar[str] = "overlap"
    port: Port = "K"
    device: str = "cpu"
    memory_mb: int = 256
    writers: Writers = "heads"
    energy: float | None = None

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.writers not in ("heads", "all") or not (self.energy is None or 0 < self.energy <= 1):
            raise UsageError(
                f"writers {self.writers!r}, energy {self.energy}",
                expected="heads or all, and a share in (0, 1]",
                do="pass for example writers='all', energy=0.9",
            )

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Returns:
            A Record over (reader, writer), both in order of depth; of Q, K and V the distinct read maps of the port.

        Raises:
            UsageError: the model has no such port, or the checkpoint holds no reader or no writer.
        """
        readers, writers = self._readers(stream), self._writers(stream)
        found = meet(readers, writers, device=self.device, memory=self.memory_mb * 2**20, progress=progress)
        order = by_depth(writers)
        r, w = found.readers[0].round()[:, None], found.writers[0].round()[None, order]  # the trace of a projector
        overlap = found.squared[:, order] / torch.minimum(r, w)
        mean, variance = overlap_moments(r, w, stream.d_model)
        return Record(
            self.question,
            (
                Axis("reader", readers.labels, readers.channels),
                Axis("writer", tuple(writers.labels[i] for i in order.tolist())),
            ),
            (
                Column("overlap", overlap, "1, in [0, 1]", "mean cos^2 of principal angles"),
                Column("null_ratio", overlap / mean, "1 (ratio)", "over the Haar mean max(r_r, r_w)/d"),
                Column("z", _standard(overlap - mean, variance), "standard deviations", "against the Haar moments"),
            ),
            parameters={"port": self.port, "writers": self.writers, "energy": self.energy},
            stamp={"norm": stream.norm_stamp, "gauge": "subspaces: free of heads' inner bases"},
            provenance=stream.provenance,
        )

    def _readers(self, stream: Stream) -> Side:
        if self.port not in HEAD_PORTS:
            return self._projected(stream, wide_readers(stream, self.port))
        return self._heads(stream, self.port)

    def _writers(self, stream: Stream) -> Side:
        alone = self.writers == "heads"
        heads = self._heads(stream, "O") if alone or stream.heads else heads_side(stream, None, ())
        return heads if alone else self._projected(stream, with_parts(stream, heads))

    def _heads(self, stream: Stream, role: HeadRole) -> Side:
        need_heads(stream)
        side = heads_in(stream, role)
        basis = frames(stream, role, stream.attention_layers, rank_cut(stream), self.energy).basis
        stack = MapStack(basis, torch.arange(len(basis)), None, side.position)
        names = tuple(name.removesuffix(".O") for name in side.names)
        return heads_side(stream, stack, names, side.channels)

    def _projected(self, stream: Stream, side: Side) -> Side:
        """Every square replaced by the projector on its leading eigenvectors."""
        cut = rank_cut(stream)
        return replace(side, wide=tuple(partial(_projector, make, cut, self.energy) for make in side.wide))


def _projector(make: Square, cut: float, energy: float | None) -> Tensor:
    values, vectors = torch.linalg.eigh(make())
    gains = values.flip(0).clamp_min(0).sqrt()
    kept = int((gains > cut * gains[0]).sum()) if energy is None else Spectrum(gains).energy_rank(energy)
    basis = vectors[:, len(gains) - kept :]
    return basis @ basis.T


def _standard(distance: Tensor, variance: Tensor) -> Tensor:
    """In standard deviations; a map that spans the stream has none and is absent."""
    return torch.where(variance > 1e-12, distance / variance.sqrt(), float("nan"))
