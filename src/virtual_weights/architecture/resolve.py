"""From a configuration and a list of tensors to who plays which role, refusing what is not accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        placements: by (role, layer); layer is None for roles outside the blocks.
    """

    family: str
    spec: ModelSpec
    placements: Mapping[tuple[str, int | None], Placement]

    def has(self, role: str, layer: int | None = None) -> bool:
        """Whether the checkpoint holds this role."""
        return (role, layer) in self.placements


def resolve(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dialect: str, *, partial: bool = False
) -> Model:
    """Account for every tensor and every configuration key of a checkpoint.

    Args:
        config: the configuration in the dialect's own vocabulary.
        shapes: stored shape of every tensor.
        dialect: the source's dialect, ``"hf"`` or ``"gguf"``.
        partial: accept a checkpoint in which tensors are missing (never one with unknown tensors).

    Returns:
        The model: family, sizes and the place of every role.

    Raises:
        ArchitectureError: the family is unknown, a key or tensor is not accounted for, a tensor is
            missing, or a shape contradicts the configuration; names are listed.
    """
    family = _family(config, dialect)
    table = family.dialects[dialect]
    _refuse_keys(config, table, family)
    spec = table.read_config(config)
    prefix = _prefix(table, shapes)
    _bound_layers(spec, shapes)
    expected = {name: (row, layer) for row in table.rows for name, layer in _names(row, prefix, spec, shapes)}
    _refuse_unknown(expected, shapes, table, family)
    _refuse_missing(expected, shapes, spec, partial=partial)
    axes = dict(spec.axes)
    placements: dict[tuple[str, int | None], Placement] = {}
    for name, (row, layer) in expected.items():
        if name not in shapes or (row.when == UNTIED and spec.tied):
            continue
        wanted = stored_shape(row.layout, axes)
        if not matches(shapes[name], wanted):
            raise ArchitectureError(
                f"the configuration contradicts the tensor {name!r}, stored as {shapes[name]}",
                expected=f"shape {wanted} ({row.layout.split('->')[0].strip()}) from the sizes in the configuration",
                do="correct the configuration, or open the checkpoint that belongs to it",
            )
        for part, role in enumerate(row.roles):
            placements[role, layer] = Placement(name, row.layout, part if len(row.roles) > 1 else None)
    always_tied = all(row.when != UNTIED for row in table.rows)
    if (spec.tied or always_tied) and ("embed", None) in placements:
        placements.setdefault(("unembed", None), placements["embed", None])
    return Model(family.name, spec, placements)


def _family(config: Mapping[str, Any], dialect: str) -> Family:
    key = "general.architecture" if dialect == "gguf" else "model_type"
    found = config.get(key)
    for family in FAMILIES:
        if found in family.model_types and dialect in family.dialects:
            return family
    known = sorted({t for f in FAMILIES if dialect in f.dialects for t in f.model_types})
    raise ArchitectureError(
        f"no table for {key} = {found!r} in the {dialect} dialect",
        expected=f"one of {', '.join(known)}",
        do="open a supported model, or add its table: see docs/add-an-architecture.md",
    )


def _refuse_keys(config: Mapping[str, Any], table: Dialect, family: Family) -> None:
    begins = tuple(key[:-1] for key in table.neutral if key.endswith("*"))
    unknown = [
        key
        for key, value in config.items()
        if value is not None
        and key not in table.neutral
        and key not in table.required_values
        and not (begins and key.startswith(begins))
    ]
    if unknown:
        raise ArchitectureError(
            f"configuration keys that no row of the {family.name} table accounts for: {_listed(unknown)}",
            expected="only keys whose effect on the function is known",
            do="if they change nothing, pass config= without them (or delete them from the configuration)",
        )
    for key, allowed in table.required_values.items():
        if config.get(key) not in allowed:
            raise ArchitectureError(
                f"the configuration has {key} = {config[key]!r}, which changes the function",
                expected=f"one of {allowed!r}",
                do="open a model without it; this package would compute wrong maps",
            )


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


def _names(row: Row, prefix: str, spec: ModelSpec, shapes: Mapping[str, Any]) -> list[tuple[str, int | None]]:
    """Names of a row's tensors; a leading slash means no prefix, a bar separates spellings."""
    spellings = [s[1:] if s.startswith("/") else prefix + s for s in row.name.split("|")]
    if row.when not in (ALWAYS, OPTIONAL, UNTIED) and row.when not in spec.flags:
        return []
    if row.per_layer:
        return [(spellings[0].format(l=layer), layer) for layer in range(spec.n_layers)]
    return [(next((s for s in spellings if s in shapes), spellings[-1]), None)]


def _refuse_unknown(
    expected: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], table: Dialect, family: Family
) -> None:
    ignored = re.compile("|".join(table.ignored) or r"(?!)")
    unknown = [name for name in shapes if name not in expected and not ignored.fullmatch(name)]
    if unknown:
        raise ArchitectureError(
            f"{len(unknown)} tensors that no row of the {family.name} table accounts for: {_listed(unknown)}",
            expected="only tensors whose role is known (a bias or norm left out would falsify every sum)",
            do="open a checkpoint of this family, or add the rows: see docs/add-an-architecture.md",
        )


def _refuse_missing(
    expected: Mapping[str, tuple[Row, int | None]], shapes: Mapping[str, Any], spec: ModelSpec, *, partial: bool
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
    return ", ".join(sorted(names)[:_SHOWN]) + more
