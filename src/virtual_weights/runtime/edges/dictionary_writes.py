"""Features of attached dictionaries in a running model: what they would write, and what follows when they read less.

A dictionary stands beside the model's own part: its reconstruction plus an error is what the part gives. The error is
held. A feature that reads less changes its activation by ``a' - a``, and what the part gives by that times its decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.runtime.features.encoding import Encoder
from virtual_weights.runtime.running.hooks import Hook, module_of, wide
from virtual_weights.stream import Stream
from virtual_weights.stream.places import Place

_ROLES = {"attn": "o", "mlp": "down"}


@lru_cache(maxsize=8)
def encoder_of(stream: Stream, name: str, device: torch.device) -> Encoder:
    """The encoder of an attached dictionary, made ready once."""
    return Encoder(stream, stream.attached[name], device)


def pre_activations(stream: Stream, name: str, states: Tensor) -> Tensor:
    """(..., F) of states (..., d)."""
    return encoder_of(stream, name, states.device).pre(wide(states).flatten(0, -2)).unflatten(0, states.shape[:-1])


def feature_writes(stream: Stream, name: str, states: Tensor, rows: slice, by_state: int | None) -> Tensor:
    """What some features have written by a state, (..., d), of the states (..., d) that they read."""
    part = stream.attached[name]
    activations = part.part.activation(pre_activations(stream, name, states))[..., rows]
    first, stop, _ = rows.indices(part.part.features)
    return activations @ stream.write(name, by_state)[0][:, first:stop].to(activations).T


def decoder_hooks(model: nn.Module, stream: Stream, name: str, change: Callable[[], Tensor]) -> Iterator[Hook]:
    """Hooks that add ``change() W_dec`` wherever a dictionary writes; ``change`` gives a' - a, (..., F)."""
    part = stream.attached[name]
    for place, decoder in part.writings:
        rows = decoder.rows(slice(0, part.part.features))

        def added(rows: Tensor = rows) -> Tensor:
            difference = change()
            return difference @ rows.to(difference)

        yield writing_hook(model, stream, place, added)


def writing_hook(model: nn.Module, stream: Stream, place: Place, added: Callable[[], Tensor]) -> Hook:
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
    part = branch.id.rpartition(".")[2]
    after = place.what == "added" and branch.after is not None
    module = module_of(model, stream, "after" if after else _ROLES[part], branch.id)
    factor = 1 / branch.factor if place.what == "added" else 1.0
    if place.what == "z":

        def given(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
            return (inputs[0] + added().to(inputs[0]), *inputs[1:])

        return module.register_forward_pre_hook(given)

    def output(_module: nn.Module, _inputs: object, value: Tensor) -> Tensor:
        return value + (added() * factor).to(value)

    return module.register_forward_hook(output)
