"""For every head the strongest of very many neurons or features, without a table of all pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import reading_circuits, writing_circuits
from virtual_weights.analysis.maps.map_side import component_axis
from virtual_weights.analysis.maps.neuron_side import UNITS, NeuronSide, Units, neuron_side
from virtual_weights.analysis.pairs.neuron_heads import STAMP, HeadPairs, Heads, columns_of, some_heads
from virtual_weights.errors import UsageError
from virtual_weights.linalg import accumulate
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Block, Stream, Work, cost
from virtual_weights.stream.effective import as_seen
from virtual_weights.stream.group import HEAD_PORTS, NEURON_PORTS, HeadPort, NeuronPort


@final
@dataclass(frozen=True)
class HeadUnits(HeadPairs):
    """The units, neurons or features of attached dictionaries, that every head is most strongly connected with.

    Through the port of a unit heads write, and units read; through the port of a head units write. Scores are those of
    :class:`HeadNeuron` and :class:`NeuronHead`, the largest ``top`` of each head; as all pairs with one head are
    compared, the strongest edges of all are among them. A block keeps no more than these, so that a dictionary of a
    million features takes no more memory than one of ten thousand.

    Attributes:
        port: ``"up"``, ``"in"``, ``"gate"`` or ``"enc"``: heads write; ``"Q"``, ``"K"`` or ``"V"``: heads read.
        top: units of each head.
        reader: only this head or unit, e.g. ``"L18N5"``; None for all.
        writer: likewise.
        units: of those that write, ``"neurons"``, ``"features"``, or ``"all"`` of both.
        device: any torch device.
        memory_mb: of blocks at work at once.
    """

    question: ClassVar[str] = "head_units"
    port: NeuronPort | HeadPort = "up"
    top: int = 10
    reader: str | None = None
    writer: str | None = None
    units: Units = "all"
    device: str = cost("cpu")
    memory_mb: int = cost(512)

    def __post_init__(self) -> None:
        if self.port not in (*NEURON_PORTS, *HEAD_PORTS):
            raise UsageError(
                f"no head or unit reads through port {self.port!r}",
                expected=", ".join((*NEURON_PORTS, *HEAD_PORTS)),
                do="choose one of these ports",
            )
        if self.top < 1 or self.units not in UNITS:
            raise UsageError(
                f"top={self.top}, units={self.units!r}", expected=f"1 or more; {', '.join(UNITS)}", do="correct them"
            )

    def neurons(self, stream: Stream) -> NeuronSide:
        """The units."""
        if self.port in HEAD_PORTS:
            return neuron_side(stream, "out", self.writer, self.units)
        return neuron_side(stream, cast("NeuronPort", self.port), self.reader)

    def heads(self, stream: Stream) -> Heads:
        """The heads, by their circuits."""
        if self.port in HEAD_PORTS:
            axis = component_axis("head", stream.groups.heads, self.port)
            return some_heads(stream, axis, partial(reading_circuits, port=self.port), self.reader)
        axis = component_axis("head", stream.groups.heads)
        return some_heads(as_seen(stream, self.port), axis, writing_circuits, self.writer)

    @classmethod
    def compute(cls, work: Work, subject: Any, progress: Progress = silent) -> Iterator[tuple[Any, str, Block]]:
        """The strongest units of each block with every head; progress is in pairs.

        A block holds ``score`` (heads, top), ``place`` (heads, top) of the unit in the block, ``norms`` (heads, top)
        of its vector, and ``pairs``, how many can reach.
        """
        for question, name, block in super().compute(work, subject, progress):
            score = block["score"]
            strongest = score.nan_to_num(-1.0).topk(min(question.top, score.shape[1]), 1)
            yield (
                question,
                name,
                {
                    "score": score.gather(1, strongest.indices),
                    "place": strongest.indices,
                    "norms": block["norms"][strongest.indices],
                    "pairs": (~score.isnan()).sum(),
                },
            )

    def answer(self, subject: Stream, blocks: Iterable[Block]) -> Record:
        """A Record over ``edge``, heads in order of depth, each with its units by descending score.

        Columns ``reader``, ``writer``, those of :class:`HeadNeuron`, ``rank`` and ``group``, the shared key/value head.
        """
        neurons, heads = self.neurons(subject), self.heads(subject)
        score = torch.full((heads.stack.count, 0), torch.nan)
        number, norms, pairs = torch.zeros_like(score, dtype=torch.int64), torch.zeros_like(score, dtype=accumulate), 0
        for part, block in zip(neurons.ranges, blocks, strict=True):
            pairs += int(block["pairs"])
            numbers = block["place"] + part.first
            score, number, norms = _merged(
                self.top, (score, block["score"]), (number, numbers), (norms, block["norms"])
            )
        head, place = (~score.isnan()).nonzero(as_tuple=True)
        units = [neurons.name_of(n) for n in number[head, place].tolist()]
        names = [heads.axis.labels[i] for i in head.tolist()]
        groups = tuple(heads.axis.groups[i] if heads.axis.groups else None for i in head.tolist())
        into_heads = self.port in HEAD_PORTS
        figures = columns_of(
            score[head, place], heads.norms[head] * norms[head, place], heads.deviation[head], subject.d_model
        )
        columns = (
            Column("reader", tuple(names if into_heads else units), "", "what reads, with its port"),
            Column("writer", tuple(units if into_heads else names), "", "what writes"),
            *figures,
            Column("rank", place + 1, "place, from 1", "among the units of its head"),
            Column("group", groups, "", "the key/value head through which it reads with others"),
        )
        axis = Axis("edge", tuple(map(str, range(1, len(head) + 1))))
        return subject.record(self, (axis,), columns, **STAMP, rotary_offset=0, pairs=pairs)


def _merged(top: int, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Scores, with what belongs to them, of two blocks: the ``top`` largest of each head."""
    joined = [torch.cat(pair, 1) for pair in pairs]
    order = joined[0].nan_to_num(-1.0).argsort(dim=1, descending=True, stable=True)[:, :top]
    return tuple(values.gather(1, order) for values in joined)
