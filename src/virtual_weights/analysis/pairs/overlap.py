"""Overlap of subspaces: whether what a component writes lies where another reads, whatever the gains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import HeadRole, check_energy, rank_cut, subspace_axis, subspace_bases
from virtual_weights.analysis.maps.map_side import (
    Gram,
    MapSide,
    lift_columns,
    pair_products,
    wide_readers,
    writing_side,
)
from virtual_weights.linalg import MapStack, Spectrum, overlap_moments, standardised
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Column, Record
from virtual_weights.stream import Question, Stream, cost
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers, check_port, check_writers


@dataclass(frozen=True)
class Overlap(Question[Stream]):
    """Mean squared cosine of the principal angles between what each writer can write and what a port can read.

    With orthonormal bases ``Q_w`` of a writer's column space (dimension r_w) and ``Q_r`` of a reader's row space
    (dimension r_r), ``overlap = ||Q_r^T Q_w||_F^2 / min(r_r, r_w)``, the projection kernel normalised to [0, 1].
    Columns: ``overlap``; ``null_ratio``, over its Haar mean ``max(r_r, r_w)/d``; ``z``; ``dimensions``, the smaller of
    both dimensions, of which 0 shares nothing and has no overlap. Heads enter by their circuits,
    those that share a key or value head are one reader, named after the first of them. A whole MLP or embedding spans
    the stream, and overlaps with everything, unless ``energy`` says how much of it is asked about. ``lift``,
    ``writer_effect`` and ``reader_effect`` are those of ``Composition`` with each circuit's G replaced by the projector
    on its subspace, ``G = Q Q^T / r``; means are over the readers named here.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` or ``"unembed"``.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and biases too.
        energy: keep of each map the fewest leading directions with this share of its squared gains, in (0, 1]; None
            keeps its whole numerical rank.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.

    Reference: Hamm and Lee 2008, "Grassmann discriminant analysis" (projection kernel).
    """

    question: ClassVar[str] = "overlap"
    port: Port = "K"
    writers: Writers = "heads"
    energy: float | None = None
    device: str = cost("cpu")
    memory_mb: int = cost(256)

    def __post_init__(self) -> None:
        check_port(self.port)
        check_writers(self.writers)
        check_energy(self.energy)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute all pairs.

        Returns:
            A Record over (reader, writer), both in order of depth; of Q, K and V the distinct read maps of the port.

        Raises:
            UsageError: the model has no such port, or the checkpoint holds no reader or no writer.
        """
        products = pair_products(
            self._readers(stream),
            self._projected(stream, writing_side(stream, self.writers, lambda: self._heads(stream, "writer", "O"))),
            device=self.device,
            memory=self.memory_mb * 2**20,
            averaged=True,
            progress=progress,
        )
        r, w = products.readers[0].round()[:, None], products.writers[0].round()[None, :]  # the trace of a projector
        overlap = products.squared / torch.minimum(r, w)
        mean, variance = overlap_moments(r, w, stream.d_model)
        # a map that spans the stream has no deviation, and so no z
        z = standardised(overlap, mean, variance)
        least = torch.minimum(r, w).expand_as(overlap).masked_fill(products.squared.isnan(), torch.nan)
        columns = (
            Column("overlap", overlap, "1, in [0, 1]", "mean cos^2 of principal angles"),
            Column("null_ratio", overlap / mean, "1 (ratio)", "over the Haar mean max(r_r, r_w)/d"),
            Column("z", z, "standard deviations", "against the Haar moments"),
            Column("dimensions", least, "dimensions", "min(r_r, r_w): 0 where one reads or writes nothing"),
            *lift_columns(products, stream.d_model),
        )
        return stream.record(self, products.axes, columns, gauge="subspaces: free of heads' inner bases")

    def _readers(self, stream: Stream) -> MapSide:
        if self.port in HEAD_PORTS:
            return self._heads(stream, "reader", self.port)
        return self._projected(stream, wide_readers(stream, self.port))

    def _heads(self, stream: Stream, name: str, role: HeadRole) -> MapSide:
        groups = stream.groups.readers("Q")
        axis, position = subspace_axis(stream, name, role)
        axis = replace(axis, labels=tuple(label.removesuffix(".O") for label in axis.labels))
        basis = subspace_bases(stream, role, groups, rank_cut(stream), self.energy).basis
        stack = MapStack(basis, torch.arange(len(basis)), None, position)
        return MapSide(axis, position, stack, (), stream.d_model)

    def _projected(self, stream: Stream, side: MapSide) -> MapSide:
        """Every Gram replaced by the projector on its leading eigenvectors."""
        cut = rank_cut(stream)
        return replace(side, wide=tuple(partial(_projector, gram, cut, self.energy) for gram in side.wide))


def _projector(gram: Gram, cut: float, energy: float | None) -> Tensor:
    values, vectors = torch.linalg.eigh(gram())
    gains = values.flip(0).clamp_min(0).sqrt()
    rank = int((gains > cut * gains[0]).sum()) if energy is None else Spectrum(gains).energy_rank(energy)
    basis = vectors[:, len(gains) - rank :]
    return basis @ basis.T
