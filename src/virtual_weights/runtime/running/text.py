"""Text to chunks of token ids: files, folders, standard input, a text by its name, or random tokens that repeat."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import random_generator
from virtual_weights.stream import Stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING = -1
"""Marks a place in a batch that holds no token. Such places stand last in their row, where no token attends to them,
and never count."""

DEFAULT = "default"
"""Names the default text where an option would otherwise mean that nothing is run."""

DEFAULT_TEXT = "Python's help topics (pydoc_data.topics)"

STORY = "story"
"""Names a short story in which invented names come back, so that what heads copy shows token by token."""

STORY_TEXT = "a short story that comes with virtual-weights"

_STORY = (
    "Ilsabet Marrow kept the only clock shop in Tolverdale, and every Tuesday Corin Fennick came up the hill to ask "
    "the time. He owned no watch, he said, because Tolverdale had one already. Ilsabet Marrow would put down her "
    "tools, look at forty dials that all disagreed, and choose the kindest. “It is nearly noon, Corin Fennick,” she "
    "would answer, even in the evening. Then the two of them drank tea until the clocks struck, one after another, "
    "all the way down the wall. When Corin Fennick moved away, the people of Tolverdale noticed that the tower bell "
    "rang late on Tuesdays. Nobody asked Ilsabet Marrow why. They simply waited, and brought her tea at what was "
    "nearly noon."
)


def texts(source: str | Path | None = None) -> Iterator[str]:
    """The documents of a file, of all files in a folder (by name, subfolders too), of ``"-"``, or of a text of its own.

    The default text goes by None or ``"default"``, the story by ``"story"``; files of these names are ``"./default"``
    and ``"./story"``.

    Raises:
        UsageError: there is no such file, or a file (it is named) cannot be read or is not UTF-8.
    """
    if source is None or str(source) == DEFAULT:
        from pydoc_data.topics import topics

        yield "\n\n".join(topics.values())
        return
    if str(source) == STORY:
        yield _STORY
        return
    if str(source) == "-":
        try:
            yield without_mark(sys.stdin.read())
        except UnicodeDecodeError as error:
            raise _unread("standard input", f"byte {error.start:,} is not {error.encoding}") from error
        return
    place = Path(source)
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    if not files:
        raise UsageError(f"the folder {str(place)!r} holds no file", expected="text files", do="name another folder")
    for file in files:
        try:
            content = file.read_bytes()
        except (OSError, ValueError) as error:
            raise _unread(file, getattr(error, "strerror", None) or str(error)) from error
        try:
            yield without_mark(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise _unread(file, f"byte {error.start:,} is not UTF-8") from error


def title(source: str | Path | None = None) -> str:
    """What the text is, in words; of a file its name."""
    name = DEFAULT if source is None else str(source)
    return {DEFAULT: DEFAULT_TEXT, STORY: STORY_TEXT}.get(name, name)


def without_mark(text: str) -> str:
    """A text without the byte order mark that some editors put before it.

    Raises:
        UsageError: it holds what is not a character, as a terminal gives for bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text holds {text[error.start]!r} after {error.start:,} characters, which is not a character",
            expected="UTF-8 text",
            do="check the encoding of the text",
        ) from error
    return text.removeprefix("\ufeff")


def tokenizer_of(stream: Stream) -> Tokenizer:
    """The tokenizer that lies beside a checkpoint or in it; no code of the checkpoint is looked at.

    Raises:
        UsageError: the stream was opened from memory, or its checkpoint carries no tokenizer that can be read.
        MalformedCheckpointError: its tokenizer is not a sound one.
    """
    tokenizer = stream.source.tokenizer()
    if tokenizer is None:
        in_memory = stream.source.at_rest.path is None
        raise UsageError(
            "a model in memory has no tokenizer" if in_memory else f"no tokenizer at {stream.source.reference}",
            expected="a checkpoint with tokenizer.json, or vocab.json and merges.txt, beside it",
            do="pass token ids",
        )
    return tokenizer


def beginning(stream: Stream) -> Tensor:
    """The id of the token that marks the beginning of a sequence, (), as the checkpoint's configuration names it.

    Raises:
        UsageError: it names none.
    """
    config = stream.source.config
    id = config.get("bos_token_id", config.get("tokenizer.ggml.bos_token_id"))
    if not isinstance(id, int):
        raise UsageError(
            f"no token that marks the beginning of a sequence at {stream.source.reference}",
            expected="bos_token_id in its configuration",
            do="run without one (--no-bos), or pass token ids",
        )
    return torch.tensor(id)


def token_ids(documents: Iterable[str], tokenizer: Tokenizer, special: bool = True) -> Iterator[Tensor]:
    """The ids of each document, (T,), with the special tokens that the tokenizer adds, or without.

    Raises:
        UsageError: the vocabulary has no token for a part of a text, and none for what is unknown.
    """
    how = {} if special else {"add_special_tokens": False}
    for text in documents:
        try:
            ids = tokenizer.encode(text, **how).ids
        except Exception as error:  # the library raises Exception itself
            raise UsageError(
                f"the tokenizer cannot read the text: {error!r:.300}",
                expected="text that the model's vocabulary covers",
                do="pass another text, or token ids",
            ) from error
        yield torch.tensor(ids, dtype=torch.int64)


def chunks(
    documents: Iterable[Tensor], length: int = 256, limit: int | None = None, mark: Tensor | None = None
) -> Iterator[Tensor]:
    """Documents cut into chunks of at most ``length`` tokens, (T,).

    Every token is in exactly one chunk; a chunk never crosses two documents, and each begins its context anew.

    Args:
        documents: token ids (T,) each.
        length: of a chunk.
        limit: stop after so many tokens.
        mark: ids (M,) with which every chunk begins; they count among its tokens.
    """
    if length < 1 or (limit is not None and limit < 1):
        raise UsageError(
            f"length {length}, limit {limit}", expected="numbers >= 1", do="pass for example length=256, limit=4096"
        )
    rest, room = limit, length - (0 if mark is None else len(mark))
    if room < 1:
        raise UsageError(
            f"chunks of {length} tokens", expected="room for a token after the mark", do="pass a longer one"
        )
    for part in (c for document in documents for c in document.split(room) if len(c)):
        chunk = part if mark is None else torch.cat([mark, part])
        yield chunk if rest is None else chunk[:rest]
        rest = None if rest is None else rest - min(rest, len(chunk))
        if rest == 0:
            return


def padded(rows: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Chunks stacked ``batch`` at a time, (B, T), shorter ones ending in ``PADDING``."""
    stacked: list[Tensor] = []
    for row in rows:
        stacked.append(row)
        if len(stacked) == batch:
            yield _stack(stacked)
            stacked = []
    if stacked:
        yield _stack(stacked)


def is_token(batch: Tensor) -> Tensor:
    """Which places of a batch (B, T) hold tokens.

    Raises:
        UsageError: it has another shape, or padding stands before a token.
    """
    mask = batch != PADDING
    if batch.ndim != 2 or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise UsageError(
            f"a batch of shape {tuple(batch.shape)} with padding before a token"
            if batch.ndim == 2
            else f"a batch of shape {tuple(batch.shape)}",
            expected=f"token ids (B, T), rows ending in {PADDING} where they are shorter",
            do="pad on the right",
        )
    return mask


def repeated_tokens(vocabulary: int, length: int = 128, batch: int = 4, seed: int = 0) -> Tensor:
    """Uniformly random tokens, then the same again, (batch, 2 length): only copying predicts the second half."""
    once = torch.randint(vocabulary, (batch, length), generator=random_generator(seed))
    return once.repeat(1, 2)


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


def _unread(what: object, why: str) -> UsageError:
    return UsageError(
        f"no text in {str(what)!r}: {why}", expected="text in UTF-8", do="name a text file, or a folder of them"
    )
