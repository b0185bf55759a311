"""The residual stream of one checkpoint: who writes where, who reads where, through which maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import einops
import torch
from torch import Tensor

from virtual_weights.architecture import Model, ModelSpec
from virtual_weights.checkpoint import Source
from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.linalg import Dense, LinearMap
from virtual_weights.stream.group import Component, Port, components, states
from virtual_weights.stream.names import Label, parse
from virtual_weights.stream.norm import constant, fold
from virtual_weights.stream.rotary import rotation
from virtual_weights.stream.views import Head, Mlp

WriterKind = Literal["head", "mlp", "embed", "pos"]

_ROLE = {"Q": "q", "K": "k", "V": "v", "gate": "gate", "up": "up", "in": "up", "unembed": "unembed"}
_NORM = {"Q": "attn_norm", "K": "attn_norm", "V": "attn_norm", "unembed": "final_norm"}
_WRITE = {"head": "o", "mlp": "down", "embed": "embed", "pos": "pos"}


@dataclass(frozen=True, eq=False)
class Read:
    """The read maps of one port in one layer.

    Attributes:
        maps: shape (m, k, d): m heads of width k (m = 1 for an MLP or the unembedding). Keys and
            values of grouped attention are held once per key/value head.
        constants: shape (m, k), what arrives whatever the stream holds, None where nothing.
    """

    maps: Tensor
    constants: Tensor | None


@dataclass(frozen=True, eq=False)
class Stream:
    """Every writer and reader of the residual stream of one model, lazily.

    Nothing is read until asked and nothing is kept. Columns are vectors and a map has shape
    (out, in); positions grow along the stream.

    Attributes:
        source: where the weights come from.
        model: which tensor plays which role.
        folded: whether readers contain the norm's gain (and LayerNorm's centring), the default.
        dtype: least precision in which gains are folded; weights wider than it keep theirs.
    """

    source: Source
    model: Model
    folded: bool = True
    dtype: torch.dtype = torch.float32

    def to(self, dtype: torch.dtype) -> Stream:
        """The same stream with gains folded in ``dtype``, for example float64 where 1e-7 matters."""
        return replace(self, dtype=dtype)

    @property
    def spec(self) -> ModelSpec:
        """Sizes and choices of the model."""
        return self.model.spec

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.spec.d_model

    @property
    def states(self) -> int:
        """How many states the stream passes through, the embedding and the last one included."""
        return states(self.model)

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """All components in order of depth; neurons stand under their MLP."""
        return components(self.model)

    @property
    def heads(self) -> tuple[Component, ...]:
        """The attention heads in order of depth."""
        return tuple(c for c in self.components if c.kind == "head")

    def heads_of(self, layer: int) -> tuple[Component, ...]:
        """The attention heads of one layer."""
        return tuple(c for c in self.heads if c.label.layer == layer)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers whose attention the checkpoint holds."""
        return tuple(layer for layer in range(self.spec.n_layers) if self.model.has("o", layer))

    @property
    def norm_stamp(self) -> str:
        """How results say what was done with the norm."""
        if not self.folded:
            return "left out"
        return "gain folded" if self.spec.norm == "rms" else "gain and centring folded"

    @property
    def provenance(self) -> dict[str, Any]:
        """Which checkpoint this is, for every result."""
        return {"model": self.source.reference, "fingerprint": self.source.fingerprint, "family": self.model.family}

    def weight(self, role: str, layer: int | None = None) -> Tensor | None:
        """One role's tensor in canonical axes and storage dtype, None where the model has none.

        Args:
            role: a role of the tables, e.g. ``"q"``, ``"o_bias"``, ``"final_norm"``.
            layer: the layer; None outside the blocks.
        """
        place = self.model.placements.get((role, layer))
        if place is None:
            return None
        sizes = {name: size for name, size in self.spec.axes.items() if size and name in _letters(place.layout)}
        tensor = einops.rearrange(self.source.read(place.tensor), place.layout, **sizes)
        return tensor if place.part is None else tensor[place.part]

    def read(self, port: Port, layer: int | None = None) -> Read:
        """The effective read maps of one port: ``R~ = R diag(gamma) (P)`` and ``R beta + c``.

        Args:
            port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` (an ungated MLP) or ``"unembed"``.
            layer: the layer; None for the unembedding.

        Raises:
            MissingTensorError: a partial checkpoint lacks this reader.
            UsageError: the model has no such port.
        """
        if ((port == "gate") and not self.spec.gated) or (port == "in" and self.spec.gated):
            raise UsageError(
                f"this model's MLP has no port {port!r}",
                expected="gate and up" if self.spec.gated else "in",
                do="name one of these ports",
            )
        role, norm = _ROLE[port], _NORM.get(port, "mlp_norm")
        own = self._needed(role, layer)
        bias = self.weight(f"{role}_bias", layer)
        own, bias = (own, bias) if own.ndim == 3 else (own[None], None if bias is None else bias[None])
        if not self.folded:
            return Read(own, bias)
        shift = self.weight(f"{norm}_bias", layer)
        gain = self._needed(norm, layer)
        return Read(fold(own, gain, self.spec.norm, self.dtype), constant(own, shift, bias, self.dtype))

    def write(self, kind: WriterKind, layer: int | None = None) -> Tensor:
        """The write maps of one kind of component, shape (m, d, k), in storage dtype.

        Heads: (n_heads, d, d_head); an MLP: (1, d, d_mlp); embeddings: (1, d, tokens) or (1, d, positions).
        """
        own = self._needed(_WRITE[kind], layer)
        if kind in ("embed", "pos"):
            return own.T[None]
        return own if own.ndim == 3 else own[None]

    def rotation(self, offset: int) -> Tensor | None:
        """``R_offset`` of a query ``offset`` tokens after its key, (d_head, d_head) float64; None without rotary."""
        if self.spec.rotary is None:
            return None
        return rotation(self.spec.rotary, offset, self.spec.d_head, self.weight("rope_factors"))

    def __getitem__(self, name: str) -> Head | Mlp | LinearMap:
        """A component, or the map of a port.

        ``L5H3`` gives a Head, ``L5.mlp`` an Mlp; ``L5H3.K``, ``L5.mlp.up``, ``L5N7.out``, ``embed``,
        ``pos`` and ``unembed`` give linear maps. A bias gives its vector as a map of shape (d, 1).

        Raises:
            UsageError: the name is not of the grammar, or this model has no such component.
        """
        label = parse(name)
        self._check(label)
        if label.kind == "head":
            head = self._head(label)
            return {None: head, "Q": head.q, "K": head.k, "V": head.v, "O": head.o}[label.port]
        if label.kind in ("mlp", "neuron"):
            return self._mlp(label)
        if label.kind == "unembed":
            return Dense(self.read("unembed").maps[0])
        if label.kind in ("attn_bias", "mlp_bias"):
            return Dense(
                self._needed({"attn_bias": "o_bias", "mlp_bias": "down_bias"}[label.kind], label.layer)[:, None]
            )
        return Dense(self.write(label.kind)[0])

    def _head(self, label: Label) -> Head:
        layer, index = label.layer, label.index
        assert layer is not None and index is not None
        shared = index // self.spec.group
        q, k, v = (self.read(port, layer) for port in ("Q", "K", "V"))
        return Head(
            str(Label("head", layer, index)),
            q=Dense(q.maps[index]),
            k=Dense(k.maps[shared]),
            v=Dense(v.maps[shared]),
            o=Dense(self.write("head", layer)[index].to(v.maps.dtype)),
            q_constant=None if q.constants is None else q.constants[index],
            k_constant=None if k.constants is None else k.constants[shared],
            v_constant=None if v.constants is None else v.constants[shared],
            channel=self.heads_of(layer)[index].channel,
            rotate=None if self.spec.rotary is None else self.rotation,
        )

    def _mlp(self, label: Label) -> Mlp | LinearMap:
        layer = label.layer
        up = self.read("up" if self.spec.gated else "in", layer)
        gate = self.read("gate", layer) if self.spec.gated else None
        rows = slice(None) if label.index is None else slice(label.index, label.index + 1)
        part = Mlp(
            str(Label(label.kind, layer, label.index)),
            up=Dense(up.maps[0, rows]),
            gate=None if gate is None else Dense(gate.maps[0, rows]),
            out=Dense(self.write("mlp", layer)[0][:, rows].to(up.maps.dtype)),
            up_constant=None if up.constants is None else up.constants[0, rows],
            gate_constant=None if gate is None or gate.constants is None else gate.constants[0, rows],
        )
        if label.port is None:
            return part
        return part.out if label.port == "out" else part.reader(label.port)

    def _check(self, label: Label) -> None:
        spec = self.spec
        counts = {"head": spec.n_heads, "neuron": spec.d_mlp}
        beyond_layer = label.layer is not None and label.layer >= spec.n_layers
        if beyond_layer or (label.index is not None and label.index >= counts[label.kind]):
            raise UsageError(
                f"this model has no {label}",
                expected=f"layers to {spec.n_layers - 1}, heads to {spec.n_heads - 1}, neurons to {spec.d_mlp - 1}",
                do="correct the name",
            )

    def _needed(self, role: str, layer: int | None) -> Tensor:
        found = self.weight(role, layer)
        if found is None:
            where = "" if layer is None else f" in layer {layer}"
            raise MissingTensorError(
                f"this checkpoint has no {role}{where}",
                expected=f"a {self.spec.model_type} model with that part",
                do="open the complete checkpoint, or ask about a part it holds",
            )
        return found


def _letters(layout: str) -> set[str]:
    return set(layout.replace("(", " ").replace(")", " ").replace("->", " ").split())
