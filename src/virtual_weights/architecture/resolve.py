"""From a configuration and a list of tensors to who plays which role, refusing what is not accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, final

from virtual_weights.architecture import gguf
from virtual_weights.architecture.config import Reading, admits, references, same
from virtual_weights.architecture.describe import axes_of, rows_of, spec_of
from virtual_weights.architecture.spec import ModelSpec
from virtual_weights.architecture.table import (
    OPTIONAL,
    UNTIED,
    Entry,
    Row,
    Slot,
    built_in,
    entry_of,
    matches,
    model_types,
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


@final
@dataclass(frozen=True)
class Tables:
    """A user's own tables, which go before those built in.

    Attributes:
        content: of the file, see ``models.toml``.
        origin: the file's name.
    """

    content: Mapping[str, Any]
    origin: str


@dataclass(frozen=True)
class Placement:
    """Where a role lives: the tensor, its layout, and which part of a fused one.

    Attributes:
        tensor: full name in the checkpoint.
        layout: einops pattern from stored to canonical axes.
        slot: where it is in a fused tensor; None where not fused.
    """

    tensor: str
    layout: str
    slot: Slot | None


@final
@dataclass(frozen=True)
class Model:
    """A checkpoint's tensors with their roles.

    Attributes:
        spec: sizes and choices.
        placements: by (role, group), such as ``("q", "L3.attn")`` or ``("norm", "unembed")``.
        config: the configuration in transformers' vocabulary.
        entry: the table's entry by which it was read; of a GGUF file in that format's names.
        hf: the entry in transformers' names.
    """

    spec: ModelSpec
    placements: Mapping[tuple[str, str], Placement]
    config: Mapping[str, Any]
    entry: Entry
    hf: Entry

    @property
    def family(self) -> str:
        """The model type."""
        return self.spec.model_type

    def has(self, role: str, group: str) -> bool:
        """Whether the checkpoint holds this role of a group."""
        return (role, group) in self.placements

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every tensor of such a model in transformers' names and layouts."""
        return rows_of(self.hf, self.config, self.spec)

    @cached_property
    def _by_role(self) -> Mapping[tuple[str, str], Row]:
        return {(role, group): row for row in self.rows for group in row.groups for role in row.roles}

    def row(self, role: str, group: str) -> Row | None:
        """The row of a role in a group, in transformers' names; None where such a model has none."""
        return self._by_role.get((role, group))

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of attention by the keys of the configuration in which they may be null."""
        part = next(iter(self.spec.attentions), None)
        sizes = {} if part is None else {"kv_heads": part.kv_heads, "d_head": part.width}
        keys = {role: references(self.hf.values[role]) for role in sizes}
        return {keys[role][0]: size for role, size in sizes.items() if keys[role]}

    def axes(self, group: str) -> Mapping[str, int | None]:
        """Length of every axis letter in the tensors of a group."""
        return axes_of(self.spec, group)


def resolve(  # noqa: PLR0913 - what is opened and how, by keyword only
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dialect: str,
    *,
    partial: bool = False,
    dtypes: Mapping[str, str] | None = None,
    equal: Callable[[str, str], bool] | None = None,
    tables: Tables | None = None,
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
        tables: a user's own.

    Returns:
        The model: its description and the place of every role.

    Raises:
        ArchitectureError: the type is unknown, a key or tensor is not accounted for, a tensor is missing, or a shape
            contradicts the configuration; names are listed, and of a type without a table what it lacks.
    """
    hf = _entry(config, dialect, tables)
    if dialect == "gguf":
        entry, settings = gguf.translated(config, shapes, hf)
        hf = hf.settled(settings)
    else:
        settings = _canonical(config, hf)
        entry = hf = hf.settled(settings)
        _refuse_keys(config, hf)
    spec = spec_of(entry, settings, max(len(shapes), 1))
    rows = rows_of(entry, settings, spec)
    _refuse_untold(spec, rows)
    expected = {_stored_name(row, shapes): row for row in rows}
    if dialect == "gguf":
        expected["rope_freqs.weight"] = Row(("rotary",), ("factors",), "rope_freqs.weight", "f -> f", when=OPTIONAL)
    _refuse_unknown(expected, shapes, entry)
    spec = _tied(expected, shapes, spec, equal)
    _refuse_missing(expected, shapes, spec, partial=partial)
    placements: dict[tuple[str, str], Placement] = {}
    for name, row in expected.items():
        if name not in shapes or (row.when == UNTIED and spec.tied):
            continue
        _check_stored(name, shapes[name], row, axes_of(spec, row.groups[0]), (dtypes or {}).get(name, ""))
        for group in row.groups:
            placements |= {(role, group): Placement(name, row.layout, row.slot(role)) for role in row.roles}
    if spec.tied and ("embed", "embed") in placements:
        placements.setdefault(("unembed", "unembed"), placements["embed", "embed"])
    return Model(spec, placements, settings, entry, hf)


def _refuse_untold(spec: ModelSpec, rows: Collection[Row]) -> None:
    """Refuse what the entries can say and the maps cannot: each is named by its trait."""
    biased = {group.removesuffix(".bias") for row in rows if row.roles == ("bias",) for group in row.groups}
    untold = [branch.id for branch in spec.branches if branch.after is not None and branch.id in biased]
    if untold:
        raise ArchitectureError(
            f"{', '.join(untold[:6])}: an output bias inside a norm after the part",
            expected="an output without a bias where a norm stands behind it",
            do="open a model without it: such a bias is scaled anew at every token, which no vector says",
        )


def without_keys(config: Mapping[str, Any], dialect: str, keys: Collection[str]) -> Mapping[str, Any]:
    """A configuration without keys that are known to change nothing.

    Raises:
        ArchitectureError: a key is not there, or the tables read it, so that leaving it out would change the model.
    """
    for key in keys:
        name = str(config.get("general.architecture"))
        known = gguf.is_known(key, name) if dialect == "gguf" else _is_known(key, _entry(config, dialect, None))
        if key not in config or known:
            raise ArchitectureError(
                f"the configuration key {key!r} cannot be ignored: "
                + ("it is known" if key in config else "not there"),
                expected="a key that is refused because nobody here knows what it does",
                do="leave it out of the keys to ignore; to change a value, pass config=",
            )
    return {key: value for key, value in config.items() if key not in keys}


def _entry(config: Mapping[str, Any], dialect: str, tables: Tables | None) -> Entry:
    """The entry of a configuration's model type, in transformers' names."""
    key = "general.architecture" if dialect == "gguf" else "model_type"
    name = config.get(key)
    known = gguf.architectures() if dialect == "gguf" else model_types()
    entry = None
    if isinstance(name, str):
        own = tables or Tables({}, "")
        kind = built_in()["gguf"].get(name, {}).get("model_type") if dialect == "gguf" else name
        entry = entry_of(kind, own.content, own.origin) if isinstance(kind, str) else None
    if entry is not None:
        return entry
    for mark in CONVERTED_KEYS:
        if config.get(mark) is not None:
            raise _to_be_converted(f"the configuration has {key} = {name!r:.100} and {mark}", *CONVERTED_KEYS[mark])
    missing = built_in()["outside"].get(name) if isinstance(name, str) else None
    nearest = get_close_matches(str(name), known, 1, 0.3)
    raise ArchitectureError(
        f"no table for {key} = {name!r:.100} in the {dialect} dialect" + (f": {missing}" if missing else ""),
        expected=f"one of {', '.join(known)}",
        do="open a model of another type"
        if missing
        else "add a table for it (--table)"
        + (f", for example one like {nearest[0]!r}" if nearest else "")
        + ": see docs/add-an-architecture.md",
    )


def _canonical(config: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """The configuration with every key under one spelling."""
    read = dict(config)
    for alias, key in entry.values["aliases"].items():
        value = config.get(alias)
        if value is None:
            continue
        if config.get(key) is not None and not same(config[key], value):
            raise ArchitectureError(
                f"the configuration has {alias} = {value!r:.100} and {key} = {config[key]!r:.100}",
                expected=f"one value: {alias} is another name of {key}",
                do="delete the wrong one from config.json, or pass config= without it",
            )
        read[key] = read.pop(alias)
    return read


def _is_known(key: str, entry: Entry) -> bool:
    begins = tuple(known[:-1] for known in entry.known if known.endswith("*"))
    return key in entry.known or bool(begins and key.startswith(begins))


def _refuse_keys(config: Mapping[str, Any], entry: Entry) -> None:
    for key in CONVERTED_KEYS:
        if config.get(key) is not None:
            raise _to_be_converted(f"the configuration has {key} = {config[key]!r:.200}", *CONVERTED_KEYS[key])
    unknown = [key for key, value in config.items() if value is not None and not _is_known(key, entry)]
    if unknown:
        raise ArchitectureError(
            f"configuration keys that no row of the {entry.model_type} table accounts for: {_listed(unknown)}",
            expected="only keys whose effect on the function is known",
            do="if they change nothing, pass config= without them, or name each with --ignore-config",
        )
    null = [key for key in entry.values["needs"] if Reading(config, entry.values).key(key) is None]
    each = entry.values["each"].items()
    strange = [key for key, allowed in each if not _all_among(Reading(config, entry.values).key(key), allowed)]
    if null or strange:
        raise ArchitectureError(
            f"the configuration has {', '.join(f'{key} = {config.get(key)!r:.100}' for key in (*null, *strange))}",
            expected=", ".join([f"{key} given" for key in null] + [f"{key} of {allowed}" for key, allowed in each]),
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


def _to_be_converted(what: str, known_as: str, do: str) -> ArchitectureError:
    return ArchitectureError(f"{what}: {known_as}", expected="plain weights of a whole model", do=do)


def _stored_name(row: Row, shapes: Mapping[str, Any]) -> str:
    """The name under which a row's tensor is stored, its own where none is."""
    return next((name for name in (row.name, *row.others) if name in shapes), row.name)


def _refuse_unknown(expected: Mapping[str, Row], shapes: Mapping[str, tuple[int, ...]], entry: Entry) -> None:
    ignored = re.compile("|".join(entry.values["ignored"]) or r"(?!)")
    unknown = [name for name in shapes if name not in expected and not ignored.fullmatch(name)]
    for pattern, (known_as, do) in CONVERTED_TENSORS.items():
        recognised = [name for name in unknown if re.fullmatch(pattern, name)]
        if recognised:
            raise _to_be_converted(f"the checkpoint holds {_listed(recognised)}", known_as, do)
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


def _tied(
    expected: dict[str, Row],
    shapes: Mapping[str, tuple[int, ...]],
    spec: ModelSpec,
    equal: Callable[[str, str], bool] | None,
) -> ModelSpec:
    """What is tied in truth, as in transformers: the one stored of two serves both, and two unequal ones are two.

    Where only the unembedding of a tied model is stored, its name comes to play the embedding in ``expected``.
    """
    embed = next((name for name, row in expected.items() if row.roles == ("embed",)), "")
    head = next((name for name, row in expected.items() if row.when == UNTIED), "")
    if not spec.tied or head not in shapes:
        return spec
    if embed not in shapes:
        expected[head] = expected.pop(embed)
        return spec
    return spec if equal is None or equal(embed, head) else replace(spec, tied=False)


def _check_stored(name: str, shape: tuple[int, ...], row: Row, axes: Mapping[str, int | None], dtype: str) -> None:
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


def _refuse_missing(expected: Mapping[str, Row], shapes: Mapping[str, Any], spec: ModelSpec, *, partial: bool) -> None:
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
