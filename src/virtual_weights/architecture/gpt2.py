"""GPT-2: LayerNorm, learned positions, biases everywhere, fused QKV in Conv1D layout (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from virtual_weights.architecture.config import NEUTRAL_HF, divided, integer, number
from virtual_weights.architecture.table import OPTIONAL, UNTIED, Dialect, Family, ModelSpec, Row

_QKV = ("q", "k", "v")
_QKV_BIAS = ("q_bias", "k_bias", "v_bias")

_HF_ROWS = (
    Row(("embed",), "wte.weight", "t d -> t d"),
    Row(("pos",), "wpe.weight", "p d -> p d"),
    Row(("attn_norm",), "h.{l}.ln_1.weight", "d -> d"),
    Row(("attn_norm_bias",), "h.{l}.ln_1.bias", "d -> d"),
    Row(_QKV, "h.{l}.attn.c_attn.weight", "d (three h k) -> three h k d"),
    Row(_QKV_BIAS, "h.{l}.attn.c_attn.bias", "(three h k) -> three h k"),
    Row(("o",), "h.{l}.attn.c_proj.weight", "(h k) d -> h d k"),
    Row(("o_bias",), "h.{l}.attn.c_proj.bias", "d -> d"),
    Row(("mlp_norm",), "h.{l}.ln_2.weight", "d -> d"),
    Row(("mlp_norm_bias",), "h.{l}.ln_2.bias", "d -> d"),
    Row(("up",), "h.{l}.mlp.c_fc.weight", "d n -> n d"),
    Row(("up_bias",), "h.{l}.mlp.c_fc.bias", "n -> n"),
    Row(("down",), "h.{l}.mlp.c_proj.weight", "n d -> d n"),
    Row(("down_bias",), "h.{l}.mlp.c_proj.bias", "d -> d"),
    Row(("final_norm",), "ln_f.weight", "d -> d"),
    Row(("final_norm_bias",), "ln_f.bias", "d -> d"),
    Row(("unembed",), "/lm_head.weight", "t d -> t d", UNTIED),
)

_GGUF_ROWS = (
    Row(("embed",), "token_embd.weight", "t d -> t d"),
    Row(("pos",), "position_embd.weight", "p d -> p d"),
    Row(("attn_norm",), "blk.{l}.attn_norm.weight", "d -> d"),
    Row(("attn_norm_bias",), "blk.{l}.attn_norm.bias", "d -> d"),
    Row(_QKV, "blk.{l}.attn_qkv.weight", "(three h k) d -> three h k d"),
    Row(_QKV_BIAS, "blk.{l}.attn_qkv.bias", "(three h k) -> three h k"),
    Row(("o",), "blk.{l}.attn_output.weight", "d (h k) -> h d k"),
    Row(("o_bias",), "blk.{l}.attn_output.bias", "d -> d"),
    Row(("mlp_norm",), "blk.{l}.ffn_norm.weight", "d -> d"),
    Row(("mlp_norm_bias",), "blk.{l}.ffn_norm.bias", "d -> d"),
    Row(("up",), "blk.{l}.ffn_up.weight", "n d -> n d"),
    Row(("up_bias",), "blk.{l}.ffn_up.bias", "n -> n"),
    Row(("down",), "blk.{l}.ffn_down.weight", "d n -> d n"),
    Row(("down_bias",), "blk.{l}.ffn_down.bias", "d -> d"),
    Row(("final_norm",), "output_norm.weight", "d -> d"),
    Row(("final_norm_bias",), "output_norm.bias", "d -> d"),
    Row(("unembed",), "output.weight", "t d -> t d", OPTIONAL),
)


def _spec(config: Mapping[str, Any], names: tuple[str, ...], activation: str, tied: bool) -> ModelSpec:
    layers, width, heads, inner, positions, eps, vocab = names
    d_model, n_heads = integer(config, width), integer(config, heads)
    return ModelSpec(
        model_type="gpt2",
        n_layers=integer(config, layers),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=divided(d_model, n_heads, f"{width} by {heads}"),
        d_mlp=integer(config, inner, 4 * d_model),
        vocab=integer(config, vocab) if config.get(vocab) is not None else None,
        norm="layer",
        norm_eps=number(config, eps, 1e-5),
        activation=activation,
        gated=False,
        tied=tied,
        n_positions=integer(config, positions, 1024),
    )


def _hf_config(config: Mapping[str, Any]) -> ModelSpec:
    names = ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "layer_norm_epsilon", "vocab_size")
    activation = str(config.get("activation_function", "gelu_new"))
    return _spec(config, names, activation, config.get("tie_word_embeddings", True) is True)


_GGUF_NAMES = (
    "gpt2.block_count",
    "gpt2.embedding_length",
    "gpt2.attention.head_count",
    "gpt2.feed_forward_length",
    "gpt2.context_length",
    "gpt2.attention.layer_norm_epsilon",
    "gpt2.vocab_size",
)


def _gguf_config(config: Mapping[str, Any]) -> ModelSpec:
    return _spec(config, _GGUF_NAMES, "gelu_new", False)


_HF_KEYS = frozenset(
    "n_layer n_embd n_head n_inner n_positions layer_norm_epsilon activation_function scale_attn_weights"
    " scale_attn_by_inverse_layer_idx reorder_and_upcast_attn add_cross_attention".split()
)

GPT2 = Family(
    "gpt2",
    ("gpt2",),
    {
        "hf": Dialect(
            _HF_ROWS,
            _hf_config,
            NEUTRAL_HF | _HF_KEYS,
            ("transformer.", ""),
            required_values={
                "scale_attn_weights": (True, None),
                "scale_attn_by_inverse_layer_idx": (False, None),
                "add_cross_attention": (False, None),
            },
            ignored=(r".*\.attn\.(bias|masked_bias)",),
        ),
        "gguf": Dialect(
            _GGUF_ROWS, _gguf_config, frozenset(_GGUF_NAMES) | {"general.*", "tokenizer.*", "quantize.*", "split.*"}
        ),
    },
)
