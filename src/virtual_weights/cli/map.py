"""``vweights map`` and ``edges``: from a checkpoint to an atlas folder and a report, and what an atlas holds."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from virtual_weights.analysis.memory.neurons import census
from virtual_weights.atlas import Atlas
from virtual_weights.atlas import edges as strongest_edges
from virtual_weights.cli import options as o
from virtual_weights.cli.composition import edge_tables
from virtual_weights.cli.show import Table, line, put_json, steps
from virtual_weights.cli.verb import Session
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.report import write_report
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Stream
from virtual_weights.stream.moments import Moments
from virtual_weights.survey.edges import among_heads, edges_of, groups_of
from virtual_weights.survey.plan import Part, Plan, manifest_of, survey_into

Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="the atlas folder; MODEL.atlas if none")
]
Only = Annotated[
    str | None,
    typer.Option("--only", metavar="PARTS", help=f"some parts, separated by commas: {', '.join(Part)}"),
]
_HIDDEN = ("key", "question")
_LENGTH = 128  # tokens of a chunk


def map_model(
    model: o.Model,
    output: Output = None,
    only: Only = None,
    rotary_offset: o.RotaryOffset = None,
    moments: o.Moments = None,
    text: o.Text = None,
    repeated: o.Repeated = False,
    tokens: o.Tokens = 4096,
    ablate: Annotated[int, typer.Option("--ablate", metavar="N", min=0, help="with a run: edges to remove")] = 16,
    top: o.Top = 10,
    compute_dtype: o.ComputeDtype = "float64",
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = None,
    no_fold: o.NoFold = False,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.Progress = o.ProgressMode.auto,
) -> None:
    """Compute every connection of a model from its weights and write a report. Resumes where it stopped.

    With a text (or --repeated) the model runs, and the report shows what flows and what edges cause.
    """
    began, parts = time.monotonic(), _parts(only)
    if sum((moments is not None, text is not None, repeated)) > 1:
        raise UsageError(
            "more than one source of what flows", expected="one of --moments, --text, --repeated", do="choose"
        )
    folder = output or Path(f"{Path(model.removeprefix('hf://')).name}.atlas")
    opening = {"no_fold": no_fold, "partial": partial, "offline": offline, "allow_non_finite": allow_non_finite}
    manner = {"compute_dtype": compute_dtype, "device": device, "memory_mb": memory_mb}
    with steps(progress) as step:
        stream = Session(model, step, opening).stream
        run = _run(stream, text, repeated, tokens, device)
        plan = Plan(parts, rotary_offset, ablate, None if moments is None else Moments.load(moments, stream))
        records = list(plan.records(survey_into(folder, stream, run, model, step, **manner)))
        report = folder / "report.html"
        write_report(report, records, manifest_of(stream, model))
    summary, seconds = _summary(stream, records, top), time.monotonic() - began
    if as_json:
        paths = {"atlas": str(folder), "report": str(report), "seconds": seconds}
        parameters = {"parts": list(parts), "rotary_offset": rotary_offset, "edges": ablate}
        shape = {"model": model, "question": "map", "parameters": parameters, "stamp": {"norm": stream.norm_stamp}}
        put_json({**shape, "provenance": stream.provenance, "summary": {**paths, **summary}, "rows": []})
        return
    for port, record in among_heads(stream, records).items():
        for part in edge_tables(
            f"{port}-composition · {model} · norm {stream.norm_stamp}", record, edges_of(record, top)
        ):
            part.show() if isinstance(part, Table) else line(part)
    if "statements" in summary:
        line("statements: " + ", ".join(f"{n} {verdict}" for verdict, n in summary["statements"].items()))
    if "ablation" in summary:
        line("removed one by one: {edges} edges, {causal} causal".format(**summary["ablation"]))
    line(f"done in {seconds:.1f} s")
    line(f"atlas:  {folder}")
    line(f"report: {report}")


def edges(
    atlas: Annotated[Path, typer.Argument(metavar="ATLAS", help="folder that vweights map has written")],
    reader: Annotated[
        str | None, typer.Option("--reader", metavar="NAME", help="only edges into it, e.g. L18H6.K, L18H6, L5.mlp.up")
    ] = None,
    writer: Annotated[
        str | None, typer.Option("--writer", metavar="NAME", help="only edges out of it, e.g. L16H0, L3.mlp, embed")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question",
            help="composition (without it), overlap, erasure, contribution, attribution, ablation, neuron_edges",
        ),
    ] = None,
    moments: o.Moments = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="NAME=VALUE", help="only records of this convention, e.g. rotary_offset=2"),
    ] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="COLUMN", help="order; the question's first column")] = None,
    top: o.Top = 20,
    as_json: o.AsJson = False,
) -> None:
    """The strongest edges that an atlas holds: of one reader, of one writer, or of all."""
    chosen = dict(_convention(text) for text in where or [])
    if moments is not None:
        chosen["moments"] = Moments.load(moments).identity
    question = question or ("composition" if moments is None else "contribution")
    store = Atlas.open(atlas)
    rows = strongest_edges(store, reader, writer, question=question, by=by, top=top, where=chosen)
    if as_json:
        parameters = {"reader": reader, "writer": writer, "by": by, "top": top, "where": chosen}
        shape = {"model": store.manifest.get("model"), "question": question, "parameters": parameters}
        provenance = {name: store.manifest.get(name) for name in ("reference", "fingerprint", "version")}
        put_json({**shape, "stamp": {}, "provenance": provenance, "summary": {"atlas": str(atlas)}, "rows": rows})
        return
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _HIDDEN))
    Table(f"{len(rows)} strongest edges · {question} · {atlas}", rows, names).show()


def _convention(text: str) -> tuple[str, Any]:
    """``"rotary_offset=2"`` as a name and a plain value; ``none``, ``true`` and ``false`` are what they say."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--where {text}", expected="NAME=VALUE", do="write for example --where rotary_offset=2")
    words: dict[str, Any] = {"none": None, "true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        return name, float(value)  # equal to the whole number where it is one
    except ValueError:
        return name, value


def _parts(only: str | None) -> tuple[Part, ...]:
    """The parts asked for, in the order of the report."""
    wanted = [name.strip() for name in (only or "").split(",") if name.strip()]
    unknown = [name for name in wanted if name not in tuple(Part)]
    if unknown:
        raise UsageError(f"no part {unknown[0]!r}", expected=", ".join(Part), do="name some of these in --only")
    return tuple(part for part in Part if not wanted or part in wanted)


def _run(stream: Stream, text: str | None, repeated: bool, tokens: int, device: str) -> Run | None:
    if repeated:
        return Run.on_repeats(stream, tokens, _LENGTH, batch=8, device=device)
    return None if text is None else Run.on_text(stream, text, tokens, _LENGTH, batch=8, device=device)


def _summary(stream: Stream, records: list[Record], top: int) -> dict[str, Any]:
    """The map in a few numbers and edges, as plain JSON values."""
    summary: dict[str, Any] = {"composition": {}}
    for port, record in among_heads(stream, records).items():
        edges = edges_of(record, top)
        summary["composition"][port] = {"edges": edges, "groups": groups_of(edges)}
    for record in records:
        if record.question == "neurons":
            counts = census(record)
            summary["neurons"] = {name: counts[name] for name in ("count", "weakening", "strengthening", "between")}
        elif record.question == "bandwidth":
            last = list(record.rows())[-1]
            summary["bandwidth"] = {name: last[name] for name in ("state", "oversubscription", "unread_dim")}
        elif record.question == "ablation":
            rows = [row for row in record.rows() if row["kind"] == "asked"]
            summary["ablation"] = {"edges": len(rows), "causal": sum(row["verdict"] == "causal" for row in rows)}
        elif record.question == "statements":
            summary["statements"] = dict(Counter(map(str, record["verdict"])))
    return summary
