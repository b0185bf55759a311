"""A channel in tokens: its singular directions in the stream, and the tokens that stand nearest to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from virtual_weights.analysis.channels.channel import circuit_map
from virtual_weights.analysis.channels.direction_tokens import (
    DirectionBlock,
    blocks,
    checked,
    columns,
    nearest_rows,
    vocabulary,
)
from virtual_weights.linalg import Spectrum, svd
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Record
from virtual_weights.stream import Question, Stream, parse
from virtual_weights.stream.virtual import reading_map, virtual_weight, writing_map


@final
@dataclass(frozen=True)
class ChannelTokens(Question[Stream]):
    """The singular directions of a virtual weight, or of one circuit, in tokens.

    A virtual weight ``V = R~ O = sum_i s_i u_i v_i^T`` has up to four directions of the stream for each gain ("ends"):

    - ``source``: v, what the writer takes up at its source (writer is a head);
    - ``written``: ``O v``, what it then writes;
    - ``read``: ``R~^T u``, what the reader is sensitive to;
    - ``target``: u, what results from it (reader is a head): by port V what that head writes; by K the queries, by Q
      the keys, that meet it.

    One circuit ``C = sum_i s_i u_i v_i^T`` has two: OV ``read`` (v) and ``written`` (u), QK ``query`` (u) and ``key``
    (v). Every end is compared with the rows of the unembedding (norm folded) and against the token embeddings.

    **Blocks.** Where neighbouring gains differ by less than ``tolerance`` their singular vectors are arbitrary: a
    relative error e of the weights turns them by about e over the relative gap. Such directions are one block, and a
    token's cosine is then to the block's subspace, >= 0 and free of any basis. Chains of near gains make one block.

    **Signs.** ``(u, v)`` and ``(-u, -v)`` are the same. A direction is turned so that the token nearest to its first of
    ``written`` and ``query`` has a positive cosine; the signs of all its ends then belong together.

    A weight that is zero has no direction and gives no row. Invariant under re-basing of heads (QK at offset 0) and,
    with RMSNorm folded, under rotation of the stream.

    Attributes:
        name: the writer, e.g. ``"L16H0"``; or, without a reader, a circuit: ``"L16H0.ov"``, ``"L17H3.qk"``.
        reader: e.g. ``"L17H3.K"``, ``"L5.mlp.up"``.
        count: how many tokens for each end and side.
        blocks: how many blocks, largest gains first.
        tolerance: relative gap of neighbouring gains, in [0, 1), at or below which they are one block.
        rotary_offset: query position minus key position; None is offset 0.
    """

    question: ClassVar[str] = "channel_tokens"
    name: str
    reader: str | None = None
    count: int = 5
    blocks: int = 8
    tolerance: float = 0.01
    rotary_offset: int | None = None

    def __post_init__(self) -> None:
        checked(self.count, self.blocks, self.tolerance)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Find the tokens.

        Returns:
            A Record over ``row``, one for each block, end, side and place: ``cosine`` (signed for one direction, to the
            subspace for a block), ``random`` (about what the best of as many random tokens reaches), ``gain`` (the
            block's largest), ``energy`` (its share of the squared gains), ``written_read`` (cosine of what is written
            with what is read, of QK of query with key; of a block the mean over its principal angles),
            ``directions`` (``"1"`` or ``"2-4"``), ``size``, ``end``, ``side``, ``place``, ``token`` and ``text``.

        Raises:
            UsageError: a name is wrong, the writer comes after the reader, or the checkpoint holds no tokens.
        """
        return next(self.together([self], stream, progress))[1]

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Stream, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        alike: dict[int, list[ChannelTokens]] = {}
        for question in questions:
            assert isinstance(question, ChannelTokens)
            alike.setdefault(question.count, []).append(question)
        tokens, done = vocabulary(subject), 0
        for count, group in alike.items():
            maps, sizes = list[list[DirectionBlock]](), list[int]()
            for question in group:
                gains, ends = directions_of(subject, question.name, question.reader, question.rotary_offset or 0)
                maps.append(blocks(gains, ends, question.tolerance, question.blocks))
                sizes.append(len(gains))
                progress(done := done + 1, len(questions))
            for question, rows, size in zip(group, nearest_rows(subject, tokens, maps, count), sizes, strict=True):
                yield question, question._record(subject, rows, size)

    def _record(self, stream: Stream, rows: list[dict[str, Any]], gains: int) -> Record:
        return stream.record(
            self,
            (Axis("row", tuple(str(i + 1) for i in range(len(rows)))),),
            columns(rows),
            rotary_offset=self.rotary_offset,
            gauge="circuits: free of heads' inner bases; signs by the nearest token",
            gains=gains,
        )


def directions_of(
    stream: Stream, name: str, reader: str | None = None, offset: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gains above rounding (r,), descending, and for each end its directions in columns (d, r), not normalised.

    Args, ends and errors as in :class:`ChannelTokens`.
    """
    if reader is None:
        factors = svd(circuit_map(stream, name, offset))
        if name.endswith("ov"):
            ends = {"read": factors.V, "written": factors.U}
        else:
            ends = {"query": factors.U, "key": factors.V}
    else:
        factors = svd(virtual_weight(stream, name, reader, offset))
        ends = {"source": factors.V} if parse(name).kind == "head" else {}
        ends["written"] = writing_map(stream, name) @ factors.V
        ends["read"] = reading_map(stream, parse(reader), offset).T @ factors.U
        ends |= {"target": factors.U} if parse(reader).kind == "head" else {}
    rank = Spectrum(factors.S).numerical_rank()
    return factors.S[:rank], {end: vectors[:, :rank] for end, vectors in ends.items()}
