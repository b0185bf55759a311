"""What a model is, free of any format's vocabulary: branches on a residual stream, each with its part and its norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, final


@final
@dataclass(frozen=True)
class Norm:
    """A norm: of ``x`` it gives ``gamma (P x) / s + beta``.

    For rms ``P = I`` and ``s = sqrt(mean(x^2) + eps)``; for layer ``P = I - 11^T/d`` and ``s = sqrt(var(x) + eps)``.
    Whether it has a gain and a shift is said by the tensors that play these roles.

    Attributes:
        kind: ``"rms"`` or ``"layer"``.
        eps: what is added under the root.
        plus: what is added to the stored gain: 1 where a gain of 1 is stored as 0.
    """

    kind: Literal["rms", "layer"]
    eps: float
    plus: float = 0.0


@final
@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding.

    Attributes:
        dim: how many of a head's dimensions turn (the first ones); the rest stay.
        base: theta of the frequencies ``base^(-2i/dim)``.
        scaling: ``{}``, or ``rope_type`` (linear, dynamic, llama3, yarn or longrope) and its parameters.
        planes: which two dimensions turn together: ``"halves"`` (i, i + dim/2) or ``"pairs"`` (2i, 2i + 1).
        apart: how far the two halves of a plane are apart, where that is not dim/2: a format that stores pairs,
            undone by its layout, puts the two of each d_head/2 apart even where few turn.
        backwards: whether angles are negative.
        factor: on what turns, of queries and keys each, where not all of a head does (else it is in the scale).
        longest: how many tokens a text may have for these frequencies to hold; None for any.
    """

    dim: int
    base: float
    scaling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    planes: Literal["halves", "pairs"] = "halves"
    apart: int | None = None
    backwards: bool = False
    factor: float = 1.0
    longest: int | None = None


@final
@dataclass(frozen=True)
class PortNorm:
    """A norm on queries and keys, inside the heads; a scalar per token, and per head or over all heads.

    Attributes:
        norm: the norm.
        over: ``"head"``, or ``"all"`` heads at once.
        after_rotary: whether queries and keys are turned before.
    """

    norm: Norm
    over: Literal["head", "all"]
    after_rotary: bool = False


@final
@dataclass(frozen=True)
class Attention:
    """The part of an attention branch.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads; ``heads / kv_heads`` query heads share one.
        width: inner dimensions of a head, d_head.
        scale: factor on q.k before the softmax.
        rotary: how queries and keys turn; None where they do not.
        port_norm: norm on queries and keys; None where there is none.
        cap: scores pass ``cap tanh(score / cap)``; None where they do not.
        outside: what else decides where a head attends, outside the maps: ``"alibi"``, ``"sinks"``, ``"positions"``
            (shortformer: queries and keys get what their maps give of learned positions; values and stream do not).
    """

    heads: int
    kv_heads: int
    width: int
    scale: float
    rotary: Rotary | None = None
    port_norm: PortNorm | None = None
    cap: float | None = None
    outside: tuple[str, ...] = ()

    @property
    def sharing(self) -> int:
        """How many query heads share one key/value head."""
        return self.heads // self.kv_heads


@final
@dataclass(frozen=True)
class Mlp:
    """The part of an MLP branch.

    Attributes:
        width: neurons, d_mlp.
        activation: name of the nonlinearity, as transformers spells it.
        gated: whether an activated gate multiplies an up projection.
    """

    width: int
    activation: str
    gated: bool


Part = Attention | Mlp


@final
@dataclass(frozen=True)
class Branch:
    """One branch of the stream: it reads a state through a norm, and what its part gives is added to the stream.

    ``x_writes = x_(writes - 1) + factor N_after(O N_inner(z(N_before(x_reads))))``, and what others write there.

    Attributes:
        id: ``"L3.attn"`` or ``"L3.mlp"``; roles of tensors are placed by it.
        part: what works between reading and writing.
        before: the norm through which it reads; None where it reads the stream as it is.
        after: the norm on what the part gives; None where there is none.
        inner: the norm on all its inner activations together, before its output map; None where there is none.
        factor: on what is added to the stream.
        reads: number of the state that it reads.
        writes: number of the state in which what it writes first appears.
    """

    id: str
    part: Part
    before: Norm | None
    after: Norm | None
    inner: Norm | None
    factor: float
    reads: int
    writes: int


@final
@dataclass(frozen=True)
class Embedding:
    """How token embeddings enter the stream: ``factor N(E)``.

    Attributes:
        factor: on every row.
        norm: of every row; None where there is none.
    """

    factor: float = 1.0
    norm: Norm | None = None


@final
@dataclass(frozen=True)
class Head:
    """How logits leave the stream: ``cap tanh(factor (W_U N(x) + b) / cap)``.

    Attributes:
        norm: the last norm; None where there is none.
        factor: on the logits.
        cap: of the logits; None where there is none.
    """

    norm: Norm | None
    factor: float = 1.0
    cap: float | None = None


@final
@dataclass(frozen=True)
class ModelSpec:
    """The sizes and choices of one model.

    Attributes:
        model_type: as transformers names it.
        d_model: width of the stream.
        vocab: tokens; None where only the tensors tell.
        branches: in order of depth.
        embedding: how tokens enter.
        head: how logits leave.
        tied: whether the unembedding is the embedding.
        n_positions: rows of the learned position embedding that serve a position; None without one.
        unnumbered: rows of it before that of the first position.
        outcomes: tokens that logits are of, where they are others than can be read; None where they are the same.
        sinusoidal: positions are computed, not stored: row n is ``(sin(n f_i))_i, (cos(n f_i))_i`` with
            ``f_i = 10000^(-2i/sinusoidal)``; None where they are stored.
    """

    model_type: str
    d_model: int
    vocab: int | None
    branches: tuple[Branch, ...]
    embedding: Embedding
    head: Head
    tied: bool = False
    n_positions: int | None = None
    unnumbered: int = 0
    outcomes: int | None = None
    sinusoidal: int | None = None

    @property
    def n_layers(self) -> int:
        """How many layers the branches are named after."""
        return 1 + max((int(branch.id[1:].partition(".")[0]) for branch in self.branches), default=-1)

    @property
    def states(self) -> int:
        """How many states the stream passes through, the embedding and the last one included."""
        return 1 + max((branch.writes for branch in self.branches), default=0)

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        """What stands before every reader, the unembedding last."""
        return (*(branch.before for branch in self.branches), self.head.norm)

    @property
    def gated(self) -> bool:
        """Whether MLPs have gates."""
        return any(part.gated for part in self.mlps)

    @property
    def centring(self) -> bool:
        """Whether no reader sees the mean over coordinates of the stream: each stands behind a LayerNorm."""
        return all(norm is not None and norm.kind == "layer" for norm in self.norms)

    def branch(self, id: str) -> Branch | None:
        """A branch by its id, None where there is none."""
        return self._by_id.get(id)

    @cached_property
    def _by_id(self) -> Mapping[str, Branch]:
        return {branch.id: branch for branch in self.branches}

    @property
    def attention_ids(self) -> tuple[str, ...]:
        """The ids of the attention branches in order of depth."""
        return tuple(branch.id for branch in self.branches if isinstance(branch.part, Attention))

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention parts in order of depth."""
        return tuple(branch.part for branch in self.branches if isinstance(branch.part, Attention))

    @property
    def mlps(self) -> tuple[Mlp, ...]:
        """The MLP parts in order of depth."""
        return tuple(branch.part for branch in self.branches if isinstance(branch.part, Mlp))
