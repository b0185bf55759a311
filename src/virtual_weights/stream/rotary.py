"""Rotary position embedding as a linear map inside a head.

A query at position m and a key at position n meet as ``(R_m q)^T (R_n k) = q^T R_D^T k`` with
``D = m - n``; ``R_D`` turns the plane (i, i + apart) by the angle ``D f_i``, ``f_i = base^(-2i/dim)``, i < dim/2.
Where nothing else is said ``apart`` is dim/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from virtual_weights.architecture import Rotary


def frequencies(spec: Rotary, factors: Tensor | None = None) -> Tensor:
    """Angle per unit of offset of every plane, shape (dim/2,), float64, in radians.

    Args:
        spec: width, base and scaling.
        factors: divisors stored with the checkpoint (GGUF ``rope_freqs``), shape (dim/2,).
    """
    plain = spec.base ** (-torch.arange(0, spec.dim, 2, dtype=torch.float64) / spec.dim)
    if factors is not None:
        plain = plain / factors.double()
    scaled = _SCALED.get(spec.scaling.get("rope_type", ""))
    return plain if scaled is None else scaled(plain, spec)


def _llama3(plain: Tensor, spec: Rotary) -> Tensor:
    """Slow planes divided by ``factor``, fast ones kept, a linear passage between (Llama 3.1)."""
    low, high = spec.scaling["low_freq_factor"], spec.scaling["high_freq_factor"]
    turns = spec.scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * plain / spec.scaling["factor"] + share * plain


def _linear(plain: Tensor, spec: Rotary) -> Tensor:
    return plain / spec.scaling["factor"]


def _longrope(plain: Tensor, spec: Rotary) -> Tensor:
    """Every plane divided by its own factor, those for texts of at most the original length."""
    return plain / torch.tensor(spec.scaling["short_factor"], dtype=plain.dtype)


def _yarn(plain: Tensor, spec: Rotary) -> Tensor:
    """Planes that turn seldom within the original length divided by ``factor``, those that turn often kept."""
    length, planes = spec.scaling["original_max_position_embeddings"], len(plain)

    def plane(turns: float) -> float:
        """The plane, as a fraction, that turns so often within the original length."""
        return spec.dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(spec.base))

    low, high = plane(spec.scaling.get("beta_fast", 32.0)), plane(spec.scaling.get("beta_slow", 1.0))
    if spec.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    high = high + 0.001 if low == high else high
    share = ((torch.arange(planes, dtype=plain.dtype) - low) / (high - low)).clamp(0, 1)
    return share * plain / spec.scaling["factor"] + (1 - share) * plain


_SCALED = {"linear": _linear, "llama3": _llama3, "longrope": _longrope, "yarn": _yarn}
"""Dynamic scaling changes nothing within ``longest``."""


def rotation(spec: Rotary, offset: int, d_head: int, factors: Tensor | None = None) -> Tensor:
    """The matrix ``R_offset`` of a head, shape (d_head, d_head), float64, orthogonal.

    In the plane of dimensions (a, b): ``R q = q cos + rotate(q) sin`` with rotate(a, b) = (-b, a). ``a, b`` are
    (i, i + apart), or (2i, 2i + 1) where planes are pairs.
    """
    angle = offset * frequencies(spec, factors) * (-1 if spec.backwards else 1)
    half = spec.dim // 2
    matrix = torch.eye(d_head, dtype=torch.float64)
    low = torch.arange(half) * (2 if spec.planes == "pairs" else 1)
    high = low + (1 if spec.planes == "pairs" else spec.apart or half)
    matrix[low, low] = matrix[high, high] = angle.cos()
    matrix[low, high] = -angle.sin()
    matrix[high, low] = angle.sin()
    return matrix
