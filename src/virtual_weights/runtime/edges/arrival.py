"""What a writer puts on one port, token by token, and all that arrives there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from virtual_weights.linalg import accumulate
from virtual_weights.runtime.edges.edge import Edge
from virtual_weights.runtime.edges.written import Written
from virtual_weights.runtime.running.hooks import Place, wide
from virtual_weights.stream import Stream
from virtual_weights.stream.effective import port_scale, received
from virtual_weights.stream.group import HEAD_PORTS, Port
from virtual_weights.stream.score_metric import Offsets, score_metric


@final
class Arrival:
    """The energies ``|A R~ O z / s|^2`` of one edge and ``|A R~ x / s|^2`` of its port's whole input, by token.

    A is what becomes of the port's input, as in ``Contribution``: for Q and K what keys or queries of the same run make
    of it, so that the energy is in squared logits; for V what the head writes of it; else 1. Constants of the model are
    in neither energy. Where queries and keys have a norm of their own, both are over its scalar at the token, and the
    whole input holds constants too.

    Args:
        stream: the model.
        edge: the edge.
    """

    def __init__(self, stream: Stream, edge: Edge) -> None:
        self.stream, self.edge, self.group = stream, edge, stream.groups[edge.target]
        self.opposite: Port | None = "K" if edge.port == "Q" else "Q" if edge.port == "K" else None
        self._written, self._whole, self._others = list[Tensor](), list[Tensor](), list[Tensor]()

    @property
    def places(self) -> set[Place]:
        """What it needs of a run, beside what the edge's removal needs."""
        ports: list[Port | None] = [self.edge.port if self._normed else None, self.opposite]
        return {(port, self.group.id) for port in ports if port is not None}

    @property
    def _normed(self) -> bool:
        return f"{self.group.id}.{self.edge.port}" in self.group.sites

    def see(self, signals: Mapping[Place, Tensor]) -> None:
        """Add what a batch showed with every edge."""
        stream, edge = self.stream, self.edge
        x = wide(signals["state", edge.state])
        if edge.port == "enc":
            maps = edge.maps(stream, x)
        else:
            maps = stream.read(edge.port, self.group).maps[edge.map_index, edge.rows].to(x)
        y = Written.of(stream, edge.writer)(signals).to(x).expand_as(x)
        s = stream.scale(x, self.group)[..., None]
        written, whole = y @ maps.T / s, x @ maps.T / s
        if self._normed:
            values = wide(signals[edge.port, self.group.id])
            written = written / port_scale(stream, edge.port, self.group, values)[..., edge.map_index, None]
            whole = received(stream, edge.port, self.group, values)[..., edge.map_index, :]
        if edge.port not in HEAD_PORTS:  # of many rows, and A is 1: their norms are enough
            written, whole = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (written, whole))
        self._written.append(written.to(accumulate).cpu())
        self._whole.append(whole.to(accumulate).cpu())
        if self.opposite is not None:
            others = received(stream, self.opposite, self.group, wide(signals[self.opposite, self.group.id]))
            self._others.append(others[..., self._head // self.group.shared(self.opposite), :].to(accumulate).cpu())

    def energies(self) -> tuple[Tensor, Tensor]:
        """Of the edge and of the whole input at every token seen, (sequences, tokens) float64 each."""
        written, whole = torch.cat(self._written), torch.cat(self._whole)
        metric = self._metric(written.shape[1])
        edge, port = ((v @ metric * v).sum(-1).clamp(min=0.0) for v in (written, whole))
        return edge, port

    @property
    def _head(self) -> int:
        return (self.edge.reader.index or 0) if self.edge.reader.kind == "head" else 0

    def _metric(self, length: int) -> Tensor:
        """``A^T A``, (k, k) float64, of sequences of so many tokens."""
        if self.edge.port == "V":
            out = self.stream.write(self.group)[self._head].to(accumulate)
            return out.mT @ out
        if self.opposite is None:
            return torch.ones(1, 1, dtype=accumulate)
        others = torch.cat(self._others).flatten(0, 1)  # (tokens, k)
        second, mean = others.mT @ others / len(others), others.mean(0)
        return score_metric(self.stream, (self.edge.port, self.group), second[None], mean[None], Offsets(length))[0]
