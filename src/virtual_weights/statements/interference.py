"""C1, T3, L8, C5: how far edges reach, and what angles between subspaces say about interference."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.linalg import Dense, accumulate, benjamini_hochberg, column_space, frobenius_norm
from virtual_weights.record import Record
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell, dense, present, rank_correlation

_DISCOVERIES = 0.01  # rate of false ones
_ROUNDING = 1e-6  # relative


def distant_edges(bench: Bench) -> Finding:
    """C1: edges beyond chance against the distance between their layers, in values."""
    layers = bench.stream.attention_layers
    if len(layers) < 3:
        return cannot_tell("fewer than three layers with attention: every edge is between neighbours")
    record = bench.among_heads("V")
    z, ratio = record.numbers("z"), record.numbers("null_ratio")
    layer = torch.tensor([c.label.layer for c in bench.stream.heads])
    distance = layer[:, None] - layer[None, :]
    q = benjamini_hochberg(torch.special.erfc(z / 2**0.5) / 2)
    found, far = q < _DISCOVERIES, distance > 1
    strong = found & far
    evidence: dict[str, Figure] = {
        "edges": int((~z.isnan()).sum()),
        "edges_beyond_chance": int(found.sum()),
        "of_these_not_between_neighbours": int(strong.sum()),
        "share_not_between_neighbours": float(strong.sum() / found.sum()) if bool(found.any()) else None,
        "false_discovery_rate": _DISCOVERIES,
    }
    for step in dict.fromkeys((1, 2, 4, 8, 16, int(distance.max()))):
        values = present(ratio[distance == step])
        if len(values):
            evidence[f"mean_squared_ratio_to_chance_at_distance_{step}"] = float(values.square().mean())
    if not bool(strong.any()):
        return Finding("fails", "no edge beyond chance skips a layer", None, evidence)
    at = int(torch.where(strong, z, -torch.inf).argmax())
    reader, writer = divmod(at, z.shape[1])
    names = record.axis("reader").labels, record.axis("writer").labels
    told = f"{names[1][writer]} -> {names[0][reader]}.V, {int(distance[reader, writer])} layers"
    told += f", z {float(z[reader, writer]):.0f}"
    why = f"{int(strong.sum())} of {int(found.sum())} edges beyond chance skip at least one layer"
    return Finding("holds", why, None, evidence, (told,))


def trivial_intersection(bench: Bench) -> Finding:
    """T3: pairs of heads whose subspaces meet in 0 alone, and what one writes into the other all the same."""
    if not bench.pairs():
        return cannot_tell("no two heads of this model can reach each other")
    record = bench.ask(Subspaces("O", "V"))
    cosine, strength, bound = (record.numbers(name) for name in ("cosine", "strength", "bound"))
    sizes = bound / cosine
    apart = cosine < 1 - _ROUNDING
    heard = apart & (strength > _ROUNDING * sizes)
    count, total = int(heard.sum()), int(apart.sum())
    evidence: dict[str, Figure] = {
        "pairs": int((~cosine.isnan()).sum()),
        "pairs_that_meet_in_zero_alone": total,
        "of_these_with_an_effect": count,
        "largest_relative_effect": max(present((strength / sizes)[apart]).tolist(), default=None),
        "independent_pairs": int(present(record.numbers("independent")).sum()),
    }
    if not total:
        return cannot_tell("every pair of subspaces shares a direction")
    if not count:
        return Finding("holds", f"none of {total} pairs with trivial intersection interferes", None, evidence)
    at = int(torch.where(heard, strength / sizes, -torch.inf).argmax())
    why = f"{count} of {total} pairs meet in 0 alone and one still reads the other"
    return Finding("fails", why, None, evidence, (_pair(record, at, "strength", strength / sizes),))


def angles_bound(bench: Bench) -> Finding:
    """L8: ``||R O||_2`` against ``||R||_2 ||O||_2 cos(theta_1)`` over all pairs."""
    if not bench.pairs():
        return cannot_tell("no two heads of this model can reach each other")
    record = bench.ask(Subspaces("O", "V"))
    strength, bound, tightness = (record.numbers(name) for name in ("strength", "bound", "tightness"))
    there = present(tightness)
    if not len(there):
        return cannot_tell("no head reads anything of another")
    violated = int((strength > bound * (1 + _ROUNDING)).sum())
    relation = rank_correlation(record.numbers("cosine"), strength / (bound / record.numbers("cosine")))
    evidence: dict[str, Figure] = {
        "pairs": len(there),
        "violations": violated,
        "median_tightness": float(there.median()),
        "least_tightness": float(there.min()),
        "largest_tightness": float(there.max()),
        "rank_correlation_of_cosine_and_effect": relation,
    }
    if violated:
        return Finding("fails", f"{violated} pairs exceed the bound", None, evidence)
    spread = float(there.max() - there.min())
    if spread < 1e-3:
        return Finding("holds", f"the effect is {float(there.median()):.3f} of the bound in every pair", None, evidence)
    why = f"no pair exceeds the bound; the effect is {float(there.min()):.2g} to {float(there.max()):.2g} of it"
    at = int(torch.where(tightness.isnan(), torch.inf, tightness).argmin())
    condition = "read as an upper bound: proportional it is not"
    return Finding("holds under", why, condition, evidence, (_pair(record, at, "tightness", tightness),))


def orthogonal_is_least(bench: Bench) -> Finding:
    """C5: interference against overlap over all pairs, and after taking the overlap away."""
    pairs = bench.pairs()
    if not pairs:
        return cannot_tell("no two heads of this model can reach each other")
    record = bench.ask(Subspaces("O", "V"))
    relation = rank_correlation(record.numbers("overlap"), record.numbers("strength"))
    left = list[float]()
    for writer, reader in pairs[:8]:
        read, out = bench.head(reader).ov.to(accumulate), bench.head(writer).ov.to(accumulate)
        before = frobenius_norm(read @ out)
        if before > 0:
            basis = column_space(out).basis
            rest = dense(bench.head(reader).v) @ (torch.eye(len(basis), dtype=accumulate) - basis @ basis.T)
            left.append(frobenius_norm(bench.head(reader).o.to(accumulate) @ Dense(rest) @ out) / before)
    evidence: dict[str, Figure] = {
        "pairs": int((~record.numbers("overlap").isnan()).sum()),
        "rank_correlation_of_overlap_and_strength": relation,
        "pairs_made_orthogonal": len(left),
        "largest_share_left": max(left, default=None),
    }
    if left and max(left) > _ROUNDING:
        return Finding("fails", f"made orthogonal, a pair keeps {max(left):.2g} of its strength", None, evidence)
    if relation is None:
        return cannot_tell("fewer than three pairs have an effect")
    if relation > 0:
        why = f"made orthogonal, pairs lose all; over pairs overlap and strength go together ({relation:.2f})"
        return Finding("holds", why, None, evidence)
    why = f"made orthogonal, pairs lose all; short of that less overlap is not less effect ({relation:.2f})"
    return Finding("holds under", why, "exact orthogonality", evidence)


def _pair(record: Record, at: int, name: str, values: Tensor) -> str:
    first, second = record.axes
    i, j = divmod(at, len(second.labels))
    return f"{first.labels[i]}, {second.labels[j]}: {name} {float(values.flatten()[at]):.3g}"
