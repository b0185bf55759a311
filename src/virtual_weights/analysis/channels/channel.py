"""One virtual weight as a channel: its gains, its effective ranks and what a matched null would show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import LinearMap, Progress, Spectrum, frobenius_norm, haar_moments, spectrum_null_edge, svd
from virtual_weights.linalg import singular_values as gains_of
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Head, Stream, parse
from virtual_weights.stream.question import Question
from virtual_weights.stream.virtual import reading_map, virtual_weight, writing_map


@dataclass(frozen=True)
class Channel(Question):
    """Spectrum of the virtual weight from a writer to a reader's port.

    ``V = U S T^T`` from QR of the outer factors and SVD of the small core, in float64. Heads enter by
    their circuits (a writing head by OV, a reading head by QK^T, QK or OV), so the gains are free of
    inner bases; other parts by their own maps.

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

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
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
        gains = svd(virtual).S
        edge = spectrum_null_edge(read, write, self.draws, self.seed, self.quantile)
        s_read, s_write = gains_of(read), gains_of(write)
        squares = [s.square().sum() for s in (s_read, s_write, s_read.square(), s_write.square())]
        mean, variance = haar_moments(squares[0], squares[2], squares[1], squares[3], stream.d_model)
        energy = gains.square()
        return Record(
            self.question,
            (Axis("direction", tuple(str(i + 1) for i in range(len(gains)))),),
            (
                Column("gain", gains, "weights", "singular values of V"),
                Column("energy", energy / energy.sum(), "1, in [0, 1]", "share of ||V||_F^2"),
            ),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "rotary_offset": "no rotary embedding" if stream.spec.rotary is None else offset,
                "shape": list(virtual.shape),
                "null_edge": edge,
                "norm_reader": frobenius_norm(read),
                "norm_writer": frobenius_norm(write),
                "z": float((energy.sum() - mean) / variance.sqrt()),
            },
            provenance=stream.provenance,
        )


def summary(record: Record) -> dict[str, float | int | list[int]]:
    """The figures of a channel: score, strength, ranks and how many gains stand above the null's edge."""
    gains = record.numbers("gain")
    stamp = record.stamp
    strength = float(gains.square().sum().sqrt())
    return {
        "shape": stamp["shape"],
        "strength": strength,
        "score": strength / (stamp["norm_reader"] * stamp["norm_writer"]),
        "z": stamp["z"],
        **_ranks(gains),
        "null_edge": stamp["null_edge"],
        "above_null_edge": Spectrum(gains).count_above(stamp["null_edge"]),
    }


def circuit(stream: Stream, name: str, offset: int = 0) -> LinearMap:
    """One head's circuit by name, ``"L16H0.ov"`` or ``"L17H3.qk"``: stream to stream, (d, d).

    Raises:
        UsageError: the name is of another form, or the model has no such head.
    """
    stem, _, kind = name.rpartition(".")
    head = stream[stem] if kind in ("ov", "qk") else None
    if not isinstance(head, Head):
        raise UsageError(
            f"{name!r} alone is no circuit",
            expected="a head's circuit, L16H0.ov or L17H3.qk",
            do="name a circuit, or a writer and a reader",
        )
    return head.ov if kind == "ov" else head.qk_at(offset)


def circuit_summary(stream: Stream, name: str, offset: int = 0) -> tuple[dict[str, float | int | list[int]], Tensor]:
    """Shape, strength (Frobenius norm) and ranks of one circuit, and its gains (r,), descending."""
    own = circuit(stream, name, offset)
    gains = gains_of(own)
    return {"shape": list(own.shape), "strength": float(gains.square().sum().sqrt()), **_ranks(gains)}, gains


def _ranks(gains: Tensor) -> dict[str, float | int]:
    spectrum = Spectrum(gains)
    return {
        "numerical_rank": spectrum.numerical_rank(),
        "stable_rank": spectrum.stable_rank,
        "entropy_rank": spectrum.entropy_rank,
        "participation_ratio": spectrum.participation_ratio,
    }
