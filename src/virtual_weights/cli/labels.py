"""``vweights labels``: what heads do, by where they attend."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.runtime import load
from virtual_weights.runtime.flow.labels import BEHAVIOURS, labels
from virtual_weights.runtime.running.text import repeated_tokens


def label_heads(
    model: o.ModelArgument,
    threshold: Annotated[float, typer.Option("--threshold", help="least mean attention for a label")] = 0.4,
    length: Annotated[int, typer.Option("--length", min=2, help="random tokens before the repeat")] = 64,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="how many sequences")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="of the random tokens")] = 0,
    top: o.Top = 6,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Previous-token, induction, duplicate-token, self and first-token heads, by attention on random tokens."""
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        runs = load(stream, device=device)
        tokens = repeated_tokens(stream.write("embed").shape[-1], length, sequences, seed)
        record = labels(stream, runs, tokens, threshold=threshold, progress=step("labels"))
    rows = list(record.rows())
    if as_json:
        told: dict[str, Any] = {"model": model, "heads": rows, "seed": seed, **record.stamp}
        told["parameters"] = record.parameters
        put_json({**told, "provenance": record.provenance})
        return
    for name, meaning in BEHAVIOURS.items():
        best = list(record.top(top, name).rows())
        title = f"{name.replace('_', ' ')}: {meaning} · {model}"
        table(title, ["head", name, "label"], [[row["head"], row[name], row["label"]] for row in best])
    named = sum(row["label"] is not None for row in rows)
    line(f"{named} of {len(rows)} heads put more than {threshold} of their attention on one kind of place")
