"""GGUF's vocabulary, translated into that of transformers: one set of keys and names for all architectures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from virtual_weights.architecture.config import references, same, wrong
from virtual_weights.architecture.table import Entry, built_in
from virtual_weights.errors import ArchitectureError

_SIZES = {
    "block_count": "layers",
    "embedding_length": "d_model",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "d_head",
    "feed_forward_length": "d_mlp",
    "vocab_size": "vocab",
    "attention.layer_norm_rms_epsilon": "eps",
    "attention.layer_norm_epsilon": "eps",
    "rope.freq_base": "theta",
    "rope.freq_base_swa": "local_theta",
    "embedding_scale": "embed_factor",
    "residual_scale": "attn_factor",
    "attention.scale": "scale",
    "logit_scale": "logit_factor",
    "attn_logit_softcapping": "attn_cap",
    "final_logit_softcapping": "logit_cap",
    "use_parallel_residual": "parallel",
}
"""Keys of GGUF, less the architecture, and what the entry of a table calls the same."""
_NEVER_BY_DEFAULT = ("layers", "d_model", "heads", "kv_heads", "d_head", "d_mlp", "vocab", "eps")
"""What a file that does not say it does not leave to the defaults of a class in transformers."""
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Sizes that GGUF may give layer by layer."""
_NEUTRAL = frozenset(
    """context_length tensor_data_layout attention.value_length attention.sliding_window rope.dimension_count
    rope.scale_linear rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned
    rope.scaling.attn_factor rope.scaling.yarn_log_multiplier attention.sliding_window_pattern""".split()
)
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0, None),
    "expert_used_count": (0, None),
    "attention.causal": (True, None),
    "attention.clamp_kqv": (None, 0, 0.0),
    "attention.max_alibi_bias": (None, 0, 0.0, 8.0),
}
_FILE: Mapping[str, tuple[Any, ...]] = {"general.type": ("model", None), "split.count": (0, 1, None)}
"""What kind of GGUF file holds a whole model: no adapter, and not the first of several files."""


def architectures() -> tuple[str, ...]:
    """The values of ``general.architecture`` that the tables have an entry for."""
    return tuple(sorted(built_in()["gguf"]))


def translated(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], entry: Entry
) -> tuple[Entry, dict[str, Any]]:
    """The entry of a GGUF file, whose names are GGUF's, and its configuration in transformers' vocabulary.

    Args:
        config: the file's keys.
        shapes: of its tensors.
        entry: of the model type, in transformers' names.

    Raises:
        ArchitectureError: a key is not known, or says what transformers cannot.
    """
    name = str(config["general.architecture"])
    table: dict[str, Any] = dict(built_in()["gguf"][name])
    table.pop("model_type")
    begin = f"{name}."
    own = {key.removeprefix(begin): value for key, value in config.items() if key.startswith(begin)}
    _refuse(config, own, name, set(table.get("neutral", ())))
    own |= {key: _uniform(own, key) for key in _PER_LAYER if key in own}
    settings = {**table.pop("set", {}), "model_type": entry.model_type}
    table.pop("neutral", None)
    table_names = table.pop("name", {})
    changed = {"plus": 0.0, "qk_plus": 0.0, "transposed": False, "permuted": False, **table}
    values = {**entry.values, **changed}
    for key, role in _SIZES.items():
        if own.get(key) is not None:
            _put(settings, entry.values[role], own[key], f"{begin}{key}")
        elif role in _NEVER_BY_DEFAULT and not any(own.get(k) is not None for k, r in _SIZES.items() if r == role):
            _put(settings, entry.values[role], 1e-5 if role == "eps" else None)
    if "context_length" in own:
        settings["max_position_embeddings"] = own["context_length"]
        if entry.values["pos"]:
            _put(settings, entry.values["positions"], own["context_length"])
    _put(settings, entry.values["tied"], "output.weight" not in shapes)
    for trait, leaf in (("o_bias", "attn_output"), ("qkv_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        found = any(re.fullmatch(rf"blk\.\d+\.{leaf}(kv)?\.bias", name) for name in shapes)
        if references(entry.values[trait]):
            already = settings.get(references(entry.values[trait])[0], False)
            _put(settings, entry.values[trait], found or already)
    if entry.values["rotary"] != "none":
        _rotary(settings, own, entry, begin)
    own_entry = replace(entry, values=values).settled(settings)
    names = {role: leaf for role, leaf in built_in()["names"]["gguf"].items() if _has(own_entry, role)}
    # what the converter changes goes before what a case of transformers' says
    return replace(own_entry, values={**own_entry.values, **changed}, names={**names, **table_names}), settings


def _has(entry: Entry, role: str) -> bool:
    """Whether a type has what a name of GGUF is for, where the converter keeps or joins what transformers has."""
    if role in ("prefixes", "layer"):
        return True
    if role in ("qkv", "q", "k", "v"):
        return (role == "qkv") == bool(entry.values["fused"])
    if role in ("gate", "gate_up"):
        return (role == "gate_up") == bool(entry.values["fused_mlp"]) and (entry.has("gate") or entry.has("gate_up"))
    return entry.has(role) or (role == "up" and not entry.values["fused_mlp"])


def _refuse(config: Mapping[str, Any], own: Mapping[str, Any], name: str, neutral: set[str]) -> None:
    known = {*_SIZES, *_NEUTRAL, *_REQUIRED, *neutral}
    unknown = [f"{name}.{key}" for key, value in own.items() if value is not None and key not in known]
    if unknown:
        raise ArchitectureError(
            f"keys of the file that no table accounts for: {', '.join(sorted(unknown)[:6])}",
            expected="only keys whose effect on the function is known",
            do="if they change nothing, pass config= without them, or name each with --ignore-config",
        )
    required = {**_FILE, **{f"{name}.{key}": allowed for key, allowed in _REQUIRED.items()}}
    for key, allowed in required.items():
        if not any(same(config.get(key), value) for value in allowed):
            raise ArchitectureError(
                f"the file has {key} = {config[key]!r:.100}, which changes the function",
                expected=f"one of {allowed!r}",
                do="open a model without it; this package would compute wrong maps",
            )


def is_known(key: str, name: str) -> bool:
    """Whether a key of a GGUF file is read, or known to change nothing."""
    own = key.removeprefix(f"{name}.")
    table = built_in()["gguf"].get(name, {})
    return own == key or own in {*_SIZES, *_NEUTRAL, *_REQUIRED, *table.get("neutral", ())}


def _put(settings: dict[str, Any], said: Any, value: Any, key: str = "") -> None:
    """Say a value in transformers' vocabulary, where the entry reads it from there; else it must be the entry's own."""
    names = references(said)
    if not names or not isinstance(said, str):
        if key and said != "" and not (isinstance(value, int | float) and math.isclose(value, said, rel_tol=1e-6)):
            raise ArchitectureError(
                f"the file has {key} = {value!r:.100}, which changes the function",
                expected=f"{said!r}, as in all models of this architecture in transformers",
                do="open a model without it; this package would compute wrong maps",
            )
        return
    if said.startswith("1/"):
        value = 1 / value
    if "^" in said:
        power = float(said.rpartition("^")[2])
        value = value ** (1 / power)
    if said.startswith("!"):
        value = not value
    place, *rest = names[0].split(".")
    if rest:
        settings[place] = {**settings.get(place, {}), rest[0]: value}
    else:
        settings[place] = value


def _uniform(own: Mapping[str, Any], key: str) -> Any:
    """A setting that may be given once or as a list with one value per layer; a list of equal values is that value."""
    value = own.get(key)
    if isinstance(value, list) and value and all(type(item) is type(value[0]) and item == value[0] for item in value):
        return value[0]
    if isinstance(value, list):
        raise wrong(key, value, "one value for all layers")
    return value


def _rotary(settings: dict[str, Any], own: Mapping[str, Any], entry: Entry, begin: str) -> None:
    """Rotary settings as llama.cpp reads them: a factor without a type is linear, 0 is none."""
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
    given: dict[str, Any] = {}
    if factors and kind == "linear":
        given = {"rope_type": "linear", "factor": next(iter(factors.values()))}
    theta = references(entry.values["theta"])
    if theta and "." not in theta[0]:
        given |= {"rope_theta": settings.get(theta[0], 10000.0)}
    if entry.values["local_theta"]:
        local = references(entry.values["local_theta"])[0]
        slow = {"rope_theta": settings.pop(local, entry.values["defaults"].get(local, 10000.0)), "rope_type": "default"}
        settings["rope_parameters"] = {"full_attention": {"rope_type": "default", **given}, "sliding_attention": slow}
        return
    settings["rope_parameters"] = {"rope_type": "default", **given}
    turned = own.get("rope.dimension_count")
    if turned is not None:
        width = own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
        if not isinstance(turned, int) or turned % 2 or not 2 <= turned <= width:
            raise ArchitectureError(
                f"rotary embedding would turn {turned} of {width} dimensions of a head ({begin}rope.dimension_count)",
                expected=f"an even number between 2 and {width}",
                do="make the file again from the checkpoint that it was converted from",
            )
        if entry.values["rotary_dim"]:
            _put(settings, entry.values["rotary_dim"], turned)
        elif entry.values["partial"]:
            share = turned / width
            # transformers rounds the product down, which must not lose the last of them
            share = share if int(share * width) == turned else math.nextafter(share, 1)
            settings["rope_parameters"]["partial_rotary_factor"] = share
        elif turned < width:
            settings["gguf_turned"] = turned
