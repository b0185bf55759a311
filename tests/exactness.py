"""The exactness law: what all reaching writers put on a reader, summed, is what the module computes."""

from __future__ import annotations

import torch
from dense import seen
from tiny_models import Flow
from torch import Tensor
from uniform import sizes

from virtual_weights.stream import Stream, scale


def contributions(stream: Stream, signals: Flow, tokens: Tensor) -> list[tuple[int, Tensor]]:
    """Every writer's ``O z`` with the state in which it first appears; each of shape (tokens, d)."""
    dtype = signals.embeds["embed"].dtype
    vectors: list[tuple[int, Tensor]] = []
    inner = {layer: z.unflatten(-1, (sizes(stream).n_heads, -1)) for layer, z in signals.attention_inner.items()}
    for component in stream.components:
        label = component.label
        if component.writes is None:
            continue
        if label.kind == "embed":
            vectors.append((0, stream.write("embed")[0].to(dtype)[:, tokens].T))
        elif label.kind == "pos":
            vectors.append((0, stream.write("pos")[0].to(dtype)[:, : len(tokens)].T))
        elif label.kind == "head":
            out = stream[f"{label}.O"].dense().to(dtype)
            vectors.append((component.writes, inner[label.layer][:, label.index] @ out.T))
        elif label.kind == "mlp":
            out = stream.write(f"L{label.layer}.mlp")[0].to(dtype)
            vectors.append((component.writes, signals.mlp_inner[label.layer] @ out.T))
        else:
            vectors.append((component.writes, seen(stream, str(label)).dense().to(dtype)[:, 0].expand(len(tokens), -1)))
    return vectors


def errors(stream: Stream, signals: Flow, tokens: Tensor) -> dict[str, float]:
    """Relative error of every reader: ``||sum R~ O z / s + c - x|| / ||x||``, the worst layer of each port.

    A logit is one less the mean over the vocabulary.
    """
    written = contributions(stream, signals, tokens)
    mlp = ("gate", "up") if stream.spec.gated else ("in",)
    parts = [(port, layer, "attn") for layer in range(stream.spec.n_layers) for port in "QKV"]
    parts += [(port, layer, "mlp") for layer in range(stream.spec.n_layers) for port in mlp]
    received = [(port, f"L{layer}.{part}", signals.reads[port, layer]) for port, layer, part in parts]
    assert signals.logits is not None
    worst: dict[str, float] = {}
    for port, group, whole in [
        *received,
        ("unembed", "unembed", signals.logits - signals.logits.mean(-1, keepdim=True)),
    ]:
        reads, read = stream.groups[group].reads, stream.read(port, group)
        assert reads is not None
        reaching = [vector for position, vector in written if position <= reads]
        rows, expected = _some_rows(read.maps.flatten(0, 1), whole)
        s = scale(sum(reaching), stream.spec.head.norm)[:, None]
        total = sum(vector @ rows.to(vector.dtype).T for vector in reaching) / s
        if read.constants is not None:
            total = total + read.constants.flatten().to(total.dtype)
        worst[port] = max(worst.get(port, 0.0), float((total - expected).norm() / expected.norm()))
    return worst


def _some_rows(maps: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of a reader; of a large vocabulary a seeded choice, or 300 writers times 49,152 tokens take minutes."""
    if len(maps) <= 4096:
        return maps, outputs
    rows = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))[:1024]
    return maps[rows], outputs[:, rows]
