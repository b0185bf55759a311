"""What the checks share: the model, answers to questions asked once, seeded choices of components."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.linalg import LinearMap, accumulate
from virtual_weights.record import Record
from virtual_weights.stream import Component, Head, OperatingPoint, Stream
from virtual_weights.stream.group import HeadPort
from virtual_weights.stream.question import Question

Some = TypeVar("Some")


@final
@dataclass(frozen=True, eq=False)
class Bench:
    """A model on the bench.

    Attributes:
        stream: the model, norms folded.
        samples: how many pairs or triples a check looks at where it cannot look at all.
        seed: of every choice.
        asker: answers a question; an atlas may answer from what it holds.
        point: a run on a prompt, None where nothing was run.
        runs: what runs on text found, by question: ``cleared``, ``lifetime``, ``frontier``.
    """

    stream: Stream
    samples: int = 64
    seed: int = 0
    asker: Callable[[Question], Record] | None = None
    point: OperatingPoint | None = None
    runs: Mapping[str, Record] = field(default_factory=dict[str, Record])
    _answers: dict[Question, Record] = field(default_factory=dict[Question, Record])

    def ask(self, question: Question) -> Record:
        """The answer to a question, computed at most once."""
        if question not in self._answers:
            self._answers[question] = question(self.stream) if self.asker is None else self.asker(question)
        return self._answers[question]

    def chosen(self, items: Sequence[Some], count: int | None = None) -> list[Some]:
        """A seeded choice, in the order of the items."""
        generator = torch.Generator().manual_seed(self.seed)
        at = torch.randperm(len(items), generator=generator)[: self.samples if count is None else count]
        return [items[i] for i in at.sort().values.tolist()]

    def pairs(self) -> list[tuple[Component, Component]]:
        """Some (writer, reader) pairs of heads that can reach."""
        heads = self.stream.heads
        return self.chosen([(w, r) for w in heads for r in heads if _reaches(w, r)])

    def among_heads(self, port: HeadPort) -> Record:
        """Composition of heads with heads, taken from the answer about all writers."""
        return self.ask(Composition(port, writers="all")).select("writer", [str(c.label) for c in self.stream.heads])

    def head(self, component: Component) -> Head:
        """A component as a head."""
        part = self.stream[str(component.label)]
        assert isinstance(part, Head)
        return part


def dense(map: LinearMap) -> Tensor:
    """A map as a float64 matrix."""
    return map.to(accumulate).dense()


def present(values: Tensor) -> Tensor:
    """The entries that are there."""
    return values[~values.isnan()]


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's correlation of two columns over the entries that both have; None for fewer than three."""
    there = ~(a.isnan() | b.isnan())
    if int(there.sum()) < 3:
        return None
    ranks = torch.stack([_ranks(each[there].flatten()) for each in (a, b)])
    found = float(torch.corrcoef(ranks)[0, 1])
    return found if found == found else None


def _ranks(values: Tensor) -> Tensor:
    """Places in ascending order, equal values at their mean place."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(accumulate)
    return (last - (counts - 1) / 2)[group]


def _reaches(writer: Component, reader: Component) -> bool:
    assert writer.writes is not None and reader.reads is not None
    return writer.writes <= reader.reads


Verdict = Literal["holds", "holds under", "fails", "cannot tell"]
Figure = float | int | str | bool | None


@final
@dataclass(frozen=True)
class Finding:
    """What a check found on one model.

    Attributes:
        verdict: ``"holds"``, ``"holds under"`` a condition, ``"fails"`` or ``"cannot tell"``.
        why: one sentence with the numbers that decided.
        condition: of ``"holds under"``, what must be the case; None otherwise.
        evidence: named figures, each computed on this model.
        witnesses: names of components, with their numbers.
    """

    verdict: Verdict
    why: str
    condition: str | None = None
    evidence: Mapping[str, Figure] = field(default_factory=dict)
    witnesses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.condition is not None) == (self.verdict == "holds under"), "a condition goes with 'holds under'"


@final
@dataclass(frozen=True)
class Statement:
    """One published statement about the residual stream and the check that looks at it.

    Attributes:
        id: ``"L1"`` to ``"C6"``.
        title: what it is about, in a few words.
        claim: what was published.
        corrected: what mathematics says.
        check: computes the evidence and the verdict on a model.
    """

    id: str
    title: str
    claim: str
    corrected: str
    check: Callable[[Bench], Finding]

    @property
    def page(self) -> str:
        """Its page in the documentation."""
        return f"docs/statements/{self.id}.md"


def cannot_tell(why: str) -> Finding:
    """A check that lacks what it needs."""
    return Finding("cannot tell", why)
