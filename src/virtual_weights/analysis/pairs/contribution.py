"""Delivered energy: what every writer actually puts on every reader, averaged over the tokens of a text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.maps.circuits import need_heads
from virtual_weights.analysis.maps.map_side import Side, Square, check_port, meet, parts_reading, read_square
from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack, Progress, accumulate
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Component, Stream
from virtual_weights.stream.group import HEAD_PORTS, Port, Writers
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.question import Question


@final
@dataclass(frozen=True, eq=False)
class Delivered(Question):
    """Data-aware virtual weights: the energy ``E||A R~ O z/s||^2`` that each writer delivers to each later reader.

    ``O z`` is what the writer wrote, s the reader's norm scalar, and A is what becomes of the reader's input::

        Q: A^T A = E[Rot^T k k^T Rot] / d_head    K: A^T A = E[Rot q q^T Rot^T] / d_head    V: A = W_O
        gate, up, in, unembed: A = 1

    so Q and K are in squared attention logits, as if queries and keys of a pair were independent of what is delivered;
    V in squared stream norm; the others in squared pre-activations or logits, summed over neurons or tokens. With
    ``C = E[z z^T/s^2]`` it is ``||A R~ O C^(1/2)||_F^2``, the same product as a composition score.

    Heads as writers are exact in C where ``moments.form`` is ``"exact"``; MLPs and embeddings are always factorised,
    see ``Moments``. Biases are exact.

    Invariant under re-basing of heads (Q, K: by bases in which rotary turns planes) and, with RMSNorm folded, under
    rotation of the stream.

    Attributes:
        port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` or ``"unembed"``.
        moments: of the text.
        centred: leave out the mean, ``C = Cov(z/s)``: what a writer says that differs between tokens.
        writers: ``"heads"``, or ``"all"``: embeddings, MLPs and biases too.
        rotary_offset: query position minus key position; None is the mean over all causal pairs of a chunk.
        device: any torch device.
        memory_mb: workspace of the kernel in MiB.
    """

    question: ClassVar[str] = "delivered"
    port: Port
    moments: Moments
    centred: bool = False
    writers: Writers = "heads"
    rotary_offset: int | None = None
    device: str = "cpu"
    memory_mb: int = 256

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.writers not in ("heads", "all"):
            raise UsageError(f"no writers {self.writers!r}", expected="heads or all", do="choose one of these")

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters that change the answer, as plain values; moments by their identity."""
        return {
            "port": self.port,
            "moments": self.moments.identity,
            "centred": self.centred,
            "writers": self.writers,
            "rotary_offset": self.rotary_offset,
        }

    def __call__(self, stream: Stream, progress: Progress | None = None) -> Record:
        """Compute all pairs.

        Args:
            stream: the model.
            progress: called with (layers done, layers in all).

        Returns:
            A Record over (reader, writer), both in order of depth: ``delivered``, and for Q, K and V ``share``, of the
            energy of all that the port receives (constants of the model apart). Contributions can cancel, so shares
            need not sum to 1. A pair that cannot reach is absent.

        Raises:
            UsageError: the moments belong to another model, or the model has no such port.
        """
        self.moments.check(stream)
        parts = _readers(stream, self.port)
        writers = self._writers(stream)
        outer = _outer(stream)
        rows: list[Tensor] = []
        inputs: list[Tensor] = []
        for done, readers in enumerate(parts, 1):
            side, own = self._reading(stream, readers)
            state = int(side.position[0])
            reaching = [i for i, w in enumerate(writers) if w.writes is not None and w.writes <= state]
            row = torch.full((len(readers), len(writers)), float("nan"), dtype=accumulate)
            if reaching:
                there = self._writing(stream, [writers[i] for i in reaching], state, outer)
                found = meet(side, there, device=self.device, memory=self.memory_mb * 2**20)
                row[:, _order(writers, reaching)] = found.squared
            rows.append(row)
            inputs.append(own)
            if progress is not None:
                progress(done, len(parts))
        return self._record(stream, [r for part in parts for r in part], writers, torch.cat(rows), torch.cat(inputs))

    def _record(
        self, stream: Stream, readers: list[Component], writers: list[Component], found: Tensor, inputs: Tensor
    ) -> Record:
        units = {"Q": "squared logits", "K": "squared logits", "V": "squared norm"}
        columns = [Column("delivered", found, units.get(self.port, "squared activations"), "E||A R~ O z/s||^2")]
        if self.port in HEAD_PORTS:
            share = "delivered energy over that of the port's whole input"
            columns.append(Column("share", found / inputs[:, None], "1 (ratio), >= 0", share))
        shared = self.port in ("K", "V") and stream.spec.group > 1
        told = "mean over causal pairs" if self.rotary_offset is None else self.rotary_offset
        return Record(
            self.question,
            (
                Axis("reader", tuple(str(r.label) for r in readers), tuple(r.channel or "" for r in readers) * shared),
                Axis("writer", tuple(str(w.label) for w in writers)),
            ),
            tuple(columns),
            parameters=self.parameters,
            stamp={
                "norm": stream.norm_stamp,
                "moment": "centred" if self.centred else "uncentred",
                "heads": self.moments.form,
                "tokens": self.moments.tokens,
                "rotary_offset": "no rotary embedding" if stream.spec.rotary is None else told,
                "gauge": "free of heads' inner bases",
            },
            provenance=stream.provenance,
        )

    def _reading(self, stream: Stream, readers: list[Component]) -> tuple[Side, Tensor]:
        """The readers of one layer, weighted by A, and the energy of all that they receive."""
        labels, layer = tuple(str(r.label) for r in readers), readers[0].label.layer
        position = torch.tensor([r.reads for r in readers])
        if self.port not in HEAD_PORTS:
            square = partial(read_square, stream, self.port, layer)
            return Side(labels, position, None, (square,), stream.d_model), torch.full((1,), float("nan"))
        assert layer is not None
        read, group = stream.read(self.port, layer), 1 if self.port == "Q" else stream.spec.group
        metric = self._metric(stream, layer)
        stack = MapStack(read.maps, torch.arange(len(readers)) // group, metric, position)
        own, mean = (of[f"L{layer}.{self.port}"].double() for of in (self.moments.ports, self.moments.port_means))
        if self.centred:
            own = own - _outer_product(mean, mean)
        elif read.constants is not None:
            c = read.constants.double()
            cross = _outer_product(mean, c)
            own = own - cross - cross.mT + _outer_product(c, c)
        inputs = (metric * own.repeat_interleave(group, 0)).sum((1, 2))
        return Side(labels, position, stack, (), stream.d_model), inputs

    def _metric(self, stream: Stream, layer: int) -> Tensor:
        """``A^T A`` of every head, (heads, k, k) float64."""
        if self.port == "V":
            out = stream.write("head", layer).double()
            return out.mT @ out
        other = self.moments.ports[f"L{layer}.{'K' if self.port == 'Q' else 'Q'}"].double()
        if self.port == "Q":
            other = other.repeat_interleave(stream.spec.group, 0)
        return (
            _turned(other, stream, self.port, self.rotary_offset, self.moments.length) * stream.spec.attention_scale**2
        )

    def _writers(self, stream: Stream) -> list[Component]:
        """Heads, or all whose moments are held, in order of depth."""
        found = [c for c in stream.components if c.writes is not None]
        if self.writers == "heads":
            need_heads(stream)
            return [c for c in found if c.kind == "head"]
        return [c for c in found if c.kind in ("head", "attn_bias", "mlp_bias") or str(c.label) in self.moments.second]

    def _writing(self, stream: Stream, writers: list[Component], state: int, outer: dict[int, Tensor]) -> Side:
        """Writers as seen from a state: maps O, weighted by ``C^(1/2)``; heads first."""
        heads, parts = [w for w in writers if w.kind == "head"], [w for w in writers if w.kind != "head"]
        layers = sorted({w.label.layer for w in heads if w.label.layer is not None})
        thin = None
        if layers:
            metric = torch.cat([self._second(f"L{i}.heads", state - _writes(heads, i)) for i in layers])
            # position 0: that all of these reach is known
            n = len(heads)
            zeros = torch.zeros(n, dtype=torch.int64)
            thin = MapStack(torch.cat([outer[i] for i in layers]), torch.arange(n), metric, zeros)
        wide = tuple(self._wide(stream, part, state) for part in parts)
        labels = tuple(str(w.label) for w in (*heads, *parts))
        return Side(labels, torch.zeros(len(labels), dtype=torch.int64), thin, wide, stream.d_model)

    def _wide(self, stream: Stream, part: Component, state: int) -> Square:
        assert part.writes is not None
        if part.kind not in ("attn_bias", "mlp_bias"):
            after = state - part.writes
            return lambda: self._second(str(part.label), after)[0]
        bias = stream.weight("o_bias" if part.kind == "attn_bias" else "down_bias", part.label.layer)
        assert bias is not None
        square, mean = (float(self.moments.states[name][state]) for name in ("inverse_square", "inverse"))
        weight = square - mean**2 if self.centred else square
        return lambda: torch.outer(bias.double(), bias.double()) * weight

    def _second(self, group: str, after: int) -> Tensor:
        second, mean = self.moments.held_at(group, after)
        return second - _outer_product(mean, mean) if self.centred else second


def _readers(stream: Stream, port: Port) -> list[list[Component]]:
    """The readers of a port, layer by layer."""
    if port not in HEAD_PORTS:
        return [[part] for part in parts_reading(stream, port)]
    need_heads(stream)
    return [list(stream.heads_of(layer)) for layer in stream.attention_layers]


def _outer(stream: Stream) -> dict[int, Tensor]:
    """``O^T`` of every layer's heads, (heads, k, d)."""
    return {layer: stream.write("head", layer).mT for layer in stream.attention_layers}


def _writes(heads: list[Component], layer: int) -> int:
    return next(h.writes for h in heads if h.label.layer == layer and h.writes is not None)


def _order(writers: list[Component], reaching: list[int]) -> Tensor:
    """Columns of the reaching writers as a Side holds them: heads first."""
    return torch.tensor(sorted(reaching, key=lambda i: writers[i].kind != "head"))


def _outer_product(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _turned(square: Tensor, stream: Stream, port: Port, offset: int | None, length: int) -> Tensor:
    """``Rot^T C Rot`` for Q, ``Rot C Rot^T`` for K, at one offset or on average over the causal pairs of a chunk.

    ``Rot_D = Rot_1^D``: with ``Rot_1 = U diag(l) U^-1`` the average over D weighs entry (a, b) of C, in the basis U, by
    the mean of ``(l_a l_b)^D``.
    """
    turn = stream.rotation(1 if offset is None else offset)
    if turn is None:
        return square
    turn = turn.mT if port == "Q" else turn
    if offset is not None:
        return turn @ square @ turn.mT
    values, basis = torch.linalg.eig(turn)
    inverse = torch.linalg.inv(basis)
    distance = torch.arange(length, dtype=accumulate)
    pairs = (length - distance) / (length - distance).sum()
    powers = values[:, None] ** distance  # (k, length)
    mean = (powers * pairs) @ powers.mT
    return (basis @ ((inverse @ square.to(basis.dtype) @ inverse.mT) * mean) @ basis.mT).real
