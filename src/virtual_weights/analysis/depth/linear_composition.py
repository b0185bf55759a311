"""Blocks frozen at a point, composed along depth: ranks and gains of their product, composition and update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import Convention, FrozenBlock, Point, describe, frozen_blocks
from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.linalg import PRODUCT_ROUNDING, Spectrum, accumulate, random_generator, tolerance
from virtual_weights.linalg.decompose import gains
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import OperatingPoint, Question, Stream

LIMIT = 1024
"""Largest T d of an exact answer over all tokens: a few decompositions of that size per block take seconds."""

MAPS = ("block", "composition", "update", "path")
_COLUMNS = {
    "rank": ("directions", "singular values above rounding"),
    "bound": ("directions", "no rank can be higher: inner widths, their least (path), their sum (update), n"),
    "certified_rank": ("directions", "n where every I + T so far is invertible beyond rounding; else absent"),
    "stable_rank": ("directions", "sum S^2 / S_1^2"),
    "entropy_rank": ("directions", "exp of the entropy of S^2 / sum S^2"),
    "log10_largest": ("log10 of a factor", "of the largest singular value"),
    "log10_smallest": ("log10 of a factor", "of the smallest singular value that counts in the rank"),
    "condition": ("1, >= n", "||I + T||_F ||(I + T)^-1||_F of the block, at least its condition number"),
    "pair_error": ("1 (ratio)", "of the block after the one before, matrix-free, from I + T1 + T2 + T2 T1"),
}


@final
@dataclass(frozen=True)
class LinearComposition(Question[Stream]):
    """What linear blocks ``I + T_i`` do in sequence, at one token or over a whole prompt.

    Four maps per depth, n = d (or T d): the ``block`` ``T_i``; the residual ``composition`` ``prod(I + T_i)``,
    generically of full rank; its ``update`` ``prod(I + T_i) - I``, of rank at most the sum of ranks; and the ``path``
    ``T_i ... T_1`` through every block, of rank at most the least one. Scales are kept apart: nothing overflows.

    A numerical rank counts singular values above the rounding of the last product. Deep compositions are worse
    conditioned than float64 can resolve: then ``rank`` falls short and ``certified_rank``, from the blocks alone, may
    still say that nothing was lost.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        point: a prompt's OperatingPoint; None takes ``Convention(scalar, gate)``, which is not a measurement.
        token: the token whose map to itself is taken (attention to itself by its own share, all other tokens cut off);
            None takes all tokens exactly, where T d <= 1024.
        every: take spectra at every so many blocks, at the first and at the last.
        scalar, gate: of the convention.
        seed: of the vector on which pairs are compared.
    """

    question: ClassVar[str] = "linear"
    point: OperatingPoint | None = None
    token: int | None = -1
    every: int = 1
    scalar: float = 1.0
    gate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        Convention(self.scalar, self.gate)
        if self.every < 1:
            raise UsageError(f"every {self.every} blocks", expected="a number >= 1", do="pass for example every=4")

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters as plain values; ``scalar`` and ``gate`` only where there is no point."""
        unused = () if self.point is None else ("scalar", "gate")
        return {name: value for name, value in super().parameters.items() if name not in unused}

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compose all blocks.

        Returns:
            A Record over ``map`` (block, composition, update, path) and ``block``, see ``record.columns``.

        Raises:
            UsageError: the point is of another model, or has no such token.
            ResourceError: ``token`` is None, and T d exceeds 1024.
        """
        labels: list[str] = []
        depths: list[list[dict[str, float]]] = []
        for done, (label, rows) in enumerate(self._rows(stream, self._point(stream)), 1):
            if rows:
                labels.append(label)
                depths.append(rows)
            progress(done, stream.states - 1)
        nan = float("nan")
        values = {
            name: torch.tensor(
                [[rows[i].get(name, nan) for rows in depths] for i in range(len(MAPS))], dtype=accumulate
            )
            for name in _COLUMNS
        }
        return stream.record(
            self,
            (Axis("map", MAPS), Axis("block", tuple(labels))),
            (Column(name, values[name], *about) for name, about in _COLUMNS.items()),
            gauge="free of inner bases",
            over="all tokens" if self.token is None else f"token {self.token} to itself",
            dtype="float64",
            **describe(Convention(self.scalar, self.gate) if self.point is None else self.point),
        )

    def _point(self, stream: Stream) -> Point:
        if self.point is None:
            return Convention(self.scalar, self.gate)
        self.point.check(stream)
        if self.token is not None:
            return self.point.only(self.token)
        if (size := len(self.point.tokens) * stream.d_model) > LIMIT:
            raise ResourceError(
                f"all {len(self.point.tokens)} tokens together have {size} dimensions",
                expected=f"at most {LIMIT}: tokens times the width of the stream",
                do="name one token, or take a shorter prompt or a smaller model",
            )
        return self.point

    def _rows(self, stream: Stream, point: Point) -> Iterator[tuple[str, list[dict[str, float]]]]:
        """Every block's label and the rows of all maps up to it; no rows where none are taken."""
        running: _Running | None = None
        before: tuple[FrozenBlock, Tensor] | None = None
        generator = random_generator(self.seed)
        for i, block in enumerate(frozen_blocks(stream, point)):
            t = block.dense()
            tokens = len(t) // stream.d_model
            running = _Running.start(len(t)) if running is None else running
            running = running.after(t, min(len(t), tokens * block.width))
            rows = running.rows() if (i + 1) % self.every == 0 or i in (0, stream.states - 2) else []
            if rows and before is not None:
                x = torch.randn(tokens, stream.d_model, generator=generator, dtype=accumulate)
                rows[0]["pair_error"] = _pair_error(before, (block, t), x)
            before = block, t
            yield block.label, rows


@final
@dataclass(frozen=True, eq=False)
class _Scaled:
    """``matrix * exp(log)``, and the size of rounding in ``matrix``."""

    matrix: Tensor
    log: float
    noise: float

    @classmethod
    def of(cls, matrix: Tensor, log: float, noise: float) -> _Scaled:
        size = float(matrix.norm())
        if size <= noise:  # nothing but rounding, which later blocks must not take for a map
            return cls(torch.zeros_like(matrix), 0.0, 0.0)
        return cls(matrix / size, log + math.log(size), noise / size)

    def row(self) -> dict[str, float]:
        """The columns that come from the spectrum."""
        values = gains(self.matrix)
        cut = max(self.noise, tolerance(accumulate, self.matrix.shape) * float(values[0]))
        rank = int((values > cut).sum())
        spectrum = Spectrum(values[:rank])
        figures = {"rank": rank, "stable_rank": spectrum.stable_rank, "entropy_rank": spectrum.entropy_rank}
        if rank:
            figures["log10_largest"] = math.log10(values[0]) + self.log / math.log(10)
            figures["log10_smallest"] = math.log10(values[rank - 1]) + self.log / math.log(10)
        return figures


@final
@dataclass(frozen=True, eq=False)
class _Running:
    """The maps after some blocks."""

    block: Tensor
    update: _Scaled
    path: _Scaled
    condition: float
    invertible: bool
    bounds: dict[str, int]

    @classmethod
    def start(cls, n: int) -> _Running:
        zero, eye = torch.zeros(n, n, dtype=accumulate), torch.eye(n, dtype=accumulate)
        bounds = {"block": 0, "composition": n, "update": 0, "path": n}
        return cls(zero, _Scaled(zero, 0.0, 0.0), _Scaled(eye, 0.0, 0.0), 1.0, True, bounds)

    def after(self, t: Tensor, width: int) -> _Running:
        """One block later: ``(I + T)(I + U) - I = (I + T) U + T``."""
        step = t + torch.eye(len(t), dtype=t.dtype)
        path, log, update = self.path, self.update.log, self.update.matrix
        added = t * math.exp(-log)
        noise = PRODUCT_ROUNDING * (float(step.norm()) * float(update.norm()) + float(added.norm()))
        condition = _condition(step)
        total = min(len(t), self.bounds["update"] + width)
        return _Running(
            t,
            _Scaled.of(step @ update + added, log, noise),
            _Scaled.of(t @ path.matrix, path.log, PRODUCT_ROUNDING * float(t.norm()) * float(path.matrix.norm())),
            condition,
            self.invertible and condition < 1 / tolerance(accumulate, t.shape),
            self.bounds | {"block": width, "update": total, "path": min(self.bounds["path"], width)},
        )

    def rows(self) -> list[dict[str, float]]:
        """The columns of every map of ``MAPS`` here."""
        log = self.update.log
        eye = torch.eye(len(self.block), dtype=accumulate) * math.exp(-log)
        composition = _Scaled.of(self.update.matrix + eye, log, self.update.noise)
        rows = [scaled.row() for scaled in (_Scaled.of(self.block, 0.0, 0.0), composition, self.update, self.path)]
        for name, row in zip(MAPS, rows, strict=True):
            row["bound"] = self.bounds[name]
        rows[0]["condition"] = self.condition
        if self.invertible:
            rows[1]["certified_rank"] = len(self.block)
        return rows


def summary(record: Record) -> dict[str, Any]:
    """The last depth of a LinearComposition record in a few numbers, by map; None where absent."""
    last = record.axis("block").labels[-1]
    return {str(row["map"]): {k: row[k] for k in _COLUMNS} for row in record.rows() if row["block"] == last}


def _condition(step: Tensor) -> float:
    inverse, info = torch.linalg.inv_ex(step)
    return float("inf") if int(info) else float(step.norm()) * float(inverse.norm())


def _pair_error(first: tuple[FrozenBlock, Tensor], second: tuple[FrozenBlock, Tensor], x: Tensor) -> float:
    """Two blocks one after the other, matrix-free, against ``I + T1 + T2 + T2 T1`` of their dense maps, on one x."""
    (block1, t1), (block2, t2) = first, second
    y = x + block1.linear(x)
    y = (y + block2.linear(y)).flatten()
    x = x.flatten()
    once = t1 @ x
    expected = x + once + t2 @ x + t2 @ once
    return float((y - expected).norm() / expected.norm())
