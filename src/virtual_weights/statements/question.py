"""The question that asks all checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import ClassVar, final

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Progress
from virtual_weights.record import Axis, Column, Record, Value
from virtual_weights.statements.catalog import STATEMENTS
from virtual_weights.statements.evidence import Bench, Finding, Statement
from virtual_weights.stream import OperatingPoint, Stream
from virtual_weights.stream.question import Question


@final
@dataclass(frozen=True)
class Statements(Question):
    """The 25 statements, each with the verdict that the model's own numbers give.

    Verdicts: ``holds``; ``holds under`` a condition, which is said; ``fails``, with a witness; ``cannot tell``, with
    the reason. Each is computed, none is written down beforehand; a page per statement says why it is so.

    Attributes:
        only: ids, such as ``("L5", "T3")``; empty for all.
        samples: how many pairs or triples of heads a check looks at where it cannot look at all.
        seed: of these choices and of every null.
    """

    question: ClassVar[str] = "statements"
    only: tuple[str, ...] = ()
    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        known = {s.id for s in STATEMENTS}
        unknown = [name for name in self.only if name not in known]
        if unknown or self.samples < 1:
            raise UsageError(
                f"statements {', '.join(unknown)}, {self.samples} samples" if unknown else f"{self.samples} samples",
                expected="ids L1-L12, T1-T7, C1-C6, and at least one sample",
                do="write for example only=('L5', 'T3')",
            )

    def __call__(
        self,
        stream: Stream,
        progress: Progress | None = None,
        asker: Callable[[Question], Record] | None = None,
        point: OperatingPoint | None = None,
        runs: Mapping[str, Record] | None = None,
    ) -> Record:
        """Ask every check.

        Args:
            stream: the model, norms folded.
            progress: called with (statements done, statements in all).
            asker: answers the questions that checks share; None asks the stream. An atlas may answer from what it has.
            point: a run on a prompt; without it the statements about running say that they cannot tell.
            runs: what runs of this model on text found, each by its ``question``: ``cleared``, ``lifetime``,
                ``frontier``. T6, T7 and L12 take from them what the weights do not say.

        Returns:
            A Record over ``statement`` with text columns ``title``, ``seed`` (the claim), ``corrected``, ``verdict``,
            ``condition``, ``why``, ``witnesses``, ``evidence`` (a JSON object) and ``page``. Its parameters name
            the point and the runs, where there are any, by what is in them.

        Raises:
            UsageError: the norm was left out of the readers, or a run is of another model or question.
        """
        if not stream.folded:
            raise UsageError(
                "the norm is left out of this stream's readers",
                expected="effective read maps, with the norm folded",
                do="open the model without fold=False",
            )
        seen = _checked(stream, runs or {})
        wanted = [s for s in STATEMENTS if not self.only or s.id in self.only]
        bench = Bench(stream, self.samples, self.seed, asker, point, seen)
        found = list[Finding]()
        for done, statement in enumerate(wanted, 1):
            found.append(statement.check(bench))
            if progress is not None:
                progress(done, len(wanted))
        return Record(
            self.question,
            (Axis("statement", tuple(s.id for s in wanted)),),
            _columns(wanted, found),
            parameters={**self.parameters, **_identities(point, seen)},
            stamp={"norm": stream.norm_stamp, "run": _run(point, seen)},
            provenance=stream.provenance,
        )


def _checked(stream: Stream, runs: Mapping[str, Record]) -> Mapping[str, Record]:
    for name, record in runs.items():
        if record.question != name or record.provenance.get("fingerprint") != stream.source.fingerprint:
            raise UsageError(
                f"a run {name!r} that answers {record.question!r} for {record.provenance.get('model')}",
                expected=f"a record {name!r} of this checkpoint",
                do="run this model on the text again",
            )
    return runs


def _identities(point: OperatingPoint | None, runs: Mapping[str, Record]) -> dict[str, object]:
    """Hex sha256 of the point and of every run, for parameters; nothing where nothing was run."""
    found: dict[str, object] = {} if point is None else {"point": point.identity}
    if runs:
        # where the checkpoint lay is no part of what was found
        bare = {name: replace(record, provenance={}) for name, record in runs.items()}
        found["runs"] = {name: sha256(record.to_json().encode()).hexdigest() for name, record in sorted(bare.items())}
    return found


def _run(point: OperatingPoint | None, runs: Mapping[str, Record]) -> str:
    said = [] if point is None else [f"a prompt of {len(point.tokens)} tokens"]
    told = {name: record.stamp.get("tokens") for name, record in sorted(runs.items())}
    said += [name if tokens is None else f"{name} on {tokens} tokens of text" for name, tokens in told.items()]
    return ", ".join(said) or "weights alone"


def _columns(statements: list[Statement], findings: list[Finding]) -> tuple[Column, ...]:
    columns: dict[str, tuple[Value, ...]] = {
        "title": tuple(s.title for s in statements),
        "seed": tuple(s.claim for s in statements),
        "corrected": tuple(s.corrected for s in statements),
        "verdict": tuple(f.verdict for f in findings),
        "condition": tuple(f.condition for f in findings),
        "why": tuple(f.why for f in findings),
        "witnesses": tuple("; ".join(f.witnesses) for f in findings),
        "evidence": tuple(json.dumps(dict(f.evidence), allow_nan=False) for f in findings),
        "page": tuple(s.page for s in statements),
    }
    return tuple(Column(name, values) for name, values in columns.items())
