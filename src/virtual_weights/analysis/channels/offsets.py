"""A channel into queries or keys over rotary offsets: one by one, in the mean square, and the averaged QK circuit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.channels.channel import spectrum
from virtual_weights.analysis.maps.circuits import folded_eps
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Dense, LinearMap, accumulate, beyond_rounding, frobenius_norm, singular_values
from virtual_weights.linalg.decompose import triangular
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Head, Question, Stream, parse
from virtual_weights.stream.virtual import virtual_weight, writing_map


@final
@dataclass(frozen=True)
class OffsetProfile(Question[Stream]):
    """Composition of a writer with a head's queries or keys at every rotary offset of a range.

    With ``QK(D) = W_Q^T Rot(D)^T W_K`` for a key D tokens before its query::

        port K: strength(D) = ||QK(D)   OV||_F,    score(D) = strength(D) / (||QK(D)||_F ||OV||_F)
        port Q: strength(D) = ||QK(D)^T OV||_F

    The mean over offsets is that of squares, ``sqrt(mean_D ||QK(D) OV||_F^2)``: the strength where all offsets of the
    range are as likely. Without rotary embedding every offset gives the same.

    Invariant, with RMSNorm folded, under rotation of the stream, and under re-basing of the writer; of the reader only
    under re-basings that commute with the rotary planes.

    Attributes:
        writer: e.g. ``"L16H0"``, ``"L3.mlp"``, ``"embed"``.
        reader: a head's port Q or K, e.g. ``"L17H3.K"``.
        offsets: query position minus key position, each >= 0, for example a ``range``.
    """

    question: ClassVar[str] = "offset_profile"
    writer: str
    reader: str
    offsets: Iterable[int] = range(16)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", checked(self.offsets))

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute the profile.

        Returns:
            A Record over ``offset``: ``strength``, ``score``, ``null_ratio`` (score times sqrt(d)) and
            ``norm_reader`` (``||QK(D)||_F``). In the stamp ``root_mean_square``: ``strength``, ``norm_reader`` and
            ``score``, the first over the second and the writer's norm.

        Raises:
            UsageError: a name is wrong, the writer comes after the reader, or the reader is not a head's Q or K.
        """
        del progress  # it is one step
        label = parse(self.reader)
        if label.kind != "head" or label.port not in ("Q", "K"):
            raise UsageError(
                f"{self.reader} does not depend on the rotary offset",
                expected="a head's port Q or K, such as L17H3.K",
                do="name such a port, or use Channel, which takes no offset here",
            )
        virtual_weight(stream, self.writer, self.reader)  # refuses a writer that comes too late
        head, write = _head(stream, f"L{label.layer}H{label.index}"), writing_map(stream, self.writer)
        near, far = (head.k, head.q) if label.port == "K" else (head.q, head.k)
        outer, inner, alone = _core(far), _core(near @ write), _core(near)
        eps = folded_eps(stream)
        turns = [_turn(head, offset) for offset in self.offsets]
        turns = turns if label.port == "K" else [turn.T for turn in turns]
        norms = torch.stack([(outer @ turn.T @ alone.T).norm() for turn in turns])
        norms, norm_writer = beyond_rounding(norms, outer.norm() * alone.norm(), eps), frobenius_norm(write)
        strength = torch.stack([(outer @ turn.T @ inner.T).norm() for turn in turns])
        strength = beyond_rounding(strength, outer.norm() * alone.norm() * norm_writer, eps)
        score = strength / (norms * norm_writer)
        columns = (
            Column("strength", strength, "weights", "||QK(D) OV||_F"),
            Column("score", score, "1, in [0, 1]", "||QK(D) OV||_F / (||QK(D)||_F ||OV||_F)"),
            Column("null_ratio", score * stream.d_model**0.5, "1 (ratio)", "score over 1/sqrt(d)"),
            Column("norm_reader", norms, "weights", "||QK(D)||_F"),
        )
        average = {"strength": _rms(strength), "norm_reader": _rms(norms)}
        average["score"] = _ratio(average["strength"], average["norm_reader"] * norm_writer)
        axis = Axis("offset", tuple(str(offset) for offset in self.offsets))
        record = stream.record(self, (axis,), columns, norm_writer=norm_writer, root_mean_square=average)
        return _with_offsets(record, stream, self.offsets)


@final
@dataclass(frozen=True)
class MeanCircuit(Question[Stream]):
    """Spectrum of a head's QK circuit averaged over rotary offsets, ``mean_D W_Q^T Rot(D)^T W_K``.

    What survives is what the head compares whatever the distance: planes that turn fast over the range average out.

    Attributes:
        head: e.g. ``"L17H3"``.
        offsets: query position minus key position, each >= 0, for example a ``range``.
    """

    question: ClassVar[str] = "mean_circuit"
    head: str
    offsets: Iterable[int] = range(16)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", checked(self.offsets))

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute the spectrum.

        Returns:
            A Record over ``direction``: ``gain`` and ``energy`` (share of the squares). In the stamp ``kept``: the
            Frobenius norm of the mean over the root mean square norm of ``QK(D)``, in [0, 1], 1 without rotary.

        Raises:
            UsageError: no such head.
        """
        del progress  # it is one step
        head = _head(stream, self.head)
        gains = singular_values(mean_qk(stream, self.head, self.offsets))
        outer, inner = _core(head.q), _core(head.k)
        norms = torch.stack([(outer @ _turn(head, offset).T @ inner.T).norm() for offset in self.offsets])
        axis, columns = spectrum(gains, "the mean circuit")
        share = _ratio(float(gains.square().sum().sqrt()), _rms(norms))
        return _with_offsets(stream.record(self, axis, columns, kept=share), stream, self.offsets)


def mean_qk(stream: Stream, head: str, offsets: Iterable[int]) -> LinearMap:
    """``mean_D W_Q^T Rot(D)^T W_K = W_Q^T (mean_D Rot(D))^T W_K`` of a head, (d, d), in factors.

    Raises:
        UsageError: no such head, or no offset.
    """
    view = _head(stream, head)
    mean = torch.stack([_turn(view, offset) for offset in checked(offsets)]).mean(0)
    return view.q.T @ Dense(mean).T @ view.k


def checked(offsets: Iterable[int]) -> tuple[int, ...]:
    """Offsets as a tuple.

    Raises:
        UsageError: there is none, one is negative, or one comes twice.
    """
    numbers = tuple(int(offset) for offset in offsets)
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UsageError(
            f"offsets {list(numbers)[:8]}",
            expected="at least one offset, each >= 0 and listed once",
            do="pass e.g. range(16)",
        )
    return numbers


def _head(stream: Stream, name: str) -> Head:
    head = stream[name]
    if not isinstance(head, Head):
        raise UsageError(f"{name} is not a head", expected="a head such as L17H3", do="name a head")
    return head


def _turn(head: Head, offset: int) -> Tensor:
    """``Rot(offset)`` (d_head, d_head) float64; the identity without rotary embedding."""
    turn = None if head.rotate is None else head.rotate(offset)
    return torch.eye(head.q.shape[0], dtype=accumulate) if turn is None else turn.to(accumulate)


def _core(map: LinearMap) -> Tensor:
    """R (., k) with ``R^T R = map map^T`` of a map (k, n): norms of products with it are those of the map."""
    return triangular(map.to(accumulate).dense().T)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _with_offsets(record: Record, stream: Stream, offsets: Iterable[int]) -> Record:
    none = "no rotary embedding: all offsets are equal"
    turning = any(group.rotary for group in stream.groups.heads)
    return replace(record, stamp={**record.stamp, "rotary_offset": list(offsets) if turning else none})


def _ratio(part: float, whole: float) -> float:
    """A ratio; of nothing there is none."""
    return part / whole if whole else float("nan")
