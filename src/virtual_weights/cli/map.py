"""``vweights map``: the main job, from a checkpoint to an atlas folder and a report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from virtual_weights.analysis.memory.neurons import census
from virtual_weights.atlas import Atlas
from virtual_weights.cli import options as o
from virtual_weights.cli.composition import show_edges
from virtual_weights.cli.flow import Flow, from_file
from virtual_weights.cli.job import Job, Part, among_heads
from virtual_weights.cli.manifest import manifest_of
from virtual_weights.cli.moments import FlowText, FlowTokens, MomentsFile
from virtual_weights.cli.observe import Repeated
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import channels_of, edges_of, line, put_json
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.report import write_report
from virtual_weights.stream import Stream

Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="the atlas folder; MODEL.atlas if none")
]
Only = Annotated[
    str | None,
    typer.Option("--only", metavar="PARTS", help=f"some parts, separated by commas: {', '.join(Part)}"),
]


def map_model(
    model: o.ModelArgument,
    output: Output = None,
    only: Only = None,
    no_fold: o.NoFold = False,
    rotary_offset: o.RotaryOffset = None,
    operating_point: MomentsFile = None,
    text: FlowText = None,
    repeated: Repeated = False,
    tokens: FlowTokens = 4096,
    prove: Annotated[int, typer.Option("--prove", metavar="N", min=0, help="of the text: edges to remove")] = 16,
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
    """Compute who talks to whom and how crowded the stream is, write the atlas and its report; resumes.

    With a text (or random tokens, --repeated) the model runs, and the report says what flows and what edges cause.
    """
    began = time.monotonic()
    parts, flow = _parts(only), _flow(operating_point, text, repeated, tokens, prove)
    folder = output or Path(f"{Path(model.removeprefix('hf://')).name}.atlas")
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        manifest = manifest_of(stream, model)
        job = Job(Atlas.create(folder, manifest), stream, step, rotary_offset, dtype, device, memory_mb)
        records = list(flow(job, parts))
        report = folder / "report.html"
        write_report(report, records, manifest)
    found = _summary(stream, records, top)
    seconds = time.monotonic() - began
    if as_json:
        put_json(
            {
                "model": model,
                "atlas": str(folder),
                "report": str(report),
                "seconds": seconds,
                "norm": stream.norm_stamp,
                **found,
            }
        )
        return
    for port, record in among_heads(stream, records).items():
        show_edges(f"{port}-composition · {model} · norm {stream.norm_stamp}", record, edges_of(record, top))
    _tell(found)
    line(f"done in {seconds:.1f} s")
    line(f"atlas:  {folder}")
    line(f"report: {report}")


def _tell(found: dict[str, Any]) -> None:
    if "statements" in found:
        line("statements: " + ", ".join(f"{n} {verdict}" for verdict, n in found["statements"].items()))
    if "proved" in found:
        line("removed one by one: {asked} edges, {causal} causal".format(**found["proved"]))


def _parts(only: str | None) -> tuple[Part, ...]:
    """The parts asked for, in the order of the report."""
    wanted = [name.strip() for name in (only or "").split(",") if name.strip()]
    unknown = [name for name in wanted if name not in tuple(Part)]
    if unknown:
        raise UsageError(f"no part {unknown[0]!r}", expected=", ".join(Part), do="name some of these in --only")
    return tuple(part for part in Part if not wanted or part in wanted)


def _flow(
    operating_point: Path | None, text: str | None, repeated: bool, tokens: int, prove: int
) -> Callable[[Job, tuple[Part, ...]], Iterator[Record]]:
    """The records of a map: of its parts, and of what is to be said about a run."""
    if sum((operating_point is not None, text is not None, repeated)) > 1:
        raise UsageError(
            "more than one source of what flows", expected="one of --operating-point, --text, --repeated", do="choose"
        )

    def answers(job: Job, parts: tuple[Part, ...]) -> Iterator[Record]:
        if text is None and not repeated:
            yield from job.answers(parts)
            yield from () if operating_point is None else from_file(job, operating_point)
            return
        flow = Flow(job, text, 0 if repeated else None, tokens, prove)
        yield from job.answers(part for part in parts if part is not Part.statements)
        yield from flow.answers()
        if Part.statements in parts and job.stream.folded:
            yield flow.statements()

    return answers


def _summary(stream: Stream, records: list[Record], top: int) -> dict[str, Any]:
    """What the map found, in a few numbers and edges, as plain JSON values."""
    found: dict[str, Any] = {"composition": {}}
    for port, record in among_heads(stream, records).items():
        edges = edges_of(record, top)
        found["composition"][port] = {"edges": edges, "channels": channels_of(edges)}
    for record in records:
        if record.question == "neurons":
            counts = census(record)
            found["neurons"] = {name: counts[name] for name in ("count", "weakening", "strengthening", "between")}
        elif record.question == "bandwidth":
            last = list(record.rows())[-1]
            found["bandwidth"] = {name: last[name] for name in ("state", "oversubscription", "unread_dim")}
        elif record.question == "prove":
            rows = [row for row in record.rows() if row["kind"] == "asked"]
            found["proved"] = {"asked": len(rows), "causal": sum(row["verdict"] == "causal" for row in rows)}
        elif record.question == "statements":
            found["statements"] = dict(Counter(map(str, record["verdict"])))
    return found
