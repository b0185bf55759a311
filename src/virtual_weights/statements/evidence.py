"""What a check has to go by, what it finds, and the statement that it checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, TypeVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.linalg import (
    FOLDED_RANK_CUT,
    Dense,
    LinearMap,
    Spectrum,
    accumulate,
    random_generator,
    singular_values,
)
from virtual_weights.record import Record
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Head, OperatingPoint, Question, Stream
from virtual_weights.stream.group import HeadPort
from virtual_weights.stream.question import Ask

Item = TypeVar("Item")

_HEADS_BYTES = 128 << 20
"""What recent heads may take, beside the memory of questions."""
NO_PAIRS = "no two heads of this model can reach each other"


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """A model, a run of it where there is one, answers to questions about both, and seeded choices of heads.

    Attributes:
        stream: the model, norms folded.
        answer: answers questions about the stream and the run.
        run: the model on tokens, None where there are only weights.
        samples: how many pairs or triples a check looks at where it cannot look at all.
        seed: of every choice.
        point: what one prompt fixes in the model, None where the run says it or nothing does.
    """

    stream: Stream
    answer: Ask
    run: Run | None = None
    samples: int = 64
    seed: int = 0
    point: OperatingPoint | None = None

    def ask(self, question: Question[Any]) -> Record:
        """The answer to a question about the stream or, where there is one, about the run."""
        return self.answer([question])[0]

    def sample(self, items: Sequence[Item], count: int | None = None) -> list[Item]:
        """A seeded choice, in the order of the items."""
        generator = random_generator(self.seed)
        indices = torch.randperm(len(items), generator=generator)[: count or self.samples]
        return [items[i] for i in indices.sort().values.tolist()]

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of all heads, in order of depth."""
        return tuple(label for group in self.stream.groups.heads for label in group.labels)

    def pairs(self) -> list[tuple[str, str]]:
        """Some pairs of a writing head and a head that it reaches."""
        groups = self.stream.groups.heads
        return self.sample(
            [
                (writer, reader)
                for below in groups
                for writer in below.labels
                for above in groups
                if below.reaches(above.reads)
                for reader in above.labels
            ]
        )

    def head_edges(self, port: HeadPort) -> Record:
        """Composition of heads with heads, taken from the answer about all writers."""
        return self.ask(Composition(port, writers="all")).select("writer", self.heads)

    def head(self, name: str) -> Head:
        """A head by its name. The most recently used stay in memory: for one, a stream reads all heads of a layer."""
        return self._recent(name)

    @cached_property
    def _recent(self) -> Callable[[str], Head]:
        widest = max((group.width for group in self.stream.groups.heads), default=1)
        heads = _HEADS_BYTES // (4 * self.stream.dtype.itemsize * widest * self.stream.d_model)
        return lru_cache(heads)(partial(_alone, self.stream))


def _alone(stream: Stream, name: str) -> Head:
    """A head whose maps hold nothing of the heads beside it."""
    head = stream[name]
    assert isinstance(head, Head)
    return replace(head, **{port: Dense(getattr(head, port).dense().clone()) for port in ("q", "k", "v", "o")})


def dense(map: LinearMap) -> Tensor:
    """A map as a float64 matrix."""
    return map.to(accumulate).dense()


def rank(map: LinearMap, cut: float = FOLDED_RANK_CUT) -> int:
    """How many singular values of a map are above a share of the largest."""
    return Spectrum(singular_values(map)).numerical_rank(cut)


def present(values: Tensor) -> Tensor:
    """The entries that are not NaN."""
    return values[~values.isnan()]


Verdict = Literal["holds", "holds under", "fails", "cannot tell"]
Figure = float | int | str | bool | None


@final
@dataclass(frozen=True)
class Finding:
    """What a check finds on one model.

    Attributes:
        verdict: ``"holds"``, ``"holds under"`` a condition, ``"fails"`` or ``"cannot tell"``.
        why: one sentence with the numbers that decided.
        condition: of ``"holds under"``, what must be the case; None otherwise.
        figures: named figures, each computed on this model.
        witnesses: names of components, with their numbers.
    """

    verdict: Verdict
    why: str
    condition: str | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
    witnesses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.condition is not None) == (self.verdict == "holds under"), "a condition goes with 'holds under'"


@final
@dataclass(frozen=True)
class Statement:
    """One published statement about the residual stream and its check.

    Attributes:
        id: ``"L1"`` to ``"C6"``.
        title: what it is about, in a few words.
        claim: what was published.
        corrected: what mathematics says.
        check: computes figures and a verdict on a model.
    """

    id: str
    title: str
    claim: str
    corrected: str
    check: Callable[[Evidence], Finding]

    @property
    def page(self) -> str:
        """Its page in the documentation."""
        return f"docs/statements/{self.id}.md"


def cannot_tell(why: str) -> Finding:
    """The finding of a check that lacks what it needs."""
    return Finding("cannot tell", why)
