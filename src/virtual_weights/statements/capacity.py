"""L2, C4, L7, T4: how much is written into d dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.analysis.maps.circuits import subspace_bases
from virtual_weights.linalg import FOLDED_RANK_CUT, Spectrum
from virtual_weights.statements.evidence import Evidence, Figure, Finding, cannot_tell

_NO_HEADS = "the checkpoint holds no attention head"


def independent_signals(evidence: Evidence) -> Finding:
    """L2: the sum of all write ranks against d, state by state."""
    ledger, d = evidence.ask(Bandwidth()), evidence.stream.d_model
    ranks, spans = ledger.numbers("write_ranks"), ledger.numbers("written_dim")
    over = ranks > d
    fullest = int(ranks.argmax())
    total = int(ranks[fullest])
    figures: dict[str, Figure] = {
        "d_model": d,
        "states": len(ranks),
        "states_oversubscribed": int(over.sum()),
        "largest_sum_of_ranks": total,
        "largest_oversubscription": float(ranks[fullest] / d),
        "dimension_of_the_span": int(spans[fullest]),
    }
    if not bool(over.any()):
        return Finding("holds", f"the ranks of all writers add up to at most {total}, in {d} dimensions", None, figures)
    return Finding(
        "holds under",
        f"the ranks of all writers up to state {fullest} add up to {total} in {d} dimensions: this model exceeds the "
        "bound, so its signals are not separated exactly",
        "arbitrary signals must be separated exactly and linearly, all at once",
        figures,
        (f"state {fullest} (after {ledger['after'][fullest]}): {total} > {d}",),
    )


def total_capacity(evidence: Evidence) -> Finding:
    """C4: the sum of the heads' dimensions against d, and what an independent subset attains."""
    if not evidence.heads:
        return cannot_tell(_NO_HEADS)
    bases = _write_bases(evidence)
    d, total = evidence.stream.d_model, sum(map(len, bases.values()))
    subset, dimension = _direct(bases)
    figures: dict[str, Figure] = {
        "d_model": d,
        "heads": len(bases),
        "sum_of_dimensions": total,
        "independent_heads": len(subset),
        "their_dimensions": dimension,
    }
    if total <= d:
        return Finding(
            "holds", f"the dimensions that {len(bases)} heads write into add up to {total}, at most {d}", None, figures
        )
    return Finding(
        "holds under",
        f"the dimensions that {len(bases)} heads write into add up to {total}, {total / d:.1f} times d; {len(subset)} "
        f"heads are independent and span {dimension}",
        "the subspaces are linearly independent",
        figures,
        tuple(subset),
    )


def direct_sum(evidence: Evidence) -> Finding:
    """L7: the dimension of the sum of the heads' write subspaces against the sum of their dimensions."""
    if not evidence.heads:
        return cannot_tell(_NO_HEADS)
    bases = _write_bases(evidence)
    rows = torch.cat(list(bases.values()))
    spectrum = Spectrum(torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0).sqrt())
    total, dimension = len(rows), spectrum.numerical_rank(FOLDED_RANK_CUT)
    subset, subset_dimension = _direct(bases)
    figures: dict[str, Figure] = {
        "sum_of_dimensions": total,
        "dimension_of_the_sum": dimension,
        "direct_subset_found": len(subset),
        "its_dimension": subset_dimension,
    }
    if dimension == total:
        return Finding(
            "holds", f"the sum of all {len(bases)} write subspaces has the full dimension {total}", None, figures
        )
    return Finding(
        "fails",
        f"the dimensions add up to {total}, but the dimension of the sum is {dimension}; it is direct for "
        f"{len(subset)} heads",
        None,
        figures,
        (f"direct for {', '.join(subset)}",),
    )


def bottleneck(evidence: Evidence) -> Finding:
    """T4: neurons before and after every state per dimension, and what a map through d dimensions saves."""
    ledger, d = evidence.ask(Bandwidth()), evidence.stream.d_model
    before, after = ledger.numbers("neurons_before") / d, ledger.numbers("neurons_after") / d
    least = torch.minimum(before, after)
    if not bool((least > 0).any()):
        return cannot_tell("no state of this stream has neurons before and after it")
    tightest = int(least.argmax())
    product, saving = (float(ledger.numbers(name)[tightest]) for name in ("neuron_product", "saving"))
    b, a = float(before[tightest]), float(after[tightest])
    figures: dict[str, Figure] = {
        "tightest_state": tightest,
        "neurons_before_per_dimension": b,
        "neurons_after_per_dimension": a,
        "published_ratio": product,
        "saving_of_a_map_through_d": saving,
    }
    why = f"state {tightest} has {b:.3g} d neurons before it and {a:.3g} d after it; "
    why += f"a map through {d} dimensions saves a factor of {saving:.3g}, not {product:.3g}"
    if 50 <= min(b, a) and max(b, a) <= 200:
        condition = "it is read as counts of neurons only: the published ratio compares nothing that is stored or sent"
        return Finding("holds under", why, condition, figures)
    return Finding("fails", why, None, figures)


def _write_bases(evidence: Evidence) -> dict[str, Tensor]:
    """Every head with orthonormal rows that span what it can write."""
    stream = evidence.stream
    spaces = subspace_bases(stream, "O", stream.groups.heads, FOLDED_RANK_CUT)
    heads = zip(evidence.heads, spaces.basis, spaces.rank.tolist(), strict=True)
    return {name: basis[: int(rank)] for name, basis, rank in heads}


def _direct(bases: dict[str, Tensor]) -> tuple[list[str], int]:
    """Heads added one by one, in order of depth, as long as their sum stays direct: names, and their dimension."""
    names, rows = list[str](), torch.cat(list(bases.values()))[:0]
    for name, basis in bases.items():
        if not len(basis) or len(rows) + len(basis) > basis.shape[1]:
            continue
        rest = basis - (basis @ rows.T) @ rows
        rest = rest - (rest @ rows.T) @ rows  # twice is enough (Kahan): the first pass leaves rounding of its size
        _, s, vh = torch.linalg.svd(rest, full_matrices=False)
        if float(s[-1]) > FOLDED_RANK_CUT:
            names.append(name)
            rows = torch.cat([rows, vh])
    return names, len(rows)
