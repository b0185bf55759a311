"""``vweights cleared``: which neurons, heads and MLPs clear what they read, always or on some tokens of a text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.observe import Batch, ChunkLength, Repeated, RunDtype, TextSource, Tokens, passages
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.record import Record
from virtual_weights.runtime import load
from virtual_weights.runtime.fate.erased import Thresholds, cleared

_SHOWN = ("eraser", "mean", "spread", "cleared", "strengthened", "bimodality", "tokens")
_VERDICTS: tuple[str, ...] = ("unconditional", "conditional", "rare", "never")


class EraserKind(StrEnum):
    """What erases."""

    neuron = "neuron"
    head = "head"
    mlp = "mlp"


def cleared_on_text(
    model: o.ModelArgument,
    text: TextSource = None,
    tokens: Tokens = 16384,
    repeated: Repeated = False,
    length: ChunkLength = 256,
    batch: Batch = 4,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens")] = 0,
    clears: Annotated[float, typer.Option("--clears", metavar="C", help="a coefficient above this clears")] = 0.5,
    kind: Annotated[EraserKind, typer.Option("--kind", help="which erasers to show; counts are of all")] = (
        EraserKind.neuron
    ),
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many erasers of each table to show")] = 10,
    dtype: RunDtype = o.StoredDtype.float32,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Clearing coefficients over a text: who clears what it reads on all tokens, on some, or on few."""
    limits = Thresholds(clears)
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        chunks, source = passages(stream, text, tokens, length, batch, seed if repeated else None)
        tick = step("cleared")
        runs = load(stream, dtype=dtype.torch, device=device)
        record = cleared(stream, chunks, runs, thresholds=limits, progress=lambda done: tick(done, tokens))
    counts, best = _counts(record), {name: _most(record, kind, name, top) for name in ("unconditional", "conditional")}
    if as_json:
        told = {"model": model, "cleared": [row for rows in best.values() for row in rows], "counts": counts}
        told |= {"source": source, **record.stamp, "parameters": record.parameters}
        put_json({**told, "provenance": record.provenance})
        return
    title = f"erasers of {model} on {record.stamp['tokens']} tokens"
    table(title, ["kind", *_VERDICTS], [[name, *row.values()] for name, row in counts.items()])
    for name, rows in best.items():
        order = "by share of tokens, then nearest 1" if name == "unconditional" else "by bimodality"
        title = f"the {len(rows)} most {name} of kind {kind.value}, {order}"
        table(title, list(_SHOWN), [[row[each] for each in _SHOWN] for row in rows])
    line(
        f"coefficient above {clears:g}: on {limits.always:.0%} of tokens or more unconditional, on {limits.seldom:.0%}"
    )
    line(f"or more conditional, else rare; of heads and MLPs cut to ±{limits.tail:g}, but for shares · {source}")


def _counts(record: Record) -> dict[str, dict[str, int]]:
    """How many erasers of each kind have each verdict."""
    counts: dict[str, dict[str, int]] = {kind.value: dict.fromkeys(_VERDICTS, 0) for kind in EraserKind}
    for row in record.rows():
        counts[str(row["kind"])][str(row["verdict"] or "never")] += 1
    return counts


def _most(record: Record, kind: EraserKind, verdict: str, top: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [r for r in record.rows() if (r["kind"], r["verdict"]) == (kind.value, verdict)]
    if verdict == "unconditional":
        rows.sort(key=lambda row: (-row["cleared"], abs(row["mean"] - 1)))
    else:
        rows.sort(key=lambda row: -(row["bimodality"] or 0))
    return rows[:top]
