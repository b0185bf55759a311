"""Composition of single singular components of a head: which of its directions a reader listens to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import reading_circuits
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress, Spectrum, accumulate, haar_moments, self_moments, svd
from virtual_weights.linalg import singular_values as gains_of
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Head, Stream, parse
from virtual_weights.stream.group import HeadPort
from virtual_weights.stream.question import Question
from virtual_weights.stream.virtual import reading_map, virtual_weight

_PORTS: tuple[HeadPort, ...] = ("Q", "K", "V")


@final
@dataclass(frozen=True)
class ComponentComposition(Question):
    """Composition of every singular component of a head's OV with a reader, or with all later heads.

    ``OV = sum_i s_i u_i v_i^T``; component i writes along ``u_i`` alone, and a reader's circuit C sees of it::

        score_i    = ||C u_i v_i^T||_F / (||C||_F ||u_i v_i^T||_F) = ||C u_i|| / ||C||_F     in [0, 1]
        strength_i = s_i ||C u_i||,      sum_i strength_i^2 = ||C OV||_F^2

    so a head whose composition as a whole is unremarkable may still speak through one component. ``null_ratio`` and
    ``z`` compare with a component turned by a Haar-random rotation of the stream: mean square score 1/d. With r
    components and many readers some z are large by chance.

    Where ``gap`` is small the component is an arbitrary direction of a plane of nearly equal gains.

    Invariant under re-basing of heads (QK at offset 0) and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        writer: a head, e.g. ``"L16H0"``.
        reader: e.g. ``"L17H3.K"``, ``"L5.mlp.up"``, ``"unembed"``; None for all heads that can hear the writer.
        ports: through which ports, where the reader is None.
        rotary_offset: query position minus key position; None is offset 0.

    Reference: Merullo, Eickhoff and Pavlick 2024, "Talking Heads: Understanding Inter-layer Communication in
    Transformer Language Models".
    """

    question: ClassVar[str] = "component_composition"
    writer: str
    reader: str | None = None
    ports: tuple[HeadPort, ...] = _PORTS
    rotary_offset: int | None = None

    def __post_init__(self) -> None:
        if not self.ports or not set(self.ports) <= set(_PORTS):
            raise UsageError(f"ports {self.ports}", expected="some of Q, K and V", do="pass for example ports=('K',)")

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all components.

        Returns:
            A Record over (component, reader), components by descending gain (numbered from 1, rounding left out), with
            columns ``score``, ``strength``, ``share`` (of ``||C OV||_F^2``), ``null_ratio``, ``z``, ``gain`` (s_i)
            and ``gap`` (relative distance to the nearest other gain).

        Raises:
            UsageError: a name is wrong, the writer is no head, it comes after the reader, or nothing reads after it.
        """
        del progress  # it is one step
        head = stream[self.writer]
        if not isinstance(head, Head):
            raise UsageError(f"{self.writer} is no head", expected="a head such as L16H0", do="name a head")
        parts = svd(head.ov)
        rank = Spectrum(parts.S).numerical_rank()
        gains, directions = parts.S[:rank], parts.U[:, :rank]
        found = [self._one(stream, directions)] if self.reader is not None else list(self._all(stream, directions))
        if not found:
            raise UsageError(
                f"no head reads after {self.writer}", expected="an earlier writer", do="name one, or a reader"
            )
        labels = tuple(label for label, _, _ in found)
        seen = torch.stack([squared for _, squared, _ in found], dim=1)
        moments = torch.stack([moment for _, _, moment in found])
        return Record(
            self.question,
            (Axis("component", tuple(str(i + 1) for i in range(rank))), Axis("reader", labels)),
            tuple(_columns(gains, seen, moments, stream.d_model)),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "rotary_offset": "no rotary embedding" if stream.spec.rotary is None else self.rotary_offset or 0,
                "gauge": "circuits: free of heads' inner bases",
            },
            provenance=stream.provenance,
        )

    def _one(self, stream: Stream, directions: Tensor) -> tuple[str, Tensor, Tensor]:
        assert self.reader is not None
        virtual_weight(stream, self.writer, self.reader)  # refuses a writer that comes too late
        read = reading_map(stream, parse(self.reader), self.rotary_offset or 0)
        squares = gains_of(read).square()
        moments = torch.stack([squares.sum(), squares.square().sum()])
        return str(parse(self.reader)), (read @ directions).square().sum(0), moments

    def _all(self, stream: Stream, directions: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        writes = next(c.writes for c in stream.heads if c.label == parse(self.writer))
        assert writes is not None
        for port in self.ports:
            stack = reading_circuits(stream, port, self.rotary_offset or 0)
            assert stack.metric is not None and stack.position is not None
            moments = torch.stack(self_moments(stack), dim=1)
            for i, component in enumerate(stream.heads):
                if int(stack.position[i]) >= writes:
                    thin = stack.outer[stack.index[i]].to(accumulate) @ directions
                    squared = (thin * (stack.metric[i] @ thin)).sum(0).clamp(min=0.0)
                    yield f"{component.label}.{port}", squared, moments[i]


def _columns(gains: Tensor, seen: Tensor, moments: Tensor, d: int) -> Iterator[Column]:
    """Columns (components, readers) from ``||C u_i||^2`` and, for each reader, ``tr G`` and ``tr G^2``."""
    trace, square = moments[:, 0], moments[:, 1]
    mean, variance = haar_moments(trace, square, 1.0, 1.0, d)
    score, strength = (seen / trace).sqrt(), gains[:, None] * seen.sqrt()
    yield Column("score", score, "1, in [0, 1]", "||C u|| / ||C||_F")
    yield Column("strength", strength, "weights", "s ||C u||: squares sum to ||C OV||_F^2")
    energy = strength.square()
    yield Column("share", energy / energy.sum(0), "1, in [0, 1]", "of ||C OV||_F^2")
    ratio = "score over its root mean square at random orientation, 1/sqrt(d)"
    yield Column("null_ratio", score * d**0.5, "1 (ratio)", ratio)
    z = "||C u||^2 against its Haar mean and deviation"
    yield Column("z", (seen - mean) / variance.sqrt(), "standard deviations", z)
    yield Column("gain", gains[:, None].expand_as(seen).clone(), "weights", "s, singular value of OV")
    gap = _gaps(gains)[:, None].expand_as(seen).clone()
    yield Column("gap", gap, "1 (ratio)", "distance to the nearest other gain over the gain; small: u is arbitrary")


def _gaps(gains: Tensor) -> Tensor:
    apart = (gains[:-1] - gains[1:]).abs()
    far = torch.full((1,), float("nan"), dtype=gains.dtype)
    return torch.fmin(torch.cat([far, apart]), torch.cat([apart, far])) / gains
