"""What becomes of what a part wrote: its projection along depth, and who takes it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.flow.observation import forward
from virtual_weights.runtime.flow.trace import Passage
from virtual_weights.runtime.running.hooks import Kind, watching
from virtual_weights.runtime.running.model import load
from virtual_weights.runtime.running.text import kept
from virtual_weights.stream import Component, Stream

_BYTES = 2**27  # of what all writers wrote at some tokens, in float64
WEIGHT = "1/s^2, s the largest norm scalar of the token at any state"


@final
@dataclass(frozen=True, eq=False)
class Lifetime:
    """Three Records of one run.

    Attributes:
        projection: over (writer, state), column ``projection``; absent before it is written.
        erased_by: over (writer, eraser), column ``share``; absent where the eraser does not write later.
        summary: over ``writer``.
    """

    projection: Record
    erased_by: Record
    summary: Record


@torch.no_grad()
def lifetime(
    stream: Stream,
    batches: Iterable[Tensor],
    model: nn.Module | None = None,
    *,
    centred: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Lifetime:
    """Follow what every writer wrote through the later states of the stream, on text.

    For writer i with output y_i(t), first in state q, and tokens weighted by w(t)::

        m_i(p)   = sum_t w <x_p, y_i> / sum_t w |y_i|^2            p = q, q+1, ...
        e_ij     = sum_t w <y_j, y_i> / sum_t w |y_i|^2            j writes later than i
        m_i(p+1) = m_i(p) + sum of e_ij over the j that first appear in p+1

    m is 1 where nothing else in the stream lies along y, falls as others write against it and is 0 where no linear
    reader along y finds any of it. The second line says who causes the fall, exactly and for any weights: all figures
    are sums of one Gram matrix ``<y_i, y_j>`` over writers, since the stream is the sum of what was written. The weight
    is ``1/s^2``, s the token's largest norm scalar, so that a few tokens with huge norms do not drown the others.

    Invariant under re-basing of heads and, with RMSNorm, rotation of the stream.

    Args:
        stream: the model.
        batches: token ids (B, T) each, ``PADDING`` after the end of shorter rows, which never counts.
        model: a loaded model; without it the checkpoint is loaded in float32.
        centred: leave the means over tokens out of all that was written: what a writer says that differs between
            tokens. Uncentred, the constant directions of a trained stream can outweigh it by far.
        progress: called with the number of tokens so far after each batch.

    Returns:
        Records; a writer that wrote nothing is absent. ``stamp["error"]`` is the distance between the last state and
        the sum of all that was written, over the last state's length.

    Raises:
        UsageError: there are no tokens, or padding stands before a token.
    """
    runs, writers = load(stream, model), [c for c in stream.components if c.writes is not None]
    sums, tokens = _Sums(len(writers), stream.d_model), 0
    for batch in batches:
        for part in _passages(stream, runs, batch):
            sums.add(part)
            tokens += len(part.tokens)
        if progress is not None:
            progress(tokens)
    if not tokens:
        raise UsageError("there are no tokens to run on", expected="a text", do="pass one that is not empty")
    stamp: dict[str, Any] = {"norm": stream.norm_stamp, "tokens": tokens, "weight": WEIGHT}
    stamp |= {"moment": "centred" if centred else "uncentred", "error": sums.error}
    return _records(stream, writers, sums.products(centred), stamp)


@final
class _Sums:
    """Weighted sums over tokens of what writers wrote, and of their products."""

    def __init__(self, writers: int, d: int) -> None:
        self.gram = torch.zeros((writers, writers), dtype=accumulate)
        self.wrote = torch.zeros((writers, d), dtype=accumulate)
        self.weight = self.missed = self.size = 0.0

    def add(self, part: Passage) -> None:
        """Some tokens."""
        last = part.stream.states - 1
        weight = torch.stack([part.scalar(p) for p in range(part.stream.states)]).amax(0).pow(-2)
        wrote = torch.stack([y for _, y in part.written(last)])  # (writers, tokens, d)
        flat = (wrote * weight.sqrt()[:, None]).flatten(1)
        self.gram += flat @ flat.T
        self.wrote += torch.einsum("wtd,t->wd", wrote, weight)
        self.weight += float(weight.sum())
        self.missed += float((wrote.sum(0) - part.state(last)).square().sum())
        self.size += float(part.state(last).square().sum())

    @property
    def error(self) -> float:
        """The last state's distance from the sum of all that was written, over its length."""
        return (self.missed / self.size) ** 0.5

    def products(self, centred: bool) -> Tensor:
        """``sum_t w <y_i, y_j>``, with each writer's mean left out where wanted; what is left of a constant is 0."""
        if not centred:
            return self.gram
        rest = self.gram - self.wrote @ self.wrote.T / self.weight
        constant = rest.diagonal() <= 1e-12 * self.gram.diagonal()  # rounding
        return rest.masked_fill(constant | constant[:, None], 0.0)


def _passages(stream: Stream, model: nn.Module, batch: Tensor) -> Iterator[Passage]:
    """Run a batch, and give its tokens a slab at a time: which of them stood together no longer matters."""
    there = kept(batch).to(next(model.parameters()).device)
    seen: dict[tuple[Kind, int], Tensor] = {}
    kinds: list[Kind] = ["state", "inner", "mlp", "embed"]
    if stream.model.has("pos"):
        kinds.append("pos")

    def see(kind: Kind, layer: int, tensor: Tensor) -> None:
        seen[kind, layer] = tensor.expand(len(there), *tensor.shape[1:])[there].cpu()  # learned positions come once

    with watching(model, stream, kinds, see):
        forward(model, batch.clamp(min=0))
    ids = batch[kept(batch)]
    step = max(1, _BYTES // (8 * len(stream.components) * stream.d_model))
    for start in range(0, len(ids), step):
        at = slice(start, start + step)
        yield Passage(stream, ids[at], {place: each[at] for place, each in seen.items()}, torch.empty(0))


def _records(stream: Stream, writers: list[Component], gram: Tensor, stamp: dict[str, Any]) -> Lifetime:
    energy = gram.diagonal()
    share = (gram / energy[:, None]).masked_fill((energy == 0)[:, None], torch.nan)
    first = torch.tensor([w.writes for w in writers])
    states = torch.arange(stream.states)
    projection = share @ (first[:, None] <= states).to(accumulate)
    projection = projection.masked_fill(states < first[:, None], torch.nan)
    later = share.masked_fill(first <= first[:, None], torch.nan)
    names = tuple(str(w.label) for w in writers)
    axis, told = Axis("writer", names), stream.provenance
    meaning = "<x, y> / |y|^2, sums over weighted tokens"
    one = Column("projection", projection, "1 (ratio)", meaning)
    two = Column("share", later, "1 (ratio)", "<y of eraser, y> / |y|^2; negative takes back")
    places = Axis("state", tuple(map(str, range(stream.states))))
    return Lifetime(
        Record("lifetime", (axis, places), (one,), {}, stamp, told),
        Record("erased_by", (axis, Axis("eraser", names)), (two,), {}, stamp, told),
        Record("lifetimes", (axis,), tuple(_summary(names, first, projection, later)), {}, stamp, told),
    )


def _summary(names: tuple[str, ...], first: Tensor, projection: Tensor, later: Tensor) -> Iterator[Column]:
    start = projection.gather(1, first[:, None])[:, 0]
    least, where = projection.nan_to_num(torch.inf).min(1)
    below = projection < start[:, None] / 2
    half = torch.where(below.any(1), below.double().argmax(1).to(accumulate), torch.nan)
    taken, eraser = later.nan_to_num(torch.inf).min(1)
    absent = start.isnan()
    taken = taken.masked_fill(taken.isinf() | (taken >= 0), torch.nan)
    yield Column("start", start, "1 (ratio)", "projection in the first state that holds it")
    yield Column("final", projection[:, -1], "1 (ratio)", "projection in the last state")
    yield Column("lowest", least.masked_fill(absent, torch.nan), "1 (ratio)", "least projection in any state")
    yield Column("lowest_state", where.to(accumulate).masked_fill(absent, torch.nan), "state", "where that is")
    yield Column("half_state", half, "state", "first state with less than half of the start; absent where none is")
    yield Column("taken", taken, "1 (ratio)", "share of the one later writer that takes back most")
    yield Column(
        "eraser", tuple(names[i] if t == t else None for i, t in zip(eraser.tolist(), taken.tolist(), strict=True))
    )
