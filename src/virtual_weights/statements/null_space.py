"""L4, C2: what a reader cannot see, and who else can."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.linalg import (
    FLOAT64_ROUNDING,
    FOLDED_RANK_CUT,
    FOLDED_ROUNDING,
    THREE_DIGITS,
    ZERO,
    accumulate,
    random_generator,
)
from virtual_weights.statements.evidence import Evidence, Figure, Finding, cannot_tell, dense
from virtual_weights.stream import Stream


def null_space_is_kept(evidence: Evidence) -> Finding:
    """L4: a direction in the null space of a head's values: what the head leaves of it, and who reads it later."""
    names, directions, norms, erased = list[str](), list[Tensor](), list[float](), 0
    generator = random_generator(evidence.seed)
    for name in evidence.sample(evidence.heads, min(evidence.samples, 24)):
        head = evidence.head(name)
        value, out = dense(head.v), dense(head.o)
        erased += int((torch.linalg.eigvals(value @ out).add(1).abs() < THREE_DIGITS).sum())
        null = _null_space(value)
        if null.shape[1]:
            direction = null @ torch.randn(null.shape[1], generator=generator, dtype=accumulate)
            direction = direction / direction.norm()
            names.append(name)
            directions.append(direction)
            norms.append(float((direction + out @ (value @ direction)).norm()))
    if not names:
        return cannot_tell("none of the sampled heads has a null space")
    strongest = _strongest_readers(evidence.stream, names, torch.stack(directions, 1))
    readers = {i: reader for i, (gain, reader) in enumerate(strongest) if gain > FOLDED_ROUNDING}
    figures: dict[str, Figure] = {
        "heads_looked_at": len(names),
        "null_space_directions_seen_later": len(readers),
        "least_norm_kept": min(norms),
        "largest_norm_kept": max(norms),
        "directions_with_eigenvalue_near_minus_one": erased,
    }
    if not readers:
        return Finding(
            "holds",
            f"no later component reads the direction that each of {len(names)} sampled heads does not see",
            None,
            figures,
        )
    witnesses = [
        f"unseen by {names[i]}.V, kept with norm {norms[i]:.6f}, read by {reader}" for i, reader in readers.items()
    ]
    why = f"of {len(names)} directions, each unseen by the values of one head, a later component reads {len(readers)}"
    return Finding("fails", why, None, figures, tuple(witnesses[:3]))


def communication_space(evidence: Evidence) -> Finding:
    """C2: the intersection of all later row spaces against their sum, at the state in the middle."""
    stream = evidence.stream
    ledger = evidence.ask(Bandwidth())
    state = stream.states // 2
    spaces = _row_spaces(stream, state)
    if len(spaces) < 2:
        return cannot_tell("fewer than two attention heads read after the middle of the stream")
    mean = sum((basis.T @ basis for basis in spaces.values()), torch.zeros((), dtype=accumulate)) / len(spaces)
    values, vectors = torch.linalg.eigh(mean)
    common, together = int((values > 1 - FLOAT64_ROUNDING).sum()), int((values > ZERO).sum())
    figures: dict[str, Figure] = {
        "state": state,
        "later_head_readers": len(spaces),
        "dimension_of_the_intersection": common,
        "dimension_of_the_sum": together,
        "dimension_of_the_sum_with_mlps_and_unembedding": int(ledger.numbers("read_dim")[state]),
        "unread_dimension": int(ledger.numbers("unread_dim")[state]),
    }
    if common == together:
        return Finding("holds", f"all later readers read the same {common} dimensions", None, figures)
    direction = vectors[:, len(values) - together]  # read by the fewest
    cosines = sorted(((float((basis @ direction).norm()), name) for name, basis in spaces.items()), reverse=True)
    (most, reader), (least, other) = cosines[0], cosines[-1]
    witness = f"a direction read by {reader} (cosine {most:.3f}), not by {other} (cosine {least:.1g})"
    why = f"the later readers share {common} dimensions, but together they read {together}"
    return Finding("fails", why, None, figures, (witness,))


def _null_space(rows: Tensor) -> Tensor:
    """Orthonormal columns of the null space."""
    _, s, vh = torch.linalg.svd(rows, full_matrices=True)
    rank = int((s > FOLDED_RANK_CUT * s[0]).sum())
    return vh[rank:].T


def _strongest_readers(stream: Stream, writers: list[str], directions: Tensor) -> list[tuple[float, str]]:
    """For each direction (in columns) its strongest reader after a writer: gain over the reader's norm, and name."""
    best = [(0.0, "")] * len(writers)
    groups = [stream.groups.of(writer) for writer in writers]
    for state, names, maps in _readers(stream):
        maps = maps.to(accumulate)
        gains = torch.linalg.vector_norm(maps @ directions, dim=1) / torch.linalg.vector_norm(maps, dim=(1, 2))[:, None]
        largest, index = gains.nan_to_num(0).max(0)
        for i, group in enumerate(groups):
            if group.reaches(state) and float(largest[i]) > best[i][0]:
                best[i] = (float(largest[i]), names[int(index[i])])
    return best


def _readers(stream: Stream) -> Iterator[tuple[int | None, list[str], Tensor]]:
    """The values of every attention, every port of an MLP and the unembedding: state, names, maps (m, k, d)."""
    for group in stream.groups:
        for port in group.ports:
            if port not in ("Q", "K"):
                yield group.reads, list(group.readers(port)[:: group.shared(port)]), stream.read(port, group).maps


def _row_spaces(stream: Stream, state: int) -> dict[str, Tensor]:
    """Every distinct reader of a head at or after a state, with orthonormal rows of what it reads."""
    spaces = dict[str, Tensor]()
    for group in stream.groups.heads:
        for port in group.ports if (group.reads or 0) >= state else ():
            _, s, vh = torch.linalg.svd(stream.read(port, group).maps.to(accumulate), full_matrices=False)
            mask = (s > FOLDED_RANK_CUT * s[:, :1]) & (s > 0)
            for i, label in enumerate(group.labels[:: group.shared(port)]):
                spaces[f"{label}.{port}"] = vh[i, mask[i]]
    return spaces
