"""Overlap of subspaces: whether what a component writes lies where another reads, whatever the gains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import HeadRole, check_energy, rank_cut, subspace_axis, subspace_bases
from virtual_weights.analysis.maps.map_side import (
    MapSide,
    Piece,
    Rows,
    gram_of,
    read_rows,
    thin_pieces,
    wide_readers,
    writing_side,
)
from virtual_weights.analysis.maps.pair_products import AllPairs, lift_columns
from virtual_weights.linalg import MapStack, Spectrum, one_thread, overlap_moments, standardised
from virtual_weights.record import Column, Record
from virtual_weights.stream import Block, Group, Stream
from virtual_weights.stream.effective import as_seen
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers, check_port, check_writers


@dataclass(frozen=True)
class Overlap(AllPairs):
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
        memory_mb: MiB for maps and Grams that are in use together.

    Reference: Hamm and Lee 2008, "Grassmann discriminant analysis" (projection kernel).
    """

    question: ClassVar[str] = "overlap"
    port: Port = "K"
    writers: Writers = "heads"
    energy: float | None = None

    def __post_init__(self) -> None:
        check_port(self.port)
        check_writers(self.writers)
        check_energy(self.energy)

    @property
    def dtype(self) -> torch.dtype:
        """In which pairs are multiplied."""
        return torch.float32

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """All pairs.

        Returns:
            A Record over (reader, writer), both in order of depth; of Q, K and V the distinct read maps of the port.
        """
        products = self.products(subject, blocks)
        r, w = products.readers[0].round()[:, None], products.writers[0].round()[None, :]  # the trace of a projector
        overlap = (products.squared / torch.minimum(r, w)).clamp(max=1.0)
        mean, variance = overlap_moments(r, w, subject.d_model)
        # a map that spans the stream has no deviation, and so no z
        z = standardised(overlap, mean, variance)
        least = torch.minimum(r, w).expand_as(overlap).masked_fill(products.squared.isnan(), torch.nan)
        columns = (
            Column("overlap", overlap, "1, in [0, 1]", "mean cos^2 of principal angles"),
            Column("null_ratio", overlap / mean, "1 (ratio)", "over the Haar mean max(r_r, r_w)/d"),
            Column("z", z, "standard deviations", "against the Haar moments"),
            Column("dimensions", least, "dimensions", "min(r_r, r_w): 0 where one reads or writes nothing"),
            *lift_columns(products, subject.d_model, torch.finfo(self.dtype).eps),
        )
        subject = as_seen(subject, self.port)
        return subject.record(self, products.axes, columns, gauge="subspaces: free of heads' inner bases")

    def readers(self, stream: Stream) -> MapSide:
        """What reads through the port."""
        if self.port in HEAD_PORTS:
            axis, _ = subspace_axis(stream, "reader", self.port)
            return MapSide(axis, self._heads(stream, self.port), stream.d_model)
        rows = partial(self._basis, stream, partial(read_rows, stream, self.port))
        return wide_readers(stream, self.port, rows)

    def written(self, stream: Stream) -> MapSide:
        """What writes."""
        stream = as_seen(stream, self.port)
        return writing_side(
            stream, self.writers, self._heads(stream, "O"), lambda rows: partial(self._basis, stream, rows)
        )

    def _heads(self, stream: Stream, role: HeadRole) -> tuple[Piece, ...]:
        groups = stream.groups.readers("Q")
        _, position = subspace_axis(stream, "", role)
        return thin_pieces(groups, position, partial(self._bases, stream, role), stream.d_model)

    def _bases(self, stream: Stream, role: HeadRole, groups: Sequence[Group]) -> MapStack:
        with one_thread():
            return MapStack.unplaced(subspace_bases(stream, role, groups, rank_cut(stream), self.energy).basis)

    def _basis(self, stream: Stream, rows: Rows, group: Group) -> Iterable[Tensor]:
        """(r, d): the leading directions of a wide map, orthonormal."""
        with one_thread():
            values, vectors = torch.linalg.eigh(gram_of(rows(group), stream.d_model))
        gains = values.flip(0).clamp_min(0).sqrt()
        rank = int((gains > rank_cut(stream) * gains[0]).sum())
        rank = rank if self.energy is None else Spectrum(gains).energy_rank(self.energy)
        return [vectors[:, len(gains) - rank :].T]
