"""Inner products of Gram matrices estimated from a few random numbers of each, with standard errors.

With x and y random vectors of independent signs, and Grams of trace 1 without their multiple of the identity::

    E[(x^T G_r y)(x^T G_w y)] = <G_r, G_w>

A sketch holds ``x_a^T G y_b`` of all A times B pairs of some x and some y, the same for all maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg.numerics import WORKSPACE_BYTES, accumulate, in_full_float32, random_generator
from virtual_weights.linalg.pairing import MapStack, inner_grams, traces_through


@final
@dataclass(frozen=True, eq=False)
class Sketch:
    """Some maps, by a few random numbers of their Grams.

    Attributes:
        entries: (n, A, B) float32, ``x_a^T (G / tr G - I / d) y_b``; 0 of a map that is zero.
        traces: (n,) float64, ``tr G``.
    """

    entries: Tensor
    traces: Tensor

    @property
    def energy(self) -> Tensor:
        """(n,) float64, an estimate of ``||G / tr G - I / d||_F^2``."""
        count = max(1, self.entries[:1].numel())
        return torch.linalg.vector_norm(self.entries.flatten(1), dim=1, dtype=accumulate).square() / count

    @staticmethod
    def joined(parts: Sequence[Sketch]) -> Sketch:
        """All maps of several sketches by the same signs."""
        return Sketch(torch.cat([part.entries for part in parts]), torch.cat([part.traces for part in parts]))


@final
class Signs:
    """The vectors x and y.

    Args:
        width: d.
        samples: A B, at least 4, which errors need; rounded down to a square.
        seed: of the signs.
        device: where sketches are made and compared.
    """

    def __init__(self, width: int, samples: int, seed: int = 0, device: str = "cpu") -> None:
        side, generator = isqrt(samples), random_generator(seed)
        signs = torch.randint(0, 2, (2, width, side), generator=generator, dtype=torch.int8).double() * 2 - 1
        self.width, self.side = width, side
        self._x, self._y = signs.to(device)

    def sketch(self, maps: MapStack | Sequence[Iterable[Tensor]]) -> Sketch:
        """Maps in thin factors, or by their rows (m, d) in parts."""
        grams, traces = self._thin(maps) if isinstance(maps, MapStack) else self._wide(maps)
        present = (traces > 0)[:, None, None]
        unit = grams / traces[:, None, None] - self._x.T @ self._y / self.width
        return Sketch(torch.where(present, unit, 0.0).float(), traces.cpu())

    def _thin(self, stack: MapStack) -> tuple[Tensor, Tensor]:
        """``x^T G y`` (n, A, B) and ``tr G`` (n,)."""
        device = self._x.device
        (traces,), grams = traces_through(stack, inner_grams(stack), 1), list[Tensor]()
        step = max(1, WORKSPACE_BYTES // (8 * max(stack.inner * stack.width, self.side**2)))
        for start in range(0, stack.count, step):
            cut = slice(start, start + step)
            outer = stack.outer[stack.index[cut]].to(device=device, dtype=accumulate)
            left, right = outer @ self._x, outer @ self._y
            if stack.metric is not None:
                right = stack.metric[cut].to(device=device, dtype=accumulate) @ right
            grams.append(left.mT @ right)
        return torch.cat(grams), traces.to(device)

    def _wide(self, maps: Sequence[Iterable[Tensor]]) -> tuple[Tensor, Tensor]:
        device = self._x.device
        grams = torch.zeros(len(maps), self.side, self.side, dtype=accumulate, device=device)
        traces = torch.zeros(len(maps), dtype=accumulate, device=device)
        step = max(1, WORKSPACE_BYTES // (8 * self.width))
        for i, parts in enumerate(maps):
            for part in parts:
                for rows in part.split(step):
                    rows = rows.to(device=device, dtype=accumulate)
                    grams[i].addmm_((rows @ self._x).T, rows @ self._y)
                    traces[i] += rows.square().sum()
        return grams, traces


@in_full_float32()
def estimates(readers: Sketch, writers: Sketch) -> tuple[Tensor, Tensor]:
    """``<G_r, G_w> / (tr G_r tr G_w)`` of all pairs and its standard error, both (n_r, n_w) float64 on the CPU.

    The entries of a sketch share vectors. With R what the means over x and over y leave of the variance of a product::

        Var = Var_x(mean over y) / A + Var_y(mean over x) / B + R / (A B)

    The variances of the means over rows and over columns of the products are the first two terms, each with R / (A B)
    in it. R is taken as ``||G_r - I/d||^2 ||G_w - I/d||^2``, by the sketch's own estimates; no less is stated.
    """
    count, a, b = readers.entries.shape
    mean, error = (torch.empty(count, len(writers.entries), dtype=accumulate) for _ in range(2))
    columns = [writers.entries.permute(axes).contiguous() for axes in ((1, 2, 0), (2, 1, 0))]  # (A, B, n), (B, A, n)
    sizes = readers.energy, writers.energy
    step = max(1, WORKSPACE_BYTES // (4 * max(a, b) * max(1, len(writers.entries))))
    for start in range(0, count, step):
        cut = slice(start, start + step)
        rows = [readers.entries[cut].permute(axes) for axes in ((1, 0, 2), (2, 0, 1))]
        by_x, by_y = (torch.bmm(row, column) for row, column in zip(rows, columns, strict=True))
        mean[cut] = by_x.mean(0, dtype=accumulate).cpu() / b
        spread = by_x.var(0).double() / (a * b**2) + by_y.var(0).double() / (b * a**2)
        least = sizes[0][cut, None] * sizes[1] / (a * b)
        error[cut] = torch.maximum(spread - least, least).sqrt().cpu()
    return mean, error
