"""The ``config.json`` that transformers needs for a model that came without one."""

from __future__ import annotations

from typing import Any

from virtual_weights.architecture.table import ModelSpec
from virtual_weights.errors import ArchitectureError


def config_for(spec: ModelSpec) -> dict[str, Any]:
    """A configuration in transformers' vocabulary from a model's sizes.

    Raises:
        ArchitectureError: the model type is neither of Llama's family nor GPT-2.
    """
    if spec.model_type == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": spec.n_layers,
            "n_embd": spec.d_model,
            "n_head": spec.n_heads,
            "n_inner": spec.d_mlp,
            "n_positions": spec.n_positions,
            "vocab_size": spec.vocab,
            "layer_norm_epsilon": spec.norm_eps,
            "activation_function": spec.activation,
            "tie_word_embeddings": spec.tied,
        }
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    if spec.model_type not in names:
        raise ArchitectureError(
            f"no configuration of transformers is known for a model of type {spec.model_type!r}",
            expected=f"one of {', '.join([*names, 'gpt2'])}",
            do="start from the safetensors form of this model, which has its config.json",
        )
    assert spec.rotary is not None
    kind = {"rope_type": "default", **spec.rotary.scaling}
    return {
        "model_type": spec.model_type,
        "architectures": [names[spec.model_type]],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_mlp,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": spec.activation,
        "rope_parameters": {**kind, "rope_theta": spec.rotary.base},
        "tie_word_embeddings": spec.tied,
    }
