"""L4, C2: what a reader cannot see, and who else can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.linalg import accumulate
from virtual_weights.statements.evidence import Bench, Figure, Finding, cannot_tell
from virtual_weights.stream import Component, Stream

_CUT = 1e-5  # of the largest singular value
_SEEN = 1e-6  # of a reader's largest gain: below it a unit direction is not seen


def null_space_is_kept(bench: Bench) -> Finding:
    """L4: a direction in the null space of a head's values, through that head, and in the eyes of later readers."""
    looked, directions, kept, erased = list[Component](), list[Tensor](), list[float](), 0
    generator = torch.Generator().manual_seed(bench.seed)
    for component in bench.chosen(bench.stream.heads, min(bench.samples, 24)):
        head = bench.head(component)
        value, out = (m.to(accumulate).dense() for m in (head.v, head.o))
        erased += int((torch.linalg.eigvals(value @ out).add(1).abs() < 1e-3).sum())
        hidden = _hidden(value)
        if hidden.shape[1]:
            direction = hidden @ torch.randn(hidden.shape[1], generator=generator, dtype=accumulate)
            directions.append(direction / direction.norm())
            kept.append(float((directions[-1] + out @ (value @ directions[-1])).norm()))
            looked.append(component)
    if not looked:
        return cannot_tell("no head looked at has a null space")
    best = _seen_by(bench.stream, looked, torch.stack(directions, 1))
    seen = [(i, name) for i, (gain, name) in enumerate(best) if gain > _SEEN]
    evidence: dict[str, Figure] = {
        "heads_looked_at": len(looked),
        "null_space_directions_seen_later": len(seen),
        "least_norm_kept": min(kept),
        "largest_norm_kept": max(kept),
        "directions_with_eigenvalue_near_minus_one": erased,
    }
    if not seen:
        return Finding("holds", "nothing after these heads sees what they do not see", None, evidence)
    told = (f"unseen by {looked[i].label}.V, kept at {kept[i]:.6f}, read by {name}" for i, name in seen[:3])
    why = f"of {len(looked)} directions that a head's values do not see, {len(seen)} are read by something later"
    return Finding("fails", why, None, evidence, tuple(told))


def communication_space(bench: Bench) -> Finding:
    """C2: the intersection of all later row spaces against their sum, at the state in the middle."""
    stream = bench.stream
    ledger = bench.ask(Bandwidth())
    state = stream.states // 2
    spaces = list(_row_spaces(stream, state))
    if len(spaces) < 2:
        return cannot_tell("fewer than two attention heads read after the middle of the stream")
    mean = sum((basis.T @ basis for _, basis in spaces), torch.zeros(stream.d_model, stream.d_model).to(accumulate))
    values, vectors = torch.linalg.eigh(mean / len(spaces))
    common = int((values > 1 - 1e-9).sum())
    together = int((values > 1e-12).sum())
    evidence: dict[str, Figure] = {
        "state": state,
        "later_head_readers": len(spaces),
        "dimension_of_the_intersection": common,
        "dimension_of_the_sum": together,
        "dimension_of_the_sum_with_mlps_and_unembedding": int(ledger.numbers("read_dim")[state]),
        "unread_dimension": int(ledger.numbers("unread_dim")[state]),
    }
    if common == together:
        return Finding("holds", f"all later readers read the same {common} dimensions", None, evidence)
    direction = vectors[:, int((values > 1e-12).nonzero()[0])]  # read by the fewest
    share = sorted(((float((basis @ direction).norm()), name) for name, basis in spaces), reverse=True)
    witness = (
        f"a direction read by {share[0][1]} (cosine {share[0][0]:.3f}), not by {share[-1][1]} ({share[-1][0]:.1g})"
    )
    why = f"the later readers share {common} dimensions, together they read {together}"
    return Finding("fails", why, None, evidence, (witness,))


def _hidden(rows: Tensor) -> Tensor:
    """Orthonormal columns of the null space."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=True)
    rank = int((s > _CUT * s[0]).sum()) if float(s[0]) > 0 else 0
    return vh[rank:].T


def _seen_by(stream: Stream, after: list[Component], directions: Tensor) -> list[tuple[float, str]]:
    """For each direction (in columns) its strongest reader after a component: gain over the reader's norm, and name."""
    best = [(0.0, "")] * len(after)
    for place, name, maps in _readers(stream):
        wide = maps.to(accumulate)
        gains = torch.linalg.vector_norm(wide @ directions, dim=1) / torch.linalg.vector_norm(wide, dim=(1, 2))[:, None]
        for i, component in enumerate(after):
            assert component.writes is not None
            at = int(gains[:, i].nan_to_num(0).argmax())
            if component.writes <= place and float(gains[at, i]) > best[i][0]:
                best[i] = (float(gains[at, i]), name(at))
    return best


def _readers(stream: Stream) -> Iterator[tuple[int, Callable[[int], str], Tensor]]:
    """The values of every layer's heads, every MLP and the unembedding: state, names, maps (m, k, d)."""
    for c in stream.components:
        if c.reads is None or (c.kind == "head" and c.label.index != 0):
            continue
        if c.kind == "head":
            layer, group = c.label.layer, stream.spec.group
            yield c.reads, partial(_value_name, layer, group), stream.read("V", layer).maps
        elif c.kind == "mlp":
            ports = ("gate", "up") if stream.spec.gated else ("in",)
            for port in ports:
                yield c.reads, partial(_name, f"{c.label}.{port}"), stream.read(port, c.label.layer).maps
        else:
            yield c.reads, partial(_name, "unembed"), stream.read("unembed").maps


def _value_name(layer: int | None, group: int, index: int) -> str:
    return f"L{layer}H{index * group}.V"


def _name(name: str, index: int) -> str:
    del index  # one map under this name
    return name


def _row_spaces(stream: Stream, state: int) -> list[tuple[str, Tensor]]:
    """Orthonormal rows of what every distinct head reader at or after a state reads."""
    spaces = list[tuple[str, Tensor]]()
    for layer in stream.attention_layers:
        if (stream.heads_of(layer)[0].reads or 0) < state:
            continue
        for port in ("Q", "K", "V"):
            group = 1 if port == "Q" else stream.spec.group
            _, s, vh = torch.linalg.svd(stream.read(port, layer).maps.to(accumulate), full_matrices=False)
            kept = (s > _CUT * s[:, :1]) & (s > 0)
            spaces += [(f"L{layer}H{i * group}.{port}", vh[i, kept[i]]) for i in range(len(s))]
    return spaces
