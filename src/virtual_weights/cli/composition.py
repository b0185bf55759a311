"""``vweights composition``: every pair of a writer and a reader of one port."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from virtual_weights.analysis import Composition
from virtual_weights.analysis.pairs.alignment import beside
from virtual_weights.analysis.pairs.contribution import Delivered
from virtual_weights.cli import options as o
from virtual_weights.cli.moments import FlowText, FlowTokens, MomentsFile, moments_of
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import channels_of, edges_of, line, put_json, table
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.record.durable import replacing


def composition(
    model: o.ModelArgument,
    port: Annotated[o.PortName, typer.Option(help="the reader's port")] = o.PortName.K,
    writers: o.WriterOption = o.WriterSet.heads,
    rotary_offset: o.RotaryOffset = None,
    no_fold: o.NoFold = False,
    top: o.Top = 20,
    save: o.SaveFile = None,
    operating_point: MomentsFile = None,
    text: FlowText = None,
    tokens: FlowTokens = 4096,
    dtype: o.ComputeDtype = "float64",
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 256,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Composition of every writer with every later reader of a port, strongest first; with moments what flows, too."""
    if save is not None and save.suffix != ".safetensors":
        raise UsageError(f"--save {save} has another suffix", expected="FILE.safetensors", do="name the file so")
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        question = Composition(port.value, rotary_offset, dtype, device, memory_mb, writers.value)
        record, by = question(stream, step(f"{port.value}-composition")), "score"
        moments = moments_of(stream, operating_point, text, tokens, device, step)
        if moments is not None:
            flow = Delivered(port.value, moments, False, writers.value, rotary_offset, device, memory_mb)
            found = flow(stream, step(f"{port.value}-delivered"))
            record, by = beside(record, found, [c.name for c in found.columns]), "delivered"
    if save is not None:
        save_matrices(record, save)
    edges = edges_of(record, top, by)
    if as_json:
        put_json(
            {
                "model": model,
                "port": port.value,
                "writers": writers.value,
                "norm": record.stamp["norm"],
                "rotary_offset": rotary_offset,
                "by": by,
                "edges": edges,
                "channels": channels_of(edges),
                "stamp": record.stamp,
                "provenance": record.provenance,
            }
        )
        return
    show_edges(f"{port.value}-composition · {model} · norm {record.stamp['norm']}", record, edges)
    if save is not None:
        line(f"matrices written to {save}")


def show_edges(title: str, record: Record, edges: list[dict[str, object]]) -> None:
    """The strongest edges as a table, and below it the distinct channels where readers share one."""
    names = [c.name for c in record.columns]
    rows = [[e["writer"], e["reader"], e.get("channel"), *(e[n] for n in names)] for e in edges]
    table(title, ["writer", "reader", "shared channel", *names], rows)
    grouped = channels_of(edges)
    if len(grouped) < len(edges):
        channels = "one channel" if len(grouped) == 1 else f"{len(grouped)} channels"
        line(f"{len(edges)} edges are {channels}, because query heads share key and value heads:")
        table(
            "",
            ["writer", "channel", "readers", "score"],
            [[g["writer"], g["channel"], " ".join(g["readers"]), g["score"]] for g in grouped],
        )


def save_matrices(record: Record, path: Path) -> None:
    """Every column as a matrix (readers, writers), NaN where the writer cannot reach, labels in the metadata."""
    metadata = {
        "question": record.question,
        "readers": json.dumps(record.axis("reader").labels),
        "writers": json.dumps(record.axis("writer").labels),
        "parameters": json.dumps(record.parameters),
        "stamp": json.dumps(record.stamp),
        "provenance": json.dumps(record.provenance),
    }
    matrices = {c.name: c.values.contiguous() for c in record.columns if not isinstance(c.values, tuple)}
    with replacing(path) as temporary:
        save_file(matrices, temporary, metadata)
