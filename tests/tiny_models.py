"""Tiny random transformers models of every supported family, and what flows in them on a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import virtual_weights as vw

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    vocab_size=37,
    max_position_embeddings=64,
)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-full": ("llama", {**LLAMA, "num_key_value_heads": 6}),
    "llama-grouped-untied": ("llama", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama-multi-query-tied": ("llama", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases-wide-heads": (
        "llama",
        {**LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "head_dim": 8},
    ),
    "llama3-scaling": (
        "llama",
        {
            **LLAMA,
            "num_key_value_heads": 3,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "mistral": ("mistral", {**LLAMA, "num_key_value_heads": 2, "head_dim": 4}),
    "qwen2": ("qwen2", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", dict(n_embd=24, n_layer=3, n_head=4, n_positions=32, vocab_size=37)),
    "gpt2-untied-narrow": (
        "gpt2",
        dict(n_embd=24, n_layer=2, n_head=4, n_positions=32, vocab_size=37, n_inner=20, tie_word_embeddings=False),
    ),
    "neox-parallel-partial-rotary": (
        "gpt_neox",
        dict(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=37,
            max_position_embeddings=64,
        ),
    ),
    "neox-sequential-no-attention-bias": (
        "gpt_neox",
        dict(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=37,
            max_position_embeddings=64,
            use_parallel_residual=False,
            attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        ),
    ),
}


WITH_NORMS_AFTER: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {**LLAMA, "num_key_value_heads": 2, "head_dim": 4, "query_pre_attn_scalar": 16}),
}
"""Models with norms behind their parts and on queries and keys, apart from the shapes that most tests go through."""


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose every parameter is random: gains away from 1 and biases away from 0."""
    kind, sizes = {**SHAPES, **WITH_NORMS_AFTER}[name]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **sizes, **ids, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "norm" in key or "ln_" in key
            parameter.copy_(1 + 0.3 * noise if gain and key.endswith("weight") else 0.3 * noise)
    return model.to(dtype).eval()


@dataclass
class Flow:
    """What one prompt did: inner activations of writers, outputs of readers, by layer; tokens run along axis 0."""

    embeds: dict[str, Tensor] = field(default_factory=dict)
    attention_inner: dict[int, Tensor] = field(default_factory=dict)
    mlp_inner: dict[int, Tensor] = field(default_factory=dict)
    reads: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


_PARTS = {
    "llama": ("model.layers.{l}.self_attn.o_proj", "model.layers.{l}.mlp.down_proj", "model.embed_tokens"),
    "gpt2": ("transformer.h.{l}.attn.c_proj", "transformer.h.{l}.mlp.c_proj", "transformer.wte"),
    "gpt_neox": ("gpt_neox.layers.{l}.attention.dense", "gpt_neox.layers.{l}.mlp.dense_4h_to_h", "gpt_neox.embed_in"),
}
_READS = {
    "llama": {
        "Q": "model.layers.{l}.self_attn.q_proj",
        "K": "model.layers.{l}.self_attn.k_proj",
        "V": "model.layers.{l}.self_attn.v_proj",
        "gate": "model.layers.{l}.mlp.gate_proj",
        "up": "model.layers.{l}.mlp.up_proj",
    },
    "gpt2": {"QKV": "transformer.h.{l}.attn.c_attn", "in": "transformer.h.{l}.mlp.c_fc"},
    "gpt_neox": {"QKV": "gpt_neox.layers.{l}.attention.query_key_value", "in": "gpt_neox.layers.{l}.mlp.dense_h_to_4h"},
}


def flow(model: nn.Module, tokens: Tensor) -> Flow:
    """Run transformers on one prompt and note what its own modules receive and give, before rotary."""
    kind = {"mistral": "llama", "qwen2": "llama"}.get(model.config.model_type, model.config.model_type)
    signals, hooks, modules = Flow(), [], dict(model.named_modules())
    inner, mlp, embed = _PARTS[kind]

    def note_input(store: dict[int, Tensor], layer: int) -> Any:
        return lambda module, args: store.__setitem__(layer, args[0][0].detach())

    def note_output(store: dict[Any, Tensor], key: Any) -> Any:
        return lambda module, args, out: store.__setitem__(key, out.reshape(-1, *out.shape[-1:]).detach())

    for layer in range(model.config.num_hidden_layers):
        hooks.append(
            modules[inner.format(l=layer)].register_forward_pre_hook(note_input(signals.attention_inner, layer))
        )
        hooks.append(modules[mlp.format(l=layer)].register_forward_pre_hook(note_input(signals.mlp_inner, layer)))
        for port, name in _READS[kind].items():
            hooks.append(modules[name.format(l=layer)].register_forward_hook(note_output(signals.reads, (port, layer))))
    hooks.append(modules[embed].register_forward_hook(note_output(signals.embeds, "embed")))
    if kind == "gpt2":
        hooks.append(modules["transformer.wpe"].register_forward_hook(note_output(signals.embeds, "pos")))
    with torch.no_grad(), norms_in_full_precision():
        signals.logits = model(tokens[None]).logits[0]
    for hook in hooks:
        hook.remove()
    _split(signals, model, kind)
    return signals


def _split(signals: Flow, model: nn.Module, kind: str) -> None:
    """Take fused QKV outputs apart exactly as transformers' own forward does."""
    heads = model.config.num_attention_heads
    for port, layer in [key for key in signals.reads if key[0] == "QKV"]:
        fused = signals.reads.pop((port, layer))
        if kind == "gpt2":
            parts = fused.split(model.config.hidden_size, dim=-1)
        else:
            parts = [p.flatten(1) for p in fused.view(len(fused), heads, -1).chunk(3, dim=-1)]
        for name, part in zip("QKV", parts, strict=True):
            signals.reads[name, layer] = part


@contextmanager
def norms_in_full_precision() -> Iterator[None]:
    """Run RMSNorm in its input's dtype: transformers casts to float32 inside, which hides all below 1e-7."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def forward(self: Any, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    classes = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm)
    forwards = [c.forward for c in classes]
    for c in classes:
        c.forward = forward
    try:
        yield
    finally:
        for c, original in zip(classes, forwards, strict=True):
            c.forward = original


def in_float64(name: str) -> tuple[Any, vw.Stream]:
    """A tiny model and its stream, both in float64."""
    model = tiny(name, dtype=torch.float64)
    return model, vw.open(model).to(torch.float64)


_GGUF = {
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_tensors(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's or Qwen2's tensors as llama.cpp's converter writes them: a Llama's rotary planes in pairs of rows."""
    named = dict[str, Tensor]()
    for key, weight in tensors.items():
        for hf, spelled in _GGUF.items():
            key = key.replace(hf, spelled)
        if config.model_type == "llama" and key.split(".")[-2] in ("attn_q", "attn_k"):
            halves = weight.unflatten(0, (-1, 2, config.head_dim // 2))
            weight = halves.transpose(1, 2).reshape(weight.shape).clone()
        named[key] = weight
    return named


def gguf_sizes(config: Any) -> dict[str, int]:
    """A model's sizes under GGUF's names."""
    return {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
