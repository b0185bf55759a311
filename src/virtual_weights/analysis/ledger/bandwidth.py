"""The bandwidth ledger: at each state of the stream, how much has been written and how much will be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import (
    last_written,
    nearest_tokens,
    rank_cut,
    reads_from,
    unembedding,
    writes_into,
)
from virtual_weights.checkpoint import text_of
from virtual_weights.errors import UsageError
from virtual_weights.linalg import GRAM_CUT, GramSum, Spectrum, Subspace, accumulate, gram_sum, side_by_side
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, cost

Row = dict[str, float | int]

_COLUMNS = {
    "oversubscription": ("1 (ratio)", "sum of write ranks over d"),
    "read_oversubscription": ("1 (ratio)", "sum of read ranks over d"),
    "writers": ("maps", "writers with writes <= state: heads, MLPs, embeddings, biases"),
    "readers": ("maps", "distinct readers with reads >= state: Q, K, V, gate, up or in, unembedding"),
    "write_ranks": ("dimensions", "sum of the writers' ranks"),
    "read_ranks": ("dimensions", "sum of the readers' ranks"),
    "written_dim": ("dimensions, in [0, d]", "dimension of the span of all writes so far"),
    "written_entropy_rank": ("dimensions, in [1, d]", "entropy rank of sum of G_w / tr G_w"),
    "read_dim": ("dimensions, in [0, d]", "dimension of the sum of all later read spaces"),
    "read_entropy_rank": ("dimensions, in [1, d]", "entropy rank of sum of G_r / tr G_r"),
    "read_dim_blocks": ("dimensions, in [0, d]", "read_dim without the unembedding"),
    "read_entropy_rank_blocks": ("dimensions, in [1, d]", "read_entropy_rank without the unembedding; 0 for no reader"),
    "live_dim": ("dimensions, in [0, d]", "rank of R_later W_before, the stacked maps"),
    "live_dim_blocks": ("dimensions, in [0, d]", "live_dim without the unembedding"),
    "live_entropy_rank": ("dimensions, in [1, d]", "entropy rank of R_later W_before, each map of unit norm"),
    "unread_dim": ("dimensions, in [0, d]", "d - read_dim: directions that nothing later can see"),
    "unwritten_dim": ("dimensions, in [0, d]", "d - written_dim: directions in which nothing has been written"),
    "neurons_before": ("neurons", "neurons that have written"),
    "neurons_after": ("neurons", "neurons that are still to read"),
    "neurons_before_per_d": ("1 (ratio)", "neurons_before / d"),
    "neurons_after_per_d": ("1 (ratio)", "neurons_after / d"),
    "neuron_product": ("1 (ratio)", "N_b N_a / d^2, which is not a compression ratio"),
    "saving": ("1 (ratio), >= 1", "N_a N_b / (r (N_a + N_b - r)), r = min(d, N_a, N_b); absent without neurons"),
}


@dataclass(frozen=True)
class Bandwidth(Question[Stream]):
    """What has been written at or before each state of the stream and is read at or after it.

    State p: a writer counts iff ``writes <= p``, a reader iff ``reads >= p``. Heads enter by their circuits (OV for
    what they write; QK at rotary offset 0 and OV for what they read), so nothing depends on their inner bases; keys and
    values that several heads share are one reader. MLPs and embeddings enter by their own maps.

    Spans come from ``S = sum_i G_i / tr G_i``, where ``G_i = C_i^T C_i`` is the (d, d) Gram of map i, so that every map
    counts alike. Its range is the span; its **dimension** counts eigenvalues above ``cut^2`` times the largest, its
    **entropy rank** is ``exp(H(eigenvalues / sum))``. The **live dimension** is ``rank(R W)`` for R all later reads
    stacked and W all writes so far, side by side: the number of principal cosines between the two spans above ``cut``.
    Columns: see ``record.columns``, each with unit and meaning.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream; spans and counts also
    under scaling of any map.

    Attributes:
        cut: singular values up to this share of the largest count as zero; None is ``rank_cut`` of the stream. A cut
            such as 0.01 counts directions that are hardly used as unused.
        memory_mb: for suffix sums; where they do not fit, some readers are read twice, and at least ``2 sqrt(states)``
            sums are in memory at once.

    Example:
        >>> Bandwidth()(stream)["oversubscription"][-1]  # doctest: +SKIP
    """

    question: ClassVar[str] = "bandwidth"
    cut: float | None = None
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        if self.cut is not None and not GRAM_CUT <= self.cut < 1:
            raise UsageError(
                f"cut={self.cut}",
                expected="a share in [1e-7, 1): a Gram matrix in float64 holds no smaller singular value",
                do="leave it out for the default",
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Go through the stream once downwards and once upwards.

        Args:
            stream: the model.
            progress: called with (states done, states in all).

        Returns:
            A Record over ``state``, labelled "0" to the last; column ``after`` names what wrote last.
        """
        d, states = stream.d_model, stream.states
        cut = rank_cut(stream) if self.cut is None else self.cut
        out = unembedding(stream)
        last = gram_sum([] if out is None else [out], d, cut)
        writes, rows = gram_sum([], d, cut), list[Row]()
        stride = _stride(states, self.memory_mb * 2**17 // d**2)
        suffixes = _suffixes(lambda state: gram_sum(reads_from(stream, state), d, cut), states, stride)
        for state, blocks in enumerate(suffixes):
            writes += gram_sum(writes_into(stream, state), d, cut)
            rows.append(_row(writes, blocks, last, cut) | _neurons(stream, state))
            progress(state + 1, states)
        return stream.record(
            self,
            (Axis("state", tuple(map(str, range(states)))),),
            (
                *(Column(name, _values([row[name] for row in rows]), *about) for name, about in _COLUMNS.items()),
                Column("after", tuple(last_written(stream, state) for state in range(states)), "", "what wrote last"),
            ),
            gauge="heads by circuits, QK at rotary offset 0; MLPs and embeddings by their own maps",
            cut=cut,
            d_model=d,
            normalised="each map to unit Frobenius norm",
        )


def bottleneck(record: Record) -> dict[str, float | int | str | None]:
    """Where a ledger is tightest: the state with the largest ``saving`` (the first of equals), with both ratios.

    A linear map from N_b to N_a neurons through d dimensions has ``d (N_a + N_b - d)`` parameters instead of
    ``N_a N_b``; ``saving`` is their ratio, and ``neuron_product`` is ``N_b N_a / d^2``.
    """
    rows = list(record.top(1, by="saving").rows())
    names = ("state", "after", "neurons_before", "neurons_after", "neuron_product", "saving")
    return {name: rows[0][name] if rows else None for name in names}


def _row(writes: GramSum, blocks: GramSum, last: GramSum, cut: float) -> Row:
    d = len(writes.gram)
    reads = blocks + last
    grams = writes.gram, reads.gram, blocks.gram, _live(writes, reads)
    spectra = [Spectrum(x.clamp_min(0).sqrt()) for x in side_by_side(torch.linalg.eigvalsh, grams)]
    dims = [spectrum.numerical_rank(cut) for spectrum in spectra]
    return {
        "oversubscription": writes.ranks / d,
        "read_oversubscription": reads.ranks / d,
        "writers": writes.count,
        "readers": reads.count,
        "write_ranks": writes.ranks,
        "read_ranks": reads.ranks,
        "written_dim": dims[0],
        "written_entropy_rank": spectra[0].entropy_rank,
        "read_dim": dims[1],
        "read_entropy_rank": spectra[1].entropy_rank,
        "read_dim_blocks": dims[2],
        "read_entropy_rank_blocks": spectra[2].entropy_rank,
        "live_dim": _live_dim(writes, reads, (dims[0], dims[1]), cut),
        "live_dim_blocks": _live_dim(writes, blocks, (dims[0], dims[2]), cut),
        "live_entropy_rank": spectra[3].entropy_rank,
        "unread_dim": d - dims[1],
        "unwritten_dim": d - dims[0],
    }


def _values(values: list[float | int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64 if all(isinstance(v, int) for v in values) else torch.float64)


def _live_dim(writes: GramSum, reads: GramSum, dims: tuple[int, int], cut: float) -> int:
    """``rank(R W) = rank(Q_R^T Q_W)``; where one side spans the whole stream, the dimension of the other."""
    if max(dims) == len(writes.gram) or min(dims) == 0:
        return min(dims)
    cosines = reads.split(cut)[0].basis.T @ writes.split(cut)[0].basis
    return int((torch.linalg.svdvals(cosines) > cut).sum())


_BLOCK = 256  # columns of a product that are formed at once


def _live(writes: GramSum, reads: GramSum) -> Tensor:
    """``L^T S_R L`` with ``S_W = L L^T``, its lower half: it has the eigenvalues of ``S_R S_W``.

    Their roots are the singular values of ``S_R^(1/2) S_W^(1/2)``. With L from Cholesky only the parts of the two
    products that are not zero are formed, and of those the half that is needed; where S_W has no Cholesky factor, L is
    from its eigenvectors.
    """
    root, failed = torch.linalg.cholesky_ex(writes.gram)
    if int(failed):
        values, vectors = torch.linalg.eigh(writes.gram)
        root = vectors * values.clamp_min(0).sqrt()
        return root.T @ reads.gram @ root
    seen, live = torch.zeros_like(root), torch.zeros_like(root)
    for first in range(0, len(root), _BLOCK):
        rows, part = slice(first, None), slice(first, first + _BLOCK)
        seen[rows, part] = reads.gram[rows, rows] @ root[rows, part]
    for first in range(0, len(root), _BLOCK):
        rows, part = slice(first, None), slice(first, first + _BLOCK)
        live[part, : first + _BLOCK] = root[rows, part].T @ seen[rows, : first + _BLOCK]
    return live


def _neurons(stream: Stream, state: int) -> Row:
    """Neurons before and after a state; every neuron is one of both."""
    d, mlps = stream.d_model, stream.groups.mlps
    before = sum(mlp.width for mlp in mlps if mlp.reaches(state))
    after = sum(mlp.width for mlp in mlps) - before
    rank = min(d, before, after)
    return {
        "neurons_before": before,
        "neurons_after": after,
        "neurons_before_per_d": before / d,
        "neurons_after_per_d": after / d,
        "neuron_product": before * after / d**2,
        "saving": before * after / (rank * (before + after - rank)) if rank else float("nan"),
    }


def _stride(states: int, sums: int) -> int:
    """The least stride of ``_suffixes`` by which so many sums are in memory at once; the one by which fewest are."""
    fitting = (stride for stride in range(1, states) if -(-states // stride) + stride - 1 <= sums)
    return next(fitting, round(states**0.5))


def _suffixes(term: Callable[[int], GramSum], states: int, stride: int) -> Iterator[GramSum]:
    """``sum of term(q) for q >= p``, for p ascending, without subtraction: that would lose small terms against large.

    One sum in ``stride`` stays in memory on the way down, so that with a stride of 2, where attentions and MLPs take
    turns, no MLP is read twice; those between are added up again from the next of these.
    """
    sums: dict[int, GramSum] = {}
    total: GramSum | None = None
    for state in reversed(range(min(stride, states) - 1, states)):
        total = term(state) if total is None else term(state) + total
        if (state + 1) % stride == 0 or state == states - 1:
            sums[state] = total
    for first in range(0, states, stride):
        last = min(first + stride, states) - 1
        totals = [sums.pop(last)]
        for state in reversed(range(first, last)):
            totals.append(term(state) + totals[-1])
        while totals:
            yield totals.pop()


def unread(stream: Stream, state: int, *, unembed: bool = True, cut: float | None = None) -> Subspace:
    """What nothing at or after a state reads: the orthogonal complement of the sum of all later read spaces.

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
    cut = _cut(stream, state, cut)
    later = (maps for p in range(state, stream.states) for maps in reads_from(stream, p))
    out = unembedding(stream) if unembed else None
    return gram_sum(chain(later, () if out is None else (out,)), stream.d_model, cut).split(cut)[1]


def unwritten(stream: Stream, state: int, *, cut: float | None = None) -> Subspace:
    """What no writer has written at or before a state: the orthogonal complement of the span of all writes so far.

    Args and errors as in :func:`unread`.

    Returns:
        Subspace of R^d, the least written direction first; the stream's state has no component in it, on any text.
    """
    cut = _cut(stream, state, cut)
    earlier = (maps for p in range(state + 1) for maps in writes_into(stream, p))
    return gram_sum(earlier, stream.d_model, cut).split(cut)[1]


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
        side: ``"unembed"``: rows of the read map (norm folded), the tokens that the direction predicts; ``"embed"``:
            token embeddings, the tokens that write it.
        count: how many tokens for each direction.

    Returns:
        For each direction its tokens by descending ``|cos|``, to be compared with chance: a random direction reaches
        about ``sqrt(2 ln(t) / d)`` among t tokens.
    """
    unit = torch.nn.functional.normalize(directions.to(accumulate), dim=0)
    rows = stream.read("unembed").maps[0] if side == "unembed" else stream.write("embed")[0].T
    ((best, ids),) = nearest_tokens(rows, [list(unit.T[:, :, None])], count)
    texts = stream.source.token_texts()

    def with_text(token: int, cosine: float) -> TokenCosine:
        return TokenCosine(token, text_of(texts, token), cosine)

    columns = zip(ids.T.tolist(), best.T.tolist(), strict=True)
    return tuple(tuple(map(with_text, tokens, cosines)) for tokens, cosines in columns)


def _cut(stream: Stream, state: int, cut: float | None) -> float:
    if not 0 <= state < stream.states:
        raise UsageError(
            f"no state {state} in this stream",
            expected=f"a number from 0 (the embedding) to {stream.states - 1} (what the unembedding reads)",
            do="correct the state",
        )
    return rank_cut(stream) if cut is None else cut
