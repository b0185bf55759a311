"""Reading configurations: whole numbers, floats and flags with clear refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from virtual_weights.architecture.table import RotarySpec
from virtual_weights.errors import ArchitectureError

NEUTRAL_HF = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache _* attn_implementation
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id initializer_range max_position_embeddings
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop classifier_dropout pretraining_tp
    output_hidden_states output_attentions return_dict chunk_size_feed_forward is_encoder_decoder is_decoder id2label
    label2id problem_type task_specific_params tokenizer_class finetuning_task torchscript use_bfloat16 pruned_heads
    tie_word_embeddings summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels
    gradient_checkpointing sliding_window use_sliding_window max_window_layers layer_types use_mrope n_ctx
    vocab_size rope_theta rope_scaling rope_parameters rotary_pct rotary_emb_base partial_rotary_factor
    transformers.js_config is_llama_config rope_interleaved prefix min_length max_length do_sample temperature top_p
    top_k num_beams repetition_penalty length_penalty num_return_sequences early_stopping no_repeat_ngram_size
    bad_words_ids num_beam_groups diversity_penalty exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values return_dict_in_generate
    output_scores encoder_no_repeat_ngram_size typical_p tf_legacy_loss
    """.split()
)
"""Keys of ``config.json`` that do not change the linear maps, or that the tables read by name.

Keys that begin with an underscore are transformers' own notes. A sliding window limits which tokens attention
reaches, not what is read or written, so it is neutral here.
"""


def integer(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of the configuration.

    Raises:
        ArchitectureError: it is missing without default, not a whole number, or out of 1 .. 10^9.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 10**9:
        raise ArchitectureError(
            f"the configuration has {key} = {value!r}",
            expected=f"a whole number of at least {least}",
            do="correct config.json, or pass config= with the right value",
        )
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number of the configuration."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ArchitectureError(
            f"the configuration has {key} = {value!r}",
            expected="a positive number",
            do="correct config.json, or pass config= with the right value",
        )
    return float(value)


def flags(config: Mapping[str, Any], **defaults: bool) -> frozenset[str]:
    """The names among ``defaults`` that the configuration turns on."""
    return frozenset(name for name, default in defaults.items() if (config.get(name, default) or False) is True)


def divided(total: int, parts: int, what: str) -> int:
    """``total / parts``, refused where it is not whole."""
    if total % parts:
        raise ArchitectureError(
            f"{what}: {total} cannot be divided by {parts}",
            expected="sizes that divide",
            do="correct the sizes in the configuration",
        )
    return total // parts


def rotary(config: Mapping[str, Any], d_head: int, *, fraction: float = 1.0) -> RotarySpec:
    """Rotary parameters from the old keys (``rope_theta``, ``rope_scaling``) or the new (``rope_parameters``).

    Raises:
        ArchitectureError: a scaling other than default, linear or llama3, or an odd rotary width.
    """
    given: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default")) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ArchitectureError(
            f"the configuration asks for rotary scaling {kind!r}",
            expected="default, linear or llama3",
            do="open a model with one of these; others would give wrong rotary offsets",
        )
    base = number({**config, **given}, "rope_theta", number(config, "rotary_emb_base", 10000.0))
    share = float(given.get("partial_rotary_factor", config.get("partial_rotary_factor") or fraction))
    dim = int(d_head * share)
    if dim % 2 or dim < 2 or dim > d_head:
        raise ArchitectureError(
            f"rotary embedding would turn {dim} of {d_head} dimensions of a head",
            expected="an even number between 2 and d_head",
            do="correct partial_rotary_factor in the configuration",
        )
    wanted = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[kind]
    scaling = {key: number(given, key, float("nan")) for key in wanted}
    return RotarySpec(dim, base, {"rope_type": kind, **scaling} if scaling else {})
