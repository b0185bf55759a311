"""What heads do, by where they attend on random tokens said twice: previous token, induction, duplicates and so on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.flow.observation import forward
from virtual_weights.runtime.running.hooks import Kind, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.runtime.running.text import repeated_tokens
from virtual_weights.stream import Stream

BEHAVIOURS = {
    "previous_token": "attention of a token to the one before it",
    "induction": "attention of a token of the second half to the one after its first occurrence",
    "duplicate_token": "attention of a token of the second half to its first occurrence",
    "self": "attention of a token to itself, the first one apart",
    "first_token": "attention of a token to the first one, itself apart",
}


@torch.no_grad()
def labels(
    stream: Stream,
    model: nn.Module | None = None,
    tokens: Tensor | None = None,
    *,
    threshold: float = 0.4,
    progress: Callable[[float, float], None] | None = None,
) -> Record:
    """Mean attention of every head to five kinds of places, on seeded random tokens of which the second half repeats.

    Random tokens have no meaning to attend to, so that what a head does there it does by position or by repetition. A
    head gets the label of its largest score where that is above the threshold; the first token, where many heads rest
    while they have nothing to do, only where no other is.

    Args:
        stream: the model.
        model: a loaded model with eager attention; without it the checkpoint is loaded in float32.
        tokens: (B, 2 L) ids whose second half repeats the first; None takes ``repeated_tokens(vocabulary, 64)``.
        threshold: least score for a label, in (0, 1).
        progress: called with (sequences done, sequences in all).

    Returns:
        A Record over ``head`` with a column for every behaviour, each in [0, 1], and ``label`` (None where no score is
        above the threshold).

    Raises:
        UsageError: tokens that do not repeat, a threshold out of range, transformers is missing, or the model's
            attention keeps no pattern.

    Reference: Olsson et al. 2022, "In-context Learning and Induction Heads"; Elhage et al. 2021.
    """
    if tokens is None:
        tokens = repeated_tokens(stream.write("embed").shape[-1], 64)
    length = tokens.shape[-1] // 2
    if tokens.ndim != 2 or length < 2 or not torch.equal(*tokens.tensor_split(2, 1)) or not 0.0 < threshold < 1.0:
        raise UsageError(
            f"tokens of shape {tuple(tokens.shape)}, threshold {threshold}",
            expected="(B, 2 L) ids, L >= 2, whose second half repeats the first, and a threshold in (0, 1)",
            do="make them with repeated_tokens",
        )
    runs = load(stream, model)
    places = _places(length)
    found = torch.zeros(stream.spec.n_layers, stream.spec.n_heads, len(BEHAVIOURS), dtype=accumulate)

    def see(kind: Kind, layer: int, pattern: Tensor) -> None:
        del kind
        own = pattern[0].to(accumulate).cpu()  # (heads, T, T)
        found[layer] += torch.stack([own[:, query, key].mean(1) for query, key in places], 1)

    with watching(runs, stream, ("pattern",), see):
        for done, sequence in enumerate(tokens, 1):
            forward(runs, sequence[None])
            if progress is not None:
                progress(done, len(tokens))
    return _record(stream, (found / len(tokens)).flatten(0, 1), length, len(tokens), threshold)


def _record(stream: Stream, scores: Tensor, length: int, sequences: int, threshold: float) -> Record:
    names = list(BEHAVIOURS)
    told = [_label(dict(zip(names, row, strict=True)), threshold) for row in scores.tolist()]
    heads = tuple(f"L{i}H{h}" for i in range(stream.spec.n_layers) for h in range(stream.spec.n_heads))
    return Record(
        "labels",
        (Axis("head", heads),),
        (
            *(Column(name, scores[:, i], "1, in [0, 1]", BEHAVIOURS[name]) for i, name in enumerate(names)),
            Column("label", tuple(told), "", f"the largest of these, where above {threshold}"),
        ),
        parameters={"length": length, "sequences": sequences, "threshold": threshold},
        stamp={"text": f"{sequences} sequences of {length} tokens, said twice"},
        provenance=stream.provenance,
    )


def _label(scores: dict[str, float], threshold: float) -> str | None:
    resting = scores.pop("first_token")
    best = max(scores, key=lambda name: scores[name])
    if scores[best] > threshold:
        return best
    return "first_token" if resting > threshold else None


def _places(length: int) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of every behaviour, over 2 length tokens."""
    later, second = torch.arange(1, 2 * length), torch.arange(length, 2 * length)
    return [
        (later, later - 1),
        (second, second - length + 1),
        (second, second - length),
        (later, later),
        (later, torch.zeros_like(later)),
    ]
