"""``vweights status``, ``report`` and ``export``: what is in an atlas, as a page, and as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.map import convention
from virtual_weights.cli.show import Answer, Table, steps

if TYPE_CHECKING:
    from virtual_weights.record import Header

_RECORDS = ("question", "records", "edges", "megabytes", "seconds")
_UNFINISHED = ("question", "about", "done", "blocks", "megabytes")


def status(
    atlas: o.AtlasFolder,
    check: Annotated[
        bool, typer.Option("--check", help="compare every file with its checksum; exit code 1 if one differs")
    ] = False,
    as_json: o.AsJson = False,
    progress: o.Progress = o.ProgressMode.auto,
) -> None:
    """Show what is in an atlas: answers by question, unfinished work, and whether a run is at work on it."""
    store = vw.Atlas.open(atlas)
    with steps(progress) as step:
        found = vw.status(store, check=check, progress=step("check"))
    model, records = str(store.manifest.get("model") or store.fingerprint), found.records
    figures: dict[str, Any] = {"records": sum(r["records"] for r in records), "bytes": sum(r["bytes"] for r in records)}
    figures["seconds"] = sum(row["seconds"] or 0.0 for row in records)
    figures |= {"at_work": found.at_work, "unfinished": list(found.unfinished)}
    figures |= {"checked": found.checked, "faults": list(found.faults)} if check else {}
    shown: list[Table | str] = [f"{model} · {figures['records']} records · {atlas}"]
    shown.append(Table("", [{**row, "megabytes": row["bytes"] / 1e6} for row in records], _RECORDS))
    if found.unfinished:
        rows = [
            {**row, "megabytes": row["bytes"] / 1e6, "about": _about(row["parameters"])} for row in found.unfinished
        ]
        shown.append(Table("unfinished: blocks that are done, of all", rows, _UNFINISHED))
    shown.append(f"{found.at_work or 'nobody'} is at work on it")
    if found.checked is not None:
        shown.append(f"checked: {found.checked} files, {len(found.faults)} faults")
        shown += [f"fault: {fault}" for fault in found.faults]
    header = _header(store, "status", {"check": check})
    Answer(header, records, {"atlas": str(atlas), **figures}, shown).give(model, as_json)
    if found.faults:
        raise typer.Exit(1)


def report(
    atlas: o.AtlasFolder,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=o.checked_file,
            help="HTML file to write; by default the atlas's own, with what vweights serve shows",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="OTHER", help="another atlas, with whose pairs the page Compare compares"),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Write the report of an atlas anew, in one HTML file that needs nothing else."""
    store, other = vw.Atlas.open(atlas), None if against is None else vw.Atlas.open(against)
    path = vw.report(store, output, against=other)
    size = path.stat().st_size
    shown: list[Table | str] = [f"{path}, {size / 1e6:.1f} MB"]
    if output is None:
        shown.append(f"the same in a browser, page by page: vweights serve {atlas}")
    header = _header(store, "report", {})
    summary = {"atlas": str(atlas), "file": str(path), "bytes": size}
    Answer(header, [], summary, shown).give(str(store.manifest.get("model") or store.fingerprint), as_json)


def export(
    context: typer.Context,
    atlas: o.AtlasFolder,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=o.checked_file,
            help="file to write, new or to be replaced",
        ),
    ],
    question: o.EdgesOf = None,
    reader: o.Reader = None,
    writer: o.Writer = None,
    where: o.Where = None,
    by: o.By = None,
    top: Annotated[
        int | None, typer.Option("--top", metavar="N", min=1, help="only the N largest, in order; all by default")
    ] = None,
    form: Annotated[
        o.EdgeFormat | None,
        typer.Option(
            "--format", help="what the file is; by default its ending says: .parquet, .csv, .json for a graph"
        ),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """Write the connections in an atlas to a file: Parquet, CSV, or a graph that networkx reads."""
    if top is None:
        o.refuse_unused(context, "without --top", "by")
    store, chosen = vw.Atlas.open(atlas), dict(convention(text) for text in where or [])
    asked: dict[str, Any] = {"question": question or "composition", "by": by, "top": top, "where": chosen}
    count = vw.export(store, output, reader, writer, format=form, **asked)
    parameters = {"reader": reader, "writer": writer, **asked, "format": None if form is None else form.value}
    size = output.stat().st_size
    summary = {"atlas": str(atlas), "file": str(output), "edges": count, "bytes": size}
    shown = [f"{count} edges · {asked['question']} · {size / 1e6:.3g} MB: {output}"]
    model = str(store.manifest.get("model") or store.fingerprint)
    Answer(_header(store, "export", parameters), (), summary, shown).give(model, as_json)


def _header(store: vw.Atlas, question: str, parameters: dict[str, Any]) -> Header:
    """The header of an answer about an atlas."""
    from virtual_weights.record import Header

    provenance = {name: store.manifest.get(name) for name in ("reference", "fingerprint", "version")}
    return Header(question, (), (), parameters, {}, provenance)


def _about(parameters: dict[str, Any] | None) -> str:
    return ", ".join(f"{name}={value}" for name, value in (parameters or {}).items() if value is not None)
