"""GPT-NeoX and Pythia: LayerNorm, parallel block, partial rotary, QKV fused head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from virtual_weights.architecture.config import NEUTRAL_HF, divided, flags, integer, number, rotary
from virtual_weights.architecture.table import UNTIED, Dialect, Family, ModelSpec, Row

_BLOCK = "layers.{l}."
_ROWS = (
    Row(("embed",), "embed_in.weight", "t d -> t d"),
    Row(("attn_norm",), _BLOCK + "input_layernorm.weight", "d -> d"),
    Row(("attn_norm_bias",), _BLOCK + "input_layernorm.bias", "d -> d"),
    Row(("q", "k", "v"), _BLOCK + "attention.query_key_value.weight", "(h three k) d -> three h k d"),
    Row(
        ("q_bias", "k_bias", "v_bias"),
        _BLOCK + "attention.query_key_value.bias",
        "(h three k) -> three h k",
        "attention_bias",
    ),
    Row(("o",), _BLOCK + "attention.dense.weight", "d (h k) -> h d k"),
    Row(("o_bias",), _BLOCK + "attention.dense.bias", "d -> d", "attention_bias"),
    Row(("mlp_norm",), _BLOCK + "post_attention_layernorm.weight", "d -> d"),
    Row(("mlp_norm_bias",), _BLOCK + "post_attention_layernorm.bias", "d -> d"),
    Row(("up",), _BLOCK + "mlp.dense_h_to_4h.weight", "n d -> n d"),
    Row(("up_bias",), _BLOCK + "mlp.dense_h_to_4h.bias", "n -> n"),
    Row(("down",), _BLOCK + "mlp.dense_4h_to_h.weight", "d n -> d n"),
    Row(("down_bias",), _BLOCK + "mlp.dense_4h_to_h.bias", "d -> d"),
    Row(("final_norm",), "final_layer_norm.weight", "d -> d"),
    Row(("final_norm_bias",), "final_layer_norm.bias", "d -> d"),
    Row(("unembed",), "/embed_out.weight|/lm_head.weight", "t d -> t d", UNTIED),
)


def _config(config: Mapping[str, Any]) -> ModelSpec:
    d_model, n_heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    d_head = divided(d_model, n_heads, "hidden_size by heads")
    return ModelSpec(
        model_type="gpt_neox",
        n_layers=integer(config, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_mlp=integer(config, "intermediate_size"),
        vocab=integer(config, "vocab_size"),
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        activation=str(config.get("hidden_act", "gelu")),
        gated=False,
        parallel=config.get("use_parallel_residual", True) is True,
        tied=config.get("tie_word_embeddings", False) is True,
        rotary=rotary(config, d_head, fraction=float(config.get("rotary_pct", 0.25))),
        flags=flags(config, attention_bias=True),
    )


_KEYS = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act layer_norm_eps"
    " use_parallel_residual attention_bias".split()
)

GPT_NEOX = Family(
    "gpt_neox",
    ("gpt_neox",),
    {
        "hf": Dialect(
            _ROWS,
            _config,
            NEUTRAL_HF | _KEYS,
            ("gpt_neox.", ""),
            ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r".*rotary_emb\.inv_freq"),
        )
    },
)
