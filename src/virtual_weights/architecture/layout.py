"""Layouts: which stored shape an einops pattern expects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

_TOKEN = re.compile(r"\(([^)]*)\)|(\S+)")


def stored_shape(layout: str, axes: Mapping[str, int | None]) -> tuple[int | None, ...]:
    """The shape that a tensor must have at rest.

    Args:
        layout: an einops pattern; its left side names the stored axes, composed ones in brackets.
        axes: length of every axis letter, None where unknown.

    Returns:
        One length per stored axis; None where a letter in it is unknown.

    Example:
        >>> stored_shape("(h k) d -> h k d", {"h": 9, "k": 64, "d": 576})
        (576, 576)
    """
    left = layout.split("->")[0]
    shape: list[int | None] = []
    for composed, single in _TOKEN.findall(left):
        lengths = [axes[name] for name in (composed.split() if composed else [single])]
        known = [length for length in lengths if length is not None]
        shape.append(prod(known) if len(known) == len(lengths) else None)
    return tuple(shape)


def matches(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is as expected, unknown lengths matching anything."""
    return len(found) == len(expected) and all(e is None or e == f for f, e in zip(found, expected, strict=True))


def leading_axis(layout: str) -> str:
    """The name of the first canonical axis: ``"h"`` for ``"(h k) d -> h k d"``."""
    return layout.split("->")[1].split()[0]
