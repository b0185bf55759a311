"""Naive dense twins: every product formed, in float64, straight from the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.stream import Stream


def dense_composition(
    stream: Stream, port: str, offset: int = 0, *, transpose_writer: bool = False
) -> tuple[Tensor, Tensor]:
    """Score and strength of all pairs, (readers, writers), NaN where the writer comes too late."""
    heads = [stream[str(c.label)] for c in stream.heads]
    circuits = []
    for head in heads:
        q, k, v, o = (m.dense().double() for m in (head.q, head.k, head.v, head.o))
        turn = stream.rotation(offset) if offset else None
        qk = q.T @ k if turn is None else q.T @ turn.T @ k
        circuits.append((o @ v, {"Q": qk.T, "K": qk, "V": o @ v}[port]))
    n = len(heads)
    score = torch.full((n, n), float("nan"), dtype=torch.float64)
    strength = score.clone()
    for r, reader in enumerate(stream.heads):
        for w, writer in enumerate(stream.heads):
            if reader.label.layer <= writer.label.layer:
                continue
            left, right = circuits[r][1], circuits[w][0]
            strength[r, w] = torch.linalg.norm(left @ (right.T if transpose_writer else right))
            score[r, w] = strength[r, w] / (torch.linalg.norm(left) * torch.linalg.norm(right))
    return score, strength
