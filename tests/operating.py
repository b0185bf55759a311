"""Exact operating points of the tiny transformers models, from what their own modules receive and give."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import flow, norms_in_full_precision
from torch import Tensor, nn

from virtual_weights.stream import OperatingPoint, Stream
from virtual_weights.stream.operating_point import gate_factor

_NORMS = {
    "llama": ("model.layers.{l}.input_layernorm", "model.layers.{l}.post_attention_layernorm", "model.norm"),
    "gpt2": ("transformer.h.{l}.ln_1", "transformer.h.{l}.ln_2", "transformer.ln_f"),
    "gpt_neox": (
        "gpt_neox.layers.{l}.input_layernorm",
        "gpt_neox.layers.{l}.post_attention_layernorm",
        "gpt_neox.final_layer_norm",
    ),
}
_ACTIVATION = {
    "llama": "model.layers.0.mlp.act_fn",
    "gpt2": "transformer.h.0.mlp.act",
    "gpt_neox": "gpt_neox.layers.0.mlp.act",
}


def operate(model: nn.Module, stream: Stream, tokens: Tensor) -> tuple[OperatingPoint, Tensor]:
    """The operating point of one prompt and the model's own final residual, (T, d), before the final norm."""
    kind = {"mistral": "llama", "qwen2": "llama"}.get(model.config.model_type, model.config.model_type)
    modules, layers = dict(model.named_modules()), range(model.config.num_hidden_layers)
    attention, mlp, final = _NORMS[kind]
    sites = {"unembed": final}
    for i in layers:
        sites |= {f"L{i}.attn": attention.format(l=i), f"L{i}.mlp": mlp.format(l=i)}
    states: dict[str, Tensor] = {}

    def note(site: str) -> Any:
        return lambda module, args: states.__setitem__(site, args[0][0].detach())

    hooks = [modules[name].register_forward_pre_hook(note(site)) for site, name in sites.items()]
    with torch.no_grad(), norms_in_full_precision():
        attentions = model(tokens[None], output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    reads, act = flow(model, tokens).reads, modules[_ACTIVATION[kind]]
    gates = {
        f"L{i}.mlp": act(reads["gate", i]) if stream.spec.gated else gate_factor(act, reads["in", i]) for i in layers
    }
    point = OperatingPoint(
        stream.source.fingerprint,
        tokens,
        {site: stream.scale(x) for site, x in states.items()},
        {f"L{i}.attn": p[0] for i, p in enumerate(attentions)},
        gates,
    )
    return point, states["unembed"]
