"""Subspaces of heads, all pairs: angles, overlap against chance, and how far they bound what one can do to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import Frames, HeadRole, frames, heads_in, rank_cut
from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress, overlap_moments
from virtual_weights.linalg.decompose import gains
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Stream
from virtual_weights.stream.question import Question

_ROLES = ("Q", "K", "V", "O")
_PAIRED = ("overlap", "cosine", "strength", "bound", "tightness", "independent")


@dataclass(frozen=True)
class Subspaces(Question):
    """Principal angles between the subspaces of all pairs of heads in two roles.

    Role O is what a head writes, ``col(OV)``; Q, K and V what it reads, ``row`` of its circuit. With orthonormal bases
    Q_a, Q_b of dimensions r_a, r_b and cosines ``c = singular values of Q_a^T Q_b``:

    - ``overlap = mean c^2 = ||Q_a^T Q_b||_F^2 / min(r_a, r_b)``, ``null_ratio`` over its Haar mean ``max(r_a, r_b)/d``,
      and ``z`` by the Haar moments; ``cosine = c_1`` and ``angle = acos c_1``, the smallest principal angle (good to
      1e-8 rad); ``rank_first``, ``rank_second``.
    - With one role O and no energy cut, for circuits R and O: ``strength = ||R O||_2``;
      ``bound = ||R||_2 ||O||_2 c_1``, which it never exceeds; ``tightness = strength / bound``; and ``independent``,
      1 where ``||R O||_2 <= cut ||R||_2 ||O||_2``: the reader cannot see the writer at all. Subspaces that share only 0
      are not yet independent; their angle must be right.

    Pairs: of one role, each pair of heads once; of two reading roles, all; O with a reading role, those that can reach.
    Heads that share a key or value are one entry, named after the first of them.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream. QK at rotary offset 0.

    Attributes:
        role_a: ``"Q"``, ``"K"``, ``"V"`` or ``"O"``, the first axis.
        role_b: likewise, the second axis.
        energy: keep the fewest directions with this share of a circuit's squared singular values; None is the rank.
        cut: singular values up to this share of the largest count as zero; None is ``rank_cut`` of the stream.
        device: any torch device.
        memory_mb: workspace in MiB.

    Reference: Bjorck and Golub 1973 (principal angles); Hamm and Lee 2008 (projection kernel).
    """

    question: ClassVar[str] = "subspaces"
    role_a: HeadRole = "O"
    role_b: HeadRole = "K"
    energy: float | None = None
    cut: float | None = None
    device: str = "cpu"
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if self.role_a not in _ROLES or self.role_b not in _ROLES:
            raise UsageError(
                f"no roles {self.role_a!r} and {self.role_b!r}", expected="two of Q, K, V, O", do="choose among these"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(
                f"energy={self.energy}", expected="a share in (0, 1]", do="pass e.g. 0.99, or leave it out"
            )

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (pairs done, pairs in all).

        Returns:
            A Record over (first, second): the heads of role_a and of role_b, in order of depth.
        """
        cut = rank_cut(stream) if self.cut is None else self.cut
        heads = heads_in(stream, self.role_a), heads_in(stream, self.role_b)
        wanted = _wanted(self.role_a, self.role_b, heads[0].position, heads[1].position)
        found = {name: torch.full(wanted.shape, float("nan"), dtype=torch.float64) for name in _PAIRED}
        ranks = tuple(torch.zeros(len(side.names), dtype=torch.float64) for side in heads)
        step, done = self._layers_at_once(stream, heads[1].per_layer), 0
        layers = stream.attention_layers
        for start in range(0, len(layers), step):
            b = frames(stream, self.role_b, layers[start : start + step], cut, self.energy).to(self.device)
            columns = slice(start * heads[1].per_layer, start * heads[1].per_layer + b.count)
            ranks[1][columns] = b.rank.cpu()
            for i, layer in enumerate(layers):
                rows = slice(i * heads[0].per_layer, (i + 1) * heads[0].per_layer)
                a = frames(stream, self.role_a, (layer,), cut, self.energy).to(self.device)
                ranks[0][rows] = a.rank.cpu()
                for name, values in self._block(a, b, wanted[rows, columns], cut).items():
                    found[name][rows, columns] = values
                done += int(wanted[rows, columns].sum())
                if progress is not None:
                    progress(done, int(wanted.sum()))
        return Record(
            self.question,
            tuple(Axis(name, side.names, side.channels) for name, side in zip(("first", "second"), heads, strict=True)),
            self._columns(found, ranks, stream.d_model),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "gauge": "circuits: free of heads' inner bases; QK at rotary offset 0",
                "cut": cut,
                "pairs": int(wanted.sum()),
            },
            provenance=stream.provenance,
        )

    @property
    def _interferes(self) -> bool:
        return (self.role_a == "O") != (self.role_b == "O") and self.energy is None

    def _layers_at_once(self, stream: Stream, per_layer: int) -> int:
        """Half the workspace for the second side's frames, half for the products of a block."""
        own = per_layer * stream.spec.d_head * stream.d_model * 8
        product = stream.spec.n_heads * per_layer * stream.spec.d_head**2 * 8 * 3
        return max(1, self.memory_mb * 2**19 // max(own, product))

    def _block(self, a: Frames, b: Frames, wanted: Tensor, cut: float) -> dict[str, Tensor]:
        """All quantities of the wanted pairs of two sets of heads, NaN elsewhere."""
        at, to = wanted.nonzero(as_tuple=True)
        products = (a.basis.flatten(0, 1) @ b.basis.flatten(0, 1).T).unflatten(1, b.basis.shape[:2])
        cores = products.unflatten(0, a.basis.shape[:2]).permute(0, 2, 1, 3)[at, to]
        least = torch.minimum(a.rank[at], b.rank[to])
        cosine = _largest(cores).clamp(max=1.0)
        values = {"overlap": (cores.square().sum((1, 2)) / least).clamp(max=1.0), "cosine": cosine}
        values["cosine"] = torch.where(least > 0, cosine, float("nan"))
        if self._interferes:
            sizes = a.gains[at, 0] * b.gains[to, 0]
            strength = _largest(a.gains[at][:, :, None] * cores * b.gains[to][:, None, :])
            values |= {"strength": strength, "bound": sizes * cosine, "tightness": strength / (sizes * cosine)}
            values["independent"] = (strength <= cut * sizes).double()
        out = {}
        for name, each in values.items():
            out[name] = torch.full(wanted.shape, float("nan"), dtype=torch.float64)
            out[name][at, to] = each.cpu()
        return out

    def _columns(self, found: dict[str, Tensor], ranks: tuple[Tensor, ...], d: int) -> tuple[Column, ...]:
        r_a, r_b = ranks[0][:, None], ranks[1][None, :]
        mean, variance = overlap_moments(r_a, r_b, d)
        overlap, shape = found["overlap"], found["overlap"].shape
        columns = (
            Column("overlap", overlap, "1, in [0, 1]", "mean cos^2 of principal angles"),
            Column("null_ratio", overlap / mean, "1 (ratio)", "over the Haar mean max(r_a, r_b)/d"),
            Column("z", (overlap - mean) / variance.sqrt(), "standard deviations", "against the Haar moments"),
            Column("cosine", found["cosine"], "1, in [0, 1]", "cosine of the smallest principal angle"),
            Column("angle", found["cosine"].acos(), "rad, in [0, pi/2]", "smallest principal angle"),
            Column("rank_first", r_a.expand(shape), "dimensions", "dimension of the first subspace"),
            Column("rank_second", r_b.expand(shape), "dimensions", "dimension of the second subspace"),
        )
        if not self._interferes:
            return columns
        return (
            *columns,
            Column("strength", found["strength"], "weights", "||R O||_2 over circuits"),
            Column("bound", found["bound"], "weights", "||R||_2 ||O||_2 cos(theta_min)"),
            Column("tightness", found["tightness"], "1, in [0, 1]", "strength / bound; absent where both are 0"),
            Column("independent", found["independent"], "0 or 1", "||R O||_2 <= cut ||R||_2 ||O||_2"),
        )


@final
@dataclass(frozen=True)
class SubspaceFigures:
    """A Subspaces record in a few numbers, over its pairs; None where there is none, or the roles do not interfere."""

    pairs: int
    mean_overlap: float | None
    mean_null_ratio: float | None
    least_angle: float | None
    independent: int | None
    median_tightness: float | None
    largest_tightness: float | None


def figures(record: Record) -> SubspaceFigures:
    """Sum up a record of ``Subspaces``; NaN pairs count in nothing."""
    names = {column.name for column in record.columns}

    def told(name: str, figure: Callable[[Tensor], Tensor]) -> float | None:
        values = record.numbers(name) if name in names else torch.empty(0)
        values = values[~values.isnan()]
        return float(figure(values)) if len(values) else None

    independent = told("independent", torch.sum)
    return SubspaceFigures(
        pairs=record.stamp["pairs"],
        mean_overlap=told("overlap", torch.mean),
        mean_null_ratio=told("null_ratio", torch.mean),
        least_angle=told("angle", torch.amin),
        independent=None if independent is None else int(independent),
        median_tightness=told("tightness", torch.median),
        largest_tightness=told("tightness", torch.amax),
    )


def _wanted(role_a: HeadRole, role_b: HeadRole, position_a: Tensor, position_b: Tensor) -> Tensor:
    if role_a == role_b:
        return torch.ones(len(position_a), len(position_b), dtype=torch.bool).triu(1)
    if role_a == "O":
        return position_a[:, None] <= position_b[None, :]
    if role_b == "O":
        return position_b[None, :] <= position_a[:, None]
    return torch.ones(len(position_a), len(position_b), dtype=torch.bool)


def _largest(matrices: Tensor) -> Tensor:
    """Largest singular value of each of a batch."""
    return gains(matrices)[:, 0] if len(matrices) else matrices.new_empty(0)
