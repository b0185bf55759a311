"""GGUF's vocabulary, translated into that of transformers: one set of keys and names for all architectures."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from virtual_weights.architecture.config import (
    Reading,
    admits,
    checked_integer,
    checked_number,
    divided,
    references,
    wrong,
)
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
"""What a file without it does not leave to the defaults of a class in transformers."""
_PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Sizes that GGUF may give layer by layer."""
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
"""Settings of yarn, and how transformers calls them."""
_READ = frozenset(
    """context_length rope.freq_base rope.freq_base_swa rope.dimension_count rope.scale_linear rope.scaling.type
    rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_log_multiplier
    attention.sliding_window attention.sliding_window_pattern""".split()
) | {f"rope.scaling.{key}" for key in _YARN}
"""Keys that are read one by one."""
_NEUTRAL = frozenset({"tensor_data_layout", "attention.value_length", "rope.scaling.finetuned"})
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0, "null"),
    "expert_used_count": (0, "null"),
    "nextn_predict_layers": (0, "null"),
    "attention.causal": (True, "null"),
    "attention.clamp_kqv": ("null", 0, 0.0),
    "attention.max_alibi_bias": ("null", 0, 0.0),
    "rope.scaling.yarn_ext_factor": ("null", 1.0, -1.0),
}
_FILE: Mapping[str, tuple[Any, ...]] = {"general.type": ("model", "null"), "split.count": (0, 1, "null")}
"""A whole model: no adapter, and not the first of several files."""
_OWN = "model_type types also set choose keys needs required neutral name full_every window local_theta wide_layers"
"""What an architecture's entry says of the format; everything else in it is a trait, as in the entry of a type."""

_PLAIN = re.compile(r"(1/)?\$[\w.]+")
"""What an entry reads from a key of its own."""
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
"""Tensors that transformers has in its configuration: factors of the frequencies, of shape (dim/2,)."""


def architectures() -> tuple[str, ...]:
    """The values of ``general.architecture`` that the tables have an entry for."""
    return tuple(sorted(built_in()["gguf"]))


def serving(model_type: str) -> tuple[str, ...]:
    """The architectures under which models of a type are stored."""
    kinds = {
        k: [t["model_type"], *t.get("types", {}).values(), *t.get("also", ())] for k, t in built_in()["gguf"].items()
    }
    return tuple(sorted(name for name in kinds if model_type in kinds[name]))


def model_type_of(config: Mapping[str, Any]) -> str | None:
    """The model type of a file by its architecture, and where that serves several, by a key; None where unknown."""
    name = config.get("general.architecture")
    table = built_in()["gguf"].get(name) if isinstance(name, str) else None
    if table is None:
        return None
    return str(
        next((t for key, t in table.get("types", {}).items() if config.get(f"{name}.{key}")), table["model_type"])
    )


def translated(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], entry: Entry
) -> tuple[Entry, dict[str, Any]]:
    """The entry of a GGUF file, whose names are GGUF's, and its configuration in transformers' vocabulary.

    Args:
        config: the file's keys, with the content of ``SHORT`` and ``LONG`` under their names.
        shapes: of its tensors.
        entry: of the model type, in transformers' names.

    Raises:
        ArchitectureError: a key is not known, or says what transformers cannot.
    """
    name = str(config["general.architecture"])
    table = built_in()["gguf"][name]
    begin = f"{name}."
    keys = {key.removeprefix(begin): _decimal(value) for key, value in config.items() if key.startswith(begin)}
    _refuse(config, keys, name, table)
    keys |= {key: _uniform(keys, key) for key in _PER_LAYER if key in keys}
    file = _File(name, keys, shapes, table, config)
    settings = file.settings(entry)
    hf = entry.settled(settings)
    changed = {"plus": 0.0, "qk_plus": 0.0, "transposed": False, "permuted": False, **file.traits()}
    values = {**hf.values, **changed}
    return replace(hf, values=values, names=file.names(hf, values)), settings


@final
@dataclass(frozen=True)
class _File:
    name: str
    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    table: Mapping[str, Any]
    config: Mapping[str, Any]

    def holds(self, leaf: str) -> bool:
        """Whether some layer has a tensor whose name ends so, or so before ``.weight``."""
        pattern = re.compile(rf"blk\.\d+\.({leaf})(\.weight)?")
        return any(pattern.fullmatch(name) for name in self.shapes)

    def traits(self) -> dict[str, Any]:
        """What the converter changes in a type's traits."""
        changed = {key: value for key, value in self.table.items() if key not in _OWN.split()}
        if not changed.get("permuted"):  # llama.cpp takes them in one tensor or in three
            changed["fused"] = "blocks" if self.holds("attn_qkv") else ""
        return changed

    def names(self, hf: Entry, values: Mapping[str, Any]) -> dict[str, Any]:
        """Leaf names by role, of those that a model with these traits has."""
        fused, joined, gated = bool(values["fused"]), bool(values["fused_mlp"]), bool(values["gated"])
        has = dict.fromkeys(("q", "k", "v"), not fused) | {"qkv": fused, "prefixes": True, "layer": True}
        has |= {"gate": gated and not joined, "up": not joined, "gate_up": joined}
        leaves = {**built_in()["names"]["gguf"], **self.table.get("name", {})}
        names = {role: leaf for role, leaf in leaves.items() if has.get(role, hf.has(role))}
        if hf.has("mlp.norm") and hf.names["mlp.norm"] == hf.names.get("attn.norm"):
            names["mlp.norm"] = names["attn.norm"]  # one norm before both
        return names

    def settings(self, entry: Entry) -> dict[str, Any]:
        """The file's keys in transformers' vocabulary."""
        keys, table = self.keys, self.table
        settings: dict[str, Any] = {**table.get("set", {}), "model_type": entry.model_type}
        for key, (leaf, there, absent) in table.get("choose", {}).items():
            settings[key] = there if self.holds(leaf) else absent
        window = keys.get("attention.sliding_window", table.get("window")) or None
        if window or "sliding_window" in entry.values["defaults"]:
            settings["sliding_window"] = window
        if "full_every" in table:
            settings["layer_types"] = self._kinds(window)
        entry = entry.settled(settings)
        for key, role in self._roles(entry):
            self._put(settings, entry, role, keys.get(key))
        if "context_length" in keys:
            settings["max_position_embeddings"] = keys["context_length"]
            if entry.values["pos"]:
                _set(settings, str(entry.values["positions"]), keys["context_length"])
        _set(settings, str(entry.values["tied"]), "output.weight" not in self.shapes)
        for trait, leaf in (("o_bias", "attn_output"), ("qkv_bias", "attn_q|attn_qkv"), ("mlp_bias", "ffn_up")):
            for key in references(entry.values[trait]):
                settings[key] = settings.get(key, False) or self.holds(rf"({leaf})\.bias")
        if entry.values["rotary"] != "none":
            self._rotary(settings, entry)
        for key, place in table.get("keys", {}).items():
            if keys.get(key) is not None:
                _set(settings, place, keys[key])
        self._scale(settings, entry)
        self._compare(settings, entry)
        return settings

    def _roles(self, entry: Entry) -> Iterator[tuple[str, str]]:
        """Keys that say what an entry says, those for the other kind of norm left out."""
        other = "attention.layer_norm_epsilon" if entry.values["norm"] == "rms" else "attention.layer_norm_rms_epsilon"
        unread = {other, *self.table.get("neutral", ())}
        return ((key, role) for key, role in _SIZES.items() if key not in unread)

    def _put(self, settings: dict[str, Any], entry: Entry, role: str, value: Any) -> None:
        """Say a value where the entry reads it from a key of its own; of another form it is compared later."""
        trait = entry.values[role]
        if _PLAIN.fullmatch(str(trait)) and (value is not None or role in _NEVER_BY_DEFAULT):
            # llama.cpp's logit_scale, too, is what transformers divides by where it divides
            _set(settings, trait, 1e-5 if value is None and role == "eps" else value)

    def _kinds(self, window: Any) -> list[str]:
        """Which layers attend within a window; where that decides how they turn, it must be right."""
        layers = checked_integer(f"{self.name}.block_count", self.keys.get("block_count"))
        pattern = self.keys.get("attention.sliding_window_pattern", self.table["full_every"]) if window else 1
        if isinstance(pattern, int) and not isinstance(pattern, bool):
            pattern = [pattern == 0 or (layer + 1) % pattern != 0 for layer in range(layers)]
        if not isinstance(pattern, list) or len(pattern) < layers:
            raise wrong("attention.sliding_window_pattern", pattern, "a flag per layer, or after how many one is full")
        return ["sliding_attention" if flag else "full_attention" for flag in pattern[:layers]]

    @property
    def _width(self) -> int:
        """Of a head."""
        width, sizes = self.keys.get("attention.key_length"), ("embedding_length", "attention.head_count")
        if width is None and all(isinstance(self.keys.get(key), int) and self.keys[key] > 0 for key in sizes):
            width = self.keys[sizes[0]] // self.keys[sizes[1]]
        if not isinstance(width, int) or width < 1:
            raise wrong(f"{self.name}.attention.key_length", width, "a whole number, or the sizes that it follows from")
        return width

    def _scale(self, settings: dict[str, Any], entry: Entry) -> None:
        """The factor on scores: of a file without it, 1/sqrt(d_head), whatever a class in transformers takes."""
        trait, given = str(entry.values["scale"]), self.keys.get("attention.scale") or None
        if trait == "$d_head^-0.5" or not references(trait):
            return
        width = self._width
        if self.keys.get("block_count") in self.table.get("wide_layers", ()):  # llama.cpp knows them by that alone
            wide, heads = (checked_integer(k, self.keys.get(k)) for k in ("embedding_length", "attention.head_count"))
            width = divided(wide, heads, "width by heads")
        scale = width**-0.5 if given is None else checked_number(f"{self.name}.attention.scale", given)
        if trait.endswith("^-0.5"):
            _set(settings, trait.partition("^")[0], width if given is None else scale**-2)
        else:
            _set(settings, trait, scale)

    def _compare(self, settings: Mapping[str, Any], entry: Entry) -> None:
        """Refuse a key whose value the type does not read, where it is not what the type has."""
        for key, role in self._roles(entry):
            value, trait = self.keys.get(key), entry.values[role]
            if value is None or trait == "" or _PLAIN.fullmatch(str(trait)) or (role == "scale" and value == 0):
                continue
            by_width = trait == "$d_head^-0.5"
            taken = self._width**-0.5 if by_width else Reading(settings, entry.values).value(role)
            numbers = isinstance(value, int | float) and isinstance(taken, int | float)
            if math.isclose(value, taken, rel_tol=1e-6) if numbers else value == taken:
                continue
            raise ArchitectureError(
                f"the file has {self.name}.{key} = {value!r:.100}, which changes the function",
                expected=f"{taken!r}, as in all models of this architecture in transformers",
                do="open a model without it; this package would compute wrong maps",
            )

    def _rotary(self, settings: dict[str, Any], entry: Entry) -> None:
        """Rotary settings as llama.cpp reads them: a factor without a type is linear, 0 is none."""
        keys = self.keys
        base = keys.get("rope.freq_base", 10000.0)
        local = keys.get("rope.freq_base_swa", self.table.get("local_theta", base))
        full = {"rope_type": "default", "rope_theta": base, **self._scaling(settings, entry)}
        turned, width = keys.get("rope.dimension_count"), self._width
        nested = entry.values["local_theta"] == "nested"
        if turned is not None and (
            not isinstance(turned, int) or turned % 2 or not 2 <= turned <= width or (nested and turned < width)
        ):
            raise ArchitectureError(
                f"rotary embedding would turn {turned} of {width} dimensions of a head "
                f"({self.name}.rope.dimension_count)",
                expected="all of them" if nested else f"an even number between 2 and {width}",
                do="make the file again from the checkpoint that it was converted from",
            )
        if nested:
            slow = {"rope_type": "default", "rope_theta": local}
            settings["rope_parameters"] = {"full_attention": full, "sliding_attention": slow}
            return
        if local != base:
            raise ArchitectureError(
                f"the file has {self.name}.rope.freq_base_swa = {local!r:.50} and rope.freq_base = {base!r:.50}",
                expected=f"one base for all layers, as {entry.model_type} has in transformers",
                do="open a model without it; this package would give wrong rotary offsets",
            )
        settings["rope_parameters"] = full
        if turned is None:
            return
        if entry.values["partial"]:
            share = turned / width
            # transformers rounds the product down, which must not lose the last of them
            full["partial_rotary_factor"] = share if int(share * width) == turned else math.nextafter(share, 1)
        elif turned < width:
            settings["gguf_turned"] = turned

    def _scaling(self, settings: dict[str, Any], entry: Entry) -> dict[str, Any]:
        """How frequencies are scaled, in transformers' words."""
        keys = {key.removeprefix("rope.scaling."): value for key, value in self.keys.items() if value is not None}
        factors = {key: checked_number(key, keys[key]) for key in ("factor", "rope.scale_linear") if keys.get(key)}
        if len(set(factors.values())) > 1:
            raise ArchitectureError(
                f"the file has {' and '.join(f'{key} = {value!r:.50}' for key, value in factors.items())}",
                expected="one factor, under one of these names",
                do="make the file again from the checkpoint that it was converted from",
            )
        factor, length = next(iter(factors.values()), None), keys.get("original_context_length") or None
        length = None if length is None else checked_integer("rope.scaling.original_context_length", length)
        short, long = self.config.get(SHORT), self.config.get(LONG)
        kind = keys.get("type", "longrope" if short else "linear" if factor else "none")
        attention = checked_number("rope.scaling.attn_factor", keys.get("attn_factor", 1.0))
        if "original_max_position_embeddings" in entry.values["defaults"] and length:
            settings["original_max_position_embeddings"] = length
        plain = not short and attention == 1.0
        if plain and (kind, factor) in (("none", None), ("none", 1.0), ("linear", None)):
            return {}
        if kind == "linear" and plain:
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and factor and length and plain:
            given = {named: keys[key] for key, named in _YARN.items() if key in keys}
            if "yarn_log_multiplier" in keys:  # llama.cpp, too, takes the other one for 1
                given |= {"mscale": 1.0, "mscale_all_dim": keys["yarn_log_multiplier"]}
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, **given}
        longest = self.keys.get("context_length")
        if kind == "longrope" and short and long and length and longest:
            given = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": length}
            ratio = checked_number("context_length", longest) / length
            usual = math.sqrt(1 + math.log(ratio) / math.log(length)) if ratio > 1 and length > 1 else 1.0
            if not math.isclose(attention, usual, rel_tol=1e-6):
                given["attention_factor"] = attention
            return {"rope_type": "longrope", **given}
        raise ArchitectureError(
            f"the file asks for rotary scaling {kind!r:.50}, with factor {factor!r:.50}, original_context_length "
            f"{length!r:.50}, attn_factor {attention!r:.50}{', and stored short factors' if short else ''}",
            expected="none; linear with a factor; yarn with a factor and a length; longrope with a length and "
            f"{SHORT} and {LONG}",
            do="open the safetensors form of this model, or another model",
        )


def _refuse(config: Mapping[str, Any], keys: Mapping[str, Any], name: str, table: Mapping[str, Any]) -> None:
    """Refuse keys that nobody reads, and values that no type has."""
    known = _known(table)
    unknown = [f"{name}.{key}" for key, value in keys.items() if value is not None and key not in known]
    if unknown:
        raise ArchitectureError(
            f"keys of the file that no table accounts for: {', '.join(sorted(unknown)[:6])}",
            expected="only keys whose effect on the function is known",
            do="if they change nothing, pass config= without them, or name each with --ignore-config",
        )
    absent = [f"{name}.{key}" for key in table.get("needs", ()) if keys.get(key) is None]
    if absent:
        raise ArchitectureError(
            f"the file lacks {', '.join(absent)}",
            expected=f"what every file of the architecture {name!r} says",
            do="make the file again with llama.cpp's converter",
        )
    own_required = {**_REQUIRED, **table.get("required", {})}
    required = {**_FILE, **{f"{name}.{key}": allowed for key, allowed in own_required.items()}}
    for key, allowed in required.items():
        if not admits(allowed, config.get(key)):
            raise ArchitectureError(
                f"the file has {key} = {config.get(key)!r:.100}, which changes the function",
                expected=f"one of {allowed!r}",
                do="open a model without it; this package would compute wrong maps",
            )


def _known(table: Mapping[str, Any]) -> set[str]:
    keys = (key for part in ("keys", "required", "types", "neutral") for key in table.get(part, ()))
    return {*_SIZES, *_READ, *_NEUTRAL, *_REQUIRED, *keys}


def is_known(key: str, name: str) -> bool:
    """Whether a key of a GGUF file is read, or known to change nothing."""
    bare = key.removeprefix(f"{name}.")
    return bare == key or bare in _known(built_in()["gguf"].get(name, {}))


def _set(settings: dict[str, Any], reference: str, value: Any) -> None:
    """Put a value under the key of a reference such as ``"$a.b"``, key b of the object a."""
    place, *rest = reference.removeprefix("1/").lstrip("!$").split(".")
    value = not value if reference.startswith("!") else value
    settings[place] = {**(settings.get(place) or {}), rest[0]: value} if rest else value


def _decimal(value: Any) -> Any:
    """A number as it was written before it was rounded to float32, where six digits tell it."""
    if not isinstance(value, float) or not abs(value) < 1e38:
        return value
    short = float(f"{value:.6g}")
    return short if struct.unpack("f", struct.pack("f", short))[0] == value else value


def _uniform(keys: Mapping[str, Any], key: str) -> Any:
    """A setting that may be given once or as a list with one value per layer; a list of equal values is that value."""
    value = keys.get(key)
    if isinstance(value, list) and value and all(type(item) is type(value[0]) and item == value[0] for item in value):
        return value[0]
    if isinstance(value, list):
        raise wrong(key, value, "one value for all layers")
    return value
