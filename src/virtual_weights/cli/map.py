"""``vweights map`` and ``edges``: from a checkpoint to an atlas folder and a report, and what an atlas holds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.composition import edge_tables
from virtual_weights.cli.show import Table, line, put_json, show_all, steps
from virtual_weights.cli.statements import counted
from virtual_weights.cli.verb import Session, need_runtime
from virtual_weights.errors import UsageError

if TYPE_CHECKING:
    from virtual_weights.record import Axis


PARTS = "composition, overlap, subspaces, bandwidth, memory, neurons, superposition, basis, statements"
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="DIR", callback=o.checked_folder, help="folder of the atlas; MODEL.atlas by default"
    ),
]
Only = Annotated[
    str | None,
    typer.Option("--only", metavar="PARTS", help=f"only these parts, separated by commas: {PARTS}"),
]
_HIDDEN = ("key", "question", "port", "edge", "shared_with")
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
    edge_count: Annotated[
        int, typer.Option("--edges", metavar="N", min=0, help="with --text or --repeated: how many edges to remove")
    ] = 16,
    top: o.Top = 10,
    compute_dtype: o.ComputeDtype = "float64",
    device: o.Device = "cpu",
    memory_mb: o.Memory = None,
    no_fold: o.NoFold = False,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.Progress = o.ProgressMode.auto,
) -> None:
    """Compute every connection of a model from its weights and write a report. Resumes where it stopped.

    With --text or --repeated the model also runs. The report then shows how much each connection carries on the text,
    and what removing the strongest ones costs.
    """
    from virtual_weights.report import write_report
    from virtual_weights.survey.plan import manifest_of, survey_into

    began, parts = time.monotonic(), _parts(only)
    _check_source(moments, text, repeated)
    folder = output or Path(f"{Path(model.removeprefix('hf://')).name}.atlas")
    o.checked_folder(folder)
    opening = {"no_fold": no_fold, "partial": partial, "offline": offline, "allow_non_finite": allow_non_finite}
    manner = {"compute_dtype": compute_dtype, "device": device, "memory_mb": memory_mb}
    with steps(progress) as step:
        stream = Session(model, step, opening).stream
        run = _run(stream, text, repeated, tokens, device)
        plan = vw.Plan(parts, rotary_offset, edge_count, None if moments is None else vw.Moments.load(moments, stream))
        records = list(plan.records(survey_into(folder, stream, run, model, step, **manner)))
        report = folder / "report.html"
        write_report(report, records, manifest_of(stream, model))
    summary, seconds = _summary(stream, records, top), time.monotonic() - began
    if as_json:
        paths = {"atlas": str(folder), "report": str(report), "seconds": seconds}
        parameters = {"parts": list(parts), "rotary_offset": rotary_offset, "edges": edge_count}
        rows = [edge for figures in summary["composition"].values() for edge in figures["edges"]]
        shape = {"model": model, "question": "map", "parameters": parameters, "stamp": {"norm": stream.norm_stamp}}
        put_json({**shape, "provenance": stream.provenance, "summary": {**paths, **summary}, "rows": rows})
        return
    _show(model, stream, records, summary, top)
    line(f"done in {seconds:.1f} s")
    line(f"atlas:  {folder}")
    line(f"report: {report}")


def _check_source(moments: Path | None, text: str | None, repeated: bool) -> None:
    """Refuse two sources of what flows, and a run that cannot be."""
    if sum((moments is not None, text is not None, repeated)) > 1:
        raise UsageError(
            "more than one source of text or moments",
            expected="one of --moments, --text, --repeated",
            do="keep one of them",
        )
    if text is not None or repeated:
        need_runtime()


def _show(model: str, stream: vw.Stream, records: list[vw.Record], summary: dict[str, Any], top: int) -> None:
    """The strongest edges as tables, and the rest in a line each."""
    from virtual_weights.survey.edges import among_heads, edges_of

    for port, record in among_heads(stream, records).items():
        title = f"{port}-composition · {model} · norm {stream.norm_stamp}"
        show_all(edge_tables(title, record, edges_of(record, top)))
    if "statements" in summary:
        line(f"statements: {counted(summary['statements'])}")
    if "ablation" in summary:
        line("ablation: {edges} edges removed one by one, {causal} of them causal".format(**summary["ablation"]))


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
            metavar="NAME",
            help="which answers: composition, the default, or overlap, erasure, contribution, attribution, ablation, "
            "neuron_edges",
        ),
    ] = None,
    moments: o.Moments = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="NAME=VALUE", help="only results with this parameter, e.g. rotary_offset=2"),
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="COLUMN", help="column to sort by; the first by default")
    ] = None,
    top: o.Top = 20,
    as_json: o.AsJson = False,
) -> None:
    """Show the strongest connections in an atlas: those of one reader, those of one writer, or all."""
    chosen = dict(_convention(text) for text in where or [])
    if moments is not None:
        chosen["moments"] = vw.Moments.load(moments).identity
    question = question or ("composition" if moments is None else "contribution")
    store = vw.Atlas.open(atlas)
    rows = vw.edges(store, reader, writer, question=question, by=by, top=top, where=chosen)
    headers = {key: store.header(key) for key in {row["key"] for row in rows}}
    rows = [_edge(headers[row["key"]].axes, row) for row in rows]
    if as_json:
        parameters = {"reader": reader, "writer": writer, "by": by, "top": top, "where": chosen}
        shape = {"model": store.manifest.get("model"), "question": question, "parameters": parameters}
        provenance = {name: store.manifest.get(name) for name in ("reference", "fingerprint", "version")}
        put_json({**shape, "stamp": {}, "provenance": provenance, "summary": {"atlas": str(atlas)}, "rows": rows})
        return
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _HIDDEN))
    Table(f"the {len(rows)} strongest edges · {question} · {atlas}", rows, names).show()


def _edge(axes: Sequence[Axis], row: dict[str, Any]) -> dict[str, Any]:
    """A stored edge with the names that all verbs use, and who shares its group."""
    edge = {"writer": row["writer"], "reader": row["reader"], **row}
    if isinstance(edge.get("shared_with"), str):  # a column of ablations: names in one text
        edge["shared_with"] = edge["shared_with"].split()
    if group := edge.pop("reader_group", None):
        axis = next(axis for axis in axes if axis.name == "reader")
        names = [name for name, other in zip(axis.labels, axis.groups, strict=True) if other == group]
        edge |= {"group": group, "shared_with": [n.partition(".")[0] for n in names if n != row["reader"]]}
    return edge


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


def _parts(only: str | None) -> tuple[vw.Part, ...]:
    """The parts asked for, in the order of the report."""
    wanted = [name.strip() for name in (only or "").split(",") if name.strip()]
    unknown = [name for name in wanted if name not in tuple(vw.Part)]
    if unknown:
        raise UsageError(f"no part {unknown[0]!r}", expected=", ".join(vw.Part), do="name some of these in --only")
    return tuple(part for part in vw.Part if not wanted or part in wanted)


def _run(stream: vw.Stream, text: str | None, repeated: bool, tokens: int, device: str) -> vw.Run | None:
    if repeated:
        return vw.Run.on_repeats(stream, tokens, _LENGTH, batch=8, device=device)
    return None if text is None else vw.Run.on_text(stream, text, tokens, _LENGTH, batch=8, device=device)


def _summary(stream: vw.Stream, records: list[vw.Record], top: int) -> dict[str, Any]:
    """The map in a few numbers and edges, as plain JSON values."""
    from virtual_weights.analysis.memory.neurons import census
    from virtual_weights.survey.edges import among_heads, edges_of, groups_of

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
