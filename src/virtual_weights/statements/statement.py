"""What a statement is, and what a check of it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from virtual_weights.statements.bench import Bench

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
