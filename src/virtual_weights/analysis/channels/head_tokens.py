"""All heads in tokens: what each OV circuit reads and writes most strongly, in one pass over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

from virtual_weights.analysis.channels.direction_tokens import (
    DirectionBlock,
    blocks,
    checked,
    columns,
    nearest_rows,
    vocabulary,
)
from virtual_weights.analysis.maps.head_svd import head_svd
from virtual_weights.linalg import Spectrum, side_by_side
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, cost


@final
@dataclass(frozen=True)
class HeadTokens(Question[Stream]):
    """The strongest singular directions of every head's OV circuit in tokens, with signs and blocks.

    ``OV = sum_i s_i u_i v_i^T`` has the ends ``read`` (v) and ``written`` (u). Rows, blocks and signs of each head are
    those of ``ChannelTokens("L3H1.ov")``; all heads share one pass over the embeddings and one over the unembedding.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        count: how many tokens for each end and side.
        blocks: how many blocks for each head, largest gains first.
        tolerance: relative gap of neighbouring gains, in [0, 1), at or below which they are one block.
        memory_mb: for directions that are compared together, in MiB; with less there are more passes.
    """

    question: ClassVar[str] = "head_tokens"
    count: int = 3
    blocks: int = 3
    tolerance: float = 0.01
    memory_mb: int = cost(256)

    def __post_init__(self) -> None:
        checked(self.count, self.blocks, self.tolerance)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Find the tokens.

        Args:
            stream: the model.
            progress: called with (heads done, heads in all).

        Returns:
            A Record over ``row``: ``head``, and the columns of ``ChannelTokens``. A head whose OV is zero has no row.

        Raises:
            UsageError: the checkpoint holds no attention head or no tokens.
        """
        tokens, rows = vocabulary(stream), list[dict[str, Any]]()
        for batch in self._batches(stream, progress):
            rows += nearest_rows(stream, tokens, [batch], self.count)[0]
        head = Column("head", tuple(row["head"] for row in rows), "", "whose OV circuit")
        return stream.record(
            self,
            (Axis("row", tuple(str(i + 1) for i in range(len(rows)))),),
            columns(rows, (head,)),
            gauge="circuits: free of heads' inner bases; signs by the nearest token",
        )

    def _batches(self, stream: Stream, progress: Progress) -> Iterator[list[DirectionBlock]]:
        """The first blocks of all heads, as many together as memory allows."""
        groups, batch, size, done = stream.groups.readers("V"), list[DirectionBlock](), 0, 0
        for group, factors in zip(groups, side_by_side(partial(head_svd, stream, "ov"), groups), strict=True):
            for i, label in enumerate(group.labels):
                rank = Spectrum(factors.S[i]).numerical_rank()
                ends = {"read": factors.V[i, :, :rank], "written": factors.U[i, :, :rank]}
                batch += (more := blocks(factors.S[i, :rank], ends, self.tolerance, self.blocks, label))
                size += sum(2 * block.size * 8 * stream.d_model for block in more)
            if size > self.memory_mb * 2**20:
                yield batch
                batch, size = [], 0
            progress(done := done + len(group.labels), len(stream.heads))
        yield batch
