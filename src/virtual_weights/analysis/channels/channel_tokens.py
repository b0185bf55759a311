"""A channel in tokens: its singular directions in the stream, and the tokens that stand nearest to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.channels.channel import circuit
from virtual_weights.analysis.maps.circuits import unembedding
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Dense, Progress, Spectrum, accumulate, column_space, svd
from virtual_weights.linalg.numerics import converted
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream, parse
from virtual_weights.stream.question import Question
from virtual_weights.stream.virtual import reading_map, virtual_weight, writing_map

Side = Literal["unembed", "embed"]


@final
@dataclass(frozen=True)
class ChannelTokens(Question):
    """The singular directions of a virtual weight, or of one circuit, in tokens.

    A virtual weight ``V = R~ O = sum_i s_i u_i v_i^T`` has up to four directions of the stream for each gain ("ends"):

    - ``source``: v, what the writer takes up at its source (writer is a head);
    - ``written``: ``O v``, what it then writes;
    - ``read``: ``R~^T u``, what the reader is sensitive to;
    - ``target``: u, what comes of it (reader is a head): by port V what that head writes; by K the queries, by Q the
      keys, that meet it.

    One circuit ``C = sum_i s_i u_i v_i^T`` has two: OV ``read`` (v) and ``written`` (u), QK ``query`` (u) and ``key``
    (v). Every end is held against the rows of the unembedding (norm folded) and against the token embeddings.

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
        count: how many tokens each.
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

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
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
        sides = _sides(stream)
        gains, ends = directions_of(stream, self.name, self.reader, self.rotary_offset or 0)
        blocks = blocks_of(gains, self.tolerance)[: self.blocks]
        bases = {end: [_basis(vectors[:, cut]) for cut in blocks] for end, vectors in ends.items()}
        flat = [basis for each in bases.values() for basis in each]
        found = {side: _nearest(rows, flat, self.count) for side, rows in sides.items()}
        at = {end: i * len(blocks) for i, end in enumerate(ends)}
        first = found[next(iter(sides))][0][:, at["written" if "written" in ends else "query"] :]
        texts, energy = stream.source.token_texts(), gains.square() / gains.square().sum()
        rows: list[dict[str, Any]] = []
        for (i, cut), (end, side) in product(enumerate(blocks), product(ends, sides)):
            cosines, ids = (x[:, at[end] + i] for x in found[side])
            sign = 1.0 if float(first[0, i]) >= 0 else -1.0
            shared = {
                "random": random_reach(len(sides[side]), stream.d_model, cut.stop - cut.start),
                "gain": float(gains[cut.start]),
                "energy": float(energy[cut].sum()),
                "directions": _name(cut),
                "size": cut.stop - cut.start,
                "end": end,
                "side": side,
            }
            for place, (cosine, token) in enumerate(zip(cosines.tolist(), ids.tolist(), strict=True), 1):
                text = None if texts is None else texts[token]
                rows.append({"cosine": sign * cosine, **shared, "place": place, "token": token, "text": text})
        return Record(
            self.question,
            (Axis("row", tuple(str(i + 1) for i in range(len(rows)))),),
            _columns(rows),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "rotary_offset": "no rotary embedding" if stream.spec.rotary is None else self.rotary_offset or 0,
                "gauge": "circuits: free of heads' inner bases; signs by the nearest token",
                "gains": len(gains),
            },
            provenance=stream.provenance,
        )


def directions_of(
    stream: Stream, name: str, reader: str | None = None, offset: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gains above rounding (r,), descending, and for each end its directions in columns (d, r), not normalised.

    Args, ends and errors as in :class:`ChannelTokens`.
    """
    if reader is None:
        parts = svd(circuit(stream, name, offset))
        ends = {"read": parts.V, "written": parts.U} if name.endswith("ov") else {"query": parts.U, "key": parts.V}
    else:
        parts = svd(virtual_weight(stream, name, reader, offset))
        written, read = writing_map(stream, name) @ parts.V, reading_map(stream, parse(reader), offset).T @ parts.U
        ends = {"source": parts.V} if parse(name).kind == "head" else {}
        ends |= {"written": written, "read": read}
        ends |= {"target": parts.U} if parse(reader).kind == "head" else {}
    rank = Spectrum(parts.S).numerical_rank()
    return parts.S[:rank], {end: vectors[:, :rank] for end, vectors in ends.items()}


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


def _sides(stream: Stream) -> dict[Side, Tensor]:
    """Tokens as rows of the unembedding and of the embedding, (t, d), where the checkpoint holds them."""
    sides: dict[Side, Tensor] = {}
    out = unembedding(stream)
    if out is not None:
        sides["unembed"] = out[0]
    if stream.model.has("embed"):
        sides["embed"] = stream.write("embed")[0].T
    if not sides:
        raise UsageError(
            "this checkpoint holds neither embedding nor unembedding", expected="one of them", do="open all of it"
        )
    return sides


def _basis(vectors: Tensor) -> Tensor:
    """Orthonormal columns: a single direction keeps its sign."""
    return (
        torch.nn.functional.normalize(vectors, dim=0) if vectors.shape[1] == 1 else column_space(Dense(vectors)).basis
    )


def _nearest(rows: Tensor, bases: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """For each basis the rows of largest ``|cos|`` to its span: cosines (count, n), signed for a line, and places."""
    columns = torch.cat([torch.zeros(rows.shape[1], 0, dtype=accumulate), *bases], dim=1)
    sizes = torch.tensor([basis.shape[1] for basis in bases], dtype=torch.int64)
    owner, line = torch.arange(len(sizes)).repeat_interleave(sizes), sizes == 1
    best, ids = torch.zeros(0, len(bases), dtype=accumulate), torch.zeros(0, len(bases), dtype=torch.int64)
    step = max(1, converted // (8 * max(columns.shape)))
    for start in range(0, len(rows), step):
        # tokens that are zero after folding point nowhere: their cosine is 0
        along = torch.nn.functional.normalize(rows[start : start + step].to(accumulate), dim=1) @ columns
        empty = torch.zeros(len(along), len(bases), dtype=accumulate)
        cosine = torch.where(line, empty.index_add(1, owner, along), empty.index_add(1, owner, along.square()).sqrt())
        here = torch.arange(start, start + len(along))[:, None].expand(-1, len(bases))
        best, ids = torch.cat([best, cosine]), torch.cat([ids, here])
        order = best.abs().topk(min(count, len(best)), dim=0).indices
        best, ids = best.gather(0, order), ids.gather(0, order)
    return best, ids


def _name(cut: slice) -> str:
    return str(cut.stop) if cut.stop - cut.start == 1 else f"{cut.start + 1}-{cut.stop}"


_UNITS = {
    "cosine": ("1, in [-1, 1]", "of the token to the direction, or to the block's subspace"),
    "random": ("1, in [0, 1]", "what one of as many random tokens reaches"),
    "gain": ("weights", "largest singular value of the block"),
    "energy": ("1, in [0, 1]", "the block's share of the squared gains"),
    "directions": ("", "which singular directions"),
    "size": ("directions", "dimension of the block"),
    "end": ("", "source, written, read or target; query or key"),
    "side": ("", "unembed: norm folded; embed"),
    "place": ("", "by descending |cosine|"),
    "token": ("", "id"),
    "text": ("", "where the checkpoint knows it"),
}


def _columns(rows: list[dict[str, Any]]) -> tuple[Column, ...]:
    def values(name: str) -> Tensor | tuple[Any, ...]:
        own = [row[name] for row in rows]
        if name in ("cosine", "random", "gain", "energy"):
            return torch.tensor(own, dtype=accumulate)
        return torch.tensor(own, dtype=torch.int64) if name in ("size", "place", "token") else tuple(own)

    return tuple(Column(name, values(name), *about) for name, about in _UNITS.items())
