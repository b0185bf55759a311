"""``vweights observe``: run a model on text and keep what it did."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.errors import UsageError
from virtual_weights.record.durable import replacing
from virtual_weights.runtime import load
from virtual_weights.runtime.flow.observation import observe, operating_point
from virtual_weights.runtime.running.text import (
    DEFAULT,
    DEFAULT_TEXT,
    batches,
    repeated_tokens,
    texts,
    token_ids,
    tokenizer_of,
)
from virtual_weights.stream import OperatingPoint, Stream
from virtual_weights.stream.moments import Moments

TextSource = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help=f"a file, a folder, or - for stdin; without it {DEFAULT_TEXT}"),
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="stop after so many tokens")]
ChunkLength = Annotated[int, typer.Option("--length", metavar="T", min=1, help="tokens of a chunk")]
Batch = Annotated[int, typer.Option("--batch", metavar="B", min=1, help="chunks that run at once")]
RunDtype = Annotated[o.StoredDtype, typer.Option("--dtype", help="of the run: float64, float32, float16 or bfloat16")]
Repeated = Annotated[bool, typer.Option("--repeated", help="random tokens, said twice in a chunk, in place of text")]


def observe_model(
    model: o.ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="the safetensors file to write")],
    text: TextSource = None,
    tokens: Tokens = 16384,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="keep the operating point of one prompt instead")
    ] = None,
    ids: Annotated[
        str | None, typer.Option("--prompt-ids", metavar="IDS", help="the same by token ids, e.g. 3,17,5")
    ] = None,
    repeated: Repeated = False,
    length: ChunkLength = 256,
    batch: Batch = 4,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens")] = 0,
    dtype: RunDtype = o.StoredDtype.float32,
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 1024,
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Write moments over text, or with a prompt its operating point, for the questions that take one."""
    if sum((text is not None, prompt is not None, ids is not None, repeated)) > 1:
        raise UsageError(
            "more than one kind of text", expected="one of --text, --repeated, --prompt and --prompt-ids", do="choose"
        )
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        if prompt is not None or ids is not None:
            passage = _prompt(stream, prompt, ids)
            found: OperatingPoint | Moments = operating_point(
                stream, passage, load(stream, dtype=dtype.torch, device=device)
            )
            source = "a prompt"
        else:
            chunks, source = passages(stream, text, tokens, length, batch, seed if repeated else None)
            tick = step("observe")
            runs = load(stream, dtype=dtype.torch, device=device)
            found = observe(stream, chunks, runs, memory_mb=memory_mb, progress=lambda done: tick(done, tokens))
        with replacing(output) as temporary:
            found.save(temporary)
    told = {"model": model, "file": str(output), "text": source, "identity": found.identity, **_told(found)}
    told["provenance"] = stream.provenance
    if as_json:
        put_json(told)
    else:
        _show(told, found)


def passages(
    stream: Stream, text: str | None, tokens: int, length: int, batch: int, seed: int | None
) -> tuple[Iterable[Tensor], str]:
    """Batches of at most so many tokens of a text, or with a seed of random tokens said twice, and what they are.

    Raises:
        UsageError: a text and a seed, no such text, or no tokenizer.
    """
    if seed is not None:
        if text is not None:
            raise UsageError("a text and random tokens", expected="one of --text and --repeated", do="leave one out")
        half = max(1, length // 2)
        rows = repeated_tokens(stream.write("embed").shape[-1], half, -(-tokens // (2 * half)), seed)
        return batches(iter(rows), 2 * half, batch, tokens), f"random tokens (seed {seed}), said twice in a chunk"
    documents = token_ids(texts(text), tokenizer_of(stream))
    return batches(documents, length, batch, tokens), DEFAULT_TEXT if text in (None, DEFAULT) else text


def _prompt(stream: Stream, prompt: str | None, ids: str | None) -> Tensor:
    if ids is None:
        return next(token_ids([prompt or ""], tokenizer_of(stream)))
    try:
        return torch.tensor([int(x) for x in ids.split(",")], dtype=torch.int64)
    except ValueError:
        raise UsageError(f"--prompt-ids {ids}", expected="whole numbers, e.g. 3,17,5", do="correct them") from None


def _told(found: OperatingPoint | Moments) -> dict[str, Any]:
    if isinstance(found, OperatingPoint):
        return {"kind": "operating point", "tokens": len(found.tokens)}
    return {
        "kind": "moments",
        "tokens": found.tokens,
        "length": found.length,
        "heads": found.form,
        "states": {name: values.tolist() for name, values in found.states.items()},
        "attention": {
            f"L{layer}H{i}": dict(zip(("self", "previous", "first"), row, strict=True))
            for layer, rows in found.attention.items()
            for i, row in enumerate(rows.tolist())
        },
    }


def _show(told: dict[str, Any], found: OperatingPoint | Moments) -> None:
    if isinstance(found, Moments):
        rows = zip(range(len(found.states["norm"])), *(found.states[n].tolist() for n in found.states), strict=True)
        table("norm scalars and states of the stream, mean over tokens", ["state", *found.states], list(rows))
        heads = sorted(told["attention"].items(), key=lambda item: -item[1]["previous"])[:10]
        table(
            "heads that most attend to the previous token",
            ["head", "previous", "self", "first"],
            [[name, *(row[n] for n in ("previous", "self", "first"))] for name, row in heads],
        )
        line(f"heads' second moments are {found.form}")
    line(f"{told['kind']} of {told['tokens']} tokens of {told['text']} written to {told['file']}")
