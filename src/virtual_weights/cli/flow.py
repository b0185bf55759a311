"""What a map asks of a running model: what flows on a text, what heads do, what removing edges costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from virtual_weights.analysis.pairs.contribution import Delivered
from virtual_weights.cli.job import Job, among_heads
from virtual_weights.cli.observe import passages
from virtual_weights.cli.prove import per_channel
from virtual_weights.cli.statements import prompt_of, runners
from virtual_weights.errors import RecordError
from virtual_weights.record import Record
from virtual_weights.runtime import load
from virtual_weights.runtime.edges.ablation import Trial, prove
from virtual_weights.runtime.edges.attribution import attribute
from virtual_weights.runtime.edges.edge import Edge, next_token_loss
from virtual_weights.runtime.flow.labels import labels
from virtual_weights.runtime.flow.observation import observe, operating_point
from virtual_weights.statements import Statements
from virtual_weights.stream import OperatingPoint
from virtual_weights.stream.group import HEAD_PORTS
from virtual_weights.stream.moments import Moments

LENGTH = 128
"""Tokens of a chunk; of random tokens half as many are said twice."""
_SEQUENCES = 8  # chunks on which edges are attributed and removed
_RANDOM = 10  # matched random edges a port


@dataclass(frozen=True)
class Flow:
    """One run of the model for a map; every record is kept like those of the map.

    Attributes:
        job: of the map.
        text: as in ``passages``.
        seed: of random tokens in place of text; None for text.
        tokens: how many are observed.
        edges: how many are removed one by one.
    """

    job: Job
    text: str | None
    seed: int | None
    tokens: int
    edges: int

    def answers(self) -> Iterator[Record]:
        """Labels of heads, delivered energy of every port, attribution and proof of the foremost edges."""
        stream = self.job.stream
        if stream.heads:
            key = self.job.key("labels", {})  # on random tokens of their own, whatever the text
            yield self.job.kept(key, lambda: labels(stream, self._model, progress=self.job.step("labels")))
        yield from delivered(self.job, self.moments(), self.told)
        if stream.heads and len(self._sequences):
            attributed = list(self._attributed())
            yield from attributed
            edges = self._foremost(attributed)
            if edges:
                yield self._proved(edges)

    def statements(self) -> Record:
        """Verdicts on the statements, those that need a run among them."""
        return self.job.told(Statements(), self._identity, self._ran)

    def moments(self) -> Moments:
        """Of the text, observed now or by an earlier map into the same atlas."""
        key = self.job.key("moments", self._identity)
        path = self.job.atlas.path / f"moments-{key[:16]}.safetensors"
        if path.is_file():
            try:
                return Moments.load(path, self.job.stream)
            except RecordError:  # cut short: observed anew
                path.unlink()
        tick = self.job.step("observe")
        found = observe(self.job.stream, self._chunks, self._model, progress=lambda done: tick(done, self.tokens))
        found.save(path)
        return found

    @property
    def told(self) -> str:
        """What text it is, in words."""
        return self._text[1]

    @cached_property
    def _text(self) -> tuple[list[Tensor], str]:
        found, told = passages(self.job.stream, self.text, self.tokens, LENGTH, 8, self.seed)
        return list(found), told

    @property
    def _chunks(self) -> list[Tensor]:
        return self._text[0]

    @cached_property
    def _model(self) -> nn.Module:
        return load(self.job.stream, device=self.job.device)

    @cached_property
    def _sequences(self) -> Tensor:
        """The first whole chunks, (sequences, tokens)."""
        whole = [row for batch in self._chunks for row in batch if len(row) == LENGTH and int(row.min()) >= 0]
        return torch.stack(whole[:_SEQUENCES]) if whole else torch.empty(0, LENGTH, dtype=torch.int64)

    @property
    def _first(self) -> int:
        return 1 if self.seed is None else LENGTH // 2

    @cached_property
    def _identity(self) -> dict[str, Any]:
        content = b"".join(chunk.numpy().tobytes() for chunk in self._chunks)
        return {"tokens": sum(int((chunk >= 0).sum()) for chunk in self._chunks), "text": sha256(content).hexdigest()}

    def _ran(self) -> tuple[OperatingPoint, dict[str, Record]]:
        """A prompt's operating point, and what the statements take from text; these records are kept, too."""
        able = runners(self.job.stream, self._chunks, self._model, self.job.step)
        point = operating_point(self.job.stream, prompt_of(self._chunks), self._model)
        return point, {name: self._kept(name, {}, found) for name, found in able.items()}

    def _attributed(self) -> Iterator[Record]:
        found: dict[str, Record] = {}
        metric = partial(next_token_loss, first=self._first)

        def computed(port: str) -> Record:
            if not found:
                step = self.job.step("attribution")
                found.update(attribute(self.job.stream, self._sequences, metric, self._model, progress=step))
            return found[port]

        for port in HEAD_PORTS:
            yield self._kept("attribution", {"port": port, "first": self._first}, partial(computed, port))

    def _foremost(self, attributed: list[Record]) -> list[tuple[str, str]]:
        """Half by composition score, the same number of each port, half by the size of their attribution."""
        scored = among_heads(self.job.stream, self.job.known.values())
        each = self.edges // 2 // max(len(scored), 1)
        found = [_edge(row, port) for port, record in scored.items() for row in per_channel(record, each, "score")]
        rows = [
            (row["size"], _edge(row, str(record.parameters["port"])))
            for record in attributed
            for row in per_channel(record, self.edges, "size")
        ]
        found += [edge for _, edge in sorted(rows, reverse=True)]
        channels: dict[tuple[str, str, str], tuple[str, str]] = {}
        for edge in found:  # a channel may have come under two names
            channels.setdefault(Edge.of(self.job.stream, *edge).key, edge)
        return list(channels.values())[: self.edges]

    def _proved(self, edges: list[tuple[str, str]]) -> Record:
        trial = Trial(first=self._first, random=_RANDOM)
        asked = {"edges": [list(edge) for edge in edges], "first": self._first, "random": _RANDOM}

        def computed() -> Record:
            return prove(self.job.stream, edges, self._sequences, trial, self._model, self.job.step("prove"))

        return self._kept("prove", asked, computed)

    def _kept(self, question: str, parameters: dict[str, Any], compute: Callable[[], Record]) -> Record:
        """A record whose stamp says on what text it was computed."""
        asked = {**self._identity, **parameters}

        def stamped() -> Record:
            record = compute()
            return replace(record, stamp={"text": self.told, **record.stamp})

        return self.job.kept(self.job.key(question, asked), stamped)


def delivered(job: Job, moments: Moments, told: str) -> Iterator[Record]:
    """Delivered energy of every writer at every port that the model has, with the text told in the stamp."""
    for port in job.ports():
        question = Delivered(port, moments, writers="all", device=job.device, memory_mb=job.memory_mb)
        yield job.kept(job.key(question.question, question.parameters), partial(_stamped, job, question, told))


def from_file(job: Job, path: Path) -> Iterator[Record]:
    """The same from moments that were kept, without running anything."""
    yield from delivered(job, Moments.load(path, job.stream), f"the text behind {path.name}")


def _stamped(job: Job, question: Delivered, told: str) -> Record:
    record = question(job.stream, job.step(f"delivered {question.port}"))
    return replace(record, stamp={"text": told, **record.stamp})


def _edge(row: dict[str, Any], port: str) -> tuple[str, str]:
    return str(row["writer"]), f"{row['reader']}.{port}"
