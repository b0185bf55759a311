"""All writers, or all readers of one port, as maps on the stream, in pieces whose Grams are formed when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import WORKSPACE_BYTES, MapStack, accumulate
from virtual_weights.linalg.gram_blocks import ROWS, GramBlock, ThinBlock, WideBlock, tile_entries
from virtual_weights.record import Axis
from virtual_weights.stream import Group, Stream, centred
from virtual_weights.stream.effective import token_parts
from virtual_weights.stream.group import NO_END, Port, Writers, spans

_THIN = 256  # heads of a piece: fewer make thin products, more leave less to skip where writers come too late
_WIDE_BYTES = 128 * 2**20  # Grams of a piece of wide maps
_MOST_WIDE = 32


@final
@dataclass(frozen=True, eq=False)
class Piece:
    """Some maps of one kind on one side.

    Attributes:
        name: for files: the first and the last group.
        kind: ``"head"``, ``"mlp"``, ...; means are over all maps of a side of one kind.
        position: (n,) the state that each reads, or in which its write first appears.
        end: the state from which another map stands for the same writer, see ``spans``.
        maps: makes the maps: a stack of thin factors, or for each map its rows (m, d) in parts.
        width: d.
        entries: numbers held while it is in use, working tiles included.
        loading: numbers held beside that while it is made ready.
        rows: of all its maps together: forming their Grams takes ``rows d^2`` multiplications and additions.
    """

    name: str
    kind: str
    position: Tensor
    maps: Callable[[], MapStack | Sequence[Iterable[Tensor]]]
    width: int
    entries: int
    loading: int
    rows: int
    end: int = NO_END

    @property
    def count(self) -> int:
        """How many maps."""
        return len(self.position)

    def load(self, dtype: torch.dtype, device: str) -> GramBlock:
        """The maps, ready to have their Grams formed."""
        maps = self.maps()
        stacked = isinstance(maps, MapStack)
        return ThinBlock(maps, dtype, device) if stacked else WideBlock(maps, self.width, dtype, device)


@final
@dataclass(frozen=True, eq=False)
class MapSide:
    """Maps ``M_i`` on one side of the stream; only ``G_i = M_i^T M_i`` (of a writer ``O O^T``), (d, d), matters here.

    Attributes:
        axis: their names, in the order of the pieces.
        pieces: the maps.
        width: d.
    """

    axis: Axis
    pieces: tuple[Piece, ...]
    width: int

    @property
    def position(self) -> Tensor:
        """(n,) of all maps."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *(piece.position for piece in self.pieces)])

    @property
    def end(self) -> Tensor:
        """(n,) of all maps."""
        ends = [torch.full_like(piece.position, piece.end) for piece in self.pieces]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *ends])


def component_axis(name: str, groups: Iterable[Group], port: str = "") -> Axis:
    """The components of groups, in order; as readers of a port, with its name and groups where heads share maps."""
    groups = tuple(groups)
    labels = tuple(label for group in groups for label in (group.readers(port) if port else group.labels))
    return Axis(name, labels, tuple(kv_group for group in groups for kv_group in group.kv_groups(port)))


def thin_pieces(
    groups: Sequence[Group], position: Tensor, stack: Callable[[Sequence[Group]], MapStack], width: int
) -> tuple[Piece, ...]:
    """Maps of attentions in thin factors, some attentions to a piece.

    Args:
        groups: the attentions.
        position: (n,) of all their maps, in order.
        stack: makes the maps of some of them.
        width: d.
    """
    if not groups:
        return ()
    per_group = len(position) // len(groups)
    pieces = -(-len(position) // _THIN)
    step = max(1, -(-len(groups) // pieces))
    made: list[Piece] = []
    for start in range(0, len(groups), step):
        some = groups[start : start + step]
        count = len(some) * per_group
        made.append(
            Piece(
                _named(some),
                "head",
                position[start * per_group : start * per_group + count],
                partial(stack, some),
                width,
                count * (some[0].width * (width + 3 * some[0].width) + tile_entries(width)),
                count * some[0].width * (width + 8 * some[0].width),
                count * some[0].width,
            )
        )
    return tuple(made)


Rows = Callable[[Group], Iterable[Tensor]]
"""The rows (m, d) of one group's map on the stream, in parts."""


def wide_pieces(
    stream: Stream, groups: Sequence[Group], position: Sequence[int | None], rows: Rows
) -> tuple[Piece, ...]:
    """Maps about as wide as the stream or wider, those of one kind together as far as their Grams are small.

    Args:
        stream: the model.
        groups: one map each.
        position: of each.
        rows: makes the map of one.
    """
    width = stream.d_model
    step = max(1, min(_MOST_WIDE, _WIDE_BYTES // (2 * width**2)))
    made: list[Piece] = []
    for kind in dict.fromkeys(group.kind for group in groups):
        at = [i for i, group in enumerate(groups) if group.kind == kind]
        for start in range(0, len(at), step):
            some = tuple(groups[i] for i in at[start : start + step])
            states = torch.tensor([position[i] for i in at[start : start + step]], dtype=torch.int64)
            maps = partial(_constant if some[0].constant else _wide, rows, some)
            entries = len(some) * (width**2 // 2 + tile_entries(width))
            heights = [height(stream, group) for group in some]
            at_once = max(heights) if kind == "mlp" else min(max(heights), ROWS)
            loading = width**2 + (at_once + 3 * min(at_once, ROWS)) * width
            made.append(Piece(_named(some), kind, states, maps, width, entries, loading, sum(heights)))
    return tuple(made)


def height(stream: Stream, group: Group) -> int:
    """Rows of the map of a group other than an attention: neurons, features, tokens or positions."""
    if group.kind == "pos":
        return stream.spec.n_positions or 0
    return (stream.spec.vocab or 0) if group.kind in ("embed", "unembed") else group.width


def _wide(rows: Rows, groups: Sequence[Group]) -> list[Iterable[Tensor]]:
    return [_Again(partial(rows, group)) for group in groups]


def _constant(rows: Rows, groups: Sequence[Group]) -> MapStack:
    """Maps of one row each."""
    return MapStack.unplaced(torch.stack([torch.cat(list(rows(group))) for group in groups]))


@final
class _Again:
    """A map that is read anew whenever it is gone through."""

    def __init__(self, make: Callable[[], Iterable[Tensor]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._make())


def wide_readers(stream: Stream, port: Port, rows: Rows | None = None) -> MapSide:
    """MLPs, or the unembedding.

    Args:
        stream: the model.
        port: through which they read.
        rows: makes the map of one; None takes the read map itself.

    Raises:
        UsageError: the model has no such port.
    """
    groups = stream.groups.readers(port)
    made = rows or partial(read_rows, stream, port)
    pieces = wide_pieces(stream, groups, [group.reads for group in groups], made)
    return MapSide(component_axis("reader", groups, port), pieces, stream.d_model)


def writing_side(
    stream: Stream, writers: Writers, heads: Sequence[Piece], made: Callable[[Rows], Rows] | None = None
) -> MapSide:
    """Writing heads, and where all writers are wanted everything else that writes after them.

    Args:
        stream: the model.
        writers: which.
        heads: pieces of all heads.
        made: makes the maps of the others of their transposed write maps; None takes these themselves.
    """
    axis = component_axis("writer", stream.groups.heads)
    if writers == "heads":
        return MapSide(axis, tuple(heads), stream.d_model)

    def rows(state: int | None = None) -> Rows:
        write = partial(write_rows, stream, state=state)
        return write if made is None else made(write)

    groups = [group for group in stream.groups.writers if group.kind != "head"]
    pieces = wide_pieces(stream, groups, [group.first for group in groups], rows())
    order = [group.id for kind in dict.fromkeys(g.kind for g in groups) for group in groups if group.kind == kind]
    for group in stream.groups.dictionaries:
        for first, end in spans(group):
            (piece,) = wide_pieces(stream, [group], [first], rows(first))
            pieces = (*pieces, replace(piece, name=f"{group.id}.{first}", end=end))
            order.append(group.labels[0] if len(group.writes) == 1 else f"{group.labels[0]}@{first}")
    return MapSide(Axis("writer", (*axis.labels, *order)), (*heads, *pieces), stream.d_model)


def read_rows(stream: Stream, port: Port, group: Group) -> Iterator[Tensor]:
    """The read map of an MLP's port, a dictionary or the unembedding, in parts."""
    if group.kind == "unembed":
        yield from token_parts(stream, "unembed")
    elif group.kind == "dictionary":
        for some in _parts(group):
            yield stream.attached[group.id].read(stream, some).maps[0]
    else:
        yield stream.read(port, group).maps[0]


def write_rows(stream: Stream, group: Group, state: int | None = None) -> Iterator[Tensor]:
    """The transposed write map of an MLP, a dictionary (by a state), an embedding or a bias, in parts."""
    if group.kind == "embed":
        yield from token_parts(stream, "embed")
    elif group.kind == "dictionary":
        for some in _parts(group):
            yield centred(stream, stream.attached[group.id].write(stream, state, some)[0].T, -1, stream.dtype)
    else:
        yield stream.write(group)[0].T


def _parts(group: Group) -> Iterator[slice]:
    """The features of a dictionary, some at a time."""
    return (slice(start, min(start + ROWS, group.width)) for start in range(0, group.width, ROWS))


def read_gram(stream: Stream, port: Port, group: Group) -> Tensor:
    """``R~^T R~`` of an MLP's port or the unembedding, (d, d) float64."""
    return gram_of(read_rows(stream, port, group), stream.d_model)


def write_gram(stream: Stream, group: Group) -> Tensor:
    """``O O^T`` of an MLP, an embedding or a bias, (d, d) float64."""
    return gram_of(write_rows(stream, group), stream.d_model)


def gram_of(parts: Iterable[Tensor], d: int) -> Tensor:
    """``rows^T rows``, (d, d) float64, of rows (m, d) in any dtype, in parts."""
    gram = torch.zeros(d, d, dtype=accumulate)
    for part in parts:
        for chunk in part.split(max(1, WORKSPACE_BYTES // (8 * d))):
            chunk = chunk.to(accumulate)
            gram.addmm_(chunk.T, chunk)
    return gram


def _named(groups: Sequence[Group]) -> str:
    """The first group and the last."""
    return groups[0].id if len(groups) == 1 else f"{groups[0].id}-{groups[-1].id}"
