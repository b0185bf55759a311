"""Tensors between the layout in which they are stored and the axes in which they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import einops
import torch
from torch import Tensor

from virtual_weights.architecture import Placement, Row, Slot, letters


def unpacked(tensor: Tensor, place: Placement, axes: Mapping[str, int | None]) -> Tensor:
    """A role's tensor in canonical axes, of the stored tensor that it is a part of."""
    return _taken(einops.rearrange(tensor, place.layout, **_sizes(place.layout, axes)), place.slot)


def in_order(place: Placement) -> bool:
    """Whether a role's tensor is stored alone and in canonical axes."""
    stored, canonical = (side.strip() for side in place.layout.split("->"))
    return place.slot is None and stored == canonical


def packed(roles: Sequence[Tensor], row: Row, axes: Mapping[str, int | None]) -> Tensor:
    """The stored tensor of a row, of its roles in canonical axes."""
    stored, canonical = (side.strip() for side in row.layout.split("->"))
    if row.slots:
        pieces = sorted(zip(row.slots, roles, strict=True), key=lambda piece: piece[0].start)
        whole = torch.cat([_given(tensor, part) for part, tensor in pieces])
    else:
        (whole,) = roles
    return einops.rearrange(whole, f"{canonical} -> {stored}", **_sizes(row.layout, axes)).contiguous()


def columns(row: Row, role: str, axes: Mapping[str, int | None]) -> Tensor:
    """Which features of what a row's module gives are a role's: (heads, k) or (n,), whole numbers."""
    # the weight's layout without the stream's axis is that of the output: "d (three h k)" gives "(three h k)"
    # in one axis, whatever axes the weight is stored in
    stored, canonical = (" ".join(x for x in side.split() if x != "d") for side in row.layout.split("->"))
    stored = f"({stored.translate({ord('('): None, ord(')'): None})})"
    sizes = _sizes(f"{stored} {canonical}", axes)
    width = prod(sizes[name] for name in letters(stored))
    features = einops.rearrange(torch.arange(width), f"{stored} -> {canonical}", **sizes)
    return _taken(features, row.slot(role))


def _taken(tensor: Tensor, part: Slot | None) -> Tensor:
    if part is None:
        return tensor
    if part.form == "one":
        return tensor[part.start]
    piece = tensor[part.start : part.stop]
    return piece if part.form == "range" else piece.transpose(0, 1).flatten(0, 1)


def _given(tensor: Tensor, part: Slot) -> Tensor:
    if part.form == "one":
        return tensor[None]
    if part.form == "range":
        return tensor
    return tensor.unflatten(0, (-1, part.stop - part.start)).transpose(0, 1)


def _sizes(layout: str, axes: Mapping[str, int | None]) -> dict[str, int]:
    named = letters(layout)
    return {name: size for name, size in axes.items() if size and name in named}
