"""Clearing: what a component, taken as a linear update of the stream, leaves of each direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import Convention
from virtual_weights.analysis.maps.circuits import stored_eps
from virtual_weights.errors import UsageError
from virtual_weights.linalg import LinearMap, accumulate
from virtual_weights.linalg.decompose import product_eigen
from virtual_weights.linalg.linear_map import halves
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Head, Mlp, Question, Stream, parse


@final
@dataclass(frozen=True)
class Clearing(Question[Stream]):
    """The clearing spectrum of a head, an MLP or a neuron: eigenvalues of its update, nearest to -1 first.

    Taken as linear, a component makes ``x -> x + T x``:

    - a head attending to its own position with weight 1: ``T = W_O W_V / s``;
    - an MLP with one slope for all neurons (gated: every activated gate equal to it): ``T = slope W_out W_in / s``;
    - a neuron likewise, of rank one: its one eigenvalue is minus its clearing gain.

    An eigenvector of T with eigenvalue l becomes ``1 + l`` times itself: cleared at l = -1, which is where ``I + T`` is
    singular and information is lost. At most r directions can be cleared, r the inner dimension; the other d - r
    eigenvalues are 0 and are not listed. T is not symmetric: a sum of eigenvectors need not shrink as each does.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream.

    Attributes:
        component: ``"L5H3"``, ``"L5.mlp"`` or ``"L5N7"``.
        scalar: the norm scalar s, in [1e-60, 1e60]; 1 is a convention, not a measurement.
        slope: the MLP's slope; heads have none and do not use it.
    """

    question: ClassVar[str] = "clearing"
    component: str
    scalar: float = 1.0
    slope: float = 1.0

    def __post_init__(self) -> None:
        Convention(self.scalar, self.slope)  # refuses what is out of range

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Compute the spectrum.

        Returns:
            A Record over ``eigenvalue`` (1 is nearest to -1): ``kept = |1 + l|`` (0 cleared, 1 unchanged, more than 1
            grown), ``real`` and ``imaginary`` part of l.

        Raises:
            UsageError: no such component, or one that does not both read and write.
        """
        del progress  # it is one step
        eigenvalues, _ = self.modes(stream)
        return stream.record(
            self,
            (Axis("eigenvalue", tuple(str(i + 1) for i in range(len(eigenvalues)))),),
            (
                Column("kept", (1 + eigenvalues).abs(), "1 (factor), >= 0", "|1 + l|: what is left of the direction"),
                Column("real", eigenvalues.real, "1 (factor)", "real part of l"),
                Column("imaginary", eigenvalues.imag, "1 (factor)", "imaginary part of l"),
            ),
            gauge="eigenvalues: free of inner bases",
            norm_scalar=self.scalar,
            slope=self.slope if parse(self.component).kind != "head" else None,
            attention="to itself = 1",
            further_zeros=stream.d_model - len(eigenvalues),
        )

    def modes(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Eigenvalues of T, nearest to -1 first, and their directions.

        Returns:
            Eigenvalues (r,) and unit eigenvectors in columns (d, r), both complex128. The phase of a vector is
            arbitrary; a pair of conjugate eigenvalues turns the plane of its real and imaginary part. A zero eigenvalue
            without a vector in the range of T gives NaN.
        """
        update, factor = self._update(stream)
        left, right = halves(update, accumulate)
        eigenvalues, inner = torch.linalg.eig(right @ left)  # right left y = l y gives T (left y) = l (left y)
        rank = int((product_eigen(right, left, stored_eps(stream)) != 0).sum())
        eigenvalues[eigenvalues.abs().argsort(descending=True)[rank:]] = 0  # what rounding of the weights makes of 0
        eigenvalues = eigenvalues * factor
        order = sorted(range(len(eigenvalues)), key=lambda i: _nearest(complex(eigenvalues[i].item())))
        vectors = left.to(inner.dtype) @ inner[:, order]
        return eigenvalues[order], vectors / torch.linalg.vector_norm(vectors, dim=0)

    def _update(self, stream: Stream) -> tuple[LinearMap, float]:
        component = stream[self.component]
        if isinstance(component, Head):
            return component.ov, 1 / self.scalar
        if isinstance(component, Mlp):
            return component.out @ component.up, self.slope / self.scalar
        raise UsageError(
            f"{self.component} does not both read and write the stream",
            expected="a head, an MLP or a neuron, such as L5H3, L5.mlp or L5N7",
            do="name one of these, without a port",
        )


def _nearest(value: complex) -> tuple[float, float, float]:
    # conjugates are equally near only up to rounding: 12 digits keep their order the same on every machine
    return float(f"{abs(1 + value):.12g}"), float(f"{value.real:.12g}"), -value.imag
