"""Blocks frozen at an operating point: each is linear, ``x -> x + T x + c``, and exact for its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.stream import Group, OperatingPoint, Stream

_SMALLEST, _LARGEST = 1e-60, 1e60
"""Range of a factor: beyond it squares of what passes through two blocks leave the range of float64."""


@final
@dataclass(frozen=True)
class Convention:
    """What stands in for an operating point where nothing ran: one token that attends to itself with weight 1.

    Attributes:
        scalar: the norm scalar s of every group, in [1e-60, 1e60].
        gate: the factor on every neuron's pre-activation: the activated gate, or the slope where ungated; in
            [-1e60, 1e60].

    Raises:
        UsageError: one of them is outside.
    """

    scalar: float = 1.0
    gate: float = 1.0

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.scalar <= _LARGEST:
            raise UsageError(
                f"norm scalar {self.scalar}",
                expected=f"a number from {_SMALLEST:g} to {_LARGEST:g}",
                do="pass for example scalar=1.0",
            )
        if not abs(self.gate) <= _LARGEST:
            raise UsageError(
                f"gate {self.gate}",
                expected=f"a number from -{_LARGEST:g} to {_LARGEST:g}",
                do="pass for example gate=1.0",
            )


Point = OperatingPoint | Convention


@final
@dataclass(frozen=True, eq=False)
class FrozenGroup:
    """The attention or the MLP of one layer, frozen.

    ``T x`` at token t is ``sum_h O_h sum_u p_h[t,u] g[t] (R~_h x_u / s_u)``, over the scalars at t of a norm on
    inner activations or on what they become; all in float64.

    Attributes:
        group: which attention or MLP; m counts its components.
        read: (m, k, d) effective read maps, V of attention, up (in) of an MLP.
        write: (m, d, k).
        inverse: (T,) 1/s.
        read_constant: (m, k) or None; write_constant: (d,) or None.
        pattern: (m, T, T), None in an MLP, where no token reads another.
        gate: (T, k) or (1, 1), None in attention.
        outer: (T,) 1/s of a norm on inner activations or on what they become, None where there is neither.
    """

    group: Group
    read: Tensor
    write: Tensor
    inverse: Tensor
    read_constant: Tensor | None
    write_constant: Tensor | None
    pattern: Tensor | None
    gate: Tensor | None
    outer: Tensor | None = None

    @property
    def width(self) -> int:
        """Rows of all distinct read maps: heads that share values share them."""
        return len(self.group.components) // self.group.sharing * self.group.width

    def inner(self, x: Tensor) -> Tensor:
        """The inner activations that x causes without constants: x (..., T, d) to (..., T, m, k)."""
        z = (x * self.inverse[:, None]) @ self.read.flatten(0, 1).T
        return self._mixed(z.unflatten(-1, self.read.shape[:2]))

    def linear(self, x: Tensor) -> Tensor:
        """``T x`` for x (..., T, d); no dense map is formed."""
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
        target, source = tokens[target], tokens[source]  # negative indices count from the end
        if self.pattern is not None:
            weight = weight * self.pattern[:, target, source, None, None]
        elif target != source:
            return weight.new_zeros(weight.shape[1], weight.shape[1])
        if self.gate is not None:
            weight = weight * self.gate[target]
        if self.outer is not None:
            weight = weight * self.outer[target]
        return (weight.transpose(0, 1).flatten(1) @ self.read.flatten(0, 1)) * self.inverse[source]

    def _mixed(self, z: Tensor) -> Tensor:
        """Inner activations (..., T, m, k) after attention between tokens, or after the gate."""
        if self.pattern is not None:
            z = torch.einsum("mtu,...umk->...tmk", self.pattern, z)
        z = z if self.gate is None else z * self.gate[:, None, :]
        return z if self.outer is None else z * self.outer[:, None, None]


@final
@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """Everything that reads one state (attention, MLP, or both in a parallel block) as ``x -> x + T x + c``.

    Attributes:
        groups: what reads the state: one attention or MLP, or both in a parallel block.
    """

    groups: tuple[FrozenGroup, ...]

    @property
    def label(self) -> str:
        """``"L3.attn"``, ``"L3.mlp"``, or ``"L3"`` of a parallel block."""
        group = self.groups[0].group
        return group.id if len(self.groups) == 1 else f"L{group.layer}"

    def apply(self, x: Tensor) -> Tensor:
        """``x + T x + c`` for x (..., T, d)."""
        return x + self.linear(x) + self.constant

    def linear(self, x: Tensor) -> Tensor:
        """``T x`` for x (..., T, d)."""
        return torch.stack([group.linear(x) for group in self.groups]).sum(0)

    @property
    def constant(self) -> Tensor:
        """``c``, shape (T, d)."""
        return torch.stack([group.constant for group in self.groups]).sum(0)

    @property
    def width(self) -> int:
        """How many inner dimensions T passes through at each token: a bound on the rank of ``at``."""
        return sum(group.width for group in self.groups)

    def at(self, token: int) -> Tensor:
        """The dense (d, d) map T of a token to itself."""
        return self.between(token, token)

    def between(self, target: int, source: int) -> Tensor:
        """The dense (d, d) map T from one token's state to another's update."""
        return torch.stack([group.between(target, source) for group in self.groups]).sum(0)

    def dense(self) -> Tensor:
        """T over all tokens, (T d, T d), tokens outermost: for small prompts of small models."""
        tokens = range(len(self.groups[0].inverse))
        return torch.cat([torch.cat([self.between(t, u) for u in tokens], 1) for t in tokens], 0)


def frozen_blocks(stream: Stream, point: Point, start: int = 0, stop: int | None = None) -> Iterator[FrozenBlock]:
    """The blocks in order of depth, each read from the checkpoint when it is needed.

    Args:
        stream: the model.
        point: at which every block is linear.
        start: state of the stream that the first one reads.
        stop: state that the last one writes; None is the last state.

    Raises:
        UsageError: the point belongs to another model.
        RecordError: it is incomplete.
        MissingTensorError: a partial checkpoint lacks a block.
    """
    if isinstance(point, OperatingPoint):
        point.check(stream)
    for state in range(start, stream.states - 1 if stop is None else stop):
        groups = stream.groups.sited(state)
        if len(groups) < sum(branch.reads == state for branch in stream.spec.branches):
            raise MissingTensorError(
                f"this checkpoint lacks an attention or MLP that reads state {state}",
                expected="the attention and the MLP of every layer",
                do="open the complete checkpoint",
            )
        yield FrozenBlock(tuple(freeze(stream, group, point) for group in groups))


def freeze(stream: Stream, group: Group, point: Point) -> FrozenGroup:
    """One attention or MLP at a point."""
    port = group.ports[-1]  # V, up or in: what it reads here passes linearly to its output
    read, bias = stream.read(port, group), f"{group.id}.bias"
    device, pattern, gate = read.maps.device, None, None
    if isinstance(point, Convention):
        gate = None if group.kind == "head" else torch.full((1, 1), point.gate, dtype=accumulate)
    elif group.kind == "head":
        pattern = point.patterns[group.id]
    else:
        gate = point.gates[group.id]
    return FrozenGroup(
        group,
        read=read.maps.repeat_interleave(group.shared(port), 0).to(accumulate),
        write=stream.write(group).to(accumulate),
        inverse=inverse_scalar(point, group.id).to(device),
        read_constant=_accumulated(read.constants, group.shared(port)),
        write_constant=_accumulated(stream.write(bias)[0, :, 0] if bias in stream.groups else None),
        pattern=None if pattern is None else pattern.to(device, accumulate),
        gate=None if gate is None else gate.to(device, accumulate),
        outer=_outer(point, group),
    )


def _outer(point: Point, group: Group) -> Tensor | None:
    """What multiplies a group's inner activations besides, (T,) float64."""
    sites = [site for site in (f"{group.id}.after", f"{group.id}.inner") if site in group.sites]
    if isinstance(point, Convention) or not sites:
        return None
    return 1 / torch.stack([point.scalars[site].to(accumulate) for site in sites]).prod(0)


def _accumulated(tensor: Tensor | None, repeats: int = 1) -> Tensor | None:
    return None if tensor is None else tensor.to(accumulate).repeat_interleave(repeats, 0)


def replay(stream: Stream, point: OperatingPoint) -> Tensor:
    """The final residual, before the final norm, from the embeddings through all frozen blocks; (T, d) float64.

    It equals the model's own (with LayerNorm less its mean, which writers leave out) up to rounding: that is what makes
    a frozen block exact for its prompt.

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
    return x + stream.write("pos")[0].T[: len(x)].to(accumulate) if "pos" in stream.groups else x


def inverse_scalar(point: Point, group: str) -> Tensor:
    """1/s of what a group reads, by the group's id, (T,) float64."""
    s = torch.tensor([point.scalar], dtype=accumulate) if isinstance(point, Convention) else point.scalars[group]
    return 1 / s.to(accumulate)


def describe(point: Point) -> dict[str, object]:
    """For stamps: the point at which something was taken as linear."""
    if isinstance(point, Convention):
        return {"point": "convention", "norm_scalar": point.scalar, "gate": point.gate, "attention": "to itself = 1"}
    return {"point": point.identity, "tokens": len(point.tokens)}
