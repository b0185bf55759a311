"""L1: is the stream free of a privileged basis?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from virtual_weights.linalg import FLOAT64_ROUNDING, accumulate, haar_orthogonal, random_generator
from virtual_weights.statements.evidence import Evidence, Figure, Finding, cannot_tell, present
from virtual_weights.stream import Group, Stream, scale

_STATES = 64


def no_privileged_basis(evidence: Evidence) -> Finding:
    """L1: turn every reader and writer by one random orthogonal matrix, with the norm folded and without."""
    stream = evidence.stream
    if "embed" not in stream.groups or not evidence.heads:
        return cannot_tell("the checkpoint lacks its embedding or its attention")
    generator = random_generator(evidence.seed)
    turn = haar_orthogonal(stream.d_model, generator)
    skew = turn * torch.logspace(-0.5, 0.5, stream.d_model, dtype=accumulate)  # invertible, not orthogonal
    bare = replace(stream, folded=False)
    groups = evidence.sample(stream.groups.heads[1:] or stream.groups.heads, 4)
    layer_norm = stream.spec.norm == "layer"
    states = _states(evidence)
    if not len(states):
        return cannot_tell("every row of the embedding is zero")
    centred = states - states.mean(-1, keepdim=True) if layer_norm else states
    figures: dict[str, Figure] = {
        "virtual_weights_folded": max(_moved(stream, group, turn) for group in groups),
        "virtual_weights_gains_left_in_place": max(_moved(bare, group, turn) for group in groups),
        "norm_scalar_orthogonal_centred": _scalar_moved(centred, turn, "rms"),
        "norm_scalar_orthogonal": _scalar_moved(states, turn, stream.spec.norm),
        "norm_scalar_not_orthogonal": _scalar_moved(centred, skew, "rms"),
    }
    figures["kurtosis_of_writes"] = _kurtosis(stream, groups)
    figures["kurtosis_of_writes_turned"] = _kurtosis(stream, groups, turn)
    folded = max(float(figures[n] or 0) for n in ("virtual_weights_folded", "norm_scalar_orthogonal_centred"))
    plain = max(float(figures[n] or 0) for n in ("virtual_weights_gains_left_in_place", "norm_scalar_orthogonal"))
    if folded > FLOAT64_ROUNDING:
        why = f"rotation changes virtual weights or norm scalars by {folded:.2g}, although the norm is folded"
        return Finding("fails", why, None, figures)
    if plain <= FLOAT64_ROUNDING:
        return Finding("holds", "rotation changes nothing, even with the gains left in the norm", None, figures)
    condition = (
        f"gains are folded into the readers,{' writers are centred,' if layer_norm else ''} and the map is orthogonal"
    )
    why = f"rotation changes the figures by {folded:.1g} with the norm folded, by {plain:.2g} with the norm as it is"
    return Finding("holds under", why, condition, figures)


def _states(evidence: Evidence) -> Tensor:
    """Some states of the stream at its beginning, (n, d)."""
    embed = evidence.stream.write("embed")[0]
    tokens = evidence.sample(range(embed.shape[1]), _STATES)
    states = embed[:, tokens].T.to(accumulate)
    return states[states.abs().sum(1) > 0]


def _moved(stream: Stream, group: Group, turn: Tensor) -> float:
    """Relative change, when all is turned, of what a group's keys read of a head of the first attention.

    Where the stream is not folded, the gain stays in the norm, between a turned reader and a turned writer.
    """
    writer = stream.write(stream.groups.heads[0])[0].to(accumulate)
    if stream.spec.norm == "layer":
        writer = writer - writer.mean(0)
    read = stream.read("K", group).maps[0].to(accumulate)
    weight = None if stream.folded else stream.weight("norm", group)
    gain = 1.0 if weight is None else weight.to(accumulate)
    before, after = (read * gain) @ writer, ((read @ turn.T) * gain) @ (turn @ writer)
    moved, size = float(torch.linalg.norm(after - before)), float(torch.linalg.norm(before))
    return moved / size if size else moved


def _scalar_moved(states: Tensor, map: Tensor, norm: Literal["rms", "layer"]) -> float:
    """Largest relative change of the norm scalar when states (n, d) are mapped."""
    before, after = (scale(x, norm, 0.0) for x in (states, states @ map.T))
    return float(((after - before).abs() / before).max())


def _kurtosis(stream: Stream, groups: Sequence[Group], turn: Tensor | None = None) -> float | None:
    """Mean over heads' output columns of the kurtosis over the stream's coordinates; 3 has no preferred basis.

    Columns that are zero have none.
    """
    rows = torch.cat([stream.write(group).to(accumulate).transpose(1, 2).flatten(0, 1) for group in groups])
    rows = rows if turn is None else rows @ turn.T
    rows = rows - rows.mean(1, keepdim=True)
    kurtosis = present(rows.pow(4).mean(1) / rows.square().mean(1).square())
    return float(kurtosis.mean()) if len(kurtosis) else None
