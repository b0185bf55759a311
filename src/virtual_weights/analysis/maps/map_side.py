"""All writers, or all readers of one port, as maps on the stream: heads in thin factors, wider parts by squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, Progress, accumulate, all_pairs, self_moments
from virtual_weights.linalg.numerics import converted
from virtual_weights.stream import Component, Stream
from virtual_weights.stream.group import HEAD_PORTS, PORTS, Port

Square = Callable[[], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Side:
    """Maps ``M_i`` on one side of the stream; only ``G_i = M_i^T M_i`` (of a writer ``O O^T``), (d, d), matters here.

    Attributes:
        labels: their names: first those of ``thin``, then those of ``wide``.
        position: (n,) the state that each reads, or in which its write first appears.
        thin: heads, in thin factors; None where there are none.
        wide: the others, each as a function that makes its G when it is needed.
        width: d.
        channels: of keys and values that several heads share; () where nothing is shared.
    """

    labels: tuple[str, ...]
    position: Tensor
    thin: MapStack | None
    wide: tuple[Square, ...]
    width: int
    channels: tuple[str, ...] = ()

    @property
    def thin_count(self) -> int:
        """How many of the labels are thin."""
        return 0 if self.thin is None else self.thin.count


@final
@dataclass(frozen=True, eq=False)
class Met:
    """What :func:`meet` finds.

    Attributes:
        squared: (n_r, n_w) float64, ``||R_i O_j||_F^2 = <G_i, G_j>``; NaN where the writer cannot reach.
        readers, writers: (2, n), ``tr G`` and ``tr G^2`` of every map.
        form: how heads met heads: ``"gram"`` or ``"direct"``, None where none did.
        flops: of that part.
    """

    squared: Tensor
    readers: Tensor
    writers: Tensor
    form: str | None
    flops: float


def ports_of(stream: Stream) -> tuple[Port, ...]:
    """The ports through which this model reads."""
    inner: tuple[Port, ...] = ("gate", "up") if stream.spec.gated else ("in",)
    return (*HEAD_PORTS, *inner, "unembed")


def check_port(port: str) -> None:
    """Refuse what is no port at all."""
    if port not in PORTS:
        raise UsageError(f"no port {port!r}", expected=", ".join(PORTS), do="choose one of these ports")


def parts_reading(stream: Stream, port: Port) -> tuple[Component, ...]:
    """The MLPs that read through a port, or the unembedding."""
    if port not in ports_of(stream):
        raise UsageError(
            f"this model has no port {port!r}", expected=f"one of {', '.join(ports_of(stream))}", do="choose one"
        )
    return tuple(c for c in stream.components if c.kind == ("unembed" if port == "unembed" else "mlp"))


def parts_writing(stream: Stream) -> tuple[Component, ...]:
    """Everything that writes but the heads: embeddings, MLPs as wholes, biases."""
    return tuple(c for c in stream.components if c.writes is not None and c.kind != "head")


def heads_side(stream: Stream, stack: MapStack | None, labels: tuple[str, ...], channels: tuple[str, ...] = ()) -> Side:
    """Heads alone; an empty side where the checkpoint holds none."""
    position = torch.empty(0, dtype=torch.int64) if stack is None else stack.position
    return Side(labels, position, stack, (), stream.d_model, channels)


def wide_readers(stream: Stream, port: Port) -> Side:
    """MLPs, or the unembedding, by ``R~^T R~``."""
    parts = parts_reading(stream, port)
    squares = tuple(partial(read_square, stream, port, c.label.layer) for c in parts)
    return Side(tuple(str(c.label) for c in parts), _positions([c.reads for c in parts]), None, squares, stream.d_model)


def with_parts(stream: Stream, heads: Side) -> Side:
    """Writing heads, and after them everything else that writes, by ``O O^T``."""
    parts = parts_writing(stream)
    return Side(
        (*heads.labels, *(str(c.label) for c in parts)),
        torch.cat([heads.position, _positions([c.writes for c in parts])]),
        heads.thin,
        tuple(partial(write_square, stream, c) for c in parts),
        stream.d_model,
    )


def by_depth(side: Side) -> Tensor:
    """The order in which a side's labels stand along the stream."""
    return torch.argsort(side.position, stable=True)


def read_square(stream: Stream, port: Port, layer: int | None) -> Tensor:
    """``R~^T R~`` of an MLP's port or the unembedding, (d, d) float64."""
    return _square(stream.read(port, layer).maps[0], stream.d_model)


def write_square(stream: Stream, writer: Component) -> Tensor:
    """``O O^T`` of an MLP, an embedding or a bias, (d, d) float64."""
    if writer.kind in ("attn_bias", "mlp_bias"):
        bias = stream.weight("o_bias" if writer.kind == "attn_bias" else "down_bias", writer.label.layer)
        assert bias is not None
        return _square(bias[None], stream.d_model)
    assert writer.kind in ("embed", "pos", "mlp")
    return _square(stream.write(writer.kind, writer.label.layer)[0].T, stream.d_model)


def meet(
    readers: Side,
    writers: Side,
    *,
    dtype: torch.dtype = accumulate,
    device: str = "cpu",
    memory: int = 2**28,
    progress: Progress | None = None,
) -> Met:
    """``||R_i O_j||_F^2`` of every reader with every writer that reaches it, and both sides' own moments.

    Thin with thin goes through the all-pairs kernel; thin with wide is ``tr(metric outer G outer^T)``; wide with wide
    is the inner product of both squares. Only the kernel obeys ``dtype``: squares are float64.

    Args:
        readers: the reading side.
        writers: the writing side.
        dtype: of the kernel's products.
        device: any torch device.
        memory: bytes of workspace.
        progress: called with (done, total), in steps of very unequal length.
    """
    squared = torch.full((len(readers.labels), len(writers.labels)), float("nan"), dtype=accumulate)
    moments = [torch.full((2, len(side.labels)), float("nan"), dtype=accumulate) for side in (readers, writers)]
    r, w = readers.thin_count, writers.thin_count
    form, flops = None, 0.0
    for side, own in zip((readers, writers), moments, strict=True):
        if side.thin is not None:
            own[:, : side.thin_count] = torch.stack(self_moments(side.thin)).cpu()
    if readers.thin is not None and writers.thin is not None:
        alone = not (readers.wide or writers.wide)
        pairs = all_pairs(
            readers.thin,
            writers.thin,
            dtype=dtype,
            device=torch.device(device),
            memory=memory,
            progress=progress if alone else None,
        )
        squared[:r, :w], form, flops = pairs.squared.cpu(), pairs.form, pairs.flops
    _meet_wide(readers, writers, squared, moments, (device, memory, progress))
    return Met(squared.clamp_(min=0.0), moments[0], moments[1], form, flops)


def _meet_wide(
    readers: Side,
    writers: Side,
    squared: Tensor,
    moments: list[Tensor],
    how: tuple[str, int, Progress | None],
) -> None:
    """Fill in every pair with a wide map in it, and the wide maps' moments."""
    device, memory, progress = how
    r, w = readers.thin_count, writers.thin_count
    total = len(readers.wide) + len(writers.wide)
    at_once = max(1, memory // 2 // (8 * readers.width**2))
    for start in range(0, max(1, len(readers.wide)), at_once):
        held = [make().to(device) for make in readers.wide[start : start + at_once]]
        for i, square in enumerate(held, r + start):
            moments[0][:, i] = _moments(square)
            if writers.thin is not None:
                reached = writers.position[:w] <= readers.position[i]
                squared[i, :w] = through(writers.thin, square, reached)
            _tell(progress, i - r + 1, total)
        for j, make in enumerate(writers.wide, w):
            square = make().to(device)
            moments[1][:, j] = _moments(square)
            if readers.thin is not None and not start:
                reached = writers.position[j] <= readers.position[:r]
                squared[:r, j] = through(readers.thin, square, reached)
            for i, other in enumerate(held, r + start):
                if writers.position[j] <= readers.position[i]:
                    squared[i, j] = (square * other).sum().cpu()
            _tell(progress, len(readers.wide) + j - w + 1, total)


def through(stack: MapStack, square: Tensor, wanted: Tensor) -> Tensor:
    """``<G_i, S> = tr(metric_i outer S outer^T)`` of the wanted maps with one (d, d) square S; NaN elsewhere."""
    found = torch.full((stack.count,), float("nan"), dtype=accumulate)
    at = wanted.nonzero()[:, 0]
    if not len(at):
        return found
    kept, place = stack.index[at].unique(return_inverse=True)
    cores = torch.empty(len(kept), stack.inner, stack.inner, dtype=accumulate, device=square.device)
    for cut in _cuts(len(kept), 8 * stack.inner * stack.width * 2):
        outer = stack.outer[kept[cut]].to(device=square.device, dtype=accumulate)
        cores[cut] = outer @ square @ outer.mT
    each = cores[place]
    if stack.metric is None:
        found[at] = each.diagonal(dim1=1, dim2=2).sum(1).cpu()
    else:
        found[at] = (stack.metric[at].to(device=square.device, dtype=accumulate) * each).sum((1, 2)).cpu()
    return found


def _square(rows: Tensor, d: int) -> Tensor:
    square = torch.zeros(d, d, dtype=accumulate)
    for cut in _cuts(len(rows), 8 * d):
        chunk = rows[cut].to(accumulate)
        square.addmm_(chunk.T, chunk)
    return square


def _moments(square: Tensor) -> Tensor:
    return torch.stack([square.diagonal().sum(), square.square().sum()]).cpu()


def _cuts(count: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, converted // bytes_each)
    return (slice(start, start + step) for start in range(0, count, step))


def _positions(of: list[int | None]) -> Tensor:
    assert None not in of
    return torch.tensor(of, dtype=torch.int64)


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
