"""Features of attached dictionaries in a running model: what they would write, and what follows when they read less.

A dictionary stands beside the model's own part: its reconstruction plus an error is what the part gives. The error is
held. A feature that reads less changes its activation by ``a' - a``, and what the part gives by that times its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.runtime.features.encoding import Encoder
from virtual_weights.runtime.running.hooks import Hook, Place, before, module_of, state_module, wide
from virtual_weights.stream import Stream, centred
from virtual_weights.stream.group import WRITINGS
from virtual_weights.stream.hook_points import HookPoint

_encoders: WeakKeyDictionary[Stream, dict[tuple[str, torch.device], Encoder]] = WeakKeyDictionary()


def pre_activations(stream: Stream, name: str, states: Tensor) -> Tensor:
    """(..., F) of states (..., d); the encoder is made ready once for each stream and device."""
    ready = _encoders.setdefault(stream, {})
    encoder = ready.get((name, states.device))
    if encoder is None:
        encoder = ready[name, states.device] = Encoder(stream, stream.attached[name], states.device)
    return encoder.pre(wide(states).flatten(0, -2)).unflatten(0, states.shape[:-1])


def stands(stream: Stream, name: str) -> bool:
    """Whether an attached dictionary reads a state and stands for parts of the model, so that it has edges in a run."""
    return stream.attached[name].stands_for_parts


def scaled(point: HookPoint) -> bool:
    """Whether what is written there is divided by the scalar of a norm behind the part."""
    return point.what in ("output", "z") and point.branch is not None and point.branch.after is not None


def feature_places(stream: Stream, name: str) -> set[Place]:
    """What of a run says what features write: the state that they read, and scalars of norms behind parts."""
    part = stream.attached[name]
    after: set[Place] = {("after", p.branch.id) for p, _ in part.writings if scaled(p) and p.branch is not None}
    return {("state", stream.groups[name].reads or 0), *after}


def feature_writes(
    stream: Stream, name: str, signals: Mapping[Place, Tensor], rows: slice, by_state: int | None
) -> Tensor:
    """What some features have written by a state, (..., d), of what a run showed at ``feature_places``.

    Their activations are those of the state that they read, or, where edges into them are removed, what these leave.
    """
    part = stream.attached[name]
    activations = signals.get(("features", name))
    if activations is None:
        activations = part.part.activation(
            pre_activations(stream, name, signals["state", stream.groups[name].reads or 0])
        )
    chosen, total = activations[..., rows], None
    first, stop, _ = rows.indices(part.part.features)
    for point, decoder in part.writings:
        if by_state is not None and point.state > by_state:
            continue
        maps = centred(stream, part.written(stream, point, decoder.rows(slice(first, stop))), -2, stream.dtype)
        written = chosen @ maps.to(chosen).T
        if scaled(point) and point.branch is not None:
            written = written / signals["after", point.branch.id].to(written)[..., None]
        total = written if total is None else total + written
    assert total is not None
    return total


def decoder_hooks(model: nn.Module, stream: Stream, name: str, change: Callable[[], Tensor]) -> Iterator[Hook]:
    """Hooks that add ``change() W_dec`` wherever a dictionary writes; ``change`` gives a' - a, (..., F)."""
    part = stream.attached[name]
    for place, decoder in part.writings:
        rows = decoder.rows(slice(0, part.part.features))

        def added(rows: Tensor = rows) -> Tensor:
            difference = change()
            return difference @ rows.to(difference)

        yield writing_hook(model, stream, place, added)


def writing_hook(model: nn.Module, stream: Stream, place: HookPoint, added: Callable[[], Tensor]) -> Hook:
    """A hook that adds something at a place where a part gives its output, (..., d) as the place has it.

    Raises:
        UsageError: the place is a state, at which no part gives anything.
    """
    branch = place.branch
    if branch is None or not place.written:
        raise UsageError(
            f"nothing is given at {place.text}",
            expected="a dictionary that stands for the output of an attention or an MLP",
            do="name its place, such as L8.mlp.added; for a vector on a state use vweights vector --add",
        )
    after = place.what == "added" and branch.after is not None
    module = module_of(model, stream, "after" if after else WRITINGS[stream.groups[branch.id].kind], branch.id)
    factor = 1 / branch.factor if place.what == "added" else 1.0
    if place.what == "z":

        def given(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
            return (inputs[0] + added().to(inputs[0]), *inputs[1:])

        return module.register_forward_pre_hook(given)

    def output(_module: nn.Module, _inputs: object, value: Tensor) -> Tensor:
        return value + (added() * factor).to(value)

    return module.register_forward_hook(output)


def gradient_hooks(module: nn.Module, stream: Stream, name: str, keep: Callable[[Tensor], None]) -> Iterator[Hook]:
    """Hooks that let a dictionary's pre-activations have gradients: what is added where it writes is 0."""
    part, differences = stream.attached[name], dict[str, Tensor]()

    def read(states: Tensor) -> None:
        pre = pre_activations(stream, name, states).requires_grad_()
        activations = part.part.activation(pre)
        differences[name] = activations - activations.detach()
        keep(pre)

    yield before(state_module(module, stream, stream.groups[name].reads or 0), read)
    yield from decoder_hooks(module, stream, name, lambda: differences[name])
