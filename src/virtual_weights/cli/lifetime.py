"""``vweights lifetime``: what becomes of what parts wrote, and who takes it back."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.observe import Batch, ChunkLength, Repeated, RunDtype, TextSource, Tokens, passages
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.runtime import load
from virtual_weights.runtime.fate.persistence import Lifetime, lifetime

_ERASERS = 3  # named for each writer
_SHOWN = ("writer", "start", "final", "lowest", "lowest_state", "half_state", "eraser", "taken")


def follow(
    model: o.ModelArgument,
    writer: Annotated[
        str | None, typer.Option("--writer", metavar="NAME", help="follow one, e.g. L5H3, L2.mlp, embed")
    ] = None,
    text: TextSource = None,
    tokens: Tokens = 2048,
    repeated: Repeated = False,
    centred: Annotated[bool, typer.Option("--centred", help="leave out what a writer says to every token")] = False,
    length: ChunkLength = 256,
    batch: Batch = 4,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens")] = 0,
    top: o.Top = 20,
    dtype: RunDtype = o.StoredDtype.float32,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Projection of the stream on what each part wrote, state by state, and the later parts that make it fall."""
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        chunks, source = passages(stream, text, tokens, length, batch, seed if repeated else None)
        runs, tick = load(stream, dtype=dtype.torch, device=device), step("lifetime")
        found = lifetime(stream, chunks, runs, centred=centred, progress=lambda done: tick(done, tokens))
    told: dict[str, Any] = {"model": model, "text": source, "stamp": found.projection.stamp}
    told |= _one(found, writer, top) if writer is not None else _all(found, top)
    told["provenance"] = stream.provenance
    if as_json:
        put_json(told)
        return
    title = f"{writer} · {model}" if writer else f"writers of which least is left at the end · {model}"
    table(title, list(_SHOWN), [[row[name] for name in _SHOWN] for row in told["lifetime"]])
    if writer is not None:
        (row,) = told["lifetime"]
        table("the stream on what it wrote", ["state", "projection"], list(enumerate(row["projection"], row["state"])))
    shown = [[row[name] for name in ("writer", "eraser", "share")] for row in told["erased_by"]]
    table("who takes it back (negative) or adds to it", ["writer", "later writer", "share"], shown)
    line(f"{found.projection.stamp['tokens']} tokens of {source}, weighted by {found.projection.stamp['weight']}")


def _all(found: Lifetime, top: int) -> dict[str, Any]:
    """The writers of which least is left, and for each the three later writers that take back most."""
    rows = sorted(found.summary.rows(), key=lambda row: abs(_number(row["final"])))[:top]
    shares = [each for row in rows for each in _shares(found, str(row["writer"]))[:_ERASERS] if each["share"] < 0]
    return {"lifetime": rows, "erased_by": shares}


def _one(found: Lifetime, writer: str, top: int) -> dict[str, Any]:
    """One writer: its projection at every state from its first, and the later writers that matter most to it."""
    (row,) = found.summary.select("writer", [writer]).rows()
    along = [each["projection"] for each in found.projection.select("writer", [writer]).rows()]
    state = len(found.projection.axis("state").labels) - len(along)
    shares = sorted(_shares(found, writer), key=lambda each: -abs(each["share"]))
    return {"lifetime": [row | {"projection": along, "state": state}], "erased_by": shares[:top]}


def _shares(found: Lifetime, writer: str) -> list[dict[str, Any]]:
    """What every later writer adds, most negative first."""
    rows: list[dict[str, Any]] = list(found.erased_by.select("writer", [writer]).rows())
    return sorted(rows, key=lambda each: each["share"])


def _number(value: Any) -> float:
    return float(value)
