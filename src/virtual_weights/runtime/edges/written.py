"""What components of one group write, of what a run showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from virtual_weights.runtime.edges.dictionary_writes import feature_places, feature_writes
from virtual_weights.runtime.running.hooks import Place
from virtual_weights.stream import Group, Label, Stream


@final
@dataclass(frozen=True, eq=False)
class Written:
    """What some components of one group write: ``O z`` for z that the model's run shows.

    Attributes:
        stream: the model.
        group: the group.
        components: which of its m components.
        rows: which of their k inner activations: all, or a neuron's or feature's.
        state: of a cross-layer dictionary, by which state.
    """

    stream: Stream
    group: Group
    components: slice
    rows: slice
    state: int | None = None

    @classmethod
    def of(cls, stream: Stream, label: Label, shared: int = 1) -> Written:
        """What one component or neuron writes; of a head, with the others of the ``shared`` that it stands among."""
        first = (label.index or 0) // shared * shared if label.kind == "head" else 0
        return cls(stream, stream.groups.of(label), slice(first, first + shared), unit_rows(label), label.state)

    @property
    def place(self) -> Place:
        """Where z of a part of the model is seen; of embeddings ``O z`` itself."""
        return "written" if self.group.kind in ("embed", "pos") else "inner", self.group.id

    @property
    def places(self) -> set[Place]:
        """All that its output follows from."""
        return feature_places(self.stream, self.group.id) if self.group.kind == "dictionary" else {self.place}

    def __call__(self, signals: Mapping[Place, Tensor]) -> Tensor:
        """``O z``, (B, T, d), of what a run showed at ``places``."""
        if self.group.kind == "dictionary":
            return feature_writes(self.stream, self.group.id, signals, self.rows, self.state)
        signal = signals[self.place]
        if self.place[0] == "written":
            return signal
        z = signal[..., self.components, self.rows]
        maps = self.stream.write(self.group)[self.components, :, self.rows].to(z)
        return torch.einsum("mdk,btmk->btd", maps, z)


def unit_rows(label: Label) -> slice:
    """Which rows of a map a name means: all, or those of one neuron or feature."""
    if label.kind not in ("neuron", "feature") or label.index is None:
        return slice(None)
    return slice(label.index, label.index + 1)
