"""Components taken as linear updates of the stream, ``x -> x + T x``, in thin factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import accumulate
from virtual_weights.stream import Component, Stream


@final
@dataclass(frozen=True, eq=False)
class Updates:
    """Several components of one kind, each ``T = write^T read`` at norm scalar, attention and slope 1.

    Attributes:
        read: (m, k, d) float64; row by row of the same length as ``write``, so that sums of both lose nothing.
        write: (m, k, d) float64, transposed write maps.
        position: (m,) the state that each reads.
    """

    read: Tensor
    write: Tensor
    position: Tensor

    @property
    def symmetric_moments(self) -> Tensor:
        """``tr T`` and ``tr S^2`` of the symmetric part ``S = (T + T^T)/2``, shape (2, m)."""
        if self.read.shape[1] <= self.read.shape[2]:
            core = self.read @ self.write.mT  # the non-zero spectrum of T, k x k
            size = ((self.write @ self.write.mT) * (self.read @ self.read.mT)).sum((1, 2))
        else:
            core = self.write.mT @ self.read  # T itself, d x d
            size = core.square().sum((1, 2))
        trace = core.diagonal(dim1=1, dim2=2).sum(1)
        return torch.stack([trace, (size + (core * core.mT).sum((1, 2))) / 2])


def updates(stream: Stream, components: Sequence[Component]) -> Updates:
    """Whole layers of heads (``T = OV``), or of MLPs without gate (``T = W_out W_in``), as updates."""
    layers = list(dict.fromkeys(c.label.layer for c in components))
    if components[0].kind == "head":
        reads = [stream.read("V", layer).maps.repeat_interleave(stream.spec.group, 0) for layer in layers]
        writes = [stream.write("head", layer).mT for layer in layers]
    else:
        assert not stream.spec.gated, "a gated MLP is no linear update"
        reads = [stream.read("in", layer).maps for layer in layers]
        writes = [stream.write("mlp", layer).mT for layer in layers]
    read, write = torch.cat(reads).to(accumulate), torch.cat(writes).to(accumulate)
    assert len(read) == len(components), "updates are made of whole layers"
    ratio = (
        torch.linalg.vector_norm(write, dim=2, keepdim=True) / torch.linalg.vector_norm(read, dim=2, keepdim=True)
    ).sqrt()
    balance = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
    return Updates(read * balance, write / balance, torch.tensor([c.reads for c in components]))
