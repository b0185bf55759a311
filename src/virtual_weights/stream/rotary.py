"""Rotary position embedding as a linear map inside a head.

A query at position m and a key at position n meet as ``(R_m q)^T (R_n k) = q^T R_D^T k`` with
``D = m - n``; ``R_D`` turns the plane (i, i + apart) by the angle ``D f_i``, ``f_i = base^(-2i/dim)``, i < dim/2.
Where nothing else is said ``apart`` is dim/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from virtual_weights.architecture import RotarySpec


def frequencies(spec: RotarySpec, factors: Tensor | None = None) -> Tensor:
    """Angle per unit of offset of every plane, shape (dim/2,), float64, in radians.

    Args:
        spec: width, base and scaling.
        factors: divisors stored with the checkpoint (GGUF ``rope_freqs``), shape (dim/2,).
    """
    plain = spec.base ** (-torch.arange(0, spec.dim, 2, dtype=torch.float64) / spec.dim)
    if factors is not None:
        plain = plain / factors.double()
    kind = spec.scaling.get("rope_type")
    if kind == "linear":
        return plain / spec.scaling["factor"]
    return _llama3(plain, spec) if kind == "llama3" else plain


def _llama3(plain: Tensor, spec: RotarySpec) -> Tensor:
    """Slow planes divided by ``factor``, fast ones kept, a linear passage between (Llama 3.1)."""
    low, high = spec.scaling["low_freq_factor"], spec.scaling["high_freq_factor"]
    turns = spec.scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / spec.scaling["factor"] + share * plain


def rotation(spec: RotarySpec, offset: int, d_head: int, factors: Tensor | None = None) -> Tensor:
    """The matrix ``R_offset`` of a head, shape (d_head, d_head), float64, orthogonal.

    Planes are (i, i + apart), so ``R q = q cos + rotate_half(q) sin`` with rotate_half(a, b) = (-b, a).
    """
    angle = offset * frequencies(spec, factors)
    half = spec.dim // 2
    matrix = torch.eye(d_head, dtype=torch.float64)
    low, high = torch.arange(half), torch.arange(half) + (spec.apart or half)
    matrix[low, low] = matrix[high, high] = angle.cos()
    matrix[low, high] = -angle.sin()
    matrix[high, low] = angle.sin()
    return matrix
