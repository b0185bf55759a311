"""Subspaces of heads, all pairs: angles, overlap against chance, and how far they bound what one can do to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

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
from virtual_weights.linalg import accumulate, overlap_moments, side_by_side, standardised
from virtual_weights.linalg.decompose import largest_gains
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Column, Record
from virtual_weights.stream import Block, Blocked, Group, Stream, Work, cost
from virtual_weights.stream.group import no_heads

_ROLES = ("Q", "K", "V", "O")
_PAIRED = ("overlap", "cosine", "strength", "bound", "tightness", "independent")


@dataclass(frozen=True)
class Subspaces(Blocked[Stream]):
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
        memory_mb: for bases that are in memory together, in MiB.

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

    def blocks(self, subject: Stream) -> tuple[str, ...]:
        """One for each attention on the second axis.

        Raises:
            UsageError: the checkpoint holds no attention head.
        """
        if not subject.groups.heads:
            raise no_heads()
        return tuple(group.id for group in subject.groups.heads)

    @classmethod
    def compute(cls, work: Work, subject: Stream, progress: Progress = silent) -> Iterator[tuple[Any, str, Block]]:
        """Pairs with some attentions of the second side, whose bases fit in memory; the first side's pass by once.

        Questions whose first sides have the same bases share the pass.
        """
        alike, done, groups = dict[Any, list[tuple[Subspaces, str]]](), 0, subject.groups.heads
        for question, name in work:
            alike.setdefault((question.role_a, question.energy, question.cut, question.device), []).append(
                (question, name)
            )
        for rest in alike.values():
            step = max(1, rest[0][0].memory_mb * 2**19 // _bytes(subject))
            for start in range(0, len(rest), step):
                device = rest[0][0].device
                seconds = list(side_by_side(partial(_second, subject), rest[start : start + step], device))
                for _ in side_by_side(partial(_meet, subject, seconds), groups, device):
                    done += len(seconds)
                    progress(done, len(work) * len(groups))
                for second in seconds:
                    yield second.question, second.name, second.block

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """All pairs.

        Returns:
            A Record over (first, second): the heads of role_a and of role_b, in order of depth.
        """
        blocks = list(blocks)
        table = {name: torch.cat([block[name] for block in blocks], 1) for name in self.paired}
        rank_first, rank_second = (torch.cat([block[name] for block in blocks]) for name in _RANKS)
        return subject.record(
            self,
            (subspace_axis(subject, "first", self.role_a)[0], subspace_axis(subject, "second", self.role_b)[0]),
            self._columns(table, (rank_first, rank_second), subject.d_model),
            gauge="circuits: free of heads' inner bases; QK at rotary offset 0",
            cut=self.cut_of(subject),
            pairs=int(self.pairs(subject).sum()),
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

    @property
    def paired(self) -> tuple[str, ...]:
        """Names of what is computed of every pair."""
        return _PAIRED if self._interferes else _PAIRED[:2]

    def cut_of(self, stream: Stream) -> float:
        """The cut, that of the stream where none is given."""
        return rank_cut(stream) if self.cut is None else self.cut

    def pairs(self, stream: Stream) -> Tensor:
        """Which pairs are compared, (n_a, n_b) bool."""
        (_, position_a), (_, position_b) = (subspace_axis(stream, "", role) for role in (self.role_a, self.role_b))
        every = torch.ones(len(position_a), len(position_b), dtype=torch.bool)
        if self.role_a == self.role_b:
            return every.triu(1)
        if "O" not in (self.role_a, self.role_b):
            return every
        written, read = position_a[:, None], position_b[None, :]
        return written <= read if self.role_a == "O" else read <= written

    def bases(self, stream: Stream, role: HeadRole, group: Group) -> SubspaceBases:
        """The subspaces of one attention's heads."""
        return subspace_bases(stream, role, [group], self.cut_of(stream), self.energy).to(self.device)

    def quantities(self, a: SubspaceBases, b: SubspaceBases, pairs: Tensor, cut: float) -> dict[str, Tensor]:
        """All quantities of some pairs of two sets of subspaces, NaN elsewhere."""
        i, j = pairs.nonzero(as_tuple=True)
        products = (a.basis.flatten(0, 1) @ b.basis.flatten(0, 1).T).unflatten(1, b.basis.shape[:2])
        cores = products.unflatten(0, a.basis.shape[:2]).permute(0, 2, 1, 3)[i, j]
        rank = torch.minimum(a.rank[i], b.rank[j])
        cosine = largest_gains(cores).clamp(max=1.0)
        values = {"overlap": (cores.square().sum((1, 2)) / rank).clamp(max=1.0)}
        cosine = cosine.masked_fill(cosine <= cut, 0.0)
        values["overlap"] = values["overlap"].masked_fill((cosine == 0) & (rank > 0), 0.0)
        values["cosine"] = torch.where(rank > 0, cosine, float("nan"))
        if self._interferes:
            sizes = a.gains[i, 0] * b.gains[j, 0]
            weighted = _relative(a.gains)[i][:, :, None] * cores * _relative(b.gains)[j][:, None, :]
            strength = sizes * largest_gains(weighted)
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


_RANKS = "rank_first", "rank_second"


@final
@dataclass(frozen=True, eq=False)
class _Second:
    """One attention of the second side, with which pairs are computed.

    Attributes:
        question: which is asked.
        name: of the attention.
        bases: of its heads.
        pairs: which are compared, (n_a, its heads) bool.
        block: what was computed of them, absent where nothing was; the ranks of the attention's heads on both sides.
    """

    question: Subspaces
    name: str
    bases: SubspaceBases
    pairs: Tensor
    block: dict[str, Tensor]


def _second(stream: Stream, work: tuple[Subspaces, str]) -> _Second:
    question, name = work
    group = stream.groups[name]
    bases = question.bases(stream, question.role_b, group)
    pairs = question.pairs(stream)[:, _place(stream, question.role_b, group)]
    block = {name: torch.full(pairs.shape, torch.nan, dtype=accumulate) for name in question.paired}
    return _Second(question, name, bases, pairs, {**block, _RANKS[1]: bases.rank.cpu()})


def _meet(stream: Stream, seconds: Sequence[_Second], group: Group) -> None:
    """Compare one attention of the first side with every one of the second side, and write down what comes of it."""
    question = seconds[0].question
    rows = _place(stream, question.role_a, group)
    if not any(bool(second.pairs[rows].any()) or second.name == group.id for second in seconds):
        return
    a, cut = question.bases(stream, question.role_a, group), question.cut_of(stream)
    for second in seconds:
        if bool(second.pairs[rows].any()):
            for name, values in second.question.quantities(a, second.bases, second.pairs[rows], cut).items():
                second.block[name][rows] = values
        if second.name == group.id:
            second.block[_RANKS[0]] = a.rank.cpu()


def _place(stream: Stream, role: HeadRole, group: Group) -> slice:
    """Where the subspaces of an attention stand among all of a role."""
    count = heads_per_group(stream, role)
    start = stream.groups.heads.index(group) * count
    return slice(start, start + count)


def _bytes(stream: Stream) -> int:
    """Of the bases of one attention."""
    return 8 * stream.d_model * max(len(group.components) * group.width for group in stream.groups.heads)


def _relative(gains: Tensor) -> Tensor:
    """Gains over the largest of each subspace; 0 of one without."""
    return gains / gains[:, :1].where(gains[:, :1] > 0, 1.0)
