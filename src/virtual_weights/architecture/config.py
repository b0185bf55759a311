"""Reading configurations as transformers 5 reads them: sizes, flags and rotary settings, each of its own type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from virtual_weights.architecture.table import ModelSpec, RotarySpec
from virtual_weights.errors import ArchitectureError

if TYPE_CHECKING:
    from virtual_weights.architecture.resolve import Model

NEUTRAL_HF = frozenset(
    """
    architectures model_type transformers_version transformers_weights torch_dtype dtype use_cache auto_map
    name_or_path _* attn_implementation experts_implementation adapter_model
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id eod_token_id
    bos_token eos_token pad_token unk_token image_token_id video_token_id vision_start_token_id vision_end_token_id
    decoder_start_token_id additional_special_tokens tokenizer_class tokenizer_type
    initializer_range initializer_factor init_std rescale_prenorm_residual
    max_position_embeddings max_sequence_length max_seq_len max_seq_length model_max_length seq_length seq_len n_ctx
    context_length
    attention_dropout attn_dropout hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop dropout
    embedding_dropout residual_dropout classifier_dropout attention_probs_dropout_prob layerdrop
    pretraining_tp output_hidden_states output_attentions output_past return_dict return_dict_in_generate
    output_scores output_logits chunk_size_feed_forward is_encoder_decoder is_decoder id2label label2id num_labels
    problem_type task_specific_params finetuning_task torchscript use_bfloat16 bf16 fp16 fp32 pruned_heads
    n_special predict_special_tokens tie_encoder_decoder cross_attention_hidden_size tie_last_hidden_states
    xla_device keys_to_ignore_at_inference
    tie_word_embeddings summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels
    gradient_checkpointing use_gradient_checkpointing sliding_window use_sliding_window max_window_layers layer_types
    use_mrope use_flash_attn use_flash_attention use_flash_attention_2 flash_attention flash_attn use_xformers
    use_memory_efficient_attention use_fused_rope use_fused_mlp fused_mlp fused_bias_fc fused_dropout_add_ln
    vocab_size rope_theta rope_scaling rope_parameters rotary_pct rotary_emb_base partial_rotary_factor
    transformers.js_config is_llama_config rope_interleaved prefix onnx num_parameters model_size revision license
    language languages library_name datasets tags pipeline_tag training_args wandb_run_id run_name seed base_model
    base_model_name_or_path quantized_by unsloth_version unsloth_fixed unsloth_* axolotl_version mergekit_version
    min_length max_length min_new_tokens max_new_tokens do_sample temperature top_p top_k min_p typical_p epsilon_cutoff
    eta_cutoff penalty_alpha num_beams repetition_penalty length_penalty num_return_sequences early_stopping
    no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_beam_groups
    diversity_penalty exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id
    forced_eos_token_id forced_decoder_ids remove_invalid_values renormalize_logits constraints force_words_ids
    max_time low_memory cache_implementation sequence_bias guidance_scale tf_legacy_loss generation_config
    """.split()
)
"""Keys of ``config.json`` that do not change the maps, or that the tables read by name; docs/checkpoints.md lists them.

Some are settings of training, generation, display or speed; some are notes of transformers (those that begin with an
underscore), of older versions of it, or of other tools. A sliding window limits which tokens attention reaches, not
what is read or written, so it is neutral here.
"""


@final
@dataclass(frozen=True)
class RotaryRule:
    """How transformers reads a family's rotary settings from older keys, beside ``rope_parameters``.

    In all families ``rope_scaling``, where it is not empty, replaces ``rope_parameters``, and what that holds goes
    before a key of its own outside. Keys outside that are not named here are not read.

    Attributes:
        base_key: the key outside that gives the base.
        share_key: the key outside that gives the share of a head's dimensions that turn.
        share: that share where nothing gives it.
        partial: whether the family turns a part of a head. One that does not ignores the share without scaling,
            and cannot run with one below 1 under a scaling.
    """

    base_key: str = "rope_theta"
    share_key: str = "partial_rotary_factor"
    share: float = 1.0
    partial: bool = False


WHOLE_HEADS = RotaryRule()
PART_OF_HEADS = RotaryRule("rotary_emb_base", "rotary_pct", 0.25, partial=True)
_BASE = 10000.0
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def integer(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of the configuration; null is the default.

    Raises:
        ArchitectureError: it is missing without default, not a whole number, or out of 1 .. 10^9.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 10**9:
        raise _wrong(key, value, f"a whole number of at least {least}")
    return value


def uniform(config: Mapping[str, Any], key: str) -> Any:
    """A setting that may be given once or as a list with one value per layer; a list of equal values is that value."""
    value = config.get(key)
    if isinstance(value, list) and value and all(type(item) is type(value[0]) and item == value[0] for item in value):
        return value[0]
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number of the configuration; null is the default."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e300:
        raise _wrong(key, value, "a positive number")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A truth value of the configuration.

    Raises:
        ArchitectureError: it is there and neither true nor false: 0, 1, null and "true" are refused, as transformers
            refuses them.
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def flags(config: Mapping[str, Any], **defaults: bool) -> frozenset[str]:
    """The names among ``defaults`` that the configuration turns on."""
    return frozenset(name for name, default in defaults.items() if flag(config, name, default))


def text(config: Mapping[str, Any], key: str, default: str) -> str:
    """A name in the configuration."""
    value = config.get(key, default)
    if not isinstance(value, str):
        raise _wrong(key, value, "a name in quotes")
    return value


def same(value: Any, other: Any) -> bool:
    """Whether two JSON values are the same, 1 and true being different."""
    return type(value) is type(other) and value == other


def divided(total: int, parts: int, what: str) -> int:
    """``total / parts``, refused where it is not whole."""
    if total % parts:
        raise ArchitectureError(
            f"{what}: {total} cannot be divided by {parts}",
            expected="sizes that divide",
            do="correct the sizes in the configuration",
        )
    return total // parts


def rotary(config: Mapping[str, Any], d_head: int, rule: RotaryRule = WHOLE_HEADS) -> RotarySpec:
    """Rotary parameters from the old keys (``rope_theta``, ``rope_scaling``) or the new (``rope_parameters``).

    Raises:
        ArchitectureError: a scaling other than default, linear or llama3, settings per type of layer, a value of the
            wrong type, or a rotary width that the family cannot turn.
    """
    name, given = _rope_settings(config)
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ArchitectureError(
            f"the configuration asks for rotary scaling {kind!r:.100}",
            expected=", ".join(_SCALINGS),
            do="open a model with one of these; others would give wrong rotary offsets",
        )
    base = _given(name, given, "rope_theta", config, rule.base_key, _BASE)
    scaling = {key: _given(name, given, key, config, _OUTSIDE.get(key, ""), None) for key in _SCALINGS[kind]}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ArchitectureError(
            f"{name} has high_freq_factor = {scaling['high_freq_factor']} and low_freq_factor = "
            f"{scaling['low_freq_factor']}",
            expected="the first above the second",
            do="correct config.json, or pass config= with the right values",
        )
    dim = _turned(name, given, config, rule, kind, d_head)
    return RotarySpec(dim, base, {"rope_type": kind, **scaling} if scaling else {})


_OUTSIDE = {"original_max_position_embeddings": "max_position_embeddings"}
"""Settings of a scaling that transformers takes from a key outside where the scaling does not hold them."""


def _rope_settings(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What ``rope_scaling`` holds, else ``rope_parameters``, with its name; never a mixture of both."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise _wrong(key, value, "an object, or null")
    given: Mapping[str, Any] = config.get(name) or {}
    nested = sorted(key for key, value in given.items() if isinstance(value, (Mapping, list)))
    if nested:
        raise ArchitectureError(
            f"{name} holds settings of their own for {', '.join(map(repr, nested[:6]))}",
            expected="one rotary embedding for all layers, as this family has in transformers",
            do=f"where all layers turn alike, write the settings directly into {name}",
        )
    return name, given


def _given(
    name: str, given: Mapping[str, Any], key: str, config: Mapping[str, Any], outside: str, default: float | None
) -> float:
    """A positive number of the rotary settings, else of the key outside; null counts as given, and is refused."""
    value = given[key] if key in given else config.get(outside, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e300:
        raise _wrong(f"{name}.{key}" if key in given or not outside else outside, value, "a positive number")
    return float(value)


def _turned(
    name: str, given: Mapping[str, Any], config: Mapping[str, Any], rule: RotaryRule, kind: str, d_head: int
) -> int:
    """How many dimensions of a head turn."""
    key = "partial_rotary_factor"
    if not rule.partial and kind == "default":
        dim = d_head
    else:
        outside = {} if config.get(rule.share_key) is None and not rule.partial else config
        dim = int(d_head * _given(name, given, key, outside, rule.share_key, rule.share))
    if dim % 2 or not 2 <= dim <= d_head or (dim < d_head and not rule.partial):
        raise ArchitectureError(
            f"rotary embedding would turn {dim} of {d_head} dimensions of a head",
            expected="an even number between 2 and d_head" if rule.partial else "all of them, an even number",
            do=f"correct {key} in the configuration" if dim < d_head else "correct the sizes in the configuration",
        )
    return dim


def gguf_rotary(own: Mapping[str, Any], d_head: int, interleaved: bool) -> RotarySpec:
    """Rotary parameters as llama.cpp reads them: a factor without a type is linear, 0 is none."""
    factors = {key: own[key] for key in ("rope.scaling.factor", "rope.scale_linear") if own.get(key)}
    if len(set(factors.values())) > 1:
        raise ArchitectureError(
            f"the file has {' and '.join(f'{key} = {value!r:.50}' for key, value in factors.items())}",
            expected="one factor, under one of these names",
            do="make the file again from the checkpoint that it was converted from",
        )
    kind = own.get("rope.scaling.type", "linear" if factors else "none")
    if kind not in ("none", "linear") or (kind == "none" and set(factors.values()) - {1.0}):
        raise ArchitectureError(
            f"the file asks for rotary scaling {kind!r:.50}" + (f", with {factors}" if factors else ""),
            expected="none, without a factor, or linear",
            do="open the safetensors form of this model, or another model",
        )
    dim = integer(own, "rope.dimension_count", d_head, least=2)
    if dim % 2 or dim > d_head:
        raise ArchitectureError(
            f"rotary embedding would turn {dim} of {d_head} dimensions of a head",
            expected="an even number between 2 and d_head",
            do="make the file again from the checkpoint that it was converted from",
        )
    key = next(iter(factors), None)
    scaling = {"rope_type": "linear", "factor": number(own, key, 1.0)} if key and kind == "linear" else {}
    apart = d_head // 2 if interleaved and dim < d_head else None
    return RotarySpec(dim, number(own, "rope.freq_base", 10000.0), scaling, apart)


def _wrong(key: str, value: Any, expected: str) -> ArchitectureError:
    return ArchitectureError(
        f"the configuration has {key} = {value!r:.100}",
        expected=expected,
        do="correct config.json, or pass config= with the right value",
    )


_RUN_BY = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}
"""The class of transformers that runs a model, by its type: never what a checkpoint names."""

_BIASES = {
    "attention_bias": (*((role, "L{l}.attn") for role in ("q_bias", "k_bias", "v_bias")), ("bias", "L{l}.attn.bias")),
    "mlp_bias": (("gate_bias", "L{l}.mlp"), ("up_bias", "L{l}.mlp"), ("bias", "L{l}.mlp.bias")),
}
"""Keys of Llama's configuration, and the biases (role, group) that each turns on in every layer, all or none."""


def config_for(model: Model) -> dict[str, Any]:
    """A configuration in transformers' vocabulary from a model's sizes and the biases that it holds.

    Raises:
        ArchitectureError: transformers has no class for the model type, or the model has what its configuration cannot
            express: rotary embedding of a part of each head where that class turns all of it, or some of the biases
            that one key turns on.
    """
    spec = model.spec
    if spec.model_type not in _RUN_BY:
        raise ArchitectureError(
            f"no configuration of transformers is known for a model of type {spec.model_type!r}",
            expected=f"one of {', '.join(_RUN_BY)}",
            do="start from the safetensors form of this model, which has its config.json",
        )
    shared: dict[str, Any] = {
        "model_type": spec.model_type,
        "architectures": [_RUN_BY[spec.model_type]],
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
    }
    if spec.model_type == "gpt2":
        return shared | {
            "n_layer": spec.n_layers,
            "n_embd": spec.d_model,
            "n_head": spec.n_heads,
            "n_inner": spec.d_mlp,
            "n_positions": spec.n_positions,
            "layer_norm_epsilon": spec.norm_eps,
            "activation_function": spec.activation,
        }
    shared |= {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_mlp,
        "num_attention_heads": spec.n_heads,
        "hidden_act": spec.activation,
        "rope_parameters": _rope_parameters(spec),
    }
    if spec.model_type == "gpt_neox":
        return shared | {
            "layer_norm_eps": spec.norm_eps,
            "use_parallel_residual": spec.parallel,
            "attention_bias": "attention_bias" in spec.flags,
        }
    biases = {key: _biased(model, key, roles) for key, roles in _BIASES.items()} if spec.model_type == "llama" else {}
    return (
        shared
        | biases
        | {
            "num_key_value_heads": spec.n_kv_heads,
            "head_dim": spec.d_head,
            "rms_norm_eps": spec.norm_eps,
        }
    )


def _rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    assert spec.rotary is not None
    dim, d_head = spec.rotary.dim, spec.d_head
    scaling = {key: int(x) if isinstance(x, float) and x.is_integer() else x for key, x in spec.rotary.scaling.items()}
    given = {"rope_type": "default", **scaling, "rope_theta": spec.rotary.base}
    if spec.model_type == "gpt_neox":
        share = dim / d_head
        # transformers rounds the product down, which must not lose the last of them
        return {**given, "partial_rotary_factor": share if int(share * d_head) == dim else math.nextafter(share, 1)}
    if dim != d_head:
        raise ArchitectureError(
            f"rotary embedding turns {dim} of {d_head} dimensions of a head",
            expected=f"all of them, as {_RUN_BY[spec.model_type]} of transformers does",
            do="start from the safetensors form of this model, which has its config.json",
        )
    return given


def _biased(model: Model, key: str, roles: tuple[tuple[str, str], ...]) -> bool:
    places = [(role, group.format(l=layer)) for layer in range(model.spec.n_layers) for role, group in roles]
    present = [place for place in places if model.has(*place)]
    if 0 < len(present) < len(places):
        named = ", ".join(model.placements[place].tensor for place in present[:6])
        raise ArchitectureError(
            f"{len(present)} of the {len(places)} biases that {key} turns on: {named}",
            expected=f"all or none of {', '.join(role for role, _ in roles)} in every layer",
            do="start from the safetensors form of this model, which has its config.json",
        )
    return bool(present)
