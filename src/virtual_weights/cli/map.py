"""``vweights map``: the main job, from a checkpoint to an atlas folder and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from virtual_weights.analysis import Composition, Overlap
from virtual_weights.atlas import Atlas, task_key
from virtual_weights.cli import options as o
from virtual_weights.cli.composition import show_edges
from virtual_weights.cli.manifest import manifest_of
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import Tick, steps
from virtual_weights.cli.show import channels_of, edges_of, line, put_json
from virtual_weights.record import Record
from virtual_weights.report import write_report
from virtual_weights.stream import Stream

Question = Composition | Overlap
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="the atlas folder; MODEL.atlas if none")
]


def map_model(
    model: o.ModelArgument,
    output: Output = None,
    no_fold: o.NoFold = False,
    rotary_offset: o.RotaryOffset = None,
    top: o.Top = 10,
    dtype: o.ComputeDtype = "float64",
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 256,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Compute who composes with whom, write the atlas and its report, print the strongest edges."""
    began = time.monotonic()
    folder = output or Path(f"{Path(model.removeprefix('hf://')).name}.atlas")
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        manifest = manifest_of(stream, model)
        atlas = Atlas.create(folder, manifest)
        wanted: list[Question] = [
            *(Composition(port, rotary_offset, dtype, device, memory_mb) for port in ("Q", "K", "V")),
            *(Overlap(port, device, memory_mb) for port in ("Q", "K", "V")),
        ]
        records = list(_answers(atlas, stream, wanted, step))
        report = folder / "report.html"
        write_report(report, records, manifest)
    answered = [(record, edges_of(record, top)) for record in records if record.question == "composition"]
    if as_json:
        put_json(_summary(model, folder, report, answered, time.monotonic() - began))
        return
    for record, edges in answered:
        show_edges(f"{record.parameters['port']}-composition · {model} · norm {record.stamp['norm']}", record, edges)
    line(f"done in {time.monotonic() - began:.1f} s")
    line(f"atlas:  {folder}")
    line(f"report: {report}")


def _answers(atlas: Atlas, stream: Stream, wanted: list[Question], step: Callable[[str], Tick]) -> Iterator[Record]:
    """Answer every question, taking from the atlas what an earlier run has finished."""
    for question in wanted:
        name = f"{question.question} {question.port}"
        key = task_key(stream.source.fingerprint, question.question, question.parameters, {"norm": stream.norm_stamp})
        if atlas.finished(key):
            yield atlas.get(key)
            continue
        began = time.monotonic()
        record = question(stream, step(name))
        atlas.put(record, key=key, seconds=time.monotonic() - began)
        yield record


def _summary(
    model: str, folder: Path, report: Path, answered: list[tuple[Record, list[dict[str, Any]]]], seconds: float
) -> dict[str, Any]:
    return {
        "model": model,
        "atlas": str(folder),
        "report": str(report),
        "seconds": seconds,
        "norm": answered[0][0].stamp["norm"],
        "composition": {
            record.parameters["port"]: {"edges": edges, "channels": channels_of(edges)} for record, edges in answered
        },
    }
