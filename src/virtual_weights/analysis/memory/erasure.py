"""Erasure pairs: how much of what one component wrote a later one removes, from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import writing_circuits
from virtual_weights.analysis.maps.map_side import write_square
from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, Progress, accumulate, all_pairs, haar_moments, self_moments
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Component, Stream
from virtual_weights.stream.question import Question


@final
@dataclass(frozen=True, eq=False)
class Updates:
    """Several components of one kind, each ``T = write^T read`` at norm scalar, attention and slope 1.

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


def updates(stream: Stream, components: Sequence[Component]) -> Updates:
    """Whole layers of heads (``T = OV``), or of MLPs without gate (``T = W_out W_in``), as updates."""
    layers = list(dict.fromkeys(c.label.layer for c in components))
    if components[0].kind == "head":
        reads = [stream.read("V", layer).maps.repeat_interleave(stream.spec.group, 0) for layer in layers]
        writes = [stream.write("head", layer).mT for layer in layers]
    else:
        assert not stream.spec.gated, "a gated MLP is no linear update"
        reads = [stream.read("in", layer).maps for layer in layers]
        writes = [stream.write("mlp", layer).mT for layer in layers]
    read, write = torch.cat(reads).to(accumulate), torch.cat(writes).to(accumulate)
    assert len(read) == len(components), "updates are made of whole layers"
    ratio = (
        torch.linalg.vector_norm(write, dim=2, keepdim=True) / torch.linalg.vector_norm(read, dim=2, keepdim=True)
    ).sqrt()
    balance = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
    return Updates(read * balance, write / balance, torch.tensor([c.reads for c in components]))


@final
@dataclass(frozen=True)
class Erasure(Question):
    """How much of what writer i wrote eraser j removes, for every pair that can reach.

    ::

        e_ij = -tr(O_i^T T_j O_i) / ||O_i||_F^2 = -<O_i O_i^T, T_j> / tr O_i O_i^T

    Writer i adds ``y = O_i z``; eraser j, taken as the linear update ``x -> x + T_j x``, adds ``T_j y`` to it. Over
    independent z of equal variance, ``e_ij`` is the share of y's energy that j takes off along y itself: 1 removes y
    (on average), 0 leaves it, a negative value strengthens it, more than 1 removes more than there was.

    - Writers: heads by their circuit, ``O_i = OV_i`` (free of inner bases: z is what the head reads); MLPs as wholes by
      ``W_out`` (z its neurons), embeddings by their tokens or positions, each counted once.
    - Erasers: heads attending with weight 1 to the position that was written, ``T_j = OV_j / s``; MLPs that are not
      gated with one slope for all neurons, ``T_j = slope W_out W_in / s``. A gated MLP multiplies two reads and has no
      slope of its own, so it is no eraser here. What passes through other components is not counted.

    ``baseline`` is the mean of e when the eraser's basis is turned at random, ``-tr T_j / d``: what j takes off any
    direction. ``z`` standardises e by that mean and the closed-form deviation, T_j's own spectrum kept. ``alignment``
    is ``-<O O^T, S> / (||O O^T|| ||S||)``, S the symmetric part of T_j, in [-1, 1]. These two are free of ``scalar``:
    the stream grows with depth, so that e at one scalar for all favours late erasers.

    Invariant under re-basing of heads, re-ordering of neurons and, with RMSNorm folded, rotation of the stream.

    Attributes:
        scalar: the norm scalar s of every eraser, > 0; 1 is a convention, not a measurement.
        slope: slope of MLPs that are not gated.
        device: any torch device.
        memory_mb: workspace in MiB.
    """

    question: ClassVar[str] = "erasure"
    scalar: float = 1.0
    slope: float = 1.0
    device: str = "cpu"
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if not self.scalar > 0.0:
            raise UsageError(f"norm scalar {self.scalar}", expected="a number > 0", do="pass for example scalar=1.0")

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (products done, products in all).

        Returns:
            A Record over (reader, writer): erasers and writers, both in order of depth; absent where j comes too early.

        Raises:
            UsageError: the checkpoint holds nothing that could be an eraser.
        """
        writers = [c for c in stream.components if c.kind in ("embed", "pos", "head", "mlp")]
        erasers = [c for c in stream.components if c.kind == "head" or (c.kind == "mlp" and not stream.spec.gated)]
        if not erasers:
            raise UsageError(
                "this checkpoint holds no attention head, and no MLP without gate",
                expected="at least one eraser",
                do="open the complete checkpoint",
            )
        inner = torch.full((len(erasers), len(writers)), float("nan"), dtype=accumulate)
        of_writers, of_erasers = (torch.empty(2, len(each), dtype=accumulate) for each in (writers, erasers))
        blocks = list(_blocks(stream, erasers, self.memory_mb * 2**18))
        groups = list(_groups(stream, writers, self.memory_mb * 2**19))
        for i, columns in enumerate(groups):
            side = _side(stream, [writers[c] for c in columns])
            of_writers[:, columns] = side.moments
            for j, rows in enumerate(blocks):
                acting = updates(stream, [erasers[r] for r in rows])
                if i == 0:
                    of_erasers[:, rows] = acting.symmetric_moments
                at = torch.tensor(rows)[:, None], torch.tensor(columns)
                inner[at] = side.inner(acting, self.device, self.memory_mb * 2**19)
                if progress is not None:
                    progress(i * len(blocks) + j + 1, len(groups) * len(blocks))
        gain = torch.tensor(
            [(1.0 if c.kind == "head" else self.slope) / self.scalar for c in erasers], dtype=accumulate
        )
        return Record(
            self.question,
            (Axis("reader", _names(erasers)), Axis("writer", _names(writers))),
            _columns(inner, of_erasers, of_writers, gain, stream.d_model),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "gauge": "circuits: free of heads' inner bases",
                "norm_scalar": self.scalar,
                "slope": None if stream.spec.gated else self.slope,
                "attention": "to what was written = 1",
                "erasers": "heads" if stream.spec.gated else "heads and MLPs",
            },
            provenance=stream.provenance,
        )


@final
@dataclass(frozen=True, eq=False)
class _Heads:
    """Writing heads, their squares ``OV OV^T`` kept in thin factors."""

    stack: MapStack

    @property
    def moments(self) -> Tensor:
        return torch.stack(self_moments(self.stack))

    def inner(self, acting: Updates, device: str, memory: int) -> Tensor:
        """``<O_i O_i^T, T_j>`` as two sums of squares, so that the all-pairs kernel gives it.

        With ``T = W^T R``: ``<O O^T, T> = (||(R + W) O||^2 - ||(R - W) O||^2) / 4``.
        """
        read, write = acting.read, acting.write
        both = torch.cat([read + write, read - write])
        readers = MapStack(both, torch.arange(len(both)), None, acting.position.repeat(2))
        squared = all_pairs(readers, self.stack, device=device, memory=memory).squared
        return (squared[: len(read)] - squared[len(read) :]) / 4


@final
@dataclass(frozen=True, eq=False)
class _Wide:
    """Writers wider than the stream or about so (MLPs, embeddings), by their squares ``O O^T``, (m, d, d)."""

    squares: Tensor
    position: Tensor

    @property
    def moments(self) -> Tensor:
        return torch.stack([self.squares.diagonal(dim1=1, dim2=2).sum(1), self.squares.square().sum((1, 2))])

    def inner(self, acting: Updates, device: str, memory: int) -> Tensor:
        """``<O_i O_i^T, T_j>``, each T_j formed once; ``memory`` is what the squares were chosen by."""
        del memory
        found = torch.full((len(acting.read), len(self.squares)), float("nan"), dtype=accumulate)
        reach = self.position[None, :] <= acting.position[:, None]
        flat = self.squares.flatten(1).to(device)
        for j, (read, write) in enumerate(zip(acting.read, acting.write, strict=True)):
            if bool(reach[j].any()):
                update = write.T.to(device) @ read.to(device)
                found[j] = (flat @ update.flatten()).cpu()
        return found.masked_fill_(~reach, float("nan"))


def _side(stream: Stream, writers: Sequence[Component]) -> _Heads | _Wide:
    if writers[0].kind == "head":
        return _Heads(writing_circuits(stream))
    position = torch.tensor([c.writes for c in writers])
    return _Wide(torch.stack([write_square(stream, c) for c in writers]), position)


def _groups(stream: Stream, writers: Sequence[Component], budget: int) -> Iterator[list[int]]:
    """Writers taken together, by place: all heads in thin factors, the others as many as fit the budget."""
    heads, wide = ([i for i, c in enumerate(writers) if (c.kind == "head") == head] for head in (True, False))
    if heads:
        yield heads
    step = max(1, budget // (8 * stream.d_model**2))
    yield from (wide[i : i + step] for i in range(0, len(wide), step))


def _blocks(stream: Stream, erasers: Sequence[Component], budget: int) -> Iterator[list[int]]:
    """Erasers taken together, by place: of one kind, whole layers, as many as fit the budget (at least one)."""
    for kind, width, each in (("head", stream.spec.d_head, stream.spec.n_heads), ("mlp", stream.spec.d_mlp, 1)):
        places = [i for i, c in enumerate(erasers) if c.kind == kind]
        step = max(1, budget // (4 * 8 * each * width * stream.d_model)) * each
        yield from (places[i : i + step] for i in range(0, len(places), step))


def _columns(inner: Tensor, of_erasers: Tensor, of_writers: Tensor, gain: Tensor, d: int) -> tuple[Column, ...]:
    (trace_t, square_t), (trace_o, square_o) = of_erasers[:, :, None], of_writers[:, None, :]
    mean, variance = haar_moments(trace_t, square_t, trace_o, square_o, d)
    erasure = -gain[:, None] * inner / trace_o
    baseline = (-gain[:, None] * trace_t / d).expand_as(inner)
    sign, sizes = gain.sign()[:, None], (square_o * square_t).sqrt()
    standard = sign * (mean - inner) / variance.sqrt()
    removes = "-<O O^T, T> / tr O O^T: 1 removes what was written, on average"
    return (
        Column("erasure", erasure, "1 (share of energy)", removes),
        Column(
            "baseline", torch.where(inner.isnan(), inner, baseline), "1 (share of energy)", "-tr T / d, the Haar mean"
        ),
        Column("alignment", -sign * inner / sizes, "1, in [-1, 1]", "-cos(O O^T, S), S the symmetric part of T"),
        Column("z", standard, "standard deviations", "erasure against its Haar mean and deviation"),
    )


def _names(components: Sequence[Component]) -> tuple[str, ...]:
    return tuple(str(c.label) for c in components)
