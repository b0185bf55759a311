"""From a configuration and a list of tensors to who plays which role, refusing what is not accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from virtual_weights.architecture.config import same
from virtual_weights.architecture.families import FAMILIES
from virtual_weights.architecture.table import (
    ALWAYS,
    OPTIONAL,
    UNTIED,
    Dialect,
    Family,
    ModelSpec,
    Row,
    matches,
    stored_shape,
)
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


@dataclass(frozen=True)
class Placement:
    """Where a role lives: the tensor, its layout, and which part of a fused one.

    Attributes:
        tensor: full name in the checkpoint.
        layout: einops pattern from stored to canonical axes.
        part: index along the leading canonical axis of a fused tensor; None where not fused.
    """

    tensor: str
    layout: str
    part: int | None


@dataclass(frozen=True)
class Model:
    """A checkpoint's tensors with their roles.

    Attributes:
        family: name of the family's table.
        spec: sizes and choices.
        placements: by (role, group), such as ``("q", "L3.attn")`` or ``("norm", "unembed")``.
    """

    family: str
    spec: ModelSpec
    placements: Mapping[tuple[str, str], Placement]

    def has(self, role: str, group: str) -> bool:
        """Whether the checkpoint holds this role of a group."""
        return (role, group) in self.placements

    @property
    def hf(self) -> Dialect:
        """Transformers' own names and layouts of this family."""
        return family_named(self.family).dialects["hf"]


def resolve(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dialect: str,
    *,
    partial: bool = False,
    dtypes: Mapping[str, str] | None = None,
    equal: Callable[[str, str], bool] | None = None,
) -> Model:
    """Account for every tensor and every configuration key of a checkpoint.

    Args:
        config: the configuration in the dialect's own vocabulary.
        shapes: stored shape of every tensor.
        dialect: the source's dialect, ``"hf"`` or ``"gguf"``.
        partial: accept a checkpoint in which tensors are missing (never one with unknown tensors).
        dtypes: storage type of every tensor; None does not look at them.
        equal: whether two tensors hold the same values, asked only where the configuration ties an unembedding to the
            embedding and both are stored. As in transformers, one with values of its own is not tied. None trusts
            the configuration.

    Returns:
        The model: family, sizes and the place of every role.

    Raises:
        ArchitectureError: the family is unknown, a key or tensor is not accounted for, a tensor is
            missing, or a shape contradicts the configuration; names are listed.
    """
    family = _family(config, dialect)
    table = family.dialects[dialect]
    _refuse_keys(config, table, family)
    spec = table.read_config(_canonical(config, table))
    prefix = _prefix(table, shapes)
    _bound_layers(spec, shapes)
    expected = {name: (row, group) for row in table.rows for name, group in _names(row, prefix, spec, shapes)}
    _refuse_unknown(expected, shapes, table, family)
    spec = _tied(expected, shapes, spec, equal)
    _refuse_missing(expected, shapes, spec, partial=partial)
    placements: dict[tuple[str, str], Placement] = {}
    for name, (row, group) in expected.items():
        if name not in shapes or (row.when == UNTIED and spec.tied):
            continue
        _check_stored(name, shapes[name], row, spec, (dtypes or {}).get(name, ""))
        for part, role in enumerate(row.roles):
            placements[role, group] = Placement(name, row.layout, part if len(row.roles) > 1 else None)
    always_tied = all(row.when != UNTIED for row in table.rows)
    if (spec.tied or always_tied) and ("embed", "embed") in placements:
        placements.setdefault(("unembed", "unembed"), placements["embed", "embed"])
    return Model(family.name, spec, placements)


def without_keys(config: Mapping[str, Any], dialect: str, keys: Collection[str]) -> Mapping[str, Any]:
    """A configuration without keys that are known to change nothing.

    Raises:
        ArchitectureError: a key is not there, or the tables read it, so that leaving it out would change the model.
    """
    table = _family(config, dialect).dialects[dialect] if keys else None
    for key in keys:
        if table is not None and (key not in config or _is_known(key, table)):
            raise ArchitectureError(
                f"the configuration key {key!r} cannot be ignored: "
                + ("it is known" if key in config else "not there"),
                expected="a key that is refused because nobody here knows what it does",
                do="leave it out of the keys to ignore; to change a value, pass config=",
            )
    return {key: value for key, value in config.items() if key not in keys}


def family_named(name: str) -> Family:
    """The table of a family."""
    return next(family for family in FAMILIES if family.name == name)


def _family(config: Mapping[str, Any], dialect: str) -> Family:
    key = "general.architecture" if dialect == "gguf" else "model_type"
    found = config.get(key)
    for family in FAMILIES:
        if found in family.model_types and dialect in family.dialects:
            return family
    known = sorted({t for f in FAMILIES if dialect in f.dialects for t in f.model_types})
    for mark in CONVERTED_KEYS:
        if config.get(mark) is not None:
            raise _to_be_converted(f"the configuration has {key} = {found!r:.100} and {mark}", *CONVERTED_KEYS[mark])
    raise ArchitectureError(
        f"no table for {key} = {found!r:.100} in the {dialect} dialect",
        expected=f"one of {', '.join(known)}",
        do="open a supported model, or add its table: see docs/add-an-architecture.md",
    )


def _canonical(config: Mapping[str, Any], table: Dialect) -> dict[str, Any]:
    """The configuration with every key under one spelling, and what transformers takes for keys left out."""
    read = {**table.defaults, **config}
    for alias, key in table.aliases.items():
        value = config.get(alias)
        if value is None:
            continue
        if config.get(key) is not None and not same(config[key], value):
            raise ArchitectureError(
                f"the configuration has {alias} = {value!r:.100} and {key} = {config[key]!r:.100}",
                expected=f"one value: {alias} is another name of {key}",
                do="delete the wrong one from config.json, or pass config= without it",
            )
        read[key] = value
    return read


def _is_known(key: str, table: Dialect) -> bool:
    begins = tuple(entry[:-1] for entry in table.neutral if entry.endswith("*"))
    named = key in table.neutral or key in table.required_values or key in table.aliases
    return named or not key.startswith(table.namespace) or bool(begins and key.startswith(begins))


def _refuse_keys(config: Mapping[str, Any], table: Dialect, family: Family) -> None:
    for key in CONVERTED_KEYS:
        if config.get(key) is not None:
            raise _to_be_converted(f"the configuration has {key} = {config[key]!r:.200}", *CONVERTED_KEYS[key])
    unknown = [key for key, value in config.items() if value is not None and not _is_known(key, table)]
    if unknown:
        raise ArchitectureError(
            f"configuration keys that no row of the {family.name} table accounts for: {_listed(unknown)}",
            expected="only keys whose effect on the function is known",
            do="if they change nothing, pass config= without them, or name each with --ignore-config",
        )
    for key, allowed in table.required_values.items():
        if not any(same(config.get(key), value) for value in allowed):
            raise ArchitectureError(
                f"the configuration has {key} = {config[key]!r:.100}, which changes the function",
                expected=f"one of {allowed!r}",
                do="open a model without it; this package would compute wrong maps",
            )


def _to_be_converted(what: str, known_as: str, do: str) -> ArchitectureError:
    return ArchitectureError(f"{what}: {known_as}", expected="plain weights of a whole model", do=do)


def _prefix(table: Dialect, shapes: Mapping[str, tuple[int, ...]]) -> str:
    def found(prefix: str) -> int:
        return sum(
            name in shapes
            for row in table.rows
            if not row.name.startswith("/")
            for name in [prefix + row.name.format(l=0)]
        )

    return max(table.prefixes, key=found)


def _bound_layers(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if spec.n_layers > max(len(shapes), 1):
        raise ArchitectureError(
            f"the configuration names {spec.n_layers} layers, the checkpoint holds {len(shapes)} tensors",
            expected="at least one tensor in every layer",
            do="correct the number of layers in the configuration",
        )


def _names(row: Row, prefix: str, spec: ModelSpec, shapes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of a row's tensors; a leading slash means no prefix, a bar separates spellings."""
    spellings = [s[1:] if s.startswith("/") else prefix + s for s in row.name.split("|")]
    if row.when not in (ALWAYS, OPTIONAL, UNTIED) and row.when not in spec.flags:
        return []
    if row.per_layer:
        return [(spellings[0].format(l=layer), row.group.format(l=layer)) for layer in range(spec.n_layers)]
    return [(next((s for s in spellings if s in shapes), spellings[-1]), row.group)]


def _refuse_unknown(
    expected: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], table: Dialect, family: Family
) -> None:
    ignored = re.compile("|".join(table.ignored) or r"(?!)")
    unknown = [name for name in shapes if name not in expected and not ignored.fullmatch(name)]
    for pattern, (known_as, do) in CONVERTED_TENSORS.items():
        recognised = [name for name in unknown if re.fullmatch(pattern, name)]
        if recognised:
            raise _to_be_converted(f"the checkpoint holds {_listed(recognised)}", known_as, do)
    wrapper = _wrapper(unknown, table)
    if wrapper:
        raise ArchitectureError(
            f"{sum(name.startswith(wrapper) for name in shapes)} of {len(shapes)} tensors carry the prefix {wrapper!r}:"
            f" {_listed(unknown)}",
            expected=f"names such as {table.prefixes[0] + table.rows[0].name!r}",
            do="open the tensors of that part alone, as a state dict without the prefix, with config=",
        )
    if unknown:
        raise ArchitectureError(
            f"{len(unknown)} tensors that no row of the {family.name} table accounts for: {_listed(unknown)}",
            expected="only tensors whose role is known (a bias or norm left out would falsify every sum)",
            do="open a checkpoint of this family, or add the rows: see docs/add-an-architecture.md",
        )


def _wrapper(unknown: list[str], table: Dialect) -> str:
    """What stands before the embedding's full name, where an unknown tensor is one behind a prefix."""
    for tail in (prefix + row.name for row in table.rows if row.roles == ("embed",) for prefix in table.prefixes):
        found = next((name for name in unknown if name.endswith("." + tail)), None)
        if found is not None:
            return found.removesuffix(tail)
    return ""


def _tied(
    expected: dict[str, tuple[Row, str]],
    shapes: Mapping[str, tuple[int, ...]],
    spec: ModelSpec,
    equal: Callable[[str, str], bool] | None,
) -> ModelSpec:
    """What is tied in truth, as in transformers: the one stored of two serves both, and two unequal ones are two.

    Where only the unembedding of a tied model is stored, its name comes to play the embedding in ``expected``.
    """
    embed = next((name for name, (row, _) in expected.items() if row.roles == ("embed",)), "")
    head = next((name for name, (row, _) in expected.items() if row.when == UNTIED), "")
    if not spec.tied or head not in shapes:
        return spec
    if embed not in shapes:
        expected[head] = expected.pop(embed)
        return spec
    return spec if equal is None or equal(embed, head) else replace(spec, tied=False)


def _check_stored(name: str, shape: tuple[int, ...], row: Row, spec: ModelSpec, dtype: str) -> None:
    wanted = stored_shape(row.layout, spec.axes)
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


def _refuse_missing(
    expected: Mapping[str, tuple[Row, str]], shapes: Mapping[str, Any], spec: ModelSpec, *, partial: bool
) -> None:
    absent = [
        name
        for name, (row, _) in expected.items()
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
