"""L3, T7: what only a run shows, on a prompt or on text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import embedded, frozen_blocks
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.linalg import THREE_DIGITS, CentralMoments, accumulate
from virtual_weights.runtime.fate.erased import Erased
from virtual_weights.runtime.flow.observation import operating_point
from virtual_weights.runtime.running.activations import prompted
from virtual_weights.runtime.running.hooks import activation
from virtual_weights.statements.evidence import Evidence, Figure, Finding, cannot_tell, present
from virtual_weights.stream import Group, OperatingPoint, Stream, through_norm
from virtual_weights.stream.operating_point import gate_factor

_PROMPT = 32  # first tokens of a run that serve as the prompt
_FEWEST = 8  # tokens
_TWO_MODES = 5 / 9  # Sarle's coefficient of a uniform law
_NO_RUN = "the model was not run; this needs a run or an operating point"


def composed_blocks(evidence: Evidence) -> Finding:
    """L3: all blocks frozen at a prompt, one after the other, from the embeddings on: do they meet the run's states?

    Where only a point was passed, which has no states, what it holds of them must be met: every norm scalar, and every
    gate of every MLP, which are more figures than a state has.
    """
    stream, point, states = evidence.stream, evidence.point, dict[int, Tensor]()
    if evidence.run is not None:
        prompt = evidence.run.prompt(_PROMPT) if point is None else replace(evidence.run, chunks=(point.tokens,))
        point = operating_point(prompt) if point is None else point
        activations = prompted(prompt)
        states = {state: activations.state(state) for state in range(stream.states)}
    if point is None:
        return cannot_tell(_NO_RUN)
    x, blocks, update = embedded(stream, point), 0, 0.0
    errors = list[tuple[float, str]]()
    for block in frozen_blocks(stream, point):
        for frozen in block.groups:
            errors += _errors(stream, point, frozen.group, x, states)
        x = block.apply(x)
        # what doubling the state would change in a linear block; in the model the norm takes the factor away
        update = max(update, float(block.linear(x).norm() / x.norm()))
        blocks += 1
    worst, site = max([*errors, *_errors(stream, point, stream.groups["unembed"], x, states)], key=_worst)
    what = "states" if states else "norm scalars and gates"
    figures: dict[str, Figure] = {
        "tokens": len(point.tokens),
        "blocks": blocks,
        "compared": what,
        "largest_relative_error": worst,
        "at": site,
        "largest_relative_update": update,
    }
    if not worst <= THREE_DIGITS:
        why = f"what the frozen blocks make differs from the {what} of the run at {site} by {worst:.2g}"
        return Finding("fails", why, None, figures, (site,))
    if update == 0:
        return Finding("holds", "no block of this model does anything on this prompt", None, figures)
    why = f"{blocks} frozen blocks in sequence reproduce the {what} of the run at every token to {worst:.1g}"
    condition = "attention patterns, norm scalars and gates are fixed at their values on one prompt"
    return Finding("holds under", why, condition, figures)


def _worst(error: tuple[float, str]) -> float:
    return torch.inf if error[0] != error[0] else error[0]


def _errors(
    stream: Stream, point: OperatingPoint, group: Group, x: Tensor, states: Mapping[int, Tensor]
) -> Iterator[tuple[float, str]]:
    """How far a state (T, d) is, relatively and at the worst token, from what the run shows that a group reads."""
    if group.reads is not None and group.reads in states:
        yield _relative(through_norm(stream, x), through_norm(stream, states[group.reads].to(x))), group.id
        return
    s = point.scalars[group.id].to(x)
    yield _relative(stream.scale(x, group)[:, None], s[:, None]), group.id
    if group.kind == "mlp":
        act, port = activation(stream, group), group.ports[0]
        read = stream.read(port, group)
        pre = (x / s[:, None]) @ read.maps[0].to(accumulate).T
        pre = pre if read.constants is None else pre + read.constants[0].to(accumulate)
        gates = act(pre) if port == "gate" else gate_factor(act, pre)
        yield _relative(gates, point.gates[group.id].to(x)), group.id


def _relative(values: Tensor, recorded: Tensor) -> float:
    """Largest distance between rows over the length of the recorded one; 0 where both are 0."""
    distance, size = (torch.linalg.vector_norm(y, dim=-1) for y in (values - recorded, recorded))
    return float(torch.where(distance > 0, distance / size, 0.0).max())


def conditional_clearing(evidence: Evidence) -> Finding:
    """T7: over the tokens of a text or a prompt, on how many does each weakening neuron erase what it reads?"""
    if not evidence.stream.groups.mlps:
        return cannot_tell("the checkpoint holds no MLP")
    tokens = 0 if evidence.point is None else len(evidence.point.tokens)
    if evidence.run is not None:
        tokens = evidence.run.count
    if not tokens:
        return cannot_tell(_NO_RUN)
    if tokens < _FEWEST:
        return cannot_tell(f"{tokens} tokens are too few to show a spread; {_FEWEST} are needed")
    clearing = _clearing(evidence)
    if not clearing.names:
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
        "erased_means": f"{limits.clears:g} to {2 - limits.clears:g} of what the neuron reads",
    }
    some = f"{limits.seldom:.0%} to {limits.always:.0%} of {tokens} tokens"
    if not count:
        why = f"none of {len(names)} weakening neurons erases on {some}"
        return Finding("fails", why, None, figures)
    widest = int(torch.where(conditional, clearing.spread, -1.0).argmax())
    witness = f"{names[widest]}: erases on {float(share[widest]):.0%} of tokens, coefficient "
    witness += f"{float(clearing.mean[widest]):.2f} ± {float(clearing.spread[widest]):.2f}"
    why = f"{count} of {len(names)} weakening neurons erase on {some}"
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
    clears = Erased().clears
    share = ((coefficients >= clears) & (coefficients <= 2 - clears)).to(accumulate).mean(0)
    bimodality = moments.bimodality(torch.finfo(gates[0].dtype).eps)
    return _Clearing(names, share, moments.mean, moments.variance.sqrt(), bimodality)
