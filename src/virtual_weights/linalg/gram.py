"""The all-pairs kernel, ``||R_i O_j||_F^2`` without forming any product, and sums of normalised Gram matrices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.linalg.decompose import Spectrum
from virtual_weights.linalg.numerics import WORKSPACE_BYTES, accumulate, one_thread, tolerance
from virtual_weights.linalg.pair_forms import DirectForm, GramForm
from virtual_weights.linalg.pairing import MapStack, Pairing, pairing
from virtual_weights.linalg.subspace import Subspace
from virtual_weights.progress import Progress, silent

Form = Literal["gram", "direct"]


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """The result of :func:`all_pairs`.

    Args:
        squared: (n_r, n_w) float64, ``||R_i O_j||_F^2`` >= 0; NaN where the writer's position is after the reader's.
        form: which of the two ways was taken.
        flops: multiplications and additions of the way taken.
    """

    squared: Tensor
    form: Form
    flops: float


def all_pairs(  # noqa: PLR0913 - two stacks; the rest says how, by keyword only
    readers: MapStack,
    writers: MapStack,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    memory: int = 512 * 2**20,
    form: Form | None = None,
    progress: Progress = silent,
) -> Pairs:
    """``||R_i O_j||_F^2`` of every reader with every writer that reaches it.

    ``||R O||_F^2 = tr(R^T R O O^T) = <G_r, G_w>`` with ``G_r = R^T R``, ``G_w = O O^T``, both (d, d). Gram form: tiles
    of the upper triangle of all G, one matrix product per tile, ``n_r n_w d^2`` flops; direct form:
    ``2 (n_r k)(n_w k) d``. The first is cheaper about when ``d < 2 k^2``; both count forming their factors, and pairs
    that cannot reach are skipped group by group.

    Args:
        readers: ``R_i = L_i outer_i``, each (., d), at the state it reads.
        writers: ``O_j^T = L_j outer_j``, at the state in which the write first appears.
        dtype: float64 or float32 for products; sums over tiles are in float64 either way.
        device: where to compute; None is where ``readers.outer`` is. The stacks are moved tile by tile.
        memory: bytes of workspace, the result included, the stacks not.
        form: "gram" or "direct" to insist; None takes the cheaper that fits.
        progress: called with (flops done, flops in all).

    Returns:
        Pairs, on the device of ``readers.outer``. Absolute error of ``squared`` is a small multiple of
        ``eps(dtype) ||G_r||_F ||G_w||_F`` in the Gram form; the direct form resolves nearly orthogonal pairs down to
        ``eps(dtype)^2 ||R||_F^2 ||O||_F^2``. Invariant under rotation of the stream and re-basing inside each map.

    Raises:
        UsageError: widths that differ, or a dtype that is neither float64 nor float32.
        ResourceError: even the smallest tile does not fit ``memory``; says what would.

    Reference: Elhage et al. 2021 (composition scores); the Gram identity is the Frobenius inner product's.

    Example:
        >>> one = MapStack(torch.eye(2).reshape(2, 1, 2), torch.arange(2), None, torch.zeros(2, dtype=torch.int64))
        >>> all_pairs(one, one).squared.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if readers.width != writers.width or dtype not in (torch.float64, torch.float32):
        raise UsageError(
            f"readers of width {readers.width}, writers of width {writers.width}, dtype {dtype}",
            expected="equal widths, and float64 or float32",
            do="give both stacks on the same stream; storage of any dtype is converted tile by tile",
        )
    home = readers.outer.device
    target = torch.device(device) if device is not None else home
    pairs = pairing(readers, writers)
    result = torch.full((readers.count, writers.count), float("nan"), dtype=torch.float64, device=home)
    if not pairs.groups:
        return Pairs(result, form or "gram", 0.0)
    plan = _plan(pairs, dtype, memory, form)
    squared = plan.compute(target, progress).to(home).clamp_(min=0.0)  # a sum of squares: below zero is rounding
    row, column = pairs.readers.order, pairs.writers.order
    unreachable = writers.position.cpu()[column][None, :] > readers.position.cpu()[row][:, None]
    result[row.to(home)[:, None], column.to(home)[None, :]] = squared.masked_fill_(unreachable.to(home), float("nan"))
    return Pairs(result, plan.name, plan.flops)


def _plan(pairs: Pairing, dtype: torch.dtype, memory: int, form: Form | None) -> GramForm | DirectForm:
    plans: list[GramForm | DirectForm] = []
    if form != "direct":
        plans.append(GramForm.within(pairs, dtype, memory))
    if form != "gram":
        plans.append(DirectForm.within(pairs, dtype, memory))
    feasible = [plan for plan in plans if plan.needed <= memory]
    if not feasible:
        least = min(plan.needed for plan in plans)
        raise ResourceError(
            f"{pairs.readers.count} readers by {pairs.writers.count} writers in {memory} bytes of workspace",
            expected=f"at least {least} bytes, for the smallest tiles",
            do="raise the memory budget, use float32, or give fewer readers at a time",
        )
    return min(feasible, key=lambda plan: plan.flops)


@final
@dataclass(frozen=True, eq=False)
class GramSum:
    """Several maps of R^d taken together; ``+`` takes two such sets together.

    Attributes:
        gram: ``sum_i G_i / tr G_i``, (d, d) float64, with ``G_i = C_i^T C_i``: each map counts 1, whatever its size,
            so that a large map does not push small ones below the cut. Its range is the span of all maps.
        ranks: sum of the maps' ranks.
        count: number of maps, zero maps included.
    """

    gram: Tensor
    ranks: int
    count: int

    def __add__(self, other: GramSum) -> GramSum:
        return GramSum(self.gram + other.gram, self.ranks + other.ranks, self.count + other.count)

    @property
    def spectrum(self) -> Spectrum:
        """Singular values of the stacked normalised maps: roots of the Gram's eigenvalues."""
        return Spectrum(torch.linalg.eigvalsh(self.gram).clamp_min(0).sqrt())

    def split(self, cut: float) -> tuple[Subspace, Subspace]:
        """The span of all maps and its orthogonal complement, at singular values above ``cut`` times the largest."""
        values, vectors = torch.linalg.eigh(self.gram)
        spanning = values > max(cut**2 * float(values[-1]), 0.0)
        return Subspace(vectors[:, spanning]), Subspace(vectors[:, ~spanning])


def gram_sum(stacks: Iterable[Tensor], d: int, cut: float) -> GramSum:
    """Sum over all maps in stacks (m, k, d); ranks count singular values above ``cut`` times a map's largest."""
    total = GramSum(torch.zeros(d, d, dtype=accumulate), 0, 0)
    for maps in stacks:
        if maps.shape[1] < d:
            total += _thin(maps, cut)
        else:
            for rows in maps:
                total += _wide(rows, cut)
    return total


def _thin(maps: Tensor, cut: float) -> GramSum:
    maps = maps.to(accumulate)
    inner = maps @ maps.mT
    size = inner.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None]
    unit = torch.where(size > 0, maps / size, 0.0).flatten(0, 1)
    with one_thread():
        eigenvalues = torch.linalg.eigvalsh(inner)
    return GramSum(_gram(unit), _rank(eigenvalues, cut), len(maps))


def _wide(rows: Tensor, cut: float) -> GramSum:
    gram = _gram(rows)
    trace = gram.trace()
    rank = len(gram) if _of_full_rank(gram, cut) else _rank(torch.linalg.eigvalsh(gram), cut)
    return GramSum(gram / trace if trace > 0 else gram, rank, 1)


_BLOCK = 256  # columns of a Gram that are formed at once


def _gram(rows: Tensor) -> Tensor:
    """``rows^T rows`` in float64, (d, d), one half of it computed."""
    d = rows.shape[1]
    gram = torch.zeros(d, d, dtype=accumulate)
    for chunk in rows.split(max(1, WORKSPACE_BYTES // (8 * d))):
        chunk = chunk.to(accumulate)
        for first in range(0, d, _BLOCK):
            last = min(first + _BLOCK, d)
            gram[first:last, :last].addmm_(chunk[:, first:last].T, chunk[:, :last])
    for first in range(_BLOCK, d, _BLOCK):
        gram[:first, first : first + _BLOCK] = gram[first : first + _BLOCK, :first].T
    return gram


def _of_full_rank(gram: Tensor, cut: float) -> bool:
    """Whether every eigenvalue is above ``cut^2 ||G||_F``, and so ``cut^2`` times the largest, by more than rounding.

    A Cholesky factor tells, for a fraction of what eigenvalues cost; those are needed only where this is False.
    """
    size, shifted = gram.square().sum().sqrt(), gram.clone()
    shifted.diagonal().sub_((cut**2 + tolerance(accumulate, gram.shape)) * size)
    return bool(size > 0) and int(torch.linalg.cholesky_ex(shifted).info) == 0


def _rank(eigenvalues: Tensor, cut: float) -> int:
    largest = eigenvalues[..., -1:].clamp_min(0)
    return int((eigenvalues > cut**2 * largest).logical_and(largest > 0).sum())
