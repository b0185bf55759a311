"""Directions in use: of neurons, of heads' strongest channels, of the features of attached dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import head_circuits
from virtual_weights.errors import UsageError
from virtual_weights.linalg import random_generator
from virtual_weights.stream import Group, Stream
from virtual_weights.stream.group import no_mlps

DirectionKind = Literal["out", "in", "gate", "ov", "enc", "dec"]

DIRECTIONS: tuple[DirectionKind, ...] = ("out", "in", "gate", "ov", "enc", "dec")


def check_kind(kind: str) -> None:
    """Refuse what is not a kind of directions."""
    if kind not in DIRECTIONS:
        raise UsageError(
            f"there are no directions of kind {kind!r}", expected=", ".join(DIRECTIONS), do="choose one of these"
        )


def directions(
    stream: Stream, kind: DirectionKind, sample: int | None = None, seed: int = 0
) -> tuple[tuple[str, ...], Tensor]:
    """Unit directions of one kind, with the names of what they belong to.

    Args:
        stream: the model.
        kind: ``"out"``: what neurons write; ``"in"``: what they read (the up row where gated), ``"gate"``: the gate's
            row, both with the norm folded; ``"ov"``: the strongest direction that each head writes, by its circuit;
            ``"enc"``, ``"dec"``: what features of attached dictionaries read, the norm folded, and all that they write.
        sample: at most this many, chosen by the seed; None for all.
        seed: of the choice.

    Returns:
        Names, in order of depth, and rows (N, d) float32 of length 1. Directions of length 0 are left out.

    Raises:
        UsageError: the model has no such directions.
    """
    check_kind(kind)
    if kind in ("enc", "dec"):
        return _sampled(stream, kind, _attached(stream, kind), sample, seed)
    groups = stream.groups.heads if kind == "ov" else stream.groups.mlps
    groups = tuple(group for group in groups if kind != "gate" or "gate" in group.ports)
    if not groups and not stream.groups.mlps and kind != "ov":
        raise no_mlps()
    if not groups:
        raise UsageError(
            f"this model has no directions of kind {kind!r}",
            expected="MLPs for out and in, gated MLPs for gate, heads for ov",
            do="choose another kind",
        )
    return _sampled(stream, kind, groups, sample, seed)


def _attached(stream: Stream, kind: DirectionKind) -> tuple[Group, ...]:
    """Dictionaries that read, or write."""
    if kind == "enc":
        return stream.groups.readers("enc")
    if stream.groups.dictionaries:
        return stream.groups.dictionaries
    raise UsageError(
        "nothing that is attached to this model writes",
        expected="a dictionary whose decoder adds to the stream",
        do="attach one: vw.open(model, attach=[path]), --attach PATH",
    )


def _sampled(
    stream: Stream, kind: DirectionKind, groups: Sequence[Group], sample: int | None, seed: int
) -> tuple[tuple[str, ...], Tensor]:
    names = [name for group in groups for name in (group.labels if kind == "ov" else group.neurons)]
    rows = torch.cat([_rows(stream, kind, group).float() for group in groups])
    size = torch.linalg.vector_norm(rows, dim=1)
    indices = (size > 0).nonzero()[:, 0]
    if sample is not None and sample < len(indices):
        subset = torch.randperm(len(indices), generator=random_generator(seed))[:sample]
        indices = indices[subset.sort().values]
    return tuple(names[i] for i in indices.tolist()), rows[indices] / size[indices, None]


def _rows(stream: Stream, kind: DirectionKind, group: Group) -> Tensor:
    if kind == "ov":
        _, s, vh = torch.linalg.svd(head_circuits(stream, "O", group), full_matrices=False)
        return vh[:, 0] * (s[:, :1] > 0)
    if kind in ("out", "dec"):
        return stream.write(group)[0].T
    if kind == "enc":
        return stream.read("enc", group).maps[0]
    return stream.read("gate" if kind == "gate" else group.ports[-1], group).maps[0]
