"""How long a component's output persists in the stream, and which later components remove it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.linalg import ZERO, accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.running.activations import Activations
from virtual_weights.runtime.running.hooks import Place, Signal, forward, places, watching
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import is_token
from virtual_weights.stream import Question, Stream

_BYTES = 2**27  # of what all writers wrote at some tokens, in float64
WEIGHT = "1/s^2, s the largest norm scalar of the token at any state"


@dataclass(frozen=True)
class _OnePass(Question[Run]):
    """Three questions that one pass over the tokens answers."""

    centred: bool = False

    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Run the model; a writer that wrote nothing is absent.

        ``stamp["error"]`` is the last state's distance from the sum of all that was written, over its length. Progress
        is called with (tokens done, tokens).
        """
        return next(record for _, record in self.together([self], run, progress))

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Any, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        """Answer several of them, centred or not, from one pass over the tokens."""
        products = _products(subject, progress)
        for question in questions:
            assert isinstance(question, _OnePass)
            axes, columns = question._table(products.shares(question.centred))
            yield question, subject.record(question, axes, columns, weight=WEIGHT, error=products.error)

    @abstractmethod
    def _table(self, shares: _Shares) -> tuple[list[Axis], list[Column]]: ...


@final
@dataclass(frozen=True)
class Persistence(_OnePass):
    """How much of what a component wrote is in every later state: m_i(p) below, over (writer, state).

    For writer i with output y_i(t), first in state q, and tokens weighted by w(t)::

        m_i(p)   = sum_t w <x_p, y_i> / sum_t w |y_i|^2            p = q, q+1, ...
        e_ij     = sum_t w <y_j, y_i> / sum_t w |y_i|^2            j writes later than i
        m_i(p+1) = m_i(p) + sum of e_ij over the j that first appear in p+1

    m is 1 where nothing else in the stream lies along y, falls as others write against it and is 0 where no linear
    reader along y finds any of it. The third line attributes the fall, exactly and for any weights: all figures are
    sums of one Gram matrix ``<y_i, y_j>`` over writers, since the stream is the sum of what was written. The weight is
    ``1/s^2``, s the token's largest norm scalar, so that a few tokens with huge norms do not outweigh the others.

    Columns ``projection`` and ``strength``; absent before it is written. What a writer of nothing wrote has strength 0
    and no projection. With LayerNorm, which passes no mean of a state, all that is written is centred. Invariant under
    re-basing of heads and, with RMSNorm, rotation of the stream.

    Attributes:
        centred: leave the mean over tokens out of all that was written, so that only what differs between tokens
            counts. Uncentred, the constant directions of a trained stream can outweigh it by far.
    """

    question: ClassVar[str] = "persistence"

    def _table(self, shares: _Shares) -> tuple[list[Axis], list[Column]]:
        states = Axis("state", tuple(map(str, range(shares.projection.shape[1]))))
        size = shares.size[:, None] + 0 * shares.after
        return [shares.writers, states], [
            Column("projection", shares.projection, "1 (ratio)", "<x, y> / |y|^2, sums over weighted tokens"),
            Column("strength", size, "1 (ratio)", "root mean square of |y|/s: 0 where it wrote nothing"),
        ]


@final
@dataclass(frozen=True)
class ErasedBy(_OnePass):
    """Which later components remove what a component wrote: e_ij of ``Persistence``, over (writer, eraser).

    Columns ``share`` and ``strength``; absent where the eraser does not write later.
    """

    question: ClassVar[str] = "erased_by"

    def _table(self, shares: _Shares) -> tuple[list[Axis], list[Column]]:
        return [shares.writers, Axis("eraser", shares.writers.labels)], [
            Column("share", shares.later, "1 (ratio)", "<y of eraser, y> / |y|^2; below 0 it removes"),
            Column("strength", shares.common, "1 (ratio)", "|mean of <y of eraser, y>/s^2|: 0 where one wrote nothing"),
        ]


@final
@dataclass(frozen=True)
class PersistenceSummary(_OnePass):
    """How long what each component wrote persists, and which later component removes most: a row for every writer.

    Columns ``start``, ``final``, ``lowest``, ``lowest_state``, ``half_state``, ``taken`` and ``eraser``, of the figures
    of ``Persistence`` and ``ErasedBy``.
    """

    question: ClassVar[str] = "persistence_summary"

    def _table(self, shares: _Shares) -> tuple[list[Axis], list[Column]]:
        projection, start = shares.projection, shares.start
        lowest, lowest_state = projection.nan_to_num(torch.inf).min(1)
        below = projection < start[:, None] / 2
        half = torch.where(below.any(1), below.double().argmax(1).to(accumulate), torch.nan)
        taken, eraser = shares.later.nan_to_num(torch.inf).min(1)
        taken = taken.masked_fill(taken.isinf() | (taken >= 0), torch.nan)
        labels, absent = shares.writers.labels, start.isnan()
        erasers = (None if math.isnan(t) else labels[i] for i, t in zip(eraser.tolist(), taken.tolist(), strict=True))
        lowest, lowest_state = (x.to(accumulate).masked_fill(absent, torch.nan) for x in (lowest, lowest_state))
        return [shares.writers], [
            Column("start", start, "1 (ratio)", "projection in the first state that holds it"),
            Column("final", projection[:, -1], "1 (ratio)", "projection in the last state"),
            Column("lowest", lowest, "1 (ratio)", "least projection in any state"),
            Column("lowest_state", lowest_state, "state", "where that is"),
            Column("half_state", half, "state", "first state with less than half of the start; absent where none has"),
            Column("taken", taken, "1 (ratio)", "share of the later writer that removes most"),
            Column("eraser", tuple(erasers), "", "that writer; absent where none removes any"),
        ]


@final
class _Shares:
    """m (writers, states) and e (writers, writers) of ``Persistence``, NaN where there is none."""

    def __init__(self, stream: Stream, products: Tensor, weight: float) -> None:
        energy = products.diagonal()[:, None]
        self.size = (products.diagonal() / weight).sqrt()
        share = (products / energy).masked_fill(energy == 0, torch.nan)
        groups, states = stream.groups.writers, torch.arange(stream.states)
        first = torch.tensor([group.first for group in groups for _ in group.labels])[:, None]
        self.writers = Axis("writer", tuple(label for group in groups for label in group.labels))
        self.after = torch.zeros(len(first), stream.states).masked_fill(states < first, torch.nan)
        self.projection = share @ (first <= states).to(accumulate) + self.after
        self.start = self.projection.gather(1, first)[:, 0]
        self.later = share.masked_fill(first.T <= first, torch.nan)
        self.common = (products / weight).abs().masked_fill(first.T <= first, torch.nan)


@final
class _Products:
    """Weighted sums over tokens of what writers wrote, and of their products."""

    def __init__(self, stream: Stream) -> None:
        writers = sum(len(group.components) for group in stream.groups.writers)
        self.stream = stream
        self.gram = torch.zeros((writers, writers), dtype=accumulate)
        self.sums = torch.zeros((writers, stream.d_model), dtype=accumulate)
        self.weight = self.difference = self.energy = 0.0

    def add(self, activations: Activations) -> None:
        """Some tokens."""
        last = self.stream.states - 1
        weight = torch.stack([activations.scalar(p) for p in range(self.stream.states)]).amax(0).pow(-2)
        written = torch.stack([self._seen(y) for _, y in activations.written(last)])  # (writers, tokens, d)
        flat = (written * weight.sqrt()[:, None]).flatten(1)
        self.gram += flat @ flat.T
        self.sums += torch.einsum("wtd,t->wd", written, weight)
        self.weight += float(weight.sum())
        state = self._seen(activations.state(last))
        self.difference += float((written.sum(0) - state).square().sum())
        self.energy += float(state.square().sum())

    def _seen(self, y: Tensor) -> Tensor:
        """What a norm passes of a part of the stream (..., d): LayerNorm takes its mean away."""
        return y - y.mean(-1, keepdim=True) if self.stream.spec.norm == "layer" else y

    @property
    def error(self) -> float:
        """The last state's distance from the sum of all that was written, over its length."""
        return (self.difference / self.energy) ** 0.5 if self.energy else float("nan")

    def shares(self, centred: bool) -> _Shares:
        """Shares of ``sum_t w <y_i, y_j>``, each writer's mean left out where ``centred``; a constant leaves 0."""
        if not centred:
            return _Shares(self.stream, self.gram, self.weight)
        rest = self.gram - self.sums @ self.sums.T / self.weight
        constant = rest.diagonal() <= ZERO * self.gram.diagonal()
        return _Shares(self.stream, rest.masked_fill(constant | constant[:, None], 0.0), self.weight)


@torch.no_grad()
def _products(run: Run, progress: Progress) -> _Products:
    products, done = _Products(run.stream), 0
    for batch in run.batches():
        for activations in _slabs(run, batch):
            products.add(activations)
            done += len(activations.tokens)
            progress(done, run.count)
    return products


def _slabs(run: Run, batch: Tensor) -> Iterator[Activations]:
    """Run a batch, and give its tokens a slab at a time: which of them stood together no longer matters."""
    stream, mask = run.stream, is_token(batch)
    signals: dict[Place, Tensor] = {}

    def see(signal: Signal, where: Any, tensor: Tensor) -> None:
        tensor = tensor.expand(len(batch), *tensor.shape[1:])  # learned positions come once
        signals[signal, where] = tensor[mask.to(tensor.device)].cpu()

    wanted: list[Place] = [*places(stream, "state", "written"), *(("inner", g.id) for g in stream.groups.heads)]
    with watching(run.module, stream, wanted, see):
        forward(run.module, batch.clamp(min=0))
    step = max(1, _BYTES // (8 * len(stream.components) * stream.d_model))
    for tokens, *slab in zip(batch[mask].split(step), *(x.split(step) for x in signals.values()), strict=True):
        yield Activations(stream, tokens, dict(zip(signals, slab, strict=True)), torch.empty(0))
