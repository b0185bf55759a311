"""``vweights agree``: how far a score from weights, or moments of another text, can be trusted on this model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from torch import Tensor

from virtual_weights.analysis.agreement import agreement
from virtual_weights.analysis.composition import Composition
from virtual_weights.analysis.delivered import Delivered
from virtual_weights.analysis.overlap import Overlap
from virtual_weights.analysis.sides import HEAD_PORTS
from virtual_weights.analysis.stacks import HeadPort
from virtual_weights.cli import options as o
from virtual_weights.cli.observe import Batch, ChunkLength, Repeated, TextSource, Tokens, passages
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.errors import UsageError
from virtual_weights.runtime import load
from virtual_weights.runtime.observe import observe
from virtual_weights.runtime.text import batches
from virtual_weights.stream import Stream
from virtual_weights.stream.moments import Moments

_SHOWN = ("predictor", "port", "per_reader_rank_correlation", "rank_correlation", "precision_at_20")


def agree(
    model: o.ModelArgument,
    text: TextSource = None,
    repeated: Repeated = False,
    tokens: Tokens = 4096,
    length: ChunkLength = 256,
    batch: Batch = 4,
    centred: Annotated[bool, typer.Option("--centred", help="leave out what a writer says to every token")] = False,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens")] = 0,
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 1024,
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Rank correlation of each predictor of edges between heads with the energy that a run delivers.

    The moments that predict are of other text: the default text where --text names one, or of --repeated tokens another
    seed's; else the tokens that come before those of the target.
    """
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        first, second, told = _texts(stream, text, tokens, length, batch, seed if repeated else None)
        runs = load(stream, device=device)
        ticks = step("observe one text"), step("observe another")
        before, target = (
            observe(stream, each, runs, memory_mb=memory_mb, progress=lambda done, t=tick: t(done, tokens))
            for each, tick in zip((first, second), ticks, strict=True)
        )
        tick = step("agreement")
        rows: list[dict[str, Any]] = []
        for done, port in enumerate(HEAD_PORTS, 1):
            rows += _rows(stream, port, before, target, centred, device)
            tick(done, len(HEAD_PORTS))
    found = {
        "model": model,
        "agreement": rows,
        "predicted_from": told[0],
        "target_text": told[1],
        "tokens": [before.tokens, target.tokens],
        "heads": target.form,
        "moment": "centred" if centred else "uncentred",
        "provenance": stream.provenance,
    }
    if as_json:
        put_json(found)
        return
    title = f"rank correlation with delivered energy, heads to heads · {model}"
    table(title, list(_SHOWN), [[row[name] for name in _SHOWN] for row in rows])
    line(f"delivered: {target.tokens} tokens of {told[1]}; data-aware: {before.tokens} tokens of {told[0]}")


def _texts(
    stream: Stream, text: str | None, tokens: int, length: int, batch: int, seed: int | None
) -> tuple[list[Tensor], list[Tensor], tuple[str, str]]:
    """What predicts, what is predicted, and what they are."""
    if seed is not None or text is not None:
        first, before = passages(stream, None, tokens, length, batch, None if seed is None else seed + 1)
        second, after = passages(stream, text, tokens, length, batch, seed)
        return list(first), list(second), (before, after)
    chunks, name = passages(stream, None, 2 * tokens, length, 1, None)
    rows = [row for each in chunks for row in each]
    half = (len(rows) + 1) // 2
    first, second = (list(batches(part, length, batch)) for part in (rows[:half], rows[half:]))
    return first, second, (f"{name}, earlier", f"{name}, later")


def _rows(
    stream: Stream, port: HeadPort, before: Moments, target: Moments, centred: bool, device: str
) -> list[dict[str, Any]]:
    delivered = Delivered(port, target, centred, device=device)(stream)
    if not bool(delivered.present().any()):
        raise UsageError(
            "no head reads what another wrote", expected="two layers of attention", do="take another model"
        )
    composition = Composition(port, device=device)(stream)
    predictors = {
        "data-aware": (Delivered(port, before, centred, device=device)(stream), "delivered"),
        "composition": (composition, "score"),
        "strength": (composition, "strength"),
        "overlap": (Overlap(port, device)(stream), "overlap"),
    }
    rows: list[dict[str, Any]] = []
    for name, (record, column) in predictors.items():
        found = asdict(agreement(record, delivered, column, "delivered"))
        rows.append(
            {
                "predictor": name,
                "port": port,
                "target": "delivered",
                "per_reader_rank_correlation": found["per_reader"],
                "rank_correlation": found["overall"],
                "precision_at_20": found["precision"],
                "readers": found["readers"],
                "edges": found["edges"],
            }
        )
    return rows
