"""T2, L6, C3: ranks, eigenvalues and singular values of virtual weights."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.analysis.channels.channel import Channel, summary
from virtual_weights.linalg import svd, tolerance
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell, dense

_NO_PAIR = "no two heads of this model can reach each other"


def rank_bound(bench: Bench) -> Finding:
    """T2: numerical rank of sampled virtual weights against both bounds."""
    pairs = bench.pairs()
    if not pairs:
        return cannot_tell(_NO_PAIR)
    d, over, under, full, witness = bench.stream.d_model, 0, 0, 0, ""
    cut = tolerance(bench.stream.dtype, (d,))
    for writer, reader in pairs:
        out, read = bench.head(writer).ov, bench.head(reader).ov
        ranks = [_rank(svd(map).S, cut) for map in (read, out, read @ out)]
        bound = min(ranks[:2])
        over += ranks[2] > bound
        under += ranks[2] < ranks[0] + ranks[1] - d
        full += ranks[2] == bound
        if ranks[2] > bound and not witness:
            witness = f"{writer.label} -> {reader.label}.V: rank {ranks[2]}, factors {ranks[0]} and {ranks[1]}"
    evidence: dict[str, Figure] = {
        "pairs": len(pairs),
        "cut": cut,
        "above_the_bound": over,
        "below_the_lower_bound": under,
        "at_the_bound": full,
    }
    if over or under:
        why = f"counted at {cut:.1g} of the largest gain, {over + under} of {len(pairs)} pairs leave the bounds"
        condition = "exact ranks: what is cut off in a factor can be the larger part of the product"
        return Finding("holds under", why, condition, evidence, (witness,) if witness else ())
    why = f"all {len(pairs)} pairs keep both bounds, {full} reach the upper one"
    return Finding("holds", why, None, evidence)


def eigenvalues_are_strengths(bench: Bench) -> Finding:
    """L6: moduli of eigenvalues against singular values, of square virtual weights ``OV_b OV_a``."""
    found = list[tuple[float, float, float, str]]()
    for writer, reader in bench.pairs():
        read, out = bench.head(reader), bench.head(writer)
        gains = svd(read.ov @ out.ov).S
        if float(gains[0]) > 0:
            # O_b V_b O_a V_a has the non-zero eigenvalues of V_b O_a V_a O_b
            core = dense(read.v @ out.o) @ dense(out.v @ read.o)
            moduli = torch.linalg.eigvals(core).abs()
            shares = float(moduli.max() / gains[0]), float(moduli.sum() / gains.sum())
            found.append((*shares, float(gains[0]), f"{writer.label} -> {reader.label}.V"))
    if not found:
        return cannot_tell(_NO_PAIR)
    found.sort()
    share = torch.tensor([each[1] for each in found])
    evidence: dict[str, Figure] = {
        "pairs": len(found),
        "median_of_sum_of_moduli_over_sum_of_gains": float(share.median()),
        "least_largest_modulus_over_largest_gain": found[0][0],
        "largest_of_these": found[-1][0],
    }
    least = found[0]
    told = f"{least[3]}: largest gain {least[2]:.3g}, largest eigenvalue {least[0] * least[2]:.3g}"
    if float(share.min()) > 1 - 1e-6:
        return Finding("holds", f"in all {len(found)} pairs eigenvalues and gains agree", None, evidence)
    why = (
        f"eigenvalues sum to {float(share.median()):.2g} of what the gains sum to, in the median of {len(found)} pairs"
    )
    return Finding("fails", why, None, evidence, (told,))


def effective_dimension(bench: Bench) -> Finding:
    """C3: the strongest edges into keys: gains above the null's edge beside other counts."""
    if not bench.pairs():
        return cannot_tell(_NO_PAIR)
    strongest = bench.among_heads("K").top(8, "z")
    writers, readers = strongest["writer"], strongest["reader"]
    assert isinstance(writers, tuple) and isinstance(readers, tuple)
    counts, told = list[dict[str, Figure]](), list[str]()
    for writer, reader in zip(writers, readers, strict=True):
        names = ("numerical_rank", "above_null_edge", "stable_rank", "entropy_rank", "participation_ratio")
        figures = summary(Channel(str(writer), f"{reader}.K", draws=20, seed=bench.seed)(bench.stream))
        counts.append({name: _number(figures[name]) for name in names})
        each = counts[-1]
        told.append(
            f"{writer} -> {reader}.K: {each['numerical_rank']} not zero, {each['above_null_edge']} above chance, "
            f"entropy rank {each['entropy_rank']:.3g}"
        )
    evidence: dict[str, Figure] = {"edges": len(counts)} | {f"first_{name}": v for name, v in counts[0].items()}
    differing = sum(each["numerical_rank"] != each["above_null_edge"] for each in counts)
    evidence["edges_where_the_threshold_decides"] = differing
    if not differing:
        why = "every gain that is not zero stands above the null's edge"
        return Finding("holds", why, None, evidence, tuple(told[:3]))
    why = f"in {differing} of {len(counts)} strong edges the count depends on where zero is said to begin"
    return Finding("holds under", why, "a threshold, here the edge of the matched null", evidence, tuple(told[:3]))


def _rank(gains: Tensor, cut: float) -> int:
    return int(((gains > cut * gains[0]) & (gains > 0)).sum()) if len(gains) else 0


def _number(value: object) -> float | int:
    assert isinstance(value, float | int)
    return value
