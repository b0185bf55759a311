"""Moments for a command that weighs edges by what flows: kept in a file, or observed now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from virtual_weights.cli.observe import passages
from virtual_weights.cli.progress import Tick
from virtual_weights.errors import UsageError
from virtual_weights.runtime import load
from virtual_weights.runtime.flow.observation import observe
from virtual_weights.stream import Stream
from virtual_weights.stream.moments import Moments

MomentsFile = Annotated[
    Path | None,
    typer.Option("--operating-point", metavar="FILE", help="moments that vweights observe wrote: say what flows"),
]
FlowText = Annotated[
    str | None,
    typer.Option(
        "--text", metavar="FILE", help="run the model on it and say what flows: a file, a folder, -, or 'default'"
    ),
]
FlowTokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="of the text; stop after so many")]


def moments_of(
    stream: Stream, file: Path | None, text: str | None, tokens: int, device: str, step: Callable[[str], Tick]
) -> Moments | None:
    """The moments of a file or a text; None where neither is named.

    Raises:
        UsageError: both are.
    """
    if file is not None and text is not None:
        raise UsageError("a text and an operating point", expected="one of both", do="leave one out")
    if file is not None:
        return Moments.load(file, stream)
    if text is None:
        return None
    chunks, _ = passages(stream, text, tokens, 256, 4, None)
    tick = step("observe")
    return observe(stream, chunks, load(stream, device=device), progress=lambda done: tick(done, tokens))
