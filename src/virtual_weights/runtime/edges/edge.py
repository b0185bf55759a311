"""An edge, one writer and one port of one later reader: what of a run belongs to each, and its exact removal."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.runtime.running.hooks import (
    Hook,
    Place,
    Signal,
    module_name,
    module_named,
    module_of,
    split,
    watching,
    wide,
)
from virtual_weights.stream import Group, Label, Stream, parse
from virtual_weights.stream.group import READINGS, Port


@final
@dataclass(frozen=True)
class Edge:
    """The direct edge of a writer into one port of a reader, and nothing else of either.

    Attributes:
        writer: a head, an MLP, a neuron or an embedding.
        reader: a head's ``Q``, ``K`` or ``V``, an MLP's or neuron's ``gate``, ``up`` or ``in``, or the unembedding.
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
        head = (read.index or 0) if read.kind == "head" else 0
        kv_groups, label = target.kv_groups(port), str(replace(read, port=None))
        kv_group = kv_groups[head] if kv_groups else None
        sharing = zip(target.labels, kv_groups, strict=False)  # none where no head shares this port
        others = tuple(other for other, group in sharing if group == kv_group and other != label)
        index = head // target.shared(port)
        return cls(written, read, port, source.id, target.id, target.reads, index, kv_group, others)

    def maps(self, stream: Stream, like: Tensor) -> Tensor:
        """The reader's effective map R~, (k, d), in the dtype and on the device of ``like``."""
        return stream.read(self.port, self.target).maps[self.map_index, self.rows].to(like)

    @property
    def rows(self) -> slice:
        """Which rows of the map: all, or a neuron's."""
        return _rows(self.reader)


@final
@dataclass(frozen=True, eq=False)
class Written:
    """What some components of one group write: ``O z`` for z that the model's run shows.

    Attributes:
        stream: the model.
        group: the group.
        components: which of its m components.
        rows: which of their k inner activations: all, or a neuron's.
    """

    stream: Stream
    group: Group
    components: slice
    rows: slice

    @classmethod
    def of(cls, stream: Stream, label: Label, shared: int = 1) -> Written:
        """What one component or neuron writes; of a head, with the others of the ``shared`` that it stands among."""
        first = (label.index or 0) // shared * shared if label.kind == "head" else 0
        return cls(stream, stream.groups.of(label), slice(first, first + shared), _rows(label))

    @property
    def place(self) -> Place:
        """Where z is seen; of embeddings ``O z`` itself."""
        return "written" if self.group.kind in ("embed", "pos") else "inner", self.group.id

    def __call__(self, signals: Mapping[Place, Tensor]) -> Tensor:
        """``O z``, (B, T, d), of what a run showed at ``place``."""
        signal = signals[self.place]
        if self.place[0] == "written":
            return signal
        z = signal[..., self.components, self.rows]
        maps = self.stream.write(self.group)[self.components, :, self.rows].to(z)
        return torch.einsum("mdk,btmk->btd", maps, z)


def affected(stream: Stream, edge: Edge) -> Written | None:
    """What the heads (or MLP, or neuron) that read through an edge write; None of the unembedding."""
    target = stream.groups[edge.target]
    return Written.of(stream, edge.reader, target.shared(edge.port)) if target.writes else None


def group_readers(stream: Stream, port: str) -> tuple[str, ...]:
    """The readers of one port, of those that share a map the first alone: ``("L0H0.K", "L0H3.K", ...)``.

    Raises:
        UsageError: nothing in this model reads through it.
    """
    return tuple(label for group in stream.groups.readers(port) for label in group.readers(port)[:: group.shared(port)])


def next_token_loss(logits: Tensor, tokens: Tensor, first: int = 1) -> Tensor:
    """Mean loss in nats of predicting tokens ``first``, ``first + 1``, ... of each sequence, (B,).

    Args:
        logits: (B, T, V).
        tokens: (B, T).
        first: the first token that counts, at least 1; half the length where the second half repeats the first.
    """
    predicted = wide(logits[:, first - 1 : -1])
    return torch.nn.functional.cross_entropy(predicted.mT, tokens[:, first:], reduction="none").mean(1)


def _rows(label: Label) -> slice:
    if label.kind != "neuron" or label.index is None:
        return slice(None)
    return slice(label.index, label.index + 1)


Replacement = Literal["mean", "resample"]
Scalars = Literal["held", "move"]


def starting_group(stream: Stream, edges: Sequence[Edge]) -> Group:
    """Where a run without some edges must start: the attention of the first block that reads one, or the unembedding.

    Nothing before it depends on these edges.
    """
    state = min(edge.state for edge in edges)
    starts = (*stream.groups.heads, stream.groups["unembed"])
    return [group for group in starts if group.reads is not None and group.reads <= state][-1]


@contextmanager
def restarted(model: nn.Module, stream: Stream, group: Group, state: Tensor) -> Generator[None]:
    """Let the blocks before a group's give what they gave in an earlier run, at no cost.

    The model goes on as it does after them, by its own modules: embeddings, masks and rotary angles are made as ever.
    Hooks inside the blocks left out do not fire.

    Args:
        model: what runs, see ``load``.
        stream: the same model.
        group: the attention of the first block that runs; the unembedding where none does.
        state: (B, T, d) the state ``group.reads``, as an earlier run on the same tokens showed it.
    """
    before = takewhile(lambda earlier: earlier != group, stream.groups.heads)
    names = [module_name(stream, "norm", earlier.id).rpartition(".")[0] for earlier in before]
    blocks: list[Any] = [module_named(model, stream, name) for name in names]
    overrides = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *_, **__: state
    try:
        yield
    finally:
        for block, override in zip(blocks, overrides, strict=True):
            del block.forward
            if override is not None:
                block.forward = override


@final
@dataclass(frozen=True, eq=False)
class Removal:
    """How an edge is removed.

    The reader's port, before any rotary embedding, gets ``f R~ (r(t) - O z(t)) / s(t)`` added, where r replaces what
    the writer writes. Where scalars move, it gets ``R~ (x'/s(x') - x/s(x))`` with ``x' = x + f (r - O z)``.

    Attributes:
        replacement: r is the writer's mean over tokens, or what it writes at the same place of the next sequence.
        scalars: the norm scalar is held at its value of the run, or follows the stream without the edge.
        fraction: f, how much of it is removed; 1 is all.
        means: writers' means, (d,) each, by label; a writer that is not there gets its mean over the pass.
    """

    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    fraction: float = 1.0
    means: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        if self.replacement not in ("mean", "resample") or self.scalars not in ("held", "move"):
            raise UsageError(
                f"a removal by {self.replacement!r} with scalars {self.scalars!r}",
                expected="mean or resample; held or move",
                do="choose one of these",
            )

    def change(self, stream: Stream, edge: Edge, written: Tensor, x: Tensor) -> Tensor:
        """What is added to the port: (B, T, k), of ``O z`` (B, T, d) and the stream x (B, T, d) at the reader."""
        x = wide(x)
        written = written.to(x)
        if self.replacement == "mean":
            mean = self.means.get(str(edge.writer))
            substitute = written.mean((0, 1)) if mean is None else mean.to(written)
        else:
            substitute = written.roll(-1, 0)
        moved, s = self.fraction * (substitute - written), stream.scale(x)[..., None]
        if self.scalars == "move":
            without = x + moved
            return (without / stream.scale(without)[..., None] - x / s) @ edge.maps(stream, x).T
        return moved @ edge.maps(stream, x).T / s


@contextmanager
def removed(
    model: nn.Module,
    stream: Stream,
    edges: Sequence[Edge],
    removal: Removal | None = None,
    earlier: Mapping[Place, Tensor] | None = None,
) -> Generator[None]:
    """Let the model run without an edge; several edges along the batch, each removed from its own block of it.

    With E edges a batch has E times B sequences, and block i runs without edge i alone. All else is the model's own.

    Args:
        model: what runs, see ``load``.
        stream: the same model, with the norm's gain in its readers.
        edges: one per block of the batch.
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
    removal = removal or Removal()
    writes = [Written.of(stream, edge.writer) for edge in edges]
    places: set[Place] = {*(("state", edge.state) for edge in edges), *(write.place for write in writes)}
    signals: dict[Place, Tensor] = dict(earlier or {})

    def see(signal: Signal, where: Any, tensor: Tensor) -> None:
        signals[signal, where] = tensor

    def without(role: str, group: str) -> Hook:
        indices = [i for i, edge in enumerate(edges) if (READINGS[edge.port], edge.target) == (role, group)]

        def hook(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
            output = output.clone()
            for i in indices:
                edge, block = edges[i], _block(len(output), len(edges), i, removal.replacement)
                port = split(stream, role, group, output)[block]  # a view: what is added stays
                values = port[..., edge.map_index, :] if edge.reader.kind == "head" else port
                written = writes[i](signals).expand(len(output), -1, -1)[block]
                values[..., edge.rows] += removal.change(stream, edge, written, signals["state", edge.state][block])
            return output

        return module_of(model, stream, role, group).register_forward_hook(hook)

    with ExitStack() as stack:
        stack.enter_context(watching(model, stream, places, see))
        for role, group in {(READINGS[edge.port], edge.target) for edge in edges}:
            stack.callback(without(role, group).remove)
        yield


def _block(size: int, edges: int, i: int, replacement: Replacement) -> slice:
    sequences = size // edges
    if size % edges or (replacement == "resample" and sequences < 2):
        raise UsageError(
            f"a batch of {size} sequences for {edges} edges",
            expected=f"a multiple of {edges if replacement == 'mean' else 2 * edges} sequences",
            do="repeat the batch once per edge",
        )
    return slice(i * sequences, (i + 1) * sequences)
