"""What a map asks of single heads and edges: the circuits of all heads, what the foremost edges carry, and where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from virtual_weights.analysis.channels.channel import Channel
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens
from virtual_weights.analysis.channels.head_circuits import HeadCircuits
from virtual_weights.analysis.channels.head_tokens import HeadTokens
from virtual_weights.analysis.channels.offsets import OffsetProfile
from virtual_weights.analysis.channels.pair_angles import PairAngles
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import STORY
from virtual_weights.stream import Question, Stream, parse
from virtual_weights.survey.strongest import distinct

FOREMOST = 3
"""Edges of each port by score, and as many by lift, of which a map asks what they carry."""

OFFSETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1023)
"""Rotary offsets at which it asks for the score of an edge into queries or keys."""

_SEQUENCES = 4  # of the run's own text, of which removed edges are shown token by token
_LONGEST = 256  # tokens of a story


def of_heads(stream: Stream, offset: int | None) -> Iterator[Question[Any]]:
    """Spectra of all heads, and the tokens of their first directions where the checkpoint has tokens and values."""
    yield HeadCircuits(offset)
    if _has_tokens(stream) and stream.groups.readers("V"):
        yield HeadTokens()


def of_edges(stream: Stream, edges: Iterable[tuple[str, str]], offset: int | None) -> Iterator[Question[Any]]:
    """What edges between heads carry."""
    widest = max(group.width for group in stream.groups.heads)
    for writer, reader in edges:
        yield Channel(writer, reader, offset)
        if _has_tokens(stream):
            yield ChannelTokens(writer, reader, rotary_offset=offset)
        if parse(reader).port in ("Q", "K"):
            yield OffsetProfile(writer, reader, OFFSETS)
        if widest < stream.d_model:  # or both ends would be the whole stream
            yield PairAngles(writer, reader, offset)


def leading(scored: Mapping[str, Record]) -> Iterator[tuple[str, str]]:
    """The foremost edges of compositions of heads with heads, one for each map that heads share."""
    for record in scored.values():
        for by in ("score", "lift"):
            for row in distinct(record, FOREMOST, by):
                yield str(row["writer"]), str(row["reader"])


def texts(run: Run, length: int) -> Iterator[tuple[Run, int]]:
    """On what removed edges are shown token by token, with how many sequences: a story, and the run's own text."""
    try:
        story = Run.on_text(run.stream, STORY, length=_LONGEST, model=run.runner)
    except UsageError:  # there is no tokenizer for it
        pass
    else:
        yield story, 1
    yield run.shortened(length), _SEQUENCES


def _has_tokens(stream: Stream) -> bool:
    return "embed" in stream.groups or "unembed" in stream.groups
