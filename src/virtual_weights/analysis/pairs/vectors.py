"""Who reads a given direction of the stream, and who writes along it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import (
    TokenSide,
    folded_eps,
    head_circuits,
    head_positions,
    rank_cut,
    reading_circuits,
    writing_circuits,
)
from virtual_weights.analysis.maps.neuron_side import NeuronSide, neuron_side
from virtual_weights.checkpoint import text_of
from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    MapStack,
    accumulate,
    beyond_rounding,
    gram_sum,
    haar_moments,
    self_moments,
    standardised,
)
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream
from virtual_weights.stream.effective import as_seen, token_parts
from virtual_weights.stream.group import HEAD_PORTS, NEURON_PORTS
from virtual_weights.stream.stream import centred
from virtual_weights.stream.vector import Vector, state_of


@final
@dataclass(frozen=True, eq=False)
class _Met:
    """What some maps of one kind make of the vector.

    Attributes:
        names: of the maps.
        score: (n,) float64, ``||C v|| / (||C||_F ||v||)``; NaN of a map that is zero.
        norms: (n,) float64, ``||C||_F``.
        sign: (n,) of ``<r, v>``; NaN of circuits.
        square: (n,) ``tr G^2`` of G over its trace: 1 of a single vector.
        heard: (n,) ``<G_r, Gbar_w>``, what the map makes of what heads write on average, up to a factor; empty where
            not asked.
    """

    names: Sequence[str]
    score: Tensor
    norms: Tensor
    sign: Tensor
    square: Tensor
    heard: Tensor


_Part = tuple[_Met, Tensor, str]
"""Some maps, which of them are in the answer, and their kind."""


@dataclass(frozen=True)
class _OfVector(Question[Stream]):
    """What both questions about a vector are asked with."""

    vector: Vector
    at: str | int = 0
    tokens: int = 20

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UsageError(f"tokens={self.tokens}", expected="0 or more", do="pass for example tokens=20")

    def _placed(self, stream: Stream) -> tuple[Tensor, float, int]:
        """The direction, (d,) float64 of length 1, its length before, and the state."""
        vector = centred(stream, self.vector.of(stream))
        norm = float(vector.norm())
        return vector / norm, norm, state_of(stream, self.at)


@final
@dataclass(frozen=True)
class VectorReaders(_OfVector):
    """Every head, neuron and token that reads a direction from a state of the stream on.

    For a head's circuit C (as in ``Composition``: Q, K or V)::

        score = ||C v|| / (||C||_F ||v||)      in [0, 1], root mean square 1/sqrt(d) at random

    and for the single vector r of a neuron's port or of a token's logit ``score = |<r, v>| / (||r|| ||v||)``, with the
    ``sign`` of ``<r, v>``. ``strength`` is the numerator, ``null_ratio`` the score over ``1/sqrt(d)``, ``z`` the
    squared score against a direction at random. ``lift`` leaves out how widely the reader listens, and how widely the
    direction is read: with G over their traces, Gbar_w the mean over all heads that write and Gbar_r over all
    readers of the port::

        lift = log2( <G_r, v v^T> <Gbar_r, Gbar_w> / (<G_r, Gbar_w> <Gbar_r, v v^T>) )

    Of a vector, what LayerNorm takes away counts as nothing. Invariant under re-basing of heads (Q, K: at offset 0)
    and, with RMSNorm folded, under rotation of stream and vector.

    Attributes:
        vector: the direction.
        at: the state where it is there first: a number, or what reads that state, ``"L12"``, ``"L12.mlp"``.
        tokens: how many tokens, those of largest score.
        rotary_offset: query position minus key position; None is offset 0.
    """

    question: ClassVar[str] = "vector_readers"
    rotary_offset: int | None = None

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Go through all readers.

        Args:
            stream: the model.
            progress: called with (ports done, ports in all).

        Returns:
            A Record over ``reader``, kind by kind and in order of depth, tokens by descending score.

        Raises:
            UsageError: the vector has another width, or there is no such state.
        """
        unit, norm, state = self._placed(stream)
        mean, ports, parts = _mean_writer(stream), stream.groups.ports, list[_Part]()
        for done, port in enumerate(ports, 1):
            if port == "unembed":
                parts.append(_foremost(_tokens(stream, "unembed", unit, mean), self.tokens))
            elif port in NEURON_PORTS:
                side = neuron_side(stream, port)
                along, _, _ = self._placed(as_seen(stream, port))
                met = _single(side.labels, map(side.rows, side.ranges), along, mean)
                some = (side.positions >= state).nonzero()[:, 0]
                parts.append((met, some, "feature" if port == "enc" else "neuron"))
            elif port in HEAD_PORTS:
                groups = stream.groups.readers(port)
                names = [name for group in groups for name in group.readers(port)]
                stacks = (reading_circuits(stream, port, self.rotary_offset or 0, [group]) for group in groups)
                some = (head_positions(groups, port) >= state).nonzero()[:, 0]
                parts.append((_circuits(names, stacks, unit, mean), some, "head"))
            progress(done, len(ports))
        return _record(self, stream, "reader", parts, norm_of_vector=norm, state=state)


@final
@dataclass(frozen=True)
class VectorWriters(_OfVector):
    """Every head, neuron and token that writes along a direction before a state of the stream.

    For a head's OV circuit ``score = ||v^T OV|| / (||v|| ||OV||_F)``; for the single vector w that a neuron or a token
    embedding writes ``score = |<w, v>| / (||w|| ||v||)`` with the ``sign`` of ``<w, v>``. The other columns are as in
    :class:`VectorReaders`, without ``lift``.

    Attributes:
        vector: the direction.
        at: the last state in which what is written counts: a number, or what reads that state, ``"unembed"`` for all.
        tokens: how many tokens, those of largest score.
    """

    question: ClassVar[str] = "vector_writers"
    at: str | int = "unembed"

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Go through all writers.

        Args:
            stream: the model.
            progress: called with (kinds done, kinds in all).

        Returns:
            A Record over ``writer``, kind by kind and in order of depth, tokens by descending score.

        Raises:
            UsageError: the vector has another width, or there is no such state.
        """
        unit, norm, state = self._placed(stream)
        groups, parts = stream.groups.heads, list[_Part]()
        if groups:
            names = [label for group in groups for label in group.labels]
            stacks = (writing_circuits(stream, [group]) for group in groups)
            some = (head_positions(groups, "O") <= state).nonzero()[:, 0]
            parts.append((_circuits(names, stacks, unit, None), some, "head"))
        progress(1, 3)
        if stream.groups.mlps or stream.groups.dictionaries:
            side = neuron_side(stream, "out")
            parts.extend(part for kind in ("mlp", "dictionary") for part in _written(side, kind, state, unit))
        progress(2, 3)
        if "embed" in stream.groups:
            parts.append(_foremost(_tokens(stream, "embed", unit, None), self.tokens))
        progress(3, 3)
        return _record(self, stream, "writer", parts, norm_of_vector=norm, state=state)


def _mean_writer(stream: Stream) -> Tensor | None:
    """Gbar_w, (d, d) float64 up to a factor, of all heads' ``OV OV^T`` over its trace; None without heads."""
    heads = stream.groups.heads
    maps = (head_circuits(stream, "O", group) for group in heads)
    return gram_sum(maps, stream.d_model, rank_cut(stream)).gram if heads else None


def _circuits(names: Sequence[str], stacks: Iterator[MapStack], unit: Tensor, mean: Tensor | None) -> _Met:
    parts = list[Tensor]()
    for stack in stacks:
        assert stack.metric is not None
        trace, square = self_moments(stack)
        outer = stack.outer.to(accumulate)
        thin = (outer @ unit)[stack.index, :, None]
        energy = (thin.mT @ stack.metric @ thin)[:, 0, 0].clamp(min=0.0) / trace
        heard = torch.zeros(0, dtype=accumulate)
        if mean is not None:
            heard = (stack.metric * (outer @ mean @ outer.mT)[stack.index]).sum((1, 2)) / trace
        parts.append(torch.stack([energy.sqrt(), trace.sqrt(), square / trace**2, *([heard] if len(heard) else [])]))
    score, norms, square, *heard = torch.cat(parts, 1)
    return _Met(names, score, norms, torch.full_like(score, torch.nan), square, heard[0] if heard else score[:0])


def _single(names: Sequence[str], rows: Iterator[Tensor], unit: Tensor, mean: Tensor | None) -> _Met:
    """Maps of one row each."""
    parts = list[Tensor]()
    for part in rows:
        exact = part.to(accumulate)
        norms, along = exact.norm(dim=1), exact @ unit
        heard = [((exact @ mean) * exact).sum(1) / norms**2] if mean is not None else []
        parts.append(torch.stack([along.abs() / norms, norms, along.sign(), *heard]))
    score, norms, sign, *heard = torch.cat(parts, 1)
    return _Met(names, score, norms, sign, torch.ones_like(score), heard[0] if heard else score[:0])


def _written(side: NeuronSide, kind: str, state: int, unit: Tensor) -> Iterator[_Part]:
    """Neurons, or features, as far as they have written by a state."""
    ranges = [part for part in side.ranges if part.mlp.kind == kind and part.position <= state < part.end]
    if ranges:
        names = side.names(ranges)
        met = _single(names, map(side.rows, ranges), unit, None)
        yield met, torch.arange(len(names)), "neuron" if kind == "mlp" else "feature"


def _tokens(stream: Stream, side: TokenSide, unit: Tensor, mean: Tensor | None) -> _Met:
    met = _single((), token_parts(stream, side), unit, mean)
    texts = stream.source.token_texts()
    plain = (f"{side}[{i}]" for i in range(len(met.score)))
    names = [name if text_of(texts, i) is None else f"{name} {text_of(texts, i)!r}" for i, name in enumerate(plain)]
    return _Met(names, met.score, met.norms, met.sign, met.square, met.heard)


def _foremost(tokens: _Met, count: int) -> _Part:
    return tokens, tokens.score.nan_to_num(-1.0).argsort(descending=True, stable=True)[:count], "token"


def _record(question: _OfVector, stream: Stream, axis: str, parts: Sequence[_Part], **stamp: float) -> Record:
    names = [met.names[int(i)] for met, some, _ in parts for i in some]
    kinds = tuple(kind for _, some, kind in parts for _ in range(len(some)))
    columns: dict[str, list[Tensor]] = {name: [] for name in ("score", "strength", "sign", "z", "lift")}
    for met, some, _ in parts:
        score = beyond_rounding(met.score, 1.0, folded_eps(stream))
        mean, variance = haar_moments(1.0, met.square, 1.0, torch.ones_like(score), stream.d_model)
        columns["score"].append(score[some])
        columns["strength"].append(torch.where(met.norms > 0, score * met.norms, 0.0)[some] * stamp["norm_of_vector"])
        columns["sign"].append(torch.where(score > 0, met.sign, torch.nan)[some])
        columns["z"].append(standardised(score.square(), mean, variance)[some])
        if len(met.heard):
            energy = score.square()
            lift = energy / energy.nanmean() * met.heard.nanmean() / met.heard
            columns["lift"].append(torch.where(lift > 0, lift, torch.nan).log2()[some])
    joined = {name: torch.cat(values) for name, values in columns.items() if values}
    meanings = {
        "strength": ("weights", "||C v||, or |<r, v>| of a single vector"),
        "sign": ("1, -1 or 1", "of <r, v>; absent of circuits"),
        "z": ("standard deviations", "squared score against a direction at random"),
        "lift": ("log2", "beyond how widely the reader listens and the direction is read"),
    }
    empty = torch.empty(0, dtype=accumulate)
    score = joined.get("score", empty)
    return stream.record(
        question,
        (Axis(axis, tuple(names)),),
        (
            Column("kind", kinds, "", "head, neuron, feature or token"),
            Column("score", score, "1, in [0, 1]", "cosine, or ||C v|| / (||C||_F ||v||) of a circuit"),
            Column("null_ratio", score * stream.d_model**0.5, "1 (ratio)", "score over its root mean square at random"),
            *(Column(name, joined[name], *meanings[name]) for name in meanings if name in joined),
        ),
        gauge="circuits: free of heads' inner bases",
        **stamp,
    )
