"""Erasure pairs: how much of what one component wrote a later one removes, from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import Convention
from virtual_weights.analysis.maps.circuits import writing_circuits
from virtual_weights.analysis.maps.map_side import write_gram
from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    MapStack,
    accumulate,
    all_pairs,
    beyond_rounding,
    haar_moments,
    self_moments,
    standardised,
)
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Group, Question, Stream, cost


@final
@dataclass(frozen=True, eq=False)
class Updates:
    """Components of one kind as linear updates ``T = write^T read``, with norm scalar, attention and slope 1.

    Attributes:
        read: (m, k, d) float64; row by row of the same length as ``write``, so that sums of both lose nothing.
        write: (m, k, d) float64, transposed write maps.
        position: (m,) the state that each reads.
    """

    read: Tensor
    write: Tensor
    position: Tensor

    @property
    def symmetric_moments(self) -> Tensor:
        """``tr T`` and ``tr S^2`` of the symmetric part ``S = (T + T^T)/2``, shape (2, m)."""
        if self.read.shape[1] <= self.read.shape[2]:
            core = self.read @ self.write.mT  # the non-zero spectrum of T, k x k
            size = ((self.write @ self.write.mT) * (self.read @ self.read.mT)).sum((1, 2))
        else:
            core = self.write.mT @ self.read  # T itself, d x d
            size = core.square().sum((1, 2))
        trace = core.diagonal(dim1=1, dim2=2).sum(1)
        return torch.stack([trace, (size + (core * core.mT).sum((1, 2))) / 2])


def updates(stream: Stream, groups: Sequence[Group]) -> Updates:
    """Attentions (``T = OV``), or MLPs without gate (``T = W_out W_in``), as updates of the stream."""
    port = "V" if groups[0].kind == "head" else "in"
    reads = [stream.read(port, group).maps.repeat_interleave(group.shared(port), 0) for group in groups]
    read = torch.cat(reads).to(accumulate)
    write = torch.cat([stream.write(group).mT for group in groups]).to(accumulate)
    ratio = (
        torch.linalg.vector_norm(write, dim=2, keepdim=True) / torch.linalg.vector_norm(read, dim=2, keepdim=True)
    ).sqrt()
    balance = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
    return Updates(read * balance, write / balance, torch.tensor([g.reads for g in groups for _ in g.components]))


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
        inner = torch.full((eraser_moments.shape[1], writer_moments.shape[1]), float("nan"), dtype=accumulate)
        writer_batches = list(_writer_batches(stream, writers, self.memory_mb * 2**19))
        eraser_batches = list(_eraser_batches(stream, erasers, self.memory_mb * 2**18))
        for i, batch in enumerate(writer_batches):
            column, writing = torch.cat([columns[group.id] for group in batch]), _writing(stream, batch)
            writer_moments[:, column] = writing.moments
            for j, erasing in enumerate(eraser_batches):
                row, update = torch.cat([rows[group.id] for group in erasing]), updates(stream, erasing)
                eraser_moments[:, row] = update.symmetric_moments
                inner[row[:, None], column] = writing.inner(update, self.device, self.memory_mb * 2**19)
                progress(i * len(eraser_batches) + j + 1, len(writer_batches) * len(eraser_batches))
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
class _Heads:
    """Writing heads; ``O O^T = OV OV^T`` in thin factors."""

    stack: MapStack

    @property
    def moments(self) -> Tensor:
        return torch.stack(self_moments(self.stack))

    def inner(self, update: Updates, device: str, memory: int) -> Tensor:
        """``<O_i O_i^T, T_j>`` as two sums of squares, so that the all-pairs kernel gives it.

        With ``T = W^T R``: ``<O O^T, T> = (||(R + W) O||^2 - ||(R - W) O||^2) / 4``.
        """
        read, write = update.read, update.write
        both = torch.cat([read + write, read - write])
        readers = MapStack(both, torch.arange(len(both)), None, update.position.repeat(2))
        squared = all_pairs(readers, self.stack, device=device, memory=memory).squared
        return (squared[: len(read)] - squared[len(read) :]) / 4


@final
@dataclass(frozen=True, eq=False)
class _Wide:
    """Writers about as wide as the stream or wider (MLPs, embeddings), by their Grams ``O O^T``, (m, d, d)."""

    grams: Tensor
    position: Tensor

    @property
    def moments(self) -> Tensor:
        return torch.stack([self.grams.diagonal(dim1=1, dim2=2).sum(1), self.grams.square().sum((1, 2))])

    def inner(self, update: Updates, device: str, memory: int) -> Tensor:
        """``<O_i O_i^T, T_j>``, each T_j formed once; ``memory`` limits how many Grams there are."""
        del memory
        products = torch.full((len(update.read), len(self.grams)), float("nan"), dtype=accumulate)
        reach = self.position[None, :] <= update.position[:, None]
        flat = self.grams.flatten(1).to(device)
        for j, (read, write) in enumerate(zip(update.read, update.write, strict=True)):
            if bool(reach[j].any()):
                dense = write.T.to(device) @ read.to(device)
                products[j] = (flat @ dense.flatten()).cpu()
        return products.masked_fill_(~reach, float("nan"))


def _writing(stream: Stream, groups: Sequence[Group]) -> _Heads | _Wide:
    if groups[0].kind == "head":
        return _Heads(writing_circuits(stream))
    grams = torch.stack([write_gram(stream, group) for group in groups])
    return _Wide(grams, torch.tensor([group.first for group in groups]))


def _writer_batches(stream: Stream, writers: Sequence[Group], budget: int) -> Iterator[Sequence[Group]]:
    """Writers taken together: all heads in thin factors, the others as many as fit the budget (at least one)."""
    if stream.groups.heads:
        yield stream.groups.heads
    wide = [group for group in writers if group.kind != "head"]
    step = max(1, budget // (8 * stream.d_model**2))
    yield from (wide[i : i + step] for i in range(0, len(wide), step))


def _eraser_batches(stream: Stream, erasers: Sequence[Group], budget: int) -> Iterator[Sequence[Group]]:
    """Erasers taken together: of one kind, as many groups as fit the budget (at least one)."""
    for kind in ("head", "mlp"):
        groups = [group for group in erasers if group.kind == kind]
        rows = max((len(group.components) * group.width for group in groups), default=1)
        step = max(1, budget // (4 * 8 * rows * stream.d_model))
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
