"""L9, T5, L10, C6, C1, T3, L8, C5: directions that share the stream, what is read of each, how far edges reach."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.analysis.crowding.coherence import Coherence, capacity
from virtual_weights.analysis.crowding.directions import DirectionKind
from virtual_weights.analysis.crowding.interference import FEWEST, Interference
from virtual_weights.analysis.crowding.recovery import Recovery
from virtual_weights.analysis.maps.circuits import reading_circuits, sign_eps, writing_circuits
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.linalg import (
    BELOW_ONE,
    FOLDED_ROUNDING,
    ROUNDINGS,
    THREE_DIGITS,
    Dense,
    accumulate,
    benjamini_hochberg,
    column_space,
    frobenius_norm,
    haar_tail,
    power_traces,
    rank_correlation,
)
from virtual_weights.record import Record
from virtual_weights.statements.evidence import NO_PAIRS, Evidence, Figure, Finding, cannot_tell, dense, present

_FAITHFUL = 0.95  # of the signals recovered
_FALL = 0.05
_POWER = 0.25  # how far a fitted exponent may be from a power
_KIND: DirectionKind = "out"
_NO_NEURONS = "the checkpoint holds no MLP, and so no directions of neurons"
_METHODS = {"matched": "matched filter", "least_squares": "least squares", "sparse": "sparse recovery"}


def recovery(evidence: Evidence) -> Finding:
    """L9: signals along neurons' output directions, read out by methods that do not know which are active."""
    if not _neurons(evidence):
        return cannot_tell(_NO_NEURONS)
    record = evidence.ask(Recovery(_KIND, seed=evidence.seed))
    counts = [int(n) for n in record.axis("n").labels]
    limits = {name: _limit(record, name, counts) for name in _blind(record)}
    figures: dict[str, Figure] = {"directions": int(record.stamp["directions"]), "dimension": evidence.stream.d_model}
    for name, limit in limits.items():
        figures[f"signals_recovered_{name}"] = limit
        figures[f"fidelity_{name}_at_{counts[-1]}"] = float(record.numbers(name)[-1])
    if min(limits.values()) == counts[-1]:
        return Finding("holds", f"every method recovers all of {counts[-1]} signals", None, figures)
    best = max(limits.values())
    if best < min(2, counts[-1]):
        return Finding("fails", "no method recovers two signals at once", None, figures)
    numbers = ", ".join(f"{limit} by {_METHODS[name]}" for name, limit in limits.items())
    why = f"along {figures['directions']} directions, {_FAITHFUL:.0%} of the signals are recovered as long as no more "
    why += f"than these are active at once: {numbers}"
    return Finding("holds under", why, f"no more than {best} signals are active at once", figures)


def trade_off(evidence: Evidence) -> Finding:
    """C6: fidelity against the number of signals, method by method."""
    if not _neurons(evidence):
        return cannot_tell(_NO_NEURONS)
    record = evidence.ask(Recovery(_KIND, seed=evidence.seed))
    counts, figures = record.axis("n").labels, dict[str, Figure]()
    falling = list[str]()
    for name in _blind(record):
        curve = record.numbers(name)
        for n, value in zip(counts[::2], curve[::2].tolist(), strict=True):
            figures[f"{name}_at_{n}"] = value
        if float(curve[0] - curve[-1]) > _FALL:
            falling.append(f"{_METHODS[name]} from {float(curve[0]):.2f} to {float(curve[-1]):.2f}")
    if not falling:
        return Finding("fails", f"no method loses any of up to {counts[-1]} signals", None, figures)
    return Finding("holds", f"from 1 to {counts[-1]} signals fidelity falls: {'; '.join(falling)}", None, figures)


def growth(evidence: Evidence) -> Finding:
    """L10: powers of n with which the total over pairs, and the squared error of one signal, grow."""
    if not evidence.stream.groups.mlps:
        return cannot_tell("the checkpoint holds no MLP")
    if _neurons(evidence) < 4 * FEWEST:
        return cannot_tell(f"fewer than {4 * FEWEST} neurons, too few to fit a power")
    exponents = evidence.ask(Interference(_KIND, seed=evidence.seed)).stamp["exponents"]
    total, error = exponents["total"], exponents["error"]
    if total is None or error is None:
        return cannot_tell("these directions are orthogonal, so there is no interference that could grow")
    figures: dict[str, Figure] = {
        f"{name}_{key}": float(value)
        for name, fit in (("total_over_pairs", total), ("squared_error_of_a_signal", error))
        for key, value in fit.items()
    }
    powers = (f"n^{fit['exponent']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})" for fit in (total, error))
    why = "total over pairs {}, squared error of a signal {}".format(*powers)
    quadratic = abs(total["exponent"] - 2) < _POWER
    if quadratic and abs(error["exponent"] - 1) < _POWER:
        condition = "it is read as the total over all pairs, not as the error of one signal, and signs are random"
        return Finding("holds under", why, condition, figures)
    if quadratic and abs(error["exponent"] - 2) < _POWER:
        return Finding("holds", why, None, figures)
    return Finding("fails", why, None, figures)


def capacity_bound(evidence: Evidence) -> Finding:
    """T5: the model's own directions, and as many random ones, against d / eps^2 at their own largest cosine."""
    if _neurons(evidence) < 2:
        return cannot_tell(_NO_NEURONS)
    stamp = evidence.ask(Coherence(_KIND, seed=evidence.seed)).stamp
    n, d = int(stamp["directions"]), evidence.stream.d_model
    largest, chance = (min(float(stamp[name]), BELOW_ONE) for name in ("largest", "random_largest"))
    figures: dict[str, Figure] = {
        "directions": n,
        "dimension": d,
        "largest_cosine": largest,
        "welch_bound": float(stamp["welch"]),
        "mean_square_times_d": float(stamp["mean_square"]) * d,
        "random_largest_cosine": chance,
    }
    for name, eps in (("model", largest), ("random_code", chance)):
        if eps > 0:
            counts = capacity(d, eps)
            figures[f"published_bound_at_{name}"] = counts.published
            figures[f"log10_of_random_code_at_{name}"] = counts.log10_random_code
            figures[f"signals_active_at_once_at_{name}"] = counts.active_signals
    beyond = [
        f"{n} {kind} with cosines up to {eps:.3f}: d / eps^2 is {d / eps**2:.0f}"
        for kind, eps in (("directions of neurons", largest), ("random directions", chance))
        if eps > 0 and n > d / eps**2
    ]
    if beyond:
        return Finding("fails", f"{n} directions exceed d / eps^2", None, figures, tuple(beyond))
    why = f"{n} directions are fewer than d / eps^2, both for the model's own and for random ones"
    return Finding(
        "holds under", why, "there are no more directions than in this model; in general it is not a bound", figures
    )


def _neurons(evidence: Evidence) -> int:
    return sum(group.width for group in evidence.stream.groups.mlps)


def _blind(record: Record) -> list[str]:
    """Methods that do not know which signals are active."""
    return [column.name for column in record.columns if column.name != "known_support"]


def _limit(record: Record, name: str, counts: list[int]) -> int:
    """The largest number of signals up to which a method is faithful throughout; 0 for none."""
    faithful = (record.numbers(name) >= _FAITHFUL).tolist()
    first = faithful.index(False) if False in faithful else len(counts)
    return counts[first - 1] if first else 0


_MADE_ORTHOGONAL = 8
_DISCOVERIES = 0.01  # rate of false ones


def distant_edges(evidence: Evidence) -> Finding:
    """C1: edges beyond chance, by a law with its skewness, against the distance between layers, in values."""
    if len(evidence.stream.groups.heads) < 3:
        return cannot_tell("fewer than three layers have attention, so every edge is between neighbours")
    record, d = evidence.head_edges("V"), evidence.stream.d_model
    ratio, squared = record.numbers("null_ratio"), record.numbers("strength").square()
    trace, square, cube = (x[:, None] for x in power_traces(reading_circuits(evidence.stream, "V")))
    p = haar_tail(squared, (trace, square, cube), power_traces(writing_circuits(evidence.stream)), d)
    layer = torch.tensor([component.label.layer for component in evidence.stream.heads])
    distance = layer[:, None] - layer[None, :]
    beyond = benjamini_hochberg(p) < _DISCOVERIES
    far = beyond & (distance > 1)
    edges, far_edges = int(beyond.sum()), int(far.sum())
    figures: dict[str, Figure] = {
        "edges": len(present(p)),
        "edges_beyond_chance": edges,
        "of_these_not_between_neighbours": far_edges,
        "share_not_between_neighbours": far_edges / edges if edges else None,
        "false_discovery_rate": _DISCOVERIES,
    }
    for step in dict.fromkeys((1, 2, 4, 8, 16, int(distance.max()))):
        values = present(ratio[distance == step])
        if len(values):
            figures[f"mean_squared_ratio_to_chance_at_distance_{step}"] = float(values.square().mean())
    if not len(present(p)):
        return cannot_tell("no pair of heads can be compared with chance: each reads or writes nothing, or all alike")
    tested = f"of {len(present(p))} edges between heads, at a false discovery rate of {_DISCOVERIES:g} against chance"
    if not far_edges:
        why = f"{tested}, none that skips a layer stands out"
        figures["least_p_of_an_edge_that_skips_a_layer"] = min(present(p[distance > 1]).tolist(), default=None)
        return Finding("fails", why, None, figures)
    clearest = int(torch.where(far, p, torch.inf).argmin())
    reader, writer = divmod(clearest, p.shape[1])
    names = record.axis("reader").labels[reader], record.axis("writer").labels[writer]
    least = max(float(p[reader, writer]), torch.finfo(accumulate).tiny)  # below it a probability has no number
    witness = f"{names[1]} -> {names[0]}, {int(distance[reader, writer])} layers, p {least:.1g}"
    why = f"{tested}, {edges} stand out, {far_edges} of them over at least one layer between"
    return Finding("holds", why, None, figures, (witness,))


def trivial_intersection(evidence: Evidence) -> Finding:
    """T3: pairs of heads whose subspaces meet only in 0, and what one nevertheless writes into the other."""
    if not evidence.pairs():
        return cannot_tell(NO_PAIRS)
    record = evidence.ask(Subspaces("O", "V"))
    cosine, strength, bound = (record.numbers(name) for name in ("cosine", "strength", "bound"))
    effect = strength / (bound / cosine)
    apart = cosine < 1 - FOLDED_ROUNDING
    affected = apart & (effect > max(FOLDED_ROUNDING, ROUNDINGS * sign_eps(evidence.stream)))
    count, total = int(affected.sum()), int(apart.sum())
    figures: dict[str, Figure] = {
        "pairs": len(present(cosine)),
        "pairs_that_meet_in_zero_alone": total,
        "of_these_with_an_effect": count,
        "largest_relative_effect": max(present(effect[apart]).tolist(), default=None),
        "independent_pairs": int(present(record.numbers("independent")).sum()),
    }
    if not total:
        return cannot_tell("every pair of subspaces shares a direction")
    if not count:
        return Finding("holds", f"none of the {total} pairs that meet only in 0 interferes", None, figures)
    strongest = int(torch.where(affected, effect, -torch.inf).argmax())
    median = float(effect[affected].median())
    why = (
        f"in {count} of {total} pairs that meet only in 0, one head nevertheless reads the other; the median effect is "
    )
    why += f"{median:.2g} of the product of their gains"
    return Finding("fails", why, None, figures, (_pair(record, strongest, "strength", effect),))


def angles_bound(evidence: Evidence) -> Finding:
    """L8: ``||R O||_2`` against ``||R||_2 ||O||_2 cos(theta_1)`` over all pairs."""
    if not evidence.pairs():
        return cannot_tell(NO_PAIRS)
    record = evidence.ask(Subspaces("O", "V"))
    strength, bound, tightness = (record.numbers(name) for name in ("strength", "bound", "tightness"))
    values = present(tightness)
    if not len(values):
        return cannot_tell("no head reads anything of another")
    violations = int((strength > bound * (1 + FOLDED_ROUNDING)).sum())
    median, least, largest = float(values.median()), float(values.min()), float(values.max())
    cosine = record.numbers("cosine")
    figures: dict[str, Figure] = {
        "pairs": len(values),
        "violations": violations,
        "median_tightness": median,
        "least_tightness": least,
        "largest_tightness": largest,
        "rank_correlation_of_cosine_and_effect": rank_correlation(cosine, strength / (bound / cosine)),
    }
    if violations:
        return Finding("fails", f"{violations} pairs exceed the bound", None, figures)
    if largest - least < THREE_DIGITS:
        return Finding("holds", f"the effect is {median:.3f} of the bound in every pair", None, figures)
    why = f"no pair exceeds the bound; the effect is {least:.2g} to {largest:.2g} of it"
    loosest = int(torch.where(tightness.isnan(), torch.inf, tightness).argmin())
    condition = "it is read as an upper bound; the effect is not proportional to it"
    return Finding("holds under", why, condition, figures, (_pair(record, loosest, "tightness", tightness),))


def orthogonal_is_least(evidence: Evidence) -> Finding:
    """C5: interference against overlap over all pairs, and after removing the overlap."""
    pairs = evidence.pairs()
    if not pairs:
        return cannot_tell(NO_PAIRS)
    record = evidence.ask(Subspaces("O", "V"))
    overlap, strength = record.numbers("overlap"), record.numbers("strength")
    correlation = rank_correlation(overlap, strength)
    orthogonal = overlap == 0
    shares = list[float]()
    for writer, reader in pairs:
        head, out = evidence.head(reader), evidence.head(writer).ov
        before = frobenius_norm(head.ov @ out)
        if before > 0 and len(shares) < _MADE_ORTHOGONAL:
            space = column_space(out)
            rest = dense(head.v) - space.project(dense(head.v).T).T
            after, size = head.o.to(accumulate) @ Dense(rest) @ out.to(accumulate), frobenius_norm(head.ov)
            # what is left is measured against what both maps could have done: their product may be small itself
            shares.append(frobenius_norm(after) / (size * frobenius_norm(out)))
    left = max(shares, default=0.0)
    interfering = int((orthogonal & (strength > 0)).sum())
    figures: dict[str, Figure] = {
        "pairs": len(present(overlap)),
        "rank_correlation_of_overlap_and_strength": correlation,
        "pairs_made_orthogonal": len(shares),
        "largest_share_left": left if shares else None,
        "orthogonal_pairs": int(orthogonal.sum()),
        "of_these_interfering": interfering,
    }
    if left > FOLDED_ROUNDING or interfering:
        why = (
            f"{interfering} orthogonal pairs have an effect"
            if interfering
            else "a pair that is made orthogonal has one"
        )
        return Finding("fails", why, None, figures)
    if not shares:
        return Finding("holds", "no head reads anything of another, and all pairs are orthogonal", None, figures)
    why = f"making {len(shares)} pairs orthogonal removes their effect"
    if figures["orthogonal_pairs"]:
        why += f", and the {figures['orthogonal_pairs']} pairs that are orthogonal have none"
    if correlation is None:
        return Finding("holds", f"{why}; all others overlap equally or act equally", None, figures)
    why += f"; rank correlation of overlap and strength over pairs: {correlation:.2f}"
    if correlation > 0 or figures["orthogonal_pairs"]:
        return Finding("holds", why, None, figures)
    return Finding("holds under", why, "subspaces are exactly orthogonal; otherwise the gains decide", figures)


def _pair(record: Record, entry: int, name: str, values: Tensor) -> str:
    first, second = record.axes
    i, j = divmod(entry, len(second.labels))
    return f"{first.labels[i]}, {second.labels[j]}: {name} {float(values.flatten()[entry]):.3g}"
