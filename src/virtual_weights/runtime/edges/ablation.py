"""Causal effects of edges: what removing one, or a set at once, does to a metric, beside random edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import MeanEstimate, accumulate, benjamini_hochberg, mean_estimate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.attribution import Metric, check_how
from virtual_weights.runtime.edges.edge import Edge, EdgeSet, Replacement, Scalars, group_readers
from virtual_weights.runtime.edges.passes import FIGURES, Manner, Measured, measured
from virtual_weights.runtime.edges.yardstick import likeness, random_edges, rank_of
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Composite, Question, Stream, cost
from virtual_weights.stream.question import Ask, asking

INTERVAL = "95% t-interval of the mean over sequences, corrected for skewness"
SEQUENCES = 32


def rule(least: float) -> str:
    """What verdicts go by, in words."""
    return (
        f"causal: the 95% interval of the effect lies wholly beyond plus or minus {least:g}; negligible: wholly "
        "within; inconclusive: neither; more sequences may decide"
    )


def verdict(low: float, high: float, least: float) -> str:
    """``causal``, ``negligible`` or ``inconclusive``, of an interval and a least effect; see ``rule``."""
    if low > least or high < -least:
        return "causal"
    return "negligible" if -least <= low and high <= least else "inconclusive"


@final
@dataclass(frozen=True)
class EdgeAblation(Question[Run]):
    """Remove one edge and measure what that does: a Record over ``edge``, of length 1.

    ``effect_nats`` is the metric without the edge less the metric with it, averaged over sequences; the metric is the
    mean loss of the tokens that count, or another. Its interval is Student's over sequences, corrected for skewness,
    and ``p`` the p-value against no effect that goes with it, see ``mean_estimate``; both are absent where there is one
    sequence. Means hide rare tokens: ``loss_changed`` is the share of those whose loss changes by more than .1 nats.

    Edges that are removed in the same way share their passes, asked ``together``: one pass with every edge serves them
    all, and blocks before the first that an edge touches give what they gave in that pass and are not run again.
    Progress is (edges done, edges in all), counted batch by batch.

    Attributes:
        writer: e.g. ``"L16H0"``.
        reader: e.g. ``"L18H6.K"``.
        replacement: by what the writer's contribution is replaced: its ``"mean"`` over all tokens; what it writes at
            the same place of the next sequence, ``"resample"``; or what it writes there in the run of the sequence's
            ``"partner"``, see ``Run.on_pairs``.
        scalars: norm scalars ``"held"``, or allowed to ``"move"``.
        sequences: how many of the run's first whole chunks, where it has so many; None for all.
        metric: of logits and tokens, one number a sequence; None is the mean next-token loss in nats. A function enters
            the key by its name and a digest of its source; where that cannot be had (a lambda, a closure), no atlas
            keeps the answer.
        batch: sequences that run at once; where there are fewer, several edges do, each on its own copy.

    Raises:
        UsageError: a number of sequences, or a metric, that cannot be; when asked, an edge that cannot be, or a
            replacement that the run does not have.
    """

    question: ClassVar[str] = "edge_ablation"

    writer: str
    reader: str
    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    sequences: int | None = SEQUENCES
    metric: Metric | None = None
    batch: int = cost(8)

    def __post_init__(self) -> None:
        check_how(self.metric, self.sequences, self.batch)

    def __call__(self, subject: Run, progress: Progress = silent) -> Record:
        return next(self.together([self], subject, progress))[1]

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Run, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        alike: dict[EdgeAblation, list[EdgeAblation]] = {}
        for question in questions:
            assert isinstance(question, EdgeAblation)
            alike.setdefault(replace(question, writer="", reader=""), []).append(question)
        for how, group in alike.items():
            edges = [Edge.of(subject.stream, question.writer, question.reader) for question in group]
            manner = Manner(how.replacement, how.scalars, how.sequences, how.metric, how.batch)
            results = measured(subject, [EdgeSet((edge,)) for edge in edges], manner, progress)
            for question, edge, figures in zip(group, edges, results.figures, strict=True):
                yield question, question._record(subject, edge, figures, results)

    def _record(self, run: Run, edge: Edge, figures: Tensor, results: Measured) -> Record:
        """The answer, of the edge's figures (sequences, 5)."""
        estimate = mean_estimate(figures[:, 0])
        columns = [Column(name, figures[:, i].mean()[None], *FIGURES[name]) for i, name in enumerate(FIGURES)]
        unit = columns[0].unit
        columns[1:1] = (
            Column("low", estimate.low[None], unit, f"lower bound of its {INTERVAL}"),
            Column("high", estimate.high[None], unit, "upper bound"),
            Column("p", estimate.p[None], "1, in [0, 1]", "p-value of the effect against 0, by the same law"),
        )
        columns += (
            Column("writer", (str(edge.writer),), "", "what writes"),
            Column("reader", (str(edge.reader),), "", "what reads, with its port"),
            Column("group", (edge.kv_group,), "", "the shared key/value head, None where it shares none"),
            Column("shared_with", (" ".join(edge.shared_with),), "", "heads that read through it"),
        )
        return run.record(self, (Axis("edge", (str(edge),)),), columns, **_stamp(results))


@final
@dataclass(frozen=True)
class Ablation(Composite[Run]):
    """Remove edges one by one: what each does, a verdict, and how it compares with random edges of the same port.

    The figures are those of ``EdgeAblation``. The ``verdict`` goes by the interval and the least effect alone, see
    ``rule``: whatever else is asked, it is the same. Random edges are the yardstick: as many of every port and kind of
    writer that is asked about, drawn from the seed alone, with the same columns; an edge that is asked and among them
    comes once, as asked. ``rank`` is 1 for an effect larger in size than that of every random edge of its port and kind
    of writer. ``q`` is the false discovery rate at which an effect differs from 0, over the edges that are asked
    (Benjamini and Hochberg); it depends on what else is asked.

    Attributes:
        edges: names of writers and readers, any sequence of pairs, e.g. ``[("L16H0", "L18H6.K")]``; of several names
            of one edge the first counts.
        random: how many random edges per port and kind of writer; fewer where the model has fewer.
        replacement: see ``EdgeAblation``.
        scalars: likewise.
        sequences: likewise.
        seed: of the random edges.
        least: the least effect that matters, in nats or the metric's unit.
        metric: see ``EdgeAblation``.
        batch: likewise.

    Raises:
        UsageError: there are no edges, or a number or a metric that cannot be; when asked, an edge that cannot be.

    Example:
        >>> Ablation([("L16H0", "L18H6.K")])(run)["verdict"]  # doctest: +SKIP
    """

    question: ClassVar[str] = "ablation"

    edges: Sequence[tuple[str, str]]
    random: int = 20
    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    sequences: int | None = SEQUENCES
    seed: int = 0
    least: float = 0.01
    metric: Metric | None = None
    batch: int = cost(8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", _named(self.edges))
        check_how(self.metric, self.sequences, self.batch, self.least, self.random)

    def __call__(self, subject: Run, progress: Progress = silent, ask: Ask | None = None) -> Record:
        asked = {edge.key: edge for edge in _distinct(subject.stream, self.edges)}
        yardstick = {
            alike: {edge.key: edge for edge in random_edges(subject.stream, alike, self.random, self.seed)}
            for alike in dict.fromkeys(map(likeness, asked.values()))
        }
        edges = {**asked, **{k: e for random in yardstick.values() for k, e in random.items() if k not in asked}}
        how = self.replacement, self.scalars, self.sequences, self.metric, self.batch
        questions = [EdgeAblation(str(edge.writer), str(edge.reader), *how) for edge in edges.values()]
        records = (ask or asking(subject, progress=progress))(questions)
        columns = {column.name: _joined(records, column) for column in records[0].columns}
        effect, low, high, p = (torch.as_tensor(columns[n].values) for n in ("effect_nats", "low", "high", "p"))
        sizes = dict(zip(edges, effect.abs().tolist(), strict=True))
        ranks = [rank_of(key, sizes, yardstick[likeness(edge)]) for key, edge in edges.items()]
        q = torch.full((len(edges),), torch.nan, dtype=accumulate)
        q[: len(asked)] = benjamini_hochberg(p[: len(asked)])
        verdicts = tuple(verdict(*bounds, self.least) for bounds in zip(low.tolist(), high.tolist(), strict=True))
        kinds = tuple("asked" if key in asked else "random" for key in edges)
        after = [
            Column("q", q, "1, in [0, 1]", "false discovery rate among the edges that were asked, absent of others"),
            Column("rank", torch.tensor(ranks, dtype=accumulate), "place, from 1", "by size among the random edges"),
            Column("verdict", verdicts, "", rule(self.least)),
            Column("kind", kinds, "", "asked or random"),
        ]
        at = list(columns).index("p") + 1
        ordered = [*list(columns.values())[:at], *after, *list(columns.values())[at:]]
        stamp = {name: records[0].stamp[name] for name in _STAMPED} | {"rule": rule(self.least)}
        return subject.record(self, (Axis("edge", tuple(map(str, edges.values()))),), ordered, **stamp)


@final
@dataclass(frozen=True)
class EdgeSetAblation(Question[Run]):
    """Remove a set of edges at once, and all others into the same readers: what the set costs, and what it keeps.

    With ``e(S)`` the metric without the edges S less the metric with every edge, a mean over sequences, A the set and C
    all edges into its readers, the Record over ``quantity`` has the rows

    - ``removed``: ``e(A)``, what the set costs.
    - ``kept``: ``e(C - A)``, what is lost where the set alone leads into its readers.
    - ``all_removed``: ``e(C)``.
    - ``faithfulness``: ``1 - e(C - A) / e(C)``, which is (metric where the set is kept - metric where all is removed) /
      (metric with every edge - metric where all is removed): 1 where the set does all that C does, 0 where it does
      nothing. Undefined where the interval of ``e(C)`` holds 0.
    - ``sum_of_singles``: the sum of ``e({a})`` over the edges a of the set, each removed alone.
    - ``interaction``: ``e(A)`` less that sum. Above 0 the edges repair each other: what one of them would cost is made
      up by the rest while these are there. Below 0 they cost the same thing, as edges of one path do.

    ``value`` has an interval as in ``EdgeAblation``, of the ratio by the delta method, and a ``verdict`` by it, see
    ``rule``. Where an edge of the set leads to the writer of another, that writer writes what it then writes; means and
    partners stay those of the runs with every edge. Edges from biases stay, which are the same at every token.

    Attributes:
        edges: names of writers and readers.
        others: C holds all edges into the ``"readers"`` of the set, or into every reader of their ``"ports"``.
        replacement: see ``EdgeAblation``.
        scalars: likewise.
        sequences: likewise.
        least: see ``Ablation``.
        metric: see ``EdgeAblation``.
        batch: likewise.

    Raises:
        UsageError: there are no edges, or a number, a metric or ``others`` that cannot be; when asked, an edge that
            cannot be, one that is part of another, or a neuron as reader with ``"ports"``.

    Reference: Wang et al. 2022, "Interpretability in the Wild" (faithfulness); Conmy et al. 2023 (sets of edges).
    """

    question: ClassVar[str] = "set_ablation"

    edges: Sequence[tuple[str, str]]
    others: Literal["readers", "ports"] = "readers"
    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    sequences: int | None = SEQUENCES
    least: float = 0.01
    metric: Metric | None = None
    batch: int = cost(8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", _named(self.edges))
        check_how(self.metric, self.sequences, self.batch, self.least)
        if self.others not in ("readers", "ports"):
            raise UsageError(f"others={self.others!r}", expected="readers or ports", do="choose one of these")

    def __call__(self, subject: Run, progress: Progress = silent) -> Record:
        edges = tuple(_distinct(subject.stream, self.edges))
        _check_disjoint(edges)
        elsewhere = tuple(_elsewhere(subject.stream, edges)) if self.others == "ports" else ()
        whole = [EdgeSet(edges), EdgeSet(edges, "others", elsewhere), EdgeSet(edges, "all", elsewhere)]
        manner = Manner(self.replacement, self.scalars, self.sequences, self.metric, self.batch)
        results = measured(subject, [*whole, *(EdgeSet((edge,)) for edge in edges)], manner, progress)
        removed, kept, everything = results.figures[:3, :, 0]
        singles = results.figures[3:, :, 0].sum(0)
        effects = torch.stack([removed, kept, everything, singles, removed - singles])
        estimate, ratio = mean_estimate(effects), _faithfulness(kept, everything)
        value, low, high = (
            torch.cat([getattr(estimate, name)[:3], getattr(ratio, name)[None], getattr(estimate, name)[3:]])
            for name in ("mean", "low", "high")
        )
        verdicts = [verdict(*bounds, self.least) for bounds in zip(low.tolist(), high.tolist(), strict=True)]
        shares = results.figures[:3].mean(1).T
        nothing = shares.new_full((3,), torch.nan)
        top, loss = (torch.cat([shares[list(FIGURES).index(n)], nothing]) for n in ("top_changed", "loss_changed"))
        columns = (
            Column("value", value, f"{FIGURES['effect_nats'][0]}; of faithfulness 1", "see the quantity"),
            Column("low", low, "likewise", f"lower bound of its {INTERVAL}"),
            Column("high", high, "likewise", "upper bound"),
            Column("verdict", (*verdicts[:3], None, *verdicts[4:]), "", rule(self.least)),
            Column("top_changed", top, *FIGURES["top_changed"]),
            Column("loss_changed", loss, *FIGURES["loss_changed"]),
        )
        names = ("removed", "kept", "all_removed", "faithfulness", "sum_of_singles", "interaction")
        stamp = {**_stamp(results), "rule": rule(self.least)}
        return subject.record(self, (Axis("quantity", names),), columns, **stamp)


_STAMPED = ("clean_loss", "clean_metric", "sequences", "interval")


def _stamp(results: Measured) -> dict[str, Any]:
    """What the stamp of an ablation says beside the run's: loss and metric with every edge, and the interval's kind."""
    clean = float(results.losses.mean()), float(results.values.mean()), len(results.losses), INTERVAL
    return dict(zip(_STAMPED, clean, strict=True))


def _named(edges: Any) -> tuple[tuple[str, str], ...]:
    """Edges as pairs of names; refuse what is none."""
    pairs: list[Any] = [] if isinstance(edges, str) else list(edges)
    named = [isinstance(p, tuple | list) and [type(name) for name in p] == [str, str] for p in pairs]  # pyright: ignore[reportUnknownVariableType]
    if not pairs or not all(named):
        raise UsageError(
            f"edges={edges!r}" if edges else "no edge to remove",
            expected="pairs of a writer and a reader",
            do='pass for example [("L16H0", "L18H6.K")]',
        )
    return tuple((writer, reader) for writer, reader in pairs)


def _distinct(stream: Stream, pairs: Sequence[tuple[str, str]]) -> list[Edge]:
    """Edges by their names; of several names of one edge the first."""
    edges: dict[tuple[str, str, str], Edge] = {}
    for pair in pairs:
        edge = Edge.of(stream, *pair)
        edges.setdefault(edge.key, edge)
    return list(edges.values())


def _check_disjoint(edges: Sequence[Edge]) -> None:
    """Refuse a set that removes something twice, as of an MLP and one of its neurons into the same reader."""
    for a, b in combinations(edges, 2):
        writes = a.source == b.source and (a.writer == b.writer or a.writer.kind != b.writer.kind)
        reads = (a.target, a.port) == (b.target, b.port) and (a.input == b.input or a.reader.kind != b.reader.kind)
        if writes and reads:
            raise UsageError(
                f"{a} and {b} overlap: one contains the other",
                expected="edges of which none is part of another",
                do="name the MLP or its neurons, not both",
            )


def _elsewhere(stream: Stream, edges: Sequence[Edge]) -> Iterator[Edge]:
    """One edge into every other reader of the ports of some edges; of an MLP that is all its neurons."""
    for edge in edges:
        if edge.reader.kind in ("neuron", "feature"):
            raise UsageError(
                f"{edge} with others='ports', of which the rest of the MLP or dictionary is one",
                expected="readers that are whole",
                do="name the MLP as the reader, or pass others='readers'",
            )
    inputs = {edge.input for edge in edges}
    for port in dict.fromkeys(edge.port for edge in edges):
        for reader in group_readers(stream, port):
            edge = Edge.of(stream, "embed", reader)
            if edge.input not in inputs:
                yield edge


def _faithfulness(kept: Tensor, everything: Tensor) -> MeanEstimate:
    """``1 - mean(kept) / mean(everything)`` over sequences, with an interval by the delta method."""
    whole = mean_estimate(everything)
    ratio = 1 - kept.mean() / whole.mean
    if not bool((whole.low > 0) | (whole.high < 0)):
        return MeanEstimate(*(torch.full_like(ratio, torch.nan) for _ in range(4)))
    deviation = mean_estimate(((1 - ratio) * everything - kept) / whole.mean)
    return MeanEstimate(ratio, ratio + deviation.low, ratio + deviation.high, deviation.p)


def _joined(records: Sequence[Record], column: Column) -> Column:
    """One column of several records, one after the other."""
    values: list[Any] = [record[column.name] for record in records]
    joined = torch.cat(values) if isinstance(column.values, Tensor) else tuple(chain.from_iterable(values))
    return replace(column, values=joined)
