"""Coherence: how far from orthogonal the directions are that a model uses, beside chance and the best possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.crowding.directions import DirectionKind, check_kind, directions
from virtual_weights.errors import UsageError
from virtual_weights.linalg import in_full_float32, random_generator
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream, cost

BINS = 100
"""Bins of the histogram of |cos|, of equal width from 0 to 1."""

_TILE = 1024


@final
@dataclass(frozen=True)
class Coherence(Question[Stream]):
    """``|cos|`` between all directions of one kind: its largest, its mean square, its histogram.

    Beside it: as many seeded Gaussian directions, whose mean square is 1/d, and the **Welch bound**
    ``mu >= sqrt((N - d) / (d (N - 1)))``, below which no N directions of R^d can come. Its root mean square has the
    same bound, met by tight frames (equivalently, the frame potential ``sum_ij cos^2 >= N^2 / d``).

    Directions are compared in tiles, in float32; their (N, N) matrix is never formed.

    Invariant under scaling of a direction, under re-ordering and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        kind: ``"out"``, ``"in"``, ``"gate"`` (of neurons) or ``"ov"`` (the strongest direction of every head).
        sample: at most so many directions, chosen by the seed; None for all.
        seed: of the choice and of the random directions.
        device: any torch device.

    Reference: Welch 1974; Benedetto and Fickus 2003 (frame potential).
    """

    question: ClassVar[str] = "coherence"
    kind: DirectionKind = "out"
    sample: int | None = 20_000
    seed: int = 0
    device: str = cost("cpu")

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.sample is not None and self.sample < 2:
            raise UsageError(
                f"a sample of {self.sample}",
                expected="two directions or more",
                do="leave sample out to use all directions",
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compare every direction with every other.

        Args:
            stream: the model.
            progress: called with (pairs done, pairs in all), the random ones too.

        Returns:
            A Record over ``bin`` with ``count`` and ``random`` (pairs); its stamp holds the figures.

        Raises:
            UsageError: the model has no such directions, or fewer than two.
        """
        names, unit = directions(stream, self.kind, self.sample, self.seed)
        n, d = unit.shape
        if n < 2:
            raise UsageError(f"{n} direction of kind {self.kind!r}", expected="two or more", do="choose another kind")
        generator = random_generator(self.seed)
        noise = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
        pairs = n * (n - 1) / 2
        model = _compare(unit.to(self.device), lambda done: progress(done, 2 * pairs))
        chance = _compare(noise.to(self.device), lambda done: progress(pairs + done, 2 * pairs))
        bounds = [f"{i / BINS:.2f}" for i in range(BINS + 1)]
        return stream.record(
            self,
            (Axis("bin", tuple(f"{a} to {b}" for a, b in pairwise(bounds))),),
            (
                Column("count", model.histogram, "pairs", "pairs whose |cos| lies in the bin"),
                Column("random", chance.histogram, "pairs", "the same of as many random directions"),
            ),
            directions=n,
            dimension=d,
            largest=model.largest,
            largest_pair=[names[i] for i in model.pair],
            mean_square=model.squares / pairs,
            random_largest=chance.largest,
            random_mean_square=chance.squares / pairs,
            welch=welch(n, d),
            frame_potential=n + 2 * model.squares,
            least_frame_potential=max(n * n / d, float(n)),
        )


def welch(n: int, d: int) -> float:
    """``sqrt((n - d) / (d (n - 1)))``, the least possible coherence of n directions of R^d; 0 for n <= d."""
    return ((n - d) / (d * (n - 1))) ** 0.5 if n > max(d, 1) else 0.0


def gap(record: Record) -> dict[str, Any]:
    """The figures of a Coherence record: measured, random and least possible."""
    names = ("directions", "dimension", "largest", "largest_pair", "random_largest", "welch", "mean_square")
    return {name: record.stamp[name] for name in (*names, "random_mean_square", "frame_potential")}


@final
@dataclass(frozen=True, eq=False)
class _Comparison:
    largest: float
    pair: tuple[int, int]
    squares: float
    histogram: Tensor


@in_full_float32()
def _compare(unit: Tensor, report: Callable[[float], None]) -> _Comparison:
    """All pairs of rows i < j."""
    largest, pair, done = -1.0, (0, 0), 0
    histogram = torch.zeros(BINS, dtype=torch.int64, device=unit.device)
    for i, j, cosines in _tiles(unit):
        sizes = cosines.abs_().clamp_(max=1.0)
        flat = sizes[torch.ones_like(sizes, dtype=torch.bool).triu(1)] if i == j else sizes
        if not flat.numel():
            continue
        counts = torch.histc(flat, BINS, 0.0, 1.0).long()
        histogram += counts
        done += flat.numel()
        if bool(
            counts[max(0, int(largest * BINS) - 1) :].any()
        ):  # else nothing here is as large, and no pass is needed
            top = float(flat.max())
            if top > largest:
                within = sizes.triu(1) if i == j else sizes
                row, column = divmod(int(within.argmax()), within.shape[1])
                largest, pair = top, (i + row, j + column)
        report(done)
    return _Comparison(largest, pair, _squares(unit), histogram.cpu())


def _squares(unit: Tensor) -> float:
    """The sum over pairs i < j of ``cos^2``: ``sum_ij <u_i, u_j>^2 = ||sum_i u_i u_i^T||_F^2``, in float64."""
    gram = torch.zeros(unit.shape[1], unit.shape[1], dtype=torch.float64, device=unit.device)
    own = 0.0
    for rows in unit.split(_TILE):
        rows = rows.to(torch.float64)
        gram.addmm_(rows.T, rows)
        own += float(rows.square().sum(1).square().sum())
    return max(0.0, (float(gram.square().sum()) - own) / 2)


def _tiles(unit: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    for i in range(0, len(unit), _TILE):
        rows = unit[i : i + _TILE]
        for j in range(i, len(unit), _TILE):
            yield i, j, rows @ unit[j : j + _TILE].T


@final
@dataclass(frozen=True)
class Capacity:
    """Counts for directions of R^d whose cosines stay within eps.

    Attributes:
        published: ``d / eps^2``, published as an upper bound on the number of directions, which it is not.
        log10_random_code: of ``(1 - eps^2)^(-(d - 1)/4)``: so many directions with all ``|cos| < eps`` exist, since of
            N random ones the expected number of closer pairs is at most ``N^2/2 (1 - eps^2)^((d - 1)/2)``, here 1/2.
            For small eps it is about ``exp(eps^2 d / 4)``: a lower bound.
        active_signals: ``1 + eps^2 d``: so many random-sign signals, active at once along random directions, leave a
            matched filter an error of variance ``(n - 1)/d <= eps^2`` each. This, not the number of directions, is
            linear in d.
        welch: ``d (1 - eps^2) / (1 - d eps^2)`` where ``eps^2 < 1/d``: the most directions there can be (the Welch
            bound solved for N). None for larger eps, where that gives no bound.
    """

    published: float
    log10_random_code: float
    active_signals: float
    welch: float | None


def capacity(d: int, eps: float) -> Capacity:
    """The counts for cosines up to eps in d dimensions.

    Args:
        d: dimension, >= 1.
        eps: largest tolerated ``|cos|``, in (0, 1).

    Raises:
        UsageError: d or eps outside these.

    Reference: Welch 1974; the bound on ``P(|cos| >= eps)`` is proved in docs/statements/T5.md.

    Example:
        >>> capacity(100, 0.5).published
        400.0
    """
    if d < 1 or not 0.0 < eps < 1.0:
        raise UsageError(f"d={d}, eps={eps}", expected="d >= 1 and eps in (0, 1)", do="pass for example eps=0.1")
    square = eps**2
    return Capacity(
        published=d / square,
        log10_random_code=-(d - 1) / 4 * math.log10(1 - square),
        active_signals=1 + square * d,
        welch=d * (1 - square) / (1 - d * square) if d * square < 1 else None,
    )
