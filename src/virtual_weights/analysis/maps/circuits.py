"""What is written into a state of the stream and what is read from it, as thin maps free of heads' inner bases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from virtual_weights.checkpoint.source import STORAGE_DTYPES, TensorInfo
from virtual_weights.errors import UsageError
from virtual_weights.linalg import ROUNDINGS, STORED_ROUNDINGS, WORKSPACE_BYTES, MapStack, accumulate, tolerance
from virtual_weights.linalg.decompose import square_roots
from virtual_weights.record import Axis
from virtual_weights.stream import Group, Stream
from virtual_weights.stream.group import HEAD_PORTS, HeadPort, no_heads

HeadRole = Literal["Q", "K", "V", "O"]


def head_circuits(stream: Stream, role: HeadRole, group: Group) -> Tensor:
    """The heads of one attention by their circuits, as far as the stream can tell them: thin maps with the same Gram.

    A head's ``W_O`` alone depends on its arbitrary inner basis; ``OV = W_O W_V`` does not. Each map ``C`` below has
    ``C^T C`` equal to the circuit's own Gram on the side of the stream (QK at rotary offset 0):

    ====  =====================================  ============================================
    role  thin map                               Gram
    ====  =====================================  ============================================
    Q     ``(W_K W_K^T)^(1/2) W_Q``              ``QK QK^T``, one per query head
    K     ``(sum_h W_Qh W_Qh^T)^(1/2) W_K``      sum of ``QK^T QK`` over the queries it serves
    V     ``(sum_h W_Oh^T W_Oh)^(1/2) W_V``      sum of ``OV^T OV`` over the heads it serves
    O     ``(W_V W_V^T)^(1/2) W_O^T``            ``OV OV^T``, one per query head
    ====  =====================================  ============================================

    Args:
        stream: the model.
        role: ``"Q"``, ``"K"``, ``"V"`` (what is read) or ``"O"`` (what is written).
        group: an attention.

    Returns:
        (m, d_head, d) float64; m counts heads, or key/value heads for K and V. Row spaces, singular values and Grams
        are invariant under re-basing of heads; the rows themselves are not.
    """
    thin, metric = _factors(stream, role, group)
    return square_roots(metric.unflatten(0, (len(thin), -1)).sum(1)) @ thin.to(accumulate)


def writes_into(stream: Stream, state: int) -> Iterator[Tensor]:
    """Everything that first appears in a state, as stacks (m, k, d) of transposed write maps.

    Heads by their OV circuits, an MLP by its neurons, embeddings by tokens or positions, a bias by its one vector.
    """
    for group in _writers_into(stream, state):
        yield head_circuits(stream, "O", group) if group.kind == "head" else stream.write(group).mT


def reads_from(stream: Stream, state: int) -> Iterator[Tensor]:
    """Everything by which a block reads a state, as stacks (m, k, d) of read maps; the unembedding is not a block.

    Queries by head and keys and values by key/value head, each by its circuit; an MLP's gate and up apart.
    """
    for group in stream.groups.sited(state):
        for port in group.ports:
            if port in HEAD_PORTS:
                yield head_circuits(stream, port, group)
            elif port != "unembed":
                yield stream.read(port, group).maps


def unembedding(stream: Stream) -> Tensor | None:
    """The read map of the unembedding, (1, tokens, d); None where a partial checkpoint has none."""
    return stream.read("unembed").maps if "unembed" in stream.groups else None


def last_written(stream: Stream, state: int) -> str:
    """What first appears in a state: ``embed``, ``L3.attn``, ``L3.mlp``, or ``L3`` of a parallel block."""
    groups = _writers_into(stream, state)
    if not groups or groups[0].layer is None:
        return "embed" if groups else ""
    names = {group.id.removesuffix(".bias") for group in groups}
    return f"L{groups[0].layer}" if len(names) > 1 else names.pop()


def rank_cut(stream: Stream) -> float:
    """Below which share of the largest a singular value counts as zero, when it is taken from a Gram matrix.

    ``max(eps(c) d, sqrt(eps(float64) n))``: c is the dtype in which the norm is folded into readers (``stream.dtype``,
    or float64 where all weights are), whose rounding a rank must not count; n is the largest side of any tensor, and
    the root is there because a Gram matrix in float64 squares the singular values.
    """
    longest = max(max(tensor.shape, default=1) for tensor in _tensors(stream))
    return max(tolerance(_computed(stream), (stream.d_model,)), tolerance(accumulate, (longest,)) ** 0.5)


def folded_eps(stream: Stream) -> float:
    """Eps of the dtype in which norms are folded into readers: relative rounding of their entries.

    Stored entries are taken as exact wherever a strength or a rank is asked for.
    """
    return torch.finfo(_computed(stream)).eps


def stored_eps(stream: Stream) -> float:
    """Eps of the least precise dtype in which weights are stored; quantised blocks count as bfloat16.

    What was meant to be 0 (an eigenvalue, a cosine) is in stored weights 0 up to this: it decides signs.
    """
    dtypes = {STORAGE_DTYPES.get(tensor.dtype, torch.bfloat16) for tensor in _tensors(stream)}
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def sign_eps(stream: Stream) -> float:
    """Eps of a product of two maps over the stream, for ``beyond_rounding``, with rounding of stored weights in it."""
    return max(folded_eps(stream), STORED_ROUNDINGS / ROUNDINGS * stored_eps(stream) / stream.d_model**0.5)


def _tensors(stream: Stream) -> list[TensorInfo]:
    return [stream.source.tensors[place.tensor] for place in stream.model.placements.values()]


def _computed(stream: Stream) -> torch.dtype:
    return torch.float64 if all(tensor.dtype == "F64" for tensor in _tensors(stream)) else stream.dtype


def reading_circuits(
    stream: Stream, port: HeadPort, offset: int = 0, groups: Sequence[Group] | None = None
) -> MapStack:
    """Every head's circuit as seen from one port, one map per query head.

    With the outer factor replaced by its metric, ``||A W||_F^2 = tr(W^T (A^T A) W)``:

    ====  ======================  ===========  ==========================
    port  circuit                 thin factor  metric
    ====  ======================  ===========  ==========================
    Q     ``W_K^T Rot W_Q``       ``W_Q``      ``Rot^T W_K W_K^T Rot``
    K     ``W_Q^T Rot^T W_K``     ``W_K``      ``Rot W_Q W_Q^T Rot^T``
    V     ``W_O W_V``             ``W_V``      ``W_O^T W_O``
    ====  ======================  ===========  ==========================

    Args:
        stream: the model.
        port: the reading port.
        offset: rotary offset, for ports Q and K.
        groups: some attentions; None takes all.

    Returns:
        The stack; shared keys and values are held once.

    Raises:
        UsageError: the checkpoint holds no attention head.
    """
    return _stack(stream, port, offset if port != "V" else 0, groups)


def writing_circuits(stream: Stream, groups: Sequence[Group] | None = None) -> MapStack:
    """Every head's OV circuit as a writer: thin factor ``W_O^T``, metric ``W_V W_V^T``; the rest as for readers."""
    return _stack(stream, "O", 0, groups)


def _writers_into(stream: Stream, state: int) -> list[Group]:
    return [group for group in stream.groups.writers if group.first == state]


def _factors(stream: Stream, role: HeadRole, group: Group, turn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The thin maps (m, k, d) of a role, and for every query head the metric (k, k) of the circuit's other side.

    Args:
        stream: the model.
        role: what of a head.
        group: an attention.
        turn: orthogonal (k, k); the metric ``A A^T`` becomes ``turn A A^T turn^T``.
    """

    def maps(side: HeadRole) -> Tensor:
        return stream.write(group).mT if side == "O" else stream.read(side, group).maps

    opposite: dict[HeadRole, HeadRole] = {"Q": "K", "K": "Q", "V": "O", "O": "V"}
    other = maps(opposite[role]).to(accumulate)
    metric = other @ other.mT
    metric = metric if turn is None else turn @ metric @ turn.T
    return maps(role), metric.repeat_interleave(group.shared(opposite[role]), 0)


def _stack(stream: Stream, role: HeadRole, offset: int, groups: Sequence[Group] | None) -> MapStack:
    groups = stream.groups.readers("Q") if groups is None else groups
    outer: Tensor | None = None
    metrics: list[Tensor] = []
    for i, group in enumerate(groups):
        turn = stream.rotation(offset, group) if offset else None
        turn = turn.T if turn is not None and role == "Q" else turn
        thin, metric = _factors(stream, role, group, turn)
        outer = torch.empty((len(groups), *thin.shape), dtype=thin.dtype) if outer is None else outer
        outer[i] = thin  # a copy at once: the stack of a large model is not held twice
        metrics.append(metric)
    assert outer is not None
    index = torch.arange(len(groups) * len(metrics[0])) // groups[0].shared(role)
    return MapStack(outer.flatten(0, 1), index, torch.cat(metrics), head_positions(groups, role))


def head_positions(groups: Sequence[Group], role: HeadRole) -> Tensor:
    """The state that every head of some attentions reads, or in which it first writes."""
    return _positions([group for group in groups for _ in group.components], role)


def _positions(groups: Sequence[Group], role: HeadRole) -> Tensor:
    """The state that each group reads, or in which it first writes."""
    return torch.tensor([group.first if role == "O" else group.reads for group in groups], dtype=torch.int64)


@final
@dataclass(frozen=True, eq=False)
class SubspaceBases:
    """Subspaces of several heads: directions in order of gain, zero where they are cut.

    Attributes:
        basis: (n, k, d) float64, orthonormal rows up to the rank, zero rows after it.
        gains: (n, k), the circuit's singular values, zero after the rank.
        rank: (n,) float64, dimension of each subspace.
    """

    basis: Tensor
    gains: Tensor
    rank: Tensor

    def to(self, device: str) -> SubspaceBases:
        """The same on another device."""
        return SubspaceBases(self.basis.to(device), self.gains.to(device), self.rank.to(device))


def subspace_axis(stream: Stream, name: str, role: HeadRole) -> tuple[Axis, Tensor]:
    """Who has a subspace of this role: all heads, or the first of those that share a key or value.

    Args:
        stream: the model.
        name: of the axis.
        role: what of a head.

    Returns:
        The axis, with labels such as ``"L5H3.K"``; and (n,) the state that each reads, or in which it first writes.
    """
    groups = stream.groups.heads
    labels = tuple(f"{label}.{role}" for group in groups for label in group.labels[:: group.shared(role)])
    shared = tuple(kv_group for group in groups for kv_group in group.kv_groups(role)[:: group.shared(role)])
    return Axis(name, labels, shared), _positions(groups, role).repeat_interleave(heads_per_group(stream, role))


def heads_per_group(stream: Stream, role: HeadRole) -> int:
    """How many subspaces of this role one attention has; UsageError where there is none."""
    if not stream.groups.heads:
        raise no_heads()
    group = stream.groups.heads[0]
    return len(group.components) // group.shared(role)


def subspace_bases(
    stream: Stream, role: HeadRole, groups: Sequence[Group], cut: float, energy: float | None = None
) -> SubspaceBases:
    """Orthonormal bases of what the heads of some attentions read or write in one role, by their circuits.

    Args:
        stream: the model.
        role: what of a head.
        groups: attentions.
        cut: singular values up to this share of the largest are dropped.
        energy: also drop what exceeds this share of the squared singular values.
    """
    bases: list[Tensor] = []
    values: list[Tensor] = []
    for group in groups:
        q, r = torch.linalg.qr(head_circuits(stream, role, group).mT)
        u, s, _ = torch.linalg.svd(r)
        mask = (s > cut * s[:, :1]) & _within(s, energy)
        bases.append((q @ u * mask[:, None, :]).mT)
        values.append(s * mask)
    gains = torch.cat(values)
    return SubspaceBases(torch.cat(bases), gains, (gains > 0).sum(1).double())


def check_energy(energy: float | None) -> None:
    """Refuse what is not a share of the energy."""
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy={energy}", expected="a share in (0, 1]", do="pass e.g. 0.99, or leave it out")


def _within(s: Tensor, energy: float | None) -> Tensor:
    """The fewest leading directions that hold a share of the energy."""
    if energy is None:
        return torch.ones_like(s, dtype=torch.bool)
    share = s.square() / s.square().sum(1, keepdim=True)
    # the slack is the rounding of a cumulative sum, as in Spectrum.energy_rank
    before = share.cumsum(1) - share
    return before < energy * (1 - tolerance(s.dtype, s.shape))


TokenSide = Literal["unembed", "embed"]


def token_rows(stream: Stream) -> dict[TokenSide, Tensor]:
    """Tokens as rows of the unembedding (norm folded) and the embedding, (t, d), as far as the checkpoint has them."""
    rows: dict[TokenSide, Tensor] = {}
    unembed = unembedding(stream)
    if unembed is not None:
        rows["unembed"] = unembed[0]
    if "embed" in stream.groups:
        rows["embed"] = stream.write("embed")[0].T
    return rows


def nearest_tokens(rows: Tensor, sets: Sequence[Sequence[Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """For each basis of each set the tokens of largest ``|cos|`` to its span, in one pass over the tokens.

    Args:
        rows: (t, d), one a token.
        sets: each n times (d, k) float64, orthonormal columns.
        count: how many tokens for each basis.

    Returns:
        For each set cosines (count, n) by descending modulus, signed where k = 1 and >= 0 otherwise, and the tokens'
        ids.
    """
    none = torch.zeros(rows.shape[1], 0, dtype=accumulate)
    columns = [torch.cat([none, *bases], dim=1) for bases in sets]
    best = [
        (torch.zeros(0, len(bases), dtype=accumulate), torch.zeros(0, len(bases), dtype=torch.int64)) for bases in sets
    ]
    step = max(1, WORKSPACE_BYTES // (8 * max(rows.shape[1], *(c.shape[1] for c in columns))))
    for start in range(0, len(rows), step):
        # tokens that are zero after folding have no direction: their cosine is 0
        unit = normalize(rows[start : start + step].to(accumulate), dim=1)
        for i, bases in enumerate(sets):
            cosines = _cosines(unit @ columns[i], [basis.shape[1] for basis in bases])
            nearest = cosines.abs().topk(min(count, len(cosines)), dim=0).indices
            values = torch.cat([best[i][0], cosines.gather(0, nearest)])
            ids = torch.cat([best[i][1], nearest + start])
            order = values.abs().topk(min(count, len(values)), dim=0).indices
            best[i] = values.gather(0, order), ids.gather(0, order)
    return best


def _cosines(along: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cosines (t, n) of unit vectors to subspaces, of their products (t, sum of sizes) with orthonormal bases."""
    cosines = along.new_zeros(len(along), len(sizes))
    for i, part in enumerate(along.split(list(sizes), dim=1) if sizes else ()):
        cosines[:, i] = part[:, 0] if part.shape[1] == 1 else torch.linalg.vector_norm(part, dim=1)
    return cosines
