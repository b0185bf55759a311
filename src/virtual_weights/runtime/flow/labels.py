"""What heads do, by where they attend on repeated random tokens: previous token, induction, duplicates and so on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.running.hooks import Signal, forward, places, watching
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Question
from virtual_weights.stream.group import no_heads

BEHAVIOURS = {
    "previous_token": "attention of a token to the one before it",
    "induction": "attention of a token in the second half to the one after its first occurrence",
    "duplicate_token": "attention of a token in the second half to its first occurrence",
    "self": "attention of a token to itself, except of the first one",
    "first_token": "attention of a token to the first one, except of that one",
}


@final
@dataclass(frozen=True)
class Labels(Question[Run]):
    """Mean attention of every head to five kinds of places, on random tokens whose second half repeats the first.

    Random tokens have no meaning to attend to, so that what a head does there it does by position or by repetition. A
    head gets the label of its largest score where that is above the threshold; the first token, where many heads rest
    while they have nothing to do, only where no other is.

    Attributes:
        threshold: least score for a label, in (0, 1).

    Reference: Olsson et al. 2022, "In-context Learning and Induction Heads"; Elhage et al. 2021.
    """

    question: ClassVar[str] = "labels"
    threshold: float = 0.4

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise UsageError(f"threshold {self.threshold}", expected="a share in (0, 1)", do="pass for example 0.4")

    @torch.no_grad()
    def __call__(self, run: Run, progress: Progress = silent) -> Record:
        """Look at every head.

        Args:
            run: on repeated tokens, see ``Run.on_repeats``.
            progress: called with (sequences done, sequences in all).

        Returns:
            A Record over ``head`` with a column for every behaviour, each in [0, 1], and ``label`` (None where no
            score is above the threshold).

        Raises:
            UsageError: there is no head, the tokens do not repeat, transformers is missing, or the model's attention
                keeps no pattern.
        """
        tokens, stream = run.sequences(), run.stream
        if not stream.heads:
            raise no_heads()
        half = tokens.shape[1] // 2
        if half < 2 or not torch.equal(*tokens.tensor_split(2, 1)):
            raise UsageError(
                f"tokens of shape {tuple(tokens.shape)} that do not repeat",
                expected="an even number, at least 4, whose second half repeats the first",
                do="make the run with Run.on_repeats",
            )
        pairs = _pairs(half)
        scores = {g.id: torch.zeros(len(g.components), len(pairs), dtype=accumulate) for g in stream.groups.heads}

        def see(_signal: Signal, where: Any, pattern: Tensor) -> None:
            attention = pattern[0].to(accumulate).cpu()  # (heads, T, T)
            scores[where] += torch.stack([attention[:, query, key].mean(1) for query, key in pairs], 1)

        with watching(run.module, stream, places(stream, "pattern"), see):
            for done, sequence in enumerate(tokens, 1):
                forward(run.module, sequence[None])
                progress(done, len(tokens))
        return self._record(run, torch.cat(list(scores.values())) / len(tokens))

    def _record(self, run: Run, scores: Tensor) -> Record:
        names = list(BEHAVIOURS)
        labels = tuple(self._label(dict(zip(names, row, strict=True))) for row in scores.tolist())
        columns = [Column(name, scores[:, i], "1, in [0, 1]", BEHAVIOURS[name]) for i, name in enumerate(names)]
        columns.append(Column("label", labels, "", f"the largest of these, where above {self.threshold}"))
        return run.record(self, (Axis("head", tuple(str(head.label) for head in run.stream.heads)),), columns)

    def _label(self, scores: dict[str, float]) -> str | None:
        resting = scores.pop("first_token")
        best = max(scores, key=lambda name: scores[name])
        if scores[best] > self.threshold:
            return best
        return "first_token" if resting > self.threshold else None


def _pairs(half: int) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every behaviour, over 2 half tokens."""
    later, second = torch.arange(1, 2 * half), torch.arange(half, 2 * half)
    return [
        (later, later - 1),
        (second, second - half + 1),
        (second, second - half),
        (later, later),
        (later, torch.zeros_like(later)),
    ]
