"""The directions that a model itself uses in the stream: those of neurons, and those of heads' strongest channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import circuits
from virtual_weights.errors import UsageError
from virtual_weights.stream import Stream

Kind = Literal["out", "in", "gate", "ov"]

KINDS: tuple[Kind, ...] = ("out", "in", "gate", "ov")


def check_kind(kind: str) -> None:
    """Refuse a kind of directions that is none."""
    if kind not in KINDS:
        raise UsageError(f"no directions {kind!r}", expected=", ".join(KINDS), do="choose one of these")


def dictionary(stream: Stream, kind: Kind, sample: int | None = None, seed: int = 0) -> tuple[tuple[str, ...], Tensor]:
    """Unit directions of one kind, with the names of what they belong to.

    Args:
        stream: the model.
        kind: ``"out"``: what neurons write; ``"in"``: what they read (the up row where gated), ``"gate"``: the gate's
            row, both with the norm folded; ``"ov"``: the strongest direction that each head writes, by its circuit.
        sample: at most this many, chosen by the seed; None for all.
        seed: of the choice.

    Returns:
        Names, in order of depth, and rows (N, d) float32 of length 1. A direction of length 0 is not there.

    Raises:
        UsageError: the model has no such directions.
    """
    check_kind(kind)
    parts = list(_heads(stream) if kind == "ov" else _neurons(stream, kind))
    if not parts:
        raise UsageError(
            f"this model has no directions {kind!r}",
            expected="MLPs for out and in, a gate for gate, heads for ov",
            do="choose another kind",
        )
    names = [name for each, _ in parts for name in each]
    rows = torch.cat([rows for _, rows in parts])
    size = torch.linalg.vector_norm(rows, dim=1)
    at = (size > 0).nonzero()[:, 0]
    if sample is not None and sample < len(at):
        chosen = torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))[:sample]
        at = at[chosen.sort().values]
    return tuple(names[i] for i in at.tolist()), rows[at] / size[at, None]


def _neurons(stream: Stream, kind: Kind) -> list[tuple[list[str], Tensor]]:
    if kind == "gate" and not stream.spec.gated:
        return []
    found = list[tuple[list[str], Tensor]]()
    for component in stream.components:
        layer = component.label.layer
        if component.kind == "mlp":
            if kind == "out":
                rows = stream.write("mlp", layer)[0].T
            else:
                rows = stream.read("gate" if kind == "gate" else "up" if stream.spec.gated else "in", layer).maps[0]
            found.append(([f"L{layer}N{i}" for i in range(len(rows))], rows.float()))
    return found


def _heads(stream: Stream) -> list[tuple[list[str], Tensor]]:
    found = list[tuple[list[str], Tensor]]()
    for layer in stream.attention_layers:
        _, s, vh = torch.linalg.svd(circuits(stream, "O", layer), full_matrices=False)
        names = [str(c.label) for c in stream.heads_of(layer)]
        found.append((names, (vh[:, 0] * (s[:, :1] > 0)).float()))
    return found
