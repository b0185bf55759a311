"""A small decoder in plain torch for models that no library runs from data: research models of one's own.

Its modules have the names that the model's table gives to tensors, so that hooks find them: ``blocks.0.attn.W_Q`` is a
linear map, and ``blocks.0.attn``, the module around the output map, gives its output and its pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from virtual_weights.architecture import Attention, Branch, Mlp, Norm, Placement
from virtual_weights.errors import UsageError
from virtual_weights.runtime.running.activations import incomplete
from virtual_weights.runtime.running.hooks import activation, block_name, norm_module, wide
from virtual_weights.stream import Stream
from virtual_weights.stream.layout import unpacked
from virtual_weights.stream.norm import capped, normed

Weights = Callable[[str, str], Tensor | None]
"""A role's tensor in canonical axes, by role and group."""


@final
@dataclass(frozen=True, eq=False)
class Output:
    """What a model gives: logits, (B, T, tokens)."""

    logits: Tensor


def decoder(stream: Stream, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that runs a stream's model.

    Args:
        stream: the model.
        tensors: by the names of its table.

    Raises:
        MissingTensorError: a tensor is missing.
    """

    def weight(role: str, group: str) -> Tensor | None:
        row = stream.model.row(role, group)
        if row is None or row.name not in tensors:
            return None
        return unpacked(tensors[row.name], Placement(row.name, row.layout, row.slot(role)), stream.model.axes(group))

    return _Decoder(stream, weight).eval()


@final
class _Decoder(nn.Module):
    """Token ids (B, T) to logits."""

    def __init__(self, stream: Stream, weight: Weights) -> None:
        super().__init__()
        spec = stream.spec
        self._head = spec.head
        self._embed = _put(self, _path(stream, "embed", "embed"), _Table(_needed(weight, "embed", "embed")))
        table = weight("pos", "pos")
        self._pos = None if table is None else _put(self, _path(stream, "pos", "pos"), _Table(table))
        blocks: dict[str, list[Branch]] = {}
        for branch in spec.branches:
            blocks.setdefault(block_name(stream, branch.id), []).append(branch)
        self._blocks = [_put(self, name, _Block(stream, weight, name, parts)) for name, parts in blocks.items()]
        self._norm = None
        if spec.head.norm is not None:
            self._norm = _put(self, norm_module(stream, "unembed"), _Norm(spec.head.norm, weight, "unembed"))
        self._unembed = _put(self, _path(stream, "unembed", "unembed"), _Map(weight, "unembed", "unembed"))

    def forward(self, tokens: Tensor, **_: object) -> Output:
        x = self._embed(tokens)
        if self._pos is not None:
            x = x + self._pos(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for block in self._blocks:
            x = block(x)
        logits = self._unembed(x if self._norm is None else self._norm(x)) * self._head.factor
        return Output(capped(logits, self._head.cap))


@final
class _Block(nn.Module):
    """The branches of one layer: a state to the next one behind them."""

    def __init__(self, stream: Stream, weight: Weights, name: str, branches: list[Branch]) -> None:
        super().__init__()
        self._parts: list[tuple[Branch, nn.Module | None, nn.Module]] = []
        for branch in branches:
            if branch.after is not None or branch.factor != 1.0:
                raise UsageError(
                    f"{branch.id} has a norm behind it, or a factor",
                    expected="parts whose outputs are added to the stream as they are",
                    do="ask questions of the weights alone",
                )
            norm = None
            if branch.before is not None:
                path = norm_module(stream, branch.id).removeprefix(f"{name}.")
                norm = _put(self, path, _Norm(branch.before, weight, branch.id))
            role = "o" if isinstance(branch.part, Attention) else "down"
            path = _path(stream, role, branch.id).removeprefix(f"{name}.").rpartition(".")[0]
            make = _Attention if isinstance(branch.part, Attention) else _Mlp
            self._parts.append((branch, norm, _put(self, path, make(stream, weight, branch))))

    def forward(self, x: Tensor) -> Tensor:
        states = {self._parts[0][0].reads: x}
        for branch, norm, part in self._parts:
            read = states[branch.reads]
            given = part(read if norm is None else norm(read))
            x = x + (given[0] if isinstance(given, tuple) else given)
            states[branch.writes] = x
        return x


@final
class _Attention(nn.Module):
    """Attention: what it writes, and its pattern (B, heads, T, T)."""

    def __init__(self, stream: Stream, weight: Weights, branch: Branch) -> None:
        super().__init__()
        assert isinstance(branch.part, Attention)
        self._part, self._rotation = branch.part, lambda place: stream.rotation(place, branch.id)
        self._maps = {role: _put_leaf(self, stream, weight, role, branch.id) for role in ("q", "k", "v", "o")}
        self._positions = "positions" in branch.part.outside
        if self._positions:  # what queries and keys get of them, by head
            table = _needed(weight, "positions", "positions")
            for role in ("q", "k"):
                placed = torch.einsum("hkd,td->htk", _needed(weight, role, branch.id), table)
                self.register_buffer(f"placed_{role}", placed, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        part, length = self._part, x.shape[1]
        q, k, v = (self._maps[role](x).unflatten(-1, (-1, part.width)).transpose(1, 2) for role in ("q", "k", "v"))
        if self._positions:
            q, k = (y + self.get_buffer(f"placed_{role}")[:, :length] for y, role in ((q, "q"), (k, "k")))
        if part.rotary is not None:
            turns = torch.stack([turn for t in range(length) if (turn := self._rotation(t)) is not None]).to(x)
            q, k = (torch.einsum("tij,bhtj->bhti", turns, y) for y in (q, k))
        k, v = (y.repeat_interleave(part.sharing, 1) for y in (k, v))
        scores = capped(q @ k.mT * part.scale, part.cap)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        pattern = wide(scores).masked_fill(later, -math.inf).softmax(-1).to(x.dtype)
        return self._maps["o"]((pattern @ v).transpose(1, 2).flatten(2)), pattern


@final
class _Mlp(nn.Module):
    """An MLP, with a gate or without."""

    def __init__(self, stream: Stream, weight: Weights, branch: Branch) -> None:
        super().__init__()
        assert isinstance(branch.part, Mlp)
        roles = ("gate", "up", "down") if branch.part.gated else ("up", "down")
        self._maps = {role: _put_leaf(self, stream, weight, role, branch.id) for role in roles}
        self._act = activation(stream, stream.groups[branch.id])

    def forward(self, x: Tensor) -> Tensor:
        up = self._maps["up"](x)
        return self._maps["down"](self._act(self._maps["gate"](x)) * up if "gate" in self._maps else self._act(up))


@final
class _Norm(nn.Module):
    """A norm, in float32 at least."""

    def __init__(self, norm: Norm, weight: Weights, group: str) -> None:
        super().__init__()
        self._norm = norm
        self.weight, self.bias = (_parameter(weight(role, group)) for role in ("norm", "norm_bias"))

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else self.weight + self._norm.plus
        return normed(wide(x), gain, self.bias, self._norm).to(x.dtype)


@final
class _Map(nn.Module):
    """A linear map from the axis of the stream to heads or neurons in one axis, or back."""

    def __init__(self, weight: Weights, role: str, group: str) -> None:
        super().__init__()
        matrix = _needed(weight, role, group)
        if role == "o":
            matrix = matrix.movedim(0, 1)  # (heads, d, k) to (d, heads, k)
        output = role in ("o", "down")
        bias = weight("bias", f"{group}.bias") if output else weight(f"{role}_bias", group)
        self.weight = nn.Parameter(matrix.flatten(1) if output else matrix.flatten(0, -2))
        self.bias = _parameter(None if bias is None else bias.flatten())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@final
class _Table(nn.Module):
    """Rows by number."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)

    def forward(self, rows: Tensor) -> Tensor:
        return functional.embedding(rows, self.weight)


def _path(stream: Stream, role: str, group: str) -> str:
    row = stream.model.row(role, group)
    if row is None:
        raise incomplete([f"{role} of {group}"])
    return row.module


def _put_leaf(module: nn.Module, stream: Stream, weight: Weights, role: str, group: str) -> nn.Module:
    return _put(module, _path(stream, role, group).rpartition(".")[2], _Map(weight, role, group))


def _put(root: nn.Module, path: str, module: Any) -> Any:
    """Add a module under a dotted path, and give it."""
    *above, leaf = path.split(".")
    for name in above:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
    return module


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor)


def _needed(weight: Weights, role: str, group: str) -> Tensor:
    tensor = weight(role, group)
    if tensor is None:
        raise incomplete([f"{role} of {group}"])
    return tensor
