"""L3, T7: what only a run shows, on a prompt or on text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import embedded, frozen_blocks
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.linalg import THREE_DIGITS, CentralMoments, accumulate
from virtual_weights.runtime.fate.erased import Erased
from virtual_weights.runtime.flow.observation import operating_point
from virtual_weights.statements.evidence import Evidence, Figure, Finding, cannot_tell, present
from virtual_weights.stream import OperatingPoint, Stream

_PROMPT = 32  # first tokens of a run that serve as the prompt
_FEWEST = 8  # tokens
_TWO_MODES = 5 / 9  # Sarle's coefficient of a uniform law
_NO_RUN = "the model was not run; this needs a run or an operating point"


def composed_blocks(evidence: Evidence) -> Finding:
    """L3: all blocks frozen at a prompt, one after the other, from the embeddings on: do they meet its norm scalars?"""
    stream, point = evidence.stream, evidence.point
    if point is None and evidence.run is not None:
        point = operating_point(evidence.run.prompt(_PROMPT))
    if point is None:
        return cannot_tell(_NO_RUN)
    x = embedded(stream, point)
    errors, update = list[tuple[float, str]](), 0.0
    blocks = 0
    for block in frozen_blocks(stream, point):
        errors += [_scalar_error(stream, point, frozen.group.id, x) for frozen in block.groups]
        x = block.apply(x)
        # what doubling the state would change in a linear block; in the model the norm takes the factor away
        update = max(update, float(block.linear(x).norm() / x.norm()))
        blocks += 1
    worst, site = max([*errors, _scalar_error(stream, point, "unembed", x)])
    figures: dict[str, Figure] = {
        "tokens": len(point.tokens),
        "blocks": blocks,
        "largest_relative_error_of_a_norm_scalar": worst,
        "at": site,
        "largest_relative_update": update,
    }
    if worst > THREE_DIGITS:
        why = f"the frozen blocks differ from the run's norm scalar at {site} by {worst:.2g}"
        return Finding("fails", why, None, figures, (site,))
    if update == 0:
        return Finding("holds", "no block of this model does anything on this prompt", None, figures)
    why = f"{blocks} frozen blocks in sequence reproduce every norm scalar of the run to {worst:.1g}"
    condition = "attention patterns, norm scalars and gates are fixed at their values on one prompt"
    return Finding("holds under", why, condition, figures)


def conditional_clearing(evidence: Evidence) -> Finding:
    """T7: over the tokens of a text or a prompt, how much of what it reads does each weakening neuron clear?"""
    tokens = 0 if evidence.point is None else len(evidence.point.tokens)
    if evidence.run is not None:
        tokens = evidence.run.count
    if not tokens:
        return cannot_tell(_NO_RUN)
    if tokens < _FEWEST:
        return cannot_tell(f"{tokens} tokens are too few to show a spread; {_FEWEST} are needed")
    clearing = _clearing(evidence) if evidence.stream.groups.mlps else None
    if clearing is None or not clearing.names:
        return cannot_tell(f"no neuron has a cosine below -{Neurons().threshold} between what it reads and writes")
    names, share, limits = clearing.names, clearing.share, Erased()
    conditional = (share >= limits.seldom) & (share < limits.always)
    count = int(conditional.sum())
    bimodality = present(clearing.bimodality)
    figures: dict[str, Figure] = {
        "tokens": tokens,
        "weakening_neurons": len(names),
        "conditional": count,
        "unconditional": int((share >= limits.always).sum()),
        "rare": int(((share > 0) & (share < limits.seldom)).sum()),
        "never": int((share == 0).sum()),
        "median_mean_coefficient": float(clearing.mean.median()),
        "median_spread": float(clearing.spread.median()),
        "median_bimodality": float(bimodality.median()) if len(bimodality) else None,
        "conditional_with_two_modes": int((conditional & (clearing.bimodality > _TWO_MODES)).sum()),
        "cleared_means": f"more than {limits.clears:g} of what the neuron reads",
    }
    if not count:
        why = f"none of {len(names)} weakening neurons clears on some tokens and not on others"
        return Finding("fails", why, None, figures)
    widest = int(torch.where(conditional, clearing.spread, -1.0).argmax())
    witness = f"{names[widest]}: clears on {float(share[widest]):.0%} of tokens, coefficient "
    witness += f"{float(clearing.mean[widest]):.2f} ± {float(clearing.spread[widest]):.2f}"
    why = f"{count} of {len(names)} weakening neurons clear on some tokens and not on others"
    return Finding("holds", why, None, figures, (witness,))


@dataclass(frozen=True, eq=False)
class _Clearing:
    """Weakening neurons: on what share of tokens each clears, and the moments of its coefficient, (n,) each."""

    names: list[str]
    share: Tensor
    mean: Tensor
    spread: Tensor
    bimodality: Tensor


def _clearing(evidence: Evidence) -> _Clearing:
    """From the run; without one from the point, at which the coefficient is ``-<w_in, w_out> gate / s``."""
    neurons, threshold, point = evidence.ask(Neurons()), Neurons().threshold, evidence.point
    weakening = neurons.numbers("cosine") < -threshold
    labels = neurons.axis("neuron").labels
    names = [labels[i] for i in weakening.nonzero()[:, 0].tolist()]
    if evidence.run is not None or point is None:
        erased = evidence.ask(Erased()).select("eraser", names)
        return _Clearing(names, *(erased.numbers(column) for column in ("erased", "mean", "spread", "bimodality")))
    gates = [point.gates[group.id] / point.scalars[group.id][:, None] for group in evidence.stream.groups.mlps]
    coefficients = neurons.numbers("gain")[weakening] * torch.cat(gates, 1)[:, weakening].to(accumulate)
    moments = CentralMoments.of(coefficients)
    share = (coefficients > Erased().clears).to(accumulate).mean(0)
    bimodality = moments.bimodality(torch.finfo(gates[0].dtype).eps)
    return _Clearing(names, share, moments.mean, moments.variance.sqrt(), bimodality)


def _scalar_error(stream: Stream, point: OperatingPoint, group: str, x: Tensor) -> tuple[float, str]:
    """Largest relative difference between the norm scalar of a state and that in a point, with the group's id."""
    recorded = point.scalars[group].to(accumulate)
    return float(((stream.scale(x) - recorded).abs() / recorded).max()), group
