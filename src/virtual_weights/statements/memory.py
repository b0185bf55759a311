"""T6, L11, L12: clearing by neurons and heads, and when it is worth it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.linalg import accumulate
from virtual_weights.record import Record
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell, present, rank_correlation

_CLEARED = 0.1  # at most this share of a direction is left
_EFFICIENT = 0.5  # -cos(w_in, w_out) of a neuron that writes against what it reads
_STANDS = "where_the_model_stands"
_PRICES = (0.1, 0.25, 0.5, 0.75, 0.9)  # quantiles of utility over interference at which the frontier is told


def clearing(bench: Bench) -> Finding:
    """T6: gains of neurons and eigenvalues of heads at norm scalar and slope 1, attention to itself 1; and runs."""
    stream = bench.stream
    gains = present(bench.ask(Neurons()).numbers("gain")) if _has_mlps(bench) else torch.empty(0, dtype=accumulate)
    kept = torch.empty(0, dtype=accumulate)
    negative, witnesses = torch.empty(0, dtype=accumulate), list[str]()
    if stream.heads:
        heads = bench.ask(HeadErasers())
        kept, negative = present(heads.numbers("kept")), present(heads.numbers("most_negative"))
        witnesses += [_told(row, "kept") for row in heads.top(1, "kept", largest=False).rows()]
    if not len(gains) and not len(kept):
        return cannot_tell("the checkpoint holds no neuron and no head")
    if len(gains):
        nearest = bench.ask(Neurons())
        at = int((nearest.numbers("gain") - 1).abs().nan_to_num(torch.inf).argmin())
        witnesses.append(f"{nearest.axis('neuron').labels[at]}: gain {float(nearest.numbers('gain')[at]):.3f}")
    cleared = int(((gains - 1).abs() < _CLEARED).sum())
    measured, seen = _measured_clearing(bench.runs)
    witnesses += seen
    evidence: dict[str, Figure] = {
        "norm_scalar_and_slope": 1.0,
        "neurons": len(gains),
        "neurons_that_attenuate": int(((gains > 0) & (gains < 1 - _CLEARED)).sum()),
        "neurons_that_clear": cleared,
        "neurons_that_reflect_or_amplify": int((gains > 1 + _CLEARED).sum()),
        "neurons_that_strengthen": int((gains < 0).sum()),
        "median_positive_gain": float(gains[gains > 0].median()) if bool((gains > 0).any()) else None,
        "heads": len(kept),
        "heads_with_a_cleared_direction": int((kept < _CLEARED).sum()),
        "heads_with_a_negative_eigenvalue": len(negative),
        "most_dimensions_one_of_them_can_clear": max(stream.spec.d_head if len(kept) else 0, 1),
        "d_model": stream.d_model,
        **measured,
    }
    if not bool((gains > 0).any()) and not len(negative):
        return Finding("fails", "no neuron and no head writes against anything that it reads", None, evidence)
    wide = _whole_stream(bench)
    if wide:
        return Finding("holds", f"{wide} clears the whole stream", None, evidence, (wide,))
    acting = evidence["heads_with_a_cleared_direction"]
    why = f"at norm scalar 1, {cleared} of {len(gains)} neurons and {acting} of {len(kept)} heads clear a direction"
    condition = "gain times slope over norm scalar is 1 on the direction cleared, and these are no more than its rank"
    return Finding("holds under", why, condition, evidence, tuple(witnesses))


def _measured_clearing(runs: Mapping[str, Record]) -> tuple[dict[str, Figure], list[str]]:
    """What clears while the model runs, and what becomes of what was written, with a witness of each."""
    evidence, witnesses = dict[str, Figure](), list[str]()
    if "cleared" in runs:
        run = runs["cleared"]
        evidence["tokens_run"] = int(run.stamp["tokens"])
        rows: list[dict[str, Any]] = list(run.rows())
        for kind in ("neuron", "head", "mlp"):
            for verdict in ("unconditional", "conditional", "rare"):
                count = sum((row["kind"], row["verdict"]) == (kind, verdict) for row in rows)
                evidence[f"{verdict}_{kind}s"] = count
        steady = [row for row in rows if (row["kind"], row["verdict"]) == ("neuron", "unconditional")]
        for row in sorted(steady, key=lambda row: (-row["cleared"], abs(row["mean"] - 1)))[:1]:
            told = f"{row['eraser']}: clears on {row['cleared']:.1%} of tokens, coefficient {row['mean']:.3f}"
            witnesses.append(f"{told} ± {row['spread']:.3f}")
    if "lifetime" in runs:
        run = runs["lifetime"]
        later = _later(run.numbers("projection"))
        followed = ~later.isnan().all(1)
        least = later.nan_to_num(torch.inf).amin(1)[followed]
        evidence["writers_followed"] = len(least)
        evidence["share_of_writers_that_fall_below_half"] = float((least < 0.5).double().mean()) if len(least) else None
        if len(least):
            writer, state = divmod(int(later.abs().nan_to_num(torch.inf).argmin()), later.shape[1])
            names = run.axis("writer").labels[writer], run.axis("state").labels[state]
            witnesses.append(f"{names[0]}: {float(later[writer, state]):.3f} of what it wrote is left at {names[1]}")
    return evidence, witnesses


def _later(projection: Tensor) -> Tensor:
    """(writer, state) without the first state that holds what a writer wrote: there nothing has yet erased it."""
    there = ~projection.isnan()
    first = there & (there.cumsum(1) == 1)
    return projection.masked_fill(first, torch.nan)


def efficiency(bench: Bench) -> Finding:
    """L11: direction against gain of every neuron."""
    if not _has_mlps(bench):
        return cannot_tell("the checkpoint holds no MLP")
    record = bench.ask(Neurons())
    cosine, gain = record.numbers("cosine"), record.numbers("gain")
    efficient = -cosine > _EFFICIENT
    count = int(efficient.sum())
    off = efficient & ((gain - 1).abs() > 0.5)
    evidence: dict[str, Figure] = {
        "neurons": len(present(cosine)),
        "efficient": count,
        "efficient_but_far_from_clearing": int(off.sum()),
        "clearing_within_a_half": int(((gain - 1).abs() <= 0.5).sum()),
        "of_these_efficient": int((((gain - 1).abs() <= 0.5) & efficient).sum()),
        "largest_efficiency": float(present(-cosine).max()),
        "rank_correlation_of_efficiency_and_gain": rank_correlation(-cosine, gain),
        "norm_scalar_and_slope": 1.0,
    }
    if not count:
        return cannot_tell(f"no neuron has an efficiency above {_EFFICIENT}: there is nothing to compare")
    if not bool(off.any()):
        return Finding("holds", f"all {count} efficient neurons have a gain within a half of 1", None, evidence)
    at = int(torch.where(off, -cosine, -torch.inf).argmax())
    told = f"{record.axis('neuron').labels[at]}: efficiency {float(-cosine[at]):.3f}, gain {float(gain[at]):.3g}"
    why = f"{int(off.sum())} of {count} neurons that point against what they read have a gain far from 1"
    return Finding(
        "holds under", why, "efficiency is of direction alone, not of how much is cleared", evidence, (told,)
    )


def best_policy(bench: Bench) -> Finding:
    """L12: both objectives maximised over what to erase, with utility and interference measured or from the weights."""
    estimated = _estimated_policy(bench)
    if "frontier" not in bench.runs:
        return estimated
    return _measured_policy(bench.runs["frontier"], estimated.evidence)


def _measured_policy(run: Record, estimated: Mapping[str, Figure]) -> Finding:
    """Policies over what a run on text measured, price by price. As written, the price is 0: it never meets m."""
    listed: list[dict[str, Any]] = [row for row in run.rows() if row["agreement"] is not None]
    priced = sorted(((float(row["lambda"]), row) for row in listed), key=lambda pair: pair[0])
    if len(priced) < 2:
        return cannot_tell("one price says nothing of what depends on the price")
    evidence = {name: value for name, value in estimated.items() if name != _STANDS}
    for price, row in priced:
        for name in ("erased_by_optimal", "erased_by_model", "agreement"):
            evidence[f"measured_{name}_at_price_{price:.3g}"] = row[name]
    at, best = max(priced, key=lambda pair: pair[1]["agreement"])
    names = ("agreement", "model", "optimal", "keep_all", "erase_all")
    evidence |= {f"{_STANDS}_price": at, **{f"{_STANDS}_{name}": best[name] for name in names}}
    told = f"at price {at:.3g} the model's own erasers decide as the best policy in {best['agreement']:.0%} of cases"
    shares: list[float] = [row["erased_by_optimal"] for _, row in priced]
    if max(shares) == min(shares):
        why = f"measured, the best policy erases {shares[0]:.0%} at each of {len(priced)} prices, whatever they are"
        return Finding("holds", why, None, evidence, (told,))
    why = f"measured, the best policy erases {min(shares):.0%} to {max(shares):.0%} over {len(priced)} prices; the "
    why += "objective as written erases the same at all of them"
    return Finding("fails", why, None, evidence, (told,))


def _estimated_policy(bench: Bench) -> Finding:
    """Both objectives at quantiles of utility over interference, from the weights.

    Per writer: utility, the squared composition score with the unembedding; interference, the sum of its squared scores
    with every later head's values but the strongest.
    """
    if not bench.stream.heads or not bench.stream.model.has("unembed"):
        return cannot_tell("the checkpoint lacks its attention or its unembedding")
    utility = _score(bench, "unembed").square()[0]
    values = _score(bench, "V").square().nan_to_num(0.0)
    interference = values.sum(0) - values.max(0).values
    there = ~utility.isnan()
    utility, interference = utility[there], interference[there]
    evidence: dict[str, Figure] = {
        "writers": len(utility),
        "utility": "squared composition score with the unembedding",
        "interference": "squared composition scores with later heads' values, but the strongest",
        _STANDS: "needs a run on text",
    }
    disturbing = interference > 0
    if not bool(disturbing.any()):
        return Finding("holds", "no writer disturbs a second reader: both objectives keep all", None, evidence)
    ratios = (utility / interference)[disturbing]
    same = True
    for quantile in _PRICES:
        price = float(ratios.quantile(quantile))
        written, corrected = _maximiser(utility, 0 * interference, price), _maximiser(utility, interference, price)
        same = same and torch.equal(written, corrected)
        evidence[f"erased_as_written_at_price_{quantile:g}"] = float(written.double().mean())
        evidence[f"erased_as_corrected_at_price_{quantile:g}"] = float(corrected.double().mean())
    if same:
        return Finding("holds", "both objectives erase the same at every price", None, evidence)
    why = "the objective as written erases the same whatever interference costs; its interference term has no m in it"
    return Finding("fails", why, None, evidence)


def _maximiser(utility: Tensor, penalty: Tensor, price: float) -> Tensor:
    """``argmax_m (1 - m) (U - price P)`` for each: erase where that is negative. As written, P does not meet m."""
    return utility - price * penalty < 0


def _score(bench: Bench, port: str) -> Tensor:
    assert port in ("unembed", "V")
    return bench.ask(Composition(port, writers="all")).numbers("score")


def _has_mlps(bench: Bench) -> bool:
    return any(c.kind == "mlp" for c in bench.stream.components)


def _whole_stream(bench: Bench) -> str:
    """A head that leaves less than the share of everything; '' where there is none, as there must be for k < d."""
    if bench.stream.spec.d_head < bench.stream.d_model:
        return ""
    for component in bench.stream.heads:
        head = bench.head(component)
        kept = (head.v @ head.o).to(accumulate).dense()
        if bool((torch.linalg.eigvals(kept).add(1).abs() < _CLEARED).all()):
            return str(component.label)
    return ""


def _told(row: Mapping[str, object], name: str) -> str:
    value = row[name]
    assert isinstance(value, float)
    return f"{row['head']}: {name} {value:.3f} of its best cleared direction"
