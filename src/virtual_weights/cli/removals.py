"""Edges drawn at random and removed one by one, as a record over readers and writers."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from virtual_weights.linalg import Progress, accumulate
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.ablation import Trial, prove
from virtual_weights.runtime.edges.edge import channel_readers
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HeadPort

_WRITERS = 12  # of each reader that is drawn


def drawn_edges(stream: Stream, port: HeadPort, count: int, seed: int) -> list[tuple[str, str]]:
    """About ``count`` edges between heads: readers drawn evenly among channels, for each up to 12 writers that reach.

    No predictor has a say in the choice, so that none is favoured by it.
    """
    draw, found = Random(seed), list[tuple[str, str]]()
    writes = {str(c.label): c.writes for c in stream.heads if c.writes is not None}
    reads = {f"{c.label}.{port}": c.reads for c in stream.heads}
    readers = [(name, reads[name]) for name in channel_readers(stream, port)]
    for reader, state in draw.sample(readers, len(readers)):
        reaching = [name for name, first in writes.items() if state is not None and first <= state]
        if len(found) >= count or len(reaching) < 3:  # of fewer there is no rank correlation
            continue
        room = max(3, min(_WRITERS, count - len(found)))
        found += [(name, reader) for name in draw.sample(reaching, min(room, len(reaching)))]
    return found


def removals(
    stream: Stream,
    edges: list[tuple[str, str]],
    tokens: Tensor,
    first: int,
    model: nn.Module,
    progress: Progress | None = None,
) -> Record:
    """What removing each edge does to the loss: ``effect_nats`` and its ``size``, NaN where nothing was removed."""
    found = prove(stream, edges, tokens, Trial(first=first, random=0), model, progress)
    rows: list[dict[str, Any]] = list(found.rows())
    readers = list(dict.fromkeys(str(row["reader"]) for row in rows))
    writers = list(dict.fromkeys(str(row["writer"]) for row in rows))
    effects = torch.full((len(readers), len(writers)), torch.nan, dtype=accumulate)
    for row in rows:
        effects[readers.index(str(row["reader"])), writers.index(str(row["writer"]))] = row["effect_nats"]
    channels = {str(row["reader"]): str(row["channel"] or "") for row in rows}
    shared = tuple(channels[name] for name in readers) if any(channels.values()) else ()
    columns = (
        Column("size", effects.abs(), "nats", "|effect_nats|"),
        Column("effect_nats", effects, "nats", "loss without the edge less loss with it"),
    )
    axes = (Axis("reader", tuple(readers), shared), Axis("writer", tuple(writers)))
    return Record("removals", axes, columns, found.parameters, found.stamp, found.provenance)
