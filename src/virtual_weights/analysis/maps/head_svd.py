"""Singular value decompositions of the circuits of all heads of one attention."""

from __future__ import annotations

from typing import Literal

import torch

from virtual_weights.linalg import SVD, accumulate, beyond_rounding
from virtual_weights.linalg.decompose import largest_gains, product_svd
from virtual_weights.stream import Group, Stream

HeadCircuit = Literal["ov", "qk"]


def head_svd(stream: Stream, circuit: HeadCircuit, group: Group, offset: int = 0) -> SVD:
    """``OV = W_O W_V`` or ``QK = W_Q^T Rot(offset)^T W_K`` of every head, through the thin factors.

    Args:
        stream: the model.
        circuit: which.
        group: an attention.
        offset: query position minus key position, of QK.

    Returns:
        SVD with U (heads, d, r), S (heads, r) and V (heads, d, r), r = min(d_head, d), as ``svd`` of each circuit but
        for signs: a gain that is rounding of the two factors is 0.

    Raises:
        MissingTensorError: a partial checkpoint lacks a factor.

    Invariant under re-basing of heads (QK at offset 0).
    """
    port = "V" if circuit == "ov" else "K"
    maps = stream.read(port, group).maps
    right = maps.to(accumulate).repeat_interleave(group.shared(port), 0)
    if circuit == "ov":
        left = stream.write(group).to(accumulate)
    else:
        left = stream.read("Q", group).maps.to(accumulate).mT
        turn = stream.rotation(offset, group) if offset else None
        left = left if turn is None else left @ turn.T.to(maps.dtype).to(accumulate)  # rounded as the maps are
    factors = product_svd(left, right)
    eps = torch.finfo(torch.promote_types(maps.dtype, torch.float32)).eps
    sizes = largest_gains(left) * largest_gains(right)
    return SVD(factors.U, beyond_rounding(factors.S, sizes[:, None], eps), factors.V)
