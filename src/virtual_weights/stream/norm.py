"""Folding the norm before a reader, so that the reader is linear up to one scalar per token.

LayerNorm: ``N(x) = gamma (P x) / s + beta`` with ``P = I - 11^T/d``, so ``R N(x) = R diag(gamma) P x / s + R beta``.
RMSNorm: ``N(x) = gamma x / s``, so ``R N(x) = R diag(gamma) x / s``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def fold(maps: Tensor, gain: Tensor, norm: Literal["rms", "layer"], least: torch.dtype = torch.float32) -> Tensor:
    """Effective read maps ``R diag(gamma)`` (then ``P`` for LayerNorm), same shape (..., k, d).

    Args:
        maps: the readers' own maps, shape (..., k, d).
        gain: gamma, shape (d,).
        norm: which norm stands before the reader.
        least: the product is formed and kept in this dtype, or the operands' if that is wider.
    """
    dtype = torch.promote_types(torch.promote_types(maps.dtype, gain.dtype), least)
    scaled = maps.to(dtype) * gain.to(dtype)
    return scaled - scaled.mean(-1, keepdim=True) if norm == "layer" else scaled


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


def scale(states: Tensor, norm: Literal["rms", "layer"], eps: float) -> Tensor:
    """The norm scalar ``s`` of every token: states (..., d) to (...).

    ``sqrt(mean(x^2) + eps)`` for RMSNorm, ``sqrt(var(x) + eps)`` for LayerNorm.
    """
    centred = states - states.mean(-1, keepdim=True) if norm == "layer" else states
    return (centred.square().mean(-1) + eps).sqrt()
