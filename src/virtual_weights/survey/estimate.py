"""What a map will take before it begins: blocks, bytes, operations, memory, and time on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, final

import torch

from virtual_weights.analysis.channels.channel import Channel
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens
from virtual_weights.analysis.channels.offsets import OffsetProfile
from virtual_weights.analysis.crowding.coherence import Coherence
from virtual_weights.analysis.crowding.interference import Interference
from virtual_weights.analysis.crowding.recovery import Recovery
from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.analysis.ledger.basis import Basis
from virtual_weights.analysis.maps.map_side import Piece, height
from virtual_weights.analysis.maps.pair_products import AllPairs
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.analysis.pairs.neuron_neuron import NeuronPairs
from virtual_weights.analysis.pairs.overlap import Overlap
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.linalg.gram_blocks import triangle
from virtual_weights.statements import Statements
from virtual_weights.stream import Blocked, Group, Question, Stream
from virtual_weights.stream.question import batched

_BEGUN = 0.1  # seconds of anything, such as writing its answer
PROGRAM_MB = 420
"""Memory of the program itself, most of it torch."""


@final
@dataclass(frozen=True)
class Effort:
    """What some questions take, whatever the machine; ``+`` takes both, one after the other.

    Attributes:
        blocks: into how many parts they are divided.
        read: bytes of the checkpoint.
        single: multiplications and additions in float32.
        double: the same in float64.
        cubes: sum of n^3 over decompositions of (n, n) matrices as wide as the stream.
        small: the same over matrices as wide as a head.
        memory: bytes at the peak, without the program.
    """

    blocks: int = 1
    read: float = 0.0
    single: float = 0.0
    double: float = 0.0
    cubes: float = 0.0
    small: float = 0.0
    memory: float = 0.0

    @property
    def flops(self) -> float:
        """Operations, decompositions by the usual count of 4/3 n^3 for eigenvalues and 8/3 n^3 for singular values."""
        return self.single + self.double + 4 / 3 * self.cubes + 8 / 3 * self.small

    def __add__(self, other: Effort) -> Effort:
        sums: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        sums["memory"] = max(self.memory, other.memory)
        return Effort(**sums)


@final
@dataclass(frozen=True)
class Machine:
    """How fast a machine is, each in units of an ``Effort`` a second.

    Attributes:
        read: bytes of a checkpoint, read and made ready.
        single: operations in float32.
        double: in float64.
        cubes: n^3 of the eigenvalues of a large matrix.
        small: n^3 of the singular values of many small ones.
    """

    read: float
    single: float
    double: float
    cubes: float
    small: float

    @staticmethod
    @cache
    def measured() -> Machine:
        """This machine, in a second or two; once in a process."""
        stored = torch.randn(16, 1024, 1024).to(torch.bfloat16)
        pairs, large = torch.randn(16, 256, 1000), torch.randn(512, 512, dtype=torch.float64)
        few = torch.randn(256, 64, 64, dtype=torch.float64)
        double = pairs.double()
        return Machine(
            read=stored.numel() * 2 / _seconds(lambda: stored.float().square_()),
            single=2.0 * pairs.numel() * 256 / _seconds(lambda: torch.bmm(pairs, pairs.mT)),
            double=2.0 * pairs.numel() * 256 / _seconds(lambda: torch.bmm(double, double.mT)),
            cubes=512.0**3 / _seconds(lambda: torch.linalg.eigvalsh(large)),
            small=256 * 64.0**3 / _seconds(lambda: torch.linalg.svdvals(few)),
        )

    def seconds(self, effort: Effort) -> float:
        """How long an effort takes here."""
        return sum(getattr(effort, f.name) / getattr(self, f.name) for f in fields(self)) + _BEGUN


def _seconds(work: Callable[[], Any]) -> float:
    """The median of three runs, after one that warms up."""
    times: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[1]


@final
@dataclass(frozen=True)
class Estimate:
    """Some questions that are answered together, and what they take."""

    questions: tuple[Question[Any], ...]
    effort: Effort
    seconds: float

    @property
    def name(self) -> str:
        """Of the questions, which are of one kind."""
        return self.questions[0].question


def estimates(questions: Iterable[Question[Any]], stream: Stream, machine: Machine) -> list[Estimate]:
    """What questions of a model's weights take, those that are answered together as one.

    Args:
        questions: of those that a map asks.
        stream: the model.
        machine: where they will be answered.
    """
    found: list[Estimate] = []
    for batch in batched(questions):
        effort = _effort(batch, stream)
        found.append(Estimate(tuple(batch), effort, machine.seconds(effort)))
    return found


def _effort(batch: Sequence[Question[Any]], stream: Stream) -> Effort:
    first = batch[0]
    if isinstance(first, AllPairs):
        return _pairs([question for question in batch if isinstance(question, AllPairs)], stream)
    sizes = _Sizes.of(stream)
    if isinstance(first, NeuronPairs):
        operations = sizes.neuron_pairs * (2.0 * sizes.d + _COMPARISON)
        bases = dict.fromkeys(q.basis for q in batch if isinstance(q, Blocked))
        efforts = [Effort(len(basis.blocks(stream)), 2.0 * sizes.mlp_bytes, operations) for basis in bases]
    else:
        efforts = [_other(question, stream, sizes) for question in batch if type(question) in _OTHERS]
    return sum(efforts[1:], efforts[0]) if efforts else Effort()


def _other(question: Question[Any], stream: Stream, sizes: _Sizes) -> Effort:
    effort = _OTHERS[type(question)](question, sizes)
    return replace(effort, blocks=len(question.blocks(stream))) if isinstance(question, Blocked) else effort


def _pairs(questions: Sequence[AllPairs], stream: Stream) -> Effort:
    """Grams of all maps, once where writers are shared, and products of all pairs that can reach."""
    area = triangle(stream.d_model)
    writers = questions[0].written(stream).pieces
    readers = [piece for question in questions for piece in question.readers(stream).pieces]
    rows = sum(piece.rows for piece in (*readers, *writers))
    products = sum(r.count * w.count for r in readers for w in writers if w.position.min() <= r.position.max())
    entries = sum(piece.entries for piece in (*readers, *writers))
    loading = max(piece.loading for piece in (*readers, *writers))
    memory = min(4.0 * (entries + loading), questions[0].memory_mb * 2.0**20)
    read = sum(_bytes_of(stream, piece) for piece in (*readers, *writers))
    single = _GRAMS * 2.0 * area * rows + _PRODUCTS * 2.0 * area * products
    bases = sum(piece.rows for piece in (*readers, *writers)) if isinstance(questions[0], Overlap) else 0
    small = 2.5 * bases * _Sizes.of(stream).k * stream.d_model
    return Effort(len(readers), read, single, small=small, memory=memory)


def _bytes_of(stream: Stream, piece: Piece) -> float:
    """Of the checkpoint, for the maps of a piece; heads read the other side of their circuit too."""
    return (2.0 if piece.kind == "head" else 1.0) * _unpacking(stream) * piece.rows * stream.d_model


def _unpacking(stream: Stream) -> float:
    """Bytes of a number, and those of quantised blocks as many as they take as long as."""
    return 4.0 if stream.source.dialect == "gguf" else 2.0


# how many times longer than a large product of as many operations, measured on three sizes (docs/scaling.md)
_GRAMS, _PRODUCTS = 3.2, 2.4
_COMPARISON = 1500.0  # operations that a product takes as long as: looking for the largest cosines, and counting all


@final
@dataclass(frozen=True)
class _Sizes:
    """The sizes of a model that efforts depend on, summed over its parts."""

    d: int
    states: int
    heads: int
    shared: int
    k: int
    mlps: int
    mlp_rows: int
    mlp_bytes: float
    neurons: int
    tokens: int
    neuron_pairs: float
    ports: int

    @staticmethod
    def of(stream: Stream) -> _Sizes:
        groups, d = stream.groups, stream.d_model
        attentions, mlps = groups.heads, groups.mlps
        reading = sum(len(mlp.ports) for mlp in mlps)
        widths = [mlp.width for mlp in mlps]
        pairs = sum(r.width * w.width for r in mlps for w in mlps if w.reaches(r.reads or 0))
        tables: list[Group] = [group for group in groups if group.kind in ("embed", "unembed", "pos")]
        return _Sizes(
            d=d,
            states=stream.states,
            heads=sum(len(group.components) for group in attentions),
            shared=sum(len(group.components) // group.shared("K") for group in attentions),
            k=max((group.width for group in attentions), default=0),
            mlps=len(mlps) + reading,
            mlp_rows=sum(widths) + sum(mlp.width * len(mlp.ports) for mlp in mlps),
            neurons=sum(widths),
            mlp_bytes=_unpacking(stream) * d * (sum(widths) + sum(mlp.width * len(mlp.ports) for mlp in mlps)),
            tokens=sum(height(stream, group) for group in tables),
            neuron_pairs=float(pairs),
            ports=max((len(mlp.ports) for mlp in mlps), default=0),
        )

    @property
    def read(self) -> float:
        """Bytes of all maps."""
        return 2.0 * self.d * (2 * self.heads * self.k + 2 * self.shared * self.k + self.tokens) + self.mlp_bytes


def _subspaces(question: Any, s: _Sizes) -> Effort:
    other = s.shared if question.role_b in ("K", "V") else s.heads
    pairs = 0.5 * s.heads * other
    return Effort(
        read=s.read - s.mlp_bytes - 2.0 * s.d * s.tokens,
        double=pairs * 2.0 * s.k**2 * s.d + 8.0 * s.k**2 * s.d * (s.heads + other),
        small=1.3 * pairs * s.k**3,
        memory=16.0 * (s.heads + other) * s.k * s.d,
    )


def _bandwidth(question: Any, s: _Sizes) -> Effort:
    del question
    rows = s.mlp_rows + s.tokens + (2 * s.heads + 2 * s.shared) * s.k
    decompositions = 0.25 * s.mlps + 4.5 * s.states
    return Effort(
        read=s.read,
        double=2.0 * rows * s.d**2,
        cubes=decompositions * float(s.d) ** 3,
        memory=8.0 * (s.states / 2 + 8) * s.d**2 + 8.0 * s.d * 4 * 2048,
    )


def _head_erasers(question: Any, s: _Sizes) -> Effort:
    return Effort(
        read=2.0 * s.d * (4 * s.heads * s.k + s.tokens),
        double=(s.tokens + 2.0 * s.k * (s.heads + question.draws)) * s.d**2,
        small=_NONSYMMETRIC * 2 * (s.heads + question.draws) * s.k**3,
        memory=8.0 * s.d**2 * 3,
    )


def _erasure(question: Any, s: _Sizes) -> Effort:
    del question
    wide = s.mlps / 2 + 2
    rows = s.mlp_rows / 2 + s.tokens / 2
    pairs = 2.0 * s.heads * s.heads / 2
    thin = min(2.0 * s.k**2 * s.d * pairs, pairs * s.d**2 + 3.0 * s.heads * s.k * s.d**2)
    return Effort(
        read=s.read / 2,
        double=2.0 * rows * s.d**2 + thin + s.heads * (2.0 * s.k + 2.0 * wide) * s.d**2,
        memory=8.0 * s.d**2 * min(wide, 16),
    )


def _neurons(question: Any, s: _Sizes) -> Effort:
    return Effort(read=s.mlp_bytes * (2 + question.shuffles / 2), memory=40.0 * s.d * s.mlp_rows / max(1, s.mlps) * 3)


def _coherence(question: Any, s: _Sizes) -> Effort:
    n = min(question.sample or s.neurons, s.neurons)
    return Effort(read=s.mlp_bytes, single=_COMPARED * 2.0 * n * n * s.d, memory=8.0 * n * s.d)


def _interference(question: Any, s: _Sizes) -> Effort:
    products = question.trials * 4.0 * question.most**2 * s.d
    return Effort(read=s.mlp_bytes, double=products, memory=4.0 * s.mlp_rows * s.d)


def _recovery(question: Any, s: _Sizes) -> Effort:
    steps = question.trials * 2.0 * question.most * question.size * s.d
    return Effort(read=s.mlp_bytes, double=_SOLVED * 2.0 * steps, small=_SPARSE, memory=8.0 * question.size * s.d * 4)


def _basis(question: Any, s: _Sizes) -> Effort:
    del question
    rows = s.mlp_rows + s.tokens + (2 * s.heads + 2 * s.shared) * s.k
    return Effort(read=2 * s.read, double=2.0 * rows * s.d**2, cubes=float(s.d) ** 3, memory=8.0 * s.d**2 * 3)


def _channel(question: Any, s: _Sizes) -> Effort:
    del question
    return Effort(read=2.0 * s.d * s.tokens * 2, small=4.0 * s.k**3, memory=8.0 * s.d * 8192)


def _channel_tokens(question: Any, s: _Sizes) -> Effort:
    """Every end of every block beside all tokens of both sides."""
    rows = 16.0 * s.tokens * s.d * question.blocks
    return Effort(read=2.0 * s.d * s.tokens * 2, double=rows, small=4.0 * s.k**3, memory=8.0 * s.d * 8192)


def _offsets(question: Any, s: _Sizes) -> Effort:
    return Effort(read=8.0 * s.d * s.k, small=4.0 * s.k**3 * len(question.offsets), memory=8.0 * s.d * s.k)


def _statements(question: Any, s: _Sizes) -> Effort:
    """What they ask beside what a map has answered."""
    del question
    draws = 3e9  # of random maps, whatever the model
    products, memory = 6.0 * s.tokens * s.d**2, 64.0 * s.d**2
    return Effort(read=6 * s.read, double=products, cubes=30.0 * s.d**3, small=draws, memory=memory)


_NONSYMMETRIC = 20.0  # eigenvalues without symmetry, against singular values
_COMPARED = 1.5  # cosines are compared and counted, of random directions too
_SOLVED = 4.0  # recovery, for each product with the dictionary
_SPARSE = 3e9  # sparse recovery, whatever the width
_OTHERS: Mapping[type[Question[Any]], Callable[[Any, _Sizes], Effort]] = {
    Subspaces: _subspaces,
    Bandwidth: _bandwidth,
    HeadErasers: _head_erasers,
    Erasure: _erasure,
    Neurons: _neurons,
    Coherence: _coherence,
    Interference: _interference,
    Recovery: _recovery,
    Basis: _basis,
    Channel: _channel,
    ChannelTokens: _channel_tokens,
    OffsetProfile: _offsets,
    Statements: _statements,
}
