"""Sizes of a model whose layers are alike, as most tests want to name them."""

from __future__ import annotations

from dataclasses import dataclass

from virtual_weights.architecture import Rotary
from virtual_weights.stream import Stream


@dataclass(frozen=True)
class Sizes:
    n_heads: int
    n_kv_heads: int
    group: int
    d_head: int
    rotary: Rotary | None
    d_mlp: int
    activation: str
    norm: str
    norm_eps: float
    parallel: bool


def sizes(stream: Stream) -> Sizes:
    """What all layers of a stream have in common; an assertion where they differ."""
    spec = stream.spec
    (attention,), (mlp,), (norm,) = set_of(spec.attentions), set_of(spec.mlps), set_of(spec.norms)
    assert norm is not None
    parallel = spec.states == 1 + spec.n_layers
    return Sizes(
        attention.heads,
        attention.kv_heads,
        attention.sharing,
        attention.width,
        attention.rotary,
        mlp.width,
        mlp.activation,
        norm.kind,
        norm.eps,
        parallel,
    )


def set_of(items):  # type: ignore[no-untyped-def]  # rotary settings cannot be hashed
    return [item for i, item in enumerate(items) if item not in items[:i]]
