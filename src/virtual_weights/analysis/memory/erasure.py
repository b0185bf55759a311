"""Erasure pairs: how much of what one component wrote a later one removes, from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import Convention
from virtual_weights.analysis.maps.circuits import head_positions, writing_circuits
from virtual_weights.analysis.maps.map_side import write_gram
from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    WORKSPACE_BYTES,
    MapStack,
    accumulate,
    beyond_rounding,
    haar_moments,
    self_moments,
    standardised,
)
from virtual_weights.linalg.pair_forms import GramForm
from virtual_weights.linalg.pairing import inner_grams, pairing
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Group, Question, Stream, cost


@final
@dataclass(frozen=True)
class Erasure(Question[Stream]):
    """How much of what writer i wrote eraser j removes, for every pair that can reach.

    ::

        e_ij = -tr(O_i^T T_j O_i) / ||O_i||_F^2 = -<O_i O_i^T, T_j> / tr O_i O_i^T

    Writer i adds ``y = O_i z``; eraser j, taken as the linear update ``x -> x + T_j x``, adds ``T_j y`` to it. Over
    independent z of equal variance, ``e_ij`` is the share of y's energy that j removes along y itself: 1 removes y
    (on average), 0 leaves it, a negative value strengthens it, more than 1 removes more than there was.

    - Writers: heads by their circuit, ``O_i = OV_i`` (free of inner bases: z is what the head reads); MLPs as wholes by
      ``W_out`` (z its neurons), embeddings by their tokens or positions, each counted once.
    - Erasers: heads attending with weight 1 to the position that was written, ``T_j = OV_j / s``; MLPs that are not
      gated with one slope for all neurons, ``T_j = slope W_out W_in / s``. A gated MLP multiplies two reads and has no
      slope of its own, so it is not an eraser here. What passes through other components is not counted.

    ``baseline`` is the mean of e when the eraser's basis is turned at random, ``-tr T_j / d``: what j removes of any
    direction. ``z`` standardises e by that mean and the closed-form deviation, T_j's own spectrum unchanged.
    ``alignment`` is ``-<O O^T, S> / (||O O^T|| ||S||)``, S the symmetric part of T_j, in [-1, 1]. These two are free of
    ``scalar``: the stream grows with depth, so that e at one scalar for all favours late erasers.

    Invariant under re-basing of heads, re-ordering of neurons and, with RMSNorm folded, rotation of the stream.

    Attributes:
        scalar: the norm scalar s of every eraser, in [1e-60, 1e60]; 1 is a convention, not a measurement.
        slope: slope of MLPs that are not gated.
        device: any torch device.
        memory_mb: workspace in MiB.
    """

    question: ClassVar[str] = "erasure"
    scalar: float = 1.0
    slope: float = 1.0
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        Convention(self.scalar, self.slope)  # refuses what is out of range

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the answer."""
        inner, moments = torch.empty(0, 0), torch.empty(2, 0)
        return tuple(column.name for column in _columns(inner, moments, moments, torch.empty(0), 2))

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (products done, products in all).

        Returns:
            A Record over (reader, writer): erasers and writers, both in order of depth; absent where j comes too early.

        Raises:
            UsageError: the checkpoint holds nothing that could be an eraser.
        """
        writers = stream.groups.kind("embed", "pos", "head", "mlp")
        erasers = stream.groups.heads if stream.spec.gated else stream.groups.kind("head", "mlp")
        if not erasers:
            raise UsageError(
                "this checkpoint holds no attention head, and no MLP without gate",
                expected="at least one eraser",
                do="open the complete checkpoint",
            )
        rows, columns = _indices(erasers), _indices(writers)
        eraser_moments, writer_moments = (
            torch.empty(2, sum(map(len, indices.values())), dtype=accumulate) for indices in (rows, columns)
        )
        inner = torch.zeros(eraser_moments.shape[1], writer_moments.shape[1], dtype=accumulate)
        writer_batches = list(_writer_batches(stream, writers, self.memory_mb * 2**19))
        eraser_batches = list(_eraser_batches(stream, erasers, self.memory_mb * 2**19))
        for i, batch in enumerate(writer_batches):
            column, writing = torch.cat([columns[group.id] for group in batch]), _writing(stream, batch)
            writer_moments[:, column] = writing.moments
            for j, erasing in enumerate(eraser_batches):
                row, update = torch.cat([rows[group.id] for group in erasing]), _updating(stream, erasing)
                if i == 0:
                    eraser_moments[:, row] = update.moments
                inner[row[:, None], column] = _products(update, writing, self.device, self.memory_mb * 2**19)
                progress(i * len(eraser_batches) + j + 1, len(writer_batches) * len(eraser_batches))
        reads = torch.tensor([group.reads for group in erasers for _ in group.components])
        writes = torch.tensor([group.first for group in writers for _ in group.components])
        inner.masked_fill_(writes[None, :] > reads[:, None], float("nan"))
        slopes = [1.0 if group.kind == "head" else self.slope for group in erasers for _ in group.components]
        gain = torch.tensor([slope / self.scalar for slope in slopes], dtype=accumulate)
        return stream.record(
            self,
            (Axis("reader", _labels(erasers)), Axis("writer", _labels(writers))),
            _columns(inner, eraser_moments, writer_moments, gain, stream.d_model),
            gauge="circuits: free of heads' inner bases",
            norm_scalar=self.scalar,
            slope=None if stream.spec.gated else self.slope,
            attention="to what was written = 1",
            erasers="heads" if stream.spec.gated else "heads and MLPs",
        )


@final
@dataclass(frozen=True, eq=False)
class _Thin:
    """Symmetric matrices of heads in thin factors, ``outer^T metric outer``.

    Of a writer ``O O^T = OV OV^T``. Of an eraser ``S = (T + T^T)/2``, which ``O O^T``, being symmetric, cannot tell
    from ``T = W^T R``: ``outer = [R; W]``, and the metric, ``[[0, I], [I, 0]] / 2``, is not semidefinite.
    """

    stack: MapStack
    erasing: bool

    @property
    def moments(self) -> Tensor:
        """The trace of every matrix and of its square, (2, n)."""
        if not self.erasing:
            return torch.stack(self_moments(self.stack))
        k, grams = self.stack.inner // 2, inner_grams(self.stack)
        core = grams[:, :k, k:]  # R W^T: the non-zero spectrum of T
        size = (grams[:, :k, :k] * grams[:, k:, k:]).sum((1, 2))
        return torch.stack([core.diagonal(dim1=1, dim2=2).sum(1), (size + (core * core.mT).sum((1, 2))) / 2])

    def factors(self, maps: slice, device: str) -> tuple[Tensor, Tensor]:
        """Left and right, (n, k, d) float64: ``left^T right`` has the symmetric part of these matrices."""
        outer = self.stack.outer[self.stack.index[maps]].to(device, accumulate)
        if self.erasing:
            return outer[:, self.stack.inner // 2 :], outer[:, : self.stack.inner // 2]
        assert self.stack.metric is not None
        return self.stack.metric[maps].to(device) @ outer, outer


@final
@dataclass(frozen=True, eq=False)
class _Dense:
    """Symmetric (d, d) matrices of parts about as wide as the stream or wider, (m, d, d): ``O O^T``, or S of an MLP."""

    matrices: Tensor

    @property
    def moments(self) -> Tensor:
        """The trace of every matrix and of its square, (2, m)."""
        return torch.stack([self.matrices.diagonal(dim1=1, dim2=2).sum(1), self.matrices.square().sum((1, 2))])


def _products(erasing: _Thin | _Dense, writing: _Thin | _Dense, device: str, memory: int) -> Tensor:
    """``<O_i O_i^T, S_j> = <O_i O_i^T, T_j>``, erasers by writers; of pairs that cannot reach anything."""
    if isinstance(erasing, _Dense):
        if isinstance(writing, _Dense):
            return erasing.matrices.flatten(1) @ writing.matrices.flatten(1).T
        return _banded(writing, erasing.matrices, device).T
    if isinstance(writing, _Dense):
        return _banded(erasing, writing.matrices, device)
    pairs = pairing(erasing.stack, writing.stack)
    products = torch.zeros(erasing.stack.count, writing.stack.count, dtype=accumulate)
    if pairs.groups:
        form = GramForm.within(pairs, accumulate, memory)
        row, column = pairs.readers.order, pairs.writers.order
        products[row[:, None], column] = form.compute(torch.device(device), silent).cpu()
    return products


_BAND = 64  # rows of matrices that are formed at once


def _banded(thin: _Thin, matrices: Tensor, device: str) -> Tensor:
    """``<left^T right, D>`` of every map and every symmetric matrix D, each band of ``left^T right`` formed once."""
    n, d = thin.stack.count, thin.stack.width
    products, matrices = torch.zeros(n, len(matrices), dtype=accumulate, device=device), matrices.to(device)
    step = max(1, WORKSPACE_BYTES // (8 * d * max(thin.stack.inner, _BAND)))
    for start in range(0, n, step):
        maps = slice(start, start + step)
        left, right = thin.factors(maps, device)
        for first in range(0, d, _BAND):
            rows = slice(first, first + _BAND)
            products[maps] += (left[:, :, rows].mT @ right).flatten(1) @ matrices[:, rows].flatten(1).T
    return products.cpu()


def _writing(stream: Stream, groups: Sequence[Group]) -> _Thin | _Dense:
    if groups[0].kind == "head":
        return _Thin(writing_circuits(stream, groups), erasing=False)
    return _Dense(torch.stack([write_gram(stream, group) for group in groups]))


def _updating(stream: Stream, groups: Sequence[Group]) -> _Thin | _Dense:
    """Attentions (``T = OV``), or MLPs without gate (``T = W_out W_in``), as updates of the stream."""
    if groups[0].kind == "mlp":
        updates = [_update(stream.write(group)[0], stream.read("in", group).maps[0]) for group in groups]
        return _Dense(torch.stack(updates))
    outer = [
        torch.cat([stream.read("V", group).maps.repeat_interleave(group.shared("V"), 0), stream.write(group).mT], 1)
        for group in groups
    ]
    position, k = head_positions(groups, "V"), groups[0].width
    metric = torch.eye(2 * k, dtype=accumulate).roll(k, 0).expand(len(position), -1, -1) / 2
    return _Thin(MapStack(torch.cat(outer), torch.arange(len(position)), metric, position), erasing=True)


def _update(write: Tensor, read: Tensor) -> Tensor:
    """``(T + T^T) / 2`` of ``T = write read``, (d, d) float64."""
    update = torch.zeros(len(write), len(write), dtype=accumulate)
    step = max(1, WORKSPACE_BYTES // (8 * len(write)))
    for neurons in (slice(start, start + step) for start in range(0, len(read), step)):
        update.addmm_(write[:, neurons].to(accumulate), read[neurons].to(accumulate))
    return (update + update.T) / 2


def _writer_batches(stream: Stream, writers: Sequence[Group], budget: int) -> Iterator[Sequence[Group]]:
    """Writers taken together: all heads in thin factors, the others as many as fit the budget (at least one)."""
    if stream.groups.heads:
        yield stream.groups.heads
    wide = [group for group in writers if group.kind != "head"]
    yield from _divided(wide, 8 * stream.d_model**2, budget)


def _eraser_batches(stream: Stream, erasers: Sequence[Group], budget: int) -> Iterator[Sequence[Group]]:
    """Erasers taken together: of one kind, as many groups as fit the budget (at least one)."""
    heads, wide = ([group for group in erasers if group.kind == kind] for kind in ("head", "mlp"))
    rows = max((2 * len(group.components) * group.width for group in heads), default=1)
    yield from _divided(heads, 4 * rows * stream.d_model, budget)
    yield from _divided(wide, 8 * stream.d_model**2, budget)


def _divided(groups: Sequence[Group], size: int, budget: int) -> Iterator[Sequence[Group]]:
    step = max(1, budget // size)
    yield from (groups[i : i + step] for i in range(0, len(groups), step))


def _indices(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Where the components of every group stand among those of all groups."""
    counts = [len(group.components) for group in groups]
    return dict(zip((group.id for group in groups), torch.arange(sum(counts)).split(counts), strict=True))


def _labels(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(label for group in groups for label in group.labels)


def _columns(inner: Tensor, erasers: Tensor, writers: Tensor, gain: Tensor, d: int) -> tuple[Column, ...]:
    (trace_t, square_t), (trace_o, square_o) = erasers[:, :, None], writers[:, None, :]
    mean, variance = haar_moments(trace_t, square_t, trace_o, square_o, d)
    sign, sizes = gain.sign()[:, None], (square_o * square_t).sqrt()
    inner = beyond_rounding(inner, sizes)
    strength = -gain[:, None] * inner
    baseline = (-gain[:, None] * trace_t / d).expand_as(inner)
    standard = sign * standardised(-inner, -mean, variance)
    removes = "-<O O^T, T> / tr O O^T: 1 removes what was written, on average"
    return (
        Column("erasure", strength / trace_o, "1 (share of energy)", removes),
        Column(
            "baseline", torch.where(inner.isnan(), inner, baseline), "1 (share of energy)", "-tr T / d, the Haar mean"
        ),
        Column("alignment", -sign * inner / sizes, "1, in [-1, 1]", "-cos(O O^T, S), S the symmetric part of T"),
        Column("z", standard, "standard deviations", "erasure against its Haar mean and deviation"),
        Column("strength", strength, "weights", "-<O O^T, T>: 0 of a writer or an eraser that is 0"),
    )
