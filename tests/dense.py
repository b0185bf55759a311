"""Naive dense twins: every product formed, in float64, straight from the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from virtual_weights.linalg import Dense
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


def seen(stream: Stream, name: str) -> Any:
    """A component as questions take it, ``stream[name]`` less what nothing sees."""
    if name == "unembed":
        return Dense(stream.read("unembed").maps[0])
    return Dense(stream.write(name)[0]) if name in ("embed", "pos") or name.endswith("bias") else stream[name]


def dense_lift(stream: Stream, port: str) -> dict[str, Tensor]:
    """Lift and both main effects of every reader with all writers, log2, whether they reach or not."""
    reads, writes, kinds = [], [], []
    for group in stream.groups.readers(port):
        for label in group.labels:
            part = seen(stream, label)
            circuit = (
                part if group.kind == "unembed" else part.circuit(port) if group.kind == "head" else part.reader(port)
            )
            reads.append(_unit_gram(circuit.dense().double()))
    for group in sorted(stream.groups.writers, key=lambda group: group.first):
        for label in group.labels:
            part = seen(stream, label)
            output = part.ov if group.kind == "head" else part.out if group.kind == "mlp" else part
            writes.append(_unit_gram(output.dense().double().T))
            kinds.append(group.kind)
    product = torch.einsum("rij,wij->rw", torch.stack(reads), torch.stack(writes))
    same = torch.tensor([[a == b for b in kinds] for a in kinds]).double()
    mean_reader = sum(reads) / len(reads)
    mean_writers = torch.einsum("vw,wij->vij", same / same.sum(1, keepdim=True), torch.stack(writes))
    heard = torch.einsum("ij,wij->w", mean_reader, torch.stack(writes))
    listening = torch.einsum("rij,wij->rw", torch.stack(reads), mean_writers)
    both = torch.einsum("ij,wij->w", mean_reader, mean_writers)
    d = stream.d_model
    return {
        "lift": (product * both / (heard * listening)).log2(),
        "writer_effect": (d * heard).log2().expand_as(product),
        "reader_effect": (d * listening).log2(),
    }


def _unit_gram(map: Tensor) -> Tensor:
    return map.T @ map / map.square().sum()
