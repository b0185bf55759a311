"""The 25 statements: lemmas L1-L12, theorems T1-T7, corollaries C1-C6, and the question that checks them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from virtual_weights.errors import UsageError
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record, Value
from virtual_weights.runtime.running.run import Run
from virtual_weights.statements import (
    basis,
    capacity,
    composed,
    memory,
    null_space,
    running,
    superposed,
)
from virtual_weights.statements.evidence import Evidence, Finding, Statement
from virtual_weights.stream import Composite, OperatingPoint, Stream
from virtual_weights.stream.question import Ask, asking
from virtual_weights.stream.stream import finite

STATEMENTS = (
    Statement(
        "L1",
        "No privileged basis",
        "Rotating the stream together with every matrix that reads or writes it leaves the model unchanged.",
        "True with RMSNorm once its gain is folded into the readers, and with LayerNorm once the writers are centred "
        "as well; biases and positions must be rotated too. Only orthogonal maps preserve the norm. What training "
        "makes of it is another question: trained streams do have preferred coordinates.",
        basis.no_privileged_basis,
    ),
    Statement(
        "L2",
        "Capacity for independent signals",
        "The ranks of layers that communicate independently add up to at most d.",
        "Necessary if arbitrary signals are to be separated exactly, linearly and all at once. Trained models do not "
        "meet it: the ranks of their writers add up to many times d.",
        capacity.independent_signals,
    ),
    Statement(
        "L3",
        "Linear layers compose",
        "Two residual layers in sequence are I + T1 + T2 + T2 T1.",
        "Exact for linear layers. A model's blocks are linear only with attention, norm scalars and gates fixed at "
        "their values on one prompt.",
        running.composed_blocks,
    ),
    Statement(
        "L4",
        "Null spaces lose information",
        "What lies in the null space of a layer's map cannot be recovered by later layers.",
        "It is kept: (I + T) v = v. That reader does not see it, but others may. Only what T maps to its own negative "
        "is lost.",
        null_space.null_space_is_kept,
    ),
    Statement(
        "L5",
        "Virtual weights multiply",
        "The virtual weight from i to k is that from j to k times that from i to j.",
        "The shapes match only by chance. The direct weight is one term; the path through j gives another, R_k T_j "
        "O_i, and the total is the sum over paths. The two are equal where R_k (T_j - I) O_i = 0.",
        composed.virtual_weights_compose,
    ),
    Statement(
        "L6",
        "Eigenvalues are channel strengths",
        "The eigenvalues of a virtual weight are the strengths of its independent channels.",
        "The singular values are: a virtual weight is in general rectangular. Eigenvalues say whether a map of the "
        "stream to itself copies or erases.",
        composed.eigenvalues_are_strengths,
    ),
    Statement(
        "L7",
        "The stream is a direct sum",
        "The stream decomposes into a direct sum of functional subspaces.",
        "Only where the dimensions of the subspaces add up to the dimension of their sum. That is so for a few chosen "
        "subspaces of a trained model, but not for all of them.",
        capacity.direct_sum,
    ),
    Statement(
        "L8",
        "Principal angles measure interference",
        "Interference of two heads is proportional to the cosine of the first principal angle.",
        "The cosine only bounds it: ||R O|| is at most ||R|| ||O|| cos. Angles and gains alone do not determine ||R "
        "O||_F: inner products of the singular directions, weighted by both gains, do.",
        superposed.angles_bound,
    ),
    Statement(
        "L9",
        "Superposed signals can be recovered",
        "Signals along nearly orthogonal directions can share the stream and be recovered.",
        "True, with an error that depends on the coherence, the number of signals and the method of recovery.",
        superposed.recovery,
    ),
    Statement(
        "L10",
        "Interference grows with the square",
        "Interference grows as n(n-1)/2 and the error of each signal as the root of that.",
        "The total over pairs grows as n squared. With uncorrelated amplitudes of mean zero, the squared error of one "
        "signal grows as n, and its error as the root of n.",
        superposed.growth,
    ),
    Statement(
        "L11",
        "Antiparallel weights erase best",
        "Clearing is most efficient where a neuron's input and output weights are antiparallel.",
        "True of direction. How much is cleared depends on the gain, about which the cosine says nothing.",
        memory.efficiency,
    ),
    Statement(
        "L12",
        "The best policy of memory",
        "The best policy maximises E[U (1 - m) - lambda I].",
        "The maximum does not depend on lambda: nothing is ever erased where U is not negative. With E[(1 - m)(U - "
        "lambda I)], the best policy erases where U is below lambda I.",
        memory.best_policy,
    ),
    Statement(
        "T1",
        "Rank bounds communication",
        "The rank of a sequence of layers is at most the smallest rank among them.",
        "True for a product along one path. With the stream beside it, prod(I + T), the rank is in general d; that of "
        "the update is at most the sum of the ranks.",
        composed.composed_rank,
    ),
    Statement(
        "T2",
        "Rank of a virtual weight",
        "The rank of a virtual weight is at most the smaller of its factors' ranks.",
        "True, and it is at least rank R + rank O - d (Sylvester).",
        composed.rank_bound,
    ),
    Statement(
        "T3",
        "Disjoint heads do not interfere",
        "Heads whose subspaces meet only in 0 do not interfere.",
        "They do, unless the row space of one is orthogonal to the column space of the other: R O = 0.",
        superposed.trivial_intersection,
    ),
    Statement(
        "T4",
        "The bottleneck",
        "About 100 d neurons stand before and after the stream, a compression by N_b N_a / d^2, ten thousand.",
        "The counts are those at mid-depth of fifty layers of 4 d neurons. The ratio compares nothing: a map of rank d "
        "saves a factor of N_a N_b / (d (N_a + N_b - d)), in this case about fifty.",
        capacity.bottleneck,
    ),
    Statement(
        "T5",
        "Capacity in superposition",
        "At most d / eps^2 directions fit with cosines up to eps.",
        "Not an upper bound: random codes reach exp(c eps^2 d). Welch bounds the coherence of N directions from "
        "below. What is linear in d is how many signals can be active at once and still be read linearly.",
        superposed.capacity_bound,
    ),
    Statement(
        "T6",
        "Clearing",
        "A component that reads by W and writes -V clears a dimension where V W is nearly I.",
        "V W can be I only on as many dimensions as its rank. For one direction the gain must be 1, slope and norm "
        "scalar included: less attenuates, 2 reflects. A head must also attend to the position.",
        memory.clearing,
    ),
    Statement(
        "T7",
        "Conditional memory management",
        "Managing memory by context gives fine control over what is kept.",
        "The mechanism exists; whether a model uses it shows in how its clearing varies over tokens.",
        running.conditional_clearing,
    ),
    Statement(
        "C1",
        "Distant layers talk directly",
        "Virtual weights let layers that are not neighbours communicate.",
        "True as a possibility: no virtual weight needs a layer between. How much passes is another question, which "
        "weights alone do not answer: an edge weaker than chance orientation is not nothing.",
        superposed.distant_edges,
    ),
    Statement(
        "C2",
        "Effective communication space",
        "The effective space is the intersection of the complements of all null spaces.",
        "It is the sum of the later row spaces; what nothing reads is the intersection of the null spaces.",
        null_space.communication_space,
    ),
    Statement(
        "C3",
        "Effective dimension",
        "The effective dimension of a channel is the number of singular values clearly above zero.",
        "True given a threshold, and the threshold must come from a null.",
        composed.effective_dimension,
    ),
    Statement(
        "C4",
        "Total capacity",
        "The dimensions of all subspaces add up to at most d.",
        "True for independent subspaces.",
        capacity.total_capacity,
    ),
    Statement(
        "C5",
        "Orthogonal subspaces interfere least",
        "Interference is least where subspaces are nearly orthogonal.",
        "True: it is zero where they are orthogonal. Otherwise the gains matter too.",
        superposed.orthogonal_is_least,
    ),
    Statement(
        "C6",
        "Number against fidelity",
        "More superposed signals mean less fidelity of each.",
        "True for linear read-out once n exceeds d, and for any method with noise or crowded directions. Up to d "
        "independent signals can be read exactly if it is known which are active; everything else depends on the "
        "method.",
        superposed.trade_off,
    ),
)


@final
@dataclass(frozen=True)
class Statements(Composite[Stream | Run]):
    """The 25 statements, each with the verdict that the model's own numbers give.

    Verdicts: ``holds``; ``holds under`` a condition, which is named; ``fails``, with a witness; ``cannot tell``, with
    the reason. They are computed, never written down beforehand; each statement has a page that says why it is so.

    Asked of a Stream, it judges by the weights alone. Asked of a Run, L3, T6, T7 and L12 go by what the run shows.

    Attributes:
        only: ids, such as ``("L5", "T3")``; empty for all.
        samples: how many pairs or triples of heads a check looks at where it cannot look at all.
        seed: of these choices and of every null.
        point: what a prompt fixes in the model, as read from a file; L3 takes it rather than the first tokens of a run,
            and T7 takes it where there is no run.
    """

    question: ClassVar[str] = "statements"
    only: tuple[str, ...] = ()
    samples: int = 64
    seed: int = 0
    point: OperatingPoint | None = None

    def __post_init__(self) -> None:
        known = {s.id for s in STATEMENTS}
        unknown = [name for name in self.only if name not in known]
        if unknown or self.samples < 1:
            raise UsageError(
                f"statements {', '.join(unknown)}, {self.samples} samples" if unknown else f"{self.samples} samples",
                expected="ids L1-L12, T1-T7, C1-C6, and at least one sample",
                do="write for example only=('L5', 'T3')",
            )

    def __call__(self, subject: Stream | Run, progress: Progress = silent, ask: Ask | None = None) -> Record:
        """Check each statement.

        Args:
            subject: a model, norms folded, or a run of it.
            progress: called with (statements done, statements in all).
            ask: answers the questions that checks share, about the stream and the run; None asks the subject.

        Returns:
            A Record over ``statement`` with text columns ``title``, ``seed`` (the claim), ``corrected``, ``verdict``,
            ``condition``, ``why``, ``witnesses``, ``evidence`` (a JSON object) and ``page``. ``stamp["run"]`` says in
            words what the verdicts go by.

        Raises:
            UsageError: the norm was left out of the readers.
        """
        stream, run = (subject, None) if isinstance(subject, Stream) else (subject.stream, subject)
        if not stream.folded:
            raise UsageError(
                "the norm is left out of this stream's readers",
                expected="effective read maps, with the norm folded",
                do="open the model without fold=False",
            )
        statements = [s for s in STATEMENTS if not self.only or s.id in self.only]
        answer = ask or (asking(stream) if run is None else asking(run, stream))
        evidence = Evidence(stream, answer, run, self.samples, self.seed, self.point)
        findings = list[Finding]()
        for done, statement in enumerate(statements, 1):
            findings.append(statement.check(evidence))
            progress(done, len(statements))
        axis = Axis("statement", tuple(s.id for s in statements))
        return subject.record(self, (axis,), _columns(statements, findings), run=self._basis(run))

    def _basis(self, run: Run | None) -> str:
        """What the verdicts go by, in words."""
        sources = [] if self.point is None else [f"a prompt of {len(self.point.tokens)} tokens"]
        if run is not None:
            sources.append(f"{run.text}, {run.count} tokens")
        return "; ".join(sources) or "weights alone"


_MEANINGS = {
    "title": "what it is about",
    "seed": "the claim as it was made",
    "corrected": "what is true of it",
    "verdict": "holds, holds under, fails or cannot tell",
    "condition": "under which it holds",
    "why": "the figures that decide, in words",
    "witnesses": "components or pairs that show it",
    "evidence": "the figures, as JSON",
    "page": "where it is explained",
}


def _columns(statements: Sequence[Statement], findings: Sequence[Finding]) -> tuple[Column, ...]:
    columns: dict[str, tuple[Value, ...]] = {
        "title": tuple(s.title for s in statements),
        "seed": tuple(s.claim for s in statements),
        "corrected": tuple(s.corrected for s in statements),
        "verdict": tuple(f.verdict for f in findings),
        "condition": tuple(f.condition for f in findings),
        "why": tuple(f.why for f in findings),
        "witnesses": tuple("; ".join(f.witnesses) for f in findings),
        "evidence": tuple(json.dumps(finite(f.figures), allow_nan=False) for f in findings),
        "page": tuple(s.page for s in statements),
    }
    return tuple(Column(name, values, "", _MEANINGS[name]) for name, values in columns.items())
