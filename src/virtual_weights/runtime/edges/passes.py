"""Sequences run with every edge and again without some: what changes, batch by batch, from the first reader on."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.runtime.edges.attribution import Metric, metric_of
from virtual_weights.runtime.edges.dictionary_writes import feature_places
from virtual_weights.runtime.edges.edge import (
    EdgeSet,
    Removal,
    Replacement,
    Scalars,
    affected,
    removed,
)
from virtual_weights.runtime.edges.losses import token_losses
from virtual_weights.runtime.edges.written import Written
from virtual_weights.runtime.running.hooks import Place, block_of, watched
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Group, Stream, through_norm
from virtual_weights.stream.effective import as_seen
from virtual_weights.stream.norm import without_mean

CHANGED = 0.1
"""Nats by which a token's loss must change to count as changed."""

_OUTPUT_CHANGE = (
    "‖change‖ / ‖output‖ of what reads the edge, without the mean that LayerNorm removes; for logits, without the mean "
    "over the vocabulary, which the softmax ignores"
)
FIGURES = {
    "effect_nats": ("nats, or the metric's", "metric without the edges less metric with them"),
    "pattern_change": ("1, in [0, 1]", "total variation of attention, mean over queries and heads"),
    "output_change": ("1 (ratio)", _OUTPUT_CHANGE),
    "top_changed": ("1, in [0, 1]", "share of counted tokens whose likeliest next token is another"),
    "loss_changed": ("1, in [0, 1]", f"share of counted tokens whose loss changes by more than {CHANGED} nats"),
}
"""What is measured of every sequence: the unit and the meaning."""


def starting_group(stream: Stream, edges: Sequence[EdgeSet]) -> Group:
    """Where a run without some edges must start: the attention of the first block that reads one, or the unembedding.

    Nothing before it depends on these edges.
    """
    state = min(edge.state for edge in edges)
    starts = (*stream.groups.heads, stream.groups["unembed"])
    return [group for group in starts if group.reads is not None and group.reads <= state][-1]


@contextmanager
def restarted(model: nn.Module, stream: Stream, group: Group, state: Tensor) -> Generator[None]:
    """Let the blocks before a group's give what they gave in an earlier run, at no cost.

    The model goes on as it does after them, by its own modules: embeddings, masks and rotary angles are made as ever.
    Hooks inside the blocks left out do not fire.

    Args:
        model: what runs, see ``load``.
        stream: the same model.
        group: the attention of the first block that runs; the unembedding where none does.
        state: (B, T, d) the state ``group.reads``, as an earlier run on the same tokens showed it.
    """
    before = takewhile(lambda earlier: earlier != group, stream.groups.heads)
    blocks: list[Any] = [block_of(model, stream, earlier) for earlier in before]
    overrides = [block.__dict__.get("forward") for block in blocks]
    given = (state, None) if stream.model.hf.values["block"] == "pair" else state
    for block in blocks:
        block.forward = lambda *_, **__: given
    try:
        yield
    finally:
        for block, override in zip(blocks, overrides, strict=True):
            del block.forward
            if override is not None:
                block.forward = override


@final
@dataclass(frozen=True, eq=False)
class Manner:
    """How edges are removed and by what that is measured, see ``EdgeAblation``."""

    replacement: Replacement
    scalars: Scalars
    sequences: int | None
    metric: Metric | None
    batch: int


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """What changed without each of some sets of edges.

    Attributes:
        figures: (sets, sequences, 5) float64 in the order of ``FIGURES``; NaN where a set has no such figure.
        values: (sequences,) the metric with every edge.
        losses: (sequences,) the mean next-token loss with every edge.
    """

    figures: Tensor
    values: Tensor
    losses: Tensor


@torch.no_grad()
def measured(run: Run, sets: Sequence[EdgeSet], manner: Manner, progress: Progress = silent) -> Measured:
    """Run some sequences with every edge, and without each of some sets, see ``passes``."""
    run = replace(run, stream=as_seen(run.stream, "enc"))
    compared = [set(_places(run.stream, edges)) for edges in sets]
    figures, values, losses = list[Tensor](), list[Tensor](), list[Tensor]()
    for rows, clean, without in passes(run, sets, manner, compared, progress=progress):
        change = _Change(run, clean, metric_of(manner.metric, run, rows))
        by_set = {i: change.figures(sets[i], other) for i, other in without}
        figures.append(torch.stack([by_set[i] for i in range(len(sets))]))
        values.append(change.value)
        losses.append(change.losses.mean(1))
    return Measured(torch.cat(figures, 1).cpu(), *(torch.cat(x).double().cpu() for x in (values, losses)))


@final
@dataclass(frozen=True, eq=False)
class Pass:
    """What a pass over some sequences shows.

    Attributes:
        tokens: (B, T).
        signals: what was computed at the places that were asked for, (B, T, ...) each.
        logits: (B, T, V).
    """

    tokens: Tensor
    signals: dict[Place, Tensor]
    logits: Tensor


def passes(
    run: Run,
    sets: Sequence[EdgeSet],
    manner: Manner,
    compared: Sequence[Collection[Place]],
    clean: Collection[Place] = (),
    progress: Progress = silent,
) -> Iterator[tuple[slice, Pass, Iterator[tuple[int, Pass]]]]:
    """Run some sequences batch by batch, with every edge and without each of some sets.

    One pass with every edge serves all sets, and blocks before the first reader give what they gave in it. Progress is
    (sets done, sets in all), counted batch by batch.

    Args:
        run: the model and the text; of encoders that read a raw state as they see it, see ``as_seen``.
        sets: what is removed.
        manner: how.
        compared: of each set, what is shown with and without it.
        clean: what is shown with every edge alone.
        progress: see above.

    Yields:
        Of each batch which of the sequences it holds, the pass with every edge, and the passes without each set with
        the set's number, in any order, which must all be taken before the next batch.
    """
    order = sorted(range(len(sets)), key=lambda i: sets[i].state)  # those that run at once start together
    tokens = run.sequences(manner.sequences)
    partners = _partners(run, tokens, manner)
    removal = Removal(manner.replacement, manner.scalars)
    if manner.replacement == "mean":
        removal = replace(removal, means=_means(run, sets, tokens.split(manner.batch)))
    shown: set[Place] = {
        place for some, edges in zip(compared, sets, strict=True) for place in (*some, *edges.places(run.stream))
    }
    shown = shown.union(clean, (("state", starting_group(run.stream, [edges]).reads or 0) for edges in sets))
    starts = range(0, len(tokens), manner.batch)
    for i, start in enumerate(starts):
        rows = slice(start, start + manner.batch)
        whole = Pass(tokens[rows], *watched(run.module, run.stream, shown, tokens[rows]))
        if partners is not None:
            places = {place for edges in sets for place in edges.places(run.stream)}
            removal = replace(removal, partners=watched(run.module, run.stream, places, partners[rows])[0])
        at_once = max(1, manner.batch // len(whole.tokens))
        together = [order[first : first + at_once] for first in range(0, len(order), at_once)]
        others = (
            pair
            for some in together
            for pair in zip(some, _without(run, whole, [(sets[k], compared[k]) for k in some], removal), strict=True)
        )
        yield rows, whole, _counted(others, progress, i * len(sets), len(starts) * len(sets))


def _counted(
    others: Iterator[tuple[int, Pass]], progress: Progress, before: int, total: int
) -> Iterator[tuple[int, Pass]]:
    for done, other in enumerate(others, before + 1):
        yield other
        progress(done, total)


def _without(
    run: Run, clean: Pass, sets: Sequence[tuple[EdgeSet, Collection[Place]]], removal: Removal
) -> Iterator[Pass]:
    """Without each of some sets, with what is to be shown of each, run at once on copies of the sequences."""
    stream, module, copies, cuts = run.stream, run.module, len(sets), [edges for edges, _ in sets]
    group = starting_group(stream, cuts)
    state = clean.signals["state", group.reads or 0].repeat(copies, 1, 1)
    # of what writers write from, a block that does not run shows nothing
    early = {edge.source for edges in cuts for edge in edges.edges} & {g.id for g in stream.groups.attached}
    others = {place for name in early for place in feature_places(stream, name)}
    inner = {
        place: torch.cat([z] * copies) for place, z in clean.signals.items() if place[0] == "inner" or place in others
    }
    places = {place for _, some in sets for place in some}
    with restarted(module, stream, group, state), removed(module, stream, cuts, removal, inner):
        signals, logits = watched(module, stream, places, clean.tokens.repeat(copies, 1))
    for i in range(copies):
        block = slice(i * len(clean.tokens), (i + 1) * len(clean.tokens))
        yield Pass(clean.tokens, {place: signal[block] for place, signal in signals.items()}, logits[block])


@final
class _Change:
    """What changes against a pass with every edge."""

    def __init__(self, run: Run, clean: Pass, metric: Metric) -> None:
        self.run, self.clean, self.metric = run, clean, metric
        self.losses, self.top = token_losses(clean.logits, clean.tokens, run.first), clean.logits.argmax(-1)
        self.value = _checked(metric(clean.logits, clean.tokens), clean.tokens).double()

    def figures(self, edges: EdgeSet, other: Pass) -> Tensor:
        """Without a set: (sequences, 5) in the order of ``FIGURES``."""
        tokens, logits, clean = self.clean.tokens, other.logits, self.clean
        first, effect = self.run.first, self.metric(logits, tokens).double() - self.value
        pattern = output = torch.full_like(effect, torch.nan)
        top = (logits.argmax(-1) != self.top)[:, first - 1 : -1].double().mean(1)
        change = (token_losses(logits, tokens, first) - self.losses).abs()
        loss = (change > CHANGED).double().masked_fill(change.isnan(), torch.nan).mean(1)
        if (edge := edges.single) is not None:
            write = affected(self.run.stream, edge)
            if edge.port == "enc":  # of features the change of the output is not defined
                return torch.stack([x.double() for x in (effect, pattern, output, top, loss)], 1)
            before, after = (
                (without_mean(clean.logits, -1), without_mean(logits, -1))  # a softmax sees no more of them
                if write is None
                else (through_norm(self.run.stream, write(shown.signals)) for shown in (clean, other))
            )
            output = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
            if write is not None and edge.port in ("Q", "K"):  # total variation, mean over queries and heads
                before, after = (shown.signals["pattern", edge.target][:, write.components] for shown in (clean, other))
                pattern = (after - before).abs().sum(-1).mean((1, 2)) / 2
        return torch.stack([figure.double() for figure in (effect, pattern, output, top, loss)], 1)


def _places(stream: Stream, edges: EdgeSet) -> Iterator[Place]:
    """What is compared with and without an edge; of a set, the logits alone."""
    edge = edges.single
    if edge is None:
        return
    write = affected(stream, edge)
    if write is not None:
        yield write.place
    if edge.port in ("Q", "K"):
        yield "pattern", edge.target


def _partners(run: Run, tokens: Tensor, manner: Manner) -> Tensor | None:
    """The sequences from whose runs writers' outputs are taken, (sequences, tokens), None for none."""
    if manner.replacement == "mean":
        return None
    if manner.replacement == "partner":
        return run.sequences(manner.sequences, partners=True)
    if len(tokens) < 2:
        raise UsageError(
            "one sequence, whose writers should give what they give on another",
            expected="two sequences or more",
            do="run on more tokens, or replace by the mean",
        )
    return tokens.roll(-1, 0)


def _checked(values: Tensor, tokens: Tensor) -> Tensor:
    if values.shape == (len(tokens),):
        return values
    raise UsageError(
        f"the metric gives a tensor of shape {tuple(values.shape)} for {len(tokens)} sequences",
        expected="one number a sequence, (B,)",
        do="average over the tokens of each sequence, not over the sequences",
    )


def _means(run: Run, sets: Sequence[EdgeSet], batches: Sequence[Tensor]) -> dict[str | int, Tensor]:
    """The means over all tokens, (d,), of every writer and of the states whose writers are removed, in a pass."""
    stream, d = run.stream, run.stream.d_model
    writers = {str(edge.writer): Written.of(stream, edge.writer) for edges in sets for edge in edges.edges}
    states = {edge.state for edges in sets if edges.removes != "these" for edge in (*edges.edges, *edges.elsewhere)}
    places: set[Place] = {("state", state) for state in states}
    places = places.union(*(write.places for write in writers.values()))
    sums: dict[str | int, Tensor] = {
        name: torch.zeros(d, dtype=accumulate, device=run.device) for name in (*writers, *states)
    }
    for tokens in batches:
        signals, _ = watched(run.module, stream, places, tokens)
        for name, total in sums.items():
            value = signals["state", name] if isinstance(name, int) else writers[name](signals)
            total += value.to(accumulate).expand(*tokens.shape, -1).sum((0, 1))
    return {name: total / sum(tokens.numel() for tokens in batches) for name, total in sums.items()}
