"""Recovery: how faithfully superposed signals can be read out again, by method and by their number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.crowding.directions import DirectionKind, check_kind, directions
from virtual_weights.errors import UsageError
from virtual_weights.linalg import FOLDED_RANK_CUT, accumulate, random_generator
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream

METHODS = {
    "matched": "D^T x: each direction's own projection",
    "least_squares": "D^+ x: the shortest coefficients that give x",
    "known_support": "least squares over the active directions alone, which must be known",
    "sparse": "orthogonal matching pursuit with n coefficients (scikit-learn)",
}


@final
@dataclass(frozen=True)
class Recovery(Question[Stream]):
    """n of the model's directions carry a random sign at once; which method finds the coefficients again?

    ``x = D c`` with m of the model's own unit directions as columns of ``D`` (d, m) and n entries +-1 in ``c``. The
    **fidelity** of an estimate is the share of the active signals that are among its n largest entries, with the right
    sign. It is in [0, 1] and no scaling of the estimate changes it: 1 is recovery, n/(2 m) is chance.

    Invariant under scaling of a direction and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        kind: which directions, see ``directions``.
        size: m, how many of them, chosen by the seed.
        most: largest number of signals; numbers double from 1.
        trials: seeded choices of signals for each number.
        seed: of all choices.
        methods: names of ``METHODS``; None takes all that are installed.

    Reference: Pati, Rezaiifar and Krishnaprasad 1993 (orthogonal matching pursuit); Donoho and Elad 2003 (coherence).
    """

    question: ClassVar[str] = "recovery"
    kind: DirectionKind = "out"
    size: int = 1024
    most: int = 256
    trials: int = 8
    seed: int = 0
    methods: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        unknown = [name for name in self.methods or () if name not in METHODS]
        if unknown or min(self.size, self.most, self.trials) < 1:
            raise UsageError(
                f"methods {unknown}, size {self.size}, most {self.most}, trials {self.trials}",
                expected=f"some of {', '.join(METHODS)}, and numbers of at least 1",
                do="leave them out for the defaults",
            )

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters as plain values, the methods by name."""
        return {**super().parameters, "methods": list(self._methods)}

    @property
    def _methods(self) -> tuple[str, ...]:
        if self.methods is not None:
            return self.methods
        return tuple(name for name in METHODS if name != "sparse" or find_spec("sklearn") is not None)

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Superpose and recover.

        Returns:
            A Record over ``n``, a column of mean fidelity for every method.

        Raises:
            UsageError: the model has no such directions, or a method needs scikit-learn and it is not installed.
        """
        _, unit = directions(stream, self.kind, self.size, self.seed)
        columns = unit.T.to(accumulate)
        counts = [n for n in (2**i for i in range(32)) if n <= min(self.most, len(unit))]
        methods = {name: _method(name, columns) for name in self._methods}
        generator = random_generator(self.seed)
        fidelity = {name: torch.zeros(len(counts), dtype=accumulate) for name in methods}
        for i, n in enumerate(counts):
            truth = torch.stack([_signals(len(unit), n, generator) for _ in range(self.trials)], 1)
            for name, method in methods.items():
                fidelity[name][i] = _fidelity(truth, method(columns @ truth, truth)).mean()
            progress(i + 1, len(counts))
        return stream.record(
            self,
            (Axis("n", tuple(map(str, counts))),),
            (Column(name, values, "1, in [0, 1]", METHODS[name]) for name, values in fidelity.items()),
            directions=len(unit),
            dimension=stream.d_model,
        )


def _signals(size: int, n: int, generator: torch.Generator) -> Tensor:
    truth = torch.zeros(size, dtype=accumulate)
    active = torch.randperm(size, generator=generator)[:n]
    truth[active] = torch.randint(2, (n,), generator=generator).to(accumulate) * 2 - 1
    return truth


def _fidelity(truth: Tensor, estimate: Tensor) -> Tensor:
    """The share of every column's signals that the estimate recovers; an entry of 0 recovers none."""
    n = int((truth[:, 0] != 0).sum())
    top = estimate.abs().topk(n, dim=0).indices
    return (estimate.gather(0, top).sign() * truth.gather(0, top) > 0).to(accumulate).mean(0)


def _method(name: str, columns: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from superpositions (d, trials) and the truth (m, trials), for its support only, to estimates."""
    if name == "matched":
        return lambda x, truth: columns.T @ x
    if name == "least_squares":
        inverse = torch.linalg.pinv(columns, rtol=FOLDED_RANK_CUT)
        return lambda x, truth: inverse @ x
    return _sparse(columns) if name == "sparse" else lambda x, truth: _on_support(columns, x, truth)


def _on_support(columns: Tensor, x: Tensor, truth: Tensor) -> Tensor:
    estimate = torch.zeros_like(truth)
    for i in range(truth.shape[1]):
        active = truth[:, i].nonzero()[:, 0]
        support = columns[:, active]
        solution = torch.linalg.lstsq(support, x[:, i : i + 1], rcond=FOLDED_RANK_CUT, driver="gelsd").solution
        estimate[active, i] = solution[:, 0]
    return estimate


def _sparse(columns: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if find_spec("sklearn") is None:
        raise UsageError(
            "sparse recovery needs scikit-learn, which is not installed",
            expected="the extra 'recovery' of this package",
            do="pip install '.[recovery]' in a clone of this project, or leave the method out",
        )
    from sklearn.linear_model import orthogonal_mp

    matrix, rank = columns.numpy(), int(torch.linalg.matrix_rank(columns, rtol=FOLDED_RANK_CUT))

    def pursue(x: Tensor, truth: Tensor) -> Tensor:
        n = min(int((truth[:, 0] != 0).sum()), rank)
        with warnings.catch_warnings():
            # linearly dependent directions end the pursuit early, which the fidelity shows
            warnings.filterwarnings("ignore", "Orthogonal matching pursuit ended prematurely", RuntimeWarning)
            estimate = orthogonal_mp(matrix, x.numpy(), n_nonzero_coefs=n)
        return torch.from_numpy(estimate).reshape(truth.shape).to(accumulate)

    return pursue
