"""Features of attached dictionaries on a running model: their pre-activations and activations at every token."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.stream import Stream
from virtual_weights.stream.attached import AttachedPart
from virtual_weights.stream.norm import scale

_ENTRIES = 1 << 25  # activations in memory at once


def reading_parts(stream: Stream) -> tuple[AttachedPart, ...]:
    """The attached dictionaries that read a state.

    Raises:
        UsageError: there is none.
    """
    return tuple(stream.attached[group.id] for group in stream.groups.readers("enc"))


@final
class Encoder:
    """The encoder of one attached dictionary, ready to be used many times.

    Args:
        stream: the model, its norms folded.
        part: the dictionary.
        device: where states come from.

    Attributes:
        part: the dictionary.
        state: the state that it reads.
        rows: how many tokens at most are encoded at once.
    """

    def __init__(self, stream: Stream, part: AttachedPart, device: torch.device) -> None:
        if not stream.folded:
            raise UsageError("a stream without its norms' gains", expected="fold=True", do="open the model so")
        if part.part.unfolded is not None:
            raise UsageError(
                f"the activations of {part.name} are not those of one encoder: {part.part.unfolded}",
                expected="a dictionary whose activations follow from its own pre-activations",
                do="ask questions of its weights alone",
            )
        assert part.reading is not None
        read = part.read(stream)
        self.part, self.state = part, part.reading.state
        self.rows = max(1, _ENTRIES // max(1, part.part.features))
        self._norm = part.reading.norm
        self._maps = read.maps[0].to(device)
        self._constant = None if read.constants is None else read.constants[0].to(device)

    def scale(self, states: Tensor) -> Tensor:
        """The norm scalar through which states (n, d) are read, (n,)."""
        return scale(states, self._norm)

    def pre(self, states: Tensor) -> Tensor:
        """Pre-activations ``R~ x / s + c`` of states (n, d), (n, F)."""
        values = states @ self._maps.to(states).T / self.scale(states)[:, None]
        return values if self._constant is None else values + self._constant.to(states)

    def __call__(self, states: Tensor) -> Tensor:
        """Activations of states (n, d), (n, F)."""
        return self.part.part.activation(self.pre(states))
