"""How much of a direction there is in the stream on a text, state by state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.running.hooks import Signal, forward, places, watching, wide
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import is_token
from virtual_weights.stream import Question, centred, through_norm
from virtual_weights.stream.vector import Vector


@final
@dataclass(frozen=True)
class VectorActivity(Question[Run]):
    """What of every state lies along a direction, as readers of that state see it.

    With v of length 1, x a state and s the norm scalar with which it is read: ``mean``, ``E[<v, x>/s]``; ``rms``, the
    root of ``E[<v, x>^2/s^2]``; ``share``, ``E[<v, x>^2/s^2] / E[|x|^2/s^2]``, 1/d of a random direction; ``raw``, the
    root of ``E[<v, x>^2]``, for what reads the state as it is. Where a reader's map gives ``||C v||`` of the vector,
    ``rms ||C v||`` is what it receives along it on this text, root mean square.

    Attributes:
        vector: the direction.
    """

    question: ClassVar[str] = "vector_activity"
    vector: Vector

    @torch.no_grad()
    def __call__(self, subject: Run, progress: Progress = silent) -> Record:
        """Run the model.

        Args:
            subject: the run.
            progress: called with (tokens done, tokens in all).

        Returns:
            A Record over ``state``.

        Raises:
            UsageError: the vector has another width.
        """
        stream, states, done = subject.stream, subject.stream.states, 0
        vector = centred(stream, self.vector.of(stream))
        unit, sums, mask = (
            (vector / vector.norm()).to(subject.device),
            torch.zeros(4, states, dtype=accumulate),
            Tensor(),
        )

        def see(_: Signal, state: Any, tensor: Tensor) -> None:
            x = wide(tensor)[mask.to(tensor.device)]
            s = stream.scale(x, state)
            along, size = x @ unit.to(x), through_norm(stream, x).square().sum(1) / s**2
            powers = (along / s).sum(), (along / s).square().sum(), size.sum(), along.square().sum()
            sums[:, state] += torch.stack(powers).to("cpu", accumulate)

        for tokens in subject.batches():
            mask = is_token(tokens)
            done += int(mask.sum())
            with watching(subject.module, stream, places(stream, "state"), see):
                forward(subject.module, tokens.clamp(min=0))
            progress(done, subject.count)
        mean, square, size, raw = sums / done
        columns = (
            Column("mean", mean, "1", "E[<v, x>/s], v of length 1"),
            Column("rms", square.sqrt(), "1", "root of E[<v, x>^2/s^2]"),
            Column("raw", raw.sqrt(), "1", "root of E[<v, x>^2]"),
            Column("share", square / size, "1, in [0, 1]", "of E[|x|^2/s^2]; 1/d of a random direction"),
        )
        return subject.record(self, (Axis("state", tuple(map(str, range(states)))),), columns)
