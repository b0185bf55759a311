"""Tiny random checkpoints of every causal language model that transformers can build, in flavours.

A flavour is one way in which checkpoints of a type differ: biases, ties, head counts, rotary scalings, parts switched
on or off. Everything is random, of a size that makes it matter: no gain is 1, no bias 0, no factor neutral.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES: Mapping[str, Any] = tomllib.loads((Path(__file__).parent / "sizes.toml").read_text())
THETA = 100.0
"""The rotary base: so small that all planes turn within a short prompt."""

NOT_STRUCTURE = {
    "use_cache", "tie_word_embeddings", "output_router_logits", "is_decoder", "add_cross_attention", "is_encoder",
    "summary_use_proj", "summary_proj_to_labels", "use_associative_scan", "use_mamba_kernels", "use_mambapy",
    "rescale_prenorm_residual", "classifier_bias", "output_attentions", "output_hidden_states", "return_dict",
    "is_encoder_decoder", "use_weighted_layer_sum", "apply_spec_augment", "return_last_states", "use_mems_train",
}  # fmt: skip
"""Truth values of a configuration that change no map."""


class NotBuildable(Exception):
    """What transformers itself cannot build or run."""


def model_types() -> tuple[str, ...]:
    """Every type that transformers knows as a causal language model."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass(frozen=True)
class Flavour:
    """One way in which checkpoints of a type differ.

    Attributes:
        name: what is said of it after the type's name.
        keys: what of the configuration differs from the base's.
        saved: keys that are written into config.json afterwards, as older files have them; None removes a key.
        bare: whether the tensors' names lack the prefix of the base model, as files of the base model do.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] | None = None
    bare: bool = False


@cache
def _default(model_type: str) -> Any:
    """The configuration of a type without any key."""
    return transformers.AutoConfig.for_model(model_type, **SIZES["type"].get(model_type, {}).get("always", {}))


def _shrunk(config: Any, model_type: str) -> dict[str, Any]:
    """What makes a configuration small and no value of it neutral."""
    given = config.to_dict()
    renamed = {new: old for new, old in config.attribute_map.items() if new not in given}
    common = SIZES["common"]
    keys = {key: common[key] for key in given if key in common and _of_kind(key, given[key], common[key])}
    keys |= {old: common[new] for new, old in renamed.items() if new in common and old in given and old not in keys}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(given.get(key), list) or (given.get(key) or 0) >= common["vocab_size"]:
            keys[key] = 0
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(given.get(key) or ()))
        if len(kinds) > 1:
            keys[key] = (kinds * 4)[:4]
    if isinstance(given.get("rope_parameters"), dict):
        keys["rope_parameters"] = _with_theta(given["rope_parameters"])
    for key in config.sub_configs:
        if isinstance(given.get(key), dict) and given[key].get("model_type"):
            sub = getattr(config, key)
            keys[key] = {"model_type": sub.model_type, **_shrunk(sub, sub.model_type)}
    if (
        "qk_rope_head_dim" in keys
    ):  # latent attention: as many key heads as query heads, and a head's width is what turns
        keys |= {
            key: size
            for key, size in {"num_key_value_heads": 6, "head_dim": keys["qk_rope_head_dim"]}.items()
            if key in keys
        }
    own = _nulled(SIZES["type"].get(model_type, {}))
    for key, value in own.items():
        keys[key] = {**keys.get(key, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in keys.items() if value != "-"}


def _nulled(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if value == "null" else value for key, value in keys.items()}


def _of_kind(key: str, default: Any, value: Any) -> bool:
    """Whether a common value can stand where the type has its default: a number for a number; and no window or cap
    where there is none by default, since flavours switch it on."""
    if default is None:
        return key not in ("sliding_window", "sliding_window_size", "shared_intermediate_size")
    return isinstance(default, int | float | str) and isinstance(default, bool) == isinstance(value, bool)


def _with_theta(parameters: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Rotary settings with a small base, a different one for each type of layer."""
    if not any(isinstance(value, dict) for value in parameters.values()):
        return {**parameters, "rope_theta": THETA, **more}
    return {
        kind: None if value is None else {**value, "rope_theta": THETA * (1 + i), **more}
        for i, (kind, value) in enumerate(parameters.items())
    }


@cache
def flavours(model_type: str) -> tuple[Flavour, ...]:
    """Every flavour of a type, ``base`` first."""
    try:
        config = _default(model_type)
        base = _configuration(model_type, {})
    except Exception:  # noqa: BLE001 - whatever it is, building the base says it again
        return (Flavour("base"),)
    if model_type in SIZES["large"]:
        return (Flavour("base"),)
    given, made = config.to_dict(), base.to_dict()
    return (
        Flavour("base"),
        *_ties(made),
        *_head_counts(made),
        *_switches(made),
        *_layer_kinds(given, made),
        *_nulls(given, made),
        *_rotary(made, base),
        *(Flavour(name, _nulled(keys)) for name, keys in SIZES["flavour"].get(model_type, {}).items()),
    )


def _ties(made: Mapping[str, Any]) -> Iterator[Flavour]:
    if "tie_word_embeddings" in made:
        tied = not made["tie_word_embeddings"]
        yield Flavour("tied" if tied else "untied", {"tie_word_embeddings": tied})
        yield Flavour("tied-bare-names", {"tie_word_embeddings": True}, bare=True)
        yield Flavour("tied-with-own-head", {"tie_word_embeddings": False}, {"tie_word_embeddings": True})


def _head_counts(made: Mapping[str, Any]) -> Iterator[Flavour]:
    for key in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(made.get(key), int):
            yield Flavour("one-kv-head", {key: 1})
            yield Flavour("all-kv-heads", {key: 6})
            yield Flavour("three-kv-heads", {key: 3})


def _switches(made: Mapping[str, Any], prefix: str = "") -> Iterator[Flavour]:
    """Every truth value the other way, one at a time, and all biases together."""
    flips = {key: not value for key, value in made.items() if isinstance(value, bool) and key not in NOT_STRUCTURE}
    for key, value in flips.items():
        yield Flavour(f"{prefix}{key}={str(value).lower()}", {key: value})
    biases = {key: value for key, value in flips.items() if "bias" in key}
    if len(biases) > 1:
        yield Flavour(f"{prefix}biases-flipped", biases)
    attention = made.get("attn_config")
    if isinstance(attention, dict) and not prefix:
        for flavour in _switches(attention, "attn_config."):
            yield Flavour(flavour.name, {"attn_config": {**attention, **flavour.keys}})
        if "clip_qkv" in attention:
            yield Flavour("attn_config.clip", {"attn_config": {**attention, "clip_qkv": 0.5}})
            yield Flavour("attn_config.scale", {"attn_config": {**attention, "softmax_scale": 0.2}})


def _layer_kinds(given: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[Flavour]:
    """All layers of one kind, and windows on or off."""
    kinds = [kind for kind in dict.fromkeys(made.get("layer_types") or ()) if isinstance(kind, str)]
    if len(kinds) > 1:
        for kind in kinds:
            yield Flavour(f"all-{kind}", {"layer_types": [kind] * 4})
        if "full_attention" in kinds and made.get("sliding_window") is not None:
            yield Flavour("all-full-no-window", {"layer_types": ["full_attention"] * 4, "sliding_window": None})
    if "sliding_window" in made:
        other = 5 if made["sliding_window"] is None else None
        yield Flavour(f"sliding_window={other}", {"sliding_window": other})
        if kinds == ["full_attention"]:
            window = {"use_sliding_window": True} if "use_sliding_window" in made else {}
            mixed = ["full_attention", "sliding_attention"] * 2
            yield Flavour("mixed-windows", {"layer_types": mixed, "sliding_window": 5, **window})
    if "no_rope_layers" in made:
        yield Flavour("no_rope_layers=1010", {"no_rope_layers": [1, 0, 1, 0]})
        yield Flavour("no_rope_layers=1111", {"no_rope_layers": [1, 1, 1, 1]})


def _nulls(given: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[Flavour]:
    """Sizes and caps that may be absent: absent; a clip: present; another activation."""
    for key in ("head_dim", "n_inner", "intermediate_size", "ffn_hidden_size", "num_key_value_heads"):
        if key in given and given[key] is None and made.get(key) is not None:
            yield Flavour(f"{key}=null", {key: None})
    if isinstance(given.get("head_dim"), int):
        yield Flavour("head_dim=24", {"head_dim": 24})
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale"):
        if made.get(key) is not None:
            yield Flavour(f"{key}=null", {key: None})
    if "clip_qkv" in made:
        yield Flavour("clip_qkv", {"clip_qkv": 0.5})
    for key in ("hidden_act", "activation_function", "hidden_activation", "activation"):
        if isinstance(made.get(key), str):
            for act in ("relu", "silu" if "gelu" in made[key] else "gelu"):
                yield Flavour(f"{key}={act}", {key: act})


def _rotary(made: Mapping[str, Any], config: Any) -> Iterator[Flavour]:
    """Every scaling with all it needs, a part of the head, and the older ways to write them."""
    rope = made.get("rope_parameters")
    if "rotary_dim" in made:
        yield Flavour("rotary_dim=4", {"rotary_dim": 4})
        yield Flavour("rotary_dim=8", {"rotary_dim": 8})
    if not isinstance(rope, dict) or not rope:
        return
    nested = any(isinstance(value, dict) for value in rope.values())
    flat = next((value for value in rope.values() if isinstance(value, dict)), {}) if nested else rope
    sizes = (getattr(config, key, None) for key in ("hidden_size", "num_attention_heads"))
    width, heads = (size or default for size, default in zip(sizes, (48, 6), strict=True))
    head = int(made.get("head_dim") or getattr(config, "head_dim", None) or width // heads)
    planes = int(head * (flat.get("partial_rotary_factor") or 1.0)) // 2
    for name, scaling in scalings(planes).items():
        yield Flavour(f"rope-{name}", {"rope_parameters": _with_theta(rope, **scaling)})
        if nested:
            one = {k: {**v, **scaling} if v is not None and "full" in k else v for k, v in rope.items()}
            yield Flavour(f"rope-{name}-full-only", {"rope_parameters": one})
    for share in (0.5, 1.0):
        yield Flavour(f"partial-{share}", {"rope_parameters": _with_theta(rope, partial_rotary_factor=share)})
    for name in ("linear", "yarn", "longrope"):
        scaling = {**scalings(head // 4)[name], "partial_rotary_factor": 0.5}
        yield Flavour(f"partial-{name}", {"rope_parameters": _with_theta(rope, **scaling)})
    if not nested:
        yield from _older_rotary(rope, planes)


def _older_rotary(rope: Mapping[str, Any], planes: int) -> Iterator[Flavour]:
    """Rotary settings as files from before transformers 5 have them, and keys of other types beside them."""
    partial = {key: value for key, value in rope.items() if key == "partial_rotary_factor"}
    theta = {"rope_parameters": None, "rope_theta": 50.0, **partial}
    longrope = scalings(planes)["longrope"]
    outside = longrope.pop("original_max_position_embeddings")
    yield Flavour("old-theta", {}, theta)
    yield Flavour("old-linear", {}, {**theta, "rope_scaling": {"type": "linear", "factor": 2.5}})
    yield Flavour("old-llama3", {}, {**theta, "rope_scaling": scalings(planes)["llama3"]})
    yield Flavour("old-yarn", {}, {**theta, "rope_scaling": scalings(planes)["yarn"]})
    yield Flavour("old-longrope", {}, {**theta, "rope_scaling": longrope, "original_max_position_embeddings": outside})
    yield Flavour("old-partial", {}, {**theta, "partial_rotary_factor": 0.5})
    yield Flavour("new-and-old-scaling", {}, {"rope_scaling": {"type": "linear", "factor": 2.5}})
    yield Flavour("other-names", {}, {"rope_parameters": None, "rotary_emb_base": 50.0, "rotary_pct": 0.5})
    yield Flavour("rotary-pct-beside-partial", {}, {**theta, "rotary_pct": 0.5, "partial_rotary_factor": 1.0})


def scalings(planes: int) -> dict[str, dict[str, Any]]:
    """Rotary scalings with all their parameters, for so many planes."""
    short = [1.0 + 0.25 * i for i in range(planes)]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}
    longrope = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": [3.0 * factor for factor in short],
        "original_max_position_embeddings": 32,
    }
    return {
        "linear": {"rope_type": "linear", "factor": 2.5},
        "dynamic": {"rope_type": "dynamic", "factor": 2.5},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "yarn": {**yarn, "beta_slow": 1.0},
        "yarn-mscale": {**yarn, "mscale": 1.3, "mscale_all_dim": 0.7, "truncate": False},
        "yarn-attention": {**yarn, "attention_factor": 1.4},
        "longrope": {**longrope, "factor": 2.0},
        "longrope-attention": {**longrope, "factor": 4.0, "attention_factor": 1.3},
        "proportional": {"rope_type": "proportional", "factor": 2.5, "partial_rotary_factor": 0.5},
    }


def _configuration(model_type: str, keys: Mapping[str, Any]) -> Any:
    own = _shrunk(_default(model_type), model_type) | dict(keys)
    return transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(own)))


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Make every floating parameter random: gains 1 or 0 and biases give or take 0.3, matrices by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        value = parameter.data
        noise = torch.randn(value.shape, generator=generator)
        constant = value.numel() > 1 and bool((value == value.flatten()[0]).all())
        if value.ndim < 2 or (constant and float(value.flatten()[0]) == 1):
            value.add_(0.3 * noise)
        else:
            value.copy_(1.3 * noise / value.shape[-1] ** 0.5)


def build(model_type: str, flavour: Flavour | str, folder: Path) -> Any:
    """Make a checkpoint and save it.

    Args:
        model_type: as transformers names it.
        flavour: one of ``flavours(model_type)``, or its name.
        folder: where it is saved.

    Returns:
        The transformers model that reads this folder, float32, in evaluation, with eager attention.

    Raises:
        NotBuildable: transformers itself cannot.
    """
    if isinstance(flavour, str):
        flavour = next(f for f in flavours(model_type) if f.name == flavour)
    try:
        config = _configuration(model_type, flavour.keys)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            randomise(model)
        model = model.float().eval()
        model.save_pretrained(folder)
        if flavour.bare:
            _without_prefix(folder / "model.safetensors", f"{model.base_model_prefix}.")
        if flavour.saved is None and not flavour.bare:
            return model
        file = folder / "config.json"
        saved = json.loads(file.read_text()) | dict(flavour.saved or {})
        file.write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))
        return _loaded(folder)
    except Exception as error:
        raise NotBuildable(f"{type(error).__name__}: {error}") from error
    finally:
        if not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _loaded(folder: Path) -> Any:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise ValueError(f"transformers misses {sorted(report['missing_keys'])[:3]}")
    return model.eval()


def _without_prefix(file: Path, prefix: str) -> None:
    tensors = load_file(file)
    if not any(name.startswith(prefix) for name in tensors):
        raise ValueError(f"no name begins with {prefix}")
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})


def prompt(model: Any, length: int = 12) -> Tensor:
    """Random tokens, none of them one that stands for padding, (length,)."""
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(4, vocab, (length,), generator=torch.Generator().manual_seed(1))
