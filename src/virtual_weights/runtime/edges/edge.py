"""An edge, one writer and one port of one later reader: what of a run belongs to each; exact removal, of sets too."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.dictionary_writes import decoder_hooks, pre_activations, stands
from virtual_weights.runtime.edges.written import Written, unit_rows
from virtual_weights.runtime.running.hooks import (
    Hook,
    Place,
    Signal,
    module_of,
    port_features,
    watching,
    wide,
)
from virtual_weights.stream import Label, Stream, parse
from virtual_weights.stream.effective import as_seen, projection
from virtual_weights.stream.group import READINGS, Port


@final
@dataclass(frozen=True)
class Edge:
    """The direct edge of a writer into one port of a reader, and nothing else of either.

    Attributes:
        writer: a head, an MLP, a neuron, a feature of an attached dictionary, or an embedding.
        reader: a head's ``Q``, ``K`` or ``V``, an MLP's or neuron's ``gate``, ``up`` or ``in``, a feature's ``enc``, or
            the unembedding.
        port: the reader's port.
        source: id of the writer's group.
        target: id of the reader's group.
        state: number of the state of the stream that the reader reads.
        map_index: which of the port's maps, (m, k, d), it reads through.
        kv_group: the key/value head through which it reads with others, None where it shares none.
        shared_with: the other heads that read through it.
    """

    writer: Label
    reader: Label
    port: Port
    source: str
    target: str
    state: int
    map_index: int = 0
    kv_group: str | None = None
    shared_with: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``"L16H0 -> L18H6.K"``."""
        return f"{self.writer} -> {self.reader}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for edges that are one edge under several names, those of the heads that share the port."""
        return str(self.writer), self.kv_group or str(self.reader), self.port

    @classmethod
    def of(cls, stream: Stream, writer: str, reader: str) -> Edge:
        """The edge between two names, e.g. ``Edge.of(stream, "L16H0", "L18H6.K")``.

        Raises:
            UsageError: a name is not a writer or not a port of this model, the writer cannot reach the reader, or it
                writes the same at every token, so that its mean replaces nothing.
        """
        written, read = parse(writer), parse(reader)
        source, target = stream.groups.of(written), stream.groups.of(read)
        if written.port or not source.writes or source.constant:
            raise UsageError(
                f"{writer} is not a writer, or writes the same at every token",
                expected="a head, an MLP, a neuron or an embedding of this model, such as L5H3, L5.mlp, L5N7 or embed",
                do="name one of these",
            )
        silent = next(
            (n for n in {source.id, target.id} & {g.id for g in stream.groups.attached} if not stands(stream, n)), None
        )
        if silent is not None:
            raise UsageError(
                f"{silent} does not read a state and write for a part of the model",
                expected="a transcoder, or another dictionary with an encoder and with decoders that stand for a part",
                do="ask about its weights: vweights neurons, composition, channel",
            )
        name = "unembed" if read.kind == "unembed" else read.port
        port: Port | None = next((port for port in target.ports if port == name), None)
        if port is None or target.reads is None:
            raise UsageError(
                f"{reader} is not a port that reads the stream",
                expected=f"a component of this model with its port ({', '.join(target.ports) or 'none'}), e.g. L5H3.K",
                do="name one of these",
            )
        if not source.reaches(target.reads):
            raise UsageError(
                f"{writer} cannot reach {reader}", expected="a writer before the reader", do="exchange the two"
            )
        if len(source.writes) > 1:  # of a cross-layer dictionary, as much as it has written by then
            written = replace(written, state=target.reads)
        head = (read.index or 0) if read.kind == "head" else 0
        kv_groups, label = target.kv_groups(port), str(replace(read, port=None))
        kv_group = kv_groups[head] if kv_groups else None
        sharing = zip(target.labels, kv_groups, strict=False)  # none where no head shares this port
        others = tuple(other for other, group in sharing if group == kv_group and other != label)
        index = head // target.shared(port)
        return cls(written, read, port, source.id, target.id, target.reads, index, kv_group, others)

    def maps(self, stream: Stream, like: Tensor) -> Tensor:
        """The reader's effective map R~, (k, d), in the dtype and on the device of ``like``."""
        if self.port == "enc":
            first, stop, _ = self.rows.indices(stream.groups[self.target].width)
            return stream.attached[self.target].read(stream, slice(first, stop)).maps[0].to(like)
        return projection(stream, self.port, self.target).maps[self.map_index, self.rows].to(like)

    @property
    def rows(self) -> slice:
        """Which rows of the map: all, or a neuron's."""
        return unit_rows(self.reader)

    @property
    def input(self) -> tuple[Port, str, int, int | None]:
        """Equal for edges into the same rows of the same map."""
        return self.port, self.target, self.map_index, self.rows.start


@final
@dataclass(frozen=True)
class EdgeSet:
    """Edges that are removed at once, or others into the same readers.

    Attributes:
        edges: the set.
        removes: ``"these"``; ``"others"``, whatever else reaches a reader of the set through its port; or ``"all"``
            that reaches one. What the same reader gets from biases stays.
        elsewhere: edges into further readers, from which all is removed.
    """

    edges: tuple[Edge, ...]
    removes: Literal["these", "others", "all"] = "these"
    elsewhere: tuple[Edge, ...] = ()

    @property
    def state(self) -> int:
        """The first state of the stream that one of its readers reads."""
        return min(edge.state for edge in (*self.edges, *self.elsewhere))

    @property
    def single(self) -> Edge | None:
        """The edge that is removed, where it is one alone."""
        return self.edges[0] if len(self.edges) == 1 and self.removes == "these" and not self.elsewhere else None

    @property
    def cuts(self) -> list[EdgeSet]:
        """The same reader by reader: of each what is removed from it."""
        cuts: dict[Any, EdgeSet] = {}
        for edge in self.edges:
            cut = cuts.get(edge.input, EdgeSet((), self.removes))
            cuts[edge.input] = replace(cut, edges=(*cut.edges, edge))
        return [*cuts.values(), *(EdgeSet((edge,), "all") for edge in self.elsewhere)]

    def places(self, stream: Stream) -> set[Place]:
        """What its removal needs of a run: what writers write from, and the states that readers read."""
        places: set[Place] = {("state", edge.state) for edge in (*self.edges, *self.elsewhere)}
        writers = () if self.removes == "all" else self.edges
        return places.union(*(Written.of(stream, edge.writer).places for edge in writers))


def affected(stream: Stream, edge: Edge) -> Written | None:
    """What the heads (or MLP, or neuron) that read through an edge write; None of the unembedding and of features."""
    target = stream.groups[edge.target]
    own = target.writes and target.kind != "dictionary"
    return Written.of(stream, edge.reader, target.shared(edge.port)) if own else None


def group_readers(stream: Stream, port: str) -> tuple[str, ...]:
    """The readers of one port, of those that share a map the first alone: ``("L0H0.K", "L0H3.K", ...)``.

    Raises:
        UsageError: nothing in this model reads through it.
    """
    return tuple(label for group in stream.groups.readers(port) for label in group.readers(port)[:: group.shared(port)])


Replacement = Literal["mean", "resample", "partner"]
Scalars = Literal["held", "move"]


@final
@dataclass(frozen=True, eq=False)
class Removal:
    """How edges are removed.

    The reader's port, before any rotary embedding, gets ``f R~ m(t) / s(t)`` added, where ``m = r - O z``, summed over
    the writers that are removed from it, and r replaces what one writes. Where all but some writers are removed, m is
    ``r - x`` of the state x as a whole less those of the writers that are kept. Where scalars move, the port gets
    ``R~ (x'/s(x') - x/s(x))`` with ``x' = x + f m``. O z, x and s are those of the run without the edges: where one of
    them leads to the writer of another, the latter writes what it then writes.

    Attributes:
        replacement: r is the writer's mean over tokens; what it writes at the same place of another sequence, the next
            one; or what it writes there in the run of the sequence's partner.
        scalars: the norm scalar is held at its value of the run, or follows the stream without the edges.
        fraction: f, how much of them is removed; 1 is all.
        means: means, (d,) each, of writers by label and of states by number; what is not there gets its mean over the
            pass.
        partners: what the run of each sequence's partner showed, at ``EdgeSet.places``.
    """

    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    fraction: float = 1.0
    means: Mapping[str | int, Tensor] = field(default_factory=dict[str | int, Tensor])
    partners: Mapping[Place, Tensor] = field(default_factory=dict[Place, Tensor])

    def __post_init__(self) -> None:
        if self.replacement not in ("mean", "resample", "partner") or self.scalars not in ("held", "move"):
            raise UsageError(
                f"a removal by {self.replacement!r} with scalars {self.scalars!r}",
                expected="mean, resample or partner; held or move",
                do="choose one of these",
            )

    def change(self, stream: Stream, edges: EdgeSet, signals: Mapping[Place, Tensor]) -> Tensor:
        """What is added to the port that some edges lead into, the same of all: (B, T, k), of what a run showed."""
        edge, state = edges.edges[0], edges.edges[0].state
        x = wide(signals["state", state])
        moved = torch.zeros_like(x)
        if edges.removes != "these":
            moved = moved + self._replaced(state, x, self.partners.get(("state", state)))
        if edges.removes != "all":
            sign = 1 if edges.removes == "these" else -1
            moved = moved + sign * sum(self._without(stream, edge, signals, x) for edge in edges.edges)
        moved, s = self.fraction * moved, stream.scale(x, edge.target)[..., None]
        if self.scalars == "move":
            without = x + moved
            return (without / stream.scale(without, edge.target)[..., None] - x / s) @ edge.maps(stream, x).T
        return moved @ edge.maps(stream, x).T / s

    def _without(self, stream: Stream, edge: Edge, signals: Mapping[Place, Tensor], x: Tensor) -> Tensor:
        """``r - O z`` of an edge's writer, (B, T, d)."""
        write = Written.of(stream, edge.writer)
        partner = write(self.partners).expand_as(x) if self.partners else None
        return self._replaced(str(edge.writer), write(signals).to(x).expand_as(x), partner)

    def _replaced(self, name: str | int, value: Tensor, partner: Tensor | None) -> Tensor:
        if partner is not None:
            return partner.to(value) - value
        if self.replacement == "mean":
            mean = self.means.get(name)
            return (value.mean((0, 1)) if mean is None else mean.to(value)) - value
        if self.replacement == "partner":
            raise UsageError(
                "there are no partners to take a writer's output from",
                expected="a run of pairs of prompts",
                do="make the run with Run.on_pairs(stream, clean, corrupted)",
            )
        return value.roll(-1, 0) - value


@contextmanager
def removed(
    model: nn.Module,
    stream: Stream,
    edges: Sequence[Edge | EdgeSet],
    removal: Removal | None = None,
    earlier: Mapping[Place, Tensor] | None = None,
) -> Generator[None]:
    """Let the model run without an edge, or a set of them; several along the batch, each removed from its own block.

    With E edges or sets a batch has E times B sequences; block i runs without edge i alone, else as the model does.

    Args:
        model: what runs, see ``load``.
        stream: the same model, with the norm's gain in its readers.
        edges: one edge or set per block of the batch.
        removal: ``Removal()`` where None.
        earlier: what an earlier run on the same batch showed of blocks that do not run in this one, see ``restarted``.

    Raises:
        UsageError: readers without gain; while it runs, a batch that is no multiple of the edges, or fewer than two
            sequences where each gets another's.

    Example:
        >>> with removed(model, stream, [Edge.of(stream, "L16H0", "L18H6.K")]):  # doctest: +SKIP
        ...     logits = model(tokens).logits
    """
    if not stream.folded:
        raise UsageError(
            "removal needs the norm's gain in the readers",
            expected="norm gains folded into the readers",
            do="open the model without fold=False (--no-fold)",
        )
    sets = [edge if isinstance(edge, EdgeSet) else EdgeSet((edge,)) for edge in edges]
    stream = as_seen(stream, "enc")
    removing = _Removing(model, stream, sets, removal or Removal(), dict(earlier or {}))
    with ExitStack() as stack:
        places = {place for edges in sets for place in edges.places(stream)}
        stack.enter_context(watching(model, stream, places, removing.see))
        for hook in removing.hooks():
            stack.callback(hook.remove)
        yield


@final
@dataclass(frozen=True, eq=False)
class _Removing:
    """Hooks that remove sets of edges, each from its own block of a batch, and what the run shows them."""

    model: nn.Module
    stream: Stream
    sets: Sequence[EdgeSet]
    how: Removal
    signals: dict[Place, Tensor]

    def see(self, signal: Signal, where: Any, tensor: Tensor) -> None:
        self.signals[signal, where] = tensor

    def hooks(self) -> Iterator[Hook]:
        """On what gives a port, and where the features write whose encoders read through one."""
        for role, group in dict.fromkeys(_module(cut) for _, cut in self.cuts):
            if group in self.stream.attached:
                yield from decoder_hooks(self.model, self.stream, group, partial(self._activations, group))
            else:
                module = module_of(self.model, self.stream, role, group)
                yield module.register_forward_hook(
                    partial(self._port, [c for c in self.cuts if _module(c[1]) == (role, group)])
                )

    @cached_property
    def cuts(self) -> list[tuple[int, EdgeSet]]:
        """Blocks, and what is removed there from one reader."""
        return [(i, cut) for i, edges in enumerate(self.sets) for cut in edges.cuts]

    def _change(self, i: int, cut: EdgeSet, size: int) -> tuple[slice, Tensor]:
        """The block of a batch, and what is added to its port."""
        block = _block(size, len(self.sets), i, self.how)
        shown = {place: self.signals[place] for place in cut.places(self.stream)}
        shown |= {place: x for place, x in self.signals.items() if place[0] == "features"}
        shown = {place: x.expand(size, *x.shape[1:])[block] for place, x in shown.items()}
        return block, self.how.change(self.stream, cut, shown)

    def _port(self, cuts: Sequence[tuple[int, EdgeSet]], _module: nn.Module, _given: object, output: Tensor) -> Tensor:
        output = output.clone()
        for i, cut in cuts:
            edge, (block, moved) = cut.edges[0], self._change(i, cut, len(output))
            features = port_features(self.stream, edge.port, edge.target)
            features = features[edge.map_index] if edge.reader.kind == "head" else features
            output[block][..., features[edge.rows]] += moved
        return output

    def _activations(self, name: str) -> Tensor:
        """By how much the features of a dictionary change, (B, T, F)."""
        states = self.signals["state", self.stream.groups[name].reads or 0]
        before, activation = pre_activations(self.stream, name, states), self.stream.attached[name].part.activation
        after = before.clone()
        for i, cut in self.cuts:
            if cut.edges[0].target == name:
                block, moved = self._change(i, cut, len(states))
                after[block][..., cut.edges[0].rows] += moved
        self.signals["features", name] = activation(after)  # what they write from now on follows from it
        return self.signals["features", name] - activation(before)


def _module(cut: EdgeSet) -> tuple[str, str]:
    """The role and the group of the module that gives a port."""
    return READINGS[cut.edges[0].port], cut.edges[0].target


def _block(size: int, edges: int, i: int, removal: Removal) -> slice:
    sequences = size // edges
    rolls = removal.replacement == "resample" and not removal.partners
    if size % edges or (rolls and sequences < 2):
        raise UsageError(
            f"a batch of {size} sequences for {edges} edges",
            expected=f"a multiple of {2 * edges if rolls else edges} sequences",
            do="repeat the batch once per edge",
        )
    return slice(i * sequences, (i + 1) * sequences)
