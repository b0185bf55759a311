"""One pair's principal angles: how far what a writer writes and what a reader's port reads are the same subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from virtual_weights.analysis.maps.circuits import rank_cut
from virtual_weights.errors import UsageError
from virtual_weights.linalg import LinearMap, accumulate, column_space, random_cosines, row_space
from virtual_weights.linalg.decompose import gains
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, parse
from virtual_weights.stream.virtual import reading_map, virtual_weight, writing_map

_BAND = torch.tensor([0.05, 0.95], dtype=accumulate)


@final
@dataclass(frozen=True)
class PairAngles(Question[Stream]):
    """Cosines of all principal angles between what a writer writes and what a reader's port reads, against chance.

    With orthonormal bases ``Q_w`` of ``col(OV)`` and ``Q_r`` of the row space of the reader's circuit, the cosines are
    the singular values of ``Q_r^T Q_w``, descending; those up to the cut are rounding, 0. ``Subspaces`` has the first
    of them (``cosine``) and their mean square (``overlap``) for all pairs of heads. The band is that of the same
    cosines of random subspaces of the same dimensions, angle by angle.

    Parts with an inner basis of their own (neurons, features, narrow MLPs) enter by their maps. A map with as many
    directions as the stream has, such as that of a wide MLP, an embedding or the unembedding, is refused: it makes no
    angle with anything.

    Invariant under re-basing of heads (QK at offset 0) and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        writer: e.g. ``"L16H0"``.
        reader: e.g. ``"L17H3.K"``.
        rotary_offset: query position minus key position; None is offset 0.
        draws: how many pairs of random subspaces.
        seed: seed of the draws.

    Reference: Bjorck and Golub 1973 (principal angles).
    """

    question: ClassVar[str] = "pair_angles"
    writer: str
    reader: str
    rotary_offset: int | None = None
    draws: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UsageError(f"{self.draws} draws", expected="at least one", do="pass for example draws=50")

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute the cosines.

        Returns:
            A Record over ``direction``, one entry for each of the min(rank_writer, rank_reader) angles, none where a
            map is zero: ``cosine``, ``random_low`` and ``random_high`` (5% and 95% of the draws), each in [0, 1].
            ``stamp["rank_writer"]`` and ``["rank_reader"]`` are the dimensions of the subspaces.

        Raises:
            UsageError: a name is wrong, the writer comes after the reader, or one of them spans the whole stream.
        """
        del progress  # it is one step
        offset, cut = self.rotary_offset or 0, rank_cut(stream)
        virtual_weight(stream, self.writer, self.reader, offset)  # refuses a writer that comes too late
        written, read = writing_map(stream, self.writer), reading_map(stream, parse(self.reader), offset)
        for name, map in ((self.writer, written), (self.reader, read)):
            _check_narrow(name, map, stream.d_model)
        column, row = column_space(written, tolerance=cut), row_space(read, tolerance=cut)
        cosines = gains(row.basis.T @ column.basis).clamp(max=1.0)
        drawn = random_cosines(row.rank, column.rank, stream.d_model, self.draws, self.seed)
        low, high = torch.quantile(drawn, _BAND, dim=0) if drawn.numel() else drawn.new_empty(2, 0)
        return stream.record(
            self,
            (Axis("direction", tuple(str(i + 1) for i in range(len(cosines)))),),
            (
                Column("cosine", cosines.masked_fill(cosines <= cut, 0.0), "1, in [0, 1]", "of the principal angle"),
                Column("random_low", low, "1, in [0, 1]", "5% quantile of that angle's cosine at random"),
                Column("random_high", high, "1, in [0, 1]", "95% quantile of that angle's cosine at random"),
            ),
            rotary_offset=self.rotary_offset,
            gauge="circuits: free of heads' inner bases",
            cut=cut,
            rank_writer=column.rank,
            rank_reader=row.rank,
        )


def _check_narrow(name: str, map: LinearMap, d: int) -> None:
    """Refuse a map other than a head's circuit that can have as many directions as the stream."""
    if parse(name).kind != "head" and min(map.shape) >= d:
        raise UsageError(
            f"{name} has {max(map.shape)} vectors in a stream of width {d}",
            expected="a writer and a reader of fewer directions than the stream, such as heads",
            do="name heads, or single neurons such as L5N7.up",
        )
