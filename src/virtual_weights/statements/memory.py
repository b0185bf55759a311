"""T6, L11, L12: clearing by neurons and heads, and when it is worth it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import stored_eps
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate, eigenvalues, rank_correlation
from virtual_weights.record import Record
from virtual_weights.runtime.fate.erased import Erased
from virtual_weights.runtime.fate.frontier import Frontier
from virtual_weights.runtime.fate.persistence import Persistence
from virtual_weights.statements.evidence import Evidence, Figure, Finding, cannot_tell, present

_CLEARED = 0.5  # at most this much of a direction is left: 75% of its energy is gone
_EFFICIENT = 0.5  # -cos(w_in, w_out) of a neuron that writes against what it reads
_STANDS = "where_the_model_stands"
_PRICES = (0.1, 0.25, 0.5, 0.75, 0.9)  # quantiles of utility over interference that serve as prices
_SEQUENCES = 2  # of a run, for its frontier: all that flows is in memory at once


def clearing(evidence: Evidence) -> Finding:
    """T6: gains of neurons and eigenvalues of heads at norm scalar and slope 1, attention to itself 1; and runs."""
    stream = evidence.stream
    none = torch.empty(0, dtype=accumulate)
    gains, left, negative, witnesses = none, none, none, list[str]()
    if evidence.heads:
        heads = evidence.ask(HeadErasers())
        left, negative = present(heads.numbers("kept")), present(heads.numbers("most_negative"))
        best: list[dict[str, Any]] = list(heads.top(1, "kept", largest=False).rows())
        witnesses += [f"{row['head']}: keeps {row['kept']:.3f} of the direction that it clears best" for row in best]
    if stream.groups.mlps:
        neurons = evidence.ask(Neurons())
        every = neurons.numbers("gain")
        gains, nearest = present(every), int((every - 1).abs().nan_to_num(torch.inf).argmin())
        witnesses.append(f"{neurons.axis('neuron').labels[nearest]}: gain {float(every[nearest]):.3f}")
    if not len(gains) and not len(left):
        return cannot_tell("the checkpoint holds no neuron and no head")
    cleared, acting = int(((gains - 1).abs() <= _CLEARED).sum()), int((left <= _CLEARED).sum())
    positive = gains[gains > 0]
    run_figures, run_witnesses = _while_running(evidence)
    figures: dict[str, Figure] = {
        "norm_scalar_and_slope": 1.0,
        "neurons": len(gains),
        "neurons_that_attenuate": int((positive < 1 - _CLEARED).sum()),
        "neurons_that_clear": cleared,
        "neurons_that_overshoot": int((gains > 1 + _CLEARED).sum()),
        "neurons_that_strengthen": int((gains < 0).sum()),
        "median_positive_gain": float(positive.median()) if len(positive) else None,
        "heads": len(left),
        "heads_with_a_cleared_direction": acting,
        "heads_with_a_negative_eigenvalue": len(negative),
        "most_dimensions_one_of_them_can_clear": max((group.width for group in stream.groups.heads), default=1),
        "d_model": stream.d_model,
        **run_figures,
    }
    if not len(positive) and not len(negative):
        return Finding("fails", "no neuron and no head writes against anything that it reads", None, figures)
    wide = _whole_stream(evidence)
    if wide:
        return Finding("holds", f"{wide} clears the whole stream", None, figures, (wide,))
    why = (
        f"at norm scalar 1, {cleared} of {len(gains)} neurons and {acting} of {len(left)} heads erase at least 75% of "
    )
    why += "the energy of a direction"
    condition = "gain times slope over norm scalar is 1 on the cleared directions, which number at most the rank"
    return Finding("holds under", why, condition, figures, (*witnesses, *run_witnesses))


def _while_running(evidence: Evidence) -> tuple[dict[str, Figure], list[str]]:
    """What clears while the model runs, and what becomes of what was written, with a witness of each."""
    if evidence.run is None:
        return {}, []
    figures, witnesses = dict[str, Figure](tokens_run=evidence.run.count), list[str]()
    rows: list[dict[str, Any]] = list(evidence.ask(Erased()).rows())
    for kind in ("neuron", "head", "mlp"):
        for verdict in ("unconditional", "conditional", "rare", "overshoots"):
            figures[f"{verdict.replace('overshoots', 'overshooting')}_{kind}s"] = sum(
                (row["kind"], row["verdict"]) == (kind, verdict) for row in rows
            )
    steady = [row for row in rows if (row["kind"], row["verdict"]) == ("neuron", "unconditional")]
    if steady:
        row = min(steady, key=lambda row: (-row["erased"], abs(row["mean"] - 1)))
        witness = f"{row['eraser']}: erases on {row['erased']:.1%} of tokens, coefficient {row['mean']:.3f}"
        witnesses.append(f"{witness} ± {row['spread']:.3f}")
    persistence = evidence.ask(Persistence())
    later = _later(persistence.numbers("projection"))
    least = later.nan_to_num(torch.inf).amin(1)[~later.isnan().all(1)]
    figures["writers_followed"] = len(least)
    figures["share_of_writers_that_fall_below_half"] = float((least < 0.5).double().mean()) if len(least) else None
    if len(least):
        writer, state = divmod(int(later.abs().nan_to_num(torch.inf).argmin()), later.shape[1])
        name, place = persistence.axis("writer").labels[writer], persistence.axis("state").labels[state]
        witnesses.append(f"{name}: {float(later[writer, state]):.3f} of what it wrote is left at state {place}")
    return figures, witnesses


def _later(projection: Tensor) -> Tensor:
    """(writer, state) without the first state that holds what a writer wrote: there nothing has yet erased it."""
    mask = ~projection.isnan()
    first = mask & (mask.cumsum(1) == 1)
    return projection.masked_fill(first, torch.nan)


def efficiency(evidence: Evidence) -> Finding:
    """L11: direction against gain of every neuron."""
    if not evidence.stream.groups.mlps:
        return cannot_tell("the checkpoint holds no MLP")
    record = evidence.ask(Neurons())
    cosine, gain = record.numbers("cosine"), record.numbers("gain")
    efficient, near = -cosine > _EFFICIENT, (gain - 1).abs() <= _CLEARED
    far = efficient & ~near
    count = int(efficient.sum())
    figures: dict[str, Figure] = {
        "neurons": len(present(cosine)),
        "efficient": count,
        "efficient_but_far_from_clearing": int(far.sum()),
        "clearing_within_a_half": int(near.sum()),
        "of_these_efficient": int((near & efficient).sum()),
        "largest_efficiency": float(present(-cosine).max()),
        "rank_correlation_of_efficiency_and_gain": rank_correlation(-cosine, gain),
        "norm_scalar_and_slope": 1.0,
    }
    if not count:
        return cannot_tell(f"no neuron has an efficiency above {_EFFICIENT}, so there is nothing to compare")
    if not bool(far.any()):
        return Finding("holds", f"all {count} efficient neurons have a gain within 0.5 of 1", None, figures)
    best = int(torch.where(far, -cosine, -torch.inf).argmax())
    name = record.axis("neuron").labels[best]
    witness = f"{name}: efficiency {float(-cosine[best]):.3f}, gain {float(gain[best]):.3g}"
    why = f"{int(far.sum())} of {count} neurons with a cosine below -{_EFFICIENT:g} have a gain further than "
    why += f"{_CLEARED:g} from 1"
    condition = "efficiency is about direction alone, not about how much is cleared"
    return Finding("holds under", why, condition, figures, (witness,))


def best_policy(evidence: Evidence) -> Finding:
    """L12: both objectives maximised over what to erase, with utility and interference measured or from the weights."""
    estimated = _estimated_policy(evidence)
    if evidence.run is None:
        return estimated
    try:
        frontier = evidence.ask(Frontier(sequences=_SEQUENCES))
    except UsageError:  # the run has no token whose loss counts, or nothing in it both helps and disturbs
        return estimated
    return _measured_policy(frontier, estimated.figures)


def _measured_policy(frontier: Record, estimated: Mapping[str, Figure]) -> Finding:
    """Policies over what a run measured, price by price; as written, the price never meets m, as if it were 0."""
    rows: list[dict[str, Any]] = [row for row in frontier.rows() if row["agreement"] is not None]
    rows.sort(key=lambda row: row["lambda"])
    if len(rows) < 2:
        return cannot_tell("a single price cannot show what depends on the price")
    figures = {name: value for name, value in estimated.items() if name != _STANDS}
    for row in rows:
        for name in ("erased_by_optimal", "erased_by_model", "agreement"):
            figures[f"measured_{name}_at_price_{row['lambda']:.3g}"] = row[name]
    best = max(rows, key=lambda row: row["agreement"])
    names = {"price": "lambda"} | {name: name for name in ("agreement", "model", "optimal", "keep_all", "erase_all")}
    figures |= {f"{_STANDS}_{name}": best[column] for name, column in names.items()}
    witness = f"at price {best['lambda']:.3g} the model's own erasers agree with the best policy in "
    witness += f"{best['agreement']:.0%} of cases"
    shares: list[float] = [row["erased_by_optimal"] for row in rows]
    if max(shares) == min(shares):
        why = f"in this run the best policy erases {shares[0]:.0%} at each of {len(rows)} prices"
        return Finding("holds", why, None, figures, (witness,))
    why = f"in this run the best policy erases {min(shares):.0%} to {max(shares):.0%} over {len(rows)} prices; the "
    why += "objective as written erases the same at all of them"
    return Finding("fails", why, None, figures, (witness,))


def _estimated_policy(evidence: Evidence) -> Finding:
    """Both objectives at quantiles of utility over interference, from the weights.

    Per writer: utility, the squared composition score with the unembedding; interference, the sum of its squared scores
    with every later head's values but the strongest.
    """
    if not evidence.heads or "unembed" not in evidence.stream.groups:
        return cannot_tell("the checkpoint lacks its attention or its unembedding")
    utility = evidence.ask(Composition("unembed", writers="all")).numbers("score").square()[0]
    values = evidence.ask(Composition("V", writers="all")).numbers("score").square().nan_to_num(0.0)
    interference = values.sum(0) - values.max(0).values
    mask = ~utility.isnan()
    utility, interference = utility[mask], interference[mask]
    figures: dict[str, Figure] = {
        "writers": len(utility),
        "utility": "squared composition score with the unembedding",
        "interference": "squared composition scores with later heads' values, except the strongest",
        _STANDS: "needs a run on text",
    }
    disturbing = interference > 0
    if not bool(disturbing.any()):
        return Finding("holds", "no writer disturbs a second reader, so both objectives keep everything", None, figures)
    ratios = (utility / interference)[disturbing]
    same, written = True, utility < 0  # the price times interference does not meet m, and so decides nothing
    for quantile in _PRICES:
        corrected = utility < float(ratios.quantile(quantile)) * interference
        same = same and torch.equal(written, corrected)
        figures[f"erased_as_written_at_price_{quantile:g}"] = float(written.double().mean())
        figures[f"erased_as_corrected_at_price_{quantile:g}"] = float(corrected.double().mean())
    if same:
        return Finding("holds", "both objectives erase the same at every price", None, figures)
    why = "the objective as written erases the same at every price, because its interference term has no m in it"
    return Finding("fails", why, None, figures)


def _whole_stream(evidence: Evidence) -> str:
    """A head that clears every direction of the stream; '' where there is none, as there cannot be for k < d."""
    if all(group.width < evidence.stream.d_model for group in evidence.stream.groups.heads):
        return ""
    stored = stored_eps(evidence.stream)
    for name in evidence.heads:
        if bool((eigenvalues(evidence.head(name).ov, stored).add(1).abs() <= _CLEARED).all()):
            return name
    return ""
