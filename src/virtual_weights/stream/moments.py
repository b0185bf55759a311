"""What a model's activations are on average over text, and how that is kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record.axes import one_line
from virtual_weights.stream.stream import Stream
from virtual_weights.stream.tensor_file import identity, read_tensors, write_tensors

FORMAT = "virtual-weights moments 4"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Moments:
    """Averages over the tokens of a text: what writers put on the stream as seen from each state, what ports receive.

    E is the mean over all tokens, padding never among them; s_p is the norm scalar with which state p is read. Values
    are kept by the id of a group: ``"L3.attn"`` (m = heads, inner activation z of width k = d_head), or ``"L3.mlp"``,
    ``"embed"``, ``"pos"`` (m = 1, their output in the stream, k = d, the MLP's bias apart). A group that first appears
    in state w is held for P states: all from w on, or, factorised, for w alone. Elsewhere it is then proportional,
    ``E[z z^T/s_p^2] ~ E[z z^T/s_w^2] E[|O z|^2/s_p^2] / E[|O z|^2/s_w^2]``: exact in the energy written, not in its
    directions; ``held`` says which of these. Every token is weighted by 1/s^2, so the few with huge norms do not drown
    the text.

    Attributes:
        fingerprint: of the checkpoint that ran.
        tokens: how many were averaged over.
        length: of the longest chunk.
        text: what the tokens are, in words; no part of the identity.
        states: ``norm`` E[s_p], ``inverse`` E[1/s_p], ``inverse_square`` E[1/s_p^2]; ``variance`` and ``kurtosis`` of
            a token's d entries, averaged over tokens (a Gaussian's kurtosis is 3); each (states,).
        second: group to (P, m, k, k), ``E[z z^T/s_p^2]``, uncentred.
        mean: group to (P, m, k), ``E[z/s_p]``.
        energy: group to (states from w on, m), ``E[|O z|^2/s_p^2]``, always at every state.
        ports: ``"L3.attn.Q"``, ``.K``, ``.V`` to (heads or shared heads, k, k), ``E[q q^T]`` before rotary, of queries
            and keys as read maps give them, behind a norm on them.
        port_means: the same to (heads, k), ``E[q]``.
        port_scales: where queries and keys have a norm, ``"L3.attn.Q"`` to (heads or shared heads, 2), E[1/s] and
            E[1/s^2] of its scalar.
        attention: group to (heads, 3), mean attention to self, previous and first token, of all tokens but the first.
        neurons: group to (3, d_mlp), mean, mean square and share above 0 of the activations that the MLP writes with.

    Raises:
        RecordError: a value is not finite, or shapes disagree.
    """

    fingerprint: str
    tokens: int
    length: int
    states: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    energy: Mapping[str, Tensor]
    ports: Mapping[str, Tensor]
    port_means: Mapping[str, Tensor]
    attention: Mapping[str, Tensor]
    neurons: Mapping[str, Tensor]
    port_scales: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    text: str = ""

    def __repr__(self) -> str:
        return one_line(f"Moments of {self.tokens} tokens in chunks of {self.length}: {self.text}")

    def __post_init__(self) -> None:
        wrong = [name for name, x in self._tensors().items() if not bool(x.isfinite().all())]
        pairs = [(self.second, self.mean), (self.ports, self.port_means)]
        wrong += [key for a, b in pairs for key in a.keys() | b.keys() if not _fit(a.get(key), b.get(key))]
        wrong += [key for key in self.second if key not in self.energy]
        if wrong or self.tokens < 1:
            raise RecordError(
                f"these moments are malformed: {', '.join(wrong[:4]) or 'no tokens'}",
                expected="finite values, a mean beside every second moment",
                do="observe the model anew",
            )

    def held_at(self, group: str, after: int) -> tuple[Tensor, Tensor]:
        """``E[z z^T/s^2]`` (m, k, k) and ``E[z/s]`` (m, k) in float64, ``after`` states past where z first appears."""
        exact = after < len(self.second[group])
        second, mean = (held[group][after if exact else 0].double() for held in (self.second, self.mean))
        if exact:
            return second, mean
        first, energy = (self.energy[group][state].double() for state in (0, after))
        ratio = torch.where(first > 0, energy / first, 0.0)
        return second * ratio[:, None, None], mean * ratio.sqrt()[:, None]

    @property
    def held(self) -> dict[str, str]:
        """How each kind of writer is held: ``"exact"`` at every reading state, ``"factorised"``, ``"energy alone"``."""
        found: dict[str, set[str]] = {kind: set() for kind in ("heads", "MLPs", "embeddings")}
        for group, energy in self.energy.items():
            states = len(self.second[group]) if group in self.second else 0
            form = "exact" if states == len(energy) else "factorised" if states else "energy alone"
            found[_KINDS.get(group.rpartition(".")[2], "embeddings")].add(form)
        return {kind: min(forms, key=_FORMS.index) for kind, forms in found.items() if forms}

    def check(self, stream: Stream) -> None:
        """Make sure that these moments belong to a model.

        Raises:
            UsageError: they were made with another checkpoint, or the stream leaves norm gains out.
        """
        if self.fingerprint != stream.source.fingerprint or not stream.folded:
            raise UsageError(
                "these moments belong to another checkpoint"
                if stream.folded
                else "moments are divided by the norm scalar: readers must contain the norm's gain",
                expected=f"fingerprint {self.fingerprint[:12]}..., norm gains folded",
                do="open the checkpoint that ran, without fold=False, or observe this one",
            )

    @property
    def identity(self) -> str:
        """A hex sha256 of everything in it, for stamps."""
        return identity(self._tensors(), f"{self.fingerprint} {self.tokens} {self.length}")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; its metadata hold the format and the model's fingerprint.

        Raises:
            UsageError: the file's folder does not exist.
        """
        metadata = {
            "fingerprint": self.fingerprint,
            "tokens": str(self.tokens),
            "length": str(self.length),
            "text": self.text,
        }
        write_tensors(path, FORMAT, self._tensors(), metadata)

    @classmethod
    def load(cls, path: str | Path, stream: Stream | None = None) -> Moments:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            stream: the model that it must belong to, see ``check``.

        Raises:
            RecordError: the file is not there, or holds no complete moments.
            UsageError: it belongs to another checkpoint.
        """

        def make(parts: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> Moments:
            mappings = {name: parts.pop(name, {}) for name in _MAPPINGS}
            if parts:
                raise ValueError(f"tensors of {', '.join(sorted(parts))}")
            return cls(
                metadata["fingerprint"],
                int(metadata["tokens"]),
                int(metadata["length"]),
                text=metadata["text"],
                **mappings,
            )

        moments = read_tensors(path, FORMAT, make, "moments")
        if stream is not None:
            moments.check(stream)
        return moments

    def _tensors(self) -> dict[str, Tensor]:
        mappings: dict[str, Mapping[str, Tensor]] = {name: getattr(self, name) for name in _MAPPINGS}
        return {f"{kind}/{key}": tensor for kind, values in mappings.items() for key, tensor in values.items()}


_MAPPINGS = tuple(f.name for f in fields(Moments) if f.name not in ("fingerprint", "tokens", "length", "text"))


_KINDS = {"attn": "heads", "mlp": "MLPs"}
_FORMS = ("energy alone", "factorised", "exact")


def _fit(second: Any, mean: Any) -> bool:
    """Whether there are both, and of one shape but for the last axis."""
    return second is not None and mean is not None and second.shape[:-1] == mean.shape
