"""Which features are active together on a text, and how strongly: sparse averages, kept apart from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record.axes import one_line
from virtual_weights.stream.provenance import fingerprint_of
from virtual_weights.stream.stream import Stream
from virtual_weights.stream.tensor_file import identity, read_tensors, write_tensors

FORMAT = "virtual-weights coactivations 1"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Coactivations:
    """Averages over the tokens of a run of the features of attached dictionaries.

    Of a source i and a target j that reads later, with the norm scalar s through which the target reads::

        product = E[a_i a_j / s]     gated = E[1(a_j > 0) a_i / s]     together = tokens with a_i and a_j other than 0

    for all pairs that are active together at least once; all others are 0. Where a norm stands behind the part that a
    source stands for, a_i is over its scalar too. They are taken once, and weigh any virtual weight of these
    dictionaries later.

    Attributes:
        fingerprint: of the stream that ran, dictionaries included.
        tokens: how many were averaged over.
        text: what they are, in words.
        active: dictionary to (F,) int64, tokens at which a feature is not 0.
        mean: dictionary to (F,) float64, ``E[a]``.
        pairs: ``"source>target"`` to (n, 2) int32, the features that were active together, in ascending order.
        product, gated: the same to (n,) float64.
        together: the same to (n,) int64.
    """

    fingerprint: str
    tokens: int
    text: str
    active: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    pairs: Mapping[str, Tensor]
    product: Mapping[str, Tensor]
    gated: Mapping[str, Tensor]
    together: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        keys = {frozenset(part) for part in (self.pairs, self.product, self.gated, self.together)}
        lengths = all(len(self.pairs[key]) == len(self.product[key]) == len(self.gated[key]) for key in self.pairs)
        finite = all(bool(x.isfinite().all()) for x in (*self.mean.values(), *self.product.values()))
        if len(keys) != 1 or not lengths or not finite or self.tokens < 1:
            raise RecordError(
                "these coactivations are malformed",
                expected="finite averages of every pair of dictionaries",
                do="run vweights features anew",
            )

    def __repr__(self) -> str:
        count = sum(map(len, self.pairs.values()))
        return one_line(f"Coactivations of {count} pairs of features on {self.tokens} tokens: {self.text}")

    @property
    def identity(self) -> str:
        """A hex sha256 of everything in it, for stamps."""
        return identity(self._tensors(), f"{self.fingerprint} {self.tokens}")

    def joined(self, other: Coactivations, text: str) -> Coactivations:
        """Averages over the tokens of two runs of the same stream.

        Raises:
            UsageError: they are of different ones.
        """
        if self.fingerprint != other.fingerprint:
            raise UsageError(
                "averages of two different streams",
                expected="two runs of one model with the same dictionaries",
                do="join what belongs together",
            )
        tokens = self.tokens + other.tokens
        share = self.tokens / tokens, other.tokens / tokens
        pairs, product, gated, together = (dict[str, Tensor]() for _ in range(4))
        for key in self.pairs:
            both, place = torch.cat([self.pairs[key], other.pairs[key]]).unique(dim=0, return_inverse=True)
            first, second = place[: len(self.pairs[key])], place[len(self.pairs[key]) :]
            pairs[key] = both
            for name, total in (("product", product), ("gated", gated)):
                sums = torch.zeros(len(both), dtype=torch.float64)
                sums.index_add_(0, first, getattr(self, name)[key] * share[0])
                total[key] = sums.index_add_(0, second, getattr(other, name)[key] * share[1])
            counts = torch.zeros(len(both), dtype=torch.int64).index_add_(0, first, self.together[key])
            together[key] = counts.index_add_(0, second, other.together[key])
        active = {name: count + other.active[name] for name, count in self.active.items()}
        mean = {name: x * share[0] + other.mean[name] * share[1] for name, x in self.mean.items()}
        return Coactivations(self.fingerprint, tokens, text, active, mean, pairs, product, gated, together)

    def check(self, stream: Stream) -> None:
        """Make sure that these belong to a model with its dictionaries.

        Raises:
            UsageError: they were made with others.
        """
        if self.fingerprint != fingerprint_of(stream):
            raise UsageError(
                "these coactivations belong to another model, or to other dictionaries",
                expected=f"fingerprint {self.fingerprint[:12]}...",
                do="open the model that ran and attach the same dictionaries by the same names",
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            UsageError: the file's folder does not exist.
        """
        metadata = {"fingerprint": self.fingerprint, "tokens": str(self.tokens), "text": self.text}
        write_tensors(path, FORMAT, self._tensors(), metadata)

    @classmethod
    def load(cls, path: str | Path, stream: Stream | None = None) -> Coactivations:
        """Read what ``save`` wrote; arguments and errors as of ``Moments.load``."""

        def make(parts: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> Coactivations:
            kinds = ("active", "mean", "pairs", "product", "gated", "together")
            mappings = {name: parts.pop(name, {}) for name in kinds}
            if parts:
                raise ValueError(f"tensors of {', '.join(sorted(parts))}")
            return cls(metadata["fingerprint"], int(metadata["tokens"]), metadata["text"], **mappings)

        coactivations = read_tensors(path, FORMAT, make, "coactivations")
        if stream is not None:
            coactivations.check(stream)
        return coactivations

    def _tensors(self) -> dict[str, Tensor]:
        kinds = ("active", "mean", "pairs", "product", "gated", "together")
        mappings: dict[str, Mapping[str, Tensor]] = {kind: getattr(self, kind) for kind in kinds}
        return {f"{kind}/{key}": tensor for kind, values in mappings.items() for key, tensor in values.items()}


def expected_attribution(weights: Tensor, gated: Tensor) -> Tensor:
    """ERA, ``E[1(a_j > 0) a_i / s] V_ij``: what a source adds to a target while the target is active, on average.

    Args:
        weights: virtual weights V.
        gated: ``E[1(a_j > 0) a_i / s]``, same shape.

    Reference: Ameisen et al. 2025, "Circuit Tracing", Global Weights; s, which they leave out, is the scalar of the
    norm through which the target reads. An inhibited target is off, so inhibition does not show.
    """
    return weights * gated


def target_weighted_attribution(weights: Tensor, product: Tensor, mean: Tensor, least: float = 0.0) -> Tensor:
    """TWERA, ``E[a_j a_i / s] / E[a_j] V_ij``: the same with tokens weighted by the target's activation.

    Args:
        weights: virtual weights V.
        product: ``E[a_j a_i / s]``, same shape.
        mean: ``E[a_j]`` of the target, broadcasting against them.
        least: where ``E[a_j]`` is less, it is divided by this instead. Of a target that is almost never active the
            average is over a few tokens, and without a least value such targets lead every list.

    Returns:
        0 of pairs that are never active together, NaN where the mean is not above 0.

    Reference: as of :func:`expected_attribution`.
    """
    mean = mean.clamp(min=least) if least else mean
    weighted = torch.where(mean > 0, weights * product / mean, torch.nan)
    return torch.where(product != 0, weighted, 0.0)
