"""The residual stream of one checkpoint: who writes where, who reads where, through which maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import einops
import torch
from torch import Tensor

from virtual_weights.architecture import Model, ModelSpec
from virtual_weights.checkpoint import Source
from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.linalg import Dense, LinearMap
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream.group import READINGS, WRITINGS, Component, Group, Groups, Port, groups, states
from virtual_weights.stream.names import Label, parse
from virtual_weights.stream.norm import constant, fold, scale, without_mean
from virtual_weights.stream.question import Question
from virtual_weights.stream.rotary import rotation
from virtual_weights.stream.views import Head, Mlp


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


@dataclass(frozen=True, eq=False, repr=False)
class Stream:
    """Every writer and reader of the residual stream of one model, lazily.

    Nothing is read until asked and nothing is kept. Columns are vectors and a map has shape
    (out, in); positions grow along the stream.

    Attributes:
        source: where the weights come from.
        model: which tensor plays which role.
        folded: the default: readers contain the norm's gain, and what nothing sees is taken away: the mean over
            coordinates of what is written, where the norm is a LayerNorm, and the mean over tokens of the unembedding,
            which adds the same to all logits. False leaves all weights as they are.
        dtype: least precision in which this is done; weights wider than it keep theirs.
    """

    source: Source
    model: Model
    folded: bool = True
    dtype: torch.dtype = torch.float32

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"Stream of {self.source.reference} ({self.model.family})\n"
            f"  {spec.n_layers} layers, {spec.n_heads} heads each, width {spec.d_model}, {spec.d_mlp} neurons per MLP\n"
            f"  norm: {self.norm_stamp}\n"
            '  stream["L1H0"], stream["L1H0.K"], stream["L1.mlp"]; .heads, .groups; Composition("K")(stream)'
        )

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
    def groups(self) -> Groups:
        """What reads and writes through the same maps and norms, in order of depth."""
        return groups(self.model)

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """All components in order of depth; neurons stand under their MLP."""
        return tuple(component for group in self.groups for component in group.components)

    @property
    def heads(self) -> tuple[Component, ...]:
        """The attention heads in order of depth."""
        return tuple(component for group in self.groups.heads for component in group.components)

    @property
    def norm_stamp(self) -> str:
        """How results say what was done with the norm."""
        if not self.folded:
            return "left out"
        folded, also = ("gain and centring", "writers and ") if self.spec.norm == "layer" else ("gain", "")
        return f"{folded} folded, {also}unembedding centred"

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Which checkpoint this is, for every result; its fingerprint is computed when it is first looked at."""
        return _Provenance(self.source, self.model.family)

    def record(self, question: Question[Any], axes: Iterable[Axis], columns: Iterable[Column], **stamp: Any) -> Record:
        """An answer about this model: the question's name and parameters, the norm's stamp and the provenance go in.

        A figure of the stamp that is not finite, such as a ratio to a map that is zero, is absent: None.
        """
        stamp = {"norm": self.norm_stamp, **finite(stamp)}
        if "rotary_offset" in stamp:
            offset = stamp["rotary_offset"]
            stamp["rotary_offset"] = "no rotary embedding" if self.spec.rotary is None else offset or 0
        return Record(question.question, tuple(axes), tuple(columns), question.parameters, stamp, self.provenance)

    def weight(self, role: str, group: Group | str) -> Tensor | None:
        """One role's tensor in canonical axes and storage dtype, None where the model has none.

        Args:
            role: a role of the tables, e.g. ``"q"``, ``"o"``, ``"norm"``, ``"bias"``.
            group: whose, e.g. ``"L3.attn"``, ``"L3.attn.bias"``, ``"unembed"`` (the last norm too).
        """
        place = self.model.placements.get((role, _id(group)))
        if place is None:
            return None
        sizes = {name: size for name, size in self.spec.axes.items() if size and name in _letters(place.layout)}
        tensor = einops.rearrange(self.source.read(place.tensor), place.layout, **sizes)
        return tensor if place.part is None else tensor[place.part]

    def read(self, port: Port, group: Group | str = "unembed") -> Read:
        """The effective read maps of one port: ``R~ = R diag(gamma) (P)`` and ``R beta + c``.

        The unembedding's are less their mean over tokens: a logit is one less the mean over the vocabulary.

        Args:
            port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` (an ungated MLP) or ``"unembed"``.
            group: what reads, e.g. ``"L3.attn"``.

        Raises:
            MissingTensorError: a partial checkpoint lacks this reader.
            UsageError: the model has no such port.
        """
        read = self._read(port, group)
        if port != "unembed" or not self.folded:
            return read
        return Read(without_mean(read.maps, -2), None if read.constants is None else without_mean(read.constants, -1))

    def _read(self, port: Port, group: Group | str) -> Read:
        """The same with the unembedding as it is, which gives logits."""
        if (port == "gate" and not self.spec.gated) or (port == "in" and self.spec.gated):
            raise UsageError(
                f"this model's MLP has no port {port!r}",
                expected="gate and up" if self.spec.gated else "in",
                do="name one of these ports",
            )
        role, site = READINGS[port], _id(group)
        maps = self._needed(role, site)
        bias = self.weight(f"{role}_bias", site)
        maps, bias = (maps, bias) if maps.ndim == 3 else (maps[None], None if bias is None else bias[None])
        if not self.folded:
            return Read(maps, bias)
        gain, shift = self._needed("norm", site), self.weight("norm_bias", site)
        return Read(fold(maps, gain, self.spec.norm, self.dtype), constant(maps, shift, bias, self.dtype))

    def write(self, group: Group | str) -> Tensor:
        """The write maps of a group, shape (m, d, k), in storage dtype; with LayerNorm folded centred, ``P O``.

        Heads: (heads, d, d_head); an MLP: (1, d, d_mlp); embeddings: (1, d, tokens) or (1, d, positions); a bias:
        (1, d, 1).

        Raises:
            MissingTensorError: a partial checkpoint lacks this writer.
            UsageError: nothing of this name writes.
        """
        return centred(self, self._write(group), -2, self.dtype)

    def _write(self, group: Group | str) -> Tensor:
        """The same as stored."""
        id = _id(group)
        if id not in self.groups:
            raise self._missing("output", id)
        kind = self.groups[id].kind
        if kind not in WRITINGS:
            raise UsageError(f"{id} does not write", expected="a writer such as L3.mlp or embed", do="name a writer")
        maps = self._needed(WRITINGS[kind], id)
        if kind in ("embed", "pos"):
            maps = maps.T
        return maps if maps.ndim == 3 else maps[None] if maps.ndim == 2 else maps[None, :, None]

    def scale(self, states: Tensor) -> Tensor:
        """The norm scalar ``s`` with which every token of states (..., d) is read, (...)."""
        return scale(states, self.spec.norm, self.spec.norm_eps)

    def rotation(self, offset: int) -> Tensor | None:
        """``R_offset`` of a query ``offset`` tokens after its key, (d_head, d_head) float64; None without rotary."""
        if self.spec.rotary is None:
            return None
        return rotation(self.spec.rotary, offset, self.spec.d_head, self.weight("factors", "rotary"))

    def __getitem__(self, name: str) -> Head | Mlp | LinearMap:
        """A component, or the map of a port.

        ``L5H3`` gives a Head, ``L5.mlp`` an Mlp; ``L5H3.K``, ``L5.mlp.up``, ``L5N7.out``, ``embed``,
        ``pos`` and ``unembed`` give linear maps. A bias gives its vector as a map of shape (d, 1). Embeddings, biases
        and the unembedding come as the model has them, so that they are what transformers shows, and ``unembed`` of a
        state over its scalar is its logits; questions take them by ``read`` and ``write``, less what nothing sees.

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
            return Dense(self._read("unembed", "unembed").maps[0])
        return Dense(self._write(str(label))[0])

    def _head(self, label: Label) -> Head:
        site, index = f"L{label.layer}.attn", label.index
        assert index is not None
        q, k, v = (self.read(port, site) for port in ("Q", "K", "V"))
        group = self.groups.of(label)
        shared = index // group.sharing
        return Head(
            str(replace(label, port=None)),
            q=Dense(q.maps[index]),
            k=Dense(k.maps[shared]),
            v=Dense(v.maps[shared]),
            o=Dense(self.write(site)[index].to(v.maps.dtype)),
            q_constant=None if q.constants is None else q.constants[index],
            k_constant=None if k.constants is None else k.constants[shared],
            v_constant=None if v.constants is None else v.constants[shared],
            kv_group=group.components[index].kv_group,
            rotate=None if self.spec.rotary is None else self.rotation,
        )

    def _mlp(self, label: Label) -> Mlp | LinearMap:
        site = f"L{label.layer}.mlp"
        up = self.read("up" if self.spec.gated else "in", site)
        gate = self.read("gate", site) if self.spec.gated else None
        rows = slice(None) if label.index is None else slice(label.index, label.index + 1)
        part = Mlp(
            str(Label(label.kind, label.layer, label.index)),
            up=Dense(up.maps[0, rows]),
            gate=None if gate is None else Dense(gate.maps[0, rows]),
            out=Dense(self.write(site)[0][:, rows].to(up.maps.dtype)),
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

    def _needed(self, role: str, group: str) -> Tensor:
        tensor = self.weight(role, group)
        if tensor is None:
            raise self._missing(role, group)
        return tensor

    def _missing(self, role: str, group: str) -> MissingTensorError:
        return MissingTensorError(
            f"this checkpoint has no {role} of {group}",
            expected=f"a {self.spec.model_type} model with that part",
            do="open the complete checkpoint, or ask about a part it holds",
        )


class _Provenance(Mapping[str, Any]):
    """Which checkpoint a result is of; what lies in files is hashed when somebody looks at its fingerprint.

    Tensors in memory can change, so theirs is of the time of the result.
    """

    def __init__(self, source: Source, family: str) -> None:
        self._source = source
        self._known = {"model": source.reference, "fingerprint": None, "family": family}
        if not source.files:
            self._known["fingerprint"] = source.fingerprint

    def __getitem__(self, name: str) -> Any:
        value = self._known[name]
        return self._source.fingerprint if name == "fingerprint" and value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return repr(dict(self))


def centred(stream: Stream, vectors: Tensor, axis: int = -1, least: torch.dtype = torch.float32) -> Tensor:
    """What readers can see of vectors of the stream along an axis: less their mean where LayerNorm is folded.

    Then in ``least`` precision or their own, if that is wider.
    """
    if not stream.folded or stream.spec.norm == "rms":
        return vectors
    return without_mean(vectors.to(torch.promote_types(vectors.dtype, least)), axis)


def through_norm(stream: Stream, vectors: Tensor) -> Tensor:
    """What a norm passes of vectors (..., d) of the stream, folded or not: LayerNorm takes their mean away."""
    return without_mean(vectors, -1) if stream.spec.norm == "layer" else vectors


def _id(group: Group | str) -> str:
    return group if isinstance(group, str) else group.id


def _letters(layout: str) -> set[str]:
    return set(layout.replace("(", " ").replace(")", " ").replace("->", " ").split())


def finite(value: Any) -> Any:
    """A JSON value in which None stands for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
