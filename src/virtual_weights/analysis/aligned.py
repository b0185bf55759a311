"""One record's column over the readers and writers of another, matched by label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from virtual_weights.record import Record


def beside(record: Record, other: Record, columns: Iterable[str]) -> Record:
    """A record over (reader, writer) with columns of another after its own, and the other's stamp under its question.

    Args:
        record: keeps its axes; a pair that the other lacks is absent in the new columns.
        other: of the same model and port.
        columns: of the other.
    """
    found = tuple(replace(other.column(name), values=aligned(other, record, name)) for name in columns)
    stamp = {**record.stamp, other.question: {**other.parameters, **other.stamp}}
    return replace(record, columns=(*record.columns, *found), stamp=stamp)


def aligned(record: Record, like: Record, column: str) -> Tensor:
    """A column over the readers and writers of ``like``, float64, NaN where the record has none.

    Edges are matched by label, with or without the port; a reader that the record does not name is taken as the one
    that shares its channel.
    """
    readers, writers = record.axis("reader"), record.axis("writer")
    port = f".{record.parameters.get('port')}"  # subspaces are named with their port, L5H3.K
    named = {label.removesuffix(port): i for i, label in enumerate(readers.labels)}
    shared = {channel: i for i, channel in reversed(list(enumerate(readers.channels))) if channel}
    wanted = like.axis("reader")
    channels = wanted.channels or ("",) * len(wanted.labels)
    stems = [label.removesuffix(port) for label in wanted.labels]
    rows = [named.get(stem, shared.get(c, -1)) for stem, c in zip(stems, channels, strict=True)]
    places = {label: i for i, label in enumerate(writers.labels)}
    columns = [places.get(label, -1) for label in like.axis("writer").labels]
    # the last row and column stand for what is not there
    padded = torch.nn.functional.pad(record.numbers(column), (0, 1, 0, 1), value=float("nan"))
    return padded[rows][:, columns]
