"""Singular directions in tokens: blocks of nearly equal gains, both ends of each, and the tokens nearest to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise, product
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import TokenSide, nearest_tokens, token_rows
from virtual_weights.checkpoint import text_of
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Dense, accumulate, column_space
from virtual_weights.linalg.decompose import gains as singular_values
from virtual_weights.record import Column
from virtual_weights.stream import Stream


@final
@dataclass(frozen=True, eq=False)
class DirectionBlock:
    """Neighbouring singular directions of nearly equal gain.

    Attributes:
        directions: which, ``"1"`` or ``"2-4"``.
        gain: the largest of their gains.
        energy: their share of the squared gains.
        bases: for each end orthonormal columns (d, size); of a single direction with its sign.
        head: whose circuit it is, where the circuits of several heads are compared with tokens together.
    """

    directions: str
    gain: float
    energy: float
    bases: Mapping[str, Tensor]
    head: str | None = None

    @property
    def size(self) -> int:
        """Number of directions."""
        return next(iter(self.bases.values())).shape[1]

    @property
    def written_read(self) -> float:
        """Cosine between what is written and what is read, of QK between query and key, free of any choice of basis.

        Of one direction it has a sign, since both ends turn together; of several it is the mean of the cosines of the
        principal angles between the two subspaces. In [-1, 1].
        """
        a, b = (self.bases[end] for end in (("written", "read") if "read" in self.bases else ("query", "key")))
        core = a.T @ b
        return float(core.clamp(-1.0, 1.0) if self.size == 1 else singular_values(core).clamp(max=1.0).mean())


def blocks(
    gains: Tensor, ends: Mapping[str, Tensor], tolerance: float, count: int, head: str | None = None
) -> list[DirectionBlock]:
    """The first blocks of the singular directions of one map.

    Args:
        gains: (r,) descending, > 0.
        ends: for each end the directions in columns, (d, r), not normalised.
        tolerance: as in :func:`blocks_of`.
        count: how many blocks at most.
        head: whose circuit it is.
    """
    energy = gains.square() / gains.square().sum()
    return [
        DirectionBlock(
            str(cut.stop) if cut.stop - cut.start == 1 else f"{cut.start + 1}-{cut.stop}",
            float(gains[cut.start]),
            float(energy[cut].sum()),
            {end: _basis(vectors[:, cut]) for end, vectors in ends.items()},
            head,
        )
        for cut in islice(blocks_of(gains, tolerance), count)
    ]


def blocks_of(gains: Tensor, tolerance: float) -> tuple[slice, ...]:
    """Runs of neighbouring gains (descending, > 0) with ``(s_i - s_(i+1)) / s_i <= tolerance``."""
    gaps = (1.0 - gains[1:] / gains[:-1]).tolist()
    cuts = [0, *(i for i, gap in enumerate(gaps, 1) if gap > tolerance), len(gains)]
    return tuple(slice(a, b) for a, b in pairwise(cuts) if a < b)


def nearest_rows(
    stream: Stream, tokens: Mapping[TokenSide, Tensor], maps: Sequence[Sequence[DirectionBlock]], count: int
) -> list[list[dict[str, Any]]]:
    """For each map one row for each block, end, side and place, in one pass over the vocabulary for each side.

    The sign of a direction is chosen so that the token nearest to its first of ``written`` and ``query`` has a positive
    cosine; its other ends turn with it.

    Args:
        stream: the model.
        tokens: its vocabulary.
        maps: the blocks of each.
        count: how many tokens for each end and side.
    """
    bases = [[basis for block in blocks for basis in block.bases.values()] for blocks in maps]
    nearest = {side: nearest_tokens(vectors, bases, count) for side, vectors in tokens.items()}
    texts = stream.source.token_texts()
    sizes: dict[TokenSide, int] = {side: len(vectors) for side, vectors in tokens.items()}
    return [
        list(_rows(blocks, {side: nearest[side][i] for side in tokens}, sizes, stream.d_model, texts))
        for i, blocks in enumerate(maps)
    ]


def _rows(
    blocks: Sequence[DirectionBlock],
    nearest: Mapping[TokenSide, tuple[Tensor, Tensor]],
    sizes: Mapping[TokenSide, int],
    d: int,
    texts: Any,
) -> Iterator[dict[str, Any]]:
    """The rows of one map, of the cosines (count, n) and ids of its bases' nearest tokens."""
    listed: dict[TokenSide, tuple[list[list[float]], list[list[int]]]] = {
        side: (cosines.T.tolist(), ids.T.tolist()) for side, (cosines, ids) in nearest.items()
    }
    sides, start = list(listed), 0
    for block in blocks:
        column = {end: start + i for i, end in enumerate(block.bases)}
        start += len(column)
        first = listed[sides[0]][0][column["written" if "written" in column else "query"]][0]
        sign = 1.0 if first >= 0 else -1.0
        about = {
            **({} if block.head is None else {"head": block.head}),
            "gain": block.gain,
            "energy": block.energy,
            "written_read": block.written_read,
            "directions": block.directions,
            "size": block.size,
        }
        for end, side in product(column, sides):
            reach = random_reach(sizes[side], d, block.size)
            pairs = zip(*(values[column[end]] for values in listed[side]), strict=True)
            for place, (cosine, token) in enumerate(pairs, 1):
                row = {"cosine": sign * cosine, "random": reach, "place": place, "token": token}
                yield {**about, **row, "text": text_of(texts, token), "end": end, "side": side}


def vocabulary(stream: Stream) -> Mapping[TokenSide, Tensor]:
    """Tokens as rows (t, d) of the unembedding and of the embedding, as far as the checkpoint has them.

    Raises:
        UsageError: it has neither.
    """
    tokens = token_rows(stream)
    if not tokens:
        raise UsageError(
            "this checkpoint holds neither embedding nor unembedding",
            expected="one of them",
            do="open the complete checkpoint",
        )
    return tokens


@cache
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


def checked(count: int, blocks: int, tolerance: float) -> None:
    """Refuse to show no tokens or no blocks, and a tolerance that is not one.

    Raises:
        UsageError: one of them is out of range.
    """
    if count < 1 or blocks < 1 or not 0.0 <= tolerance < 1.0:
        raise UsageError(
            f"{count} tokens of {blocks} blocks, tolerance {tolerance}",
            expected="at least one token and one block, and a tolerance in [0, 1)",
            do="pass for example count=5, blocks=8, tolerance=0.01",
        )


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
    "written_read": ("1, in [-1, 1]", "cosine of what is written with what is read (QK: query with key), of the block"),
    "directions": ("", "which singular directions"),
    "size": ("directions", "dimension of the block"),
    "end": ("", "source, written, read or target; query or key"),
    "side": ("", "unembed: norm folded; embed"),
    "place": ("place, from 1", "by descending |cosine|"),
    "token": ("id", "of the vocabulary"),
    "text": ("", "where the checkpoint knows it"),
}
_REAL = "cosine", "random", "gain", "energy", "written_read"
_WHOLE = "size", "place", "token"


def columns(rows: Sequence[Mapping[str, Any]], also: Iterable[Column] = ()) -> tuple[Column, ...]:
    """The columns of a record whose rows these are, after further ones."""

    def values(name: str) -> Tensor | tuple[Any, ...]:
        column = [row[name] for row in rows]
        if name in _REAL:
            return torch.tensor(column, dtype=accumulate)
        return torch.tensor(column, dtype=torch.int64) if name in _WHOLE else tuple(column)

    return (*also, *(Column(name, values(name), *about) for name, about in _UNITS.items()))
