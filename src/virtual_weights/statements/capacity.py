"""L2, C4, L7, T4: how much is written into d dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.analysis.maps.circuits import circuits
from virtual_weights.linalg import tolerance
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell

_CUT = 1e-5  # of the largest singular value: gains are folded in float32, whose rounding is no direction


def independent_signals(bench: Bench) -> Finding:
    """L2: the sum of all write ranks against d, state by state."""
    ledger, d = bench.ask(Bandwidth()), bench.stream.d_model
    ranks, spans = ledger.numbers("write_ranks"), ledger.numbers("written_dim")
    over = ranks > d
    fullest = int(ranks.argmax())
    evidence: dict[str, Figure] = {
        "d_model": d,
        "states": len(ranks),
        "states_oversubscribed": int(over.sum()),
        "largest_sum_of_ranks": int(ranks[fullest]),
        "largest_oversubscription": float(ranks[fullest] / d),
        "dimension_of_the_span": int(spans[fullest]),
    }
    if not bool(over.any()):
        return Finding("holds", f"at most {int(ranks[fullest])} of {d} dimensions are claimed", None, evidence)
    return Finding(
        "holds under",
        f"state {fullest} carries writers of total rank {int(ranks[fullest])} in {d} dimensions: this model does not "
        "keep the bound, so its signals are not separated exactly",
        "arbitrary signals are to be told apart exactly and linearly, all at once",
        evidence,
        (f"state {fullest} (after {_after(bench, fullest)}): {int(ranks[fullest])} > {d}",),
    )


def total_capacity(bench: Bench) -> Finding:
    """C4: the sum of the heads' dimensions against d, and what an independent subset attains."""
    if not bench.stream.heads:
        return cannot_tell("the checkpoint holds no attention head")
    names, bases = _write_bases(bench)
    d, total = bench.stream.d_model, sum(len(basis) for basis in bases)
    chosen, spanned = _direct(names, bases)
    evidence: dict[str, Figure] = {
        "d_model": d,
        "heads": len(names),
        "sum_of_dimensions": total,
        "independent_heads": len(chosen),
        "their_dimensions": spanned,
    }
    if total <= d:
        return Finding("holds", f"{len(names)} heads write into {total} of {d} dimensions", None, evidence)
    return Finding(
        "holds under",
        f"{len(names)} heads write into {total} dimensions, {total / d:.1f} times d; {len(chosen)} of them are "
        f"independent and take {spanned}",
        "the subspaces are linearly independent",
        evidence,
        tuple(chosen),
    )


def direct_sum(bench: Bench) -> Finding:
    """L7: the dimension of the sum of the heads' write subspaces against the sum of their dimensions."""
    if not bench.stream.heads:
        return cannot_tell("the checkpoint holds no attention head")
    names, bases = _write_bases(bench)
    total = sum(len(basis) for basis in bases)
    spanned = _rank(torch.cat(bases))
    chosen, taken = _direct(names, bases)
    evidence: dict[str, Figure] = {
        "sum_of_dimensions": total,
        "dimension_of_the_sum": spanned,
        "direct_subset_found": len(chosen),
        "its_dimension": taken,
    }
    if spanned == total:
        return Finding("holds", f"all {len(names)} write subspaces together have dimension {total}", None, evidence)
    return Finding(
        "fails",
        f"the dimensions add up to {total}, their sum has {spanned}; it is direct for {len(chosen)} heads",
        None,
        evidence,
        (f"direct for {', '.join(chosen)}",),
    )


def bottleneck(bench: Bench) -> Finding:
    """T4: neurons before and after every state per dimension, and what a map through d dimensions saves."""
    ledger, d = bench.ask(Bandwidth()), bench.stream.d_model
    before, after = ledger.numbers("neurons_before") / d, ledger.numbers("neurons_after") / d
    least = torch.minimum(before, after)
    if not bool((least > 0).any()):
        return cannot_tell("no state of this stream has neurons before and after it")
    tightest = int(least.argmax())
    product, saving = (float(ledger.numbers(name)[tightest]) for name in ("neuron_product", "saving"))
    b, a = float(before[tightest]), float(after[tightest])
    evidence: dict[str, Figure] = {
        "tightest_state": tightest,
        "neurons_before_per_dimension": b,
        "neurons_after_per_dimension": a,
        "published_ratio": product,
        "saving_of_a_map_through_d": saving,
    }
    at = f"state {tightest} has {b:.3g} d neurons before it and {a:.3g} d after it"
    if 50 <= min(b, a) and max(b, a) <= 200:
        return Finding(
            "holds under",
            f"{at}; a map through {d} dimensions saves {saving:.3g} times, not {product:.3g}",
            "counts of neurons only: the published compression ratio is no ratio of what is stored or sent",
            evidence,
        )
    return Finding("fails", f"{at}, and a map through d saves {saving:.3g} times, not {product:.3g}", None, evidence)


def _after(bench: Bench, state: int) -> str:
    values = bench.ask(Bandwidth())["after"]
    assert isinstance(values, tuple)
    return str(values[state])


def _write_bases(bench: Bench) -> tuple[list[str], list[Tensor]]:
    """Orthonormal rows that span what each head can write."""
    names, bases = [str(c.label) for c in bench.stream.heads], list[Tensor]()
    for layer in bench.stream.attention_layers:
        for thin in circuits(bench.stream, "O", layer):
            _, s, vh = torch.linalg.svd(thin, full_matrices=False)
            bases.append(vh[(s > _CUT * s[0]) & (s > 0)])
    return names, bases


def _direct(names: list[str], bases: list[Tensor]) -> tuple[list[str], int]:
    """Heads taken one by one, in order of depth, as long as their sum stays direct: names, and their dimension."""
    chosen, span = list[str](), bases[0].new_empty(0, bases[0].shape[1])
    for name, basis in zip(names, bases, strict=True):
        if not len(basis) or len(span) + len(basis) > basis.shape[1]:
            continue
        fresh = basis - (basis @ span.T) @ span
        fresh = fresh - (fresh @ span.T) @ span  # twice is enough (Kahan): the first pass leaves rounding of its size
        _, s, vh = torch.linalg.svd(fresh, full_matrices=False)
        if float(s[-1]) > _CUT:
            chosen.append(name)
            span = torch.cat([span, vh])
    return chosen, len(span)


def _rank(rows: Tensor) -> int:
    values = torch.linalg.eigvalsh(rows.T @ rows)
    floor = tolerance(rows.dtype, rows.shape) * values[-1]  # of a Gram matrix: the square of a singular value
    return int((values > floor.clamp_min(_CUT**2 * values[-1])).sum()) if len(rows) else 0
