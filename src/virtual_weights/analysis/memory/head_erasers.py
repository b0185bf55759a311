"""Heads as memory management: whether OV copies what it reads, turns it, or subtracts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from virtual_weights.analysis.depth.frozen import Convention
from virtual_weights.analysis.maps.circuits import stored_eps
from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.linalg import WORKSPACE_BYTES, accumulate, beyond_rounding, random_generator, side_by_side
from virtual_weights.linalg.decompose import eigen, product_eigen
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.stream import Question, Stream

_COLUMNS = {
    "negative_share": ("1, in [0, 1]", "sum |Re| over Re < 0, over sum |.|: share of what the head would erase"),
    "copying": ("1, in [-1, 1]", "sum Re / sum |.| of OV's eigenvalues: 1 copies, -1 erases"),
    "complex_share": ("1, in [0, 1]", "sum |Im| / sum |.|: share of what the head turns"),
    "most_negative": ("1 / (1 / s)", "least real part, where below 0"),
    "most_positive": ("1 / (1 / s)", "largest real part, where above 0"),
    "trace": ("1 / (1 / s)", "tr OV = sum of eigenvalues"),
    "trace_z": ("standard deviations", "tr OV sqrt(d) / ||OV||_F: against Haar orientation of reads to writes"),
    "kept": ("1 (factor), >= 0", "min |1 + eigenvalue / s|: what the head leaves of the direction that it clears best"),
    "strength": ("weights", "||OV||_F, 0 of a head that reads or writes nothing"),
    "token_copying": ("1, in [-1, 1]", "sum Re / sum |.| of the eigenvalues of W_U OV W_E"),
    "token_negative_share": ("1, in [0, 1]", "sum |Re| over Re < 0, over sum |.|, of W_U OV W_E"),
}


@final
@dataclass(frozen=True)
class HeadErasers(Question[Stream]):
    """Eigenvalues of every head's OV circuit, in the stream and between tokens.

    ``OV = W_O W_V`` has the eigenvalues of the (k, k) matrix ``W_V W_O`` and d - k zeros. A direction with eigenvalue
    ``l`` that a head attends to at its own position becomes ``1 + l/s`` times itself: positive real parts copy,
    negative ones erase, -1 clears, imaginary parts turn. In token space ``W_U W_O W_V W_E`` (tokens by tokens) has the
    eigenvalues of ``W_V (W_E W_U) W_O``, again (k, k).

    Nulls: ``trace_z`` keeps OV's singular values and turns reads against writes at random, so that tr OV has mean 0 and
    variance ``||OV||_F^2 / d``. For the shares, which no closed form gives, ``stamp["null"]`` has mean and standard
    deviation over seeded heads with independent Gaussian maps (in token space between the model's own embeddings); they
    do not depend on the size of the maps.

    An eigenvalue, or a part of one, that rounding of the stored weights can make 0 is 0. So a head whose OV is
    nilpotent has eigenvalues 0 alone: it keeps every direction, and its shares are undefined, as are those of a head
    that reads or writes nothing.

    Invariant under re-basing of heads and, with RMSNorm folded, under rotation of the stream. The signs say what a head
    does to what it attends to; where it attends is not in these figures.

    Attributes:
        scalar: the norm scalar s that ``kept`` assumes, in [1e-60, 1e60].
        draws: how many random heads in the null, >= 2.
        seed: seed of the draws.

    Reference: Elhage et al. 2021 (copying from the eigenvalues of ``W_U OV W_E``).
    """

    question: ClassVar[str] = "head_erasers"
    scalar: float = 1.0
    draws: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        Convention(self.scalar)  # refuses what is out of range
        if self.draws < 2:
            raise UsageError(f"{self.draws} draws", expected="at least 2", do="pass for example draws=100")

    def __call__(self, stream: Stream, progress: Progress = silent) -> Record:
        """Decompose every head.

        Args:
            stream: the model.
            progress: called with (layers done, layers in all).

        Returns:
            A Record over ``head``. The token columns are there where the checkpoint holds both embeddings.

        Raises:
            UsageError: the checkpoint holds no attention head.
        """
        groups, tokens = stream.groups.readers("V"), token_circuit(stream)
        blocks: list[dict[str, Tensor]] = []
        for group in groups:
            value = stream.read("V", group).maps.to(accumulate).repeat_interleave(group.shared("V"), 0)
            blocks.append(self._values(value, stream.write(group).to(accumulate), tokens, stored_eps(stream)))
            progress(len(blocks), len(groups))
        return stream.record(
            self,
            (Axis("head", tuple(str(head.label) for head in stream.heads)),),
            (Column(name, torch.cat([block[name] for block in blocks]), *_COLUMNS[name]) for name in blocks[0]),
            gauge="circuits: free of heads' inner bases",
            norm_scalar=self.scalar,
            attention="to itself = 1",
            null=self._null(groups[0].width, stream.d_model, tokens),
        )

    def _values(self, value: Tensor, out: Tensor, tokens: Tensor | None, stored: float) -> dict[str, Tensor]:
        """All columns, of heads ``W_V`` (m, k, d) and ``W_O`` (m, d, k)."""
        eigenvalues = _eigenvalues(value, out, stored)
        real, shares = eigenvalues.real, _shares(eigenvalues)
        reads, writes = value @ value.mT, out.mT @ out
        sizes = torch.linalg.matrix_norm(reads) * torch.linalg.matrix_norm(writes)
        ov = beyond_rounding((reads * writes).sum((1, 2)), sizes).clamp(min=0).sqrt()
        trace = eigenvalues.real.sum(1)
        least, most, none = real.amin(1), real.amax(1), float("nan")
        columns = {
            "negative_share": shares["negative_share"],
            "copying": shares["copying"],
            "complex_share": eigenvalues.imag.abs().sum(1) / eigenvalues.abs().sum(1),
            "most_negative": torch.where(least < 0, least, none),
            "most_positive": torch.where(most > 0, most, none),
            "trace": trace,
            "trace_z": trace * out.shape[1] ** 0.5 / ov,
            "strength": ov,
            "kept": (1 + eigenvalues / self.scalar).abs().amin(1),
        }
        if tokens is not None:
            between = _shares(_eigenvalues(value, tokens @ out, stored))
            columns |= {"token_copying": between["copying"], "token_negative_share": between["negative_share"]}
        return columns

    def _null(self, k: int, d: int, tokens: Tensor | None) -> dict[str, Any]:
        """Mean and deviation of the shares of random heads."""
        heads = list(self._random_heads(k, d, tokens))
        null: dict[str, Any] = {"draws": self.draws}
        for name in heads[0]:
            values = torch.stack([shares[name] for shares in heads])
            null[name] = {"mean": float(values.mean()), "std": float(values.std())}
        return null

    def _random_heads(self, k: int, d: int, tokens: Tensor | None) -> Iterator[dict[str, Tensor]]:
        generator = random_generator(self.seed)
        for _ in range(self.draws):
            value = torch.randn(k, d, generator=generator, dtype=accumulate)
            out = torch.randn(d, k, generator=generator, dtype=accumulate)
            shares = _shares(eigen(value @ out))
            if tokens is not None:
                between = _shares(eigen(value @ tokens @ out))
                shares |= {f"token_{name}": share for name, share in between.items()}
            yield shares


def token_circuit(stream: Stream) -> Tensor | None:
    """``W_E W_U``, (d, d) float64: through which the eigenvalues of tokens-by-tokens circuits are taken.

    ``W_E`` (d, tokens) writes embeddings, ``W_U`` (tokens, d) reads them with the final norm folded as the stream says;
    their product is summed over chunks of tokens. None where a partial checkpoint lacks one of them, or where logits
    are of other tokens than those that can be read.

    ``W_U A W_E`` and ``A W_E W_U`` have the same eigenvalues but zeros, for any A on the stream.
    """
    try:
        embed, unembed = stream.write("embed")[0], stream.read("unembed").maps[0]
    except MissingTensorError:
        return None
    if embed.shape[1] != len(unembed):
        return None
    step = max(1, WORKSPACE_BYTES // (8 * stream.d_model))
    circuit = torch.zeros(stream.d_model, stream.d_model, dtype=accumulate)
    for start in range(0, embed.shape[1], step):
        tokens = slice(start, start + step)
        circuit.addmm_(embed[:, tokens].to(accumulate), unembed[tokens].to(accumulate))
    return circuit


def _eigenvalues(value: Tensor, out: Tensor, stored: float) -> Tensor:
    """Of every head's ``value @ out``, (m, k)."""
    maps = zip(value, out, strict=True)
    return torch.stack(list(side_by_side(lambda pair: product_eigen(*pair, stored), maps)))


def _shares(values: Tensor) -> dict[str, Tensor]:
    """Shares of eigenvalues (..., k): NaN where all are 0."""
    total, real = values.abs().sum(-1), values.real
    return {"negative_share": real.clamp(max=0).abs().sum(-1) / total, "copying": real.sum(-1) / total}
