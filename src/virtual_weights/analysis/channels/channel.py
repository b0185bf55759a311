"""One head's circuit, and one virtual weight as a channel: gains, effective ranks and the edge of a matched null."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    LinearMap,
    Spectrum,
    frobenius_norm,
    haar_moments,
    singular_values,
    spectrum_null_edge,
    standardised,
)
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Head, Question, Stream, parse
from virtual_weights.stream.virtual import reading_map, virtual_weight, writing_map


@final
@dataclass(frozen=True)
class Circuit(Question[Stream]):
    """Spectrum of one head's circuit: OV, from stream to stream, or QK, from the key's stream to the query's.

    Attributes:
        circuit: e.g. ``"L16H0.ov"`` or ``"L17H3.qk"``.
        rotary_offset: query position minus key position, for QK; None is offset 0.
    """

    question: ClassVar[str] = "circuit"
    circuit: str
    rotary_offset: int | None = None

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute the spectrum.

        Returns:
            A Record over ``direction``, with the columns of ``Channel`` and ``stamp["shape"]``.

        Raises:
            UsageError: the name is of another form, or the model has no such head.
        """
        del progress  # it is one step
        map = circuit_map(stream, self.circuit, self.rotary_offset or 0)
        axis, columns = spectrum(singular_values(map), "the circuit")
        return stream.record(self, axis, columns, rotary_offset=self.rotary_offset, shape=list(map.shape))


def circuit_map(stream: Stream, name: str, offset: int = 0) -> LinearMap:
    """One head's circuit by name, ``"L16H0.ov"`` or ``"L17H3.qk"``: stream to stream, (d, d).

    Raises:
        UsageError: the name is of another form, or the model has no such head.
    """
    stem, _, kind = name.rpartition(".")
    head = stream[stem] if kind in ("ov", "qk") else None
    if not isinstance(head, Head):
        raise UsageError(
            f"{name!r} alone is not a circuit",
            expected="a head's circuit, L16H0.ov or L17H3.qk",
            do="name a circuit, or a writer and a reader",
        )
    return head.ov if kind == "ov" else head.qk_at(offset)


def spectrum(gains: Tensor, map: str) -> tuple[tuple[Axis, ...], tuple[Column, ...]]:
    """The axis ``direction`` and the columns ``gain`` and ``energy`` of the singular values of a map, descending."""
    energy = gains.square()
    return (Axis("direction", tuple(str(i + 1) for i in range(len(gains)))),), (
        Column("gain", gains, "weights", f"singular values of {map}"),
        Column("energy", energy / energy.sum(), "1, in [0, 1]", "share of its squared Frobenius norm"),
    )


@dataclass(frozen=True)
class Channel(Question[Stream]):
    """Spectrum of the virtual weight from a writer to a reader's port.

    ``V = U S T^T`` from QR of the outer factors and SVD of the small core, in float64. Heads enter by
    their circuits (a writing head by OV, a reading head by QK^T, QK or OV), so the gains are free of
    inner bases; other components by their own maps. A gain that is rounding of both maps is 0.

    The null keeps both maps' singular values and turns one by a Haar-random rotation of the stream;
    its edge is a quantile of the largest gain over seeded draws.

    Attributes:
        writer: e.g. ``"L16H0"``.
        reader: e.g. ``"L17H3.K"``.
        rotary_offset: query position minus key position; None is offset 0.
        draws: how many draws of the null.
        quantile: which quantile of the largest gain is the edge.
        seed: seed of the draws.
    """

    question: ClassVar[str] = "channel"
    writer: str
    reader: str
    rotary_offset: int | None = None
    draws: int = 50
    quantile: float = 0.99
    seed: int = 0

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute the spectrum.

        Returns:
            A Record over ``direction``, one entry per gain, descending: ``gain`` (weights) and
            ``energy`` (share of ``||V||_F^2``). ``stamp["null_edge"]``, ``["norm_reader"]``,
            ``["norm_writer"]`` and ``["z"]`` complete it; ``summary`` reads the effective ranks off.

        Raises:
            UsageError: a name is wrong, or the writer comes after the reader.
        """
        del progress  # it is one step
        offset = self.rotary_offset or 0
        virtual = virtual_weight(stream, self.writer, self.reader, offset)
        read, write = reading_map(stream, parse(self.reader), offset), writing_map(stream, self.writer)
        gains, s_read, s_write = singular_values(virtual), singular_values(read), singular_values(write)
        (trace_r, square_r), (trace_w, square_w) = ((s.square().sum(), s.pow(4).sum()) for s in (s_read, s_write))
        mean, variance = haar_moments(trace_r, square_r, trace_w, square_w, stream.d_model)
        axis, columns = spectrum(gains, "V")
        return stream.record(
            self,
            axis,
            columns,
            rotary_offset=self.rotary_offset,
            shape=list(virtual.shape),
            null_edge=spectrum_null_edge(read, write, self.draws, self.seed, self.quantile),
            norm_reader=frobenius_norm(read),
            norm_writer=frobenius_norm(write),
            z=float(standardised(gains.square().sum(), mean, variance)),
        )


def summary(record: Record) -> dict[str, float | int | list[int] | None]:
    """The figures of a channel: strength, ranks, score and how many gains stand above the null's edge.

    Where one of its two ends is zero, score and z are undefined (None) and strength is 0.

    Of a ``Circuit`` only shape, strength and ranks.
    """
    gains, stamp = record.numbers("gain"), record.stamp
    ranks, strength = Spectrum(gains), float(gains.square().sum().sqrt())
    figures: dict[str, float | int | list[int] | None] = {
        "shape": stamp["shape"],
        "strength": strength,
        "numerical_rank": ranks.numerical_rank(),
        "stable_rank": ranks.stable_rank,
        "entropy_rank": ranks.entropy_rank,
        "participation_ratio": ranks.participation_ratio,
    }
    if record.question == Channel.question:
        ends = stamp["norm_reader"] * stamp["norm_writer"]
        figures |= {
            "score": strength / ends if ends else None,
            "z": stamp["z"],
            "null_edge": stamp["null_edge"],
            "above_null_edge": ranks.count_above(stamp["null_edge"]),
        }
    return figures
