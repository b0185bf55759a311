"""Directions of the stream that nothing reads, or nothing has written, and what they say in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.tally import tally
from virtual_weights.analysis.traffic import rank_cut, reads_from, unembedding, writes_into
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Subspace, accumulate
from virtual_weights.linalg.numerics import converted
from virtual_weights.stream import Stream


def unread(stream: Stream, state: int, *, unembed: bool = True, cut: float | None = None) -> Subspace:
    """What nothing at or after a state can see: the orthogonal complement of the sum of all later read spaces.

    Args:
        stream: the model.
        state: position in the stream, 0 (the embedding) to ``stream.states - 1``.
        unembed: whether the unembedding counts as a reader.
        cut: as in ``Bandwidth``; a larger cut adds directions that are hardly read.

    Returns:
        Subspace of R^d, the least read direction first. Adding to the stream anything in it changes no later read (at
        the default cut, none by more than rounding) but through the norm's scalar. With LayerNorm folded the constant
        direction is in it. Invariant under re-basing of heads; turns with the stream.

    Raises:
        UsageError: no such state.
    """
    cut = _checked(stream, state, cut)
    later = (maps for p in range(state, stream.states) for maps in reads_from(stream, p))
    out = unembedding(stream) if unembed else None
    return tally(chain(later, () if out is None else (out,)), stream.d_model, cut).split(cut)[1]


def unwritten(stream: Stream, state: int, *, cut: float | None = None) -> Subspace:
    """What no writer has written at or before a state: the orthogonal complement of the span of all writes so far.

    Args and errors as in :func:`unread`.

    Returns:
        Subspace of R^d, the least written direction first; the stream's state has no component in it, on any text.
    """
    cut = _checked(stream, state, cut)
    earlier = (maps for p in range(state + 1) for maps in writes_into(stream, p))
    return tally(earlier, stream.d_model, cut).split(cut)[1]


@final
@dataclass(frozen=True)
class TokenCosine:
    """One token beside a direction: its id, its text where the checkpoint knows it, and the cosine between both."""

    token: int
    text: str | None
    cosine: float


def in_tokens(
    stream: Stream, directions: Tensor, *, side: Literal["unembed", "embed"] = "unembed", count: int = 5
) -> tuple[tuple[TokenCosine, ...], ...]:
    """The tokens nearest to each direction, either way along it.

    Args:
        stream: the model.
        directions: vectors of the stream in columns, (d, n), such as a Subspace's ``basis``.
        side: ``"unembed"``: rows of the read map (norm folded), what the direction would say; ``"embed"``: token
            embeddings, what would say it.
        count: how many tokens each.

    Returns:
        For each direction its tokens by descending ``|cos|``. A cosine is the trust to put into the token: random
        directions reach about ``sqrt(2 ln(t) / d)`` among t tokens.
    """
    rows = stream.read("unembed").maps[0] if side == "unembed" else stream.write("embed")[0].T
    unit = torch.nn.functional.normalize(directions.to(accumulate), dim=0)
    best = torch.zeros(0, unit.shape[1], dtype=accumulate)
    ids = torch.zeros(0, unit.shape[1], dtype=torch.int64)
    step = max(1, converted // (8 * max(rows.shape[1], unit.shape[1])))
    for start in range(0, len(rows), step):
        # tokens that are zero after folding point nowhere: their cosine is 0
        chunk = torch.nn.functional.normalize(rows[start : start + step].to(accumulate), dim=1)
        here = torch.arange(start, start + len(chunk))[:, None].expand(-1, unit.shape[1])
        best, ids = torch.cat([best, chunk @ unit]), torch.cat([ids, here])
        order = best.abs().topk(min(count, len(best)), dim=0).indices
        best, ids = best.gather(0, order), ids.gather(0, order)
    texts = stream.source.token_texts()

    def told(token: int, cosine: float) -> TokenCosine:
        return TokenCosine(token, None if texts is None else texts[token], cosine)

    columns = zip(ids.T.tolist(), best.T.tolist(), strict=True)
    return tuple(tuple(map(told, tokens, cosines)) for tokens, cosines in columns)


def _checked(stream: Stream, state: int, cut: float | None) -> float:
    if not 0 <= state < stream.states:
        raise UsageError(
            f"no state {state} in this stream",
            expected=f"a number from 0 (the embedding) to {stream.states - 1} (what the unembedding reads)",
            do="correct the state",
        )
    return rank_cut(stream) if cut is None else cut
