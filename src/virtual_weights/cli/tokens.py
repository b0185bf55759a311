"""The tokens that a command runs a model on: a text cut into sequences, random tokens said twice, or one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.runtime.running.text import DEFAULT_TEXT, batches, repeated_tokens, texts, token_ids, tokenizer_of
from virtual_weights.stream import Stream

TextFile = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help=f"a file, a folder or - for stdin; without it {DEFAULT_TEXT}"),
]
Repeated = Annotated[bool, typer.Option("--repeated", help="random tokens, said twice, in place of text")]
Sequences = Annotated[int, typer.Option("--sequences", metavar="N", min=1, help="how many sequences")]
Length = Annotated[
    int, typer.Option("--length", metavar="T", min=2, help="tokens of a sequence; of random tokens, before the repeat")
]


@dataclass(frozen=True, eq=False)
class Passage:
    """Sequences of one length.

    Attributes:
        tokens: (sequences, tokens) ids.
        first: the first token whose prediction counts.
        told: what they are, in words.
    """

    tokens: Tensor
    first: int
    told: str


def passage(stream: Stream, text: str | None, sequences: int, length: int, seed: int | None = None) -> Passage:
    """The first sequences of a text, the default one where None, or with a seed random tokens said twice.

    Raises:
        UsageError: there is no such text, no tokenizer, too little of it for one sequence, or a text and a seed.
    """
    if seed is not None:
        if text is not None:
            raise UsageError("a text and random tokens", expected="--text or --repeated", do="leave one out")
        vocabulary = stream.write("embed").shape[-1]
        told = f"{sequences} sequences of {length} random tokens (seed {seed}), said twice; the second time counts"
        return Passage(repeated_tokens(vocabulary, length, sequences, seed), length, told)
    source = Path(text) if text not in (None, "-") else text
    documents = token_ids(texts(source), tokenizer_of(stream))
    chunks = (row for each in batches(documents, length, 1) for row in each if len(row) == length)
    held = [row for _, row in zip(range(sequences), chunks, strict=False)]
    name = DEFAULT_TEXT if text is None else text
    if not held:
        raise UsageError(f"less than {length} tokens in {name}", expected="one sequence", do="pass a smaller --length")
    return Passage(torch.stack(held), 1, f"the first {len(held)} sequences of {length} tokens of {name}")


def prompt_tokens(stream: Stream, prompt: str | None, ids: str | None) -> Tensor:
    """The tokens (T,) of a prompt, or of ids such as ``"3,17,5"``.

    Raises:
        UsageError: the ids are no numbers, or the vocabulary does not have them.
    """
    if prompt is not None:
        (tokens,) = token_ids([prompt], tokenizer_of(stream))
        return tokens
    try:
        tokens = torch.tensor([int(each) for each in (ids or "").split(",")])
    except ValueError as error:
        raise UsageError(f"token ids {ids}", expected="whole numbers such as 3,17,5", do="correct them") from error
    vocabulary = stream.write("embed").shape[-1]
    if not bool(((tokens >= 0) & (tokens < vocabulary)).all()):
        raise UsageError(f"token ids {ids}", expected=f"ids from 0 to {vocabulary - 1}", do="correct them")
    return tokens


def token_named(stream: Stream, name: str) -> int:
    """One token by its id, or by its text: ``" Paris"`` with the space before it.

    Raises:
        UsageError: the vocabulary has no such token.
    """
    if name.isdecimal():
        return int(prompt_tokens(stream, None, name))
    known = stream.source.token_texts()
    if known is None or name not in known:
        raise UsageError(
            f"no token {name!r}" if known else f"the checkpoint has no tokenizer to look {name!r} up in",
            expected="one token's text, its space included, or its id",
            do=f"try {' ' + name!r}" if known and f" {name}" in known else "pass a token id",
        )
    return known.index(name)
