"""The ``config.json`` that transformers needs for a model that came without one."""

from __future__ import annotations

from typing import Any

from virtual_weights.architecture.resolve import Model
from virtual_weights.errors import ArchitectureError

_BIASES = {
    "attention_bias": ("q_bias", "k_bias", "v_bias", "o_bias"),
    "mlp_bias": ("gate_bias", "up_bias", "down_bias"),
}
"""Keys of Llama's configuration, and the biases that each turns on in every layer, all or none."""


def config_for(model: Model) -> dict[str, Any]:
    """A configuration in transformers' vocabulary from a model's sizes and the biases that it holds.

    Raises:
        ArchitectureError: the model type is neither of Llama's family nor GPT-2, or the model has what transformers
            cannot be told: rotary embedding of a part of each head, or some of the biases that one key turns on.
    """
    spec = model.spec
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
    if spec.rotary.dim != spec.d_head:
        raise ArchitectureError(
            f"rotary embedding turns {spec.rotary.dim} of {spec.d_head} dimensions of a head",
            expected=f"all of them, as {names[spec.model_type]} of transformers does",
            do="start from the safetensors form of this model, which has its config.json",
        )
    biases = {key: _biased(model, key, roles) for key, roles in _BIASES.items()} if spec.model_type == "llama" else {}
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
        **biases,
        "tie_word_embeddings": spec.tied,
    }


def _biased(model: Model, key: str, roles: tuple[str, ...]) -> bool:
    places = [(role, layer) for layer in range(model.spec.n_layers) for role in roles]
    held = [place for place in places if model.has(*place)]
    if 0 < len(held) < len(places):
        named = ", ".join(model.placements[place].tensor for place in held[:6])
        raise ArchitectureError(
            f"{len(held)} of the {len(places)} biases that {key} turns on: {named}",
            expected=f"all or none of {', '.join(roles)} in every layer",
            do="start from the safetensors form of this model, which has its config.json",
        )
    return bool(held)
