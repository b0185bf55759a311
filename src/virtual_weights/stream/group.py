"""Groups: components that read and write through the same maps and norms, at numbered states of the stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Literal, final

from virtual_weights.architecture import Attention, Branch, Norm, Part, Rotary
from virtual_weights.errors import UsageError
from virtual_weights.record.axes import one_line, shortened
from virtual_weights.stream.names import Kind, Label, parse

HeadPort = Literal["Q", "K", "V"]
NeuronPort = Literal["in", "up", "gate", "enc"]
Port = Literal["Q", "K", "V", "gate", "up", "in", "unembed", "enc"]
Writers = Literal["heads", "all"]

NO_END = 1 << 30  # of the states that a writer reaches
HEAD_PORTS: tuple[HeadPort, ...] = ("Q", "K", "V")
NEURON_PORTS: tuple[NeuronPort, ...] = ("in", "up", "gate", "enc")

READINGS: dict[Port, str] = {
    "Q": "q",
    "K": "k",
    "V": "v",
    "gate": "gate",
    "up": "up",
    "in": "up",
    "unembed": "unembed",
    "enc": "enc",
}
"""The role of the tables that every port reads by; an encoder is in no table."""

WRITINGS: dict[Kind, str] = {
    "head": "o",
    "mlp": "down",
    "embed": "embed",
    "pos": "pos",
    "attn_bias": "bias",
    "mlp_bias": "bias",
}
"""The role of the tables that every kind of component writes by."""


@dataclass(frozen=True)
class Component:
    """A part of the model that reads from the stream, writes to it, or both.

    Positions count the states of the stream along depth: 0 is the embedding. A component reads
    state ``reads``; what it writes first appears in state ``writes``. A writer reaches a reader iff
    ``writer.writes <= reader.reads``.

    Attributes:
        kv_group: name of the key/value head that it shares with others, None where it shares none.
    """

    label: Label
    reads: int | None
    writes: int | None
    kv_group: str | None = None

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.label.kind


@final
@dataclass(frozen=True, repr=False)
class Group:
    """The heads of one attention, one MLP, one embedding, one bias, the unembedding, or an attached dictionary.

    Whatever is kept by place (weights, norm scalars, moments) is kept by a group's id, never by the number of a layer.

    Attributes:
        id: ``"L3.attn"``, ``"L3.mlp"``, ``"L3.attn.bias"``, ``"embed"``, ``"pos"``, ``"unembed"`` or the name of a
            dictionary; also the name of the norm before it.
        kind: what its components are.
        components: one for each map: the heads, or the one component.
        ports: through which it reads, in order; () where it only writes.
        reads: the state that it reads; None where it only writes.
        writes: the states in which what it writes first appears; () where it only reads.
        width: inner activations of one component: d_head, or the number of neurons or features; 0 of others.
        norm: the norm through which it reads; None where it reads the stream as it is, or only writes.
        branch: what it is a part of; None outside the blocks.
    """

    id: str
    kind: Kind
    components: tuple[Component, ...]
    ports: tuple[Port, ...] = ()
    reads: int | None = None
    writes: tuple[int, ...] = ()
    width: int = 0
    norm: Norm | None = None
    branch: Branch | None = None

    def __repr__(self) -> str:
        reads = f"; reads state {self.reads} through {', '.join(self.ports)}" if self.ports else ""
        writes = f"; writes state {', '.join(map(str, self.writes))}" if self.writes else ""
        return one_line(f"Group {self.id}: {shortened(self.labels)}{reads}{writes}")

    @property
    def attention(self) -> Attention | None:
        """The attention that it is; None of anything else."""
        return self.branch.part if self.branch is not None and isinstance(self.branch.part, Attention) else None

    @property
    def after(self) -> Norm | None:
        """The norm on what it writes; None where there is none."""
        return None if self.branch is None else self.branch.after

    @property
    def inner(self) -> Norm | None:
        """The norm on its inner activations, all together; None where there is none."""
        return None if self.branch is None else self.branch.inner

    @property
    def rotary(self) -> Rotary | None:
        """How its queries and keys turn; None where they do not."""
        return None if self.attention is None else self.attention.rotary

    @property
    def sharing(self) -> int:
        """How many query heads share one key/value head."""
        return 1 if self.attention is None else self.attention.sharing

    @property
    def sites(self) -> tuple[str, ...]:
        """Where it has a norm scalar: where it reads, and in its branch, as ``"L3.attn"`` and ``"L3.attn.after"``."""
        sites = [self.id]
        sites += [f"{self.id}.{name}" for name, norm in (("after", self.after), ("inner", self.inner)) if norm]
        if self.attention is not None and self.attention.port_norm is not None:
            sites += [f"{self.id}.Q", f"{self.id}.K"]
        return tuple(sites)

    @property
    def layer(self) -> int | None:
        """The layer, for names and tables; None outside the blocks."""
        return self.components[0].label.layer

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its components."""
        return tuple(str(component.label) for component in self.components)

    def readers(self, port: str) -> tuple[str, ...]:
        """Its components as readers of a port, ``"L3H5.K"``; the unembedding has one port and no need to name it."""
        return self.labels if port == self.kind == "unembed" else tuple(f"{label}.{port}" for label in self.labels)

    @property
    def first(self) -> int:
        """The first state that holds what it writes."""
        return self.writes[0]

    @property
    def constant(self) -> bool:
        """Whether it writes the same at every token, as a bias does."""
        return self.kind in ("attn_bias", "mlp_bias")

    @property
    def neurons(self) -> tuple[str, ...]:
        """The names of an MLP's neurons, or of a dictionary's features."""
        stem = {"mlp": f"L{self.layer}N", "dictionary": f"{self.id}:F"}.get(self.kind)
        return () if stem is None else tuple(f"{stem}{i}" for i in range(self.width))

    def shared(self, port: str) -> int:
        """How many heads read through one map of a port."""
        return self.sharing if port in ("K", "V") else 1

    def kv_groups(self, port: str) -> tuple[str, ...]:
        """The key/value group of every component, where heads share the maps of this port; else ()."""
        return tuple(c.kv_group or "" for c in self.components) if self.shared(port) > 1 else ()

    def reaches(self, state: int | None) -> bool:
        """Whether something that it writes is there in a state."""
        return state is not None and bool(self.writes) and self.first <= state


@final
@dataclass(frozen=True, repr=False)
class Groups:
    """The groups of a model in order of depth.

    What is attached to a model is found by its name and its port; the sets (the writers, what reads a state) are of the
    model itself, so that they add up to its stream.

    Attributes:
        all: every group that the checkpoint holds.
        attached: dictionaries, in the order in which they were attached.
    """

    all: tuple[Group, ...]
    attached: tuple[Group, ...] = ()

    def __repr__(self) -> str:
        return f"Groups ({len(self.all)}): {shortened(tuple(group.id for group in self.all))}"

    def __iter__(self) -> Iterator[Group]:
        return iter(self.all)

    def __getitem__(self, id: str) -> Group:
        return self._by_id[id]

    def __contains__(self, id: str) -> bool:
        return id in self._by_id

    @cached_property
    def _by_id(self) -> dict[str, Group]:
        return {group.id: group for group in (*self.all, *self.attached)}

    @cached_property
    def _by_label(self) -> dict[Label, Group]:
        groups = (*self.all, *self.attached)
        return {component.label: group for group in groups for component in group.components}

    def kind(self, *kinds: Kind) -> tuple[Group, ...]:
        """The groups whose components are of some kinds."""
        return tuple(group for group in self.all if group.kind in kinds)

    @property
    def heads(self) -> tuple[Group, ...]:
        """The attentions."""
        return self.kind("head")

    @property
    def mlps(self) -> tuple[Group, ...]:
        """The MLPs."""
        return self.kind("mlp")

    @property
    def writers(self) -> tuple[Group, ...]:
        """Whatever writes."""
        return tuple(group for group in self.all if group.writes)

    @property
    def dictionaries(self) -> tuple[Group, ...]:
        """What is attached and writes."""
        return tuple(group for group in self.attached if group.writes)

    @property
    def ports(self) -> tuple[Port, ...]:
        """The ports through which something in this model reads, in the order of ``READINGS``."""
        ports = {port for group in chain(self.all, self.attached) for port in group.ports}
        return tuple(port for port in READINGS if port in ports)

    def readers(self, port: str) -> tuple[Group, ...]:
        """Whatever reads through a port.

        Raises:
            UsageError: nothing does.
        """
        readers = tuple(group for group in chain(self.all, self.attached) if port in group.ports)
        if readers:
            return readers
        if port == "enc":
            raise UsageError(
                "nothing that is attached to this model reads from its stream",
                expected="a dictionary with an encoder",
                do="attach one: vw.open(model, attach=[path]), --attach PATH",
            )
        if port in HEAD_PORTS:
            raise no_heads()
        if port in NEURON_PORTS and not self.mlps:
            raise no_mlps()
        raise UsageError(
            f"this model has no port {port!r}", expected=f"one of {', '.join(self.ports)}", do="choose one of these"
        )

    def sited(self, state: int) -> tuple[Group, ...]:
        """Whatever reads a state."""
        return tuple(group for group in self.all if group.reads == state)

    def of(self, label: Label | str) -> Group:
        """The group of a component, a neuron or one of their ports.

        Raises:
            UsageError: this model has no such component.
        """
        label = parse(label) if isinstance(label, str) else label
        whole = replace(label, port=None, state=None)
        units = {"neuron": Label("mlp", label.layer), "feature": Label("dictionary", name=label.name)}
        group = self._by_label.get(units.get(label.kind, whole))
        beyond = group is not None and label.kind in units and (label.index or 0) >= group.width
        late = (
            group is not None and label.state is not None and not (len(group.writes) > 1 and group.reaches(label.state))
        )
        if group is None or beyond or late:
            raise UsageError(
                f"this checkpoint has no {label}", expected="a component that it has", do="list stream.components"
            )
        return group

    def writer(self, name: str) -> str:
        """The label of a component that writes, such as ``"L5H3"`` for ``"5.3"``.

        Raises:
            UsageError: this model has no such component, or it does not write as a whole.
        """
        label, group = str(parse(name)), self.of(name)
        if not group.writes or label not in group.labels:
            raise UsageError(
                f"{name} is not a writer",
                expected="a head, an MLP, a bias, embed or pos, without a port, such as L5H3 or L5.mlp",
                do="name one of these",
            )
        return label


def spans(group: Group) -> tuple[tuple[int, int], ...]:
    """States ``[first, end)`` in which what it has written is the same: one span, but of a cross-layer dictionary.

    The last one has no end.
    """
    return tuple(pairwise((*group.writes, NO_END)))


def ports_of(part: Part) -> tuple[Port, ...]:
    """Through which ports a part reads."""
    return HEAD_PORTS if isinstance(part, Attention) else ("gate", "up") if part.gated else ("in",)


def group_id(group: Group | str) -> str:
    """The id of a group, or the id itself."""
    return group if isinstance(group, str) else group.id


def no_heads() -> UsageError:
    """What is said where a question needs attention heads and the checkpoint holds none."""
    return UsageError(
        "this checkpoint holds no attention head",
        expected="at least one layer with an output projection",
        do="open a checkpoint with its attention tensors",
    )


def no_mlps() -> UsageError:
    """What is said where a question needs MLPs and the checkpoint holds none."""
    return UsageError(
        "this checkpoint holds no MLP",
        expected="at least one layer with a map back from its neurons",
        do="ask about heads; or open a checkpoint with its MLP tensors",
    )


def check_port(port: str) -> None:
    """Refuse what is not a port of any model."""
    if port not in READINGS:
        raise UsageError(f"no port {port!r}", expected=", ".join(READINGS), do="choose one of these ports")


def check_writers(writers: str) -> None:
    """Refuse what names no set of writers."""
    if writers not in ("heads", "all"):
        raise UsageError(f"no writers {writers!r}", expected="heads or all", do="choose one of these")
