"""Causal proof of edges: what removing one does to the loss, against matched random edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from random import Random

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.edge import (
    Edge,
    Place,
    Written,
    affected,
    channel_readers,
    check_tokens,
    next_token_loss,
)
from virtual_weights.runtime.edges.removal import Removal, Replacement, Scalars, removed, restarted
from virtual_weights.runtime.running.hooks import Kind, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.stream import Stream
from virtual_weights.stream.group import attention_reads

RULE = (
    "causal: the 95% interval of the effect leaves 0 out, and the effect is larger in size than that of every matched "
    "random edge (same port, same kind of writer); anything else is not shown, which is not shown to be absent"
)

_INSIDE = ("inner", "neurons")  # what writers in blocks write from: a block that does not run shows none


@dataclass(frozen=True)
class Trial:
    """How edges are tested.

    Attributes:
        replacement: by what a writer's contribution is replaced: its ``"mean"`` over all tokens, or ``"resample"``.
        scalars: norm scalars ``"held"``, or allowed to ``"move"``.
        first: the first token whose prediction counts; half the length where the second half repeats the first.
        random: how many matched random edges per port and kind of writer; fewer where the model has fewer.
        seed: of the random edges and of the bootstrap.
        batch: sequences that run at once; where the text has fewer, several edges do, each on its own copy.
    """

    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    first: int = 1
    random: int = 20
    seed: int = 0
    batch: int = 8


@torch.no_grad()
def prove(
    stream: Stream,
    edges: Sequence[tuple[str, str]],
    tokens: Tensor,
    trial: Trial | None = None,
    model: nn.Module | None = None,
    progress: Progress | None = None,
) -> Record:
    """Remove each edge alone and say what that does.

    Blocks before the first layer that an edge touches give what they gave without a removal and are not run again.

    ``effect_nats`` is the loss without the edge less the loss with it, both the mean over counted tokens, averaged
    over sequences; its interval is the percentile bootstrap over sequences (95%, 2000 draws), absent where there is
    one sequence; with few sequences such an interval is too narrow rather than too wide. ``p`` is the share of edges
    among the matched random ones and this one whose effect is at least as large in size. Verdicts follow ``RULE``: an
    edge like the random ones is called causal with a chance of at most ``1/(n + 1)``, n being their number, each edge
    on its own. Random edges are the yardstick, have the same columns, and by the rule are never causal themselves.

    Args:
        stream: the model.
        edges: names of writers and readers, e.g. ``[("L16H0", "L18H6.K")]``; the first of a channel's names counts.
        tokens: (sequences, tokens) ids; nothing is padded.
        trial: how; ``Trial()`` where None.
        model: what runs; loaded in float32 where None.
        progress: called with (edges done, edges in all), counted batch by batch.

    Returns:
        A Record over "edge", the edges asked about, then the random ones.

    Raises:
        UsageError: no edge, an edge that cannot be, or tokens of another shape.
    """
    trial, tokens, run = trial or Trial(), check_tokens(tokens), load(stream, model)
    named = [Edge.of(stream, *each) for each in edges]
    asked = [edge for i, edge in enumerate(named) if edge.key not in {each.key for each in named[:i]}]
    if not asked or not 1 <= trial.first < tokens.shape[1]:
        raise UsageError(
            "no edge to prove" if not asked else f"no token {trial.first} to count from",
            expected=f"an edge, and a first token of 1 to {tokens.shape[1] - 1}",
            do="name them",
        )
    every = [*asked, *_random_edges(stream, asked, trial)]
    batches = tokens.to(next(run.parameters()).device).split(trial.batch)
    how = Removal(trial.replacement, trial.scalars)
    if trial.replacement == "mean":
        how = replace(how, means=_means(stream, run, every, batches))
    clean, parts = [], []
    for i, batch in enumerate(batches):
        losses, found = _measure(stream, run, every, batch, how, trial)
        rows: list[Tensor] = []
        for row in found:
            rows.append(row)
            if progress is not None:
                progress(i * len(every) + len(rows), len(batches) * len(every))
        clean.append(losses)
        parts.append(torch.stack(rows))
    measured = torch.cat(parts, 1).double().cpu()  # edges, sequences, figures
    return _record(stream, every, measured, torch.cat(clean).double().cpu(), trial, len(asked))


def _random_edges(stream: Stream, asked: Sequence[Edge], trial: Trial) -> list[Edge]:
    """Edges of the same ports and kinds of writers, drawn evenly among those that reach, none twice, none asked."""
    draw, taken = Random(trial.seed), {edge.key for edge in asked}
    found: list[Edge] = []
    for kind, port in dict.fromkeys((edge.writer.kind, edge.port) for edge in asked):
        neurons = range(stream.spec.d_mlp) if kind == "neuron" else ()
        whole = [c for c in stream.components if c.kind == ("mlp" if kind == "neuron" else kind)]
        readers, number = channel_readers(stream, port), 0
        for _ in range(200 * trial.random):  # by rejection: an MLP's neurons times all readers are too many to list
            if number == trial.random:
                break
            writer, reader = draw.choice(whole), draw.choice(readers)
            name = f"L{writer.label.layer}N{draw.choice(neurons)}" if neurons else str(writer.label)
            try:
                edge = Edge.of(stream, name, reader)
            except UsageError:  # it cannot reach
                continue
            if edge.key not in taken:
                taken.add(edge.key)
                found.append(edge)
                number += 1
    return found


def _means(stream: Stream, run: nn.Module, edges: Sequence[Edge], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every writer's mean over all tokens, (d,), from a pass of its own."""
    writers = {str(edge.writer): Written.of(stream, edge.writer) for edge in edges}
    sums: dict[str, Tensor] = {}
    for batch in batches:
        seen, _ = _watched(stream, run, {each.place for each in writers.values()}, batch)
        for name, each in writers.items():
            own = each(seen[each.place]).double().expand(*batch.shape, -1).sum((0, 1))
            sums[name] = sums[name] + own if name in sums else own
    return {name: total / sum(batch.numel() for batch in batches) for name, total in sums.items()}


def _watched(stream: Stream, run: nn.Module, wanted: set[Place], tokens: Tensor) -> tuple[dict[Place, Tensor], Tensor]:
    seen: dict[Place, Tensor] = {}

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        if (kind, layer) in wanted:
            seen[kind, layer] = tensor

    with watching(run, stream, {kind for kind, _ in wanted}, see):
        logits: Tensor = run(tokens, use_cache=False).logits
    return seen, logits


def _measure(
    stream: Stream, run: nn.Module, edges: Sequence[Edge], tokens: Tensor, removal: Removal, trial: Trial
) -> tuple[Tensor, Iterator[Tensor]]:
    """The loss of each sequence, and edge by edge (sequences, 4): effect, change of pattern and output, new tops."""
    first = trial.first
    places = {edge: _places(stream, edge) for edge in edges}
    kept = {Written.of(stream, edge.writer).place for edge in edges} | {_start(stream, [edge])[1] for edge in edges}
    clean, logits = _watched(stream, run, kept.union(*places.values()), tokens)
    losses, top = next_token_loss(logits, tokens, first), logits.argmax(-1)

    def one(edge: Edge, seen: dict[Place, Tensor], without: Tensor) -> Tensor:
        write = affected(stream, edge)
        before, after = (logits, without) if write is None else (write(each[write.place]) for each in (clean, seen))
        output = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        tops = (without.argmax(-1) != top)[:, first - 1 : -1].double().mean(1)
        effect = next_token_loss(without, tokens, first) - losses
        pattern = _variation(stream, edge, clean, seen)
        pattern = torch.full_like(effect, torch.nan) if pattern is None else pattern
        return torch.stack([each.double() for each in (effect, pattern, output, tops)], 1)

    def stacked(group: Sequence[Edge]) -> Iterator[Tensor]:
        layer, given = _start(stream, group)
        known = {place: torch.cat([each] * len(group)) for place, each in clean.items() if place[0] in _INSIDE}
        start = clean[given].repeat(len(group), 1, 1)
        with restarted(run, stream, layer, start), removed(run, stream, group, removal, known):
            wanted = {place for edge in group for place in places[edge]}
            seen, without = _watched(stream, run, wanted, tokens.repeat(len(group), 1))
        for i, edge in enumerate(group):
            block = slice(i * len(tokens), (i + 1) * len(tokens))
            yield one(edge, {place: each[block] for place, each in seen.items()}, without[block])

    at_once = max(1, trial.batch // len(tokens))
    return losses, chain.from_iterable(stacked(edges[i : i + at_once]) for i in range(0, len(edges), at_once))


def _start(stream: Stream, edges: Sequence[Edge]) -> tuple[int, Place]:
    """The first block that a removal touches, the number of blocks where none, and the state that it is given."""
    layer = min(stream.spec.n_layers if edge.reader.layer is None else edge.reader.layer for edge in edges)
    return layer, ("state", attention_reads(stream.model, layer))


def _places(stream: Stream, edge: Edge) -> tuple[Place, ...]:
    write = affected(stream, edge)
    own: tuple[Place, ...] = () if write is None else (write.place,)
    return (*own, ("pattern", edge.reader.layer)) if edge.port in ("Q", "K") and edge.reader.layer is not None else own


def _variation(stream: Stream, edge: Edge, clean: dict[Place, Tensor], seen: dict[Place, Tensor]) -> Tensor | None:
    """Total variation between attention with and without the edge, mean over queries and heads that read it, (B,)."""
    layer, write = edge.reader.layer, affected(stream, edge)
    if edge.port not in ("Q", "K") or layer is None or write is None:
        return None
    k = stream.spec.d_head
    heads = slice(write.columns.start // k, write.columns.stop // k)
    before, after = (each["pattern", layer][:, heads] for each in (clean, seen))
    return (after - before).abs().sum(-1).mean((1, 2)) / 2


def _interval(effects: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Bounds of the mean over sequences, effects (edges, sequences); NaN where there is one sequence."""
    edges, n = effects.shape
    if n < 2:
        return effects.new_full((edges,), torch.nan), effects.new_full((edges,), torch.nan)
    drawn = torch.randint(0, n, (2000, n), generator=torch.Generator().manual_seed(seed))
    means = effects[:, drawn].mean(-1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=1)
    return low, high


def _record(stream: Stream, edges: Sequence[Edge], measured: Tensor, clean: Tensor, trial: Trial, asked: int) -> Record:
    effect, pattern, output, tops = measured.mean(1).unbind(-1)
    low, high = _interval(measured[..., 0], trial.seed)
    p = torch.ones(len(edges), dtype=torch.float64)
    verdicts: list[str] = []
    for i, edge in enumerate(edges):
        like = [j for j in range(asked, len(edges)) if _match(edges[j]) == _match(edge) and j != i]
        larger = int((effect[like].abs() >= effect[i].abs()).sum())
        p[i] = (1 + larger) / (1 + len(like))
        yardstick = larger == 0 and i < asked and len(like) > 0
        verdicts.append("causal" if yardstick and bool((low[i] > 0) | (high[i] < 0)) else "not shown")
    names = tuple(str(edge) for edge in edges)
    columns = (
        Column("effect_nats", effect, "nats", "loss without the edge less loss with it"),
        Column("low", low, "nats", "lower bound of its 95% interval, bootstrap over sequences"),
        Column("high", high, "nats", "upper bound"),
        Column("p", p, "1, in (0, 1]", "rank of the effect's size among the matched random edges"),
        Column("verdict", tuple(verdicts), "", RULE),
        Column("pattern_change", pattern, "1, in [0, 1]", "total variation of attention, mean over queries and heads"),
        Column("output_change", output, "1 (ratio)", "||change|| / ||output|| of what reads the edge"),
        Column("top_changed", tops, "1, in [0, 1]", "share of counted tokens whose likeliest next token is another"),
        Column("kind", tuple("asked" if i < asked else "random" for i in range(len(edges)))),
        Column("writer", tuple(str(edge.writer) for edge in edges)),
        Column("reader", tuple(str(edge.reader) for edge in edges)),
        Column("channel", tuple(edge.channel for edge in edges), "", "the shared key/value head, None where own"),
        Column("shared_with", tuple(" ".join(edge.shared_with) for edge in edges), "", "heads that read through it"),
    )
    stamp = {"norm": stream.norm_stamp, "rule": RULE, "clean_loss": float(clean.mean()), "sequences": len(clean)}
    parameters = {**asdict(trial), "asked": asked}
    return Record("prove", (Axis("edge", names),), columns, parameters, stamp, stream.provenance)


def _match(edge: Edge) -> tuple[str, str]:
    return edge.writer.kind, edge.port
