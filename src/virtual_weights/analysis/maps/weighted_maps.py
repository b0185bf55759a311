"""Maps weighted by what runs through them: heads in thin factors, all others by their Grams, and energies of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import WORKSPACE_BYTES, MapStack, accumulate, all_pairs, beyond_rounding, self_moments

Gram = Callable[[], Tensor]
"""Makes the (d, d) float64 Gram of one map when it is needed."""


@final
@dataclass(frozen=True, eq=False)
class WeightedMaps:
    """Maps on one side, all of which meet all of the other: heads in thin factors, then the others by their Grams."""

    labels: tuple[str, ...]
    thin: MapStack | None
    grams: tuple[Gram, ...]

    @property
    def heads(self) -> int:
        """How many are thin."""
        return 0 if self.thin is None else self.thin.count


def energies_of(sides: Sequence[WeightedMaps], writers: WeightedMaps, device: str, memory: int) -> list[Tensor]:
    """``<G_r, G_w>`` of all pairs, (n_r, n_w) float64 of every side; 0 where it is rounding of ``||G_r|| ||G_w||``.

    Thin readers of one width go together, so that what writes is prepared once for all of them.
    """
    energies = dict[int, Tensor]()
    widths = [None if side.thin is None else side.thin.inner for side in sides]
    for width in dict.fromkeys(widths):
        some = [i for i, other in enumerate(widths) if other == width]
        readers = _joined([sides[i] for i in some])
        counts = [len(sides[i].labels) for i in some]
        energies |= zip(some, _table(readers, writers, device, memory).split(counts), strict=True)
    return [energies[i] for i in range(len(sides))]


def _joined(sides: Sequence[WeightedMaps]) -> WeightedMaps:
    """Maps that are all thin, or none of which is."""
    labels = tuple(label for side in sides for label in side.labels)
    grams = tuple(gram for side in sides for gram in side.grams)
    stacks = [side.thin for side in sides if side.thin is not None]
    if len(stacks) < 2:
        return WeightedMaps(labels, stacks[0] if stacks else None, grams)
    before = torch.tensor([0, *(len(stack.outer) for stack in stacks[:-1])]).cumsum(0).tolist()
    index = torch.cat([stack.index + first for stack, first in zip(stacks, before, strict=True)])
    metric = torch.cat([stack.metric for stack in stacks if stack.metric is not None])
    outer, position = (torch.cat([getattr(stack, name) for stack in stacks]) for name in ("outer", "position"))
    return WeightedMaps(labels, MapStack(outer, index, metric, position), grams)


def _table(readers: WeightedMaps, writers: WeightedMaps, device: str, memory: int) -> Tensor:
    energy = torch.empty(len(readers.labels), len(writers.labels), dtype=accumulate)
    sizes = [torch.empty(len(side.labels), dtype=accumulate) for side in (readers, writers)]
    for side, size in zip((readers, writers), sizes, strict=True):
        if side.thin is not None:
            size[: side.heads] = self_moments(side.thin)[1].cpu()
    r, w = readers.heads, writers.heads
    if readers.thin is not None and writers.thin is not None:
        pairs = all_pairs(readers.thin, writers.thin, device=torch.device(device), memory=memory)
        energy[:r, :w] = pairs.squared.cpu()
    reading = [make().to(device) for make in readers.grams]
    if reading:
        sizes[0][r:] = torch.stack([gram.square().sum() for gram in reading]).cpu()
        energy[r:, :w] = _through(writers.thin, reading)
    for j, make in enumerate(writers.grams, w):
        gram = make().to(device)
        sizes[1][j] = gram.square().sum()
        energy[:r, j] = _through(readers.thin, [gram])[0]
        if reading:
            energy[r:, j] = torch.stack([(gram * other).sum() for other in reading]).cpu()
    return beyond_rounding(energy, (sizes[0][:, None] * sizes[1]).sqrt()).clamp_(min=0.0)


def _through(heads: MapStack | None, grams: Sequence[Tensor]) -> Tensor:
    """``<G_i, S> = tr(metric_i outer S outer^T)`` of thin maps with some (d, d) Grams S, (Grams, maps)."""
    if heads is None:
        return torch.empty(len(grams), 0, dtype=accumulate)
    assert heads.metric is not None
    step = max(1, WORKSPACE_BYTES // (16 * heads.inner * heads.width))
    cores = [list[Tensor]() for _ in grams]
    for outer in heads.outer.split(step):
        exact = outer.to(device=grams[0].device, dtype=accumulate)
        for gram, core in zip(grams, cores, strict=True):
            core.append(exact @ gram @ exact.mT)
    metric = heads.metric.to(device=grams[0].device, dtype=accumulate)
    return torch.stack([(metric * torch.cat(core)[heads.index]).sum((1, 2)) for core in cores]).cpu()
