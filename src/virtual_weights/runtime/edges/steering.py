"""Adding a vector to the stream of a running model: what it does, and what its gradient foretold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import mean_estimate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.ablation import SEQUENCES
from virtual_weights.runtime.edges.attribution import Metric, check_how, metric_of
from virtual_weights.runtime.edges.passes import restarted
from virtual_weights.runtime.running.hooks import watched
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Group, Question, Stream, cost
from virtual_weights.stream.vector import Vector, state_of


@final
@dataclass(frozen=True)
class VectorEffect(Question[Run]):
    """What adding multiples of a vector to a state at every token does to a metric, and what its gradient foretells.

    With M the metric of a sequence whose state is x(t) at token t::

        effect = M(x(t) + a v) - M(x(t))         predicted = a sum_t <dM/dx(t), v>

    Both are means over sequences. For small a they agree; where they part, the model has bent.

    Attributes:
        vector: what is added.
        at: the state: a number, or what reads it, ``"L12"``; one with which a block begins, or the last.
        amounts: the multiples a.
        sequences: how many of the run's first whole chunks, where it has so many; None for all.
        metric: of logits and tokens, one number a sequence; None is the mean next-token loss in nats.
        batch: sequences that run at once.
    """

    question: ClassVar[str] = "vector_effect"
    vector: Vector
    at: str | int
    amounts: Sequence[float] = (1.0,)
    sequences: int | None = SEQUENCES
    metric: Metric | None = None
    batch: int = cost(8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "amounts", tuple(map(float, self.amounts)))
        check_how(self.metric, self.sequences, self.batch)
        if not self.amounts or not all(0 < abs(a) < float("inf") for a in self.amounts):
            raise UsageError(f"amounts={self.amounts}", expected="numbers other than 0", do="pass for example (1.0,)")

    def __call__(self, subject: Run, progress: Progress = silent) -> Record:
        """Run every sequence with each multiple.

        Args:
            subject: the run.
            progress: called with (sequences done, sequences in all).

        Returns:
            A Record over ``amount``: ``effect`` with the interval of its mean (``low``, ``high``) and ``p``,
            ``predicted``, and ``share``, predicted over effect.

        Raises:
            UsageError: the vector has another width, no block begins with the state, or no token counts.
        """
        stream, tokens = subject.stream, subject.sequences(self.sequences)
        vector, state = self.vector.of(stream), state_of(stream, self.at)
        group = _beginning(stream, state)
        effects, slopes = list[Tensor](), list[Tensor]()
        for start in range(0, len(tokens), self.batch):
            rows = slice(start, start + self.batch)
            metric = metric_of(self.metric, subject, rows)
            with torch.no_grad():
                signals, logits = watched(subject.module, stream, {("state", state)}, tokens[rows])
                before = metric(logits, tokens[rows]).double()
            x = signals["state", state]
            added = vector.to(x)
            slopes.append(self._slope(subject, group, x, tokens[rows], metric) @ added.double())
            with torch.no_grad():
                after = [self._run(subject, group, x + a * added, tokens[rows], metric) for a in self.amounts]
            effects.append(torch.stack(after) - before)
            progress(min(start + self.batch, len(tokens)), len(tokens))
        return self._record(subject, torch.cat(effects, 1).cpu(), torch.cat(slopes).cpu(), state)

    def _run(self, run: Run, group: Group, x: Tensor, tokens: Tensor, metric: Metric) -> Tensor:
        with restarted(run.module, run.stream, group, x):
            return metric(run.module(tokens, use_cache=False).logits, tokens).double()

    def _slope(self, run: Run, group: Group, x: Tensor, tokens: Tensor, metric: Metric) -> Tensor:
        """``sum_t dM/dx(t)``, (B, d)."""
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            total = self._run(run, group, leaf, tokens, metric).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        return gradient.double().sum(1)

    def _record(self, run: Run, effects: Tensor, slopes: Tensor, state: int) -> Record:
        estimate, unit = mean_estimate(effects), "nats, or the metric's"
        predicted = torch.tensor(self.amounts, dtype=torch.float64) * slopes.mean()
        mean = effects.mean(1)
        columns = (
            Column("effect", mean, unit, "metric with the vector added, less the metric"),
            Column("low", estimate.low, unit, "lower bound of the 95% interval of its mean over sequences"),
            Column("high", estimate.high, unit, "upper bound"),
            Column("p", estimate.p, "1, in [0, 1]", "p-value of the effect against 0, by the same law"),
            Column("predicted", predicted, unit, "the same to first order, by the gradient"),
            Column("share", predicted / mean, "1 (ratio)", "predicted over effect: 1 where the model does not bend"),
        )
        axis = Axis("amount", tuple(f"{a:g}" for a in self.amounts))
        norm = float(self.vector.values.norm())
        return run.record(self, (axis,), columns, state=state, sequences=effects.shape[1], norm_of_vector=norm)


def _beginning(stream: Stream, state: int) -> Group:
    """The attention of the block that begins with a state, or the unembedding."""
    starts = {group.reads: group for group in (stream.groups["unembed"], *reversed(stream.groups.heads))}
    if state not in starts:
        raise UsageError(
            f"no block begins with state {state}",
            expected="what the first part of a layer reads, such as L12, or the last state: unembed",
            do="add the vector there",
        )
    return starts[state]
