"""Composition: how strongly what one component writes enters what a later one reads, whole or by singular component."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import folded_eps, head_positions, reading_circuits, writing_circuits
from virtual_weights.analysis.maps.map_side import MapSide, component_axis, thin_pieces, wide_readers, writing_side
from virtual_weights.analysis.maps.pair_products import AllPairs, PairProducts, lift_columns
from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    Spectrum,
    accumulate,
    beyond_rounding,
    haar_moments,
    self_moments,
    standardised,
    svd,
)
from virtual_weights.linalg import singular_values as gains_of
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Block, Head, Question, Stream, parse
from virtual_weights.stream.effective import as_seen
from virtual_weights.stream.group import HEAD_PORTS, HeadPort, Port, Writers, check_port, check_writers
from virtual_weights.stream.virtual import reading_map, virtual_weight

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Composition(AllPairs):
    """Composition of every writer with every later reader of one port.

    For writer a and reader b, with ``QK = W_Q^T Rot(D)^T W_K`` and ``OV = W_O W_V``::

        Q: ||QK_b^T OV_a||_F / (||QK_b||_F ||OV_a||_F)
        K: ||QK_b   OV_a||_F / (||QK_b||_F ||OV_a||_F)
        V: ||OV_b   OV_a||_F / (||OV_b||_F ||OV_a||_F)

    and for components with an inner basis of their own the same with their own maps:
    ``||R~ O||_F / (||R~||_F ||O||_F)``, where ``O`` is the output map of an MLP (one column a neuron), an embedding
    (one a token or position) or a bias (one column), and ``R~`` an MLP's gate, up or in (one row a neuron) or the
    unembedding (one row a token).

    Columns: ``score`` (the above, in [0, 1]); ``strength`` (its numerator); ``null_ratio``, the score over
    ``1/sqrt(d)``, its root mean square for independent random orientations; ``z``, the squared strength standardised by
    its closed-form mean and deviation when one of the two maps is turned by a Haar-random rotation of the stream; NaN
    where every orientation gives the same. A pair of which one side is 0 has strength 0 and no score; a pair that
    cannot reach is absent.

    Trained maps are not random, so ``z`` is large nearly everywhere. Whether a pair stands out beyond its two ends is
    ``lift``: with ``G_r`` and ``G_w``, the Gram matrices of both circuits over their traces, and ``Gbar`` their means
    over all readers of the port and all writers of the kind (head, MLP, ...), whether they reach or not::

        lift = log2( <G_r, G_w> <Gbar_r, Gbar_w> / (<G_r, Gbar_w> <Gbar_r, G_w>) )

    Beside it stand both main effects, over their value where the other side is isotropic: ``writer_effect``
    ``= log2(d <Gbar_r, G_w>)``, how widely the writer is heard, and ``reader_effect`` ``= log2(d <G_r, Gbar_w>)``, how
    widely the reader listens. A writer that feeds most readers has a large effect and little lift. The spread of lift
    falls with the distance of layers, and within one reader strength says more. Lift does not change where either map
    is scaled; it is 0 for the only writer of its kind, and absent for a map or a product that is zero.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream. With a rotary offset
    other than 0 only re-basings that turn rotary planes leave Q and K unchanged.

    Attributes:
        port: ``"Q"``, ``"K"``, ``"V"`` (readers are heads), ``"gate"``, ``"up"``, ``"in"`` (MLPs) or ``"unembed"``.
        rotary_offset: query position minus key position; None is offset 0, no rotation.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and biases too.
        compute_dtype: of products, ``"float32"`` or ``"float64"``. In float32 every map is first scaled to unit norm,
            sums of some 2,000 products are added up in float64, and pairs that are nearly orthogonal are computed in
            float64: scores differ by less than 1e-6 of ``1/sqrt(d)``.
        device: any torch device.
        memory_mb: MiB for maps and Grams that are in use together.

    Reference: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """

    question: ClassVar[str] = "composition"
    port: Port = "K"
    rotary_offset: int | None = None
    writers: Writers = "heads"
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_port(self.port)
        check_writers(self.writers)
        if self.compute_dtype not in DTYPES:
            raise UsageError(
                f"no compute dtype {self.compute_dtype!r}", expected="float64 or float32", do="choose one of these"
            )

    @property
    def dtype(self) -> torch.dtype:
        """In which pairs are multiplied."""
        return DTYPES[self.compute_dtype]

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """All pairs.

        Returns:
            A Record over (reader, writer), both in order of depth.
        """
        products, subject = self.products(subject, blocks), as_seen(subject, self.port)
        return subject.record(
            self,
            products.axes,
            _columns(products, subject.d_model, torch.finfo(self.dtype).eps),
            rotary_offset=self.rotary_offset,
            gauge="circuits: free of heads' inner bases",
            compute_dtype=self.compute_dtype,
        )

    def readers(self, stream: Stream) -> MapSide:
        """What reads through the port."""
        if self.port not in HEAD_PORTS:
            return wide_readers(stream, self.port)
        groups = stream.groups.readers(self.port)
        stack = partial(reading_circuits, stream, self.port, self.rotary_offset or 0)
        pieces = thin_pieces(groups, head_positions(groups, self.port), stack, stream.d_model)
        return MapSide(component_axis("reader", groups, self.port), pieces, stream.d_model)

    def written(self, stream: Stream) -> MapSide:
        """What writes."""
        stream = as_seen(stream, self.port)
        groups = stream.groups.heads if self.writers == "all" else stream.groups.readers("Q")
        heads = thin_pieces(groups, head_positions(groups, "O"), partial(writing_circuits, stream), stream.d_model)
        return writing_side(stream, self.writers, heads)


def _columns(products: PairProducts, d: int, eps: float) -> Iterator[Column]:
    (trace_r, square_r), (trace_w, square_w) = products.readers[:, :, None], products.writers[:, None, :]
    squared = products.squared
    mean, variance = haar_moments(trace_r, square_r, trace_w, square_w, d)
    score = squared.sqrt() / (trace_r * trace_w).sqrt()
    yield Column("score", score, "1, in [0, 1]", "||R O||_F / (||R||_F ||O||_F) over circuits")
    yield Column("strength", squared.sqrt(), "weights", "||R O||_F over circuits")
    ratio = "score over its root mean square at random orientation, 1/sqrt(d)"
    yield Column("null_ratio", score * d**0.5, "1 (ratio)", ratio)
    z = standardised(squared, mean, variance)
    yield Column("z", z, "standard deviations", "||R O||_F^2 against its Haar mean and deviation")
    yield from lift_columns(products, d, eps)


@final
@dataclass(frozen=True)
class ComponentComposition(Question[Stream]):
    """Composition of every singular component of a head's OV with a reader, or with all later heads.

    ``OV = sum_i s_i u_i v_i^T``; component i writes along ``u_i`` alone, and a reader's circuit C sees of it::

        score_i    = ||C u_i v_i^T||_F / (||C||_F ||u_i v_i^T||_F) = ||C u_i|| / ||C||_F     in [0, 1]
        strength_i = s_i ||C u_i||,      sum_i strength_i^2 = ||C OV||_F^2

    so a head whose composition as a whole is unremarkable may still write through one component. ``null_ratio`` and
    ``z`` compare with a component turned by a Haar-random rotation of the stream: mean square score 1/d. With r
    components and many readers some z are large by chance.

    Where ``gap`` is small the component is an arbitrary direction of a plane of nearly equal gains.

    Invariant under re-basing of heads (QK at offset 0) and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        writer: a head, e.g. ``"L16H0"``.
        reader: e.g. ``"L17H3.K"``, ``"L5.mlp.up"``, ``"unembed"``; None for all heads that the writer reaches.
        ports: through which ports, where the reader is None.
        rotary_offset: query position minus key position; None is offset 0.

    Reference: Merullo, Eickhoff and Pavlick 2024, "Talking Heads: Understanding Inter-layer Communication in
    Transformer Language Models".
    """

    question: ClassVar[str] = "component_composition"
    writer: str
    reader: str | None = None
    ports: tuple[HeadPort, ...] = HEAD_PORTS
    rotary_offset: int | None = None

    def __post_init__(self) -> None:
        if not self.ports or not set(self.ports) <= set(HEAD_PORTS):
            raise UsageError(f"ports {self.ports}", expected="some of Q, K and V", do="pass for example ports=('K',)")

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute all components.

        Returns:
            A Record over (component, reader), components by descending gain (numbered from 1, rounding left out), with
            columns ``score``, ``strength``, ``share`` (of ``||C OV||_F^2``), ``null_ratio``, ``z``, ``gain`` (s_i)
            and ``gap`` (relative distance to the nearest other gain).

        Raises:
            UsageError: a name is wrong, the writer is not a head, it comes after the reader, or nothing reads after it.
        """
        del progress  # it is one step
        head = stream[self.writer]
        if not isinstance(head, Head):
            raise UsageError(f"{self.writer} is not a head", expected="a head such as L16H0", do="name a head")
        factors = svd(head.ov)
        rank = Spectrum(factors.S).numerical_rank()
        gains, directions = factors.S[:rank], factors.U[:, :rank]
        readers = list(self._all(stream, directions) if self.reader is None else self._one(stream, directions))
        if not readers:
            raise UsageError(
                f"no head reads after {self.writer}", expected="an earlier writer", do="name an earlier writer"
            )
        labels, squared, moments = zip(*readers, strict=True)
        return stream.record(
            self,
            (Axis("component", tuple(str(i + 1) for i in range(rank))), Axis("reader", labels)),
            _component_columns(gains, torch.stack(squared, dim=1), torch.stack(moments), stream),
            rotary_offset=self.rotary_offset,
            gauge="circuits: free of heads' inner bases",
        )

    def _one(self, stream: Stream, directions: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The reader: its name, ``||C u_i||^2`` of every direction, and ``tr G`` and ``tr G^2`` of ``G = C^T C``."""
        assert self.reader is not None
        virtual_weight(stream, self.writer, self.reader)  # refuses a writer that comes too late
        read = reading_map(stream, parse(self.reader), self.rotary_offset or 0)
        squares = gains_of(read).square()
        moments = torch.stack([squares.sum(), squares.square().sum()])
        yield str(parse(self.reader)), (read @ directions).square().sum(0), moments

    def _all(self, stream: Stream, directions: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The same of every head that the writer reaches, port by port."""
        writer = stream.groups.of(self.writer)
        for port in self.ports:
            stack = reading_circuits(stream, port, self.rotary_offset or 0)
            assert stack.metric is not None
            moments = torch.stack(self_moments(stack), dim=1)
            for i, component in enumerate(stream.heads):
                if writer.reaches(component.reads):
                    thin = stack.outer[stack.index[i]].to(accumulate) @ directions
                    squared = (thin * (stack.metric[i] @ thin)).sum(0).clamp(min=0.0)
                    yield f"{component.label}.{port}", squared, moments[i]


def _component_columns(gains: Tensor, squared: Tensor, moments: Tensor, stream: Stream) -> Iterator[Column]:
    """Columns (components, readers) from ``||C u_i||^2`` and, for each reader, ``tr G`` and ``tr G^2``."""
    trace, square, d = moments[:, 0], moments[:, 1], stream.d_model
    squared = beyond_rounding(squared.sqrt(), trace.sqrt(), folded_eps(stream)).square()
    mean, variance = haar_moments(trace, square, 1.0, 1.0, d)
    score, strength = (squared / trace).sqrt(), gains[:, None] * squared.sqrt()
    yield Column("score", score, "1, in [0, 1]", "||C u|| / ||C||_F")
    yield Column("strength", strength, "weights", "s ||C u||: squares sum to ||C OV||_F^2")
    energy = strength.square()
    yield Column("share", energy / energy.sum(0), "1, in [0, 1]", "of ||C OV||_F^2")
    ratio = "score over its root mean square at random orientation, 1/sqrt(d)"
    yield Column("null_ratio", score * d**0.5, "1 (ratio)", ratio)
    z = "||C u||^2 against its Haar mean and deviation"
    yield Column("z", standardised(squared, mean, variance), "standard deviations", z)
    yield Column("gain", gains[:, None].expand_as(squared).clone(), "weights", "s, singular value of OV")
    gap = _gaps(gains)[:, None].expand_as(squared).clone()
    yield Column("gap", gap, "1 (ratio)", "distance to the nearest other gain over the gain; small: u is arbitrary")


def _gaps(gains: Tensor) -> Tensor:
    distance = (gains[:-1] - gains[1:]).abs()
    none = torch.full((1,), float("nan"), dtype=gains.dtype)
    return torch.fmin(torch.cat([none, distance]), torch.cat([distance, none])) / gains
