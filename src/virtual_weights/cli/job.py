"""What ``vweights map`` asks of a model, each question once, and never again what the atlas holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from virtual_weights.analysis import Channel, Composition, Overlap
from virtual_weights.analysis.crowding.coherence import Coherence
from virtual_weights.analysis.crowding.interference import Interference
from virtual_weights.analysis.crowding.recovery import Recovery
from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.analysis.ledger.basis import Basis
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.analysis.pairs.neuron_neuron import NeuronNeuron
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.atlas import Atlas, task_key
from virtual_weights.cli.progress import Tick
from virtual_weights.record import Record
from virtual_weights.statements import Statements
from virtual_weights.stream import OperatingPoint, Stream
from virtual_weights.stream.group import HEAD_PORTS
from virtual_weights.stream.question import Question

_SPECTRA = 6  # strongest channels into keys whose spectra the report shows
_NEURON_TABLES = ("neuron_edges", "neuron_edges_of_writers", "neuron_cosines")


class Part(StrEnum):
    """What a map consists of, in the order of the report."""

    composition = "composition"
    overlap = "overlap"
    subspaces = "subspaces"
    bandwidth = "bandwidth"
    memory = "memory"
    neurons = "neurons"
    superposition = "superposition"
    basis = "basis"
    statements = "statements"


@dataclass(frozen=True)
class Job:
    """One run of the map.

    Attributes:
        atlas: where records are kept.
        stream: the model.
        step: begins a step of the progress by name.
        rotary_offset, dtype, device, memory_mb: as in ``Composition``.
        known: records of this run, by key.
    """

    atlas: Atlas
    stream: Stream
    step: Callable[[str], Tick]
    rotary_offset: int | None = None
    dtype: str = "float64"
    device: str = "cpu"
    memory_mb: int = 256
    known: dict[str, Record] = field(default_factory=dict[str, Record])

    def answers(self, parts: Iterable[Part]) -> Iterator[Record]:
        """The records of some parts; what the checkpoint has nothing for is passed over."""
        heads, mlps = bool(self.stream.heads), any(c.kind == "mlp" for c in self.stream.components)
        for part in parts:
            if part is Part.neurons and mlps:
                yield from self._neurons()
            elif part is Part.statements and self.stream.folded:
                yield self.told(Statements())
            else:
                yield from (self.answer(each) for each in self._questions(part, heads, mlps))

    def answer(self, question: Question) -> Record:
        """One record: of this run, of the atlas, or computed now."""
        if isinstance(question, Composition):  # asked by a check: in the manner of this run
            question = replace(question, compute_dtype=self.dtype, device=self.device, memory_mb=self.memory_mb)
        key = self.key(question.question, question.parameters)
        return self.kept(key, lambda: self._ask(question))

    def _questions(self, part: Part, heads: bool, mlps: bool) -> Iterator[Question]:
        where = self.device, self.memory_mb
        if part is Part.composition:
            yield from map(self._composition, self.ports())
            yield from self._spectra() if heads else ()
        elif part is Part.overlap and heads:
            yield from (Overlap(port, *where) for port in HEAD_PORTS)
        elif part is Part.subspaces and heads:
            yield from (Subspaces("O", role, device=self.device) for role in ("K", "V"))
        elif part is Part.bandwidth:
            yield Bandwidth()
        elif part is Part.basis:
            yield Basis()
        elif part is Part.superposition and mlps:
            yield from (Coherence(device=self.device), Interference(), Recovery())
        elif part is Part.memory:
            yield from (Neurons(),) if mlps else ()
            yield from (HeadErasers(), Erasure(device=self.device)) if heads else ()

    def ports(self) -> Iterator[Any]:
        """The ports that the model has."""
        yield from HEAD_PORTS if self.stream.heads else ()
        if any(c.kind == "mlp" for c in self.stream.components):
            yield from ("gate", "up") if self.stream.spec.gated else ("in",)
        yield from ("unembed",) if self.stream.model.has("unembed") else ()

    def _composition(self, port: Any) -> Composition:
        return Composition(port, self.rotary_offset, self.dtype, self.device, self.memory_mb, "all")

    def _spectra(self) -> Iterator[Question]:
        """Channels of the strongest edges into keys, one per pair of a writer and a shared key head."""
        keys = among_heads(self.stream, [self.answer(self._composition("K"))])["K"]
        seen = set[tuple[str, str]]()
        for row in keys.top(_SPECTRA * 8).rows():
            pair = str(row["writer"]), str(row.get("reader_channel") or row["reader"])
            if pair not in seen and len(seen) < _SPECTRA:
                seen.add(pair)
                yield Channel(pair[0], f"{row['reader']}.K", self.rotary_offset)

    def _neurons(self) -> Iterator[Record]:
        """Edges between neurons: three tables of one pass."""
        for port in ("gate", "up") if self.stream.spec.gated else ("in",):
            question = NeuronNeuron(port, device=self.device)
            keys = [self.key(name, question.parameters) for name in _NEURON_TABLES]
            if not all(self.atlas.finished(key) for key in keys):
                began = time.monotonic()
                found = question.all(self.stream, self.step(f"neurons {port}"))
                for key, record in zip(keys, (found.readers, found.writers, found.histogram), strict=True):
                    self.atlas.put(record, key=key, seconds=time.monotonic() - began)
            yield self.atlas.get(keys[-1])

    def told(
        self,
        statements: Statements,
        text: Mapping[str, Any] | None = None,
        ran: Callable[[], tuple[OperatingPoint, Mapping[str, Record]]] | None = None,
    ) -> Record:
        """Verdicts on the statements, with what was run on a text where there is one."""

        def computed() -> Record:
            point, runs = (None, None) if ran is None else ran()
            return statements(self.stream, self.step("statements"), self.answer, point, runs)

        return self.kept(self.key(statements.question, {**statements.parameters, **(text or {})}), computed)

    def _ask(self, question: Question) -> Record:
        return question(self.stream, self.step(" ".join([question.question, *map(str, _named(question))])))

    def key(self, question: str, parameters: dict[str, Any]) -> str:
        """The address of an answer."""
        return task_key(self.stream.source.fingerprint, question, parameters, {"norm": self.stream.norm_stamp})

    def kept(self, key: str, compute: Callable[[], Record]) -> Record:
        """The record at an address: of this run, of the atlas, or computed now."""
        if key not in self.known:
            if not self.atlas.finished(key):
                began = time.monotonic()
                record = compute()
                self.atlas.put(record, key=key, seconds=time.monotonic() - began)
                self.known[key] = record
            else:
                self.known[key] = self.atlas.get(key)
        return self.known[key]


def among_heads(stream: Stream, records: Iterable[Record]) -> dict[str, Record]:
    """Compositions of heads with heads, by port."""
    names = [str(c.label) for c in stream.heads]
    found = (r for r in records if r.question == "composition" and r.parameters["port"] in HEAD_PORTS)
    return {str(record.parameters["port"]): record.select("writer", names) for record in found}


def _named(question: Question) -> list[object]:
    """The parameters by which a step is told from another of its kind."""
    names = ("port", "role_a", "role_b", "writer", "reader", "kind")
    return [question.parameters[name] for name in names if question.parameters.get(name) is not None]
