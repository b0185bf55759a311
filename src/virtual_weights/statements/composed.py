"""T1, L5, T2, L6, C3: maps in sequence, beside the stream and along one path; ranks and spectra of virtual weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from virtual_weights.analysis.channels.channel import Channel, summary
from virtual_weights.analysis.maps.circuits import sign_eps, stored_eps
from virtual_weights.linalg import (
    FOLDED_ROUNDING,
    PROPORTIONAL,
    ROUNDINGS,
    SINGULAR,
    Dense,
    Product,
    Spectrum,
    Sum,
    accumulate,
    beyond_rounding,
    eigenvalues,
    frobenius_norm,
    random_generator,
    singular_values,
    spectral_norm,
    tolerance,
)
from virtual_weights.statements.evidence import NO_PAIRS, Evidence, Figure, Finding, cannot_tell, dense, rank
from virtual_weights.stream import Group, Head

_STEPS = 3


def composed_rank(evidence: Evidence) -> Finding:
    """T1: heads in sequence: rank of the product of their OV circuits, and of ``prod(I + OV)``."""
    stream = evidence.stream
    if len(stream.groups.heads) < 2:
        return cannot_tell("the checkpoint holds fewer than two layers with attention")
    broken, beyond, witness = 0, 0, ""
    sequences = _sequences(evidence)
    ranks = list[tuple[int, int, int, int]]()
    for names in sequences:
        heads = [evidence.head(name) for name in names]
        factors = [rank(head.ov) for head in heads]
        path = rank(Product([head.ov for head in reversed(heads)]))
        composed, update = _beside_the_stream(heads, stream.d_model)
        ranks.append((min(factors), path, composed, update))
        broken += path > min(factors) or update > sum(factors)
        if composed > min(factors):
            beyond += 1
            witness = witness or f"{' > '.join(names)}: least rank {min(factors)}, composed {composed}"
    figures: dict[str, Figure] = {
        "sequences": len(sequences),
        "least_rank": min(r[0] for r in ranks),
        "largest_rank_of_a_path": max(r[1] for r in ranks),
        "least_rank_of_a_composed_stream": min(r[2] for r in ranks),
        "largest_rank_of_a_composed_update": max(r[3] for r in ranks),
        "paths_beyond_the_bound": broken,
        "streams_beyond_the_bound": beyond,
    }
    if broken:
        return Finding("fails", f"{broken} products exceed the least rank of their factors", None, figures)
    if not beyond:
        why = f"neither the path nor the composed stream of {len(sequences)} sampled sequences exceeds the least rank"
        return Finding("holds", why, None, figures)
    why = f"of {len(sequences)} sampled sequences no path exceeds the least rank, but {beyond} composed streams do"
    return Finding(
        "holds under", why, "the product is taken along one path, without the stream beside it", figures, (witness,)
    )


def virtual_weights_compose(evidence: Evidence) -> Finding:
    """L5: ``R_k O_i`` against ``a R_k (O_j R_j) O_i`` for triples of heads, a chosen for the least difference.

    The factor a stands for what the weights do not determine: attention and norm scalar of the head between.
    """
    triples = _triples(evidence)
    if not triples:
        return cannot_tell("no three heads of this model stand in sequence")
    discrepancies = list[tuple[float, str]]()
    for names in triples:
        first, between, last = map(evidence.head, names)
        read = last.qk.to(accumulate)
        direct = read @ first.ov.to(accumulate)
        size = frobenius_norm(direct)
        if size > 0:
            indirect = read @ between.ov.to(accumulate) @ first.ov.to(accumulate)
            other, distance = frobenius_norm(indirect), frobenius_norm(Sum((direct, indirect.scaled(-1.0))))
            cosine = (size**2 + other**2 - distance**2) / (2 * size * other) if other > 0 else 0.0
            discrepancies.append((max(0.0, 1 - cosine**2) ** 0.5, f"{' > '.join(names)}.K"))
    if not discrepancies:
        return cannot_tell("no sampled head reads anything from the first head of its triple")
    discrepancies.sort()
    sizes = torch.tensor([size for size, _ in discrepancies])
    equal, median = int((sizes < PROPORTIONAL).sum()), float(sizes.median())
    figures: dict[str, Figure] = {
        "triples": len(sizes),
        "least_discrepancy": float(sizes[0]),
        "median_discrepancy": median,
        "largest_discrepancy": float(sizes[-1]),
        "triples_that_agree": equal,
    }
    if equal == len(sizes):
        return Finding("holds", f"all {equal} sampled triples agree", None, figures)
    why = (
        f"even at the best factor, direct and composed differ by {median:.3g} of the direct weight in the median triple"
    )
    return Finding("fails", why, None, figures, tuple(f"{name}: {size:.3g}" for size, name in discrepancies[-2:]))


def _sequences(evidence: Evidence) -> list[list[str]]:
    """Sequences of heads of successive attentions."""
    groups = evidence.stream.groups.heads
    starts = evidence.sample(range(max(1, len(groups) - _STEPS + 1)), 8)
    generator = random_generator(evidence.seed)
    return [_one_of_each(groups[start : start + _STEPS], generator) for start in starts]


def _triples(evidence: Evidence) -> list[list[str]]:
    """Heads of any three attentions, in order of depth."""
    groups = evidence.stream.groups.heads
    generator = random_generator(evidence.seed)
    triples = list[list[str]]()
    for _ in range(min(evidence.samples, 32) if len(groups) >= 3 else 0):
        indices: list[int] = torch.randperm(len(groups), generator=generator)[:3].sort().values.tolist()
        triples.append(_one_of_each([groups[i] for i in indices], generator))
    return triples


def _one_of_each(groups: Sequence[Group], generator: torch.Generator) -> list[str]:
    return [group.labels[int(torch.randint(len(group.labels), (), generator=generator))] for group in groups]


def _beside_the_stream(heads: list[Head], d: int) -> tuple[int, int]:
    """Ranks of ``prod(I + O V)`` and of what it adds to I, in thin factors: ``I + A B`` grows by a head at a time.

    ``(I + O V)(I + A B) = I + [A, O] [B; V + V A B]``, and ``I + A B`` loses as many dimensions as ``I + B A``.
    """
    left, right = torch.empty(d, 0, dtype=accumulate), torch.empty(0, d, dtype=accumulate)
    for head in heads:
        value = dense(head.v)
        right = torch.cat([right, value + (value @ left) @ right])
        left = torch.cat([left, dense(head.o)], 1)
    inner = torch.eye(len(right), dtype=accumulate) + right @ left
    lost = len(right) - Spectrum(torch.linalg.svdvals(inner)).numerical_rank(SINGULAR)
    return d - lost, rank(Dense(left) @ Dense(right))


_COUNTS = ("numerical_rank", "above_null_edge", "stable_rank", "entropy_rank", "participation_ratio")


def rank_bound(evidence: Evidence) -> Finding:
    """T2: numerical rank of sampled virtual weights against both bounds."""
    pairs = evidence.pairs()
    if not pairs:
        return cannot_tell(NO_PAIRS)
    d, over, under, full, witness = evidence.stream.d_model, 0, 0, 0, ""
    cut = tolerance(evidence.stream.dtype, (d,))
    for writer, reader in pairs:
        out, read = evidence.head(writer).ov, evidence.head(reader).ov
        of_read, of_out, of_product = (rank(map, cut) for map in (read, out, read @ out))
        bound = min(of_read, of_out)
        over += of_product > bound
        under += of_product < of_read + of_out - d
        full += of_product == bound
        if of_product > bound and not witness:
            witness = f"{writer} -> {reader}.V: rank {of_product}, factors {of_read} and {of_out}"
    figures: dict[str, Figure] = {
        "pairs": len(pairs),
        "cut": cut,
        "above_the_bound": over,
        "below_the_lower_bound": under,
        "at_the_bound": full,
    }
    if over or under:
        why = (
            f"with a cut at {cut:.1g} of the largest gain, {over + under} of {len(pairs)} pairs are outside the bounds"
        )
        condition = "ranks are exact: what is cut off in a factor can be the larger part of the product"
        return Finding("holds under", why, condition, figures, (witness,) if witness else ())
    why = f"all {len(pairs)} sampled pairs are within both bounds, and {full} reach the upper one"
    return Finding("holds", why, None, figures)


def eigenvalues_are_strengths(evidence: Evidence) -> Finding:
    """L6: moduli of eigenvalues against singular values, of square virtual weights ``OV_b OV_a``."""
    pairs = list[tuple[float, float, float, str]]()
    stored, sampled = stored_eps(evidence.stream), evidence.pairs()
    if not sampled:
        return cannot_tell(NO_PAIRS)
    for writer, reader in sampled:
        read, write = evidence.head(reader).ov, evidence.head(writer).ov
        product = read @ write
        gains = beyond_rounding(
            singular_values(product), spectral_norm(read) * spectral_norm(write), sign_eps(evidence.stream)
        )
        if float(gains[0]) > 0:
            moduli = eigenvalues(product, stored).abs()
            shares = float(moduli.max() / gains[0]), float(moduli.sum() / gains.sum())
            pairs.append((*shares, float(gains[0]), f"{writer} -> {reader}.V"))
    if not pairs:
        return cannot_tell(f"in none of {len(sampled)} pairs does a head read anything of another")
    pairs.sort()
    share = torch.tensor([of_sums for _, of_sums, _, _ in pairs])
    least, _, gain, name = pairs[0]
    figures: dict[str, Figure] = {
        "pairs": len(pairs),
        "median_of_sum_of_moduli_over_sum_of_gains": float(share.median()),
        "least_largest_modulus_over_largest_gain": least,
        "largest_of_these": pairs[-1][0],
    }
    if float(share.min()) > 1 - max(FOLDED_ROUNDING, (ROUNDINGS * sign_eps(evidence.stream)) ** 2):
        return Finding(
            "holds", f"eigenvalues and gains agree in all {len(pairs)} sampled pairs that are not 0", None, figures
        )
    median = float(share.median())
    why = f"in the median of {len(pairs)} sampled pairs, eigenvalues add up to {median:.2g} of the sum of gains"
    witness = f"{name}: largest gain {gain:.3g}, largest eigenvalue {least * gain:.3g}"
    return Finding("fails", why, None, figures, (witness,))


def effective_dimension(evidence: Evidence) -> Finding:
    """C3: the strongest edges into keys: gains above the null's edge beside other counts."""
    if not evidence.pairs():
        return cannot_tell(NO_PAIRS)
    counts, witnesses = list[dict[str, float | int]](), list[str]()
    for edge in evidence.head_edges("K").top(8, "z").rows():
        name = str(edge["reader"])
        channel = summary(Channel(str(edge["writer"]), name, draws=20, seed=evidence.seed)(evidence.stream))
        count = {key: value for key in _COUNTS if isinstance(value := channel[key], float | int)}
        counts.append(count)
        witnesses.append(
            f"{edge['writer']} -> {name}: {count['numerical_rank']} not zero, {count['above_null_edge']} above chance, "
            f"entropy rank {count['entropy_rank']:.3g}"
        )
    if not counts:
        return cannot_tell("no head that writes reaches a head that reads keys: one of the two is zero in every pair")
    differing = sum(count["numerical_rank"] != count["above_null_edge"] for count in counts)
    figures: dict[str, Figure] = {"edges": len(counts), **{f"first_{key}": n for key, n in counts[0].items()}}
    figures["edges_where_the_threshold_decides"] = differing
    if not differing:
        why = f"in the {len(counts)} edges of largest z every gain that is not zero is above the null's edge"
        return Finding("holds", why, None, figures, tuple(witnesses[:3]))
    why = f"in {differing} of the {len(counts)} edges of largest z the dimension depends on what counts as zero"
    return Finding(
        "holds under", why, "a threshold is given, here the edge of the matched null", figures, tuple(witnesses[:3])
    )
