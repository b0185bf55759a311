"""``vweights channel``: the spectrum of one virtual weight."""

from __future__ import annotations

from typing import Annotated

import typer

from virtual_weights.analysis import Channel, summary
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table


def channel(
    model: o.ModelArgument,
    writer: Annotated[str, typer.Argument(help="e.g. L16H0, L3.mlp, L3N7, embed")],
    reader: Annotated[str, typer.Argument(help="e.g. L17H3.K, L5.mlp.up, unembed")],
    rotary_offset: o.RotaryOffset = None,
    no_fold: o.NoFold = False,
    top: o.Top = 12,
    seed: Annotated[int, typer.Option(help="seed of the null's random rotations")] = 0,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Spectrum and effective ranks of the virtual weight from WRITER to READER."""
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        record = Channel(writer, reader, rotary_offset, seed=seed)(stream)
    figures, gains = summary(record), [row["gain"] for row in record.rows()]
    if as_json:
        put_json(
            {
                "model": model,
                "writer": writer,
                "reader": reader,
                "rotary_offset": rotary_offset,
                "norm": record.stamp["norm"],
                **figures,
                "singular_values": gains,
                "provenance": record.provenance,
            }
        )
        return
    table(f"{writer} -> {reader} · {model}", ["quantity", "value"], list(figures.items()))
    rows = [[row["direction"], row["gain"], row["energy"]] for row in record.rows()][:top]
    table(f"the {len(rows)} largest of {len(gains)} gains", ["direction", "gain", "energy"], rows)
    line(f"norm {record.stamp['norm']}; the null's edge is the 99% quantile of the largest gain at random orientation")
