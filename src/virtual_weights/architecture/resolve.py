"""From a configuration and a list of tensors to who plays which role, refusing what is not accounted for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, final

from virtual_weights.architecture import gguf
from virtual_weights.architecture.config import references, same
from virtual_weights.architecture.describe import axes_of, rows_of, spec_of
from virtual_weights.architecture.refusals import (
    CONVERTED_KEYS,
    check_stored,
    is_known,
    refuse_keys,
    refuse_missing,
    refuse_unknown,
    refuse_untold,
    to_be_converted,
)
from virtual_weights.architecture.spec import ModelSpec
from virtual_weights.architecture.table import (
    OPTIONAL,
    UNTIED,
    Entry,
    Row,
    Slot,
    built_in,
    entry_of,
    model_types,
    named_by_keys,
)
from virtual_weights.errors import ArchitectureError


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
    def outside(self) -> list[str]:
        """What acts outside the maps: on where heads attend, on attention scores, on logits."""
        words = [word for part in self.spec.attentions for word in part.outside]
        words += ["cap on attention scores" for part in self.spec.attentions if part.cap is not None]
        words += ["cap on logits"] if self.spec.head.cap is not None else []
        window, used = self.config.get("sliding_window"), self.config.get("use_sliding_window", True)
        local = "local" in str(self.config.get("attention_types"))
        words += ["windows"] if local or (window is not None and used is not False) else []
        return list(dict.fromkeys(words))

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
    zero: Callable[[str], bool] | None = None,
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
        zero: whether a tensor is zero, asked only of those that must be; None trusts them.
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
        hf = replace(hf, values={**hf.values, "not_run": entry.values["not_run"]}).settled(settings)
    else:
        settings = _canonical(config, hf)
        entry = hf = hf.settled(settings)
        refuse_keys(config, hf)
    spec = spec_of(entry, settings, max(len(shapes), 1))
    rows = rows_of(entry, settings, spec)
    refuse_untold(spec, rows)
    expected = {_stored_name(row, shapes): row for row in rows}
    if dialect == "gguf":
        expected["rope_freqs.weight"] = Row(("rotary",), ("factors",), "rope_freqs.weight", "f -> f", when=OPTIONAL)
    factors = (gguf.SHORT, gguf.LONG) if dialect == "gguf" and gguf.SHORT in config else ()  # read as configuration
    refuse_unknown(expected, {name: shape for name, shape in shapes.items() if name not in factors}, entry, zero)
    spec = _tied(expected, shapes, spec, equal)
    refuse_missing(expected, shapes, spec, partial=partial)
    placements: dict[tuple[str, str], Placement] = {}
    for name, row in expected.items():
        if name not in shapes or (row.when == UNTIED and spec.tied):
            continue
        check_stored(name, shapes[name], row, axes_of(spec, row.groups[0]), (dtypes or {}).get(name, ""))
        for group in row.groups:
            placements |= {(role, group): Placement(name, row.layout, row.slot(role)) for role in row.roles}
    if spec.tied and ("embed", "embed") in placements:
        placements.setdefault(("unembed", "unembed"), placements["embed", "embed"])
    return Model(spec, placements, settings, entry, hf)


def without_keys(
    config: Mapping[str, Any], dialect: str, keys: Collection[str], tables: Tables | None = None
) -> Mapping[str, Any]:
    """A configuration without keys that are known to change nothing.

    Raises:
        ArchitectureError: a key is not there, or the tables read it, so that leaving it out would change the model.
    """
    for key in keys:
        name = str(config.get("general.architecture"))
        known = gguf.is_known(key, name) if dialect == "gguf" else is_known(key, _entry(config, dialect, tables))
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
    if name is None and dialect == "hf":
        name = named_by_keys(config, {} if tables is None else tables.content)
    known = gguf.architectures() if dialect == "gguf" else model_types()
    entry = None
    if isinstance(name, str):
        users = tables or Tables({}, "")
        kind = gguf.model_type_of(config) if dialect == "gguf" else name
        entry = entry_of(kind, users.content, users.origin) if isinstance(kind, str) else None
    if entry is not None:
        return entry
    for mark in CONVERTED_KEYS:
        if config.get(mark) is not None:
            raise to_be_converted(f"the configuration has {key} = {name!r:.100} and {mark}", *CONVERTED_KEYS[mark])
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


def _stored_name(row: Row, shapes: Mapping[str, Any]) -> str:
    """The name under which a row's tensor is stored, its own where none is."""
    return next((name for name in (row.name, *row.others) if name in shapes), row.name)


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
