"""The tables: what each model type's entry says, and rows that say which tensor plays which role in which layout.

Axes in layouts are single letters, the same everywhere:

====  =====================================  ====  ==============================
d     d_model, the width of the stream       n     d_mlp, neurons of one MLP
h     query heads                            t     tokens of the vocabulary; y of logits
g     key/value heads                        p     rows of learned positions
k     d_head, width inside a head            s     h + 2g; u is h/g + 2, f rotary planes
====  =====================================  ====  ==============================

A layout is an einops pattern from the stored axes to ours, e.g. ``"(h k) d -> h k d"``. A row that serves several
roles splits a fused tensor: its right side begins with the axis along which ``slots`` says who is where.
Canonical shapes are (heads, k, d) for readers q, k, v; (heads, d, k) for o; (n, d) for gate and up;
(d, n) for down; (t, d) for embed and unembed; (p, d) for pos; (d,) for gains.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.resources import files
from math import prod
from typing import Any, Literal, final

from virtual_weights.architecture.config import NEUTRAL_HF, Reading, admits, checked_flag, references
from virtual_weights.errors import ArchitectureError

ALWAYS = "always"
"""A row whose tensor every model has that has the row."""
UNTIED = "untied"
"""A row whose tensor exists unless input and output embedding are one."""
OPTIONAL = "optional"
"""A row whose tensor may be there or not, without any word in the configuration."""
_LAYER = re.compile(r"^L(\d+)")


def layer_of(group: str) -> int | None:
    """The layer that a group's id names: 3 of ``"L3.attn"``, None of ``"embed"``."""
    match = _LAYER.match(group)
    return int(match[1]) if match else None


@final
@dataclass(frozen=True)
class Slot:
    """Where one role lies along the leading axis of a fused tensor.

    Attributes:
        start, stop: its range there.
        form: ``"one"`` of it, which leaves no axis; ``"range"``, an axis of its own; or ``"joined"``, a range that
            counts within every entry of the next axis, as the query heads of each key/value head do.
    """

    start: int
    stop: int
    form: Literal["one", "range", "joined"] = "one"


@final
@dataclass(frozen=True)
class Row:
    """One tensor of a checkpoint.

    Attributes:
        groups: whose it is: ``"L3.attn"``, ``"L3.mlp"``, ``"L3.attn.bias"``, ``"embed"``, ``"unembed"`` (the last norm
            too); several where branches share a norm.
        roles: the role it plays there; several for a fused tensor.
        name: its name as transformers or the format's converter writes it.
        others: other spellings of it.
        layout: einops pattern from stored axes to canonical axes.
        slots: where each role is in a fused tensor; () where it is not fused.
        when: ``ALWAYS``, ``UNTIED`` or ``OPTIONAL``.
    """

    groups: tuple[str, ...]
    roles: tuple[str, ...]
    name: str
    layout: str
    others: tuple[str, ...] = ()
    slots: tuple[Slot, ...] = ()
    when: str = ALWAYS

    def slot(self, role: str) -> Slot | None:
        """Where a role is in it."""
        return self.slots[self.roles.index(role)] if self.slots else None

    @property
    def module(self) -> str:
        """The dotted path of the module whose tensor it is: a name without its last word, where that is usual."""
        return re.sub(r"\.(weight|bias|w|b)$", "", self.name)


@final
@dataclass(frozen=True)
class Entry:
    """What the tables say of one model type, nothing left to be inherited.

    Attributes:
        model_type: as transformers names it.
        values: by name, see ``models.toml``.
        names: leaf by role; ``prefixes``, what names may begin with, transformers' own first; and ``layer``, how
            names of a layer's tensors begin.
        bases: the model type and those that it is like, nearest first.
        origin: ``"built in"``, or the file of a user's table.
    """

    model_type: str
    values: Mapping[str, Any]
    names: Mapping[str, Any]
    bases: tuple[str, ...]
    origin: str = "built in"

    @property
    def known(self) -> frozenset[str]:
        """Keys of the configuration that the entry reads, or knows to change nothing."""
        read = {key.partition(".")[0] for key in references(self.values)}
        cases = {key for case in self.values["cases"] for where in case["where"] for key in (where,)}
        lists = ("neutral", "required", "aliases", "needs", "each")
        named = [key for name in lists for key in self.values[name]]
        return NEUTRAL_HF | read | cases | {key.partition(".")[0] for key in named}

    @property
    def identity(self) -> str:
        """A hex sha256 of all that it says."""
        return sha256(json.dumps([self.values, self.names], sort_keys=True).encode()).hexdigest()

    def has(self, role: str) -> bool:
        """Whether it names a role."""
        return self.names.get(role, "-") != "-"

    def settled(self, config: Mapping[str, Any]) -> Entry:
        """The same with the cases that hold of a configuration."""
        values, names = dict(self.values), dict(self.names)
        for case in self.values["cases"]:
            where = {key: Reading(config, self.values).key(key) for key in case["where"]}
            for key, value in where.items():
                flags = all(isinstance(allowed, bool) for allowed in case["where"][key])
                if flags:
                    checked_flag(key, value)
            if all(admits(case["where"][key], value) for key, value in where.items()):
                values |= {key: value for key, value in case.items() if key not in ("where", "name", "required")}
                values["required"] = {**values["required"], **case.get("required", {})}
                names |= case.get("name", {})
        return replace(self, values=values, names=names)


@cache
def built_in() -> Mapping[str, Any]:
    """The content of ``models.toml``."""
    return tomllib.loads(files("virtual_weights.architecture").joinpath("models.toml").read_text("utf-8"))


_RESERVED = ("names", "gguf", "outside")
_MERGED = ("required", "aliases", "defaults")
_ADDED = ("neutral", "ignored")


def model_types() -> tuple[str, ...]:
    """The model types that the tables have an entry for."""
    return tuple(sorted(set(built_in()) - set(_RESERVED)))


def named_by_keys(config: Mapping[str, Any], tables: Mapping[str, Any]) -> str | None:
    """The model type of a configuration that names none, by the keys that only its type has."""
    marks = {
        name: entry.get("known_by", ()) for name, entry in {**built_in(), **tables}.items() if name not in _RESERVED
    }
    return next((name for name, keys in marks.items() if keys and all(key in config for key in keys)), None)


def entry_of(model_type: str, tables: Mapping[str, Any] | None = None, origin: str = "") -> Entry | None:
    """The entry of a model type, with what it inherits; None where there is none.

    Args:
        model_type: as the configuration names it.
        tables: a user's tables, which go before those built in; None for the latter alone.
        origin: of the user's tables.

    Raises:
        ArchitectureError: a table says what no table can say, or inherits from what is not there.
    """
    users = dict(tables or {})
    if model_type not in {*built_in(), *users} - set(_RESERVED):
        return None
    values: dict[str, Any] = {}
    chain = _chain(model_type, users)
    for _, entry in reversed(chain):
        merged = {key: {**values.get(key, {}), **entry.get(key, {})} for key in (*_MERGED, "name")}
        if "names" in entry:
            merged["name"] = entry.get("name", {})
        added = {key: [*values.get(key, []), *entry.get(key, [])] for key in _ADDED}
        values |= {**entry, **merged, **added}
    names = {**_style(str(values["names"]), users), **values["name"]}
    bases = tuple(dict.fromkeys(name for name, _ in chain))
    return Entry(model_type, values, names, bases, origin if model_type in users else "built in")


def _chain(model_type: str, users: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The entry of a type, that which it is like, and so on to the complete one."""
    chain: list[tuple[str, Mapping[str, Any]]] = []
    name: str | None = model_type
    visited: set[tuple[str, bool]] = set()
    while name is not None:
        by_user = name in users and (name, True) not in visited
        entry = (users if by_user else built_in()).get(name)
        if not isinstance(entry, Mapping) or (name, by_user) in visited or name in _RESERVED:
            raise ArchitectureError(
                f"the table of {model_type!r} is like {name!r}, of which there is no other entry",
                expected=f"one of {', '.join(model_types())}",
                do="correct the table",
            )
        visited.add((name, by_user))
        _check_entry(name, entry)
        chain.append((name, entry))
        name = entry.get("like", None if name == "llama" and not by_user else "llama")
    return chain


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse what no table can say, so that a misspelt trait is not taken for none."""
    complete = built_in()["llama"]
    unknown = sorted(set(entry) - {*complete, "like", "name"})
    kinds = {key: type(complete[key]) for key in entry if key in complete}
    wrong = [key for key, kind in kinds.items() if kind in (dict, list) and not isinstance(entry[key], kind)]
    if unknown or wrong:
        raise ArchitectureError(
            f"the table of {name!r} has {', '.join((unknown or wrong)[:6])}",
            expected=", ".join((*complete, "like", "name")),
            do="correct the table: see docs/add-an-architecture.md",
        )


def _style(name: str, users: Mapping[str, Any]) -> dict[str, Any]:
    """The names of a style, with those that it inherits."""
    style = users.get("names", {}).get(name) or built_in()["names"].get(name)
    if style is None:
        raise ArchitectureError(
            f"there are no names {name!r}", expected=", ".join(built_in()["names"]), do="correct the table"
        )
    inherited = _style(style["like"], users) if "like" in style else {}
    return {**inherited, **{key: value for key, value in style.items() if key != "like"}}


_TOKEN = re.compile(r"\(([^)]*)\)|(\S+)")


def stored_shape(layout: str, axes: Mapping[str, int | None]) -> tuple[int | None, ...]:
    """The shape that a tensor must have at rest.

    Args:
        layout: an einops pattern; its left side names the stored axes, composed ones in brackets.
        axes: length of every axis letter, None where unknown.

    Returns:
        One length per stored axis; None where a letter in it is unknown.

    Example:
        >>> stored_shape("(h k) d -> h k d", {"h": 9, "k": 64, "d": 576})
        (576, 576)
    """
    left = layout.split("->")[0]
    shape: list[int | None] = []
    for composed, single in _TOKEN.findall(left):
        lengths = [axes[name] for name in (composed.split() if composed else [single])]
        known = [length for length in lengths if length is not None]
        shape.append(prod(known) if len(known) == len(lengths) else None)
    return tuple(shape)


def letters(layout: str) -> set[str]:
    """The axes that a layout names."""
    return set(layout.replace("(", " ").replace(")", " ").replace("->", " ").split())


def matches(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is as expected, unknown lengths matching anything."""
    return len(shape) == len(expected) and all(e is None or e == f for f, e in zip(shape, expected, strict=True))
