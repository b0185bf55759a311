"""What ``stream["..."]`` gives: a head, an MLP or a neuron, as linear maps on the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Dense, LinearMap


@dataclass(frozen=True, eq=False, repr=False)
class Head:
    """One attention head.

    Attributes:
        label: its name.
        q, k, v: effective read maps, shape (d_head, d_model), the norm folded as the stream says.
        o: its write map, shape (d_model, d_head).
        q_constant, k_constant, v_constant: what the reads receive whatever the stream holds,
            shape (d_head,), None where nothing.
        kv_group: name of the key/value group it shares, None where it shares none.
        rotate: from an offset to the rotary matrix (d_head, d_head), orthogonal; None without rotary embedding.
    """

    label: str
    q: LinearMap
    k: LinearMap
    v: LinearMap
    o: LinearMap
    q_constant: Tensor | None
    k_constant: Tensor | None
    v_constant: Tensor | None
    kv_group: str | None
    rotate: Callable[[int], Tensor | None] | None

    def __repr__(self) -> str:
        shared = f", key/value group {self.kv_group}" if self.kv_group else ""
        return (
            f"Head {self.label}: width {self.q.shape[0]} on a stream of {self.q.shape[1]}{shared}; .q .k .v .o .qk .ov"
        )

    @property
    def ov(self) -> LinearMap:
        """OV circuit ``W_O W_V``, shape (d_model, d_model), rank <= d_head."""
        return self.o @ self.v

    @property
    def qk(self) -> LinearMap:
        """QK circuit ``W_Q^T W_K`` at rotary offset 0, shape (d_model, d_model): score = x_q^T QK x_k / (s_q s_k)."""
        return self.q.T @ self.k

    def qk_at(self, offset: int) -> LinearMap:
        """QK circuit ``W_Q^T Rot(offset)^T W_K`` for a key ``offset`` tokens before the query.

        Without rotary embedding the offset changes nothing.
        """
        turn = self.rotate(offset) if self.rotate and offset else None
        return self.qk if turn is None else self.q.T @ Dense(turn.to(self.q.dtype)).T @ self.k

    def circuit(self, port: str, offset: int = 0) -> LinearMap:
        """The circuit through which a port reads, stream to stream: Q ``QK^T``, K ``QK``, V ``OV``."""
        if port == "Q":
            return self.qk_at(offset).T
        if port == "K":
            return self.qk_at(offset)
        if port == "V":
            return self.ov
        raise UsageError(
            f"{self.label} has no reading port {port!r}",
            expected="Q, K or V",
            do="write for example " + self.label + ".K",
        )


@dataclass(frozen=True, eq=False, repr=False)
class Mlp:
    """One MLP: readers ``up`` (and ``gate``), writer ``out``; every neuron is a row and a column.

    Attributes:
        label: its name.
        up: effective read map, shape (d_mlp, d_model); the only one where the MLP is not gated.
        gate: effective map of the gate, shape (d_mlp, d_model), None where not gated.
        out: write map, shape (d_model, d_mlp).
        up_constant, gate_constant: shape (d_mlp,), None where nothing.
    """

    label: str
    up: LinearMap
    gate: LinearMap | None
    out: LinearMap
    up_constant: Tensor | None
    gate_constant: Tensor | None

    def __repr__(self) -> str:
        gate = ".gate " if self.gate is not None else ""
        neurons = f"{self.up.shape[0]} neuron{'' if self.up.shape[0] == 1 else 's'}"
        return f"Mlp {self.label}: {neurons} on a stream of {self.up.shape[1]}; .up {gate}.out"

    def reader(self, port: str) -> LinearMap:
        """The read map of a port: ``in`` or ``up``, and ``gate`` where the MLP is gated."""
        if port == "up" or (port == "in" and self.gate is None):
            return self.up
        if port == "gate" and self.gate is not None:
            return self.gate
        expected = "gate or up" if self.gate is not None else "in"
        raise UsageError(f"{self.label} has no reading port {port!r}", expected=expected, do="name one of these")


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """Features of an attached dictionary: their encoder reads, their decoder writes.

    Attributes:
        label: its name.
        enc: effective encoder rows, shape (features, d_model); None where no state is read.
        enc_constant: shape (features,), None where nothing.
        dec: decoder columns, shape (d_model, features); None where nothing is written.
    """

    label: str
    enc: LinearMap | None
    enc_constant: Tensor | None
    dec: LinearMap | None

    def __repr__(self) -> str:
        size = next(map_.shape[axis] for map_, axis in ((self.enc, 0), (self.dec, 1)) if map_ is not None)
        ports = " ".join(f".{name}" for name in ("enc", "dec") if getattr(self, name) is not None)
        return f"Features {self.label}: {size} of an attached dictionary; {ports}"

    def map(self, port: str) -> LinearMap:
        """``"enc"`` or ``"dec"``."""
        linear_map = {"enc": self.enc, "dec": self.dec}.get(port)
        if linear_map is None:
            raise UsageError(
                f"{self.label} has no {port}",
                expected="enc of what reads a state, dec of what adds to one",
                do="name the other",
            )
        return linear_map
