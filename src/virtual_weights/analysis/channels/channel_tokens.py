"""A channel in tokens: its singular directions in the stream, and the tokens that stand nearest to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.channels.channel import circuit_map
from virtual_weights.analysis.maps.circuits import nearest_tokens, token_rows
from virtual_weights.checkpoint import text_of
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Dense, Spectrum, accumulate, column_space, svd
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
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
        if self.count < 1 or self.blocks < 1 or not 0.0 <= self.tolerance < 1.0:
            raise UsageError(
                f"{self.count} tokens of {self.blocks} blocks, tolerance {self.tolerance}",
                expected="at least one token and one block, and a tolerance in [0, 1)",
                do="pass for example count=5, blocks=8, tolerance=0.01",
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Find the tokens.

        Returns:
            A Record over ``row``, one for each block, end, side and place: ``cosine`` (signed for one direction, to the
            subspace for a block), ``random`` (about what the best of as many random tokens reaches), ``gain`` (the
            block's largest), ``energy`` (its share of the squared gains), ``directions`` (``"1"`` or ``"2-4"``),
            ``size``, ``end``, ``side``, ``token`` and ``text``.

        Raises:
            UsageError: a name is wrong, the writer comes after the reader, or the checkpoint holds no tokens.
        """
        del progress  # it is one step
        tokens = token_rows(stream)
        if not tokens:
            raise UsageError(
                "this checkpoint holds neither embedding nor unembedding",
                expected="one of them",
                do="open the complete checkpoint",
            )
        gains, ends = directions_of(stream, self.name, self.reader, self.rotary_offset or 0)
        blocks = blocks_of(gains, self.tolerance)[: self.blocks]
        bases = [_basis(vectors[:, cut]) for vectors in ends.values() for cut in blocks]
        nearest = {side: nearest_tokens(rows, bases, self.count) for side, rows in tokens.items()}
        column = {end: i * len(blocks) for i, end in enumerate(ends)}
        signs = nearest[next(iter(tokens))][0][:, column["written" if "written" in ends else "query"] :]
        texts, energy = stream.source.token_texts(), gains.square() / gains.square().sum()
        rows: list[dict[str, Any]] = []
        for (i, cut), (end, side) in product(enumerate(blocks), product(ends, tokens)):
            cosines, ids = (values[:, column[end] + i].tolist() for values in nearest[side])
            sign = 1.0 if float(signs[0, i]) >= 0 else -1.0
            block = {
                "random": random_reach(len(tokens[side]), stream.d_model, cut.stop - cut.start),
                "gain": float(gains[cut.start]),
                "energy": float(energy[cut].sum()),
                "directions": str(cut.stop) if cut.stop - cut.start == 1 else f"{cut.start + 1}-{cut.stop}",
                "size": cut.stop - cut.start,
                "end": end,
                "side": side,
            }
            for place, (cosine, token) in enumerate(zip(cosines, ids, strict=True), 1):
                text = text_of(texts, token)
                rows.append({"cosine": sign * cosine, **block, "place": place, "token": token, "text": text})
        return stream.record(
            self,
            (Axis("row", tuple(str(i + 1) for i in range(len(rows)))),),
            _columns(rows),
            rotary_offset=self.rotary_offset,
            gauge="circuits: free of heads' inner bases; signs by the nearest token",
            gains=len(gains),
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


def blocks_of(gains: Tensor, tolerance: float) -> tuple[slice, ...]:
    """Runs of neighbouring gains (descending, > 0) with ``(s_i - s_(i+1)) / s_i <= tolerance``."""
    gaps = (1.0 - gains[1:] / gains[:-1]).tolist()
    cuts = [0, *(i for i, gap in enumerate(gaps, 1) if gap > tolerance), len(gains)]
    return tuple(slice(a, b) for a, b in pairwise(cuts) if a < b)


def random_reach(tokens: int, d: int, size: int = 1) -> float:
    """The cosine that one of t random directions reaches, on average, to a subspace of k of d dimensions.

    ``t P(c > reach) = 1`` with ``c = sin(phi)`` of density proportional to ``sin^(k-1)(phi) cos^(d-k-1)(phi)``, that is
    ``c^2 ~ Beta(k/2, (d-k)/2)``; for one direction it is a little below ``sqrt(2 ln(t) / d)``. In [0, 1].
    """
    if size >= d:
        return 1.0
    angle = torch.linspace(0.0, math.pi / 2, 20001, dtype=accumulate)[1:-1]
    log = (size - 1) * angle.sin().log() + (d - size - 1) * angle.cos().log()
    tail = (log - log.max()).exp().flip(0).cumsum(0).flip(0)
    return float(angle[int((tail * tokens >= tail[0]).sum()) - 1].sin())


def _basis(vectors: Tensor) -> Tensor:
    """Orthonormal columns: a single direction keeps its sign."""
    return (
        torch.nn.functional.normalize(vectors, dim=0) if vectors.shape[1] == 1 else column_space(Dense(vectors)).basis
    )


_UNITS = {
    "cosine": ("1, in [-1, 1]", "of the token to the direction, or to the block's subspace"),
    "random": ("1, in [0, 1]", "what one of as many random tokens reaches"),
    "gain": ("weights", "largest singular value of the block"),
    "energy": ("1, in [0, 1]", "the block's share of the squared gains"),
    "directions": ("", "which singular directions"),
    "size": ("directions", "dimension of the block"),
    "end": ("", "source, written, read or target; query or key"),
    "side": ("", "unembed: norm folded; embed"),
    "place": ("place, from 1", "by descending |cosine|"),
    "token": ("id", "of the vocabulary"),
    "text": ("", "where the checkpoint knows it"),
}


def _columns(rows: list[dict[str, Any]]) -> tuple[Column, ...]:
    def values(name: str) -> Tensor | tuple[Any, ...]:
        column = [row[name] for row in rows]
        if name in ("cosine", "random", "gain", "energy"):
            return torch.tensor(column, dtype=accumulate)
        return torch.tensor(column, dtype=torch.int64) if name in ("size", "place", "token") else tuple(column)

    return tuple(Column(name, values(name), *about) for name, about in _UNITS.items())
