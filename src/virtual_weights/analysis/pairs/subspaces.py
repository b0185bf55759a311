"""Subspaces of heads, all pairs: angles, overlap against chance, and how far they bound what one can do to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import (
    HeadRole,
    SubspaceBases,
    check_energy,
    heads_per_group,
    rank_cut,
    subspace_axis,
    subspace_bases,
)
from virtual_weights.errors import UsageError
from virtual_weights.linalg import overlap_moments, standardised
from virtual_weights.linalg.decompose import gains
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Column, Record
from virtual_weights.stream import Group, Question, Stream, cost

_ROLES = ("Q", "K", "V", "O")
_PAIRED = ("overlap", "cosine", "strength", "bound", "tightness", "independent")


@dataclass(frozen=True)
class Subspaces(Question[Stream]):
    """Principal angles between the subspaces of all pairs of heads in two roles.

    Role O is what a head writes, ``col(OV)``; Q, K and V what it reads, ``row`` of its circuit. With orthonormal bases
    Q_a, Q_b of dimensions r_a, r_b and cosines ``c = singular values of Q_a^T Q_b``:

    - ``overlap = mean c^2 = ||Q_a^T Q_b||_F^2 / min(r_a, r_b)``, ``null_ratio`` over its Haar mean ``max(r_a, r_b)/d``,
      and ``z`` by the Haar moments; ``cosine = c_1`` and ``angle = acos c_1``, the smallest principal angle (good to
      1e-8 rad); ``rank_first``, ``rank_second``.
    - With one role O and no energy cut, for circuits R and O: ``strength = ||R O||_2``;
      ``bound = ||R||_2 ||O||_2 c_1``, which it never exceeds; ``tightness = strength / bound``; and ``independent``,
      1 where ``||R O||_2 <= cut ||R||_2 ||O||_2``: the reader cannot see the writer at all. Subspaces that share only 0
      are not yet independent: they must be orthogonal.

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
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        if self.role_a not in _ROLES or self.role_b not in _ROLES:
            raise UsageError(
                f"roles {self.role_a!r} and {self.role_b!r}", expected="two of Q, K, V, O", do="choose among these"
            )
        check_energy(self.energy)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (pairs done, pairs in all).

        Returns:
            A Record over (first, second): the heads of role_a and of role_b, in order of depth.
        """
        cut = rank_cut(stream) if self.cut is None else self.cut
        first, position_a = subspace_axis(stream, "first", self.role_a)
        second, position_b = subspace_axis(stream, "second", self.role_b)
        pairs = _pairs(self.role_a, self.role_b, position_a, position_b)
        table = {name: torch.full(pairs.shape, float("nan"), dtype=torch.float64) for name in _PAIRED}
        ranks = tuple(torch.zeros(size, dtype=torch.float64) for size in pairs.shape)
        groups, done = stream.groups.heads, 0
        rows_per_group, per_group = (heads_per_group(stream, role) for role in (self.role_a, self.role_b))
        step = self._groups_at_once(stream, per_group)
        for start in range(0, len(groups), step):
            b = self._bases(stream, self.role_b, groups[start : start + step], cut)
            columns = slice(start * per_group, start * per_group + len(b.rank))
            ranks[1][columns] = b.rank.cpu()
            for i, group in enumerate(groups):
                rows = slice(i * rows_per_group, (i + 1) * rows_per_group)
                a = self._bases(stream, self.role_a, (group,), cut)
                ranks[0][rows] = a.rank.cpu()
                for name, values in self._block(a, b, pairs[rows, columns], cut).items():
                    table[name][rows, columns] = values
                done += int(pairs[rows, columns].sum())
                progress(done, int(pairs.sum()))
        return stream.record(
            self,
            (first, second),
            self._columns(table, ranks, stream.d_model),
            gauge="circuits: free of heads' inner bases; QK at rotary offset 0",
            cut=cut,
            pairs=int(pairs.sum()),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the answer, which depend on the roles and on ``energy``."""
        empty = torch.empty(0, 0)
        ranks = torch.empty(0), torch.empty(0)
        return tuple(column.name for column in self._columns(dict.fromkeys(_PAIRED, empty), ranks, 2))

    @property
    def _interferes(self) -> bool:
        return (self.role_a == "O") != (self.role_b == "O") and self.energy is None

    def _bases(self, stream: Stream, role: HeadRole, groups: Sequence[Group], cut: float) -> SubspaceBases:
        return subspace_bases(stream, role, groups, cut, self.energy).to(self.device)

    def _groups_at_once(self, stream: Stream, per_group: int) -> int:
        """Half the workspace for the second side's bases, half for the products of a block."""
        heads = stream.groups.heads[0]
        bases = per_group * heads.width * stream.d_model * 8
        products = len(heads.components) * per_group * heads.width**2 * 8 * 3
        return max(1, self.memory_mb * 2**19 // max(bases, products))

    def _block(self, a: SubspaceBases, b: SubspaceBases, pairs: Tensor, cut: float) -> dict[str, Tensor]:
        """All quantities of some pairs of two sets of subspaces, NaN elsewhere."""
        i, j = pairs.nonzero(as_tuple=True)
        products = (a.basis.flatten(0, 1) @ b.basis.flatten(0, 1).T).unflatten(1, b.basis.shape[:2])
        cores = products.unflatten(0, a.basis.shape[:2]).permute(0, 2, 1, 3)[i, j]
        rank = torch.minimum(a.rank[i], b.rank[j])
        cosine = _largest(cores).clamp(max=1.0)
        values = {"overlap": (cores.square().sum((1, 2)) / rank).clamp(max=1.0)}
        cosine = cosine.masked_fill(cosine <= cut, 0.0)
        values["overlap"] = values["overlap"].masked_fill((cosine == 0) & (rank > 0), 0.0)
        values["cosine"] = torch.where(rank > 0, cosine, float("nan"))
        if self._interferes:
            sizes = a.gains[i, 0] * b.gains[j, 0]
            strength = _largest(a.gains[i][:, :, None] * cores * b.gains[j][:, None, :])
            independent = strength <= cut * sizes
            strength = strength.masked_fill(independent, 0.0)
            values |= {"strength": strength, "bound": sizes * cosine, "tightness": strength / (sizes * cosine)}
            values["independent"] = independent.double()
        block = {name: torch.full(pairs.shape, float("nan"), dtype=torch.float64) for name in values}
        for name, column in values.items():
            block[name][i, j] = column.cpu()
        return block

    def _columns(self, table: dict[str, Tensor], ranks: tuple[Tensor, ...], d: int) -> Iterator[Column]:
        r_a, r_b = ranks[0][:, None], ranks[1][None, :]
        mean, variance = overlap_moments(r_a, r_b, d)
        overlap, shape = table["overlap"], table["overlap"].shape
        yield Column("overlap", overlap, "1, in [0, 1]", "mean cos^2 of principal angles")
        yield Column("null_ratio", overlap / mean, "1 (ratio)", "over the Haar mean max(r_a, r_b)/d")
        yield Column("z", standardised(overlap, mean, variance), "standard deviations", "against the Haar moments")
        yield Column("cosine", table["cosine"], "1, in [0, 1]", "cosine of the smallest principal angle")
        yield Column("angle", table["cosine"].acos(), "rad, in [0, pi/2]", "smallest principal angle")
        yield Column("rank_first", r_a.expand(shape), "dimensions", "dimension of the first subspace")
        yield Column("rank_second", r_b.expand(shape), "dimensions", "dimension of the second subspace")
        if self._interferes:
            yield Column("strength", table["strength"], "weights", "||R O||_2 over circuits")
            yield Column("bound", table["bound"], "weights", "||R||_2 ||O||_2 cos(theta_min)")
            yield Column("tightness", table["tightness"], "1, in [0, 1]", "strength / bound; absent where both are 0")
            yield Column("independent", table["independent"], "0 or 1", "||R O||_2 <= cut ||R||_2 ||O||_2")


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

    def over_pairs(name: str, figure: Callable[[Tensor], Tensor]) -> float | None:
        values = record.numbers(name) if name in names else torch.empty(0)
        values = values[~values.isnan()]
        return float(figure(values)) if len(values) else None

    independent = over_pairs("independent", torch.sum)
    return SubspaceFigures(
        pairs=record.stamp["pairs"],
        mean_overlap=over_pairs("overlap", torch.mean),
        mean_null_ratio=over_pairs("null_ratio", torch.mean),
        least_angle=over_pairs("angle", torch.amin),
        independent=None if independent is None else int(independent),
        median_tightness=over_pairs("tightness", torch.median),
        largest_tightness=over_pairs("tightness", torch.amax),
    )


def _pairs(role_a: HeadRole, role_b: HeadRole, position_a: Tensor, position_b: Tensor) -> Tensor:
    """Which pairs are compared, (n_a, n_b) bool."""
    every = torch.ones(len(position_a), len(position_b), dtype=torch.bool)
    if role_a == role_b:
        return every.triu(1)
    if "O" not in (role_a, role_b):
        return every
    written, read = position_a[:, None], position_b[None, :]
    return written <= read if role_a == "O" else read <= written


def _largest(matrices: Tensor) -> Tensor:
    """Largest singular value of each of a batch."""
    return gains(matrices)[:, 0] if len(matrices) else matrices.new_empty(0)
