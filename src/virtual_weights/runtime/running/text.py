"""Text to chunks of token ids: files, folders, standard input, the default text, or random tokens that repeat."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.stream import Stream

PADDING = -1
"""Marks a place in a batch that holds no token. Such places stand last in their row, where no token attends to them,
and never count."""

DEFAULT = "default"
"""Names the default text where an option would otherwise mean that nothing is run."""

DEFAULT_TEXT = "Python's help topics (pydoc_data.topics)"


def texts(source: str | Path | None = None) -> Iterator[str]:
    """The documents of a file, of all files in a folder (by name, subfolders too), of ``"-"``, or of the default text.

    The default text goes by None or ``"default"``; a file of that name is ``"./default"``.

    Raises:
        UsageError: there is no such file, or it is not UTF-8.
    """
    if source is None or str(source) == DEFAULT:
        from pydoc_data.topics import topics

        yield "\n\n".join(topics.values())
        return
    if str(source) == "-":
        yield sys.stdin.read()
        return
    place = Path(source)
    try:
        for file in sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]:
            yield file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"no text in {place}: {error}", expected="UTF-8 text", do="name a text file") from error


def tokenizer_of(stream: Stream) -> Any:
    """The tokenizer that lies beside a checkpoint or in it, as transformers loads it.

    Raises:
        UsageError: the stream was opened from memory, or its checkpoint carries no tokenizer.
    """
    path = stream.source.at_rest.path
    if path is None:
        raise UsageError(
            "a model in memory has no tokenizer", expected="a checkpoint with a tokenizer", do="pass token ids"
        )
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    auto: Any = transformers.AutoTokenizer
    where, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return auto.from_pretrained(where, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"no tokenizer at {path}: {error}", expected="tokenizer files beside it", do="pass token ids"
        ) from error


def token_ids(documents: Iterable[str], tokenizer: Any) -> Iterator[Tensor]:
    """The ids of each document, (T,), with the special tokens that the tokenizer adds."""
    for text in documents:
        yield torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def chunks(documents: Iterable[Tensor], length: int = 256, limit: int | None = None) -> Iterator[Tensor]:
    """Documents cut into chunks of at most ``length`` tokens, (T,).

    Every token is in exactly one chunk; a chunk never crosses two documents, and each begins its context anew.

    Args:
        documents: token ids (T,) each.
        length: of a chunk.
        limit: stop after so many tokens.
    """
    if length < 1 or (limit is not None and limit < 1):
        raise UsageError(
            f"length {length}, limit {limit}", expected="numbers >= 1", do="pass for example length=256, limit=4096"
        )
    rest = limit
    for chunk in (c for document in documents for c in document.split(length) if len(c)):
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
    once = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
    return once.repeat(1, 2)


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
