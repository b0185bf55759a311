"""How far a score from weights, or moments of another text, can be trusted on a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.pairs.alignment import agreement
from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.analysis.pairs.contribution import Contribution
from virtual_weights.analysis.pairs.overlap import Overlap
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.ablation import EdgeAblation
from virtual_weights.runtime.edges.attribution import Attribution
from virtual_weights.runtime.edges.edge import group_readers
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Composite, Stream, cost
from virtual_weights.stream.group import HEAD_PORTS, HeadPort, Writers
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.question import Ask, asking

_WRITERS = 12  # of each reader that is drawn
_NAMES = {
    "predictor": "what predicts",
    "port": "through which the readers read",
    "target": "what is predicted: contribution, or effect of removal",
}
_FIGURES = {
    "per_reader_rank_correlation": ("1, in [-1, 1]", "mean over readers of Spearman's, over the writers that reach"),
    "rank_correlation": ("1, in [-1, 1]", "Spearman's over all edges"),
    "precision_at_20": ("1, in [0, 1]", "share of the predictor's top edges among the target's"),
    "precision_at_random": ("1, in [0, 1]", "the same of a random order"),
    "readers": ("readers", "with at least three writers and no constant measure"),
    "edges": ("edges", "that have both measures"),
}


@final
@dataclass(frozen=True)
class Validation(Composite[Run]):
    """Agreement of every predictor of edges into heads with what a run shows: contributions, and effects of ablation.

    Predictors: the contribution by moments of another text (``data-aware``), composition ``score``, ``strength`` and
    ``lift``, ``overlap``, and as the baseline ``activity``, the size of what the writer alone wrote on that other text,
    whoever reads it; against ablations also the ``contribution`` and the ``attribution`` on the run itself. Edges to
    ablate are drawn without regard to any predictor, so that none is favoured.

    Attributes:
        moments: of another text, which predict.
        writers: as in ``Composition``.
        centred: as in ``Contribution``.
        edges: how many edges of each port are ablated; 0 for none.
        seed: of the draw.
        sequences: chunks on which edges are ablated.
        length: tokens to which these chunks are shortened, since every edge is a run of its own.
        memory_mb: as in ``Observation``, of the run itself.
    """

    question: ClassVar[str] = "validation"
    moments: Moments
    writers: Writers = "heads"
    centred: bool = False
    edges: int = 48
    seed: int = 0
    sequences: int = 8
    length: int = 64
    memory_mb: int = 1024
    device: str = cost("cpu")

    def __call__(self, run: Run, progress: Progress = silent, ask: Ask | None = None) -> Record:
        """Compare.

        Args:
            run: the text that is predicted.
            progress: called with (ports done, ports in all), twice where edges are ablated.
            ask: answers Composition and Overlap.

        Returns:
            A Record over ``comparison``: ``predictor``, ``port``, ``target`` (``contribution`` or ``effect``) and the
            figures of their agreement.

        Raises:
            UsageError: no head reads what another wrote.
        """
        ask, target = ask or asking(run, run.stream), Observation(self.memory_mb).moments(run)
        total = len(HEAD_PORTS) * (2 if self.edges else 1)
        rows: list[dict[str, Any]] = []
        for done, port in enumerate(HEAD_PORTS, 1):
            contribution = self._contribution(run.stream, port, target)
            if not bool(contribution.present().any()):
                raise UsageError(
                    "no head reads what another wrote",
                    expected="two layers of attention",
                    do="use a model with at least two layers of attention",
                )
            predictors = self._predictors(run.stream, port, ask)
            rows += _compared(port, predictors, contribution, "contribution")
            progress(done, total)
        for done, (port, effects, attribution) in enumerate(self._effects(run), len(HEAD_PORTS) + 1):
            predictors = self._predictors(run.stream, port, ask)
            predictors["contribution"] = self._contribution(run.stream, port, target), "contribution"
            predictors["attribution"] = attribution, "size"
            rows += _compared(port, predictors, effects, "effect")
            progress(done, total)
        return self._record(run, rows, target)

    def _record(self, run: Run, rows: list[dict[str, Any]], target: Moments) -> Record:
        names = [Column(name, tuple(row[name] for row in rows), "", meaning) for name, meaning in _NAMES.items()]
        figures = [
            Column(name, torch.tensor([_number(row[name]) for row in rows], dtype=accumulate), *_FIGURES[name])
            for name in _FIGURES
        ]
        axis = Axis("comparison", tuple(map(str, range(1, len(rows) + 1))))
        return run.record(
            self,
            (axis,),
            (*names, *figures),
            predicted_from=self.moments.text,
            predicted_from_tokens=self.moments.tokens,
            moment="centred" if self.centred else "uncentred",
            held=target.held,
        )

    def _predictors(self, stream: Stream, port: HeadPort, ask: Ask) -> dict[str, tuple[Record, str]]:
        """Records that predict, each with its column."""
        questions = [Composition(port, writers=self.writers, device=self.device), Overlap(port, device=self.device)]
        composition, overlap = ask(questions)
        contribution = self._contribution(stream, port, self.moments)
        return {
            "data-aware": (contribution, "contribution"),
            "activity": (contribution, "activity"),
            "composition": (composition, "score"),
            "strength": (composition, "strength"),
            "lift": (composition, "lift"),
            "overlap": (overlap, "overlap"),
        }

    def _contribution(self, stream: Stream, port: HeadPort, moments: Moments) -> Record:
        return Contribution(port, moments, self.centred, self.writers, device=self.device)(stream)

    def _effects(self, run: Run) -> Iterator[tuple[HeadPort, Record, Record]]:
        """By port the effects of ablating edges drawn at random, and attributions, on shortened chunks."""
        if not self.edges:
            return
        ask = asking(run.shortened(self.length))
        attributions = ask([Attribution(port, sequences=self.sequences) for port in HEAD_PORTS])
        for port, attribution in zip(HEAD_PORTS, attributions, strict=True):
            edges = drawn_edges(run.stream, port, self.edges, self.seed)
            yield (
                port,
                _effect_matrix(port, ask([EdgeAblation(*edge, sequences=self.sequences) for edge in edges])),
                attribution,
            )


def drawn_edges(stream: Stream, port: HeadPort, count: int, seed: int) -> list[tuple[str, str]]:
    """Sample about ``count`` head-to-head edges: readers uniformly over key/value groups, up to 12 writers each.

    No predictor has a say in the choice, so that none is favoured by it.
    """
    draw, edges = Random(seed), list[tuple[str, str]]()
    readers = group_readers(stream, port)
    for reader in draw.sample(readers, len(readers)):
        state = stream.groups.of(reader).reads
        reaching = [label for group in stream.groups.heads if group.reaches(state) for label in group.labels]
        if len(edges) >= count or len(reaching) < 3:  # of fewer there is no rank correlation
            continue
        room = max(3, min(_WRITERS, count - len(edges)))
        edges += [(writer, reader) for writer in draw.sample(reaching, min(room, len(reaching)))]
    return edges


def _effect_matrix(port: HeadPort, ablations: list[Record]) -> Record:
    """Ablations of single edges as one record over readers and writers, absent where no edge was ablated."""
    rows: list[dict[str, Any]] = [next(iter(ablation.rows())) for ablation in ablations]
    readers = {str(row["reader"]): str(row["group"] or "") for row in rows}
    writers = list(dict.fromkeys(str(row["writer"]) for row in rows))
    sizes: Tensor = torch.full((len(readers), len(writers)), torch.nan, dtype=accumulate)
    for row in rows:
        sizes[list(readers).index(str(row["reader"])), writers.index(str(row["writer"]))] = abs(row["effect_nats"])
    groups = tuple(readers.values()) if any(readers.values()) else ()
    axes = Axis("reader", tuple(readers), groups), Axis("writer", tuple(writers))
    return Record("effect", axes, (Column("effect", sizes, "nats", "|effect_nats|"),), {"port": port})


def _compared(
    port: HeadPort, predictors: Mapping[str, tuple[Record, str]], target: Record, name: str
) -> Iterator[dict[str, Any]]:
    for predictor, (record, column) in predictors.items():
        figures = agreement(record, target, column, name)
        yield {
            "predictor": predictor,
            "port": port,
            "target": name,
            "per_reader_rank_correlation": figures.per_reader,
            "rank_correlation": figures.overall,
            "precision_at_20": figures.precision,
            "precision_at_random": figures.top / figures.edges,
            "readers": figures.readers,
            "edges": figures.edges,
        }


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
