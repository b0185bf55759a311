"""The exactness law: what all reaching writers put on a reader, summed, is what the module computes."""

from __future__ import annotations

import torch
from tiny_models import Flow
from torch import Tensor

from virtual_weights.stream import Stream, scale


def contributions(stream: Stream, seen: Flow, tokens: Tensor) -> list[tuple[int, Tensor]]:
    """Every writer's ``O z`` with the state in which it first appears; each of shape (tokens, d)."""
    dtype = seen.embeds["embed"].dtype
    found: list[tuple[int, Tensor]] = []
    inner = {layer: z.unflatten(-1, (stream.spec.n_heads, -1)) for layer, z in seen.attention_inner.items()}
    for component in stream.components:
        label = component.label
        if component.writes is None:
            continue
        if label.kind == "embed":
            found.append((0, stream.write("embed")[0].to(dtype)[:, tokens].T))
        elif label.kind == "pos":
            found.append((0, stream.write("pos")[0].to(dtype)[:, : len(tokens)].T))
        elif label.kind == "head":
            found.append(
                (component.writes, inner[label.layer][:, label.index] @ stream[f"{label}.O"].dense().to(dtype).T)
            )
        elif label.kind == "mlp":
            found.append(
                (component.writes, seen.mlp_inner[label.layer] @ stream.write("mlp", label.layer)[0].to(dtype).T)
            )
        else:
            found.append((component.writes, stream[str(label)].dense().to(dtype)[:, 0].expand(len(tokens), -1)))
    return found


def errors(stream: Stream, seen: Flow, tokens: Tensor) -> dict[str, float]:
    """Relative error of every reader: ``||sum R~ O z / s + c - own|| / ||own||``, the worst layer of each port."""
    written = contributions(stream, seen, tokens)
    layers = range(stream.spec.n_layers)
    ports = ("Q", "K", "V", "gate", "up") if stream.spec.gated else ("Q", "K", "V", "in")
    wanted = [(port, layer, seen.reads[port, layer]) for layer in layers for port in ports]
    assert seen.logits is not None
    worst: dict[str, float] = {}
    for port, layer, own in [*wanted, ("unembed", None, seen.logits)]:
        reads = next(c.reads for c in stream.components if c.reads is not None and _is(c, port, layer))
        read = stream.read(port, layer)
        reaching = [vector for position, vector in written if position <= reads]
        rows, own = _some_rows(read.maps.flatten(0, 1), own)
        s = scale(sum(reaching), stream.spec.norm, stream.spec.norm_eps)[:, None]
        total = sum(vector @ rows.to(vector.dtype).T for vector in reaching) / s
        if read.constants is not None:
            total = total + read.constants.flatten().to(total.dtype)
        worst[port] = max(worst.get(port, 0.0), float((total - own).norm() / own.norm()))
    return worst


def _some_rows(maps: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of a reader; of a large vocabulary a seeded choice, or 300 writers times 49,152 tokens take minutes."""
    if len(maps) <= 4096:
        return maps, own
    rows = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))[:1024]
    return maps[rows], own[:, rows]


def _is(component: object, port: str, layer: int | None) -> bool:
    label = component.label  # type: ignore[attr-defined]
    kind = {"unembed": "unembed", "gate": "mlp", "up": "mlp", "in": "mlp"}.get(port, "head")
    return label.kind == kind and label.layer == layer
