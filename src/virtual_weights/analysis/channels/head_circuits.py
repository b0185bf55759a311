"""The circuits of all heads by their spectra: how strong OV and QK are, and through how many directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.head_svd import HeadCircuit, head_svd
from virtual_weights.errors import MissingTensorError
from virtual_weights.linalg import Spectrum, accumulate, side_by_side
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Group, Question, Stream
from virtual_weights.stream.group import no_heads

_CIRCUITS: dict[HeadCircuit, str] = {
    "ov": "singular values of OV, from the stream at the key to the stream at the query",
    "qk": "singular values of QK, between the stream at the query and at the key",
}


@final
@dataclass(frozen=True)
class HeadCircuits(Question[Stream]):
    """Singular values of every head's OV and QK circuit.

    ``OV = W_O W_V`` and ``QK(D) = W_Q^T Rot(D)^T W_K``, from QR of the thin factors and SVD of the small core, in
    float64; of each head the same gains as ``Circuit``. :func:`summary` gives strength and effective number of
    directions of each head.

    Invariant under re-basing of heads (QK at offset 0) and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        rotary_offset: query position minus key position, for QK; None is offset 0.
    """

    question: ClassVar[str] = "head_circuits"
    rotary_offset: int | None = None

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute the spectra.

        Args:
            stream: the model.
            progress: called with (attentions done, attentions in all).

        Returns:
            A Record over (head, direction): ``ov`` and ``qk`` (weights), descending. NaN beyond min(d_head, d)
            directions, and of a circuit of which a partial checkpoint lacks a factor.

        Raises:
            UsageError: the checkpoint holds no attention head.
        """
        groups = stream.groups.heads
        if not groups:
            raise no_heads()
        blocks: list[dict[HeadCircuit, Tensor]] = []
        for block in side_by_side(partial(_gains, stream, self.rotary_offset or 0), groups):
            blocks.append(block)
            progress(len(blocks), len(groups))
        width = max(gains.shape[1] for block in blocks for gains in block.values())
        head = Axis("head", tuple(str(head.label) for head in stream.heads))
        direction = Axis("direction", tuple(str(i + 1) for i in range(width)))
        return stream.record(
            self,
            (head, direction),
            (
                Column(name, torch.cat([_padded(block[name], width) for block in blocks]), "weights", meaning)
                for name, meaning in _CIRCUITS.items()
            ),
            rotary_offset=self.rotary_offset,
            gauge="circuits: free of heads' inner bases",
        )


def _gains(stream: Stream, offset: int, group: Group) -> dict[HeadCircuit, Tensor]:
    """The gains of one attention's heads, (heads, r); (heads, 0) of a circuit without one of its factors."""

    def gains(circuit: HeadCircuit) -> Tensor:
        try:
            return head_svd(stream, circuit, group, offset).S
        except MissingTensorError:
            return torch.empty(len(group.components), 0, dtype=accumulate)

    return {circuit: gains(circuit) for circuit in _CIRCUITS}


def _padded(gains: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(gains, (0, width - gains.shape[1]), value=torch.nan)


def summary(record: Record) -> list[dict[str, Any]]:
    """Every head in figures: strength, largest gain and effective number of directions of each circuit.

    Returns:
        A row for each head: ``head``; ``ov_strength`` (``||OV||_F``, weights), ``ov_gain`` (the largest, weights) and
        ``ov_directions`` (entropy rank of the squared gains); ``qk_`` likewise. None of a circuit that is absent.
    """
    circuits = {name: record.numbers(name) for name in _CIRCUITS}

    def figures(i: int) -> Iterator[tuple[str, float | None]]:
        for name, gains in circuits.items():
            row = gains[i][~gains[i].isnan()]
            present = len(row) > 0
            yield f"{name}_strength", float(row.norm()) if present else None
            yield f"{name}_gain", float(row[0]) if present else None
            yield f"{name}_directions", Spectrum(row).entropy_rank if present else None

    return [{"head": head, **dict(figures(i))} for i, head in enumerate(record.axis("head").labels)]
