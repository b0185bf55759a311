"""Folding norms: the one before a reader, so that it is linear up to one scalar per token, and the one after a writer.

LayerNorm: ``N(x) = gamma (P x) / s + beta`` with ``P = I - 11^T/d``, so ``R N(x) = R diag(gamma) P x / s + R beta``.
RMSNorm: ``N(x) = gamma x / s``, so ``R N(x) = R diag(gamma) x / s``.
What a norm after a part writes is ``diag(gamma) (P) O z / s``, s of what the part gives.

Since no reader behind a LayerNorm sees the mean of what is written, O and ``P O`` are the same writer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.architecture import Norm

_ROWS = 256  # of a vocabulary that are squared at once
_ROUNDING = 8  # what is left of (1, ..., 1) after its mean, in eps of its length


def fold(maps: Tensor, gain: Tensor | None, norm: Norm | None, least: torch.dtype = torch.float32) -> Tensor:
    """Effective read maps ``R diag(gamma)`` (then ``P`` for LayerNorm), same shape (..., k, d).

    Args:
        maps: the readers' own maps, shape (..., k, d).
        gain: gamma, shape (d,); None is 1.
        norm: which norm stands before the reader; None leaves the maps as they are.
        least: the product is formed and kept in this dtype, or the operands' if that is wider.
    """
    dtype = torch.promote_types(maps.dtype, least)
    if gain is not None:
        dtype = torch.promote_types(dtype, gain.dtype)
    scaled = maps.to(dtype) if gain is None else maps.to(dtype) * gain.to(dtype)
    return without_mean(scaled, -1) if norm is not None and norm.kind == "layer" else scaled


def without_mean(vectors: Tensor, axis: int) -> Tensor:
    """Vectors along an axis less their mean, ``P x``; exactly 0 where all entries are the same up to rounding."""
    rest = vectors - vectors.mean(axis, keepdim=True)
    length, before = (_length(x, axis) for x in (rest, vectors))
    return rest.masked_fill_(length <= _ROUNDING * torch.finfo(rest.dtype).eps * before, 0.0)


def _length(vectors: Tensor, axis: int) -> Tensor:
    """Norms along an axis, which is kept; over rows in parts that stay in a cache, many times faster than at once."""
    if axis == -1:
        return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    parts = (part.square().sum(axis, keepdim=True) for part in vectors.split(_ROWS, axis))
    return sum(parts, vectors.new_zeros(())).sqrt()


def constant(
    maps: Tensor, shift: Tensor | None, bias: Tensor | None, least: torch.dtype = torch.float32
) -> Tensor | None:
    """What the reader receives whatever the stream holds: ``R beta + c``, shape (..., k); None where nothing.

    Args:
        maps: the readers' own maps, shape (..., k, d).
        shift: beta of the norm, shape (d,), or None.
        bias: c of the reader, shape (..., k), or None.
        least: as in ``fold``.
    """
    if shift is None:
        return bias
    dtype = torch.promote_types(maps.dtype, least)
    moved = maps.to(dtype) @ shift.to(dtype)
    return moved if bias is None else moved + bias


def scale(vectors: Tensor, norm: Norm | None) -> Tensor:
    """The norm scalar ``s`` of every vector: (..., d) to (...); 1 without a norm.

    ``sqrt(mean(x^2) + eps)`` for RMSNorm, ``sqrt(var(x) + eps)`` for LayerNorm.
    """
    if norm is None:
        return torch.ones_like(vectors[..., 0])
    centred = vectors - vectors.mean(-1, keepdim=True) if norm.kind == "layer" else vectors
    return (centred.square().mean(-1) + norm.eps).sqrt()


def capped(values: Tensor, cap: float | None) -> Tensor:
    """``cap tanh(values / cap)``; the values themselves without a cap."""
    return values if cap is None else cap * (values / cap).tanh()


def normed(vectors: Tensor, gain: Tensor | None, shift: Tensor | None, norm: Norm) -> Tensor:
    """``gamma (P x) / s + beta`` of every vector, same shape (..., d)."""
    centred = vectors - vectors.mean(-1, keepdim=True) if norm.kind == "layer" else vectors
    result = centred / scale(vectors, norm)[..., None]
    result = result if gain is None else result * gain.to(result)
    return result if shift is None else result + shift.to(result)
