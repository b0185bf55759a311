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
    expected = {name: (row, group) for row in table.rows for name, group in _names(row, prefix, spec, shapes)}
    _refuse_unknown(expected, shapes, table, family)
    _refuse_missing(expected, shapes, spec, partial=partial)
    axes = dict(spec.axes)
    placements: dict[tuple[str, str], Placement] = {}
    for name, (row, group) in expected.items():
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
            placements[role, group] = Placement(name, row.layout, part if len(row.roles) > 1 else None)
    always_tied = all(row.when != UNTIED for row in table.rows)
    if (spec.tied or always_tied) and ("embed", "embed") in placements:
        placements.setdefault(("unembed", "unembed"), placements["embed", "embed"])
    return Model(family.name, spec, placements)


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
    if unknown:
        raise ArchitectureError(
            f"{len(unknown)} tensors that no row of the {family.name} table accounts for: {_listed(unknown)}",
            expected="only tensors whose role is known (a bias or norm left out would falsify every sum)",
            do="open a checkpoint of this family, or add the rows: see docs/add-an-architecture.md",
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
    return ", ".join(sorted(names)[:_SHOWN]) + more


_BIASES = {
    "attention_bias": (*((role, "L{l}.attn") for role in ("q_bias", "k_bias", "v_bias")), ("bias", "L{l}.attn.bias")),
    "mlp_bias": (("gate_bias", "L{l}.mlp"), ("up_bias", "L{l}.mlp"), ("bias", "L{l}.mlp.bias")),
}
"""Keys of Llama's configuration, and the biases (role, group) that each turns on in every layer, all or none."""


def config_for(model: Model) -> dict[str, Any]:
    """A configuration in transformers' vocabulary from a model's sizes and the biases that it holds.

    Raises:
        ArchitectureError: the model type is neither of Llama's family nor GPT-2, or the model has what transformers
            cannot be told: rotary embedding of a part of each head, or some of the biases that one key turns on.
    """
    spec = model.spec
    if spec.model_type == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": spec.n_layers,
            "n_embd": spec.d_model,
            "n_head": spec.n_heads,
            "n_inner": spec.d_mlp,
            "n_positions": spec.n_positions,
            "vocab_size": spec.vocab,
            "layer_norm_epsilon": spec.norm_eps,
            "activation_function": spec.activation,
            "tie_word_embeddings": spec.tied,
        }
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    if spec.model_type not in names:
        raise ArchitectureError(
            f"no configuration of transformers is known for a model of type {spec.model_type!r}",
            expected=f"one of {', '.join([*names, 'gpt2'])}",
            do="start from the safetensors form of this model, which has its config.json",
        )
    assert spec.rotary is not None
    if spec.rotary.dim != spec.d_head:
        raise ArchitectureError(
            f"rotary embedding turns {spec.rotary.dim} of {spec.d_head} dimensions of a head",
            expected=f"all of them, as {names[spec.model_type]} of transformers does",
            do="start from the safetensors form of this model, which has its config.json",
        )
    biases = {key: _biased(model, key, roles) for key, roles in _BIASES.items()} if spec.model_type == "llama" else {}
    kind = {"rope_type": "default", **spec.rotary.scaling}
    return {
        "model_type": spec.model_type,
        "architectures": [names[spec.model_type]],
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_mlp,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.d_head,
        "vocab_size": spec.vocab,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": spec.activation,
        "rope_parameters": {**kind, "rope_theta": spec.rotary.base},
        **biases,
        "tie_word_embeddings": spec.tied,
    }


def _biased(model: Model, key: str, roles: tuple[tuple[str, str], ...]) -> bool:
    places = [(role, group.format(l=layer)) for layer in range(model.spec.n_layers) for role, group in roles]
    present = [place for place in places if model.has(*place)]
    if 0 < len(present) < len(places):
        named = ", ".join(model.placements[place].tensor for place in present[:6])
        raise ArchitectureError(
            f"{len(present)} of the {len(places)} biases that {key} turns on: {named}",
            expected=f"all or none of {', '.join(role for role, _ in roles)} in every layer",
            do="start from the safetensors form of this model, which has its config.json",
        )
    return bool(present)
