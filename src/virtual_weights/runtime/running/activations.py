"""What a prompt, or some tokens of a text, did in a model: what its parts received and gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.runtime.running.hooks import Place, Signal, places, watched
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Stream

_PROMPT: tuple[Signal, ...] = ("state", "inner", "written", "Q", "K", "V", "gate", "up", "in")


@final
@dataclass(frozen=True, eq=False)
class Activations:
    """What some tokens did in a model.

    Attributes:
        stream: the model.
        tokens: (T,) ids.
        signals: what its modules received and gave, without the batch axis, on the CPU; see ``watching``.
        logits: (T, vocabulary); empty where nothing asked for them.
    """

    stream: Stream
    tokens: Tensor
    signals: dict[Place, Tensor]
    logits: Tensor

    def state(self, number: int) -> Tensor:
        """A state of the stream, (T, d) float64."""
        return self.signals["state", number].to(accumulate)

    def scalar(self, number: int) -> Tensor:
        """The norm scalar with which a state is read, (T,) float64."""
        return self.stream.scale(self.state(number))

    def written(self, before: int) -> Iterator[tuple[str, Tensor]]:
        """What every writer that reaches a state has added to it, (T, d) float64, in order of depth."""
        for group in self.stream.groups.writers:
            if group.reaches(before):
                yield from zip(group.labels, self._written(group.id), strict=True)

    def _written(self, group: str) -> Tensor:
        """What the components of a group wrote, (m, T, d) float64."""
        if ("written", group) in self.signals:
            return self.signals["written", group].to(accumulate).expand(1, len(self.tokens), -1)
        maps = self.stream.write(group).to(accumulate)
        if ("inner", group) in self.signals:
            return torch.einsum("mdk,tmk->mtd", maps, self.signals["inner", group].to(accumulate))
        return maps[:, :, 0].expand(len(self.tokens), -1, -1).transpose(0, 1)  # a bias


def one_chunk(run: Run) -> Tensor:
    """The tokens (T,) of a run on one prompt.

    Raises:
        UsageError: it has several chunks.
    """
    if len(run.chunks) != 1:
        raise UsageError(f"a run of {len(run.chunks)} chunks", expected="one prompt", do="make it with Run.on_prompt")
    return run.chunks[0]


@torch.no_grad()
def prompted(run: Run, *further: Signal) -> Activations:
    """Run a model on one prompt and keep what its parts did.

    Args:
        run: of one chunk.
        further: signals to keep beside the usual ones, such as ``"pattern"``.

    Raises:
        UsageError: the run has more than one chunk, or transformers is missing.
    """
    tokens = one_chunk(run)
    wanted = places(run.stream, *_PROMPT, *further)
    signals, logits = watched(run.module, run.stream, wanted, tokens[None].to(run.device))
    cpu = {place: tensor[0].cpu() for place, tensor in signals.items()}
    return Activations(run.stream, tokens, cpu, logits[0].cpu())
