"""All tables, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from virtual_weights.architecture.config import (
    NEUTRAL_HF,
    PART_OF_HEADS,
    divided,
    flag,
    flags,
    gguf_rotary,
    integer,
    number,
    rotary,
    text,
    uniform,
)
from virtual_weights.architecture.table import OPTIONAL, UNTIED, Dialect, Family, ModelSpec, Row

_ATTN, _MLP = "L{l}.attn", "L{l}.mlp"
_ATTN_BIAS, _MLP_BIAS = f"{_ATTN}.bias", f"{_MLP}.bias"

_QKV = ("q", "k", "v")
_QKV_BIAS = ("q_bias", "k_bias", "v_bias")

_HF_ROWS = (
    Row("embed", ("embed",), "wte.weight", "t d -> t d"),
    Row("pos", ("pos",), "wpe.weight", "p d -> p d"),
    Row(_ATTN, ("norm",), "h.{l}.ln_1.weight", "d -> d"),
    Row(_ATTN, ("norm_bias",), "h.{l}.ln_1.bias", "d -> d"),
    Row(_ATTN, _QKV, "h.{l}.attn.c_attn.weight", "d (three h k) -> three h k d"),
    Row(_ATTN, _QKV_BIAS, "h.{l}.attn.c_attn.bias", "(three h k) -> three h k"),
    Row(_ATTN, ("o",), "h.{l}.attn.c_proj.weight", "(h k) d -> h d k"),
    Row(_ATTN_BIAS, ("bias",), "h.{l}.attn.c_proj.bias", "d -> d"),
    Row(_MLP, ("norm",), "h.{l}.ln_2.weight", "d -> d"),
    Row(_MLP, ("norm_bias",), "h.{l}.ln_2.bias", "d -> d"),
    Row(_MLP, ("up",), "h.{l}.mlp.c_fc.weight", "d n -> n d"),
    Row(_MLP, ("up_bias",), "h.{l}.mlp.c_fc.bias", "n -> n"),
    Row(_MLP, ("down",), "h.{l}.mlp.c_proj.weight", "n d -> d n"),
    Row(_MLP_BIAS, ("bias",), "h.{l}.mlp.c_proj.bias", "d -> d"),
    Row("unembed", ("norm",), "ln_f.weight", "d -> d"),
    Row("unembed", ("norm_bias",), "ln_f.bias", "d -> d"),
    Row("unembed", ("unembed",), "/lm_head.weight", "t d -> t d", UNTIED),
)

_GGUF_ROWS = (
    Row("embed", ("embed",), "token_embd.weight", "t d -> t d"),
    Row("pos", ("pos",), "position_embd.weight", "p d -> p d"),
    Row(_ATTN, ("norm",), "blk.{l}.attn_norm.weight", "d -> d"),
    Row(_ATTN, ("norm_bias",), "blk.{l}.attn_norm.bias", "d -> d"),
    Row(_ATTN, _QKV, "blk.{l}.attn_qkv.weight", "(three h k) d -> three h k d"),
    Row(_ATTN, _QKV_BIAS, "blk.{l}.attn_qkv.bias", "(three h k) -> three h k"),
    Row(_ATTN, ("o",), "blk.{l}.attn_output.weight", "d (h k) -> h d k"),
    Row(_ATTN_BIAS, ("bias",), "blk.{l}.attn_output.bias", "d -> d"),
    Row(_MLP, ("norm",), "blk.{l}.ffn_norm.weight", "d -> d"),
    Row(_MLP, ("norm_bias",), "blk.{l}.ffn_norm.bias", "d -> d"),
    Row(_MLP, ("up",), "blk.{l}.ffn_up.weight", "n d -> n d"),
    Row(_MLP, ("up_bias",), "blk.{l}.ffn_up.bias", "n -> n"),
    Row(_MLP, ("down",), "blk.{l}.ffn_down.weight", "d n -> d n"),
    Row(_MLP_BIAS, ("bias",), "blk.{l}.ffn_down.bias", "d -> d"),
    Row("unembed", ("norm",), "output_norm.weight", "d -> d"),
    Row("unembed", ("norm_bias",), "output_norm.bias", "d -> d"),
    Row("unembed", ("unembed",), "output.weight", "t d -> t d", OPTIONAL),
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


def _hf_gpt2(config: Mapping[str, Any]) -> ModelSpec:
    names = ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "layer_norm_epsilon", "vocab_size")
    activation = text(config, "activation_function", "gelu_new")
    return _spec(config, names, activation, flag(config, "tie_word_embeddings", True))


_GGUF_NAMES = (
    "gpt2.block_count",
    "gpt2.embedding_length",
    "gpt2.attention.head_count",
    "gpt2.feed_forward_length",
    "gpt2.context_length",
    "gpt2.attention.layer_norm_epsilon",
    "gpt2.vocab_size",
)


def _gguf_gpt2(config: Mapping[str, Any]) -> ModelSpec:
    return _spec(config, _GGUF_NAMES, "gelu_new", False)


_HF_KEYS = frozenset(
    "n_layer n_embd n_head n_inner n_positions layer_norm_epsilon activation_function scale_attn_weights"
    " scale_attn_by_inverse_layer_idx reorder_and_upcast_attn add_cross_attention".split()
)

_GGUF_FILE: Mapping[str, tuple[Any, ...]] = {"general.type": ("model", None), "split.count": (0, 1, None)}
"""What kind of GGUF file holds a whole model: no adapter, and not the first of several files."""

GPT2 = Family(
    "gpt2",
    ("gpt2",),
    {
        "hf": Dialect(
            _HF_ROWS,
            _hf_gpt2,
            NEUTRAL_HF | _HF_KEYS,
            ("transformer.", ""),
            required_values={
                "scale_attn_weights": (True, None),
                "scale_attn_by_inverse_layer_idx": (False, None),
                "add_cross_attention": (False, None),
            },
            ignored=(r".*\.attn\.(bias|masked_bias)",),
            aliases={
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
            },
        ),
        "gguf": Dialect(
            _GGUF_ROWS,
            _gguf_gpt2,
            frozenset(_GGUF_NAMES) | {"gpt2.tensor_data_layout"},
            required_values=_GGUF_FILE,
            namespace="gpt2.",
        ),
    },
)


def _hf_rows(qkv_bias: str | None, o_bias: str | None, mlp_bias: str | None) -> tuple[Row, ...]:
    attention, mlp = "layers.{l}.self_attn.", "layers.{l}.mlp."
    rows = [
        Row("embed", ("embed",), "embed_tokens.weight", "t d -> t d"),
        Row(_ATTN, ("norm",), "layers.{l}.input_layernorm.weight", "d -> d"),
        Row(_ATTN, ("q",), attention + "q_proj.weight", "(h k) d -> h k d"),
        Row(_ATTN, ("k",), attention + "k_proj.weight", "(g k) d -> g k d"),
        Row(_ATTN, ("v",), attention + "v_proj.weight", "(g k) d -> g k d"),
        Row(_ATTN, ("o",), attention + "o_proj.weight", "d (h k) -> h d k"),
        Row(_MLP, ("norm",), "layers.{l}.post_attention_layernorm.weight", "d -> d"),
        Row(_MLP, ("gate",), mlp + "gate_proj.weight", "n d -> n d"),
        Row(_MLP, ("up",), mlp + "up_proj.weight", "n d -> n d"),
        Row(_MLP, ("down",), mlp + "down_proj.weight", "d n -> d n"),
        Row("unembed", ("norm",), "norm.weight", "d -> d"),
        Row("unembed", ("unembed",), "/lm_head.weight", "t d -> t d", UNTIED),
    ]
    if qkv_bias:
        rows += [
            Row(_ATTN, ("q_bias",), attention + "q_proj.bias", "(h k) -> h k", qkv_bias),
            Row(_ATTN, ("k_bias",), attention + "k_proj.bias", "(g k) -> g k", qkv_bias),
            Row(_ATTN, ("v_bias",), attention + "v_proj.bias", "(g k) -> g k", qkv_bias),
        ]
    if o_bias:
        rows.append(Row(_ATTN_BIAS, ("bias",), attention + "o_proj.bias", "d -> d", o_bias))
    if mlp_bias:
        rows += [
            Row(_MLP, ("gate_bias",), mlp + "gate_proj.bias", "n -> n", mlp_bias),
            Row(_MLP, ("up_bias",), mlp + "up_proj.bias", "n -> n", mlp_bias),
            Row(_MLP_BIAS, ("bias",), mlp + "down_proj.bias", "d -> d", mlp_bias),
        ]
    return tuple(rows)


def _hf_config(config: Mapping[str, Any]) -> ModelSpec:
    d_model = integer(config, "hidden_size")
    n_heads = integer(config, "num_attention_heads")
    head_dim = config.get("head_dim")
    d_head = integer(config, "head_dim") if head_dim is not None else divided(d_model, n_heads, "hidden_size by heads")
    n_kv_heads = integer(config, "num_key_value_heads", n_heads)
    divided(n_heads, n_kv_heads, "num_attention_heads by num_key_value_heads")
    return ModelSpec(
        model_type=str(config["model_type"]),
        n_layers=integer(config, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=integer(config, "intermediate_size"),
        vocab=integer(config, "vocab_size"),
        norm="rms",
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        activation=text(config, "hidden_act", "silu"),
        gated=True,
        tied=flag(config, "tie_word_embeddings", False),
        rotary=rotary(config, d_head),
        flags=flags(config, attention_bias=False, mlp_bias=False),
    )


def _gguf_rows(permuted: bool, qkv_bias: str) -> tuple[Row, ...]:
    """Rows of the GGUF dialect; Llama's converter stores each head's q and k rows as (r, two) pairs."""
    q, k = (
        ("(h r two) d -> h (two r) d", "(g r two) d -> g (two r) d")
        if permuted
        else ("(h k) d -> h k d", "(g k) d -> g k d")
    )
    q_bias, k_bias = (
        ("(h r two) -> h (two r)", "(g r two) -> g (two r)") if permuted else ("(h k) -> h k", "(g k) -> g k")
    )
    block = "blk.{l}."
    return (
        Row("embed", ("embed",), "token_embd.weight", "t d -> t d"),
        Row(_ATTN, ("norm",), block + "attn_norm.weight", "d -> d"),
        Row(_ATTN, ("q",), block + "attn_q.weight", q),
        Row(_ATTN, ("k",), block + "attn_k.weight", k),
        Row(_ATTN, ("v",), block + "attn_v.weight", "(g k) d -> g k d"),
        Row(_ATTN, ("o",), block + "attn_output.weight", "d (h k) -> h d k"),
        Row(_ATTN, ("q_bias",), block + "attn_q.bias", q_bias, qkv_bias),
        Row(_ATTN, ("k_bias",), block + "attn_k.bias", k_bias, qkv_bias),
        Row(_ATTN, ("v_bias",), block + "attn_v.bias", "(g k) -> g k", qkv_bias),
        Row(_ATTN_BIAS, ("bias",), block + "attn_output.bias", "d -> d", OPTIONAL),
        Row(_MLP, ("norm",), block + "ffn_norm.weight", "d -> d"),
        Row(_MLP, ("gate",), block + "ffn_gate.weight", "n d -> n d"),
        Row(_MLP, ("up",), block + "ffn_up.weight", "n d -> n d"),
        Row(_MLP, ("down",), block + "ffn_down.weight", "d n -> d n"),
        Row(_MLP, ("gate_bias",), block + "ffn_gate.bias", "n -> n", OPTIONAL),
        Row(_MLP, ("up_bias",), block + "ffn_up.bias", "n -> n", OPTIONAL),
        Row(_MLP_BIAS, ("bias",), block + "ffn_down.bias", "d -> d", OPTIONAL),
        Row("unembed", ("norm",), "output_norm.weight", "d -> d"),
        Row("unembed", ("unembed",), "output.weight", "t d -> t d", OPTIONAL),
        Row("rotary", ("factors",), "rope_freqs.weight", "f -> f", OPTIONAL),
    )


def _gguf_config(config: Mapping[str, Any]) -> ModelSpec:
    family = str(config["general.architecture"])
    begin = family + "."
    own = {key.removeprefix(begin): value for key, value in config.items() if key.startswith(begin)}
    own |= {key: uniform(own, key) for key in _PER_LAYER if key in own}
    d_model, n_heads = integer(own, "embedding_length"), integer(own, "attention.head_count")
    n_kv_heads = integer(own, "attention.head_count_kv", n_heads)
    divided(n_heads, n_kv_heads, "attention.head_count by attention.head_count_kv")
    key_length = own.get("attention.key_length")
    d_head = (
        integer(own, "attention.key_length") if key_length else divided(d_model, n_heads, "embedding_length by heads")
    )
    return ModelSpec(
        model_type=family,
        n_layers=integer(own, "block_count"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=integer(own, "feed_forward_length"),
        vocab=integer(own, "vocab_size") if own.get("vocab_size") else None,
        norm="rms",
        norm_eps=number(own, "attention.layer_norm_rms_epsilon", 1e-5),
        activation="silu",
        gated=True,
        rotary=gguf_rotary(own, d_head, interleaved=family == "llama"),
    )


_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Sizes that GGUF may give layer by layer."""


def _gguf_dialect(family: str, rows: tuple[Row, ...]) -> Dialect:
    own = """block_count context_length embedding_length feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon
    attention.sliding_window vocab_size tensor_data_layout rope.dimension_count rope.freq_base rope.scale_linear
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned"""
    fixed = {f"{family}.expert_count": (0, None), f"{family}.expert_used_count": (0, None)}
    return Dialect(
        rows,
        _gguf_config,
        frozenset(f"{family}.{key}" for key in own.split()),
        required_values={**_GGUF_FILE, **fixed, f"{family}.attention.causal": (True, None)},
        namespace=f"{family}.",
    )


_SIZES = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act"
    " rms_norm_eps attention_bias mlp_bias".split()
)
_CACHED = (r".*rotary_emb\.inv_freq",)


def _hf_dialect(rows: tuple[Row, ...], **defaults: int) -> Dialect:
    fixed: dict[str, tuple[Any, ...]] = {"rope_interleaved": (False, None), "use_mrope": (False, None)}
    neutral, prefixes = NEUTRAL_HF | _SIZES, ("model.", "")
    return Dialect(rows, _hf_config, neutral, prefixes, required_values=fixed, ignored=_CACHED, defaults=defaults)


LLAMA = Family(
    "llama",
    ("llama",),
    {
        "hf": _hf_dialect(_hf_rows("attention_bias", "attention_bias", "mlp_bias")),
        "gguf": _gguf_dialect("llama", _gguf_rows(True, OPTIONAL)),
    },
)
MISTRAL = Family("mistral", ("mistral",), {"hf": _hf_dialect(_hf_rows(None, None, None), num_key_value_heads=8)})
QWEN2 = Family(
    "qwen2",
    ("qwen2",),
    {
        "hf": _hf_dialect(_hf_rows("always", None, None), num_key_value_heads=32),
        "gguf": _gguf_dialect("qwen2", _gguf_rows(False, "always")),
    },
)


_BLOCK = "layers.{l}."
_ROWS = (
    Row("embed", ("embed",), "embed_in.weight", "t d -> t d"),
    Row(_ATTN, ("norm",), _BLOCK + "input_layernorm.weight", "d -> d"),
    Row(_ATTN, ("norm_bias",), _BLOCK + "input_layernorm.bias", "d -> d"),
    Row(_ATTN, ("q", "k", "v"), _BLOCK + "attention.query_key_value.weight", "(h three k) d -> three h k d"),
    Row(
        _ATTN,
        ("q_bias", "k_bias", "v_bias"),
        _BLOCK + "attention.query_key_value.bias",
        "(h three k) -> three h k",
        "attention_bias",
    ),
    Row(_ATTN, ("o",), _BLOCK + "attention.dense.weight", "d (h k) -> h d k"),
    Row(_ATTN_BIAS, ("bias",), _BLOCK + "attention.dense.bias", "d -> d", "attention_bias"),
    Row(_MLP, ("norm",), _BLOCK + "post_attention_layernorm.weight", "d -> d"),
    Row(_MLP, ("norm_bias",), _BLOCK + "post_attention_layernorm.bias", "d -> d"),
    Row(_MLP, ("up",), _BLOCK + "mlp.dense_h_to_4h.weight", "n d -> n d"),
    Row(_MLP, ("up_bias",), _BLOCK + "mlp.dense_h_to_4h.bias", "n -> n"),
    Row(_MLP, ("down",), _BLOCK + "mlp.dense_4h_to_h.weight", "d n -> d n"),
    Row(_MLP_BIAS, ("bias",), _BLOCK + "mlp.dense_4h_to_h.bias", "d -> d"),
    Row("unembed", ("norm",), "final_layer_norm.weight", "d -> d"),
    Row("unembed", ("norm_bias",), "final_layer_norm.bias", "d -> d"),
    Row("unembed", ("unembed",), "/embed_out.weight|/lm_head.weight", "t d -> t d", UNTIED),
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
        activation=text(config, "hidden_act", "gelu"),
        gated=False,
        parallel=flag(config, "use_parallel_residual", True),
        tied=flag(config, "tie_word_embeddings", False),
        rotary=rotary(config, d_head, PART_OF_HEADS),
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


FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, GPT2, GPT_NEOX)
