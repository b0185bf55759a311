"""Blocks frozen at an operating point: each is linear, ``x -> x + T x + c``, and exact for its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.stream import Stream
from virtual_weights.stream.operating_point import OperatingPoint


@final
@dataclass(frozen=True)
class Convention:
    """The point that stands in where nothing ran: one token, attention 1 to itself, one scalar, one gate for all.

    Attributes:
        scalar: the norm scalar s at every site, > 0.
        gate: what every neuron's pre-activation is multiplied with: the activated gate, or the slope where ungated.
    """

    scalar: float = 1.0
    gate: float = 1.0

    def __post_init__(self) -> None:
        if not self.scalar > 0.0:
            raise UsageError(f"norm scalar {self.scalar}", expected="a number > 0", do="pass for example scalar=1.0")


Point = OperatingPoint | Convention


@final
@dataclass(frozen=True, eq=False)
class Part:
    """The attention or the MLP of one layer, frozen.

    ``T x`` at token t is ``sum_h O_h sum_u p_h[t,u] g[t] (R~_h x_u / s_u)``; all in float64.

    Attributes:
        label: ``"L3.attn"`` or ``"L3.mlp"``.
        names: one per read/write pair: the heads, or the MLP itself.
        width: rows of distinct read maps; heads that share values share them.
        read: (m, k, d) effective read maps, V of attention, up (in) of an MLP.
        write: (m, d, k).
        inverse: (T,) 1/s.
        read_constant: (m, k) or None; write_constant: (d,) or None.
        pattern: (m, T, T), None where every token is its own.
        gate: (T, k) or (1, 1), None in attention.
    """

    label: str
    names: tuple[str, ...]
    width: int
    read: Tensor
    write: Tensor
    inverse: Tensor
    read_constant: Tensor | None
    write_constant: Tensor | None
    pattern: Tensor | None
    gate: Tensor | None

    def inner(self, x: Tensor) -> Tensor:
        """The inner activations that x causes without constants: x (..., T, d) to (..., T, m, k)."""
        own = (x * self.inverse[:, None]) @ self.read.flatten(0, 1).T
        return self._mixed(own.unflatten(-1, self.read.shape[:2]))

    def linear(self, x: Tensor) -> Tensor:
        """``T x`` for x (..., T, d), nothing dense."""
        return self.inner(x).flatten(-2) @ self.write.mT.flatten(0, 1)

    @property
    def constant(self) -> Tensor:
        """``c``, shape (T, d)."""
        c = self.write.new_zeros(len(self.inverse), self.write.shape[1])
        if self.read_constant is not None:
            z = self._mixed(self.read_constant.expand(len(c), -1, -1))
            c = c + z.flatten(-2) @ self.write.mT.flatten(0, 1)
        return c if self.write_constant is None else c + self.write_constant

    def between(self, target: int, source: int) -> Tensor:
        """The dense (d, d) map from one token's state to another's update."""
        tokens, weight = range(len(self.inverse)), self.write
        target, source = tokens[target], tokens[source]  # counts from the end too, and refuses what is not there
        if self.pattern is not None:
            weight = weight * self.pattern[:, target, source, None, None]
        elif target != source:
            return weight.new_zeros(weight.shape[1], weight.shape[1])
        if self.gate is not None:
            weight = weight * self.gate[target]
        return (weight.transpose(0, 1).flatten(1) @ self.read.flatten(0, 1)) * self.inverse[source]

    def _mixed(self, z: Tensor) -> Tensor:
        if self.pattern is not None:
            z = torch.einsum("mtu,...umk->...tmk", self.pattern, z)
        return z if self.gate is None else z * self.gate[:, None, :]


@final
@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """A sub-block (attention or MLP; both together where they are parallel) as ``x -> x + T x + c`` over T tokens.

    Attributes:
        label: ``"L3.attn"``, ``"L3.mlp"``, or ``"L3"`` of a parallel block.
        parts: what reads the state before it.
    """

    label: str
    parts: tuple[Part, ...]

    def apply(self, x: Tensor) -> Tensor:
        """``x + T x + c`` for x (..., T, d)."""
        return x + self.linear(x) + self.constant

    def linear(self, x: Tensor) -> Tensor:
        """``T x`` for x (..., T, d)."""
        return torch.stack([part.linear(x) for part in self.parts]).sum(0)

    @property
    def constant(self) -> Tensor:
        """``c``, shape (T, d)."""
        return torch.stack([part.constant for part in self.parts]).sum(0)

    @property
    def width(self) -> int:
        """How many inner dimensions T passes through at each token: a bound on the rank of ``at``."""
        return sum(part.width for part in self.parts)

    def at(self, token: int) -> Tensor:
        """The dense (d, d) map T of a token to itself."""
        return self.between(token, token)

    def between(self, target: int, source: int) -> Tensor:
        """The dense (d, d) map T of one token's state to another's update."""
        return torch.stack([part.between(target, source) for part in self.parts]).sum(0)

    def dense(self) -> Tensor:
        """T over all tokens, (T d, T d), tokens outermost: for small prompts of small models."""
        tokens = range(len(self.parts[0].inverse))
        rows = [torch.cat([self.between(t, u) for u in tokens], 1) for t in tokens]
        return torch.cat(rows, 0)


def frozen_blocks(stream: Stream, point: Point, start: int = 0, stop: int | None = None) -> Iterator[FrozenBlock]:
    """The blocks in order of depth, each read from the checkpoint when its turn comes.

    Args:
        stream: the model.
        point: what is held fixed.
        start: state of the stream that the first one reads.
        stop: state that the last one writes; None is the last state.

    Raises:
        UsageError: the point belongs to another model.
        RecordError: it is incomplete.
        MissingTensorError: a partial checkpoint lacks a block.
    """
    if isinstance(point, OperatingPoint):
        point.check(stream)
    for position in range(start, stream.states - 1 if stop is None else stop):
        if stream.spec.parallel:
            both = _part(stream, "attn", position, point), _part(stream, "mlp", position, point)
            yield FrozenBlock(f"L{position}", both)
        else:
            layer, second = divmod(position, 2)
            part = _part(stream, "mlp" if second else "attn", layer, point)
            yield FrozenBlock(part.label, (part,))


def replay(stream: Stream, point: OperatingPoint) -> Tensor:
    """The final residual, before the final norm, from the embeddings through all frozen blocks; (T, d) float64.

    It equals the model's own up to rounding: that is what makes a frozen block exact for its prompt.

    Raises:
        UsageError, RecordError, MissingTensorError: as ``frozen_blocks``; MissingTensorError without embeddings.
    """
    x = embedded(stream, point)
    for block in frozen_blocks(stream, point):
        x = block.apply(x)
    return x


def embedded(stream: Stream, point: OperatingPoint) -> Tensor:
    """The first state of a prompt, token and learned position embeddings, (T, d) float64."""
    x = stream.write("embed")[0].T[point.tokens].to(accumulate)
    return x + stream.write("pos")[0].T[: len(x)].to(accumulate) if stream.model.has("pos") else x


def inverse_scalar(point: Point, site: str) -> Tensor:
    """1/s of a norm site, (T,) float64."""
    s = torch.tensor([point.scalar], dtype=accumulate) if isinstance(point, Convention) else point.scalars[site]
    return 1 / s.to(accumulate)


def describe(point: Point) -> dict[str, object]:
    """How stamps tell at which point something was taken as linear."""
    if isinstance(point, Convention):
        return {"point": "convention", "norm_scalar": point.scalar, "gate": point.gate, "attention": "to itself = 1"}
    return {"point": point.identity, "tokens": len(point.tokens)}


def _part(stream: Stream, kind: Literal["attn", "mlp"], layer: int, point: Point) -> Part:
    run = point if isinstance(point, OperatingPoint) else None
    attention = kind == "attn"
    read = stream.read("V" if attention else "up" if stream.spec.gated else "in", layer)
    group = stream.spec.group if attention else 1
    constants = read.constants
    gate = None
    if not attention:
        gate = torch.full((1, 1), point.gate, dtype=accumulate) if isinstance(point, Convention) else point.gates[layer]
    bias = stream.weight("o_bias" if attention else "down_bias", layer)
    label = f"L{layer}.{kind}"
    return Part(
        label,
        tuple(f"L{layer}H{i}" for i in range(stream.spec.n_heads)) if attention else (label,),
        width=read.maps.shape[0] * read.maps.shape[1],
        read=read.maps.repeat_interleave(group, 0).to(accumulate),
        write=stream.write("head" if attention else "mlp", layer).to(accumulate),
        inverse=inverse_scalar(point, label),
        read_constant=None if constants is None else constants.repeat_interleave(group, 0).to(accumulate),
        write_constant=None if bias is None else bias.to(accumulate),
        pattern=run.patterns[layer].to(accumulate) if run is not None and attention else None,
        gate=None if gate is None else gate.to(accumulate),
    )
