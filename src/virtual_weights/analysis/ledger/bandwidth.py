"""The bandwidth ledger: at each state of the stream, how much has been written and how much will be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.analysis.ledger.gram_sum import Tally, tally
from virtual_weights.analysis.maps.circuits import last_written, rank_cut, reads_from, unembedding, writes_into
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress, Spectrum, Subspace, accumulate
from virtual_weights.linalg.numerics import converted
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream
from virtual_weights.stream.question import Question

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
    "neuron_product": ("1 (ratio)", "N_b N_a / d^2: the seed's figure, which is no compression ratio"),
    "saving": ("1 (ratio), >= 1", "N_a N_b / (r (N_a + N_b - r)), r = min(d, N_a, N_b); absent without neurons"),
}


@dataclass(frozen=True)
class Bandwidth(Question):
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
        memory_mb: for suffix sums; where they do not fit, readers are read twice, about ``2 sqrt(states)`` sums kept.

    Example:
        >>> Bandwidth()(stream)["oversubscription"][-1]  # doctest: +SKIP
    """

    question: ClassVar[str] = "bandwidth"
    cut: float | None = None
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if self.cut is not None and not 1e-7 <= self.cut < 1:
            raise UsageError(
                f"cut={self.cut}",
                expected="a share in [1e-7, 1): a Gram matrix in float64 holds no smaller singular value",
                do="leave it out for the default",
            )

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
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
        last = tally([] if out is None else [out], d, cut)

        def own(state: int) -> Tally:
            return tally(reads_from(stream, state), d, cut)

        written, neurons, rows = tally([], d, cut), _neurons(stream), list[Row]()
        stride = 1 if states * d * d * 8 <= self.memory_mb * 2**20 else round(states**0.5)
        for state, blocks in enumerate(_suffixes(own, states, stride)):
            written += tally(writes_into(stream, state), d, cut)
            rows.append(_row(written, blocks, last, cut) | _bottleneck(*neurons[state], d))
            if progress is not None:
                progress(state + 1, states)
        return Record(
            self.question,
            (Axis("state", tuple(str(state) for state in range(states))),),
            (
                *(Column(name, _values([row[name] for row in rows]), *about) for name, about in _COLUMNS.items()),
                Column("after", tuple(last_written(stream, state) for state in range(states)), "", "what wrote last"),
            ),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "gauge": "heads by circuits, QK at rotary offset 0; MLPs and embeddings by their own maps",
                "cut": cut,
                "d_model": d,
                "normalised": "each map to unit Frobenius norm",
            },
            provenance=stream.provenance,
        )


def bottleneck(record: Record) -> dict[str, float | int | str | None]:
    """Where a ledger is tightest: the state with the largest ``saving`` (the first of equals), with both ratios.

    A linear map from N_b to N_a neurons through d dimensions has ``d (N_a + N_b - d)`` parameters instead of
    ``N_a N_b``; ``saving`` is their ratio, and ``neuron_product`` the seed's ``N_b N_a / d^2`` beside it.
    """
    rows = list(record.top(1, by="saving").rows())
    names = ("state", "after", "neurons_before", "neurons_after", "neuron_product", "saving")
    return {name: rows[0][name] if rows else None for name in names}


def _row(written: Tally, blocks: Tally, last: Tally, cut: float) -> Row:
    d = len(written.gram)
    reads = blocks + last
    spectra = [each.spectrum for each in (written, reads, blocks)]
    dims = [spectrum.numerical_rank(cut) for spectrum in spectra]
    return {
        "oversubscription": written.ranks / d,
        "read_oversubscription": reads.ranks / d,
        "writers": written.count,
        "readers": reads.count,
        "write_ranks": written.ranks,
        "read_ranks": reads.ranks,
        "written_dim": dims[0],
        "written_entropy_rank": spectra[0].entropy_rank,
        "read_dim": dims[1],
        "read_entropy_rank": spectra[1].entropy_rank,
        "read_dim_blocks": dims[2],
        "read_entropy_rank_blocks": spectra[2].entropy_rank,
        "live_dim": _live_dim(written, reads, (dims[0], dims[1]), cut),
        "live_dim_blocks": _live_dim(written, blocks, (dims[0], dims[2]), cut),
        "live_entropy_rank": _live_entropy_rank(written, reads),
        "unread_dim": d - dims[1],
        "unwritten_dim": d - dims[0],
    }


def _values(values: list[float | int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64 if all(isinstance(v, int) for v in values) else torch.float64)


def _live_dim(written: Tally, read: Tally, dims: tuple[int, int], cut: float) -> int:
    """``rank(R W) = rank(Q_R^T Q_W)``; where one side spans the whole stream, the dimension of the other."""
    if max(dims) == len(written.gram) or min(dims) == 0:
        return min(dims)
    cosines = read.split(cut)[0].basis.T @ written.split(cut)[0].basis
    return int((torch.linalg.svdvals(cosines) > cut).sum())


def _live_entropy_rank(written: Tally, read: Tally) -> float:
    """Of the spectrum of ``S_R^(1/2) S_W^(1/2)``, whose squared singular values are the eigenvalues of ``S_R S_W``."""
    values, vectors = torch.linalg.eigh(written.gram)
    root = vectors * values.clamp_min(0).sqrt()
    return Spectrum(torch.linalg.eigvalsh(root.T @ read.gram @ root).clamp_min(0).sqrt()).entropy_rank


def _neurons(stream: Stream) -> list[tuple[int, int]]:
    """Neurons before and after each state; every neuron is one of both."""
    mlps = [c for c in stream.components if c.kind == "mlp"]
    width = stream.spec.d_mlp
    before = [sum(c.writes is not None and c.writes <= p for c in mlps) for p in range(stream.states)]
    return [(width * count, width * (len(mlps) - count)) for count in before]


def _bottleneck(before: int, after: int, d: int) -> Row:
    rank = min(d, before, after)
    return {
        "neurons_before": before,
        "neurons_after": after,
        "neurons_before_per_d": before / d,
        "neurons_after_per_d": after / d,
        "neuron_product": before * after / d**2,
        "saving": before * after / (rank * (before + after - rank)) if rank else float("nan"),
    }


def _suffixes(own: Callable[[int], Tally], states: int, stride: int) -> Iterator[Tally]:
    """``sum of own(q) for q >= p``, for p ascending, without subtraction: that would lose the small against the large.

    One sum in ``stride`` is kept on the way down; those between are added up again from the next one kept.
    """
    kept: dict[int, Tally] = {}
    running: Tally | None = None
    for state in reversed(range(states)):
        running = own(state) if running is None else own(state) + running
        if state % stride == 0:
            kept[state] = running
    for first in range(0, states, stride):
        between: list[Tally] = []
        running = kept.get(first + stride)
        for state in reversed(range(first + 1, min(first + stride, states))):
            running = own(state) if running is None else own(state) + running
            between.append(running)
        yield kept.pop(first)
        yield from reversed(between)


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
