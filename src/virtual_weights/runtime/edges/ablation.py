"""Causal effects of edges: what removing one does to the loss, against matched random edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate, random_generator
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.edge import (
    Edge,
    Removal,
    Replacement,
    Scalars,
    Written,
    affected,
    group_readers,
    next_token_loss,
    removed,
    restarted,
    starting_group,
)
from virtual_weights.runtime.running.hooks import Place, watched
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Composite, Question, Stream, cost
from virtual_weights.stream.question import Ask, asking

RULE = (
    "causal: the 95% interval of the effect excludes 0, and the effect is larger in size than that of every matched "
    "random edge (same port, same kind of writer); not shown: all else, which does not mean that there is no effect"
)

NO_RULE = (
    "not shown: without matched random edges (random=0) p is undefined and no edge can be called causal; compare the "
    "interval of the effect with 0"
)


@final
@dataclass(frozen=True)
class EdgeAblation(Question[Run]):
    """Remove one edge and measure what that does: a Record over ``edge``, of length 1.

    ``effect_nats`` is the loss without the edge less the loss with it, both the mean over counted tokens, averaged
    over sequences; its interval is the percentile bootstrap over sequences (95%, 2000 draws), absent where there is
    one sequence; with few sequences such an interval is too narrow rather than too wide.

    Edges that are removed in the same way share their passes, asked ``together``: one pass with every edge serves them
    all, and blocks before the first that an edge touches give what they gave in that pass and are not run again.
    Progress is (edges done, edges in all), counted batch by batch.

    Attributes:
        writer: e.g. ``"L16H0"``.
        reader: e.g. ``"L18H6.K"``.
        replacement: by what the writer's contribution is replaced: its ``"mean"`` over all tokens, or ``"resample"``.
        scalars: norm scalars ``"held"``, or allowed to ``"move"``.
        sequences: how many of the run's first whole chunks; None for all.
        seed: of the bootstrap.
        batch: sequences that run at once; where there are fewer, several edges do, each on its own copy.

    Raises:
        UsageError: when asked, an edge that cannot be.
    """

    question: ClassVar[str] = "ablation"

    writer: str
    reader: str
    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    sequences: int | None = None
    seed: int = 0
    batch: int = cost(8)

    def __call__(self, subject: Run, progress: Progress = silent) -> Record:
        return next(self.together([self], subject, progress))[1]

    @classmethod
    @torch.no_grad()
    def together(
        cls, questions: Sequence[Question[Any]], subject: Run, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        alike: dict[EdgeAblation, list[EdgeAblation]] = {}
        for question in questions:
            assert isinstance(question, EdgeAblation)
            alike.setdefault(replace(question, writer="", reader=""), []).append(question)
        for how, group in alike.items():
            edges = [Edge.of(subject.stream, question.writer, question.reader) for question in group]
            figures, losses = _figures(how, subject, edges, progress)
            for question, edge, rows in zip(group, edges, figures, strict=True):
                yield question, question._record(subject, edge, rows, losses)

    def _record(self, run: Run, edge: Edge, figures: Tensor, losses: Tensor) -> Record:
        """The answer, of the edge's figures (sequences, 4) and the losses with every edge (sequences,)."""
        effect, pattern, output, top = figures.mean(0)[:, None]
        low, high = _interval(figures[:, 0], self.seed)[:, None]
        columns = (
            Column("effect_nats", effect, "nats", "loss without the edge less loss with it"),
            Column("low", low, "nats", "lower bound of its 95% interval, bootstrap over sequences"),
            Column("high", high, "nats", "upper bound"),
            Column(
                "pattern_change", pattern, "1, in [0, 1]", "total variation of attention, mean over queries and heads"
            ),
            Column("output_change", output, "1 (ratio)", "||change|| / ||output|| of what reads the edge"),
            Column("top_changed", top, "1, in [0, 1]", "share of counted tokens whose likeliest next token is another"),
            Column("writer", (str(edge.writer),)),
            Column("reader", (str(edge.reader),)),
            Column("group", (edge.kv_group,), "", "the shared key/value head, None where it shares none"),
            Column("shared_with", (" ".join(edge.shared_with),), "", "heads that read through it"),
        )
        axes = (Axis("edge", (str(edge),)),)
        return run.record(self, axes, columns, clean_loss=float(losses.mean()), sequences=len(losses))


@final
@dataclass(frozen=True)
class Ablation(Composite[Run]):
    """Remove edges one by one and compare each with matched random edges, which are removed too.

    The figures are those of ``EdgeAblation``. ``p`` is the share of edges among the matched random ones and this one
    whose effect is at least as large in size, undefined without random ones. Verdicts follow ``RULE``: an edge like the
    random ones is called causal with a chance of at most ``1/(n + 1)``, n being their number, each edge on its own.
    Random edges are the yardstick, have the same columns, and by the rule are never causal themselves; those of one
    port and kind of writer do not depend on what else is asked.

    Attributes:
        edges: names of writers and readers, any sequence of pairs, e.g. ``[("L16H0", "L18H6.K")]``; of several names
            of one edge the first counts.
        random: how many matched random edges per port and kind of writer; fewer where the model has fewer. With 0
            there is no verdict but "not shown", as the stamp's ``rule`` says.
        replacement: see ``EdgeAblation``.
        scalars: likewise.
        sequences: likewise.
        seed: of the random edges and of the bootstrap.
        batch: see ``EdgeAblation``.

    Raises:
        UsageError: there are no edges; when asked, an edge that cannot be.

    Example:
        >>> Ablation([("L16H0", "L18H6.K")])(run)["verdict"]  # doctest: +SKIP
    """

    question: ClassVar[str] = "ablation"
    stored: ClassVar[bool] = False

    edges: Sequence[tuple[str, str]]
    random: int = 20
    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    sequences: int | None = None
    seed: int = 0
    batch: int = cost(8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple((writer, reader) for writer, reader in self.edges))
        if not self.edges:
            raise UsageError("no edge to remove", expected="a writer and a reader", do="name them")

    def __call__(self, subject: Run, progress: Progress = silent, ask: Ask | None = None) -> Record:
        named: dict[tuple[str, str, str], Edge] = {}
        for pair in self.edges:
            edge = Edge.of(subject.stream, *pair)
            named.setdefault(edge.key, edge)
        edges = [*named.values(), *_random_edges(subject.stream, list(named.values()), self.random, self.seed)]
        how = self.replacement, self.scalars, self.sequences, self.seed, self.batch
        questions = [EdgeAblation(str(edge.writer), str(edge.reader), *how) for edge in edges]
        records = (ask or asking(subject, progress=progress))(questions)
        columns = [_joined(records, column) for column in records[0].columns]
        rule = RULE if self.random else NO_RULE
        p, verdict = _judged(edges, len(named), *(column.values for column in columns[:3]))
        columns[3:3] = (
            Column("p", p, "1, in (0, 1]", "rank of the effect's size among the matched random edges, absent without"),
            Column("verdict", verdict, "", rule),
        )
        columns.insert(-4, Column("kind", tuple("asked" if i < len(named) else "random" for i in range(len(edges)))))
        stamp = {name: records[0].stamp[name] for name in ("clean_loss", "sequences")}
        return subject.record(self, (Axis("edge", tuple(map(str, edges))),), columns, rule=rule, **stamp)


@final
class _Clean:
    """A batch of sequences run with every edge, and what changes in it without one."""

    def __init__(self, run: Run, edges: Sequence[Edge], tokens: Tensor) -> None:
        self.run, self.tokens = run, tokens
        places = {place for edge in edges for place in _places(run.stream, edge)}
        places |= {Written.of(run.stream, edge.writer).place for edge in edges}
        places |= {("state", starting_group(run.stream, [edge]).reads or 0) for edge in edges}
        self.signals, self.logits = watched(run.module, run.stream, places, tokens)
        self.losses, self.top = next_token_loss(self.logits, tokens, run.first), self.logits.argmax(-1)

    def without(self, edges: Sequence[Edge], removal: Removal) -> Iterator[Tensor]:
        """Without each of some edges, run at once: (sequences, 4) effect, change of pattern and of output, new tops."""
        stream, module, copies = self.run.stream, self.run.module, len(edges)
        group = starting_group(stream, edges)
        state = self.signals["state", group.reads or 0].repeat(copies, 1, 1)
        # of what writers write from, a block that does not run shows nothing
        inner = {place: torch.cat([z] * copies) for place, z in self.signals.items() if place[0] == "inner"}
        places = {place for edge in edges for place in _places(stream, edge)}
        with restarted(module, stream, group, state), removed(module, stream, edges, removal, inner):
            signals, logits = watched(module, stream, places, self.tokens.repeat(copies, 1))
        for i, edge in enumerate(edges):
            block = slice(i * len(self.tokens), (i + 1) * len(self.tokens))
            yield self._figures(edge, {place: signal[block] for place, signal in signals.items()}, logits[block])

    def _figures(self, edge: Edge, signals: dict[Place, Tensor], logits: Tensor) -> Tensor:
        first, write = self.run.first, affected(self.run.stream, edge)
        before, after = (self.logits, logits) if write is None else (write(self.signals), write(signals))
        output = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        top = (logits.argmax(-1) != self.top)[:, first - 1 : -1].double().mean(1)
        effect = next_token_loss(logits, self.tokens, first) - self.losses
        pattern = torch.full_like(effect, torch.nan)
        if write is not None and edge.port in ("Q", "K"):  # total variation, mean over queries and heads
            before, after = (s["pattern", edge.target][:, write.components] for s in (self.signals, signals))
            pattern = (after - before).abs().sum(-1).mean((1, 2)) / 2
        return torch.stack([figure.double() for figure in (effect, pattern, output, top)], 1)


def _places(stream: Stream, edge: Edge) -> Iterator[Place]:
    """What is compared with and without an edge."""
    write = affected(stream, edge)
    if write is not None:
        yield write.place
    if edge.port in ("Q", "K"):
        yield "pattern", edge.target


def _figures(how: EdgeAblation, run: Run, edges: Sequence[Edge], progress: Progress) -> tuple[Tensor, Tensor]:
    """What removing each edge does, (edges, sequences, 4), and the losses with all of them, (sequences,)."""
    batches = run.sequences(how.sequences).split(how.batch)
    removal = Removal(how.replacement, how.scalars)
    if how.replacement == "mean":
        removal = replace(removal, means=_means(run, edges, batches))
    figures, losses = list[Tensor](), list[Tensor]()
    for i, tokens in enumerate(batches):
        clean, rows = _Clean(run, edges, tokens), list[Tensor]()
        at_once = max(1, how.batch // len(tokens))
        for start in range(0, len(edges), at_once):
            for row in clean.without(edges[start : start + at_once], removal):
                rows.append(row)
                progress(i * len(edges) + len(rows), len(batches) * len(edges))
        figures.append(torch.stack(rows))
        losses.append(clean.losses)
    return torch.cat(figures, 1).cpu(), torch.cat(losses).double().cpu()


def _means(run: Run, edges: Sequence[Edge], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every writer's mean over all tokens, (d,), from a pass of its own."""
    writers = {str(edge.writer): Written.of(run.stream, edge.writer) for edge in edges}
    sums = {name: torch.zeros(run.stream.d_model, dtype=accumulate, device=run.device) for name in writers}
    for tokens in batches:
        signals, _ = watched(run.module, run.stream, {write.place for write in writers.values()}, tokens)
        for name, write in writers.items():
            sums[name] += write(signals).to(accumulate).expand(*tokens.shape, -1).sum((0, 1))
    return {name: total / sum(tokens.numel() for tokens in batches) for name, total in sums.items()}


def _interval(effects: Tensor, seed: int) -> Tensor:
    """Both bounds of the mean over sequences, effects (sequences,); NaN where there is one sequence."""
    n = len(effects)
    if n < 2:
        return effects.new_full((2,), torch.nan)
    draws = torch.randint(0, n, (2000, n), generator=random_generator(seed))
    return effects[draws].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=effects.dtype))


def _random_edges(stream: Stream, edges: Sequence[Edge], count: int, seed: int) -> Iterator[Edge]:
    """Edges like some edges, drawn evenly among those that reach, none twice and none of these.

    Every kind of writer and port is drawn anew from the seed: its edges do not depend on the others.
    """
    keys = {edge.key for edge in edges}
    for kind, port in dict.fromkeys(map(_likeness, edges)):
        draw, start = Random(seed), len(keys)
        labels = [c.label for c in stream.components if c.kind == ("mlp" if kind == "neuron" else kind)]
        readers = group_readers(stream, port)
        for _ in range(200 * count):  # by rejection: an MLP's neurons times all readers are too many to list
            if len(keys) - start == count:
                break
            label, reader = draw.choice(labels), draw.choice(readers)
            width = stream.groups.of(label).width
            try:
                edge = Edge.of(
                    stream, f"L{label.layer}N{draw.randrange(width)}" if kind == "neuron" else str(label), reader
                )
            except UsageError:  # it cannot reach
                continue
            if edge.key not in keys:
                keys.add(edge.key)
                yield edge


def _likeness(edge: Edge) -> tuple[str, str]:
    """What a random edge must have in common with the edge that it is compared with."""
    return edge.writer.kind, edge.port


def _joined(records: Sequence[Record], column: Column) -> Column:
    """One column of several records, one after the other."""
    values: list[Any] = [record[column.name] for record in records]
    joined = torch.cat(values) if isinstance(column.values, Tensor) else tuple(chain.from_iterable(values))
    return replace(column, values=joined)


def _judged(edges: Sequence[Edge], count: int, effect: Any, low: Any, high: Any) -> tuple[Tensor, tuple[str, ...]]:
    """Rank and verdict of each edge: the first ``count`` are judged, by the random ones after them."""
    p, verdicts = torch.ones(len(edges), dtype=torch.float64), list[str]()
    for i, edge in enumerate(edges):
        like = [j for j in range(count, len(edges)) if _likeness(edges[j]) == _likeness(edge) and j != i]
        larger = int((effect[like].abs() >= effect[i].abs()).sum())
        p[i] = (1 + larger) / (1 + len(like)) if like else torch.nan
        largest = larger == 0 and i < count and len(like) > 0
        verdicts.append("causal" if largest and bool((low[i] > 0) | (high[i] < 0)) else "not shown")
    return p, tuple(verdicts)
