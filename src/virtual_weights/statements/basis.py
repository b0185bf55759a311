"""L1: is the stream free of a privileged basis?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from virtual_weights.architecture import Norm
from virtual_weights.errors import VirtualWeightsError
from virtual_weights.linalg import FLOAT64_ROUNDING, accumulate, haar_orthogonal, random_generator
from virtual_weights.linalg.numerics import exactness_bound
from virtual_weights.runtime.running.model import load, turned_module
from virtual_weights.runtime.running.run import Run
from virtual_weights.statements.evidence import Evidence, Figure, Finding, cannot_tell, present
from virtual_weights.stream import Group, Stream, scale
from virtual_weights.stream.effective import norm_gain
from virtual_weights.stream.turned import Turned, random_turn

_STATES = 64
_PROMPT = 32  # first tokens of a run whose logits are compared


def no_privileged_basis(evidence: Evidence) -> Finding:
    """L1: turn every reader and writer by one random orthogonal matrix, with the norm folded and without.

    Where there is a run, its logits decide: in float64, of the model, of the turned one, of one turned with the gains
    left in the norm, and of one that another invertible matrix turns. Else virtual weights and norm scalars do.
    """
    stream = evidence.stream
    if "embed" not in stream.groups or not evidence.heads:
        return cannot_tell("the checkpoint lacks its embedding or its attention")
    generator = random_generator(evidence.seed)
    turn = haar_orthogonal(stream.d_model, generator)
    skew = turn * torch.logspace(-0.5, 0.5, stream.d_model, dtype=accumulate)  # invertible, not orthogonal
    bare = replace(stream, folded=False)
    groups = evidence.sample(stream.groups.heads[1:] or stream.groups.heads, 4)
    layer_norm = stream.spec.centring
    states = _states(evidence)
    if not len(states):
        return cannot_tell("every row of the embedding is zero")
    centred = states - states.mean(-1, keepdim=True) if layer_norm else states
    figures: dict[str, Figure] = {
        "virtual_weights_folded": max(_moved(stream, group, turn) for group in groups),
        "virtual_weights_gains_left_in_place": max(_moved(bare, group, turn) for group in groups),
        "norm_scalar_orthogonal_centred": _scalar_moved(centred, turn, "rms"),
        "norm_scalar_orthogonal": _scalar_moved(states, turn, "layer" if layer_norm else "rms"),
        "norm_scalar_not_orthogonal": _scalar_moved(centred, skew, "rms"),
    }
    figures["kurtosis_of_writes"] = _kurtosis(stream, groups)
    figures["kurtosis_of_writes_turned"] = _kurtosis(stream, groups, turn)
    condition = (
        f"gains are folded into the readers,{' writers are centred,' if layer_norm else ''} and the map is orthogonal"
    )
    if evidence.run is not None:
        changes = _logit_changes(evidence.run, evidence.seed)
        if not isinstance(changes, str):
            normed = any(norm is not None for norm in stream.spec.norms)
            return _by_logits(
                changes, exactness_bound(accumulate) * stream.states, condition if normed else None, figures
            )
        figures["logits"] = changes
    folded = max(float(figures[n] or 0) for n in ("virtual_weights_folded", "norm_scalar_orthogonal_centred"))
    plain = max(float(figures[n] or 0) for n in ("virtual_weights_gains_left_in_place", "norm_scalar_orthogonal"))
    if folded > FLOAT64_ROUNDING:
        why = f"rotation changes virtual weights or norm scalars by {folded:.2g}, although the norm is folded"
        return Finding("fails", why, None, figures)
    if plain <= FLOAT64_ROUNDING:
        return Finding("holds", "rotation changes nothing, even with the gains left in the norm", None, figures)
    why = f"rotation changes the figures by {folded:.1g} with the norm folded, by {plain:.2g} with the norm as it is"
    return Finding("holds under", why, condition, figures)


_TURNS = {
    "rotated": (True, False),
    "rotated_with_the_gains_in_the_norm": (False, False),
    "not_orthogonal": (True, True),
}


@torch.no_grad()
def _logit_changes(run: Run, seed: int) -> dict[str, float] | str:
    """By kind of turn, how far logits on a prompt move, relatively, and their KL divergence; or why that is not known.

    LayerNorm subtracts the mean in whatever basis it stands: the turn leaves (1, ..., 1) where it is.
    """
    stream, tokens = run.stream, run.prompt(_PROMPT).chunks[0][None]
    turn = random_turn(stream, seed)
    stretch = torch.logspace(-0.25, 0.25, stream.d_model, dtype=accumulate)
    changes = dict[str, float]()
    try:
        before = load(stream, dtype=accumulate)(tokens).logits[0].double()
        for name, (fold, skew) in _TURNS.items():
            module = turned_module(Turned(stream, turn * stretch if skew else turn, fold))
            after = module(tokens).logits[0].double()
            changes[f"logits_{name}"] = float((after - before).norm() / before.norm())
            kl = torch.nn.functional.kl_div(
                after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum"
            )
            changes[f"kl_{name}"] = float(kl) / len(before)
    except VirtualWeightsError as error:  # an architecture that cannot hold a turned stream, or cannot run
        return str(error).partition("\n")[0]
    return changes if changes["logits_not_orthogonal"] > 0 else "they do not depend on the stream"


def _by_logits(changes: dict[str, float], bound: float, condition: str | None, figures: dict[str, Figure]) -> Finding:
    """The verdict by the logits; without norms there is no condition, and any invertible map may turn the stream."""
    folded, plain, skewed = (changes[f"logits_{name}"] for name in _TURNS)
    figures |= changes
    figures["largest_change_that_is_rounding"] = bound
    if not folded <= bound:
        why = f"the rotated model's logits differ by {folded:.2g} of their size, although the norm is folded"
        return Finding("fails", why, None, figures)
    if skewed <= bound and condition is None:
        why = f"without norms any invertible map leaves logits as they are: a random one changes them by {skewed:.1g}"
        return Finding("holds", why, None, figures)
    if skewed <= bound:
        return replace(cannot_tell("even a map that is not orthogonal leaves the logits as they are"), figures=figures)
    if plain <= bound:
        why = f"rotation changes logits by {max(folded, plain):.1g} of their size, even with the gains left in the norm"
        return Finding("holds", why, None, figures)
    why = f"rotation changes logits by {folded:.1g} of their size with the norm folded, by {plain:.2g} with the gains "
    why += f"left in the norm, and a map that is not orthogonal by {skewed:.2g}"
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
    if stream.spec.centring:
        writer = writer - writer.mean(0)
    read = stream.read("K", group).maps[0].to(accumulate)
    weight = None if stream.folded else norm_gain(stream, "norm", group, group.norm)
    gain = 1.0 if weight is None else weight.to(accumulate)
    before, after = (read * gain) @ writer, ((read @ turn.T) * gain) @ (turn @ writer)
    moved, size = float(torch.linalg.norm(after - before)), float(torch.linalg.norm(before))
    return moved / size if size else moved


def _scalar_moved(states: Tensor, map: Tensor, norm: Literal["rms", "layer"]) -> float:
    """Largest relative change of the norm scalar when states (n, d) are mapped."""
    before, after = (scale(x, Norm(norm, 0.0)) for x in (states, states @ map.T))
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
