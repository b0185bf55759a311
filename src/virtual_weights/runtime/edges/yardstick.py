"""Random edges, with which an edge is compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from random import Random
from typing import Any

from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.edge import Edge, group_readers
from virtual_weights.stream import Stream, parse
from virtual_weights.stream.group import Port
from virtual_weights.stream.names import Kind

Likeness = tuple[Kind, Port, bool]
"""The kind of the writer, the port, and whether a single feature reads."""


def random_edges(stream: Stream, alike: Likeness, count: int, seed: int) -> Iterator[Edge]:
    """Edges of one kind of writer into one port, drawn evenly among those that reach, none twice."""
    kind, port, feature = alike
    draw, keys = Random(seed), set[tuple[str, str, str]]()
    wholes = {"neuron": "mlp", "feature": "dictionary"}
    groups = (*stream.groups, *stream.groups.dictionaries)
    labels = [c.label for group in groups for c in group.components if c.kind == wholes.get(kind, kind)]
    readers = group_readers(stream, port)
    for _ in range(200 * count):  # by rejection: an MLP's neurons times all readers are too many to list
        if len(keys) == count:
            break
        label, reader = draw.choice(labels), draw.choice(readers)
        if kind in wholes:
            label = replace(label, kind=kind, index=draw.randrange(stream.groups.of(label).width))
        if feature:
            read = parse(reader)
            read = replace(read, kind="feature", index=draw.randrange(stream.groups.of(read).width))
            reader = str(read)
        try:
            edge = Edge.of(stream, str(label), reader)
        except UsageError:  # it cannot reach
            continue
        if edge.key not in keys:
            keys.add(edge.key)
            yield edge


def likeness(edge: Edge) -> Likeness:
    """What a random edge must have in common with the edge that it is compared with."""
    return edge.writer.kind, edge.port, edge.reader.kind == "feature"


def rank_of(key: tuple[str, str, str], sizes: Mapping[tuple[str, str, str], float], yardstick: Iterable[Any]) -> float:
    """The place of an edge by size among random ones, 1 the largest; NaN where there are none but itself."""
    others = [sizes[other] for other in yardstick if other != key]
    return 1 + sum(size > sizes[key] for size in others) if others else math.nan
