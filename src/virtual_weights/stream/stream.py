"""The residual stream of one checkpoint: who writes where, who reads where, through which maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from virtual_weights.architecture import Attention, Model, ModelSpec
from virtual_weights.checkpoint import Source, open_source
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Dense, LinearMap
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream.adapted import adapted
from virtual_weights.stream.attached import Attached, attached, divided
from virtual_weights.stream.effective import Read, as_logits, centring, projection, reader, writer
from virtual_weights.stream.group import Component, Group, Groups, Port, group_id
from virtual_weights.stream.grouping import groups
from virtual_weights.stream.layout import in_order, unpacked
from virtual_weights.stream.names import Label, parse
from virtual_weights.stream.norm import scale, without_mean
from virtual_weights.stream.provenance import Provenance, fingerprint_of
from virtual_weights.stream.question import Question
from virtual_weights.stream.rotary import rotation
from virtual_weights.stream.views import Features, Head, Mlp


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
        attached: dictionaries, whose features read and write like parts of the model; none of them is run.
        keeps_mean: writers keep their mean over coordinates where LayerNorm would take it away: see ``as_seen``.
    """

    source: Source
    model: Model
    folded: bool = True
    dtype: torch.dtype = torch.float32
    attached: Attached = field(default_factory=Attached)
    keeps_mean: bool = False

    def __repr__(self) -> str:
        spec = self.spec
        heads = " or ".join(str(n) for n in dict.fromkeys(part.heads for part in spec.attentions))
        neurons = " or ".join(str(n) for n in dict.fromkeys(part.width for part in spec.mlps))
        parts = [f"{heads} heads each"] * bool(heads) + [f"width {spec.d_model}"]
        parts += [f"{neurons} neurons per MLP"] * bool(neurons)
        mlp = ', stream["L1.mlp"]' * bool(neurons)
        return (
            f"Stream of {self.source.reference} ({self.model.family})\n"
            f"  {spec.n_layers} layers, {', '.join(parts)}\n"
            f"  norm: {self.norm_stamp}\n"
            f'  stream["L1H0"], stream["L1H0.K"]{mlp}; .heads, .groups; Composition("K")(stream)'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: they open the checkpoint by its reference, and refuse one of other content."""
        if not self.source.files:
            raise UsageError(
                "a model in memory cannot be sent to another process",
                expected="a checkpoint in files",
                do="save the model and open the folder",
            )
        again = {**self.source.recipe}
        again["attach"] = [*again.get("attach", []), *map(str, self.attached.references)]
        return _opened_again, (again, fingerprint_of(self), self.model, self.folded, self.dtype)

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
        return self.spec.states

    @cached_property
    def groups(self) -> Groups:
        """What reads and writes through the same maps and norms, in order of depth."""
        return replace(groups(self.model), attached=tuple(part.group for part in self.attached.parts))

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
        if not any(self.spec.norms) and self.spec.head.cap is None:
            return "none, unembedding centred"
        also = ["after parts"] * any(branch.after for branch in self.spec.branches)
        also += ["on inner activations"] * any(branch.inner for branch in self.spec.branches)
        also += ["on queries and keys"] * any(part.port_norm for part in self.spec.attentions)
        words = ["gain and centring folded" if self.spec.centring else "gain folded"]
        words[0] += f" (of norms {' and '.join(also)} too)" if also else ""
        if self.spec.head.cap is None:
            words.append("writers and unembedding centred" if centring(self) else "unembedding centred")
        return ", ".join(words)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Which checkpoint this is, for every result; its fingerprint is computed when it is first looked at."""
        return Provenance(self, self.model.entry)

    def record(self, question: Question[Any], axes: Iterable[Axis], columns: Iterable[Column], **stamp: Any) -> Record:
        """An answer about this model: the question's name and parameters, the norm's stamp and the provenance go in.

        A figure of the stamp that is not finite, such as a ratio to a map that is zero, is absent: None.
        """
        stamp = {"norm": self.norm_stamp, **finite(stamp)}
        if self.model.outside:
            stamp["outside_the_maps"] = self.model.outside
        if "rotary_offset" in stamp:
            offset = stamp["rotary_offset"]
            turning = any(part.rotary for part in self.spec.attentions)
            stamp["rotary_offset"] = offset or 0 if turning else "no rotary embedding"
        return Record(question.question, tuple(axes), tuple(columns), question.parameters, stamp, self.provenance)

    def weight(self, role: str, group: Group | str, rows: slice | None = None) -> Tensor | None:
        """One role's tensor in canonical axes and storage dtype, None where the model has none.

        Args:
            role: a role of the tables, e.g. ``"q"``, ``"o"``, ``"norm"``, ``"bias"``.
            group: whose, e.g. ``"L3.attn"``, ``"L3.attn.bias"``, ``"unembed"`` (the last norm too).
            rows: only these of its first axis; where it is stored so, no others are read.
        """
        place = self.model.placements.get((role, group_id(group)))
        if place is None:
            return None
        axes = self.model.axes(group_id(group))
        if rows is None:
            return unpacked(self.source.read(place.tensor), place, axes)
        if in_order(place):
            return self.source.read(place.tensor, rows)
        return unpacked(self.source.read(place.tensor), place, axes)[rows]

    def read(self, port: Port, group: Group | str = "unembed") -> Read:
        """The effective read maps of one port: ``R~ = diag(g) R diag(gamma) (P)`` and ``g (R beta + c)``.

        g is the gain of a norm on queries or keys, 1 where there is none; its scalar is a site of its own, see
        ``port_scale``. The unembedding's are less their mean over tokens: a logit is one less the mean over the
        vocabulary, which no probability sees; not so where logits are capped.

        Args:
            port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` (an ungated MLP) or ``"unembed"``.
            group: what reads, e.g. ``"L3.attn"``.

        Raises:
            MissingTensorError: a partial checkpoint lacks this reader.
            UsageError: the model has no such port.
        """
        return reader(self, port, group)

    def write(self, group: Group | str, state: int | None = None) -> Tensor:
        """The write maps of a group, shape (m, d, k): ``f diag(gamma) (P) O``, in storage dtype where that is O.

        f is the factor of the branch and gamma the gain of a norm after the part, whose scalar is a site of its own,
        see ``after_scale``. Where every reader stands behind a LayerNorm they are centred, ``P O``.

        Heads: (heads, d, d_head); an MLP: (1, d, d_mlp); embeddings: (1, d, tokens) or (1, d, positions); a bias:
        (1, d, 1); features of a dictionary: (1, d, F).

        Args:
            group: what writes.
            state: of a cross-layer dictionary, what it has written by this state, each decoder once; None is all.

        Raises:
            MissingTensorError: a partial checkpoint lacks this writer.
            UsageError: nothing of this name writes.
        """
        return centred(self, writer(self, group, state), -2, self.dtype)

    def scale(self, states: Tensor, where: Group | str | int | None = None) -> Tensor:
        """The norm scalar ``s`` with which every token of states (..., d) is read, (...).

        Args:
            states: of the stream.
            where: what reads, or the number of the state; 1 where it reads the stream as it is. None where all norms
                are alike.

        Raises:
            UsageError: nothing is named, and norms differ.
        """
        if where is None:
            where = self._alike("norms", {group: group.norm for group in self.groups if group.ports})
        if isinstance(where, int):
            where = next(iter(self.groups.sited(where)), "unembed")
        return scale(states, self.groups[group_id(where)].norm)

    def rotation(self, offset: int, group: Group | str | None = None) -> Tensor | None:
        """``R_offset`` of a query ``offset`` tokens after its key in one attention, (d_head, d_head) float64.

        None where its queries and keys do not turn. The group may be left out where all attentions turn alike.

        Raises:
            UsageError: nothing is named, and attentions differ.
        """
        if group is None:
            group = self._alike("rotary embeddings", {group: group.rotary for group in self.groups.heads})
        attention = self.groups[group_id(group)].attention
        if attention is None or attention.rotary is None:
            return None
        return rotation(attention.rotary, offset, attention.width, self.weight("factors", "rotary"))

    def __getitem__(self, name: str) -> Head | Mlp | Features | LinearMap:
        """A component, or the map of a port.

        ``L5H3`` gives a Head, ``L5.mlp`` an Mlp, ``tc8:F`` and ``tc8:F12`` of an attached dictionary Features;
        ``L5H3.K``, ``L5.mlp.up``, ``L5N7.out``, ``tc8:F12.enc``, ``embed``, ``pos`` and ``unembed`` give linear maps. A
        bias gives its vector as a map of shape (d, 1). Embeddings, biases and the unembedding come as the model has
        them, so that they are what transformers shows, and ``unembed`` of a state over its scalar is its logits;
        questions take them by ``read`` and ``write``, less what nothing sees.

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
        if label.kind in ("dictionary", "feature"):
            return self._features(label)
        if label.kind == "unembed":
            return Dense(as_logits(self, projection(self, "unembed", "unembed")).maps[0])
        return Dense(writer(self, str(label))[0])

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
            rotate=None if group.rotary is None else partial(self.rotation, group=group),
        )

    def _mlp(self, label: Label) -> Mlp | LinearMap:
        site = f"L{label.layer}.mlp"
        ports = self.groups.of(replace(label, kind="mlp", index=None, port=None)).ports
        up = self.read(ports[-1], site)
        gate = self.read("gate", site) if "gate" in ports else None
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

    def _features(self, label: Label) -> Features | LinearMap:
        group = self.groups.of(label)
        part = self.attached[group.id]
        rows = None if label.index is None else slice(label.index, label.index + 1)
        read = part.read(self, rows) if group.ports else None
        write = centred(self, part.write(self, label.state, rows), -2, self.dtype) if group.writes else None
        features = Features(
            str(replace(label, port=None)),
            None if read is None else Dense(read.maps[0]),
            None if read is None or read.constants is None else read.constants[0],
            None if write is None else Dense(write[0]),
        )
        return features if label.port is None else features.map(label.port)

    def _check(self, label: Label) -> None:
        layer = label.layer
        if layer is None:
            return
        branch = self.spec.branch(f"L{layer}.{'attn' if label.kind in ('head', 'attn_bias') else 'mlp'}")
        part = None if branch is None else branch.part
        count = part.heads if isinstance(part, Attention) else part.width if part is not None else 0
        if part is None or (label.index is not None and label.index >= count):
            last = self.spec.n_layers - 1
            named = "heads" if isinstance(part, Attention) else "neurons"
            beyond = f", {named} to {count - 1} in layer {layer}" if part else ""
            raise UsageError(f"this model has no {label}", expected=f"layers to {last}{beyond}", do="correct the name")

    def _alike(self, what: str, traits: Mapping[Group, Any]) -> Group:
        """One of the groups, where all have the same trait."""
        first = next(iter(traits), None)
        if first is None or any(trait != traits[first] for trait in traits.values()):
            raise UsageError(
                f"the {what} of this model differ" if traits else f"this model has no {what}",
                expected="a group, whose is meant",
                do='name it, such as "L3.attn"',
            )
        return first


def _opened_again(recipe: dict[str, Any], fingerprint: str, model: Model, *rest: Any) -> Stream:
    adapters, others = divided(recipe.pop("attach", []))
    source = adapted(open_source(**recipe), model, adapters)
    stream = Stream(source, model, *rest, attached=attached(model, others))
    if fingerprint_of(stream) != fingerprint:
        raise UsageError(
            f"{source.reference} holds another checkpoint here than where the work was divided",
            expected=f"the checkpoint of fingerprint {fingerprint}",
            do="give all machines the same files",
        )
    return stream


def centred(stream: Stream, vectors: Tensor, axis: int = -1, least: torch.dtype = torch.float32) -> Tensor:
    """What readers can see of vectors of the stream along an axis: less their mean where LayerNorm is folded.

    Then in ``least`` precision or their own, if that is wider.
    """
    if not stream.folded or not centring(stream):
        return vectors
    return without_mean(vectors.to(torch.promote_types(vectors.dtype, least)), axis)


def through_norm(stream: Stream, vectors: Tensor) -> Tensor:
    """What a norm passes of vectors (..., d) of the stream, folded or not: LayerNorm takes their mean away."""
    return without_mean(vectors, -1) if centring(stream) else vectors


def finite(value: Any) -> Any:
    """A JSON value in which None stands for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
