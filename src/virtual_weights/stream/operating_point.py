"""What one prompt fixes in a model so that every block of it is linear, and how that is kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from virtual_weights.errors import RecordError, UsageError
from virtual_weights.stream.stream import Stream
from virtual_weights.stream.tensor_file import identity, read_tensors, write_tensors

FORMAT = "virtual-weights operating point 4"

_NONE = torch.empty(0)


@final
@dataclass(frozen=True, eq=False, repr=False)
class OperatingPoint:
    """One prompt's norm scalars, attention patterns and gates: with these fixed every block is linear and exact.

    Attributes:
        fingerprint: of the checkpoint that ran (``stream.source.fingerprint``).
        tokens: (T,) token ids.
        scalars: norm scalars > 0, (T,) each: of every group that reads by its id, ``"L3.attn"``, ``"L3.mlp"`` (both in
            a parallel block too, where both norms see the same state) and ``"unembed"``; where a branch has such norms,
            ``"L3.attn.after"`` of what it gives, ``"L3.attn.inner"`` of its inner activations, and ``"L3.attn.Q"`` and
            ``.K`` (T, heads or shared heads) of queries and keys.
        patterns: attention's group to (heads, T, T) probabilities, ``[head, query token, key token]``.
        gates: MLP's group to (T, d_mlp), the factor by which a neuron's pre-activation, constants included, becomes its
            activation. Gated MLP: ``act(gate)``, on the up pre-activation. Ungated: ``act(pre) / pre``, and where
            ``pre`` is 0 exactly the limit ``act'(0)`` (``gate_factor`` computes it).

    Raises:
        RecordError: shapes disagree about T, or a value is not finite, or a scalar is not positive.
    """

    fingerprint: str
    tokens: Tensor
    scalars: Mapping[str, Tensor]
    patterns: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"OperatingPoint of {len(self.tokens)} tokens"

    def __post_init__(self) -> None:
        n = len(self.tokens) if self.tokens.ndim == 1 else -1
        wrong = [] if n > 0 and not self.tokens.is_floating_point() else ["tokens"]
        wrong += [site for site, s in self.scalars.items() if s.shape[:1] != (n,) or not bool((s > 0).all())]
        wrong += [f"pattern {group}" for group, p in self.patterns.items() if p.ndim != 3 or p.shape[1:] != (n, n)]
        wrong += [f"gates {group}" for group, g in self.gates.items() if g.ndim != 2 or len(g) != n]
        floats = [*self.scalars.values(), *self.patterns.values(), *self.gates.values()]
        if wrong or not all(bool(x.isfinite().all()) for x in floats):
            raise RecordError(
                f"this operating point is malformed: {', '.join(wrong[:4]) or 'a value that is not finite'}",
                expected="T token ids, scalars (T,) > 0, patterns (heads, T, T), gates (T, d_mlp), all finite",
                do="make it anew from a run of the model",
            )

    def check(self, stream: Stream) -> None:
        """Make sure that this point belongs to a model and is complete for it.

        Raises:
            UsageError: it was made with another checkpoint, or the stream leaves norm gains out.
            RecordError: a site, pattern or gate is missing or has another width.
        """
        if self.fingerprint != stream.source.fingerprint or not stream.folded:
            raise UsageError(
                "this operating point belongs to another checkpoint"
                if stream.folded
                else "an operating point is exact only where readers contain the norm's gain",
                expected=f"fingerprint {self.fingerprint[:12]}..., norm gains folded",
                do="open the checkpoint that ran, without fold=False, or run this one",
            )
        groups = stream.groups
        missing = {site for group in groups if group.ports for site in group.sites} - self.scalars.keys()
        missing |= {f"pattern {g.id}" for g in groups.heads if len(self.patterns.get(g.id, ())) != len(g.components)}
        missing |= {f"gates {g.id}" for g in groups.mlps if self.gates.get(g.id, _NONE).shape[-1] != g.width}
        if missing:
            raise RecordError(
                f"this operating point lacks {', '.join(sorted(missing)[:4])}, or has it in another width",
                expected=f"norm scalars, patterns and gates of all {len(groups.all)} groups",
                do="make it anew from a run of the model",
            )

    def only(self, token: int) -> OperatingPoint:
        """This point with one token left, attending to itself by its own share of attention (not renormalised)."""
        n = len(self.tokens)
        if not -n <= token < n:
            raise UsageError(f"no token {token}", expected=f"a place in a prompt of {n}", do="count from 0 or from -1")
        row = slice(token % n, token % n + 1)
        return replace(
            self,
            tokens=self.tokens[row],
            scalars={group: s[row] for group, s in self.scalars.items()},
            patterns={group: p[:, row, row] for group, p in self.patterns.items()},
            gates={group: g[row] for group, g in self.gates.items()},
        )

    @property
    def identity(self) -> str:
        """A hex sha256 of everything in it, for stamps."""
        return identity(self._tensors(), self.fingerprint)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; its metadata hold the format and the model's fingerprint.

        Raises:
            UsageError: the file's folder does not exist.
        """
        write_tensors(path, FORMAT, self._tensors(), {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path, stream: Stream | None = None) -> OperatingPoint:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            stream: the model that it must belong to, see ``check``.

        Raises:
            RecordError: the file is not there, or is no complete operating point.
            UsageError: it belongs to another checkpoint.
        """

        def make(parts: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> OperatingPoint:
            tokens, scalars = parts.pop("tokens")[""], parts.pop("scalars", {})
            point = cls(metadata["fingerprint"], tokens, scalars, parts.pop("patterns", {}), parts.pop("gates", {}))
            if parts:
                raise ValueError(f"tensors of {', '.join(sorted(parts))}")
            return point

        point = read_tensors(path, FORMAT, make, "operating point")
        if stream is not None:
            point.check(stream)
        return point

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"tokens": self.tokens}
        for kind, mapping in (("scalars", self.scalars), ("patterns", self.patterns), ("gates", self.gates)):
            tensors |= {f"{kind}/{group}": tensor for group, tensor in mapping.items()}
        return tensors


def gate_factor(activation: torch.nn.Module, pre: Tensor) -> Tensor:
    """``act(pre) / pre`` of an ungated MLP, and the slope ``act'(0)`` where ``pre`` is 0 exactly (act(0) = 0).

    Args:
        activation: the nonlinearity.
        pre: pre-activations, constants included, any shape.
    """
    origin = torch.zeros((), dtype=pre.dtype, device=pre.device, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(activation(origin), origin)
    safe = torch.where(pre == 0, 1.0, pre)
    return torch.where(pre == 0, slope, activation(safe) / safe).detach()
