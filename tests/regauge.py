"""The same model in another gauge: heads re-based, or the stream of a Llama rotated."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def rebased(model: nn.Module, seed: int) -> nn.Module:
    """Every head's inner bases changed by random invertible matrices; queries against keys, outputs against values."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    config = changed.config
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", heads)
    with torch.no_grad():
        for name, module in changed.named_modules():
            if name.endswith("self_attn"):
                _rebase_llama(module, heads, shared, generator)
            elif name.endswith(".attn") and hasattr(module, "c_attn"):
                parts = [p.T for p in module.c_attn.weight.split(config.n_embd, 1)]
                q, k, v, o = _rebase(parts[0], parts[1], parts[2], module.c_proj.weight.T, heads, heads, generator)
                module.c_attn.weight.copy_(torch.cat([q, k, v]).T)
                module.c_proj.weight.copy_(o.T)
            elif name.endswith(".attention"):
                fused = module.query_key_value.weight
                parts = fused.view(heads, 3, -1, fused.shape[1]).transpose(0, 1).flatten(1, 2)
                q, k, v, o = _rebase(parts[0], parts[1], parts[2], module.dense.weight, heads, heads, generator)
                together = torch.stack([q, k, v]).view(3, heads, -1, fused.shape[1]).transpose(0, 1)
                fused.copy_(together.reshape(fused.shape))
                module.dense.weight.copy_(o)
    return changed


def _rebase_llama(module: nn.Module, heads: int, shared: int, generator: torch.Generator) -> None:
    weights = [getattr(module, f"{name}_proj").weight for name in "qkvo"]
    for old, new in zip(weights, _rebase(*weights, heads, shared, generator), strict=True):
        old.copy_(new)


def _rebase(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, heads: int, shared: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    width = len(k) // shared
    a, b = (_invertible(shared, width, generator).to(q.dtype) for _ in range(2))
    per_head = heads // shared
    a_head, b_head = a.repeat_interleave(per_head, 0), b.repeat_interleave(per_head, 0)
    new_k = (a @ k.view(shared, width, -1)).flatten(0, 1)
    new_q = (torch.linalg.inv(a_head).mT @ q.view(heads, width, -1)).flatten(0, 1)
    new_v = (b @ v.view(shared, width, -1)).flatten(0, 1)
    new_o = o.view(len(o), heads, width).transpose(0, 1) @ torch.linalg.inv(b_head)
    return new_q, new_k, new_v, new_o.transpose(0, 1).flatten(1)


def _invertible(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Random matrices with singular values spread over 0.2 .. 5, far from orthogonal and safely invertible."""
    u, _, v = torch.linalg.svd(torch.randn(count, width, width, generator=generator, dtype=torch.float64))
    spread = torch.logspace(-0.7, 0.7, width, dtype=torch.float64)
    return u * spread @ v


def rotated(model: nn.Module, seed: int) -> nn.Module:
    """A Llama-like model with gains folded into its readers and its stream turned by a random orthogonal matrix.

    The final gain of tied embeddings cannot be folded and stays: such a model's unembedding does not turn with it.
    """
    changed = copy.deepcopy(model)
    d = changed.config.hidden_size
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                parameter.copy_(parameter * _gain(changed, name, "self_attn", "input_layernorm") @ turn.T)
            elif name.endswith(("gate_proj.weight", "up_proj.weight")):
                parameter.copy_(parameter * _gain(changed, name, "mlp", "post_attention_layernorm") @ turn.T)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(turn @ parameter)
            elif "embed_tokens" in name:
                parameter.copy_(parameter @ turn.T)
            elif name == "lm_head.weight":
                parameter.copy_(parameter * changed.model.norm.weight @ turn.T)
        for name, parameter in changed.named_parameters():
            if "layernorm" in name or (name == "model.norm.weight" and not changed.config.tie_word_embeddings):
                parameter.fill_(1)
    return changed


def _gain(model: nn.Module, name: str, part: str, norm: str) -> Tensor:
    return model.get_submodule(f"{name.split('.' + part)[0]}.{norm}").weight
