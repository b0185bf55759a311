"""Path expansion: through which components what a writer writes comes to a reader, linear at a point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import Convention, Part, Point, describe, frozen_blocks, inverse_scalar
from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.linalg import LinearMap, Progress, accumulate
from virtual_weights.linalg.decompose import triangular
from virtual_weights.linalg.linear_map import halves
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Component, Label, Stream, parse, virtual_weight
from virtual_weights.stream.operating_point import OperatingPoint
from virtual_weights.stream.question import Question
from virtual_weights.stream.virtual import reading_map, writing_map

MOST_PATHS = 200_000
"""More paths than this are not listed: of order 3, 300 components give 45,000; each order multiplies by hundreds."""

_MEANING = {
    "strength": ("||writer unit -> reader unit||", "||R_k ... T_j ... O_i / s_k||_F"),
    "share": ("1 (ratio), signed", "<path, total> / ||total||^2: over all paths of all orders these sum to 1"),
}


@final
@dataclass(frozen=True)
class Paths(Question):
    """The paths from a writer to a reader through components in between, strongest first.

    With every component linear at a point, ``x -> x + T_j x``, what the reader gets is, ``s_k`` its norm scalar,
    ``total = R~_k prod(I + T) O_i / s_k = (R~_k O_i + sum_j R~_k T_j O_i + sum R~_k T_j' T_j O_i + ...) / s_k``:
    one path per choice of components that reach each other in turn. **Order** 1 is the direct virtual weight, order 2
    passes one component. Components are single heads and whole MLPs; attention moves what passes between tokens.

    Heads enter at the ends by their circuits, as in ``virtual_weight``: a writing head by OV, whatever its attention.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        writer: ``L1H0``, ``L3.mlp``, ``L3N7``, ``embed``, ``pos`` or a bias.
        reader: ``L5H2.K``, ``L5.mlp.up``, ``L5N7.gate`` or ``unembed``.
        order: up to which order paths are listed; totals are exact whatever it is.
        top: how many paths to keep.
        point: a prompt's OperatingPoint; None takes ``Convention(scalar, gate)``: one token that attends to itself.
        token: where the reader reads, a place in the prompt.
        source: where the writer writes; None is the same token.
        scalar, gate: of the convention.
        offset: rotary offset of a reader's port Q or K.
    """

    question: ClassVar[str] = "paths"
    writer: str
    reader: str
    order: int = 2
    top: int = 20
    point: OperatingPoint | None = None
    token: int = -1
    source: int | None = None
    scalar: float = 1.0
    gate: float = 1.0
    offset: int = 0

    def __post_init__(self) -> None:
        Convention(self.scalar, self.gate)
        if self.order < 1 or self.top < 1:
            raise UsageError(f"order {self.order}, top {self.top}", expected="both >= 1", do="pass for example order=2")

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters as plain values; a point by its identity."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["point"] = None if self.point is None else self.point.identity
        return {k: v for k, v in found.items() if self.point is None or k not in ("scalar", "gate")}

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Expand the pair.

        Returns:
            A Record over ``path``, the ``top`` of largest strength: ``order``, ``strength``, ``share``. In
            ``stamp["totals"]``: ``total`` and ``direct`` strength, ``orders`` (``order``, how many ``paths``, strength
            and share of their sum) and ``remainder_share``, what higher orders hold; shares are None where the total
            is 0.

        Raises:
            UsageError: a name is wrong, the writer comes too late, or the point is of another model.
            ResourceError: there are more than 200,000 paths.
        """
        point: Point = Convention(self.scalar, self.gate) if self.point is None else self.point
        ends = _ends(stream, self, point)
        blocks = ends.reads - ends.writes
        done = 0

        def parts() -> Iterator[tuple[Part, ...]]:
            nonlocal done
            for block in frozen_blocks(stream, point, ends.writes, ends.reads):
                yield block.parts
                done += 1
                if progress is not None:
                    progress(done, 2 * blocks)

        x = ends.written
        for block in parts():
            x = x + torch.stack([part.linear(x) for part in block]).sum(0)
        total = ends.received(x)
        expansion = _Expansion(ends, self.order, total)
        for block in parts():
            expansion.through(block)
        return self._record(stream, point, expansion, total)

    def _record(self, stream: Stream, point: Point, found: _Expansion, total: Tensor) -> Record:
        paths = sorted(found.paths, key=lambda path: -path[2])[: self.top]
        orders = [
            {
                "order": i + 1,
                "paths": sum(path[1] == i + 1 for path in found.paths),
                "strength": float(matrix.norm()),
                "share": _plain(found.share(matrix)),
            }
            for i, matrix in enumerate(found.sums)
        ]
        totals: dict[str, Any] = {
            "total": float(total.norm()),
            "direct": orders[0]["strength"],
            "orders": orders,
            "remainder_share": _plain(1 - found.share(torch.stack(found.sums).sum(0))),
        }
        return Record(
            self.question,
            (Axis("path", tuple(path[0] for path in paths)),),
            (
                Column("strength", torch.tensor([p[2] for p in paths], dtype=accumulate), *_MEANING["strength"]),
                Column("share", torch.tensor([p[3] for p in paths], dtype=accumulate), *_MEANING["share"]),
                Column("order", torch.tensor([p[1] for p in paths]), "1", "components passed, plus 1"),
            ),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "gauge": "heads by their circuits",
                "offset": self.offset,
                **describe(point),
                "totals": totals,
            },
            provenance=stream.provenance,
        )


def discrepancy(stream: Stream, writer: str, via: str, reader: str, *, gate: float = 1.0) -> float:
    """How far a direct virtual weight is from the product of two: ``||R_k O_i - R_k (O_j R_j) O_i|| / ||R_k O_i||``.

    It is 0 only where ``R_k (O_j R_j - I) O_i = 0``: the product through j is another path, not the direct one. The
    intermediate j is taken at norm scalar 1 and attention 1 to itself.

    Args:
        stream: the model.
        writer: i, as in ``Paths``.
        via: j, a head or an MLP between the two.
        reader: k, as in ``Paths``.
        gate: what an MLP's neurons are multiplied with.

    Returns:
        A ratio >= 0; NaN where the direct virtual weight is 0.

    Raises:
        UsageError: a name is wrong, or one does not reach the next.
    """
    middle, point = parse(via), Convention(gate=gate)
    if middle.kind not in ("head", "mlp") or middle.port is not None:
        raise UsageError(f"{via} is no component between", expected="a head or an MLP", do="write L3H1 or L3.mlp")
    ends = _ends(stream, Paths(writer, reader, gate=gate), point)
    place = _place(stream, middle)
    assert place.reads is not None
    if not ends.writes <= place.reads < ends.reads:
        raise UsageError(
            f"{via} does not lie between {writer} and {reader}",
            expected=f"a component that reads a state from {ends.writes} to {ends.reads - 1}",
            do="name another",
        )
    parts = [part for block in frozen_blocks(stream, point, place.reads, place.reads + 1) for part in block.parts]
    part, at = next((part, part.names.index(via)) for part in parts if via in part.names)
    direct = ends.received(ends.written)
    through = _received(_gain(part, ends), part.inner(ends.written), ends)[at]
    size = float(direct.norm())
    return float((direct - through).norm()) / size if size else float("nan")


@final
@dataclass(frozen=True, eq=False)
class _Ends:
    """The writer's and the reader's side, cut down to as many rows and columns as their ranks.

    Attributes:
        written: (r, T, d), what the writer writes at its token.
        read: (k, d), the reader's map over its norm scalar; ``token`` is where it reads.
        writes, reads: states of the stream.
    """

    written: Tensor
    read: Tensor
    token: int
    writes: int
    reads: int
    names: tuple[str, str]

    def received(self, x: Tensor) -> Tensor:
        """What the reader gets of states (r, T, d): (k, r)."""
        return self.read @ x[:, self.token].T


class _Expansion:
    """All paths, in one passage through the blocks; what may still go on is held, (r, T, d) each."""

    def __init__(self, ends: _Ends, order: int, total: Tensor) -> None:
        self._ends, self._order, self._total = ends, order, total
        self._square = float(total.square().sum())
        self.paths: list[tuple[str, int, float, float]] = []
        self.sums = [torch.zeros_like(total) for _ in range(order)]
        self._held = [((ends.names[0],), ends.written)] if order > 1 else []
        self._note((ends.names[0],), ends.received(ends.written))

    def through(self, parts: tuple[Part, ...]) -> None:
        """Send everything held through each component of a block; parts of one block do not reach each other."""
        after: list[tuple[tuple[str, ...], Tensor]] = []
        for part in parts:
            gain = _gain(part, self._ends)
            for names, x in self._held:
                z = part.inner(x)
                for name, received in zip(part.names, _received(gain, z, self._ends), strict=True):
                    self._note((*names, name), received)
                if len(names) + 1 < self._order:
                    moved = torch.einsum("rtmk,mdk->mrtd", z, part.write)
                    after += [((*names, name), y) for name, y in zip(part.names, moved.unbind(), strict=True)]
        self._held += after

    def share(self, matrix: Tensor) -> float:
        """``<matrix, total> / ||total||^2``; NaN where the total is 0."""
        return float((matrix * self._total).sum()) / self._square if self._square else float("nan")

    def _note(self, names: tuple[str, ...], received: Tensor) -> None:
        if len(self.paths) >= MOST_PATHS:
            raise ResourceError(
                f"more than {MOST_PATHS} paths of order <= {self._order} from {names[0]} to {self._ends.names[1]}",
                expected=f"at most {MOST_PATHS}",
                do="ask for a lower order, or for a pair closer in depth",
            )
        text = " > ".join((*names, self._ends.names[1]))
        self.paths.append((text, len(names), float(received.norm()), self.share(received)))
        self.sums[len(names) - 1] += received


def _gain(part: Part, ends: _Ends) -> Tensor:
    """The reader's map on what each component of a part writes, (m, k, inner width)."""
    return ends.read @ part.write


def _received(gain: Tensor, z: Tensor, ends: _Ends) -> Tensor:
    """What the reader gets directly from each component, (m, k, r), of inner activations (r, T, m, inner width)."""
    return gain @ z[:, ends.token].permute(1, 2, 0)


def _ends(stream: Stream, asked: Paths, point: Point) -> _Ends:
    writer, reader = parse(asked.writer), parse(asked.reader)
    virtual_weight(stream, asked.writer, asked.reader, asked.offset)  # says what is wrong with the names
    source, target = _place(stream, writer), _place(stream, reader)
    assert source.writes is not None
    assert target.reads is not None
    if isinstance(point, OperatingPoint):
        point.check(stream)
    site = "final" if reader.kind == "unembed" else f"L{reader.layer}.{'attn' if reader.kind == 'head' else 'mlp'}"
    inverse = inverse_scalar(point, site)
    n = len(inverse)
    token, start = asked.token, asked.token if asked.source is None else asked.source
    if not (-n <= token < n and -n <= start < n):
        raise UsageError(f"tokens {start} and {token}", expected=f"places in a prompt of {n}", do="count from 0 or -1")
    columns = _columns(writing_map(stream, asked.writer))
    written = columns.new_zeros(columns.shape[1], n, stream.d_model)
    written[:, start] = columns.T
    rows = _columns(reading_map(stream, reader, asked.offset).T).T * inverse[token]
    return _Ends(written, rows, token, source.writes, target.reads, (str(writer), str(reader)))


def _columns(map: LinearMap) -> Tensor:
    """The map up to an orthogonal change of its inputs, (out, rank at most): no norm sees the difference."""
    left, right = halves(map, accumulate)
    return left @ triangular(right.T).T


def _place(stream: Stream, label: Label) -> Component:
    kind = "mlp" if label.kind == "neuron" else label.kind
    whole = Label(kind, label.layer, None if kind == "mlp" else label.index)
    for component in stream.components:
        if component.label == whole:
            return component
    raise UsageError(f"this checkpoint holds no {label}", expected="a component it holds", do="list stream.components")


def _plain(value: float) -> float | None:
    return None if value != value else value
