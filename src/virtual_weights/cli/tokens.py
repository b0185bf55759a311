"""The tokens that a command runs a model on: a text cut into sequences, or random tokens said twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.runtime.text import batches, repeated_tokens, texts, token_ids, tokenizer_of
from virtual_weights.stream import Stream

TextFile = Annotated[
    str | None,
    typer.Option(
        "--text", metavar="FILE", help="a file, a folder or - for stdin; without it random tokens, said twice"
    ),
]
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


def passage(stream: Stream, text: str | None, sequences: int, length: int, seed: int) -> Passage:
    """The first sequences of a text, or random tokens of which the second time counts.

    Raises:
        UsageError: there is no such text, no tokenizer, or too little of it for one sequence.
    """
    if text is None:
        vocabulary = stream.write("embed").shape[-1]
        told = f"{sequences} sequences of {length} random tokens (seed {seed}), said twice; the second time counts"
        return Passage(repeated_tokens(vocabulary, length, sequences, seed), length, told)
    documents = token_ids(texts(text if text == "-" else Path(text)), tokenizer_of(stream))
    chunks = (row for each in batches(documents, length, 1) for row in each if len(row) == length)
    held = [row for _, row in zip(range(sequences), chunks, strict=False)]
    if not held:
        raise UsageError(f"less than {length} tokens in {text}", expected="one sequence", do="pass a smaller --length")
    return Passage(torch.stack(held), 1, f"the first {len(held)} sequences of {length} tokens of {text}")
