"""From a configuration and a table's entry to what the model is, and which tensors it must have in which layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from virtual_weights.architecture.config import Reading, checked_integer, divided, wrong
from virtual_weights.architecture.rotary import rotary
from virtual_weights.architecture.spec import (
    Attention,
    Branch,
    Embedding,
    Head,
    Mlp,
    ModelSpec,
    Norm,
    PortNorm,
    Rotary,
)
from virtual_weights.architecture.table import ALWAYS, OPTIONAL, UNTIED, Entry, Row, Slot
from virtual_weights.errors import ArchitectureError

Axes = Mapping[str, int | None]


def spec_of(entry: Entry, config: Mapping[str, Any], most_layers: int = 10**9) -> ModelSpec:
    """What a model is, by its table's entry.

    Args:
        entry: of the model type.
        config: in transformers' vocabulary.
        most_layers: refuse a configuration that names more.

    Raises:
        ArchitectureError: a value is missing, of the wrong type, or contradicts another.
    """
    return _Description(entry, Reading(config, entry.values)).spec(most_layers)


@final
@dataclass(frozen=True)
class _Description:
    entry: Entry
    read: Reading

    def spec(self, most_layers: int) -> ModelSpec:
        read = self.read
        layers = read.integer("layers", least=0)
        if layers > most_layers:
            raise ArchitectureError(
                f"the configuration names {layers} layers, the checkpoint holds {most_layers} tensors",
                expected="at least one tensor in every layer",
                do="correct the number of layers in the configuration",
            )
        d_model, norm = read.integer("d_model"), self._norm()
        computed = read.value("sinusoidal")
        vocab, positions = read.value("vocab"), read.value("positions") if read.flag("pos") or computed else None
        last = norm if read.entry["final_eps"] == "" else replace(norm, eps=read.positive("final_eps"))
        outcomes = read.value("vocab_out")
        branches = [branch for layer in range(layers) for branch in self._layer(layer, d_model, norm)]
        return ModelSpec(
            self.entry.model_type,
            d_model,
            None if vocab is None else checked_integer("vocab", vocab),
            tuple(self._numbered(branches)),
            Embedding(read.number("embed_factor") or 1.0, norm if read.flag("embed_norm") else None),
            Head(
                last if self.entry.has("final") else None,
                read.number("logit_factor") or 1.0,
                read.number("logit_cap"),
            ),
            tied=read.flag("tied"),
            n_positions=None if positions is None else checked_integer("positions", positions),
            unnumbered=int(read.value("pos_offset") or 0),
            outcomes=None if outcomes is None else checked_integer("vocab_out", outcomes),
            sinusoidal={None: None, "d": d_model, "d - 2": d_model - 2}[computed],
        )

    def _layer(self, layer: int, d_model: int, norm: Norm) -> Iterator[Branch]:
        """The branches of a layer, not yet numbered."""
        read = self.read
        parts = (("attn", "o", lambda: self._attention(layer, d_model)), ("mlp", "down", lambda: self._mlp(d_model)))
        for kind, output, part in parts:
            if not self.entry.has(output):
                continue
            before, after, inner = (
                norm if self.entry.has(f"{kind}.{place}") else None for place in ("norm", "after", "inner")
            )
            factor = read.number(f"{kind}_factor") or 1.0
            yield Branch(f"L{layer}.{kind}", part(), before, after, inner, factor, 0, 0)

    def _numbered(self, branches: list[Branch]) -> Iterator[Branch]:
        """The branches with the states that they read and write: the one place that counts states."""
        parallel, state = self.read.flag("parallel"), 0
        for branch in branches:
            beside = parallel and branch.id.endswith(".mlp") and state > 0
            reads = state - 1 if beside else state
            state = reads + 1
            yield replace(branch, reads=reads, writes=state)

    def _norm(self) -> Norm:
        return Norm(self.read.value("norm"), self.read.positive("eps"), float(self.read.entry["plus"]))

    def _attention(self, layer: int, d_model: int) -> Attention:
        read = self.read
        heads = read.integer("heads")
        kv_heads = read.integer("kv_heads", heads)
        divided(heads, kv_heads, "attention heads by key/value heads")
        given = read.value("d_head")
        width = divided(d_model, heads, "width by heads") if given is None else read.integer("d_head")
        turning, factor = self._rotary(layer, width)
        scale = None if read.entry["scale"] == "$d_head^-0.5" else read.number("scale")
        norm = self._port_norm()
        if turning is not None and norm is not None and norm.after_rotary:
            turning, factor = replace(turning, factor=math.sqrt(factor) * turning.factor), 1.0  # the norm takes it away
        return Attention(
            heads,
            kv_heads,
            width,
            (width**-0.5 if scale is None else scale) * factor,
            turning,
            norm,
            read.number("attn_cap"),
            tuple(read.value("outside")),
        )

    def _rotary(self, layer: int, width: int) -> tuple[Rotary | None, float]:
        if self.read.entry["rotary"] == "none" or self._unturned(layer):
            return None, 1.0
        own = self.read.entry["local_theta"]
        return rotary(self.read, width, self._kind(layer) if own == "nested" else "", self._theta(layer))

    def _theta(self, layer: int) -> float | None:
        """The base of a layer's own, where the configuration lists them; 0 where that layer does not turn."""
        own = str(self.read.entry["local_theta"])
        if not own.startswith("$"):
            return None
        return _listed(own[1:], self.read.key(own[1:]), layer, 0)

    def _kind(self, layer: int) -> str:
        """The type of a layer that the configuration names, or that transformers takes without one."""
        kinds = self.read.key("layer_types")
        if kinds is None and self.read.entry["layer_pattern"] == "":
            return "full_attention"
        if kinds is None:
            every = checked_integer("layer_pattern", self.read.value("layer_pattern"))
            return "sliding_attention" if (layer + 1) % every else "full_attention"
        return str(_listed("layer_types", kinds, layer, ""))

    def _unturned(self, layer: int) -> bool:
        """Whether a layer has no rotary embedding where others have one."""
        trait = str(self.read.entry["no_rotary"])
        if not trait and self.read.entry["local_theta"] == "nested":
            settings = self.read.key("rope_parameters")
            kind = self._kind(layer)
            return kind not in self.read.entry["thetas"] and not (isinstance(settings, dict) and settings.get(kind))
        if not trait:
            return self._theta(layer) == 0
        if "$" not in trait:
            return self._kind(layer) == trait
        key = trait.lstrip("!$")
        flags = self.read.key(key)
        if flags is None:
            every = checked_integer("no_rope_layer_interval", self.read.key("no_rope_layer_interval"))
            return (layer + 1) % every == 0
        return bool(_listed(key, flags, layer, 1)) != trait.startswith("!")

    def _port_norm(self) -> PortNorm | None:
        read = self.read
        over = read.value("qk_norm")
        if over is None or not read.flag("qk_when"):
            return None
        eps = read.positive("qk_eps" if read.entry["qk_eps"] != "" else "eps")
        norm = Norm(read.entry["qk_kind"], eps, float(read.entry["qk_plus"]))
        return PortNorm(norm, over, bool(read.entry["qk_after_rotary"]))

    def _mlp(self, d_model: int) -> Mlp:
        act = self.read.text("act")
        act = self.read.entry["act_as"].get(act, act)
        return Mlp(self.read.integer("d_mlp", 4 * d_model), act, self.read.flag("gated"))


def _listed(key: str, values: Any, layer: int, like: Any) -> Any:
    """A layer's value in a list of the configuration; of null, None."""
    if values is None:
        return None
    if not isinstance(values, list) or len(values) <= layer:
        raise wrong(key, values, "a list with one value per layer")
    if values[layer] is not None and not isinstance(values[layer], str if isinstance(like, str) else (int, float)):
        raise wrong(f"{key}[{layer}]", values[layer], "a word" if isinstance(like, str) else "a number")
    return like if values[layer] is None and like == 0 else values[layer]


def axes_of(spec: ModelSpec, group: str) -> Axes:
    """Length of every axis letter in the tensors of a group; None where only the tensor itself tells."""
    branch = spec.branch(group.removesuffix(".bias"))
    part = branch.part if branch else next(iter(spec.attentions), None)
    axes: dict[str, int | None] = {"d": spec.d_model, "t": spec.vocab, "three": 3, "two": 2, "one": 1}
    axes["y"] = spec.outcomes or spec.vocab
    axes["p"] = None if spec.n_positions is None else spec.n_positions + spec.unnumbered
    if isinstance(part, Attention):
        h, g, k = part.heads, part.kv_heads, part.width
        axes |= {"h": h, "g": g, "k": k, "r": k // 2, "s": h + 2 * g, "u": h // g + 2, "m": 4, "x": h // 4}
        axes["f"] = part.rotary.dim // 2 if part.rotary else None
    elif isinstance(part, Mlp):
        axes["n"] = part.width
    return axes


_FUSED: Mapping[str, tuple[str, Callable[[int, int], tuple[Slot, Slot, Slot]]]] = {
    "blocks": (
        "(s k) d -> s k d",
        lambda h, g: (Slot(0, h, "range"), Slot(h, h + g, "range"), Slot(h + g, h + 2 * g, "range")),
    ),
    "heads": ("(h three k) d -> three h k d", lambda h, g: (Slot(0, 1), Slot(1, 2), Slot(2, 3))),
    "groups": (
        "(g u k) d -> u g k d",
        lambda h, g: (Slot(0, h // g, "joined"), Slot(h // g, h // g + 1), Slot(h // g + 1, h // g + 2)),
    ),
    "codegen": ("(m three x k) d -> three (m x) k d", lambda h, g: (Slot(0, 1), Slot(2, 3), Slot(1, 2))),
}
"""Layouts of fused queries, keys and values, and where each of the three is."""


def rows_of(entry: Entry, config: Mapping[str, Any], spec: ModelSpec) -> tuple[Row, ...]:
    """Every tensor that a model has, in the vocabulary of an entry's names."""
    return tuple(_Rows(entry, Reading(config, entry.values), spec).all())


@final
@dataclass(frozen=True)
class _Rows:
    entry: Entry
    read: Reading
    spec: ModelSpec

    def all(self) -> Iterator[Row]:
        read = self.read
        yield self._row(("embed",), ("embed",), "embed", "t d -> t d")
        if read.flag("pos"):
            role = "positions" if "positions" in read.value("outside") else "pos"
            yield self._row((role,), (role,), "pos", "p d -> p d")
        if read.flag("embed_norm"):
            yield from self._norm(("embed",), "embed_norm", "norm")
        for branch in self.spec.branches:
            yield from self._branch(branch)
        yield from self._norm(("unembed",), "final", "norm")
        if self.entry.has("unembed"):
            layout = self._layout("unembed", "y d -> y d")
            yield self._row(("unembed",), ("unembed",), "unembed", layout, when=UNTIED)
            if (when := self._on("head_bias")) is not None:
                yield self._row(("unembed",), ("unembed_bias",), "unembed", "y -> y", leaf="bias", when=when)

    def _branch(self, branch: Branch) -> Iterator[Row]:
        kind = branch.id.rpartition(".")[2]
        if kind == "attn":
            # a norm that several branches share is one tensor
            names = self.entry.names
            sharers = [other for other in ("attn", "mlp") if names.get(f"{other}.norm") == names.get("attn.norm")]
            layer = branch.id.partition(".")[0]
            yield from self._norm(tuple(f"{layer}.{other}" for other in sharers), "attn.norm", "norm")
        elif self.entry.names.get("mlp.norm") != self.entry.names.get("attn.norm"):
            yield from self._norm((branch.id,), "mlp.norm", "norm")
        yield from self._norm((branch.id,), f"{kind}.after", "after")
        yield from self._norm((branch.id,), f"{kind}.inner", "inner", "(h k) -> h k" if kind == "attn" else "n -> n")
        yield from self._attention(branch) if kind == "attn" else self._mlp(branch)

    def _attention(self, branch: Branch) -> Iterator[Row]:
        part, id, bias = branch.part, branch.id, self._on("qkv_bias")
        assert isinstance(part, Attention)
        fused = str(self.read.entry["fused"])
        if fused:
            layout, parts = _FUSED[fused]
            yield from self._weights(id, ("q", "k", "v"), "qkv", layout, bias, parts(part.heads, part.kv_heads))
        else:
            for role, letter in (("q", "h"), ("k", "g"), ("v", "g")):
                yield from self._weights(
                    id, (role,), role, self._permuted(role, f"({letter} k) d -> {letter} k d"), bias
                )
        if self.read.entry["o_bias"] == "last":
            o_bias = ALWAYS if id == self.spec.attention_ids[-1] else None
        else:
            o_bias = self._on("o_bias")
        yield from self._weights(id, ("o",), "o", "d (h k) -> h d k", o_bias)
        if self.entry.has("sinks"):
            yield self._row((id,), ("sinks",), "sinks", "h -> h")
        if part.port_norm is not None:
            for port, letter in (("q", "h"), ("k", "g")):
                yield from self._port_norm(id, port, letter)

    def _port_norm(self, id: str, port: str, letter: str) -> Iterator[Row]:
        gain = self.read.entry["qk_gain"]
        stored = {"k": "k", "h k": f"({letter} k)", "h,k": f"{letter} k", "h|k": f"{letter} k"}.get(gain)
        if stored is None:
            return
        if gain == "h|k":  # of every head its own, in one tensor
            heads = axes_of(self.spec, id)[letter] or 0
            roles = tuple(f"{port}_norm.{head}" for head in range(heads))
            slots = tuple(Slot(head, head + 1) for head in range(heads))
            yield self._row((id,), roles, f"{port}_norm", f"{stored} -> {stored}", slots)
            return
        layout = f"{stored} -> {stored.strip('()')}"
        if "{h}" in str(self.entry.names[f"{port}_norm"]):  # one tensor for every head
            axes = axes_of(self.spec, id)
            for head in range(axes[letter] or 0):
                yield self._row((id,), (f"{port}_norm.{head}",), f"{port}_norm", "k -> k", head=head)
            return
        yield self._row((id,), (f"{port}_norm",), f"{port}_norm", layout)
        if self.read.entry["qk_shift"]:
            yield self._row((id,), (f"{port}_norm_bias",), f"{port}_norm", layout, leaf="bias")

    def _permuted(self, role: str, layout: str) -> str:
        if not self.read.entry.get("permuted") or role == "v":
            return layout
        letter = layout[1]
        return f"({letter} r two) d -> {letter} (two r) d"

    def _mlp(self, branch: Branch) -> Iterator[Row]:
        assert isinstance(branch.part, Mlp)
        id, bias = branch.id, self._on("mlp_bias")
        order = str(self.read.entry["fused_mlp"]).split()
        if branch.part.gated and order:
            parts = (Slot(0, 1), Slot(1, 2))
            yield from self._weights(id, tuple(order), "gate_up", "(two n) d -> two n d", bias, parts)
        else:
            for role in ("gate", "up") if branch.part.gated else ("up",):
                yield from self._weights(id, (role,), role, "n d -> n d", bias)
        yield from self._weights(id, ("down",), "down", "d n -> d n", bias)
        for role in sorted(role for role in self.entry.names if role.startswith("act.")):
            yield self._row((id,), (role,), role, "-> " if role in ("act.beta", "act.eps") else "one -> one")

    def _weights(
        self, id: str, roles: tuple[str, ...], leaf: str, layout: str, bias: str | None, parts: tuple[Slot, ...] = ()
    ) -> Iterator[Row]:
        """A weight and its bias."""
        output, layout = leaf in ("o", "down"), self._layout(leaf, layout)
        if bias and self.entry.names.get(f"{leaf}_bias") != "-":
            left, right = (" ".join(x for x in side.split() if x != "d") for side in layout.split("->"))
            if output:
                yield self._row((f"{id}.bias",), ("bias",), leaf, "d -> d", leaf="bias", when=bias)
            else:
                named = tuple(f"{role}_bias" for role in roles)
                yield self._row((id,), named, leaf, f"{left} -> {right}", parts, leaf="bias", when=bias)
        if self.read.entry["transposed"]:
            left, right = layout.split(" -> ")
            sides = left.split(" ", 1) if output else left.rsplit(" ", 1)
            layout = f"{sides[1]} {sides[0]} -> {right}"
        yield self._row((id,), roles, leaf, layout, parts)

    def _norm(self, groups: tuple[str, ...], leaf: str, role: str, layout: str = "d -> d") -> Iterator[Row]:
        if not self.entry.has(leaf) or not self.read.flag("gain"):
            return
        yield self._row(groups, (role,), leaf, layout)
        if self.read.flag("shift"):
            yield self._row(groups, (f"{role}_bias",), leaf, layout, leaf="bias")

    def _layout(self, leaf: str, usual: str) -> str:
        """How a weight is stored, where the entry says so of its own."""
        return self.read.entry["layouts"].get(leaf, usual)

    def _on(self, name: str) -> str | None:
        """When a bias is there."""
        trait = self.read.value(name)
        return OPTIONAL if trait == OPTIONAL else ALWAYS if self.read.flag(name) else None

    def _row(  # noqa: PLR0913 - a row, spelled out
        self,
        groups: tuple[str, ...],
        roles: tuple[str, ...],
        name: str,
        layout: str,
        slots: tuple[Slot, ...] = (),
        *,
        leaf: str = "weight",
        head: int = 0,
        when: str = ALWAYS,
    ) -> Row:
        layer = groups[0].partition(".")[0].removeprefix("L")
        begin = str(self.entry.names["layer"]).format(l=layer) if groups[0].startswith("L") else ""
        names: list[str] = []
        own = f"{name}_bias" if leaf == "bias" and self.entry.has(f"{name}_bias") else name
        for path in str(self.entry.names[own]).split("|"):
            path = path.replace("{h}", str(head))
            full = path[1:] if path.startswith("=") else f"{path}.{self.entry.names.get('leaves', {}).get(leaf, leaf)}"
            prefixes = ("",) if path.startswith("/") else self.entry.names["prefixes"]
            names += [f"{prefix}{begin}{full}" if not path.startswith("/") else full[1:] for prefix in prefixes]
        return Row(groups, roles, names[0], layout, tuple(names[1:]), slots, when)
