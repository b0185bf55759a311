"""Tiny random research models under TransformerLens's names and settings, and what they compute, written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_SIZES: dict[str, Any] = dict(n_layers=2, d_model=24, n_ctx=32, d_head=6, n_heads=4, d_vocab=37)
_SETTINGS: dict[str, Any] = dict(attn_only=True, normalization_type=None, positional_embedding_type="standard")

MLPS = dict(attn_only=False, act_fn="gelu", d_mlp=20)
SHAPES: dict[str, dict[str, Any]] = {
    "attention-only": {},
    "no-layers": {"n_layers": 0},
    "one-layer-no-positions": {"n_layers": 1, "positional_embedding_type": "none"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "shortformer-behind-norms": {"positional_embedding_type": "shortformer", "normalization_type": "LN"},
    "rotary-pairs": {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True},
    "rotary-halves": {"positional_embedding_type": "rotary", "rotary_base": 500, "normalization_type": "RMS"},
    "parallel": {**MLPS, "normalization_type": "LNPre", "parallel_attn_mlp": True},
    "gated-grouped": {
        **MLPS,
        "normalization_type": "RMSPre",
        "act_fn": "silu",
        "gated_mlp": True,
        "n_key_value_heads": 2,
    },
    "scaled-capped": {"attn_scale": 1.7, "attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 4.0},
    "unscaled": {"use_attn_scale": False, "normalization_type": "LN", **MLPS},
    "answers-of-their-own": {**MLPS, "act_fn": "relu", "d_vocab_out": 5, "n_heads": 3},
}
"""Settings that differ from a two-layer attention-only model without norms."""


def research(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict whose every parameter is random, with the buffers that TransformerLens saves, and its settings."""
    config = _SIZES | _SETTINGS | SHAPES[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    d, k, h, vocab = (config[key] for key in ("d_model", "d_head", "n_heads", "d_vocab"))
    shared, norm, out = config.get("n_key_value_heads"), config["normalization_type"], config.get("d_vocab_out", vocab)
    tensors = {"embed.W_E": random(vocab, d), "unembed.W_U": random(d, out), "unembed.b_U": random(out)}
    if config["positional_embedding_type"] in ("standard", "shortformer"):
        tensors["pos_embed.W_pos"] = random(config["n_ctx"], d)
    norms = {"ln_final"}
    for layer in range(config["n_layers"]):
        attn, mlp, mark = f"blocks.{layer}.attn.", f"blocks.{layer}.mlp.", "_" if shared else ""
        tensors |= {f"{attn}W_Q": random(h, d, k), f"{attn}b_Q": random(h, k)}
        for port in "KV":
            tensors |= {f"{attn}{mark}W_{port}": random(shared or h, d, k)}
            tensors |= {f"{attn}{mark}b_{port}": random(shared or h, k)}
        tensors |= {f"{attn}W_O": random(h, k, d), f"{attn}b_O": random(d)}
        norms.add(f"blocks.{layer}.ln1")
        if not config["attn_only"]:
            n = config["d_mlp"]
            tensors |= {f"{mlp}W_in": random(d, n), f"{mlp}W_out": random(n, d), f"{mlp}b_out": random(d)}
            tensors |= {f"{mlp}b_in": torch.zeros(n, dtype=torch.float64) if config.get("gated_mlp") else random(n)}
            tensors |= {f"{mlp}W_gate": random(d, n)} if config.get("gated_mlp") else {}
            norms.add(f"blocks.{layer}.ln2")
    for place in sorted(norms) if norm in ("LN", "RMS") else ():
        tensors[f"{place}.w"] = 1 + random(d)
        tensors |= {f"{place}.b": random(d)} if norm == "LN" else {}
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    for layer in range(config["n_layers"]):
        tensors[f"blocks.{layer}.attn.mask"] = torch.ones(4, 4).tril().bool()
        tensors[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-math.inf)
    return tensors, config


def logits(tensors: dict[str, Tensor], config: dict[str, Any], tokens: Tensor) -> Tensor:
    """What TransformerLens computes on (T,) tokens, (T, answers), from its own definitions, one head at a time."""
    kind, length = config["positional_embedding_type"], len(tokens)
    x = tensors["embed.W_E"][tokens]
    x = x + tensors["pos_embed.W_pos"][:length] if kind == "standard" else x
    for layer in range(config["n_layers"]):
        place = f"blocks.{layer}."
        given = _attention(tensors, config, place, _norm(tensors, config, f"{place}ln1", x))
        beside = x if config.get("parallel_attn_mlp") else x + given
        x = x + given
        if not config["attn_only"]:
            x = x + _mlp(tensors, config, f"{place}mlp.", _norm(tensors, config, f"{place}ln2", beside))
    x = _norm(tensors, config, "ln_final", x) @ tensors["unembed.W_U"] + tensors["unembed.b_U"]
    cap = config.get("output_logits_soft_cap")
    return cap * torch.tanh(x / cap) if cap else x


def _norm(tensors: dict[str, Tensor], config: dict[str, Any], place: str, x: Tensor) -> Tensor:
    kind = config["normalization_type"]
    if kind is None:
        return x
    x = x - x.mean(-1, keepdim=True) if kind.startswith("LN") else x
    x = x / (x.pow(2).mean(-1, keepdim=True) + config.get("eps", 1e-5)).sqrt()
    x = x * tensors[f"{place}.w"] if f"{place}.w" in tensors else x
    return x + tensors[f"{place}.b"] if f"{place}.b" in tensors else x


def _attention(tensors: dict[str, Tensor], config: dict[str, Any], place: str, x: Tensor) -> Tensor:
    heads, k, length = config["n_heads"], config["d_head"], len(x)
    shared = config.get("n_key_value_heads")
    scale = config.get("attn_scale", k**0.5) if config.get("use_attn_scale", True) else 1.0
    placed = x + tensors["pos_embed.W_pos"][:length] if config["positional_embedding_type"] == "shortformer" else x
    total = torch.zeros_like(x)
    for head in range(heads):
        own, mark = (head, "") if shared is None else (head // (heads // shared), "_")
        q = placed @ tensors[f"{place}attn.W_Q"][head] + tensors[f"{place}attn.b_Q"][head]
        key = placed @ tensors[f"{place}attn.{mark}W_K"][own] + tensors[f"{place}attn.{mark}b_K"][own]
        v = x @ tensors[f"{place}attn.{mark}W_V"][own] + tensors[f"{place}attn.{mark}b_V"][own]
        if config["positional_embedding_type"] == "rotary":
            q, key = _turned(q, config), _turned(key, config)
        scores = q @ key.T / scale
        cap = config.get("attn_scores_soft_cap")
        scores = cap * torch.tanh(scores / cap) if cap else scores
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        total = total + scores.softmax(-1) @ v @ tensors[f"{place}attn.W_O"][head]
    return total + tensors[f"{place}attn.b_O"]


def _turned(x: Tensor, config: dict[str, Any]) -> Tensor:
    """Rotary: plane i turns at place t by the angle t base^(-2i/dim)."""
    dim, pairs = config.get("rotary_dim", config["d_head"]), config.get("rotary_adjacent_pairs", False)
    result = x.clone()
    for t in range(len(x)):
        for i in range(dim // 2):
            a, b = (2 * i, 2 * i + 1) if pairs else (i, i + dim // 2)
            angle = t * config.get("rotary_base", 10000) ** (-2 * i / dim)
            result[t, a] = x[t, a] * math.cos(angle) - x[t, b] * math.sin(angle)
            result[t, b] = x[t, b] * math.cos(angle) + x[t, a] * math.sin(angle)
    return result


def _mlp(tensors: dict[str, Tensor], config: dict[str, Any], place: str, x: Tensor) -> Tensor:
    act = getattr(functional, config["act_fn"])
    if config.get("gated_mlp"):
        inner = act(x @ tensors[f"{place}W_gate"]) * (x @ tensors[f"{place}W_in"]) + tensors[f"{place}b_in"]
    else:
        inner = act(x @ tensors[f"{place}W_in"] + tensors[f"{place}b_in"])
    return inner @ tensors[f"{place}W_out"] + tensors[f"{place}b_out"]
