"""T1, L5, L3: maps in sequence, beside the stream and along one path."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from virtual_weights.linalg import Dense, Sum, accumulate, frobenius_norm, svd
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell, dense
from virtual_weights.stream import Component, Head

_CUT = 1e-5  # of the largest singular value: gains are folded in float32
_EQUAL = 1e-5  # the root of what rounding leaves of 1 - cos^2, with room
_SINGULAR = 1e-10  # of I + T: only an eigenvalue of T at -1 loses a dimension, a large gain does not
_STEPS = 3


def composed_rank(bench: Bench) -> Finding:
    """T1: heads in sequence: rank of the product of their OV circuits, and of ``prod(I + OV)``."""
    stream = bench.stream
    if len(stream.attention_layers) < 2:
        return cannot_tell("the checkpoint holds fewer than two layers with attention")
    broken, beyond, witness = 0, 0, ""
    runs = _runs(bench)
    ranks = list[tuple[int, int, int, int]]()
    for run in runs:
        heads = [bench.head(c) for c in run]
        own = [_rank(svd(head.ov).S) for head in heads]
        path = reduce(lambda below, above: above @ below, (head.ov for head in heads))
        ranks.append((min(own), _rank(svd(path).S), *_beside_the_stream(heads, stream.d_model)))
        broken += ranks[-1][1] > min(own) or ranks[-1][3] > sum(own)
        if ranks[-1][2] > min(own):
            beyond += 1
            names = " > ".join(str(c.label) for c in run)
            witness = witness or f"{names}: least rank {min(own)}, composed {ranks[-1][2]}"
    evidence: dict[str, Figure] = {
        "sequences": len(runs),
        "least_rank": min(r[0] for r in ranks),
        "largest_rank_of_a_path": max(r[1] for r in ranks),
        "least_rank_of_a_composed_stream": min(r[2] for r in ranks),
        "largest_rank_of_a_composed_update": max(r[3] for r in ranks),
        "paths_beyond_the_bound": broken,
        "streams_beyond_the_bound": beyond,
    }
    if broken:
        return Finding("fails", f"{broken} products exceed the least rank of their factors", None, evidence)
    if not beyond:
        return Finding("holds", "neither paths nor composed streams exceed the least rank", None, evidence)
    why = f"no path exceeds the least rank, {beyond} of {len(runs)} composed streams I + T do"
    return Finding("holds under", why, "a product along one path, without the stream beside it", evidence, (witness,))


def virtual_weights_compose(bench: Bench) -> Finding:
    """L5: ``R_k O_i`` against ``a R_k (O_j R_j) O_i`` for triples of heads, a chosen for the least difference.

    The factor a stands for what the weights do not know: attention and norm scalar of the head between.
    """
    triples = _triples(bench)
    if not triples:
        return cannot_tell("no three heads of this model stand in sequence")
    found = list[tuple[float, str]]()
    for i, j, k in triples:
        first, between, last = (bench.head(c) for c in (i, j, k))
        read = last.qk.to(accumulate)
        direct = read @ first.ov.to(accumulate)
        size = frobenius_norm(direct)
        if size > 0:
            through = read @ between.ov.to(accumulate) @ first.ov.to(accumulate)
            other, apart = frobenius_norm(through), frobenius_norm(Sum((direct, through.scaled(-1.0))))
            cosine = (size**2 + other**2 - apart**2) / (2 * size * other) if other > 0 else 0.0
            found.append((max(0.0, 1 - cosine**2) ** 0.5, f"{i.label} > {j.label} > {k.label}.K"))
    if not found:
        return cannot_tell("no chosen head reads anything of the first of its triple")
    found.sort()
    sizes = torch.tensor([each for each, _ in found])
    equal = int((sizes < _EQUAL).sum())
    evidence: dict[str, Figure] = {
        "triples": len(found),
        "least_discrepancy": float(sizes[0]),
        "median_discrepancy": float(sizes.median()),
        "largest_discrepancy": float(sizes[-1]),
        "triples_that_agree": equal,
    }
    if equal == len(found):
        return Finding("holds", f"all {equal} triples agree", None, evidence)
    half = float(sizes.median())
    why = f"at the best factor, direct and composed differ by {half:.3g} of the direct weight in the median triple"
    return Finding("fails", why, None, evidence, tuple(f"{name}: {size:.3g}" for size, name in found[-2:]))


def _runs(bench: Bench) -> list[list[Component]]:
    """Sequences of heads of successive layers."""
    layers = bench.stream.attention_layers
    starts = bench.chosen(range(max(1, len(layers) - _STEPS + 1)), 8)
    generator = torch.Generator().manual_seed(bench.seed)
    runs = list[list[Component]]()
    for start in starts:
        heads = [bench.stream.heads_of(layer) for layer in layers[start : start + _STEPS]]
        runs.append([each[int(torch.randint(len(each), (), generator=generator))] for each in heads])
    return runs


def _triples(bench: Bench) -> list[tuple[Component, Component, Component]]:
    layers = bench.stream.attention_layers
    generator = torch.Generator().manual_seed(bench.seed)
    found = list[tuple[Component, Component, Component]]()
    for _ in range(min(bench.samples, 32) if len(layers) >= 3 else 0):
        at: list[int] = torch.randperm(len(layers), generator=generator)[:3].sort().values.tolist()
        heads = [bench.stream.heads_of(layers[i]) for i in at]
        i, j, k = (each[int(torch.randint(len(each), (), generator=generator))] for each in heads)
        found.append((i, j, k))
    return found


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
    return d - (len(right) - _rank(torch.linalg.svdvals(inner), _SINGULAR)), _rank(svd(Dense(left) @ Dense(right)).S)


def _rank(gains: Tensor, cut: float = _CUT) -> int:
    return int(((gains > cut * gains[0]) & (gains > 0)).sum())
