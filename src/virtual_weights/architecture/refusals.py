"""What is not opened, and what is said then: quantised and wrapped checkpoints, keys and tensors that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from virtual_weights.architecture.config import Reading, admits
from virtual_weights.architecture.spec import ModelSpec
from virtual_weights.architecture.table import OPTIONAL, UNTIED, Entry, Row, matches, stored_shape
from virtual_weights.errors import ArchitectureError

_SHOWN = 6

_DEQUANTISE = (
    "take the checkpoint that it was quantised from, or a GGUF file of it, which is read as it is; or load it with "
    "transformers where it runs, call model.dequantize() and save_pretrained()"
)
_MERGE = "merge the adapter into its base first: peft's merge_and_unload(), then save_pretrained()"

CONVERTED_KEYS: Mapping[str, tuple[str, str]] = {
    "quantization_config": ("quantised weights", _DEQUANTISE),
    "quantization": ("quantised weights", _DEQUANTISE),
    "compression_config": ("compressed weights", _DEQUANTISE),
    "peft_type": ("an adapter, not a model", _MERGE),
    "text_config": (
        "a text model inside a model of several kinds of input",
        "pass the content of text_config as config=, with the text model's tensors alone",
    ),
}
"""Keys of ``config.json`` by which a checkpoint that must be converted first is recognised: what it is, what to do."""

CONVERTED_TENSORS: Mapping[str, tuple[str, str]] = {
    r".*(\.|_)lora_.*|.*\.base_layer\..*": ("an adapter that is not merged into its base", _MERGE),
    r".*\.(qweight|qzeros|g_idx|scales)": ("weights quantised by GPTQ or AWQ", _DEQUANTISE),
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|quant_state\..*)": (
        "weights quantised by bitsandbytes",
        _DEQUANTISE,
    ),
    r".*(scale_inv|_scale|_scale_2|_zero_point|_packed|_global_scale)": (
        "weights stored with scales (float8, int8 or packed)",
        _DEQUANTISE,
    ),
}
"""Names of tensors by which the same is recognised."""


def is_known(key: str, entry: Entry) -> bool:
    """Whether an entry reads a key of the configuration, or knows that it changes nothing."""
    begins = tuple(known[:-1] for known in entry.known if known.endswith("*"))
    return key in entry.known or bool(begins and key.startswith(begins))


def refuse_keys(config: Mapping[str, Any], entry: Entry) -> None:
    """Refuse a configuration with a key that is not known, or with a value that is not carried."""
    for key in CONVERTED_KEYS:
        if config.get(key) is not None:
            raise to_be_converted(f"the configuration has {key} = {config[key]!r:.200}", *CONVERTED_KEYS[key])
    unknown = [key for key, value in config.items() if value is not None and not is_known(key, entry)]
    if unknown:
        raise ArchitectureError(
            f"configuration keys that no row of the {entry.model_type} table accounts for: {_listed(unknown)}",
            expected="only keys whose effect on the function is known",
            do="if they change nothing, pass config= without them, or name each with --ignore-config",
        )
    null = [key for key in entry.values["needs"] if Reading(config, entry.values).key(key) is None]
    lists = entry.values["each"].items()
    strange = [key for key, allowed in lists if not _all_among(Reading(config, entry.values).key(key), allowed)]
    if null or strange:
        raise ArchitectureError(
            f"the configuration has {', '.join(f'{key} = {config.get(key)!r:.100}' for key in (*null, *strange))}",
            expected=", ".join([f"{key} given" for key in null] + [f"{key} of {allowed}" for key, allowed in lists]),
            do="open a model with that; others are not carried",
        )
    for key, allowed in entry.values["required"].items():
        value = Reading(config, entry.values).key(key)
        if not admits(allowed, value):
            raise ArchitectureError(
                f"the configuration has {key} = {value!r:.100}, which changes the function",
                expected=f"one of {allowed!r}",
                do="open a model without it; this package would compute wrong maps",
            )


def _all_among(values: Any, allowed: Collection[Any]) -> bool:
    return isinstance(values, list) and all(value in allowed for value in values)


def to_be_converted(what: str, known_as: str, do: str) -> ArchitectureError:
    """The error of a checkpoint that another tool must convert first."""
    return ArchitectureError(f"{what}: {known_as}", expected="plain weights of a whole model", do=do)


def refuse_untold(spec: ModelSpec, rows: Collection[Row]) -> None:
    """Refuse what the entries can say and the maps cannot: each is named by its trait."""
    biased = {group.removesuffix(".bias") for row in rows if row.roles == ("bias",) for group in row.groups}
    shifted = [row.name for row in rows if {"after_bias", "inner_bias"} & {*row.roles}]
    both = [branch.id for branch in spec.branches if branch.after is not None and branch.inner is not None]
    if shifted or both:
        raise ArchitectureError(
            f"{', '.join((shifted or both)[:6])}: a norm inside or after a part that adds a shift, or one of each",
            expected="norms inside or after parts without a shift, one for a part",
            do="open a model without it; this package would compute wrong maps",
        )
    untold = [branch.id for branch in spec.branches if branch.after is not None and branch.id in biased]
    if untold:
        raise ArchitectureError(
            f"{', '.join(untold[:6])}: an output bias inside a norm after the part",
            expected="an output without a bias where a norm stands behind it",
            do="open a model without it: such a bias is scaled anew at every token, which no vector says",
        )


def refuse_unknown(
    expected: Mapping[str, Row],
    shapes: Mapping[str, tuple[int, ...]],
    entry: Entry,
    zero: Callable[[str], bool] | None = None,
) -> None:
    """Refuse tensors that no row accounts for, and those that would be accounted for if they were zero."""
    ignored = re.compile("|".join(entry.values["ignored"]) or r"(?!)")
    vanishing = re.compile("|".join(entry.values["zero"]) or r"(?!)")
    unknown = [name for name in shapes if name not in expected and not ignored.fullmatch(name)]
    filled = [name for name in unknown if vanishing.fullmatch(name) and not (zero is None or zero(name))]
    if filled:
        raise ArchitectureError(
            f"{len(filled)} tensors are not zero: {_listed(filled)}",
            expected="zeros: a type of this kind adds them where no map of this package adds anything",
            do="open a model without them",
        )
    unknown = [name for name in unknown if not vanishing.fullmatch(name)]
    for pattern, (known_as, do) in CONVERTED_TENSORS.items():
        recognised = [name for name in unknown if re.fullmatch(pattern, name)]
        if recognised:
            raise to_be_converted(f"the checkpoint holds {_listed(recognised)}", known_as, do)
    embed = next(row for row in expected.values() if row.roles == ("embed",))
    wrapper = _wrapper(unknown, embed)
    if wrapper:
        raise ArchitectureError(
            f"{sum(name.startswith(wrapper) for name in shapes)} of {len(shapes)} tensors carry the prefix {wrapper!r}:"
            f" {_listed(unknown)}",
            expected=f"names such as {embed.name!r}",
            do="open the tensors of that part alone, as a state dict without the prefix, with config=",
        )
    if unknown:
        raise ArchitectureError(
            f"{len(unknown)} tensors that no row of the {entry.model_type} table accounts for: {_listed(unknown)}",
            expected="only tensors whose role is known (a bias or norm left out would falsify every sum)",
            do="open a checkpoint of this type, or add the names to its table: see docs/add-an-architecture.md",
        )


def _wrapper(unknown: list[str], embed: Row) -> str:
    """What stands before the embedding's full name, where an unknown tensor is one behind a prefix."""
    for tail in (embed.name, *embed.others):
        name = next((name for name in unknown if name.endswith("." + tail)), None)
        if name is not None:
            return name.removesuffix(tail)
    return ""


def check_stored(name: str, shape: tuple[int, ...], row: Row, axes: Mapping[str, int | None], dtype: str) -> None:
    """Refuse a tensor of another shape than its row says, or of whole numbers."""
    wanted = stored_shape(row.layout, axes)
    if not matches(shape, wanted):
        raise ArchitectureError(
            f"the configuration contradicts the tensor {name!r}, stored as {shape}",
            expected=f"shape {wanted} ({row.layout.split('->')[0].strip()}) from the sizes in the configuration",
            do="correct the configuration, or open the checkpoint that belongs to it",
        )
    if re.fullmatch(r"[IU]\d+|BOOL", dtype):
        raise ArchitectureError(
            f"{name!r} is stored as {dtype}, which holds whole numbers",
            expected="weights, as floating-point numbers",
            do="open the checkpoint before it was quantised, or convert it to floating point",
        )


def refuse_missing(expected: Mapping[str, Row], shapes: Mapping[str, Any], spec: ModelSpec, *, partial: bool) -> None:
    """Refuse a checkpoint that lacks tensors, where it is to be complete."""
    absent = [
        name
        for name, row in expected.items()
        if name not in shapes and row.when != OPTIONAL and not (row.when == UNTIED and spec.tied)
    ]
    if absent and not partial:
        raise ArchitectureError(
            f"{len(absent)} tensors are missing: {_listed(absent)}",
            expected=f"every tensor of a {spec.n_layers}-layer {spec.model_type}",
            do="complete the checkpoint, or open it with partial=True (--partial) to leave these parts out",
        )


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in sorted(names)[:_SHOWN]) + more
