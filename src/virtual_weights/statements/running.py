"""L3, T7: what needs a run, on a prompt or on text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import embedded, frozen_blocks
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.linalg import accumulate
from virtual_weights.record import Record
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell, present
from virtual_weights.stream import OperatingPoint, Stream, scale

_EXACT = (
    1e-3  # relative: a run in float32 through many blocks keeps three digits of every norm scalar, or it is another
)
_COSINE = 0.5
_FEWEST = 8  # tokens
_CLEARED, _SELDOM, _ALWAYS = 0.5, 0.1, 0.9  # of what the neuron reads; shares of tokens
_TWO_MODES = 5 / 9  # Sarle's coefficient of a uniform law
_NO_RUN = "nothing was run: pass an operating point, a prompt's attention patterns, norm scalars and gates"


def composed_blocks(bench: Bench) -> Finding:
    """L3: all blocks frozen at a prompt, one after the other, from the embeddings on: do they meet its norm scalars?"""
    stream, point = bench.stream, bench.point
    if point is None:
        return cannot_tell(_NO_RUN)
    x = embedded(stream, point)
    worst, site, blocks, linear = 0.0, "", 0, 0.0
    for block in frozen_blocks(stream, point):
        for part in block.parts:
            off = _off(x, point.scalars[part.label], stream)
            worst, site = max((worst, site), (off, part.label))
        x = block.apply(x)
        # what doubling the state would do to a linear block, and to the block as it is: the norm takes the factor away
        linear = max(linear, float(block.linear(x).norm() / x.norm()))
        blocks += 1
    worst, site = max((worst, site), (_off(x, point.scalars["final"], stream), "final"))
    evidence: dict[str, Figure] = {
        "tokens": len(point.tokens),
        "blocks": blocks,
        "largest_relative_error_of_a_norm_scalar": worst,
        "at": site,
        "largest_relative_update": linear,
    }
    if worst > _EXACT:
        why = f"the frozen blocks miss the run's norm scalar at {site} by {worst:.2g}"
        return Finding("fails", why, None, evidence, (site,))
    if linear == 0:
        return Finding("holds", "no block of this model does anything on this prompt", None, evidence)
    why = f"{blocks} frozen blocks in sequence meet every norm scalar of the run to {worst:.1g}"
    condition = "attention patterns, norm scalars and gates are held at one prompt's values"
    return Finding("holds under", why, condition, evidence)


def conditional_clearing(bench: Bench) -> Finding:
    """T7: over the tokens of a text or a prompt, how much of what it reads does each weakening neuron clear?"""
    if "cleared" in bench.runs:
        seen = _on_text(bench, bench.runs["cleared"])
    elif bench.point is not None:
        seen = _on_prompt(bench.stream, bench.point)
    else:
        return cannot_tell(_NO_RUN)
    if seen.tokens < _FEWEST:
        return cannot_tell(f"{seen.tokens} tokens say nothing of a spread; {_FEWEST} would")
    if not seen.names:
        return cannot_tell(f"no neuron has a cosine below -{_COSINE} between what it reads and writes")
    always, conditional = seen.share >= seen.always, (seen.share >= seen.seldom) & (seen.share < seen.always)
    evidence: dict[str, Figure] = {
        "tokens": seen.tokens,
        "weakening_neurons": len(seen.names),
        "conditional": int(conditional.sum()),
        "unconditional": int(always.sum()),
        "rare": int(((seen.share > 0) & (seen.share < seen.seldom)).sum()),
        "never": int((seen.share == 0).sum()),
        "median_mean_coefficient": float(seen.mean.median()),
        "median_spread": float(seen.spread.median()),
        "median_bimodality": _median(seen.bimodality),
        "conditional_with_two_modes": int((conditional & (seen.bimodality > _TWO_MODES)).sum()),
        "cleared_means": f"more than {seen.clears:g} of what the neuron reads",
    }
    if not bool(conditional.any()):
        why = f"none of {len(seen.names)} weakening neurons clears on some tokens and not on others"
        return Finding("fails", why, None, evidence)
    at = int(torch.where(conditional, seen.spread, -1.0).argmax())
    told = f"{seen.names[at]}: clears on {float(seen.share[at]):.0%} of tokens, coefficient "
    told += f"{float(seen.mean[at]):.2f} ± {float(seen.spread[at]):.2f}"
    why = f"{int(conditional.sum())} of {len(seen.names)} weakening neurons clear on some tokens and not on others"
    return Finding("holds", why, None, evidence, (told,))


@dataclass(frozen=True, eq=False)
class _Seen:
    """Weakening neurons over so many tokens: share of tokens cleared, and their coefficients' moments, (n,) each."""

    tokens: int
    names: list[str]
    share: Tensor
    mean: Tensor
    spread: Tensor
    bimodality: Tensor
    clears: float = _CLEARED
    always: float = _ALWAYS
    seldom: float = _SELDOM


def _on_text(bench: Bench, run: Record) -> _Seen:
    cosine = bench.ask(Neurons()).numbers("cosine")
    labels = bench.ask(Neurons()).axis("neuron").labels
    names = [labels[i] for i in (cosine < -_COSINE).nonzero()[:, 0].tolist()]
    own = run.select("eraser", names)
    share, mean, spread, bimodality = (own.numbers(name) for name in ("cleared", "mean", "spread", "bimodality"))
    limits = {name: float(run.parameters[name]) for name in ("clears", "always", "seldom")}
    return _Seen(int(run.stamp["tokens"]), names, share, mean, spread, bimodality, **limits)


def _on_prompt(stream: Stream, point: OperatingPoint) -> _Seen:
    names, each = _clearing(stream, point)
    share = (each > _CLEARED).to(accumulate).mean(0)
    spread = (each - each.mean(0)).square().mean(0).sqrt()  # std() warns where there is no neuron
    return _Seen(len(point.tokens), names, share, each.mean(0), spread, _bimodality(each))


def _off(x: Tensor, recorded: Tensor, stream: Stream) -> float:
    own = scale(x, stream.spec.norm, stream.spec.norm_eps)
    return float(((own - recorded.to(accumulate)).abs() / recorded.to(accumulate)).max())


def _clearing(stream: Stream, point: OperatingPoint) -> tuple[list[str], Tensor]:
    """Names of weakening neurons and their clearing coefficient ``-<w_in, w_out> gate / s``, (tokens, neurons)."""
    names, columns = list[str](), list[Tensor]()
    for layer, gates in sorted(point.gates.items()):
        read = stream.read("up" if stream.spec.gated else "in", layer).maps[0].to(accumulate)
        write = stream.write("mlp", layer)[0].T.to(accumulate)
        inner = (read * write).sum(1)
        at = (inner / (read.norm(dim=1) * write.norm(dim=1)) < -_COSINE).nonzero()[:, 0]
        names += [f"L{layer}N{int(i)}" for i in at]
        factor = gates.to(accumulate)[:, at] / point.scalars[f"L{layer}.mlp"].to(accumulate)[:, None]
        columns.append(-inner[at] * factor)
    return names, torch.cat(columns, 1) if columns else torch.empty(len(point.tokens), 0, dtype=accumulate)


def _median(values: Tensor) -> float | None:
    there = present(values)
    return float(there.median()) if len(there) else None


def _bimodality(values: Tensor) -> Tensor:
    """Sarle's coefficient of every column, (skewness^2 + 1) / kurtosis: 5/9 for a uniform law, 1 for two points."""
    centred = values - values.mean(0)
    second = centred.square().mean(0)
    return (centred.pow(3).mean(0).square() / second**3 + 1) / (centred.pow(4).mean(0) / second.square())
