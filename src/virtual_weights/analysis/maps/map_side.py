"""All writers, or all readers of one port, as maps on the stream: heads in thin factors, wider maps by their Grams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import WORKSPACE_BYTES, MapStack, accumulate, all_pairs, beyond_rounding, self_moments
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column
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
        kinds: the kind of each wide map, so that like is averaged with like; thin maps are all ``"head"``.
    """

    axis: Axis
    position: Tensor
    thin: MapStack | None
    wide: tuple[Gram, ...]
    width: int
    kinds: tuple[str, ...] = ()

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
        averages: what every map has in common with the mean of the other side; None where not asked for.
        form: how heads were paired with heads: ``"gram"`` or ``"direct"``, None where none did.
        flops: of that part.
    """

    axes: tuple[Axis, Axis]
    squared: Tensor
    readers: Tensor
    writers: Tensor
    averages: Averages | None
    form: str | None
    flops: float


@final
@dataclass(frozen=True, eq=False)
class Averages:
    """Inner products of every map's G with the mean G of the other side, where every G has trace 1.

    Means are over all maps of a side, whether they reach or not; of writers over those of one kind. A map that is zero
    is in no mean and has NaN here.

    Attributes:
        heard: (n_w,) ``<Gbar_r, G_w>``.
        listening: (n_r, n_w) ``<G_r, Gbar_w>``, by the kind of w.
        both: (n_w,) ``<Gbar_r, Gbar_w>``, by the kind of w.
    """

    heard: Tensor
    listening: Tensor
    both: Tensor


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
        kinds=tuple(group.kind for group in groups),
    )


def read_gram(stream: Stream, port: Port, group: Group) -> Tensor:
    """``R~^T R~`` of an MLP's port or the unembedding, (d, d) float64."""
    return _gram(stream.read(port, group).maps[0])


def write_gram(stream: Stream, group: Group) -> Tensor:
    """``O O^T`` of an MLP, an embedding or a bias, (d, d) float64."""
    return _gram(stream.write(group)[0].T)


def pair_products(  # noqa: PLR0913 - two sides; the rest says how, by keyword only
    readers: MapSide,
    writers: MapSide,
    *,
    dtype: torch.dtype = accumulate,
    device: str = "cpu",
    memory: int = 2**28,
    averaged: bool = False,
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
        averaged: also compare every map with the mean of the other side.
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
    products = PairProducts((readers.axis, writers.axis), squared, *moments, None, form, flops)
    sums = _Sums(products, readers, writers, device) if averaged else None
    for done in _fill_wide(products, readers, writers, sums, (device, memory)):
        progress(done, total)
    return _by_depth(products if sums is None else replace(products, averages=sums.averages()), writers, dtype)


def lift_columns(products: PairProducts, d: int) -> Iterator[Column]:
    """The columns ``lift``, ``writer_effect`` and ``reader_effect`` of products with averages; absent where pairs are.

    With G of trace 1::

        lift = log2( <G_r, G_w> <Gbar_r, Gbar_w> / (<G_r, Gbar_w> <Gbar_r, G_w>) )
        writer_effect = log2( d <Gbar_r, G_w> )      reader_effect = log2( d <G_r, Gbar_w> )

    An effect is 0 where the other side is isotropic, G = I/d. All are undefined for a map that is zero, and lift for a
    product that is; lift of the only writer of its kind, or of the only reader, is 0.
    """
    means = products.averages
    assert means is not None
    product = products.squared / (products.readers[0][:, None] * products.writers[0])
    lift = product * means.both / (means.listening * means.heard)
    yield _log2("lift", lift, "<G_r, G_w> beyond what both ends explain")
    reachable = torch.where(products.squared.isnan(), torch.nan, 1.0)
    yield _log2("writer_effect", reachable * means.heard * d, "how widely the writer is heard, d <Gbar_r, G_w>")
    yield _log2("reader_effect", reachable * means.listening * d, "how widely the reader listens, d <G_r, Gbar_w>")


def _log2(name: str, ratio: Tensor, description: str) -> Column:
    """Of a ratio that is 1 but for rounding the logarithm is 0."""
    return Column(name, beyond_rounding(torch.where(ratio > 0, ratio, torch.nan).log2(), 1.0), "log2", description)


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


@final
class _Sums:
    """Sums of Grams of trace 1, and of every map's products with those of the other side."""

    def __init__(self, products: PairProducts, readers: MapSide, writers: MapSide, device: str) -> None:
        self.products, self.readers, self.writers = products, readers, writers
        self.kinds = ("head",) * writers.thin_count + writers.kinds
        self.written = {kind: torch.zeros(writers.width, writers.width, dtype=accumulate) for kind in set(self.kinds)}
        self.written = {kind: gram.to(device) for kind, gram in self.written.items()}
        self.heard = torch.zeros(writers.count, dtype=accumulate)
        self.listening = {kind: torch.zeros(readers.count, dtype=accumulate) for kind in self.written}
        self.read = torch.zeros(readers.width, readers.width, dtype=accumulate, device=device)
        if writers.thin is not None:
            _add_thin(self.written["head"], writers.thin, products.writers[0][: writers.thin_count])
        if readers.thin is not None:
            _add_thin(self.read, readers.thin, products.readers[0][: readers.thin_count])

    def read_wide(self, grams: Mapping[int, Tensor]) -> None:
        """Begin with some wide readers, the first time with all thin ones."""
        for i, gram in grams.items():
            self.read += gram * _inverse(self.products.readers[0, i])
        if self.writers.thin is not None:
            self.heard[: self.writers.thin_count] += _energies(self.writers.thin, self.read)

    def write_wide(self, j: int, gram: Tensor, first: bool) -> None:
        """A wide writer, beside the readers begun with; its own Gram counts the first time."""
        self.heard[j] += (gram * self.read).sum().cpu()
        if first:
            self.written[self.kinds[j]] += gram * _inverse(self.products.writers[0, j])

    def end(self, grams: Mapping[int, Tensor]) -> None:
        """After all writers: what the readers begun with have in common with their sums."""
        self.read.zero_()
        for kind, written in self.written.items():
            if self.readers.thin is not None:
                self.listening[kind][: self.readers.thin_count] = _energies(self.readers.thin, written)
            for i, gram in grams.items():
                self.listening[kind][i] = (gram * written).sum().cpu()

    def averages(self) -> Averages:
        """The sums over the numbers of maps that are not zero."""
        trace_r, trace_w = self.products.readers[0], self.products.writers[0]
        heard = self.heard / trace_w / (trace_r > 0).sum()
        of_kind = {kind: torch.tensor([kind == other for other in self.kinds]) & (trace_w > 0) for kind in self.written}
        listening = {kind: x / trace_r / of_kind[kind].sum() for kind, x in self.listening.items()}
        both = {kind: heard[of_kind[kind]].mean() for kind in self.written}
        return Averages(
            heard,
            torch.stack([listening[kind] for kind in self.kinds], 1),
            torch.stack([both[kind] for kind in self.kinds]),
        )


def _energies(heads: MapStack, gram: Tensor) -> Tensor:
    return energy_through(heads, gram, torch.ones(heads.count, dtype=torch.bool))


def _inverse(traces: Tensor) -> Tensor:
    """1 over a trace, 0 where it is 0."""
    return torch.where(traces > 0, 1 / traces, 0.0)


def _add_thin(total: Tensor, heads: MapStack, traces: Tensor) -> None:
    """Add ``sum_i G_i / tr G_i``; maps that share a thin factor are one product, of the sum of their metrics."""
    metric = torch.eye(heads.inner, dtype=accumulate).expand(heads.count, -1, -1)
    metric = (metric if heads.metric is None else heads.metric.cpu().to(accumulate)) * _inverse(traces)[:, None, None]
    metrics = metric.new_zeros(len(heads.outer), heads.inner, heads.inner).index_add_(0, heads.index.cpu(), metric)
    for cut in _cuts(len(metrics), 8 * heads.inner * heads.width * 2):
        outer = heads.outer[cut].to(device=total.device, dtype=accumulate)
        total.addmm_(outer.flatten(0, 1).T, (metrics[cut].to(total.device) @ outer).flatten(0, 1))


def _fill_wide(
    products: PairProducts, readers: MapSide, writers: MapSide, sums: _Sums | None, workspace: tuple[str, int]
) -> Iterator[int]:
    """Fill in every pair with a wide map in it, and the wide maps' moments; after each wide map how many are done."""
    squared, r, w, (device, memory) = products.squared, readers.thin_count, writers.thin_count, workspace
    step = max(1, memory // 2 // (8 * readers.width**2))
    for start in range(0, max(1, len(readers.wide)), step):
        grams = {i: make().to(device) for i, make in enumerate(readers.wide[start : start + step], r + start)}
        for i, gram in grams.items():
            products.readers[:, i] = _moments(gram)
            if writers.thin is not None:
                squared[i, :w] = energy_through(writers.thin, gram, writers.position[:w] <= readers.position[i])
            yield i - r + 1
        if sums is not None:
            sums.read_wide(grams)
        for j, make in enumerate(writers.wide, w):
            written = make().to(device)
            products.writers[:, j] = _moments(written)
            if readers.thin is not None and not start:
                squared[:r, j] = energy_through(readers.thin, written, writers.position[j] <= readers.position[:r])
            for i, gram in grams.items():
                if writers.position[j] <= readers.position[i]:
                    squared[i, j] = (written * gram).sum().cpu()
            if sums is not None:
                sums.write_wide(j, written, not start)
            yield len(readers.wide) + j - w + 1
        if sums is not None:
            sums.end(grams)


def _by_depth(products: PairProducts, writers: MapSide, dtype: torch.dtype) -> PairProducts:
    """Writers in order of depth, heads no longer first; squares of mere rounding are 0."""
    size = (products.readers[1, :, None] * products.writers[1]).sqrt()
    squared = beyond_rounding(products.squared, size, torch.finfo(dtype).eps)
    squared = squared.masked_fill((size == 0) & ~squared.isnan(), 0.0)
    order = torch.argsort(writers.position, stable=True)
    (reader, writer), means = products.axes, products.averages
    return replace(
        products,
        axes=(reader, replace(writer, labels=tuple(writer.labels[i] for i in order.tolist()))),
        squared=squared.clamp_(min=0.0)[:, order],
        writers=products.writers[:, order],
        averages=means and Averages(means.heard[order], means.listening[:, order], means.both[order]),
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
