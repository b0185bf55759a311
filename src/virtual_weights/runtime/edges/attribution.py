"""First-order effect of every direct edge at once, from one backward pass per batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.attributed import reading_groups, writing_groups
from virtual_weights.runtime.edges.dictionary_writes import (
    feature_writes,
    gradient_hooks,
)
from virtual_weights.runtime.edges.losses import next_token_loss
from virtual_weights.runtime.running.activations import check_tokens
from virtual_weights.runtime.running.hooks import (
    Place,
    leaf,
    module_of,
    port_values,
    watched,
    wide,
)
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Group, Question, cost
from virtual_weights.stream.effective import as_seen, projection
from virtual_weights.stream.group import READINGS, Port, Writers, check_port, check_writers
from virtual_weights.stream.question import plain

Metric = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, T, V) and tokens (B, T) to one number a sequence, (B,)."""

_Reader = tuple[Port, str]  # a port and the id of the group that reads through it


@final
@dataclass(frozen=True)
class LogitDifference:
    """A metric: the logit of a token after the last one of each sequence, less that of another or of all.

    Attributes:
        token: id of the token, or one for each sequence of a run, in order.
        against: id of the other, likewise; None for the mean over the vocabulary.

    Raises:
        UsageError: both are the same token, or there are more of one than of the other; when asked, another number of
            tokens than of sequences.
    """

    token: int | Sequence[int]
    against: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("token", "against"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, Sequence) else value)
        tokens, others = _each(self.token), _each(self.against)
        if isinstance(self.token, tuple) and isinstance(self.against, tuple) and len(tokens) != len(others):
            raise UsageError(
                f"{len(tokens)} tokens against {len(others)}",
                expected="as many of one as of the other",
                do="pass one pair of tokens for each sequence",
            )
        for i in range(max(len(tokens), len(others))):
            check_tokens(tokens[i % len(tokens)] if tokens else None, others[i % len(others)] if others else None)

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The difference, (B,)."""
        del tokens  # it does not depend on them
        last = wide(logits[:, -1])
        return self._of(last, self.token) - (last.mean(-1) if self.against is None else self._of(last, self.against))

    def select(self, rows: slice, count: int) -> LogitDifference:
        """The metric of some rows of a run of so many sequences."""
        for tokens in (self.token, self.against):
            if isinstance(tokens, Sequence) and len(tokens) != count:
                raise UsageError(
                    f"{len(tokens)} tokens whose logits are asked for, on {count} sequences",
                    expected="one for each sequence of the run, or one for all",
                    do="pass as many tokens as prompts",
                )
        against = self.against[rows] if isinstance(self.against, Sequence) else self.against
        return LogitDifference(self.token[rows] if isinstance(self.token, Sequence) else self.token, against)

    @staticmethod
    def _of(last: Tensor, token: int | Sequence[int]) -> Tensor:
        if isinstance(token, int):
            return last[:, token]
        return last.gather(1, torch.tensor(token, device=last.device)[:, None])[:, 0]

    @property
    def identity(self) -> str:
        """The metric in words, for keys and captions."""
        return f"logit_difference, token={plain(self.token)}, against={plain(self.against)}"


def metric_name(metric: Metric | None) -> str:
    """What a metric is called in parameters; None is the mean next-token loss."""
    return "next_token_loss" if metric is None else plain(metric)


def check_how(metric: Metric | None, sequences: int | None, batch: int, least: float = 0, random: int = 0) -> None:
    """Refuse numbers that cannot be, and a metric that no question can hold.

    Raises:
        UsageError: a number is too small, the least effect is no number, or the metric has no hash.
    """
    counts = {"sequences": (sequences, 1), "batch": (batch, 1), "random": (random, 0)}
    wrong = [f"{name}={value}" for name, (value, lowest) in counts.items() if value is not None and value < lowest]
    if wrong:
        raise UsageError(
            ", ".join(wrong), expected="sequences and batch of at least 1, random of at least 0", do="pass such numbers"
        )
    if not 0 <= least < math.inf:
        raise UsageError(f"a least effect of {least}", expected="a number >= 0", do="pass for example least=0.01")
    try:
        hash(metric)
    except TypeError as error:
        raise UsageError(
            f"a metric of type {type(metric).__qualname__}: {error}",
            expected="a function, or an object with a hash",
            do="make its class a frozen dataclass of numbers, texts and tuples",
        ) from error


def metric_of(metric: Metric | None, run: Run, rows: slice) -> Metric:
    """The metric of some rows of a run's sequences; the mean next-token loss from the first that counts where None."""
    if metric is None:
        return partial(next_token_loss, first=run.first)
    return metric.select(rows, len(run.chunks)) if isinstance(metric, LogitDifference) else metric


def _each(token: int | Sequence[int] | None) -> Sequence[int]:
    return () if token is None else (token,) if isinstance(token, int) else token


@final
@dataclass(frozen=True)
class Attribution(Question[Run]):
    """What removing each direct edge would do to a metric, to first order.

    For writer i and reader port j, with g the gradient of the metric at the port's output (of heads before rotary, of
    an MLP at all its neurons, of the unembedding at the logits) and y what the writer writes::

        h_j(t) = R~_j^T g_j(t) / s_j(t)
        attribution[j, i] = sum_t < h_j(t), mean y_i - y_i(t) >

    the derivative of the metric along the removal of ``Removal()``, which ``Ablation`` carries out in full; the mean is
    over all tokens of all sequences. It is exact for small parts of an edge and can be far off where attention
    saturates. The mean over sequences is reported.

    The answer is a Record over (reader, writer), both in order of depth, with columns ``attribution`` and ``size``, its
    absolute value. A shared key or value head has the same row under all its readers' names, and its gradient is the
    sum over all of them.

    Questions that differ in their port alone are answered ``together``, by one backward pass a batch; all ports of a
    model are ``stream.groups.ports``. The gradients of the model's parameters are left alone. Progress is (batches
    done, batches).

    Attributes:
        port: through what is read: of heads ``"Q"``, ``"K"``, ``"V"``, of MLPs ``"gate"`` and ``"up"`` or ``"in"``,
            ``"unembed"``, and ``"enc"`` of attached dictionaries as wholes.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and attached dictionaries too. Biases are not edges that
            could be removed: what they write is their mean.
        metric: of logits and tokens, one number a sequence; None is the mean next-token loss in nats, from the first
            token of the run that counts. A function enters the key by its name and a digest of its source; where that
            cannot be had (a lambda, a closure), no atlas keeps the answer.
        sequences: how many of the run's first whole chunks; None for all.
        batch: sequences in one backward pass; what all writers write to them, (writers, tokens, d), is held at once.

    Raises:
        UsageError: no such port or writers, or a number or a metric that cannot be; when asked, readers without gain,
            or a port that the model has not.

    Reference: Syed, Rager, Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery".
    """

    question: ClassVar[str] = "attribution"

    port: Port = "K"
    writers: Writers = "heads"
    metric: Metric | None = None
    sequences: int | None = None
    batch: int = cost(2)

    def __post_init__(self) -> None:
        check_port(self.port)
        check_writers(self.writers)
        check_how(self.metric, self.sequences, self.batch)

    @property
    def parameters(self) -> dict[str, Any]:
        """As of every question; the loss by its name."""
        return {**super().parameters, "metric": metric_name(self.metric)}

    def __call__(self, subject: Run, progress: Progress = silent) -> Record:
        return next(self.together([self], subject, progress))[1]

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Run, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        if not subject.stream.folded:
            raise UsageError(
                "attribution needs the norm's gain in the readers",
                expected="norm gains folded into the readers",
                do="open the model without fold=False (--no-fold)",
            )
        alike: dict[Attribution, list[Attribution]] = {}
        for question in questions:
            assert isinstance(question, Attribution)
            alike.setdefault(replace(question, port="K"), []).append(question)
        for how, group in alike.items():
            sums = _Sums(subject, [question.port for question in group], how)
            tokens = subject.sequences(how.sequences)
            starts = range(0, len(tokens), how.batch)
            for i, start in enumerate(starts):
                rows = slice(start, start + how.batch)
                sums.add(tokens[rows], metric_of(how.metric, subject, rows))
                progress(i + 1, len(starts))
            for question in group:
                yield question, question._record(subject, sums.effects(question.port) / len(tokens), len(tokens))

    def _record(self, run: Run, effects: Tensor, sequences: int) -> Record:
        readers, writers = reading_groups(run.stream, self.port), writing_groups(run.stream, self.writers)
        names = tuple(name for group in readers for name in group.readers(self.port))
        kv_groups = tuple(name for group in readers for name in group.kv_groups(self.port))
        sources = tuple(label for writer in writers for label in writer.labels)
        axes = Axis("reader", names, kv_groups), Axis("writer", sources)
        reaches = [[w.reaches(r.reads) for w in writers for _ in w.labels] for r in readers for _ in r.labels]
        effects = effects.masked_fill(~torch.tensor(reaches), torch.nan)
        columns = (
            Column(
                "attribution", effects, "nats, or the metric's", "first-order change of the metric without the edge"
            ),
            Column("size", effects.abs(), "the same", "|attribution|"),
        )
        return run.record(self, axes, columns, replacement="mean", scalars="held", sequences=sequences)


@final
class _Sums:
    """Sums over all tokens t, in float64, from which every effect of some ports is made.

    Attributes:
        products: of every reader ``sum_t <h(t), y(t)>``, (m, writers).
        gradients: of every reader ``sum_t h(t)``, (m, d).
        written: ``sum_t y(t)``, (writers, d).
        tokens: how many there are.
    """

    def __init__(self, run: Run, ports: Sequence[Port], how: Attribution) -> None:
        self.run = run = replace(run, stream=as_seen(run.stream, "enc"))
        self.readers: dict[_Reader, Group] = {
            (port, g.id): g for port in ports for g in reading_groups(run.stream, port)
        }
        self.writers = writing_groups(run.stream, how.writers)
        self.products, self.gradients = dict[_Reader, Tensor](), dict[_Reader, Tensor]()
        count = sum(len(writer.labels) for writer in self.writers)
        self.written = torch.zeros(count, run.stream.d_model, dtype=accumulate, device=run.device)
        self.tokens = 0

    def add(self, tokens: Tensor, metric: Metric) -> None:
        """A batch, (B, T), and the metric of its sequences."""
        signals, gradients = self._backward(tokens, metric)
        written = self._written(signals, tokens)
        self.written += written.sum(1, dtype=accumulate)
        self.tokens += tokens.numel()
        for reader, gradient in gradients.items():
            h = self._at_the_stream(reader, gradient, signals["state", self.readers[reader].reads or 0])
            self.products[reader] = self.products.get(reader, 0.0) + (h.flatten(1) @ written.flatten(1).T).double()
            self.gradients[reader] = self.gradients.get(reader, 0.0) + h.sum(1).double()

    def effects(self, port: Port) -> Tensor:
        """``sum_t <h(t), mean y - y(t)>``, (readers, writers)."""
        mean = self.written / self.tokens
        return torch.cat(
            [
                (self.gradients[reader] @ mean.T - self.products[reader]).repeat_interleave(group.shared(port), 0)
                for reader, group in self.readers.items()
                if reader[0] == port
            ]
        ).cpu()

    def _backward(self, tokens: Tensor, metric: Metric) -> tuple[dict[Place, Tensor], dict[_Reader, Tensor]]:
        """What writers write from and readers read, and the gradient of the summed metric at each port's output."""
        module, stream = self.run.module, self.run.stream
        outputs: dict[_Reader, Tensor] = {}
        places = {place for writer in self.writers for place in writer.places}
        places |= {("state", group.reads or 0) for group in self.readers.values()}

        def keep(reader: _Reader, _module: nn.Module, _given: object, output: Tensor) -> None:
            outputs[reader] = output

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.callback(module_of(module, stream, "embed", "embed").register_forward_hook(leaf).remove)
            for reader in self.readers:
                port, group = reader
                if port == "enc":
                    for hook in gradient_hooks(module, stream, group, partial(keep, reader, module, None)):
                        stack.callback(hook.remove)
                    continue
                hook = module_of(module, stream, READINGS[port], group).register_forward_hook(partial(keep, reader))
                stack.callback(hook.remove)
            signals, logits = watched(module, stream, places, tokens)
            total = metric(logits, tokens).sum()
            distinct = list({id(output): output for output in outputs.values()}.values())  # fused ports are one output
            gradients = {id(o): g for o, g in zip(distinct, torch.autograd.grad(total, distinct), strict=True)}
        return signals, {
            (port, group): gradients[id(output)]
            if port == "enc"
            else port_values(stream, port, group, gradients[id(output)])
            for (port, group), output in outputs.items()
        }

    def _written(self, signals: Mapping[Place, Tensor], tokens: Tensor) -> Tensor:
        """What every writer writes, (writers, B T, d): ``O z`` of heads for z (B, T, m, k), a group at a time."""
        outputs, stream = list[Tensor](), self.run.stream
        for writer in self.writers:
            if writer.group.kind == "dictionary":
                written = feature_writes(stream, writer.group.id, signals, slice(None), writer.first)
                outputs.append(written.flatten(0, 1)[None])
                continue
            (place,) = writer.places
            z = wide(signals[place])
            z = z.expand(*tokens.shape, *z.shape[2:]).flatten(0, 1)
            if writer.group.kind == "head":
                outputs.append(torch.einsum("mdk,tmk->mtd", stream.write(writer.group).to(z), z))
            else:
                outputs.append(z[None])
        return torch.cat(outputs)

    def _at_the_stream(self, reader: _Reader, gradient: Tensor, x: Tensor) -> Tensor:
        """``R~^T g / s``, (m, B T, d), for g (B, T, m, k), of one map (B, T, k), and x (B, T, d)."""
        x = wide(x.flatten(0, 1))
        stream = self.run.stream
        maps = (stream.read(*reader) if reader[0] == "enc" else projection(stream, *reader)).maps.to(x)
        gradient = gradient.flatten(0, 1).to(x).reshape(len(x), *maps.shape[:2])
        return torch.einsum("mkd,tmk->mtd", maps, gradient / stream.scale(x, reader[1])[:, None, None])
