"""Path expansion: the routes through other components by which a writer reaches a reader, linear at a point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import (
    Convention,
    FrozenBlock,
    FrozenGroup,
    Point,
    describe,
    freeze,
    frozen_blocks,
    inverse_scalar,
)
from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.linalg import LinearMap, accumulate
from virtual_weights.linalg.decompose import triangular
from virtual_weights.linalg.linear_map import halves
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import OperatingPoint, Question, Stream, parse, virtual_weight
from virtual_weights.stream.virtual import reading_map, writing_map

MOST_PATHS = 200_000
"""More paths than this are not listed: of order 3, 300 components give 45,000; each order multiplies by hundreds."""

_MEANING = {
    "strength": ("||writer unit -> reader unit||", "||R_k ... T_j ... O_i / s_k||_F"),
    "share": ("1 (ratio), signed", "<path, total> / ||total||^2: over all paths of all orders these sum to 1"),
}


@final
@dataclass(frozen=True)
class Paths(Question[Stream]):
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
        top: how many paths to list.
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
    def parameters(self) -> dict[str, Any]:
        """All parameters as plain values; ``scalar`` and ``gate`` only where there is no point."""
        unused = () if self.point is None else ("scalar", "gate")
        return {name: value for name, value in super().parameters.items() if name not in unused}

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Expand the pair.

        Returns:
            A Record over ``path``, the ``top`` of largest strength: ``order``, ``strength``, ``share``. In
            ``stamp["totals"]``: ``total`` and ``direct`` strength, ``orders`` (``order``, how many ``paths``, strength
            and share of their sum) and ``remainder_share``, the share of all higher orders; shares are None where the
            total is 0.

        Raises:
            UsageError: a name is wrong, the writer comes too late, the point is of another model, or what arrives along
                all paths is beyond the range of float64.
            ResourceError: there are more than 200,000 paths.
        """
        point: Point = Convention(self.scalar, self.gate) if self.point is None else self.point
        ends = _ends(stream, self, point)
        count = ends.reads - ends.writes

        def blocks(before: int) -> Iterator[FrozenBlock]:
            for done, block in enumerate(frozen_blocks(stream, point, ends.writes, ends.reads), before + 1):
                yield block
                progress(done, 2 * count)

        x = ends.columns
        for block in blocks(0):
            x = x + block.linear(x)
        total = ends.read(x)
        if not bool(total.square().sum().isfinite()):
            raise UsageError(
                f"what arrives along all paths from {self.writer} to {self.reader} is too large for float64",
                expected=f"a norm scalar and a gate nearer to 1 than {self.scalar} and {self.gate}",
                do="pass others, or an operating point",
            )
        expansion = _Expansion(ends, self.order, total)
        for block in blocks(count):
            expansion.extend(block)
        paths = sorted(expansion.paths, key=lambda path: -path.strength)[: self.top]
        return stream.record(
            self,
            (Axis("path", tuple(path.text for path in paths)),),
            (
                Column("strength", torch.tensor([p.strength for p in paths], dtype=accumulate), *_MEANING["strength"]),
                Column("share", torch.tensor([p.share for p in paths], dtype=accumulate), *_MEANING["share"]),
                Column("order", torch.tensor([p.order for p in paths]), "1", "components passed, plus 1"),
            ),
            gauge="heads by their circuits",
            offset=self.offset,
            **describe(point),
            totals=expansion.totals,
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
        raise UsageError(f"{via} is neither a head nor an MLP", expected="one of them", do="write L3H1 or L3.mlp")
    ends, group = _ends(stream, Paths(writer, reader, gate=gate), point), stream.groups.of(middle)
    if group.reads not in range(ends.writes, ends.reads):
        raise UsageError(
            f"{via} does not lie between {writer} and {reader}",
            expected=f"a component that reads a state from {ends.writes} to {ends.reads - 1}",
            do="name another component",
        )
    frozen, direct = freeze(stream, group, point), ends.read(ends.columns)
    product = ends.read_inner(ends.gain(frozen), frozen.inner(ends.columns))[group.labels.index(str(middle))]
    size = float(direct.norm())
    return float((direct - product).norm()) / size if size else float("nan")


@final
@dataclass(frozen=True, eq=False)
class _Ends:
    """The writer's and the reader's side, cut down to as many rows and columns as their ranks.

    Attributes:
        columns: (r, T, d), what the writer writes at its token.
        rows: (k, d), the reader's map over its norm scalar; ``token`` is where it reads.
        writes, reads: states of the stream.
        names: of the writer and the reader.
    """

    columns: Tensor
    rows: Tensor
    token: int
    writes: int
    reads: int
    names: tuple[str, str]

    def read(self, x: Tensor) -> Tensor:
        """What the reader gets of states (r, T, d): (k, r)."""
        return self.rows @ x[:, self.token].T

    def gain(self, group: FrozenGroup) -> Tensor:
        """The reader's map on what each component of a group writes, (m, k, inner width)."""
        return self.rows @ group.write

    def read_inner(self, gain: Tensor, z: Tensor) -> Tensor:
        """What the reader gets directly from each component, (m, k, r), of inner activations (r, T, m, inner width)."""
        return gain @ z[:, self.token].permute(1, 2, 0)


@final
@dataclass(frozen=True)
class _Path:
    """One path: its text, components passed plus 1, and the two figures of the columns."""

    text: str
    order: int
    strength: float
    share: float


class _Expansion:
    """All paths, in one passage through the blocks; prefixes, which may go on, are states (r, T, d)."""

    def __init__(self, ends: _Ends, order: int, total: Tensor) -> None:
        self._ends, self._order, self._total = ends, order, total
        self._square = float(total.square().sum())
        self.paths: list[_Path] = []
        self._sums = [torch.zeros_like(total) for _ in range(order)]
        self._prefixes = [((ends.names[0],), ends.columns)] if order > 1 else []
        self._add((ends.names[0],), ends.read(ends.columns))

    def extend(self, block: FrozenBlock) -> None:
        """Send every prefix through each component of a block; components of one block do not reach each other."""
        longer: list[tuple[tuple[str, ...], Tensor]] = []
        for group in block.groups:
            labels, gain = group.group.labels, self._ends.gain(group)
            for names, x in self._prefixes:
                z = group.inner(x)
                for label, matrix in zip(labels, self._ends.read_inner(gain, z), strict=True):
                    self._add((*names, label), matrix)
                if len(names) + 1 < self._order:
                    states = torch.einsum("rtmk,mdk->mrtd", z, group.write)
                    longer += [((*names, label), y) for label, y in zip(labels, states, strict=True)]
        self._prefixes += longer

    @property
    def totals(self) -> dict[str, Any]:
        """Strengths and shares of all paths, by order and together."""
        orders = [
            {
                "order": i,
                "paths": sum(path.order == i for path in self.paths),
                "strength": float(matrix.norm()),
                "share": _or_none(self._share(matrix)),
            }
            for i, matrix in enumerate(self._sums, 1)
        ]
        return {
            "total": float(self._total.norm()),
            "direct": orders[0]["strength"],
            "orders": orders,
            "remainder_share": _or_none(1 - self._share(torch.stack(self._sums).sum(0))),
        }

    def _share(self, matrix: Tensor) -> float:
        """``<matrix, total> / ||total||^2``; NaN where the total is 0."""
        return float((matrix * self._total).sum()) / self._square if self._square else float("nan")

    def _add(self, names: tuple[str, ...], matrix: Tensor) -> None:
        if len(self.paths) >= MOST_PATHS:
            raise ResourceError(
                f"more than {MOST_PATHS} paths of order <= {self._order} from {names[0]} to {self._ends.names[1]}",
                expected=f"at most {MOST_PATHS}",
                do="ask for a lower order, or for a pair closer in depth",
            )
        text = " > ".join((*names, self._ends.names[1]))
        self.paths.append(_Path(text, len(names), float(matrix.norm()), self._share(matrix)))
        self._sums[len(names) - 1] += matrix


def _ends(stream: Stream, paths: Paths, point: Point) -> _Ends:
    writer, reader = parse(paths.writer), parse(paths.reader)
    virtual_weight(stream, paths.writer, paths.reader, paths.offset)  # refuses wrong names and pairs
    source, target = stream.groups.of(writer), stream.groups.of(reader)
    assert target.reads is not None
    if isinstance(point, OperatingPoint):
        point.check(stream)
    if len(source.writes) > 1:
        raise UsageError(
            f"{writer} writes {len(source.writes)} states, and a path begins with one",
            expected="a writer of one state",
            do="ask for the direct edge: vweights channel",
        )
    attached = target.id in stream.attached
    inverse = inverse_scalar(point, stream.groups.sited(target.reads)[0].id if attached else target.id)
    if target.norm is None and attached:
        inverse = torch.ones_like(inverse)  # a dictionary that reads the state as it is
    n = len(inverse)
    token, start = paths.token, paths.token if paths.source is None else paths.source
    if not (-n <= token < n and -n <= start < n):
        raise UsageError(
            f"positions {start} and {token}",
            expected=f"positions in a prompt of {n}",
            do="count from 0, or from -1 back",
        )
    columns = _reduced(writing_map(stream, paths.writer))
    states = columns.new_zeros(columns.shape[1], n, stream.d_model)
    states[:, start] = columns.T
    rows = _reduced(reading_map(stream, reader, paths.offset).T).T * inverse[token]
    return _Ends(states, rows, token, source.first, target.reads, (str(writer), str(reader)))


def _reduced(map: LinearMap) -> Tensor:
    """The map up to an orthogonal change of its inputs, (out, rank at most): all norms stay the same."""
    left, right = halves(map, accumulate)
    return left @ triangular(right.T).T


def _or_none(value: float) -> float | None:
    return None if value != value else value
