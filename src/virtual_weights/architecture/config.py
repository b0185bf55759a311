"""Reading configurations as transformers 5 reads them, each value of its own type, by the entry of a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from virtual_weights.errors import ArchitectureError

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
    vocab_size rope_theta rope_scaling rope_parameters original_max_position_embeddings rotary_pct
    rotary_emb_base partial_rotary_factor
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

_REFERENCE = re.compile(r"(!|1/)?\$([\w.]+)(?:\^(-?[\d.]+)|\*\$(\w+))?")


def references(value: Any) -> list[str]:
    """The keys of the configuration that a value of a table names: ``["eps"]`` of ``"1/$eps"``."""
    if isinstance(value, str):
        return re.findall(r"\$([A-Za-z_][\w.]*)", value)
    if isinstance(value, Mapping):
        return [key for item in value.values() for key in references(item)]
    return [key for item in value for key in references(item)] if isinstance(value, Sequence) else []


def looked_up(config: Mapping[str, Any], key: str, absent: Any = None) -> Any:
    """The value of a key, ``"a.b"`` being key b of the object a; null is None, and ``absent`` what is not there."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return absent
        value = value[part]
    return value


@final
@dataclass(frozen=True)
class Reading:
    """A configuration as a table's entry reads it.

    Attributes:
        config: the configuration, in transformers' vocabulary.
        entry: what the table says of the model type, see ``models.toml``.
    """

    config: Mapping[str, Any]
    entry: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """What the entry says under a name, its reference to the configuration followed; None where it is nothing."""
        trait = self.entry[name]
        if not isinstance(trait, str) or "$" not in trait:
            return None if trait == "" else trait
        form, key, power, other = self._parsed(trait)
        assert key is not None
        value = self.key(key)
        if form == "!":
            return not checked_flag(key, value)
        if value is None or (form, power, other) == (None, None, None):
            return value
        if other is not None:
            return checked_integer(key, value) * checked_integer(other, self.key(other))
        number = checked_number(key, value) ** float(power or 1)
        return 1 / number if form else number

    def key(self, key: str) -> Any:
        """The value of a key of the configuration, and where it is not there what transformers takes for it."""
        return looked_up(self.config, key, self.entry["defaults"].get(key))

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number, of at least 1 where nothing else is said."""
        return checked_integer(self._named(name), self.value(name), default, least=least)

    def number(self, name: str) -> float | None:
        """A positive number; None where there is none, as 0 in a table says; 0 in a configuration is refused."""
        trait, value = self.entry[name], self.value(name)
        return None if value is None or trait == 0 else checked_number(self._named(name), value)

    def positive(self, name: str) -> float:
        """A positive number, which must be there."""
        return checked_number(self._named(name), self.value(name))

    def text(self, name: str) -> str:
        """A name in quotes."""
        value = self.value(name)
        if not isinstance(value, str):
            raise wrong(self._named(name), value, "a name in quotes")
        return value

    def flag(self, name: str) -> bool:
        """A truth value; null, 0 and "true" are refused, as transformers refuses them."""
        return checked_flag(self._named(name), self.value(name))

    def _parsed(self, trait: str) -> tuple[str | None, ...]:
        reference = _REFERENCE.fullmatch(trait)
        if reference is None:
            raise ArchitectureError(
                f"the table says {trait!r}",
                expected='a reference such as "$key", "1/$key", "!$key", "$key^-0.5" or "$key*$other"',
                do="correct the table",
            )
        return reference.groups()

    def _named(self, name: str) -> str:
        trait = self.entry[name]
        return str(self._parsed(trait)[1]) if isinstance(trait, str) and "$" in trait else name


def checked_integer(key: str, value: Any, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of the configuration; null is the default.

    Raises:
        ArchitectureError: it is missing without default, not a whole number, or out of 1 .. 10^9.
    """
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 10**9:
        raise wrong(key, value, f"a whole number of at least {least}")
    return value


def checked_number(key: str, value: Any) -> float:
    """A positive finite number of the configuration."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e300:
        raise wrong(key, value, "a positive number")
    return float(value)


def checked_flag(key: str, value: Any) -> bool:
    """A truth value of the configuration."""
    if not isinstance(value, bool):
        raise wrong(key, value, "true or false")
    return value


def same(value: Any, other: Any) -> bool:
    """Whether two JSON values are the same, 1 and true being different."""
    return type(value) is type(other) and value == other


def admits(allowed: Sequence[Any], value: Any) -> bool:
    """Whether a value is one of those allowed, ``"null"`` among them standing for null."""
    return any(same("null" if value is None else value, other) for other in allowed)


def divided(total: int, parts: int, what: str) -> int:
    """``total / parts``, refused where it is not whole."""
    if total % parts:
        raise ArchitectureError(
            f"{what}: {total} cannot be divided by {parts}",
            expected="sizes that divide",
            do="correct the sizes in the configuration",
        )
    return total // parts


def wrong(key: str, value: Any, expected: str) -> ArchitectureError:
    """The error of a key whose value is not what it should be."""
    return ArchitectureError(
        f"the configuration has {key} = {value!r:.100}",
        expected=expected,
        do="correct config.json, or pass config= with the right value",
    )
