"""All writers, or all readers of one port, as maps on the stream: heads in thin factors, wider maps by their Grams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import WORKSPACE_BYTES, MapStack, accumulate, all_pairs, beyond_rounding, self_moments
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis
from virtual_weights.stream import Group, Stream
from virtual_weights.stream.group import Port, Writers

Gram = Callable[[], Tensor]
"""Makes the (d, d) float64 Gram of one map when it is needed."""


@final
@dataclass(frozen=True, eq=False)
class MapSide:
    """Maps ``M_i`` on one side of the stream; only ``G_i = M_i^T M_i`` (of a writer ``O O^T``), (d, d), matters here.

    Attributes:
        axis: their names: first those of ``thin``, then those of ``wide``.
        position: (n,) the state that each reads, or in which its write first appears.
        thin: heads, in thin factors; None where there are none.
        wide: the others, each as a function that makes its G when it is needed.
        width: d.
    """

    axis: Axis
    position: Tensor
    thin: MapStack | None
    wide: tuple[Gram, ...]
    width: int

    @property
    def count(self) -> int:
        """How many maps."""
        return len(self.axis.labels)

    @property
    def thin_count(self) -> int:
        """How many of them are thin."""
        return 0 if self.thin is None else self.thin.count


@final
@dataclass(frozen=True, eq=False)
class PairProducts:
    """``<G_i, G_j>`` of readers with writers, both in order of depth.

    Attributes:
        axes: ``reader`` and ``writer``.
        squared: (n_r, n_w) float64, ``||R_i O_j||_F^2 = <G_i, G_j>``; NaN where the writer cannot reach, 0 where it is
            rounding of ``||G_i|| ||G_j||``, and where either map is 0.
        readers, writers: (2, n), ``tr G`` and ``tr G^2`` of every map.
        form: how heads were paired with heads: ``"gram"`` or ``"direct"``, None where none did.
        flops: of that part.
    """

    axes: tuple[Axis, Axis]
    squared: Tensor
    readers: Tensor
    writers: Tensor
    form: str | None
    flops: float


def component_axis(name: str, groups: Iterable[Group], port: str = "") -> Axis:
    """The components of groups, in order; as readers of a port, with its name and groups where heads share maps."""
    groups = tuple(groups)
    labels = tuple(label for group in groups for label in (group.readers(port) if port else group.labels))
    return Axis(name, labels, tuple(kv_group for group in groups for kv_group in group.kv_groups(port)))


def wide_readers(stream: Stream, port: Port) -> MapSide:
    """MLPs, or the unembedding, by ``R~^T R~``.

    Raises:
        UsageError: the model has no such port.
    """
    groups = stream.groups.readers(port)
    grams = tuple(partial(read_gram, stream, port, group) for group in groups)
    position = _positions([group.reads for group in groups])
    return MapSide(component_axis("reader", groups, port), position, None, grams, stream.d_model)


def writing_side(stream: Stream, writers: Writers, heads: Callable[[], MapSide]) -> MapSide:
    """Writing heads, and where all writers are wanted everything else that writes after them, by ``O O^T``.

    Args:
        stream: the model.
        writers: which.
        heads: makes the side of heads alone.
    """
    if writers == "heads":
        return heads()
    axis = Axis("writer", ())
    thin = heads() if stream.groups.heads else MapSide(axis, _positions([]), None, (), stream.d_model)
    groups = [group for group in stream.groups.writers if group.kind != "head"]
    return replace(
        thin,
        axis=Axis("writer", (*thin.axis.labels, *(group.id for group in groups))),
        position=torch.cat([thin.position, _positions([group.first for group in groups])]),
        wide=tuple(partial(write_gram, stream, group) for group in groups),
    )


def read_gram(stream: Stream, port: Port, group: Group) -> Tensor:
    """``R~^T R~`` of an MLP's port or the unembedding, (d, d) float64."""
    return _gram(stream.read(port, group).maps[0])


def write_gram(stream: Stream, group: Group) -> Tensor:
    """``O O^T`` of an MLP, an embedding or a bias, (d, d) float64."""
    return _gram(stream.write(group)[0].T)


def pair_products(
    readers: MapSide,
    writers: MapSide,
    *,
    dtype: torch.dtype = accumulate,
    device: str = "cpu",
    memory: int = 2**28,
    progress: Progress = silent,
) -> PairProducts:
    """``||R_i O_j||_F^2`` of every reader with every writer that reaches it, and both sides' own moments.

    Thin with thin goes through the all-pairs kernel; thin with wide is ``tr(metric outer G outer^T)``; wide with wide
    is the inner product of both Grams. Only the kernel obeys ``dtype``: Grams are float64.

    Args:
        readers: the reading side.
        writers: the writing side.
        dtype: of the kernel's products.
        device: any torch device.
        memory: bytes of workspace.
        progress: called with (done, total), in steps of very unequal length.
    """
    squared = torch.full((readers.count, writers.count), float("nan"), dtype=accumulate)
    moments = _thin_moments(readers), _thin_moments(writers)
    form, flops, total = None, 0.0, len(readers.wide) + len(writers.wide)
    if readers.thin is not None and writers.thin is not None:
        pairs = all_pairs(
            readers.thin,
            writers.thin,
            dtype=dtype,
            device=torch.device(device),
            memory=memory,
            progress=silent if total else progress,
        )
        squared[: readers.thin_count, : writers.thin_count] = pairs.squared.cpu()
        form, flops = pairs.form, pairs.flops
    products = PairProducts((readers.axis, writers.axis), squared, *moments, form, flops)
    for done in _fill_wide(products, readers, writers, device, memory):
        progress(done, total)
    return _by_depth(products, writers, dtype)


def energy_through(heads: MapStack, gram: Tensor, reachable: Tensor) -> Tensor:
    """``<G_i, S> = tr(metric_i outer S outer^T)`` of the reachable maps with one (d, d) Gram S; NaN elsewhere."""
    energy = torch.full((heads.count,), float("nan"), dtype=accumulate)
    rows = reachable.nonzero()[:, 0]
    if not len(rows):
        return energy
    maps, map_of_row = heads.index[rows].unique(return_inverse=True)
    cores = torch.empty(len(maps), heads.inner, heads.inner, dtype=accumulate, device=gram.device)
    for cut in _cuts(len(maps), 8 * heads.inner * heads.width * 2):
        outer = heads.outer[maps[cut]].to(device=gram.device, dtype=accumulate)
        cores[cut] = outer @ gram @ outer.mT
    core = cores[map_of_row]
    if heads.metric is None:
        energy[rows] = core.diagonal(dim1=1, dim2=2).sum(1).cpu()
    else:
        energy[rows] = (heads.metric[rows].to(device=gram.device, dtype=accumulate) * core).sum((1, 2)).cpu()
    return energy


def _fill_wide(products: PairProducts, readers: MapSide, writers: MapSide, device: str, memory: int) -> Iterator[int]:
    """Fill in every pair with a wide map in it, and the wide maps' moments; after each wide map how many are done."""
    squared, r, w = products.squared, readers.thin_count, writers.thin_count
    step = max(1, memory // 2 // (8 * readers.width**2))
    for start in range(0, max(1, len(readers.wide)), step):
        grams = {i: make().to(device) for i, make in enumerate(readers.wide[start : start + step], r + start)}
        for i, gram in grams.items():
            products.readers[:, i] = _moments(gram)
            if writers.thin is not None:
                squared[i, :w] = energy_through(writers.thin, gram, writers.position[:w] <= readers.position[i])
            yield i - r + 1
        for j, make in enumerate(writers.wide, w):
            written = make().to(device)
            products.writers[:, j] = _moments(written)
            if readers.thin is not None and not start:
                squared[:r, j] = energy_through(readers.thin, written, writers.position[j] <= readers.position[:r])
            for i, gram in grams.items():
                if writers.position[j] <= readers.position[i]:
                    squared[i, j] = (written * gram).sum().cpu()
            yield len(readers.wide) + j - w + 1


def _by_depth(products: PairProducts, writers: MapSide, dtype: torch.dtype) -> PairProducts:
    """Writers in order of depth, heads no longer first; squares of mere rounding are 0."""
    size = (products.readers[1, :, None] * products.writers[1]).sqrt()
    squared = beyond_rounding(products.squared, size, torch.finfo(dtype).eps)
    squared = squared.masked_fill((size == 0) & ~squared.isnan(), 0.0)
    order = torch.argsort(writers.position, stable=True)
    reader, writer = products.axes
    return replace(
        products,
        axes=(reader, replace(writer, labels=tuple(writer.labels[i] for i in order.tolist()))),
        squared=squared.clamp_(min=0.0)[:, order],
        writers=products.writers[:, order],
    )


def _gram(rows: Tensor) -> Tensor:
    d = rows.shape[1]
    gram = torch.zeros(d, d, dtype=accumulate)
    for cut in _cuts(len(rows), 8 * d):
        chunk = rows[cut].to(accumulate)
        gram.addmm_(chunk.T, chunk)
    return gram


def _thin_moments(side: MapSide) -> Tensor:
    """(2, n) moments of the thin maps, NaN for the others."""
    moments = torch.full((2, side.count), float("nan"), dtype=accumulate)
    if side.thin is not None:
        moments[:, : side.thin_count] = torch.stack(self_moments(side.thin)).cpu()
    return moments


def _moments(gram: Tensor) -> Tensor:
    return torch.stack([gram.diagonal().sum(), gram.square().sum()]).cpu()


def _cuts(count: int, bytes_per_row: int) -> Iterator[slice]:
    step = max(1, WORKSPACE_BYTES // bytes_per_row)
    return (slice(start, start + step) for start in range(0, count, step))


def _positions(states: Sequence[int | None]) -> Tensor:
    return torch.tensor(states, dtype=torch.int64)
