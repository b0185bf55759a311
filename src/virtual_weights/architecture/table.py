"""The vocabulary of the tables: rows that say which tensor plays which role in which layout.

Axes in layouts are single letters, the same everywhere:

====  =====================================  ====  ==============================
d     d_model, the width of the stream       n     d_mlp, neurons of one MLP
h     query heads                            t     tokens of the vocabulary
g     key/value heads                        p     learned positions
k     d_head, width inside a head            l     layer (in names, not layouts)
====  =====================================  ====  ==============================

A layout is an einops pattern from the stored axes to ours, e.g. ``"(h k) d -> h k d"``. A row that
serves several roles splits a fused tensor: its right side begins with an axis as long as ``roles``.
Canonical shapes are (heads, k, d) for readers q, k, v; (heads, d, k) for o; (n, d) for gate and up;
(d, n) for down; (t, d) for embed and unembed; (p, d) for pos; (d,) for gains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

ALWAYS = "always"
"""A row whose tensor every model of the family has."""
UNTIED = "untied"
"""A row whose tensor exists unless input and output embedding are one."""
_LAYER = re.compile(r"^L(\d+)")


def layer_of(group: str) -> int | None:
    """The layer that a group's id names: 3 of ``"L3.attn"``, None of ``"embed"``."""
    match = _LAYER.match(group)
    return int(match[1]) if match else None


OPTIONAL = "optional"
"""A row whose tensor may be there or not, without any word in the configuration."""


@dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint.

    Attributes:
        group: whose it is, ``{l}`` standing for the layer: ``"L{l}.attn"``, ``"L{l}.mlp"``, ``"L{l}.attn.bias"``,
            ``"embed"``, ``"unembed"`` (the last norm too) and so on.
        roles: the role it plays there; several for a fused tensor.
        name: its name without the dialect's prefix, ``{l}`` standing for the layer.
        layout: einops pattern from stored axes to canonical axes.
        when: ``ALWAYS``, ``UNTIED``, ``OPTIONAL`` or the name of a flag of the configuration.
    """

    group: str
    roles: tuple[str, ...]
    name: str
    layout: str
    when: str = ALWAYS

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in every layer."""
        return "{l}" in self.name

    def groups(self, n_layers: int) -> list[str]:
        """The groups that have such a tensor."""
        return [self.group.format(l=layer) for layer in range(n_layers)] if self.per_layer else [self.group]


@dataclass(frozen=True)
class Dialect:
    """How one file format names and lays out a family's tensors and configuration.

    Attributes:
        rows: every tensor the family may have.
        prefixes: prefixes that the names may carry, tried in order.
        read_config: from the configuration to a ``ModelSpec``.
        neutral: configuration keys that do not change the function, or are read elsewhere;
            a trailing ``*`` admits all keys that begin so.
        required_values: keys that must have one of the given values where present.
        ignored: regular expressions of tensors that carry no weights (masks, cached frequencies).
        aliases: other spellings of keys, by spelling; one that disagrees with its key is refused.
        defaults: what transformers takes for a key that is left out, where that is not what null means.
        namespace: how every key of the model begins; others are notes, such as who quantised it.
    """

    rows: tuple[Row, ...]
    read_config: Callable[[Mapping[str, Any]], ModelSpec]
    neutral: frozenset[str]
    prefixes: tuple[str, ...] = ("",)
    required_values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    namespace: str = ""

    def row(self, role: str, group: str) -> Row | None:
        """The row of a role in a group; None where the dialect has none."""
        template = _LAYER.sub("L{l}", group)
        return next((row for row in self.rows if row.group == template and role in row.roles), None)

    def spelled(self, row: Row, group: str) -> str:
        """The full name of a row's tensor in a group: the last of its spellings, with the first prefix."""
        spelling = row.name.split("|")[-1]
        name = spelling[1:] if spelling.startswith("/") else self.prefixes[0] + spelling
        return name.format(l=layer_of(group))


@dataclass(frozen=True)
class Family:
    """One family of architectures.

    Attributes:
        name: its name in results.
        model_types: the ``model_type`` (or ``general.architecture``) values that it serves.
        dialects: by name of the source's dialect.
    """

    name: str
    model_types: tuple[str, ...]
    dialects: Mapping[str, Dialect]


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding.

    Attributes:
        dim: how many of a head's dimensions turn (the first ones); the rest stay.
        base: theta of the frequencies ``base^(-2i/dim)``.
        scaling: ``{}`` or the parameters of a known scaling: ``{"rope_type": "linear", "factor": ..}``
            or ``{"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings"}``.
        apart: how far the two dimensions of a plane are apart; None is dim/2.

    The halves (i, i + dim/2) turn together, as in transformers; a format that stores the pairs
    interleaved is undone by its layout, which puts the two of each d_head/2 apart even where few pairs turn.
    """

    dim: int
    base: float
    scaling: Mapping[str, Any] = field(default_factory=dict)
    apart: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """The sizes and choices of one model, free of any format's vocabulary.

    Attributes:
        norm: ``"rms"`` or ``"layer"``.
        parallel: whether attention and MLP of a block read the same state of the stream.
        activation: name of the MLP's nonlinearity, as transformers spells it.
        gated: whether the MLP multiplies an activated gate with an up projection.
        flags: names of optional parts that the configuration turns on.
        attention_scale: factor on q.k before the softmax.
    """

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int | None
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: str
    gated: bool
    parallel: bool = False
    tied: bool = False
    n_positions: int | None = None
    rotary: RotarySpec | None = None
    flags: frozenset[str] = frozenset()

    @property
    def attention_scale(self) -> float:
        """``1/sqrt(d_head)``."""
        return self.d_head**-0.5

    @property
    def group(self) -> int:
        """How many query heads share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def axes(self) -> dict[str, int | None]:
        """Length of every axis letter; None where only the tensor itself tells."""
        return {
            "d": self.d_model,
            "h": self.n_heads,
            "g": self.n_kv_heads,
            "k": self.d_head,
            "n": self.d_mlp,
            "t": self.vocab,
            "p": self.n_positions,
            "three": 3,
            "two": 2,
            "r": self.d_head // 2,
            "f": self.rotary.dim // 2 if self.rotary else None,
        }


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
