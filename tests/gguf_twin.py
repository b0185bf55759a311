"""A checkpoint of transformers as llama.cpp's converter writes it: the rules of its source, none of ours.

Names are those of gguf's own table. What a converter class does beyond that is said here once more: which rows it
permutes, which gains it adds one to, how it orders fused queries, keys and values, and which keys it writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

Config = Mapping[str, Any]
Keys = dict[str, Any]


def _first(config: Config, *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _rope(config: Config) -> Mapping[str, Any]:
    rope = config.get("rope_parameters") or {}
    return rope.get("full_attention", rope)


def general(config: Config) -> Keys:
    """``TextModel.set_gguf_parameters``."""
    keys: Keys = {
        "context_length": _first(config, "max_position_embeddings", "n_ctx", "n_positions"),
        "embedding_length": _first(config, "hidden_size", "n_embd"),
        "feed_forward_length": _first(config, "intermediate_size", "n_inner"),
        "attention.head_count": _first(config, "num_attention_heads", "n_head"),
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "rope.freq_base": _rope(config).get("rope_theta"),
        "attention.layer_norm_rms_epsilon": _first(config, "rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": _first(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
    }
    if config.get("rope_parameters") and "sliding_attention" in config["rope_parameters"]:
        keys["rope.freq_base_swa"] = config["rope_parameters"]["sliding_attention"]["rope_theta"]
    rope = _rope(config)
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for ours, theirs in (("attention_factor", "yarn_attn_factor"), ("beta_fast", "yarn_beta_fast")):
            keys[f"rope.scaling.{theirs}"] = rope.get(ours)
        keys["rope.scaling.yarn_beta_slow"] = rope.get("beta_slow")
    if kind in ("longrope", "su"):
        keys["rope.scaling.type"] = "longrope"
    return keys


def _only(config: Config, *names: str) -> Keys:
    """Of the general keys those that a class writes by itself."""
    sizes = ("context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    return {key: value for key, value in general(config).items() if key in (*sizes, *names)}


def llama(config: Config) -> Keys:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {**general(config), "vocab_size": config["vocab_size"], "rope.dimension_count": head}


def granite(config: Config) -> Keys:
    keys = llama({key: value for key, value in config.items() if key != "head_dim"})
    scales = {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier"}
    scales |= {"residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}
    return keys | {key: config[name] for key, name in scales.items()}


def gemma(config: Config) -> Keys:
    names = ("attention.head_count_kv", "attention.layer_norm_rms_epsilon")
    return _only(config, *names, "attention.key_length", "attention.value_length")


def gemma2(config: Config) -> Keys:
    caps = {f"{name}ping": config[f"{name}ping"] for name in ("attn_logit_softcap", "final_logit_softcap")}
    return {**gemma(config), **caps, "attention.sliding_window": config["sliding_window"]}


def gemma3(config: Config) -> Keys:
    whole = set(config["layer_types"]) == {"full_attention"}  # to the converter, a sliding_window_pattern of 1
    keys = {**general(config), "attention.sliding_window": None if whole else config["sliding_window"]}
    return keys | {"final_logit_softcapping": config.get("final_logit_softcapping")}


def gptneox(config: Config) -> Keys:
    width = config["hidden_size"] // config["num_attention_heads"]
    turned = int(_rope(config)["partial_rotary_factor"] * width)
    keys = _only(config, "attention.layer_norm_epsilon")
    return {**keys, "rope.dimension_count": turned, "use_parallel_residual": config["use_parallel_residual"]}


def falcon(config: Config) -> Keys:
    keys = {**_only(config, "attention.layer_norm_epsilon"), "context_length": 2048, "tensor_data_layout": "jploski"}
    kv = config["num_kv_heads"] if config["new_decoder_architecture"] or not config["multi_query"] else 1
    return keys | {"feed_forward_length": 4 * config["hidden_size"], "attention.head_count_kv": kv}


def bloom(config: Config) -> Keys:
    heads, width = config["n_head"], config["hidden_size"]
    keys = {**_only(config, "attention.layer_norm_epsilon"), "context_length": width, "embedding_length": width}
    return keys | {"attention.head_count": heads, "attention.head_count_kv": heads, "feed_forward_length": 4 * width}


def mpt(config: Config) -> Keys:
    keys = {"context_length": config["max_seq_len"], "embedding_length": config["d_model"]}
    keys |= {"feed_forward_length": 4 * config["d_model"], "attention.head_count": config["n_heads"]}
    return keys | {"attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": 8.0}


def phi2(config: Config) -> Keys:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    keys = {**_only(config, "attention.layer_norm_epsilon"), "feed_forward_length": 4 * width}
    turned = int(_rope(config)["partial_rotary_factor"] * width) // heads
    return keys | {"attention.head_count_kv": heads, "rope.dimension_count": turned}


def phi3(config: Config) -> Keys:
    names = ("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base")
    rope, width = _rope(config), config["hidden_size"]
    turned = int(rope.get("partial_rotary_factor", 1.0) * width) // config["num_attention_heads"]
    keys = {**_only(config, *names), "rope.dimension_count": turned}
    keys["attention.sliding_window"] = config.get("sliding_window") or 0
    original = rope.get("original_max_position_embeddings", config["original_max_position_embeddings"])
    keys["rope.scaling.original_context_length"] = original
    if rope.get("long_factor"):
        scale = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        keys["rope.scaling.attn_factor"] = factor
    return keys


def starcoder(config: Config) -> Keys:
    keys = {**_only(config, "attention.layer_norm_epsilon"), "feed_forward_length": 4 * config["n_embd"]}
    return keys | {"context_length": config["n_positions"], "attention.head_count_kv": 1}


def gpt2(config: Config) -> Keys:
    keys = {**_only(config, "attention.layer_norm_epsilon"), "feed_forward_length": 4 * config["n_embd"]}
    return keys | {"context_length": config["n_positions"]}


def stablelm(config: Config) -> Keys:
    keys = _only(config, "attention.head_count_kv", "attention.layer_norm_epsilon")
    width = config["hidden_size"] // config["num_attention_heads"]
    keys["rope.dimension_count"] = int(_rope(config)["partial_rotary_factor"] * width)
    return keys | {"use_parallel_residual": True}  # as files from before the key was in configurations


def olmo(config: Config) -> Keys:
    return {**general(config), "attention.layer_norm_epsilon": 1e-5, "attention.clamp_kqv": config.get("clip_qkv")}


def olmo2(config: Config) -> Keys:
    if config.get("sliding_window") is None:
        return general(config)
    flags = [kind == "sliding_attention" for kind in config["layer_types"]]
    window = {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": flags}
    return {**general(config), **window}


def exaone4(config: Config) -> Keys:
    return {**olmo2(config), "vocab_size": config["vocab_size"]}


def command_r(config: Config) -> Keys:
    return {**general(config), "logit_scale": config["logit_scale"], "rope.scaling.type": "none"}


def cohere2(config: Config) -> Keys:
    head = config["hidden_size"] // config["num_attention_heads"]
    keys = {**command_r(config), "attention.sliding_window": config["sliding_window"]}
    return keys | {"vocab_size": config["vocab_size"], "rope.dimension_count": head}


def glm4(config: Config) -> Keys:
    turned = int(config["head_dim"] * _rope(config)["partial_rotary_factor"])
    return {**general(config), "rope.dimension_count": turned}


def chatglm(config: Config) -> Keys:
    keys = {**_only(config, "attention.head_count_kv"), "attention.layer_norm_rms_epsilon": 1e-5}
    turned = int(config["hidden_size"] // config["num_attention_heads"] * _rope(config)["partial_rotary_factor"])
    return {**keys, "rope.dimension_count": turned, "rope.freq_base": 10000}


def nemotron(config: Config) -> Keys:
    rope = _rope(config)
    turned = int(rope["partial_rotary_factor"] * config["hidden_size"]) // config["num_attention_heads"]
    keys = {**general(config), "vocab_size": config["vocab_size"], "rope.dimension_count": turned}
    factor = rope.get("factor")
    scaling = {"rope.scaling.type": "linear" if factor else "none", "rope.scaling.factor": factor}
    return {**keys, **scaling, "attention.layer_norm_epsilon": config["norm_eps"]}


def ministral3(config: Config) -> Keys:
    rope = _rope(config)
    scale = {"rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"]}
    return {**llama(config), **scale, "attention.temperature_scale": rope["llama_4_scaling_beta"]}


def apertus(config: Config) -> Keys:
    names = ("alpha_p", "alpha_n", "beta", "eps")
    return {**llama(config), **{f"xielu.{name}": [0.5] * config["num_hidden_layers"] for name in names}}


def jais2(config: Config) -> Keys:
    return {**general(config), "rope.dimension_count": config["head_dim"]}


@dataclass(frozen=True)
class Converter:
    """What llama.cpp's class for a type does.

    Attributes:
        architecture: the name in ``gguf.MODEL_ARCH``.
        keys: what it writes of a configuration.
        permuted: whether q and k rows are written as pairs (``undo_permute``).
        shifted: whether gains are written with 1 added.
        fused: how transformers orders fused q, k and v: by ``"heads"`` or ``"groups"``, where it reorders them.
        transposed: whether transformers stores (in, out).
    """

    architecture: str
    keys: Callable[[Config], Keys] = general
    permuted: bool = False
    shifted: bool = False
    fused: str = ""
    transposed: bool = False


CONVERTERS = {
    "llama": Converter("LLAMA", llama, permuted=True),
    "qwen2": Converter("QWEN2"),
    "qwen3": Converter("QWEN3"),
    "gpt2": Converter("GPT2", gpt2, transposed=True),
    "gemma": Converter("GEMMA", gemma, shifted=True),
    "gemma2": Converter("GEMMA2", gemma2, shifted=True),
    "gemma3_text": Converter("GEMMA3", gemma3, shifted=True),
    "phi": Converter("PHI2", phi2),
    "phi3": Converter("PHI3", phi3),
    "gpt_neox": Converter("GPTNEOX", gptneox, fused="heads"),
    "falcon": Converter("FALCON", falcon, fused="groups"),
    "bloom": Converter("BLOOM", bloom, fused="heads"),
    "mpt": Converter("MPT", mpt),
    "stablelm": Converter("STABLELM", stablelm),
    "gpt_bigcode": Converter("STARCODER", starcoder),
    "starcoder2": Converter("STARCODER2"),
    "olmo": Converter("OLMO", olmo, permuted=True),
    "olmo2": Converter("OLMO2", olmo2),
    "olmo3": Converter("OLMO2", olmo2),
    "cohere": Converter("COMMAND_R", command_r),
    "cohere2": Converter("COHERE2", cohere2),
    "glm": Converter("CHATGLM", chatglm),
    "glm4": Converter("GLM4", glm4),
    "granite": Converter("GRANITE", granite, permuted=True),
    "nemotron": Converter("NEMOTRON", nemotron, shifted=True),
    "exaone4": Converter("EXAONE4", exaone4),
    "smollm3": Converter("SMOLLM3", llama, permuted=True),
    "arcee": Converter("ARCEE", llama, permuted=True),
    "hunyuan_v1_dense": Converter("HUNYUAN_DENSE"),
    "seed_oss": Converter("SEED_OSS"),
    "ernie4_5": Converter("ERNIE4_5"),
    "jais2": Converter("JAIS2", jais2),
    "apertus": Converter("APERTUS", apertus),
    "ministral3": Converter("MISTRAL3", ministral3, permuted=True),
    "mistral": Converter("MISTRAL3", llama, permuted=True),
}
"""By the type in transformers."""


def _pairs(weight: Tensor, heads: int) -> Tensor:
    """``LlamaModel.permute``."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _blocks(weight: Tensor, order: str, heads: int, kv_heads: int, width: int) -> Tensor:
    """All queries, then all keys, then all values: GPT-NeoX's, BLOOM's and Falcon's ``modify_tensors``."""
    groups, share = (heads, 1) if order == "heads" else (kv_heads, heads // kv_heads)
    rows = weight.reshape(groups, share + 2, width, *weight.shape[1:])
    parts = rows[:, :share], rows[:, share], rows[:, share + 1]
    return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])


def _llama3(rope: Config, width: int) -> Tensor:
    """``LlamaModel.generate_extra_tensors``."""
    factors: list[float] = []
    for freq in 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width):
        length, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
        wave = float(2 * math.pi / freq)
        smooth = (length / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if wave < length / high else rope["factor"] if wave > length / low else between)
    return torch.tensor(factors, dtype=torch.float32)


def _tensors(kind: str, config: Config, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    converter, layers = CONVERTERS[kind], _first(config, "num_hidden_layers", "n_layer", "n_layers")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, converter.architecture), layers)
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = converter.keys(config).get("attention.head_count_kv") or heads
    norms: dict[str, list[Tensor]] = {}
    for name, weight in stored.items():
        if ".act_fn." in name:
            continue  # xIELU's numbers are keys
        if "_layernorm.norms." in name:  # StableLM stacks the norms of all heads
            norms.setdefault(name.partition(".norms.")[0] + ".weight", []).append(weight)
            continue
        if converter.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
            weight = _pairs(weight, heads)
        if converter.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
            weight = _pairs(weight, kv_heads)
        if converter.shifted and name.endswith("norm.weight"):
            weight = weight + 1
        if converter.fused and "query_key_value" in name:
            weight = _blocks(weight, converter.fused, heads, kv_heads, config["hidden_size"] // heads)
        if converter.transposed and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            weight = weight.T
        name = name.removeprefix("transformer.") if kind == "bloom" else name
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, f"{converter.architecture} has no name for {name}"
        yield renamed, weight
    for name, parts in norms.items():
        yield names.get_name(name, try_suffixes=(".weight",)) or "", torch.stack(parts)
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3(rope, config["head_dim"])
    if rope.get("long_factor"):
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])


def _merged(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Queries, keys and values of a layer in one tensor, as older files of several architectures have them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, weight in tensors:
        layer, _, leaf = name.rpartition(".attn_")
        if leaf.split(".")[0] not in ("q", "k", "v"):
            yield name, weight
            continue
        parts.setdefault(f"{layer}.attn_qkv.{leaf[2:]}", {})[leaf[0]] = weight
    for name, each in parts.items():
        yield name, torch.cat([each[role] for role in "qkv"])


def write_twin(folder: Path, file: Path, *, merged: bool = False, **changes: Any) -> Path:
    """Write the checkpoint of a folder as GGUF; ``changes`` are keys less the architecture, None takes one away."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    converter = CONVERTERS[kind]
    name = gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, converter.architecture)]
    writer = gguf.GGUFWriter(file, name)
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers")
    keys = {"block_count": layers, **converter.keys(config), **changes}
    for key, value in keys.items():
        adding = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        if value is not None:
            adding.get(type(value), writer.add_string)(f"{name}.{key}", value)  # type: ignore[operator]
    tensors = _tensors(kind, config, load_file(folder / "model.safetensors"))
    for key, weight in _merged(tensors) if merged else tensors:
        writer.add_tensor(key, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
