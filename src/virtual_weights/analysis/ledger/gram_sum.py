"""Adding up maps on one side of the stream: the sum of their normalised Grams, and of their ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import Spectrum, Subspace, accumulate
from virtual_weights.linalg.numerics import converted


@final
@dataclass(frozen=True, eq=False)
class Tally:
    """Several maps of the stream taken together.

    Attributes:
        gram: ``sum_i G_i / tr G_i``, (d, d) float64, with ``G_i = C_i^T C_i``: each map counts 1, whatever its size,
            so that a large embedding does not push small writers below the cut. Its range is the span of all maps.
        ranks: sum of the maps' ranks.
        count: how many maps, those that are zero too.
    """

    gram: Tensor
    ranks: int
    count: int

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.gram + other.gram, self.ranks + other.ranks, self.count + other.count)

    @property
    def spectrum(self) -> Spectrum:
        """Singular values of the stacked normalised maps: roots of the Gram's eigenvalues."""
        return Spectrum(torch.linalg.eigvalsh(self.gram).clamp_min(0).sqrt())

    def split(self, cut: float) -> tuple[Subspace, Subspace]:
        """The span of all maps and its orthogonal complement, at singular values above ``cut`` times the largest."""
        values, vectors = torch.linalg.eigh(self.gram)
        kept = values > max(cut**2 * float(values[-1]), 0.0)
        return Subspace(vectors[:, kept]), Subspace(vectors[:, ~kept])


def tally(stacks: Iterable[Tensor], d: int, cut: float) -> Tally:
    """Tally of all maps in stacks (m, k, d); ranks count singular values above ``cut`` times a map's largest."""
    total = Tally(torch.zeros(d, d, dtype=accumulate), 0, 0)
    for maps in stacks:
        if maps.shape[1] < d:
            total += _thin(maps, cut)
        else:
            for wide in maps:
                total += _wide(wide, cut)
    return total


def _thin(maps: Tensor, cut: float) -> Tally:
    maps = maps.to(accumulate)
    values = torch.linalg.eigvalsh(maps @ maps.mT)
    size = torch.linalg.vector_norm(maps, dim=(1, 2), keepdim=True)
    unit = torch.where(size > 0, maps / size, 0.0).flatten(0, 1)
    return Tally(unit.T @ unit, _rank(values, cut), len(maps))


def _wide(rows: Tensor, cut: float) -> Tally:
    step = max(1, converted // (8 * rows.shape[1]))
    gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=accumulate)
    for chunk in rows.split(step):
        chunk = chunk.to(accumulate)
        gram.addmm_(chunk.T, chunk)
    trace = gram.trace()
    return Tally(gram / trace if trace > 0 else gram, _rank(torch.linalg.eigvalsh(gram), cut), 1)


def _rank(eigenvalues: Tensor, cut: float) -> int:
    largest = eigenvalues[..., -1:].clamp_min(0)
    return int((eigenvalues > cut**2 * largest).logical_and(largest > 0).sum())
