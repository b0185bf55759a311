"""The operating point of one prompt, from a run of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.runtime.model import load
from virtual_weights.runtime.watch import Kind, watching
from virtual_weights.stream import OperatingPoint, Stream, scale
from virtual_weights.stream.operating_point import gate_factor


@torch.no_grad()
def operating_point(stream: Stream, tokens: Tensor, model: nn.Module | None = None) -> OperatingPoint:
    """Run a model on one prompt and note its norm scalars, attention patterns and gates.

    With these fixed every block is linear, and ``analysis.frozen.replay`` gives back the model's own final residual up
    to rounding of the run's dtype.

    Args:
        stream: the model.
        tokens: (T,) token ids.
        model: a loaded model with eager attention; without it the checkpoint is loaded in float32.

    Raises:
        UsageError: no tokens, transformers is missing, or the model's attention keeps no pattern.
    """
    if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point():
        raise UsageError(
            f"a prompt of shape {tuple(tokens.shape)}, {tokens.dtype}", expected="token ids (T,)", do="pass one prompt"
        )
    runs = load(stream, model)
    act = activation(stream.spec.activation)
    scalars: dict[str, Tensor] = {}
    patterns: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        own = tensor[0].to(torch.promote_types(tensor.dtype, torch.float32))
        if kind == "pattern":
            patterns[layer] = own
        elif kind == "state":
            s = scale(own, stream.spec.norm, stream.spec.norm_eps)
            scalars.update(dict.fromkeys(sites(stream, layer), s))
        else:
            gates[layer] = act(own) if kind == "gate" else gate_factor(act, own)

    with watching(runs, stream, ("state", "pattern", "gate" if stream.spec.gated else "in"), see):
        forward(runs, tokens[None])
    return OperatingPoint(stream.source.fingerprint, tokens.cpu(), scalars, patterns, gates)


def sites(stream: Stream, state: int) -> tuple[str, ...]:
    """The norm sites that see a state: ``("L3.attn",)``, ``("L3.mlp",)``, both in a parallel block, ``("final",)``."""
    if state == stream.states - 1:
        return ("final",)
    if stream.spec.parallel:
        return f"L{state}.attn", f"L{state}.mlp"
    return (f"L{state // 2}.{'mlp' if state % 2 else 'attn'}",)


def forward(model: nn.Module, tokens: Tensor) -> None:
    """Run the blocks on (B, T) token ids; the unembedding, which nothing here looks at, is left out."""
    body: Any = getattr(model, "base_model", model)  # transformers' name for a model without its head
    body(tokens.to(next(model.parameters()).device), use_cache=False)


def activation(name: str) -> nn.Module:
    """A nonlinearity by transformers' name for it."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]
