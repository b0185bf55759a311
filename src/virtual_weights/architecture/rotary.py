"""Rotary settings of a configuration, the old keys and the new, as transformers 5 reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from virtual_weights.architecture.config import Reading, checked_number, wrong
from virtual_weights.architecture.spec import Rotary
from virtual_weights.errors import ArchitectureError

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings",),
}
"""The scalings, and what each must say in positive numbers."""
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
_LISTS: Mapping[str, tuple[str, ...]] = {"longrope": ("short_factor", "long_factor")}


@final
@dataclass(frozen=True)
class _Settings:
    """What a configuration says of rotary embedding in some layers.

    Attributes:
        name: of the object of the configuration that holds them.
        given: its content.
        reading: the whole configuration.
        theta: what the table says of the base outside of that object.
    """

    name: str
    given: Mapping[str, Any]
    reading: Reading
    theta: Any

    def number(self, key: str) -> float:
        """A positive number; null counts as given, and is refused."""
        outside = {"original_max_position_embeddings": "max_position_embeddings"}.get(key, "")
        if key == "original_max_position_embeddings" and self.reading.config.get(key) is not None:
            return checked_number(key, self.reading.config[key])  # transformers gives it the first word
        if key not in self.given and outside:
            return checked_number(outside, self.reading.key(outside))
        return checked_number(f"{self.name}.{key}", self.given.get(key))

    @property
    def base(self) -> float:
        """Theta, from the object, else from outside."""
        if "rope_theta" in self.given:
            return checked_number(f"{self.name}.rope_theta", self.given["rope_theta"])
        if not isinstance(self.theta, str):
            return float(self.theta)
        return checked_number(self.theta[1:], self.reading.key(self.theta[1:]))


def rotary(reading: Reading, width: int, kind: str, theta: float | None) -> tuple[Rotary, float]:
    """How queries and keys of one layer turn, and the factor that its scaling puts on their scores.

    Args:
        reading: the configuration.
        width: d_head.
        kind: type of the layer where settings differ between types, else "".
        theta: the base, where the layer has its own.

    Raises:
        ArchitectureError: an unknown scaling, settings per type of layer where all layers turn alike in transformers, a
            value of the wrong type, or a rotary width that the family cannot turn.
    """
    settings = _settings(reading, kind)
    scaling = settings.given.get("rope_type", settings.given.get("type", "default"))
    if not isinstance(scaling, str) or scaling not in reading.entry["scalings"]:
        raise ArchitectureError(
            f"the configuration asks for rotary scaling {scaling!r:.100}",
            expected=", ".join(reading.entry["scalings"]),
            do="open a model with one of these; others would give wrong rotary offsets",
        )
    numbers = _numbers(settings, scaling)
    dim = _turned(settings, width, scaling)
    lists = {key: _divisors(settings, key, dim) for key in _LISTS.get(scaling, ())}
    factor = _attention_factor(scaling, numbers)
    whole = dim == width
    return Rotary(
        dim,
        settings.base if theta is None else checked_number("the layer's base", theta),
        {"rope_type": scaling, **numbers, **lists} if scaling != "default" else {},
        reading.entry["rotary"],
        apart=width // 2 if reading.entry.get("permuted") and not whole else None,
        backwards=reading.entry["rotary_back"],
        factor=1.0 if whole else factor,
        longest=_longest(settings, scaling),
    ), factor**2 if whole else 1.0


def _settings(reading: Reading, kind: str) -> _Settings:
    """What ``rope_scaling`` holds, else ``rope_parameters``, never a mixture; of nested ones the layer's own."""
    old, new = (reading.config.get(key) for key in ("rope_scaling", "rope_parameters"))
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise wrong(key, value, "an object, or null")
    if kind:
        return _nested(reading, kind, dict(old or {}), dict(new or {}))
    name, given = ("rope_scaling", old) if old else ("rope_parameters", new)
    if given is None:
        given = reading.entry["defaults"].get("rope_parameters", {})
    nested = sorted(key for key, value in given.items() if isinstance(value, Mapping))
    if nested:
        raise ArchitectureError(
            f"{name} holds settings of their own for {', '.join(map(repr, nested[:6]))}",
            expected="one rotary embedding for all layers, as this family has in transformers",
            do=f"where all layers turn alike, write the settings directly into {name}",
        )
    return _Settings(name, given, reading, reading.entry["theta"])


def _nested(reading: Reading, kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> _Settings:
    """The settings of one type of layer; ``rope_scaling`` is laid over those of full attention."""
    dropped = () if reading.entry["thetas"] else ("rope_theta", "rope_type")
    flat = sorted(key for key, value in new.items() if not isinstance(value, Mapping | None) and key not in dropped)
    if flat or (old and "rope_type" not in old):
        raise ArchitectureError(
            f"the rotary settings hold {', '.join(flat[:6]) or 'a scaling without rope_type'}",
            expected="settings by type of layer, full_attention and sliding_attention, each with its rope_type",
            do="write them as transformers saves them",
        )
    given = {**(new.get(kind) or {}), **(old if kind == "full_attention" else {})}
    return _Settings(f"rope_parameters.{kind}", given, reading, reading.entry["thetas"].get(kind, "$rope_theta"))


def _numbers(settings: _Settings, scaling: str) -> dict[str, Any]:
    values: dict[str, Any] = {key: settings.number(key) for key in _NEEDED[scaling]}
    values |= {key: settings.number(key) for key in _OPTIONAL.get(scaling, ()) if settings.given.get(key) is not None}
    if scaling == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ArchitectureError(
            f"{settings.name} has high_freq_factor = {values['high_freq_factor']} and low_freq_factor = "
            f"{values['low_freq_factor']}",
            expected="the first above the second",
            do="correct config.json, or pass config= with the right values",
        )
    if scaling == "yarn":
        # transformers looks for it beside the settings of each type of layer, where it never is
        values["truncate"] = bool(settings.given.get("truncate", True)) or "." in settings.name
    if scaling in ("yarn", "longrope") and "factor" not in values:
        longest = checked_number("max_position_embeddings", settings.reading.key("max_position_embeddings"))
        values["factor"] = longest / values["original_max_position_embeddings"]
    return values


def _divisors(settings: _Settings, key: str, dim: int) -> tuple[float, ...]:
    value = settings.given.get(key)
    if not isinstance(value, list) or len(value) != dim // 2:
        raise wrong(f"{settings.name}.{key}", value, f"a list of {dim // 2} positive numbers")
    return tuple(checked_number(f"{settings.name}.{key}", item) for item in value)


def _turned(settings: _Settings, width: int, scaling: str) -> int:
    """How many dimensions of a head turn."""
    reading, key = settings.reading, "partial_rotary_factor"
    partial = bool(reading.entry["partial"])
    own = reading.config.get("gguf_turned")  # what only a GGUF file can say of its type
    if own is not None:
        return int(own)
    if reading.entry["rotary_dim"]:
        dim = reading.integer("rotary_dim", width)
    elif not partial and scaling == "default":
        dim = width
    else:
        share = settings.given.get(key)
        share = (reading.value("partial") if partial else reading.config.get(key)) if share is None else share
        dim = width if share is None else int(width * checked_number(key, share))
    if dim % 2 or not 2 <= dim <= width or (dim < width and not (partial or reading.entry["rotary_dim"])):
        raise ArchitectureError(
            f"rotary embedding would turn {dim} of {width} dimensions of a head",
            expected="an even number between 2 and d_head" if partial else "all of them, an even number",
            do=f"correct {key} in the configuration" if dim < width else "correct the sizes in the configuration",
        )
    return dim


def _attention_factor(scaling: str, numbers: Mapping[str, Any]) -> float:
    """What yarn and longrope multiply cosines and sines with."""
    given = numbers.get("attention_factor")
    if given is not None or scaling not in ("yarn", "longrope"):
        return 1.0 if given is None else given
    factor = numbers["factor"]
    if scaling == "longrope":
        return (
            1.0
            if factor <= 1
            else math.sqrt(1 + math.log(factor) / math.log(numbers["original_max_position_embeddings"]))
        )

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scales = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return grown(scales[0]) / grown(scales[1]) if scales[0] and scales[1] else grown(1.0)


def _longest(settings: _Settings, scaling: str) -> int | None:
    """Beyond how many tokens other frequencies hold."""
    if scaling == "longrope" or settings.given.get("llama_4_scaling_beta") is not None:
        return int(settings.number("original_max_position_embeddings"))
    if scaling == "dynamic":
        return int(checked_number("max_position_embeddings", settings.reading.key("max_position_embeddings")))
    return None
