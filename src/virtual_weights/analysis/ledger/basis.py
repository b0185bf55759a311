"""The basis of a trained stream: whether its coordinates are special, which the architecture does not require."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import HeadRole, rank_cut, subspace_bases
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Group, Question, Stream
from virtual_weights.stream.effective import centring
from virtual_weights.stream.turned import random_turn

_CHUNK_BYTES = 2 * 2**20  # directions at once: what stays in a cache, never a whole vocabulary


@final
@dataclass(frozen=True)
class Basis(Question[Stream]):
    """Kurtosis and energy of what is written and read, coordinate by coordinate of the stream.

    For a direction v in R^d the **kurtosis** over coordinates is ``d sum v_i^4 / (sum v_i^2)^2``: 3 n/(n + 2) on
    average for a direction without preferred basis in n dimensions (n = d, or d - 1 where LayerNorm's centring is
    folded; what is written is then centred too), d for one along an axis, 1 where all coordinates are equal in size.
    What coordinate i contributes to it is ``d^2 v_i^4 / |v|^4``, and to the energy ``d v_i^2 / |v|^2``; both are
    averaged over all directions, each counting alike: columns of MLPs and embeddings, rows of MLPs and the unembedding
    (norm folded), and singular directions of heads' circuits, free of their inner bases. The mean over coordinates is
    the mean kurtosis.

    Beside it the same after a random rotation of the stream, as ``rotate`` makes it: that is the kurtosis of an
    arbitrary basis. Nothing here is invariant under rotation: that is the question.

    Attributes:
        massive: a coordinate whose energy is above this multiple of the mean is called massive.
        seed: of the rotation.

    Reference: Elhage, Lasenby and Olah 2023, "Privileged Bases in the Transformer Residual Stream".
    """

    question: ClassVar[str] = "basis"
    massive: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1.0 < self.massive < math.inf:
            raise UsageError(
                f"massive={self.massive}", expected="a finite multiple above 1", do="pass for example massive=3"
            )

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Go through all writers and readers.

        Args:
            stream: the model.
            progress: called with (groups done, groups in all).

        Returns:
            A Record over ``coordinate`` with ``write_energy``, ``write_kurtosis``, ``read_energy``, ``read_kurtosis``,
            the two kurtoses ``..._turned``, and ``massive`` (0 or 1).
        """
        turn = random_turn(stream, self.seed)
        sides = {"write": _Sum(stream.d_model, turn), "read": _Sum(stream.d_model, turn)}
        for done, group in enumerate(stream.groups, 1):
            for side, rows in _directions(stream, group):
                sides[side].add(rows)
            progress(done, len(stream.groups.all))
        columns = [column for side, total in sides.items() for column in total.columns(side)]
        massive = torch.fmax(sides["write"].energy, sides["read"].energy) > self.massive
        meaning = f"energy above {self.massive} times the mean"
        free = stream.d_model - (stream.folded and centring(stream))  # dimensions, see Stream.write
        return stream.record(
            self,
            (Axis("coordinate", tuple(map(str, range(stream.d_model)))),),
            (*columns, Column("massive", massive.double(), "0 or 1", meaning)),
            gaussian=3 * free / (free + 2),
        )


def summary(record: Record) -> dict[str, Any]:
    """Mean kurtosis of writes and reads (None where there are none), before and after the rotation, and the massive."""
    names = ("write_kurtosis", "write_kurtosis_turned", "read_kurtosis", "read_kurtosis_turned")
    means = {name: float(record.numbers(name).mean()) for name in names}
    energy = torch.fmax(record.numbers("write_energy"), record.numbers("read_energy"))
    massive = [int(i) for i in energy.argsort(descending=True) if bool(record.numbers("massive")[i])]
    return {
        **{name: mean if mean == mean else None for name, mean in means.items()},
        "gaussian": record.stamp["gaussian"],
        "massive": [{"coordinate": i, "energy": float(energy[i])} for i in massive],
    }


class _Sum:
    """Running means over directions, each of length 1."""

    def __init__(self, d: int, turn: Tensor) -> None:
        self._d, self._turn, self._count = d, turn, 0
        self._squares, self._fourth, self._turned = (torch.zeros(d, dtype=accumulate) for _ in range(3))

    def add(self, rows: Tensor) -> None:
        for chunk in rows.split(max(1, _CHUNK_BYTES // (8 * self._d))):
            chunk = chunk.to(accumulate)
            squares = chunk.square()
            size = squares.sum(1, keepdim=True)
            if not bool((size > 0).all()):
                chunk, squares, size = (x[size[:, 0] > 0] for x in (chunk, squares, size))
            self._count += len(chunk)
            squares /= size
            self._squares += squares.sum(0)
            self._fourth += squares.square_().sum(0)
            self._turned += (chunk @ self._turn.T).square_().div_(size).square_().sum(0)

    @property
    def energy(self) -> Tensor:
        return self._d * self._squares / (self._count or torch.nan)

    def columns(self, side: str) -> Iterator[Column]:
        scale = self._d**2 / (self._count or torch.nan)
        what = "written" if side == "write" else "read"
        yield Column(f"{side}_energy", self.energy, "1 (ratio)", f"share of what is {what} here, over 1/d")
        yield Column(f"{side}_kurtosis", scale * self._fourth, "1", f"contribution to the kurtosis of what is {what}")
        yield Column(f"{side}_kurtosis_turned", scale * self._turned, "1", "the same after a random rotation")


def _directions(stream: Stream, group: Group) -> Iterator[tuple[str, Tensor]]:
    """What a group writes and reads, as rows; heads by the singular directions of their circuits."""
    if group.kind == "head":
        roles: tuple[HeadRole, ...] = ("O", "Q", "K", "V")
        for role in roles:
            basis = subspace_bases(stream, role, [group], rank_cut(stream)).basis
            yield ("write" if role == "O" else "read"), basis.flatten(0, 1)
        return
    if group.writes:
        yield "write", stream.write(group)[0].T
    for port in group.ports:
        yield "read", stream.read(port, group).maps[0]
