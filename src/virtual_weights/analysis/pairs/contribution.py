"""Contribution: what every writer actually puts on every reader, averaged over the tokens of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.map_side import component_axis, read_gram, write_gram
from virtual_weights.linalg import WORKSPACE_BYTES, MapStack, accumulate, all_pairs, beyond_rounding, self_moments
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Group, Question, Stream, cost
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers, check_port, check_writers
from virtual_weights.stream.moments import Moments

Gram = Callable[[], Tensor]
"""Makes the (d, d) float64 Gram of one map when it is needed."""


@final
@dataclass(frozen=True)
class Contribution(Question[Stream]):
    """Data-aware virtual weights: the energy ``E||A R~ O z/s||^2`` that each writer adds to each later reader.

    ``O z`` is what the writer wrote, s the reader's norm scalar, and A is what becomes of the reader's input::

        Q: A^T A = Cov(Rot^T k) / d_head    K: A^T A = E[Rot q q^T Rot^T] / d_head    V: A = W_O
        gate, up, in, unembed: A = 1

    so Q and K are in squared attention logits, as if queries and keys of a pair were independent of what is
    contributed; V in squared stream norm; the others in squared pre-activations or logits (less their mean over the
    vocabulary), summed over neurons or tokens. With ``C = E[z z^T/s^2]`` it is ``||A R~ O C^(1/2)||_F^2``, the same
    product as a composition score.

    Softmax does not see what adds the same to all scores of a query. Of the keys that a contribution to Q meets, only
    what differs between them counts: ``Cov(Rot^T k) = E[Rot^T k k^T Rot] - E[Rot]^T E[k] E[k]^T E[Rot]``, with E over
    keys and offsets. Of a contribution to K the column ``varying`` leaves out what all keys have in common,
    ``E_q <q, E[Rot]^T R~ O E[z/s]>^2``: without rotary embedding the mean over tokens, with it as much of that mean as
    rotation leaves on average over the offsets (all of it at one offset).

    ``activity`` is the baseline that any predictor of what flows should be held against: the root mean square of
    ``O z/s``, what the writer alone puts on the stream as the reader's norm shows it. No map of the reader is in it.

    Where queries and keys have a norm of their own, its scalar enters by its mean square alone, as if independent of
    what is contributed, and the energy of all that the port receives holds constants of the model too.

    C is exact or factorised by the kind of writer, as the moments hold it: the stamp says which under ``held``, see
    ``Moments``. Biases are exact.

    Invariant under re-basing of heads (Q, K: by bases in which rotary turns planes) and, with RMSNorm folded, under
    rotation of the stream.

    Attributes:
        port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` or ``"unembed"``.
        moments: of the text.
        centred: leave out the mean, ``C = Cov(z/s)``: what of a writer's output differs between tokens.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and biases too.
        rotary_offset: query position minus key position; None is the mean over all causal pairs of a chunk.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.
    """

    question: ClassVar[str] = "contribution"
    port: Port
    moments: Moments
    centred: bool = False
    writers: Writers = "heads"
    rotary_offset: int | None = None
    device: str = cost("cpu")
    memory_mb: int = cost(256)

    def __post_init__(self) -> None:
        check_port(self.port)
        check_writers(self.writers)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (groups of readers done, groups in all).

        Returns:
            A Record over (reader, writer), both in order of depth: ``contribution``, ``activity``, and for Q, K and V
            ``share``, of the energy of all that the port receives (constants of the model apart). Contributions can
            cancel, so shares need not sum to 1. For K also ``varying``, unless ``centred`` has left the mean out
            already. A pair that cannot reach is absent.

        Raises:
            UsageError: the moments belong to another model, or the model has no such port.
        """
        self.moments.check(stream)
        readers, writers = stream.groups.readers(self.port), self._writers(stream)
        outer = {group.id: stream.write(group).mT for group in writers if group.kind == "head"}
        axes = component_axis("reader", readers, self.port), component_axis("writer", writers)
        place = {label: i for i, label in enumerate(axes[1].labels)}
        blocks: dict[str, list[Tensor]] = {"energy": [], "activity": [], "common": [], "inputs": []}
        for done, group in enumerate(readers, 1):
            side, inputs = self._reading(stream, group)
            empty = torch.full((len(group.components), len(place)), float("nan"), dtype=accumulate)
            block = {"energy": empty, "activity": empty.clone(), "common": empty.clone(), "inputs": inputs}
            reaching = [writer for writer in writers if writer.reaches(group.reads)]
            if reaching:
                sources = self._writing(stream, reaching, group, outer)
                energy = _energies(side, sources, self.device, self.memory_mb * 2**20)
                block["energy"][:, [place[label] for label in sources.labels]] = energy
                columns = [place[label] for writer in reaching for label in writer.labels]
                energies = torch.cat([self._written(stream, writer, group) for writer in reaching])
                if self.centred:
                    energies = energies - self._means(stream, reaching, group).square().sum(0)
                elif self.port == "K":
                    means = self._means(stream, reaching, group)
                    block["common"][:, columns] = self._common(stream, group, means)
                block["activity"][:, columns] = energies.clamp(min=0.0).sqrt()
            for name, values in block.items():
                blocks[name].append(values)
            progress(done, len(readers))
        return self._record(stream, axes, **{name: torch.cat(values) for name, values in blocks.items()})

    def _record(self, stream: Stream, axes: tuple[Axis, ...], energy: Tensor, **beside: Tensor) -> Record:
        units = {"Q": "squared logits", "K": "squared logits", "V": "squared norm"}
        columns = [Column("contribution", energy, units.get(self.port, "squared activations"), "E||A R~ O z/s||^2")]
        if self.port in HEAD_PORTS:
            share = "contribution over that of the port's whole input"
            columns.append(Column("share", energy / beside["inputs"][:, None], "1 (ratio), >= 0", share))
        activity = "root mean square of O z/s of the writer alone"
        columns.append(Column("activity", beside["activity"], "1 (ratio), >= 0", activity))
        if self.port == "K" and not self.centred:
            varying = "contribution without what is common to all keys of a query, which softmax does not see"
            columns.append(Column("varying", (energy - beside["common"]).clamp(min=0.0), "squared logits", varying))
        return stream.record(
            self,
            axes,
            columns,
            moment="centred" if self.centred else "uncentred",
            held=self.moments.held,
            tokens=self.moments.tokens,
            rotary_offset="mean over causal pairs" if self.rotary_offset is None else self.rotary_offset,
            gauge="free of heads' inner bases",
        )

    def _reading(self, stream: Stream, group: Group) -> tuple[_Maps, Tensor]:
        """The readers of one group, weighted by A, and the energy of all that they receive."""
        if self.port not in HEAD_PORTS:
            gram = partial(read_gram, stream, self.port, group)
            return _Maps(group.labels, None, (gram,)), torch.full((1,), float("nan"))
        read, shared, metric = stream.read(self.port, group), group.shared(self.port), self._metric(stream, group)
        id = f"{group.id}.{self.port}"
        scales = self.moments.port_scales.get(id)  # the scalar of a norm on the port, as if independent of the rest
        factor = 1.0 if scales is None else scales[:, 1].double().repeat_interleave(shared)[:, None, None]
        stack = MapStack.unplaced(read.maps, metric * factor)
        second, mean = self.moments.ports[id].double(), self.moments.port_means[id].double()
        if self.centred:
            second = second - _outer_product(mean, mean)
        elif read.constants is not None and id not in self.moments.port_scales:
            c = read.constants.double()
            cross = _outer_product(mean, c)
            second = second - cross - cross.mT + _outer_product(c, c)
        energy = (metric * second.repeat_interleave(shared, 0)).sum((1, 2))
        return _Maps(group.labels, stack, ()), energy

    def _metric(self, stream: Stream, group: Group) -> Tensor:
        """``A^T A`` of every head, (heads, k, k) float64."""
        if self.port == "V":
            out = stream.write(group).double()
            return out.mT @ out
        attention, opposite = group.attention, "K" if self.port == "Q" else "Q"
        assert attention is not None
        id, shared = f"{group.id}.{opposite}", group.shared(opposite)
        other = self.moments.ports[id].double().repeat_interleave(shared, 0)
        turned = _turned(other, stream, (self.port, group), self.rotary_offset, self.moments.length)
        if self.port == "Q":
            mean = self._mean_turn(stream, group).mT @ self.moments.port_means[id].double()[..., None]
            turned = turned - (mean @ mean.mT).repeat_interleave(shared, 0)
        return turned * attention.scale**2

    def _mean_turn(self, stream: Stream, group: Group) -> Tensor:
        """``E[Rot]`` over the offsets, (k, k); the identity without rotary."""
        offset, length = self.rotary_offset, self.moments.length
        identity = torch.eye(group.width, dtype=accumulate)
        if offset is not None:
            turn = stream.rotation(offset, group)
            return identity if turn is None else turn
        step = stream.rotation(1, group)
        if step is None:
            return identity
        values, basis = torch.linalg.eig(step)
        powers = values[:, None] ** torch.arange(length, dtype=accumulate)
        return (basis * (powers * _offset_weights(length)).sum(1) @ torch.linalg.inv(basis)).real

    def _means(self, stream: Stream, writers: Sequence[Group], reader: Group) -> Tensor:
        """``O E[z/s]`` of every writer as a reader receives it, (d, writers)."""
        assert reader.reads is not None
        means: list[Tensor] = []
        for group in writers:
            if group.constant:
                mean = stream.write(group)[0].double() * self.moments.states["inverse"][reader.reads].double()
            else:
                _, inner = self.moments.held_at(group.id, reader.reads - group.first)
                maps = stream.write(group).double() if group.kind == "head" else None
                mean = (inner if maps is None else torch.einsum("mdk,mk->md", maps, inner)).T
            means.append(mean)
        return torch.cat(means, 1)

    def _written(self, stream: Stream, group: Group, reader: Group) -> Tensor:
        """``E|O z/s|^2`` of the writers of one group as a reader receives them, (m,)."""
        assert reader.reads is not None
        if not group.constant:
            return self.moments.energy[group.id][reader.reads - group.first].double()
        square = stream.write(group)[0].double().square().sum(0)
        return square * self.moments.states["inverse_square"][reader.reads].double()

    def _common(self, stream: Stream, group: Group, means: Tensor) -> Tensor:
        """What means (d, writers) add alike to all scores of a query, (heads, writers) squared logits."""
        attention = group.attention
        assert attention is not None
        keys = stream.read("K", group).maps.double() @ means  # (shared heads, k, writers)
        scales = self.moments.port_scales.get(f"{group.id}.K")
        keys = keys if scales is None else keys * scales[:, :1, None].double()
        keys = (self._mean_turn(stream, group).mT @ keys).repeat_interleave(group.shared("K"), 0)
        queries = self.moments.ports[f"{group.id}.Q"].double() * attention.scale**2
        return (keys * (queries @ keys)).sum(1)

    def _writers(self, stream: Stream) -> Sequence[Group]:
        """Heads, or all whose moments are known, in order of depth."""
        if self.writers == "heads":
            return stream.groups.readers("Q")
        return [g for g in stream.groups.writers if g.kind == "head" or g.constant or g.id in self.moments.second]

    def _writing(self, stream: Stream, writers: Sequence[Group], reader: Group, outer: Mapping[str, Tensor]) -> _Maps:
        """Writers as a reader receives them: maps O, weighted by ``C^(1/2)``; heads first."""
        assert reader.reads is not None
        heads = [group for group in writers if group.kind == "head"]
        wide = [group for group in writers if group.kind != "head"]
        thin = None
        if heads:
            metric = torch.cat([self._second(group, reader.reads) for group in heads])
            thin = MapStack.unplaced(torch.cat([outer[group.id] for group in heads]), metric)
        grams = tuple(self._wide(stream, group, reader.reads) for group in wide)
        return _Maps(tuple(label for group in (*heads, *wide) for label in group.labels), thin, grams)

    def _wide(self, stream: Stream, group: Group, state: int) -> Gram:
        if not group.constant:
            return lambda: self._second(group, state)[0]
        square, mean = (float(self.moments.states[name][state]) for name in ("inverse_square", "inverse"))
        weight = square - mean**2 if self.centred else square
        return lambda: write_gram(stream, group) * weight

    def _second(self, group: Group, state: int) -> Tensor:
        """C of a group as a state receives it."""
        second, mean = self.moments.held_at(group.id, state - group.first)
        return second - _outer_product(mean, mean) if self.centred else second


@final
@dataclass(frozen=True, eq=False)
class _Maps:
    """Maps on one side, all of which meet all of the other: heads in thin factors, then the others by their Grams."""

    labels: tuple[str, ...]
    thin: MapStack | None
    grams: tuple[Gram, ...]

    @property
    def heads(self) -> int:
        """How many are thin."""
        return 0 if self.thin is None else self.thin.count


def _energies(readers: _Maps, writers: _Maps, device: str, memory: int) -> Tensor:
    """``<G_r, G_w>`` of all pairs, (n_r, n_w) float64; 0 where it is rounding of ``||G_r|| ||G_w||``."""
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
    for i, gram in enumerate(reading, r):
        sizes[0][i] = gram.square().sum()
        energy[i, :w] = _through(writers.thin, gram)
    for j, make in enumerate(writers.grams, w):
        gram = make().to(device)
        sizes[1][j] = gram.square().sum()
        energy[:r, j] = _through(readers.thin, gram)
        energy[r:, j] = torch.stack([(gram * other).sum() for other in reading]).cpu() if reading else energy[r:, j]
    return beyond_rounding(energy, (sizes[0][:, None] * sizes[1]).sqrt()).clamp_(min=0.0)


def _through(heads: MapStack | None, gram: Tensor) -> Tensor:
    """``<G_i, S> = tr(metric_i outer S outer^T)`` of thin maps with one (d, d) Gram S."""
    if heads is None:
        return torch.empty(0, dtype=accumulate)
    step = max(1, WORKSPACE_BYTES // (16 * heads.inner * heads.width))
    outers = (outer.to(device=gram.device, dtype=accumulate) for outer in heads.outer.split(step))
    cores = torch.cat([outer @ gram @ outer.mT for outer in outers])[heads.index]
    assert heads.metric is not None
    return (heads.metric.to(device=gram.device, dtype=accumulate) * cores).sum((1, 2)).cpu()


def _outer_product(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _offset_weights(length: int) -> Tensor:
    """The share of every offset, (length,), among the causal pairs of a chunk."""
    pairs = torch.arange(length, 0, -1, dtype=accumulate)
    return pairs / pairs.sum()


def _turned(square: Tensor, stream: Stream, reader: tuple[Port, Group], offset: int | None, length: int) -> Tensor:
    """``Rot^T C Rot`` for Q, ``Rot C Rot^T`` for K, at one offset or on average over the causal pairs of a chunk.

    ``Rot_D = Rot_1^D``: with ``Rot_1 = U diag(l) U^-1`` the average over D weighs entry (a, b) of C, in the basis U, by
    the mean of ``(l_a l_b)^D``.
    """
    port, group = reader
    turn = stream.rotation(1 if offset is None else offset, group)
    if turn is None:
        return square
    turn = turn.mT if port == "Q" else turn
    if offset is not None:
        return turn @ square @ turn.mT
    values, basis = torch.linalg.eig(turn)
    inverse = torch.linalg.inv(basis)
    powers = values[:, None] ** torch.arange(length, dtype=accumulate)  # (k, length)
    mean = (powers * _offset_weights(length)) @ powers.mT
    return (basis @ ((inverse @ square.to(basis.dtype) @ inverse.mT) * mean) @ basis.mT).real
