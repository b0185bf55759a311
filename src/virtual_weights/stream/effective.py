"""Effective maps: how a port reads and a component writes once everything linear around them is folded in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from virtual_weights.architecture import Attention, ModelSpec, Norm
from virtual_weights.errors import MissingTensorError, UsageError
from virtual_weights.stream.group import READINGS, WRITINGS, Group, Port, group_id, ports_of
from virtual_weights.stream.norm import constant, fold, normed, scale, without_mean

if TYPE_CHECKING:
    from virtual_weights.stream.stream import Stream


@dataclass(frozen=True, eq=False)
class Read:
    """The read maps of one port in one layer.

    Attributes:
        maps: shape (m, k, d): m heads of width k (m = 1 for an MLP or the unembedding). Keys and
            values of grouped attention are held once per key/value head.
        constants: shape (m, k), what arrives whatever the stream holds, None where nothing.
        shift: shape (m, k), what a norm on the port adds behind its scalar, None where nothing.
    """

    maps: Tensor
    constants: Tensor | None
    shift: Tensor | None = None


def reader(stream: Stream, port: Port, group: Group | str = "unembed") -> Read:
    """The effective read maps of one port: ``R~ = diag(g) R diag(gamma) (P)`` and ``g (R beta + c)``.

    g is the gain of a norm on queries or keys, 1 where there is none; its scalar is a site of its own, see
    ``port_scale``. The unembedding's are less their mean over tokens: a logit is one less the mean over the
    vocabulary, which no probability sees; not so where logits are capped.

    Args:
        stream: the model.
        port: ``"Q"``, ``"K"``, ``"V"``, ``"gate"``, ``"up"``, ``"in"`` (an ungated MLP) or ``"unembed"``.
        group: what reads, e.g. ``"L3.attn"``.

    Raises:
        MissingTensorError: a partial checkpoint lacks this reader.
        UsageError: the model has no such port.
    """
    if group_id(group) in stream.attached:
        _check_encoder(port, group)
        return stream.attached[group_id(group)].read(stream)
    read = projection(stream, port, group)
    if not stream.folded:
        return read
    if port == "unembed":
        read = as_logits(stream, read)
        if stream.spec.head.cap is not None:
            return read
        maps = without_mean(read.maps, -2)
        return Read(maps, None if read.constants is None else without_mean(read.constants, -1))
    return _inner(stream, read, port, group_id(group)) if port in ("Q", "K") else read


def projection(stream: Stream, port: Port, group: Group | str) -> Read:
    """What a port's own map gives, before any norm on queries and keys, and before any factor on logits."""
    site = group_id(group)
    branch = stream.spec.branch(site)
    ports = ports_of(branch.part) if branch is not None else ("unembed",)
    if port not in ports:
        raise UsageError(f"{site} has no port {port!r}", expected=" and ".join(ports), do="name one of these ports")
    role, norm = READINGS[port], stream.spec.head.norm if branch is None else branch.before
    maps = _needed(stream, role, site)
    bias = stream.weight(f"{role}_bias", site)
    maps, bias = (maps, bias) if maps.ndim == 3 else (maps[None], None if bias is None else bias[None])
    if not stream.folded:
        return Read(maps, bias)
    gain, shift = norm_gain(stream, "norm", site, norm), stream.weight("norm_bias", site)
    return Read(fold(maps, gain, norm, stream.dtype), constant(maps, shift, bias, stream.dtype))


def as_logits(stream: Stream, read: Read) -> Read:
    """What the unembedding's own map gives, as logits before a cap."""
    factor = stream.spec.head.factor if stream.folded else 1.0
    if factor == 1.0:
        return read
    return Read(read.maps * factor, None if read.constants is None else read.constants * factor)


def _inner(stream: Stream, read: Read, port: Port, group: str) -> Read:
    """Read maps of queries or keys with what is linear in a norm on them, and with what scales turning planes."""
    maps = _along(stream, port, group, read.maps)
    constants = None if read.constants is None else _along(stream, port, group, read.constants[..., None])[..., 0]
    return Read(maps, constants, _port_shift(stream, port, group, len(maps)))


def received(stream: Stream, port: Port, group: Group | str, values: Tensor) -> Tensor:
    """Queries or keys (..., m, k) as read maps give them, of what the port's own map gives.

    Of a norm on them: ``g (P) q / s + shift``; where it stands behind rotary without what turning changes in it.
    """
    site = group_id(group)
    inner = _along(stream, port, site, values[..., None])[..., 0] / port_scale(stream, port, site, values)[..., None]
    shift = _port_shift(stream, port, site, values.shape[-2])
    return inner if shift is None else inner + shift.to(inner)


def _along(stream: Stream, port: Port, group: str, columns: Tensor) -> Tensor:
    """Vectors inside heads, (..., m, k, n), through what is linear in their norm and in what scales turning planes."""
    attention = _attention(stream, group)
    norm, weights = attention.port_norm, turning_weights(attention, stream.dtype)
    gain = None if norm is None else _port_gain(stream, port, group, columns.shape[-3])
    if norm is not None and norm.norm.kind == "layer":
        columns = without_mean(columns, -2)
    for factor in (gain, weights):
        columns = columns if factor is None else columns * factor.to(columns.device)[..., None]
    return columns


def _port_shift(stream: Stream, port: Port, group: str, heads: int) -> Tensor | None:
    """What a norm on queries or keys adds behind its scalar, (heads, k)."""
    attention, shift = _attention(stream, group), stream.weight(f"{READINGS[port]}_norm_bias", group)
    if shift is None or attention.port_norm is None:
        return None
    # what stands before rotary is scaled with the planes that turn
    weights = None if attention.port_norm.after_rotary else turning_weights(attention, stream.dtype)
    shift = _least(stream, shift)
    return (shift if weights is None else shift * weights).expand(heads, -1)


def turning_weights(attention: Attention, dtype: torch.dtype) -> Tensor | None:
    """What a rotary scaling multiplies a head's dimensions by, (k,); None where it is 1."""
    rotary = attention.rotary
    if rotary is None or rotary.factor == 1.0:
        return None
    weights = torch.ones(attention.width, dtype=dtype)
    weights[: rotary.dim] = rotary.factor
    return weights


def _attention(stream: Stream, group: str) -> Attention:
    branch = stream.spec.branch(group)
    assert branch is not None and isinstance(branch.part, Attention)
    return branch.part


def _port_gain(stream: Stream, port: Port, group: str, heads: int) -> Tensor | None:
    """Gain of a norm on queries or keys, (heads, k); before rotary each its own.

    Behind it both gains stand in the keys' maps: ``(R_m q)^T diag(g_q g_k) R_n k``, for a key at place 0.
    """
    norm = _attention(stream, group).port_norm
    assert norm is not None
    if not norm.after_rotary:
        return own_gain(stream, READINGS[port], group, heads)
    both = [own_gain(stream, "q", group, 1), own_gain(stream, "k", group, 1)]
    if port == "Q" or both[0] is None or both[1] is None:
        return None
    return (both[0] * both[1]).expand(heads, -1)


def own_gain(stream: Stream, role: str, group: str, heads: int) -> Tensor | None:
    """The gain of the norm on queries or keys, (heads, k); None where it has none."""
    norm = _attention(stream, group).port_norm
    weight = stream.weight(f"{role}_norm", group)
    if weight is None and stream.model.has(f"{role}_norm.0", group):  # each head has a tensor of its own
        weight = torch.stack([_needed(stream, f"{role}_norm.{head}", group) for head in range(heads)])
    return None if weight is None or norm is None else (_least(stream, weight) + norm.norm.plus).expand(heads, -1)


def _check_encoder(port: str, group: Group | str) -> None:
    if port != "enc":
        raise UsageError(f"{group_id(group)} has no port {port!r}", expected="enc", do="name this port")


def writer(stream: Stream, group: Group | str, state: int | None = None) -> Tensor:
    """The write maps of a group, shape (m, d, k), not centred, see ``Stream.write``."""
    id = group_id(group)
    if id in stream.attached:
        return stream.attached[id].write(stream, state)
    if id not in stream.groups:
        raise _missing(stream, "output", id)
    kind = stream.groups[id].kind
    if kind not in WRITINGS:
        raise UsageError(f"{id} does not write", expected="a writer such as L3.mlp or embed", do="name a writer")
    if kind == "pos" and stream.spec.sinusoidal:
        return sinusoidal(stream.spec).to(stream.dtype).T[None]
    maps = _needed(stream, WRITINGS[kind], id)
    if kind in ("embed", "pos"):
        return embedded(stream, kind, maps[stream.spec.unnumbered :] if kind == "pos" else maps).T[None]
    maps = maps if maps.ndim == 3 else maps[None] if maps.ndim == 2 else maps[None, :, None]
    if not stream.folded:
        return maps
    gain = norm_gain(stream, "inner", id, stream.groups[id].inner)
    maps = maps if gain is None else _least(stream, maps) * gain.reshape(len(maps), 1, -1)
    return _weighed(stream, maps, stream.groups[id])


def sinusoidal(spec: ModelSpec) -> Tensor:
    """Computed position embeddings, (positions, d) float64, see ``ModelSpec.sinusoidal``."""
    assert spec.sinusoidal is not None and spec.n_positions is not None
    half = spec.d_model // 2
    frequencies = 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / spec.sinusoidal)
    rows = torch.arange(spec.unnumbered, spec.unnumbered + spec.n_positions, dtype=torch.float64)
    angles = rows[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def _weighed(stream: Stream, maps: Tensor, group: Group) -> Tensor:
    """Write maps with the branch's factor, and what is linear in the norm after it."""
    branch = group.branch
    if branch is None:
        return maps
    if branch.after is not None:
        maps = _least(stream, without_mean(_least(stream, maps), -2) if branch.after.kind == "layer" else maps)
        gain = norm_gain(stream, "after", group, branch.after)
        maps = maps if gain is None else maps * gain.to(maps)[:, None]
    return maps if branch.factor == 1.0 else _least(stream, maps) * branch.factor


def through_output(stream: Stream, rows: Tensor, branch: str, *, mixed: bool) -> Tensor:
    """Vectors (n, k) of what a part gives, or (``mixed``) of heads' values side by side, as they enter, (d, n)."""
    if mixed:
        maps = writer(stream, branch).movedim(1, 0).flatten(1)
        dtype = torch.promote_types(maps.dtype, rows.dtype)
        return maps.to(dtype) @ rows.to(dtype).T
    return _weighed(stream, rows.T[None], stream.groups[branch])[0] if stream.folded else rows.T


def embedded(stream: Stream, kind: str, rows: Tensor) -> Tensor:
    """Rows of the table of an embedding, (n, d), as they enter the stream: with its factor, through its norm."""
    embedding = stream.spec.embedding
    if kind == "embed" and stream.folded:
        rows = rows if embedding.factor == 1.0 else _least(stream, rows) * embedding.factor
        if embedding.norm is not None:
            gain, shift = norm_gain(stream, "norm", "embed", embedding.norm), stream.weight("norm_bias", "embed")
            rows = normed(_least(stream, rows), gain, shift, embedding.norm)
    return rows


def norm_gain(stream: Stream, role: str, group: Group | str, norm: Norm | None) -> Tensor | None:
    """The gain of a norm, ``plus`` in it, of role ``"norm"`` or ``"after"``; None where it is 1."""
    gain = stream.weight(role, group) if norm is not None else None
    return gain if gain is None or not norm or not norm.plus else _least(stream, gain) + norm.plus


def _needed(stream: Stream, role: str, group: str) -> Tensor:
    tensor = stream.weight(role, group)
    if tensor is None:
        raise _missing(stream, role, group)
    return tensor


def _missing(stream: Stream, role: str, group: str) -> MissingTensorError:
    return MissingTensorError(
        f"this checkpoint has no {role} of {group}",
        expected=f"a {stream.spec.model_type} model with that part",
        do="open the complete checkpoint, or ask about a part it holds",
    )


def centring(stream: Stream) -> bool:
    """Whether the mean over coordinates of what is written is left out, which no reader behind a LayerNorm sees."""
    return stream.spec.centring and not stream.keeps_mean


def as_seen(stream: Stream, port: str) -> Stream:
    """The stream as readers of a port see it: an encoder that reads a state as it is sees its mean."""
    raw = port == "enc" and stream.attached.raw and stream.spec.centring
    return replace(stream, keeps_mean=True) if raw else stream


def token_parts(stream: Stream, side: Literal["embed", "unembed"], rows: int = 8192) -> Iterator[Tensor]:
    """Tokens as rows (t, d) of the embedding or the unembedding, as ``write`` and ``read`` give them, in parts.

    What is taken from all tokens alike, the mean of the unembedding, is summed in float64 in a pass of its own.

    Args:
        stream: the model.
        side: which.
        rows: how many tokens at most in one part.

    Raises:
        MissingTensorError: a partial checkpoint lacks it.
    """
    mean = None
    if side == "unembed" and stream.folded and stream.spec.head.cap is None:
        total, count = 0.0, 0
        for part in _token_parts(stream, side, rows):
            total, count = total + part.sum(0, dtype=torch.float64), count + len(part)
        mean = total / count
    for part in _token_parts(stream, side, rows):
        if mean is not None:
            rest = part - mean
            part = rest.masked_fill(rest.abs() <= torch.finfo(part.dtype).eps * part.abs(), 0.0).to(part.dtype)
        yield part


def _token_parts(stream: Stream, side: Literal["embed", "unembed"], rows: int) -> Iterator[Tensor]:
    role = READINGS[side] if side == "unembed" else WRITINGS[side]
    count = stream.spec.vocab or len(_needed(stream, role, side))
    gain = norm_gain(stream, "norm", side, stream.spec.head.norm) if side == "unembed" else None
    for start in range(0, count, rows):
        part = stream.weight(role, side, slice(start, min(start + rows, count)))
        if part is None:
            raise _missing(stream, role, side)
        if side == "embed":
            part = embedded(stream, side, part)
            yield without_mean(_least(stream, part), -1) if stream.folded and centring(stream) else part
        else:
            folded = fold(part, gain, stream.spec.head.norm, stream.dtype) if stream.folded else part
            yield folded * stream.spec.head.factor if stream.folded and stream.spec.head.factor != 1.0 else folded


def as_stored(stream: Stream, role: str, group: str) -> Tensor | None:
    """A role's tensor as transformers stores it; what it adds to a gain may be in another format's already."""
    weight = stream.weight(role, group)
    trait = {"norm": "plus", "after": "plus", "inner": "plus", "q_norm": "qk_plus", "k_norm": "qk_plus"}.get(role)
    if weight is None or trait is None:
        return weight
    added = stream.model.entry.values[trait] - stream.model.hf.values[trait]
    return weight + added if added else weight


def added(stream: Stream, given: Tensor, group: Group) -> Tensor:
    """What a part adds to the stream, (..., d), of what its output map gives, its bias left out."""
    scalar = after_scale(stream, given, group)
    return _weighed(stream, given[..., None], group)[..., 0] / scalar[..., None].to(given)


def _least(stream: Stream, tensor: Tensor) -> Tensor:
    """At least in the dtype in which norms are folded."""
    return tensor.to(torch.promote_types(tensor.dtype, stream.dtype))


def compared(stream: Stream, port: Port, group: Group, values: Tensor) -> Tensor:
    """Queries or keys as attention compares them, (T, m, k), of what the port's own map gives tokens 0 to T - 1.

    They are turned by their places and pass the norm on them, in the order in which the model does both.
    """
    attention = group.attention
    assert attention is not None
    rotary, norm = attention.rotary, attention.port_norm
    if "positions" in attention.outside:
        role = READINGS[port]
        table, maps = (_needed(stream, *place).to(values) for place in (("positions", "positions"), (role, group.id)))
        values = values + torch.einsum("mkd,td->tmk", maps, table[: len(values)])
    if rotary is not None:
        rotations = [stream.rotation(place, group) for place in range(len(values))]
        turn = torch.stack([turn for turn in rotations if turn is not None]).to(values.dtype)
        weights = turning_weights(attention, values.dtype)
    else:
        turn, weights = None, None

    def turned(x: Tensor) -> Tensor:
        x = x if weights is None else x * weights
        return x if turn is None else torch.einsum("tij,tmj->tmi", turn, x)

    if norm is None:
        return turned(values)
    gains = own_gain(stream, READINGS[port], group.id, values.shape[1])
    shift = stream.weight(f"{READINGS[port]}_norm_bias", group)
    values = turned(values) if norm.after_rotary else values
    centre = values - values.mean(-1, keepdim=True) if norm.norm.kind == "layer" else values
    values = centre / port_scale(stream, port, group, values)[..., None]
    values = values if gains is None else values * gains.to(values)
    values = values if shift is None else values + shift.to(values)
    return values if norm.after_rotary else turned(values)


def after_scale(stream: Stream, given: Tensor, group: Group | str) -> Tensor:
    """The scalar of the norm after a part, of what the part gives (..., d), as it leaves its map; 1 without one."""
    return scale(given, stream.groups[group_id(group)].after)


def inner_scale(stream: Stream, z: Tensor, group: Group | str) -> Tensor:
    """The scalar of the norm on a part's inner activations (..., m, k), all together, (...); 1 without one."""
    return scale(z.flatten(-2), stream.groups[group_id(group)].inner)


def port_scale(stream: Stream, port: Port, group: Group | str, values: Tensor) -> Tensor:
    """The scalar of a norm on queries or keys, of what the port's own map gives (..., m, k), see ``projection``.

    Returns:
        (..., m), the same for all heads where the norm is over all; 1 where there is none.
    """
    attention = stream.groups[group_id(group)].attention
    norm = attention.port_norm if attention is not None and port in ("Q", "K") else None
    if norm is not None and norm.after_rotary and attention is not None:
        weights = turning_weights(attention, values.dtype)
        values = values if weights is None else values * weights
    if norm is None or norm.over == "head":
        return scale(values, None if norm is None else norm.norm)
    return scale(values.flatten(-2), norm.norm)[..., None].expand(values.shape[:-1])
