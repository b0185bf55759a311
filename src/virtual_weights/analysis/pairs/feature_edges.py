"""Edges between features of attached dictionaries: their global virtual weights, weighed by what is active together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate, random_generator
from virtual_weights.linalg.statistics import rank_correlation
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, centred
from virtual_weights.stream.coactivations import (
    Coactivations,
    expected_attribution,
    target_weighted_attribution,
)
from virtual_weights.stream.effective import as_seen

By = Literal["era", "twera", "weight"]
_PAIRS = 1 << 18  # whose vectors are in memory at once
_BLOCK = 1 << 24  # virtual weights in memory at once
_SAMPLE = 1 << 21  # pairs of which ranks are compared


@final
@dataclass(frozen=True)
class FeatureEdges(Question[Stream]):
    """The strongest edges between features: virtual weight, ERA and TWERA of pairs that are active together.

    With the encoder row of j, the norm's gain in it, the decoder of i as far as it is written before (each decoder of a
    cross-layer dictionary once), and averages E over the tokens of a text::

        weight = <enc_j, dec_i>          era = E[1(a_j > 0) a_i / s] weight       twera = E[a_j a_i / s] / E[a_j] weight

    All three count what goes along the stream directly, not what attention moves; inhibition of a target that is off
    shows in none of the averages. Averages over few tokens say little: a target that was active at fewer than ``least``
    tokens has no edge here.

    Attributes:
        coactivations: averages over a text.
        top: how many edges, those of largest magnitude.
        by: ``"era"``, ``"twera"`` or ``"weight"``.
        least: tokens at which source and target are active at least, each.
        least_mean: where ``E[a_j]`` is less, twera divides by this instead.
        source, target: only of this dictionary; None for all.

    Reference: Ameisen et al. 2025, "Circuit Tracing", Global Weights; s is the scalar of the norm through which the
    target reads.
    """

    question: ClassVar[str] = "feature_edges"
    coactivations: Coactivations
    top: int = 1000
    by: By = "era"
    least: int = 20
    source: str | None = None
    target: str | None = None
    least_mean: float = 0.0

    def __post_init__(self) -> None:
        if self.by not in ("era", "twera", "weight"):
            raise UsageError(f"by={self.by!r}", expected="era, twera or weight", do="choose one of these")
        check_least(self.least)
        if self.top < 1 or not 0 <= self.least_mean < float("inf"):
            raise UsageError(
                f"top={self.top}, least_mean={self.least_mean}", expected="at least 1, at least 0", do="correct them"
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Weigh all pairs that are active together.

        Args:
            stream: the model with the same dictionaries.
            progress: called with (pairs of dictionaries done, in all).

        Returns:
            A Record over ``edge``, by descending magnitude, with ``reader``, ``writer``, ``weight``, ``era``,
            ``twera``, ``together`` (tokens at which both are active), ``reader_active`` and ``writer_active``.

        Raises:
            UsageError: the averages are of other dictionaries, or of none with these names.
        """
        self.coactivations.check(stream)
        keys = [key for key in self.coactivations.pairs if self._asked(key)]
        if not keys:
            raise UsageError(
                f"no features of {self.source or 'any dictionary'} are read by {self.target or 'any'}",
                expected=f"one of {', '.join(self.coactivations.pairs) or 'no pairs at all'}",
                do="name others",
            )
        parts = list[_Edges]()
        for done, key in enumerate(keys, 1):
            parts.append(edges_between(stream, self, key).strongest(self.by, self.top))
            progress(done, len(keys))
        edges = _Edges.joined(parts).strongest(self.by, self.top)
        (readers, writers), (weight, era, twera) = edges.names(keys), edges.values
        return stream.record(
            self,
            (Axis("edge", tuple(map(str, range(1, len(weight) + 1)))),),
            (
                Column("reader", readers, "", "the target, a reading feature"),
                Column("writer", writers, "", "the source, a writing feature"),
                Column("weight", weight, "weights", "<enc, dec>, the virtual weight"),
                Column("era", era, "pre-activation", "E[1(a_j > 0) a_i / s] weight"),
                Column("twera", twera, "pre-activation", "E[a_j a_i / s] / E[a_j] weight"),
                Column("together", edges.counts[0], "tokens", "at which both are active"),
                Column("reader_active", edges.counts[1], "tokens", "at which the reader is active"),
                Column("writer_active", edges.counts[2], "tokens", "at which the writer is active"),
            ),
            text=self.coactivations.text,
            tokens=self.coactivations.tokens,
            least=self.least,
            counted="what goes along the stream directly, not through attention or other features",
            gauge="features: their own basis",
        )

    def _asked(self, key: str) -> bool:
        source, _, target = key.partition(">")
        return self.source in (None, source) and self.target in (None, target)


@final
@dataclass(frozen=True, eq=False)
class _Edges:
    """Some pairs of features, (n,) each.

    Attributes:
        ends: (2, n) numbers of the source and of the target in their dictionaries.
        keys: (n,) which pair of dictionaries, a number.
        values: (3, n) weight, era and twera, float64.
        counts: (3, n) tokens at which both, the reader, the writer are active.
    """

    ends: Tensor
    keys: Tensor
    values: Tensor
    counts: Tensor

    def strongest(self, by: By, top: int) -> _Edges:
        """The edges of largest magnitude, in this order; undefined ones last."""
        sizes = self.values[("weight", "era", "twera").index(by)].abs().nan_to_num(-1.0)
        order = sizes.argsort(descending=True, stable=True)[:top]
        return _Edges(self.ends[:, order], self.keys[order], self.values[:, order], self.counts[:, order])

    @classmethod
    def joined(cls, parts: Sequence[_Edges]) -> _Edges:
        """All of several, each with its own number."""
        keys = [torch.full_like(part.keys, number) for number, part in enumerate(parts)]
        ends, values, counts = (
            torch.cat([getattr(part, name) for part in parts], 1) for name in ("ends", "values", "counts")
        )
        return cls(ends, torch.cat(keys), values, counts)

    def names(self, keys: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Readers and writers."""
        pairs = [keys[int(k)].split(">") for k in self.keys]
        writers = tuple(f"{source}:F{i}" for (source, _), i in zip(pairs, self.ends[0].tolist(), strict=True))
        readers = tuple(f"{target}:F{j}.enc" for (_, target), j in zip(pairs, self.ends[1].tolist(), strict=True))
        return readers, writers


def check_least(least: int) -> None:
    """Refuse what is no count of tokens."""
    if least < 1:
        raise UsageError(f"least={least}", expected="at least 1 token", do="pass for example least=20")


def edges_between(stream: Stream, question: FeatureEdges, key: str) -> _Edges:
    """All edges of one pair of dictionaries between features that are active often enough."""
    averages = question.coactivations
    source, _, target = key.partition(">")
    active = averages.active[source], averages.active[target]
    pairs = averages.pairs[key].long()
    often = (active[0][pairs[:, 0]] >= question.least) & (active[1][pairs[:, 1]] >= question.least)
    rows = often.nonzero()[:, 0]
    i, j = pairs[rows].T.contiguous()
    weight = _pair_weights(*_vectors(stream, key), i, j)
    product, gated, together = (values[key][rows] for values in (averages.product, averages.gated, averages.together))
    twera = target_weighted_attribution(weight, product, averages.mean[target][j], question.least_mean)
    values = torch.stack([weight, expected_attribution(weight, gated), twera])
    return _Edges(torch.stack([i, j]), torch.zeros_like(i), values, torch.stack([together, active[1][j], active[0][i]]))


def _pair_weights(dec: Tensor, enc: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """``<enc_j, dec_i>`` of pairs, float64; i ascends. Of dense pairs whole rows are multiplied, else single ones."""
    if 4 * len(i) < len(dec) * len(enc):
        cuts = zip(i.split(_PAIRS), j.split(_PAIRS), strict=True)
        parts = [(dec[a].to(accumulate) * enc[b].to(accumulate)).sum(1) for a, b in cuts]
        return torch.cat([torch.zeros(0, dtype=accumulate), *parts])
    weights, right = torch.empty(len(i), dtype=accumulate), enc.to(accumulate).T
    step = max(1, _BLOCK // len(enc))
    for start in range(0, len(dec), step):
        first, stop = torch.searchsorted(i, torch.tensor([start, start + step])).tolist()
        block = dec[start : start + step].to(accumulate) @ right
        weights[first:stop] = block[i[first:stop] - start, j[first:stop]]
    return weights


def _vectors(stream: Stream, key: str) -> tuple[Tensor, Tensor]:
    """Decoders (F, d) as they have been written before the target reads, and its encoder (F, d)."""
    source, _, target = key.partition(">")
    stream = as_seen(stream, "enc")
    dec = stream.attached[source].write(stream, stream.groups[target].reads)[0].T
    return centred(stream, dec, -1, stream.dtype), stream.read("enc", target).maps[0]


@final
@dataclass(frozen=True)
class FeatureInterference(Question[Stream]):
    """How much of the virtual weights between features is interference, as two halves of a text have it.

    Of every pair of dictionaries over all pairs of features that are active at ``least`` tokens of either half: which
    share of the pairs is never active together, and which of the ``top`` largest ``|weight|``: such weights carry
    nothing. Rank correlations between halves say what a column is worth on other text: of ``|weight|`` with ``|ERA|``
    of the second half, of ``|ERA|`` and of ``|TWERA|`` with themselves, and how many of the ``top`` largest of one are
    among the ``top`` largest of the other. ERA and TWERA of a pair that is never active together are 0.

    Attributes:
        first, second: averages over two texts.
        top: how many of the largest.
        least: tokens of each half at which a feature is active at least.
    """

    question: ClassVar[str] = "feature_interference"
    first: Coactivations
    second: Coactivations
    top: int = 1000
    least: int = 20

    def __post_init__(self) -> None:
        check_least(self.least)
        if self.top < 1:
            raise UsageError(f"top={self.top}", expected="at least 1", do="pass for example top=1000")

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compare the halves.

        Returns:
            A Record over ``pair`` of dictionaries, ``"tc8>tc12"``. Where there are more than 2 million pairs of
            features, shares of all pairs are exact and ranks are those of a random 2 million.

        Raises:
            UsageError: the averages are of other dictionaries.
        """
        for averages in (self.first, self.second):
            averages.check(stream)
        keys, rows = tuple(self.first.pairs), list[dict[str, float]]()
        for done, key in enumerate(keys, 1):
            rows.append(_Compared(stream, self, key).figures())
            progress(done, len(keys))
        columns = (
            Column(name, torch.tensor([row[name] for row in rows], dtype=accumulate), unit, meaning)
            for name, (unit, meaning) in _FIGURES.items()
        )
        texts = {"text": self.first.text, "other_text": self.second.text, "least": self.least}
        return stream.record(self, (Axis("pair", keys),), columns, **texts, gauge="features: their own basis")


_FIGURES = {
    "pairs": ("pairs", "of features that are active often enough in both halves"),
    "never": ("1, in [0, 1]", "share of the pairs that is never active together"),
    "never_of_largest": ("1, in [0, 1]", "the same share of the largest |weight|"),
    "weight_era": ("1, in [-1, 1]", "rank correlation of |weight| and |ERA| of the second half"),
    "era_era": ("1, in [-1, 1]", "rank correlation of |ERA| of both halves"),
    "twera_twera": ("1, in [-1, 1]", "rank correlation of |TWERA| of both halves"),
    "weight_era_largest": ("1, in [0, 1]", "share of the largest |weight| among the largest |ERA| of the second half"),
    "era_era_largest": ("1, in [0, 1]", "share of the largest |ERA| among the largest of the second half"),
    "twera_twera_largest": ("1, in [0, 1]", "share of the largest |TWERA| among the largest of the second half"),
}


@final
class _Compared:
    """Two halves of one pair of dictionaries."""

    def __init__(self, stream: Stream, question: FeatureInterference, key: str) -> None:
        self._question, self._key = question, key
        source, _, target = key.partition(">")
        halves = question.first, question.second
        self._i, self._j = (
            torch.stack([half.active[name] >= question.least for half in halves]).all(0).nonzero()[:, 0]
            for name in (source, target)
        )
        self._dec, self._enc = (
            vectors[rows] for vectors, rows in zip(_vectors(stream, key), (self._i, self._j), strict=True)
        )
        self._target = target

    def figures(self) -> dict[str, float]:
        """The figures of the answer; NaN where there are too few pairs."""
        total = len(self._i) * len(self._j)
        if total == 0:
            return {name: torch.nan if name != "pairs" else 0.0 for name in _FIGURES}
        weight = self._largest()
        halves = [self._values(half) for half in (self._question.first, self._question.second)]
        era, twera = ([(numbers, values[kind]) for numbers, *values in halves] for kind in (0, 1))
        together = torch.cat([keys for keys, _ in era]).unique()
        figures = {
            "pairs": float(total),
            "never": 1 - len(together) / total,
            "never_of_largest": float((~torch.isin(weight, together)).double().mean()),
        }
        tops = [self._top(*pairs) for pairs in (*era, *twera)]
        figures["weight_era_largest"] = _shared(weight, tops[1])
        figures["era_era_largest"], figures["twera_twera_largest"] = _shared(*tops[:2]), _shared(*tops[2:])
        return figures | self._correlations(total, era, twera)

    def _largest(self) -> Tensor:
        """Numbers of the pairs of largest ``|weight|``."""
        best, numbers = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        step = max(1, _BLOCK // len(self._j))
        for start in range(0, len(self._i), step):
            size = (self._dec[start : start + step].float() @ self._enc.float().T).abs().flatten()
            chosen = size.topk(min(self._question.top, len(size))).indices
            best, numbers = torch.cat([best, size[chosen]]), torch.cat([numbers, chosen + start * len(self._j)])
            chosen = best.topk(min(self._question.top, len(best))).indices
            best, numbers = best[chosen], numbers[chosen]
        return numbers

    def _values(self, half: Coactivations) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of the pairs that are active together in a half, ascending, with ``|ERA|`` and ``|TWERA|``."""
        pairs = half.pairs[self._key].long().T.contiguous()
        place = [_places(self._i, pairs[0]), _places(self._j, pairs[1])]
        rows = ((place[0] >= 0) & (place[1] >= 0)).nonzero()[:, 0]
        i, j = place[0][rows], place[1][rows]
        weight, mean = _pair_weights(self._dec, self._enc, i, j), half.mean[self._target][self._j[j]]
        era = expected_attribution(weight, half.gated[self._key][rows])
        twera = target_weighted_attribution(weight, half.product[self._key][rows], mean)
        return i * len(self._j) + j, era.abs(), twera.abs()

    def _top(self, numbers: Tensor, values: Tensor) -> Tensor:
        return numbers[values.nan_to_num(-1.0).topk(min(self._question.top, len(values))).indices]

    def _correlations(
        self, total: int, era: list[tuple[Tensor, Tensor]], twera: list[tuple[Tensor, Tensor]]
    ) -> dict[str, float]:
        """Rank correlations over all pairs of features, or a random sample of them."""
        sample = torch.arange(total)
        if total > _SAMPLE:
            random = torch.randint(total, (_SAMPLE,), generator=random_generator(0))
            sample = random.unique()
        i, j = sample // len(self._j), sample % len(self._j)
        weight = _pair_weights(self._dec, self._enc, i, j).abs()
        values = [_at(sample, *pairs) for pairs in (*era, *twera)]
        correlations = {
            "weight_era": rank_correlation(weight, values[1]),
            "era_era": rank_correlation(values[0], values[1]),
            "twera_twera": rank_correlation(values[2], values[3]),
        }
        return {name: torch.nan if value is None else value for name, value in correlations.items()}


def _places(ascending: Tensor, numbers: Tensor) -> Tensor:
    """Where numbers stand in an ascending list, -1 where they do not."""
    if not len(ascending):
        return torch.full_like(numbers, -1)
    place = torch.searchsorted(ascending, numbers).clamp(max=len(ascending) - 1)
    return torch.where(ascending[place] == numbers, place, -1)


def _at(sample: Tensor, numbers: Tensor, values: Tensor) -> Tensor:
    """The values of a sample of pairs, 0 of those that are not among the numbers (ascending)."""
    place = _places(numbers, sample)
    return torch.where(place >= 0, values[place.clamp(min=0)], 0.0) if len(values) else torch.zeros(len(sample))


def _shared(a: Tensor, b: Tensor) -> float:
    return float(torch.isin(a, b).double().mean()) if len(a) else torch.nan
