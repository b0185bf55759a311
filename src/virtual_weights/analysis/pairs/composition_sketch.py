"""The strongest compositions of a very large model: all pairs estimated from a sketch, the foremost then exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.map_side import MapSide, Piece, gram_of
from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.errors import UsageError
from virtual_weights.linalg import WORKSPACE_BYTES, MapStack, accumulate, beyond_rounding
from virtual_weights.linalg.sketch import Signs, Sketch, estimates
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, cost
from virtual_weights.stream.group import Port, Writers

_DOUBT = 3.0  # standard errors
_FEWEST = 16


@final
@dataclass(frozen=True)
class CompositionSketch(Question[Stream]):
    """A first pass over all pairs of :class:`Composition`, at a fraction of its cost, and its strongest edges exactly.

    The squared score of a pair is the inner product of two Gram matrices of trace 1. Both are projected on the same
    random vectors of signs, x_a and y_b, some sqrt(samples) of each::

        score^2 = <G_r, G_w> ~ 1/d + mean over a, b of (x_a^T (G_r - I/d) y_b) (x_a^T (G_w - I/d) y_b)

    which is right on average over the signs, with a standard error of at least about
    ``||G_r - I/d|| ||G_w - I/d|| / sqrt(samples)``, more for pairs that compose strongly; it is estimated for every
    pair. The ``exact`` pairs of largest estimate are then computed in float64, and the ``top`` strongest of these are
    the answer. A sketch takes about ``4 k d sqrt(samples)`` operations for a map of k rows and ``4 samples`` for a
    pair, where forming and comparing Grams takes ``k d^2`` and ``d^2``.

    Scores are those of ``Composition``, and as invariant; which pairs are looked at, and the estimates, depend on the
    signs and on the basis of the stream.

    Attributes:
        port: as in ``Composition``.
        rotary_offset: as in ``Composition``.
        writers: as in ``Composition``.
        top: how many edges are in the answer.
        exact: how many pairs are computed exactly, at least ``top``.
        samples: random numbers a map, at least 16; rounded down to a square.
        seed: of the signs.
        device: where sketches are made and compared.

    Reference: Alon, Matias and Szegedy 1999, "The space complexity of approximating the frequency moments".
    """

    question: ClassVar[str] = "composition_sketch"
    port: Port = "K"
    rotary_offset: int | None = None
    writers: Writers = "heads"
    top: int = 100
    exact: int = 2000
    samples: int = 16384
    seed: int = 0
    device: str = cost("cpu")

    def __post_init__(self) -> None:
        self._exact_question()
        if self.samples < _FEWEST or not 1 <= self.top <= self.exact:
            raise UsageError(
                f"samples={self.samples}, top={self.top}, exact={self.exact}",
                expected=f"at least {_FEWEST} samples, and at least one edge of those that are computed exactly",
                do="leave them out for the default",
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Sketch every map once, estimate all pairs, and compute the foremost.

        Args:
            stream: the model.
            progress: called with (pieces of maps read, pieces in all).

        Returns:
            A Record over ``edge``, by descending score: ``reader``, ``writer``, ``score``, ``null_ratio``, and of the
            sketch ``estimate`` and ``error``, both of the squared score. In the stamp ``pairs`` and ``doubtful``, how
            many pairs were not computed although their estimate and three errors exceed the weakest edge here; raise
            ``exact`` or ``samples`` where they matter.

        Raises:
            UsageError: the model has no such port, or the checkpoint holds no reader.
        """
        question = self._exact_question()
        sides = question.readers(stream), question.written(stream)
        signs = Signs(stream.d_model, self.samples, self.seed, self.device)
        total, sketches, done = sum(len(side.pieces) for side in sides), list[Sketch](), 0
        for side in sides:
            parts = list[Sketch]()
            for piece in side.pieces:
                parts.append(signs.sketch(piece.maps()))
                progress(done := done + 1, total)
            sketches.append(Sketch.joined(parts))
        estimate, error = estimates(*sketches)
        present = (sketches[0].traces > 0)[:, None] & (sketches[1].traces > 0)
        estimate += present.to(accumulate) / stream.d_model
        reads = sides[0].position[:, None]
        reach = (sides[1].position <= reads) & (reads < sides[1].end) & present
        pairs = int(reach.sum())
        kept = estimate.masked_fill(~reach, -torch.inf).flatten().topk(min(self.exact, pairs)).indices
        reader, writer = kept // max(1, estimate.shape[1]), kept % max(1, estimate.shape[1])
        product = _products(sides, sketches, reader, writer)
        reach[reader, writer] = False
        order = product.argsort(descending=True, stable=True)[: self.top]
        reader, writer, product = reader[order], writer[order], product[order]
        least = float(product[-1]) if len(product) else 0.0
        score, labels = product.sqrt(), [side.axis.labels for side in sides]
        about = "of the squared score, by the sketch"
        columns = (
            Column("reader", tuple(labels[0][i] for i in reader.tolist()), "", "the reader"),
            Column("writer", tuple(labels[1][i] for i in writer.tolist()), "", "the writer"),
            Column("score", score, "1, in [0, 1]", "||R O||_F / (||R||_F ||O||_F) over circuits"),
            Column("null_ratio", score * stream.d_model**0.5, "1 (ratio)", "score over 1/sqrt(d)"),
            Column("estimate", estimate[reader, writer], "1", f"estimate {about}"),
            Column("error", error[reader, writer], "1", f"standard error {about}"),
        )
        return stream.record(
            self,
            (Axis("edge", tuple(map(str, range(1, len(score) + 1)))),),
            columns,
            rotary_offset=self.rotary_offset,
            gauge="circuits: free of heads' inner bases; estimates depend on the basis of the stream",
            pairs=pairs,
            doubtful=int((estimate + _DOUBT * error)[reach].gt(least).sum()),
            samples=isqrt(self.samples) ** 2,
        )

    def _exact_question(self) -> Composition:
        return Composition(self.port, self.rotary_offset, self.writers, "float64")


def _products(sides: Sequence[MapSide], sketches: Sequence[Sketch], reader: Tensor, writer: Tensor) -> Tensor:
    """``<G_r, G_w> / (tr G_r tr G_w)`` of some pairs in float64, piece by piece."""
    product = torch.empty(len(reader), dtype=accumulate)
    places = [_places(side, ends) for side, ends in zip(sides, (reader, writer), strict=True)]
    for i, reading in enumerate(sides[0].pieces):
        mine = places[0][0] == i
        maps = _PieceMaps(reading) if bool(mine.any()) else None
        for j, writing in enumerate(sides[1].pieces):
            wanted = (mine & (places[1][0] == j)).nonzero()[:, 0]
            if maps is None or not len(wanted):
                continue
            others = _PieceMaps(writing)
            for w in places[1][1][wanted].unique().tolist():
                some = wanted[places[1][1][wanted] == w]
                product[some] = maps.products(places[0][1][some].tolist(), others, w)
    traces = sketches[0].traces[reader] * sketches[1].traces[writer]
    return beyond_rounding(product / traces, 1.0).clamp(min=0.0)


def _places(side: MapSide, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The piece that each map is in, and its place there."""
    counts = torch.tensor([piece.count for piece in side.pieces])
    piece = torch.searchsorted(counts.cumsum(0), ends, right=True)
    return piece, ends - (counts.cumsum(0) - counts)[piece]


@final
class _PieceMaps:
    """The maps of a piece, in thin factors or by their rows."""

    def __init__(self, piece: Piece) -> None:
        self._maps, self._width, self._grams = piece.maps(), piece.width, dict[int, Tensor]()

    def factors(self, i: int) -> tuple[Tensor, Tensor] | None:
        """C (k, d) and M (k, k) in float64 with ``G_i = C^T M C``; None of a map that is given by its rows."""
        if not isinstance(self._maps, MapStack):
            return None
        outer = self._maps.outer[self._maps.index[i]].to(accumulate)
        metric = torch.eye(len(outer), dtype=accumulate) if self._maps.metric is None else self._maps.metric[i]
        return outer, metric.to(accumulate)

    def rows(self, i: int) -> Iterable[Tensor]:
        """The rows of one map that is given by them."""
        assert not isinstance(self._maps, MapStack)
        return self._maps[i]

    def gram(self, i: int) -> Tensor:
        """G (d, d) float64 of one map that is given by its rows; those of a piece, some 500 MB at most, stay."""
        if i not in self._grams:
            self._grams[i] = gram_of(self.rows(i), self._width)
        return self._grams[i]

    def products(self, some: Sequence[int], other: _PieceMaps, i: int) -> Tensor:
        """``<G, G_i>`` of some of these maps with one of the others."""
        thin, given = [factors for place in some if (factors := self.factors(place)) is not None], other.factors(i)
        if not thin:
            grams = map(self.gram, some)
            if given is None:
                return torch.stack([(gram * other.gram(i)).sum() for gram in grams])
            return torch.stack([((given[0] @ gram) * (given[1] @ given[0])).sum() for gram in grams])
        width = len(thin[0][0])
        step = max(1, WORKSPACE_BYTES // (8 * width * self._width))
        parts = [thin[start : start + step] for start in range(0, len(thin), step)]
        return torch.cat([_met(part, [given[0]] if given else other.rows(i), given and given[1]) for part in parts])


def _met(thin: Sequence[tuple[Tensor, Tensor]], rows: Iterable[Tensor], metric: Tensor | None) -> Tensor:
    """``<C^T M C, R^T N R>`` of maps in factors C and M with one by its rows R and a metric N; None is 1."""
    columns, width = torch.cat([outer for outer, _ in thin]).T, len(thin[0][0])
    cores = torch.zeros(len(thin), width, width, dtype=accumulate)
    step = max(width, WORKSPACE_BYTES // (8 * columns.shape[1]))
    for part in rows:
        for some in part.split(len(part) if metric is not None else step):
            met = (some.to(accumulate) @ columns).unflatten(1, (len(thin), width)).transpose(0, 1)  # (n, rows, k)
            cores += met.mT @ (met if metric is None else metric @ met)
    return (cores * torch.stack([metric for _, metric in thin])).sum((1, 2))
