"""What reads and what writes in attribution: groups whose signals a run shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.dictionary_writes import feature_places, stands
from virtual_weights.runtime.running.hooks import Place
from virtual_weights.stream import Group, Stream
from virtual_weights.stream.group import Port, Writers, spans


@final
@dataclass(frozen=True)
class WritingGroup:
    """A group that writes, of a cross-layer dictionary as much as it has written in states ``[first, end)``."""

    group: Group
    first: int
    end: int
    places: frozenset[Place]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of what writes."""
        labels = self.group.labels
        return labels if len(self.group.writes) == 1 else tuple(f"{label}@{self.first}" for label in labels)

    def reaches(self, state: int | None) -> bool:
        """Whether this is in a state, in this form."""
        return state is not None and self.first <= state < self.end


def reading_groups(stream: Stream, port: Port) -> tuple[Group, ...]:
    """What reads through a port; of attached dictionaries those that stand for a part, so that something follows.

    Raises:
        UsageError: there is none.
    """
    readers = stream.groups.readers(port)
    if port == "enc":
        readers = tuple(group for group in readers if stands(stream, group.id))
    if not readers:
        raise UsageError(
            "no attached dictionary writes for a part of the model, so nothing follows from what they read",
            expected="a transcoder",
            do="attach one, or ask about weights: vweights composition --port enc",
        )
    return readers


def writing_groups(stream: Stream, writers: Writers) -> list[WritingGroup]:
    """What writes and differs between tokens; of attached dictionaries those whose activations are known."""
    groups = stream.groups
    own = groups.kind("head") if writers == "heads" else groups.kind("embed", "pos", "head", "mlp")
    attached = [group for group in groups.dictionaries if writers == "all" and stands(stream, group.id)]
    return [WritingGroup(group, *span, _places(stream, group)) for group in (*own, *attached) for span in spans(group)]


def _places(stream: Stream, group: Group) -> frozenset[Place]:
    """Where z of heads is seen, what others write, and what the output of features follows from."""
    if group.kind == "dictionary":
        return frozenset(feature_places(stream, group.id))
    return frozenset([("inner" if group.kind == "head" else "written", group.id)])
