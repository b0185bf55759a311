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
from virtual_weights.cli.show import Answer, Table, header_of
from virtual_weights.cli.statements import counted
from virtual_weights.cli.verb import Session, running_verb
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
_OPENED = ("no_fold", "partial", "allow_non_finite")


@running_verb("text", "repeated", always=False, opening=_OPENED, tokens=4096, length=128, batch=8)
def map_model(
    session: Session,
    context: typer.Context,
    output: Output = None,
    only: Only = None,
    rotary_offset: o.RotaryOffset = None,
    moments: o.Moments = None,
    edge_count: Annotated[
        int, typer.Option("--edges", metavar="N", min=0, help="with --text or --repeated: how many edges to remove")
    ] = 16,
    top: o.Top = 10,
    compute_dtype: o.ComputeDtype = "float32",
    memory_mb: o.Memory = None,
    executor: o.Executor = "local",
) -> Answer:
    """Compute every connection of a model from its weights and write a report. Resumes where it stopped.

    With --text or --repeated the model also runs. The report then shows how much each connection carries on the text,
    and what removing the strongest ones costs.
    """
    from virtual_weights.report import report
    from virtual_weights.survey.plan import filling

    if not session.runs:
        o.refuse_unused(context, "without a text to run on", "edge_count")
    began, parts, model = time.monotonic(), parts_of(only), session.name
    if moments is not None and session.runs:
        raise UsageError("a run and a file of moments", expected="a text, or --moments", do="keep one of them")
    folder = output or Path(f"{_named(model)}.atlas")
    o.checked_folder(folder)
    manner = {"compute_dtype": compute_dtype, "device": session.options["device"], "memory_mb": memory_mb}
    manner["executor"] = executor
    stream = session.stream
    plan = vw.Plan(parts, rotary_offset, edge_count, None if moments is None else vw.Moments.load(moments, stream))
    run = session.run if session.runs else None
    with filling(folder, stream, run, model, session.step, **manner) as survey:
        records = list(plan.records(survey))
        assert survey.atlas is not None
        page = report(survey.atlas, records=records)
    seconds, figures = time.monotonic() - began, _summary(stream, records, top)
    parameters = {"parts": list(parts), "rotary_offset": rotary_offset, "edges": edge_count}
    header = header_of("map", parameters, stream)
    rows = [edge for part in figures["composition"].values() for edge in part["edges"]]
    summary = {"atlas": str(folder), "report": str(page), "seconds": seconds, **figures}
    shown = [*_shown(model, stream, records, figures, top), f"done in {seconds:.1f} s"]
    return Answer(header, rows, summary, [*shown, f"atlas:  {folder}", f"report: {page}"])


def _named(model: str) -> str:
    """What an atlas is called that no option names: after the model's file or folder."""
    return Path(model.removeprefix("hf://")).absolute().name


def _shown(
    model: str, stream: vw.Stream, records: list[vw.Record], summary: dict[str, Any], top: int
) -> list[Table | str]:
    """The strongest edges as tables, and the rest in a line each."""
    from virtual_weights.survey.strongest import among_heads, edges_of

    shown: list[Table | str] = []
    for port, record in among_heads(stream, records).items():
        title = f"{port}-composition · {model} · norm {stream.norm_stamp}"
        shown += edge_tables(title, record, edges_of(record, top))
    if "statements" in summary:
        shown.append(f"statements: {counted(summary['statements'])}")
    if "ablation" in summary:
        shown.append(
            "ablation: {edges} edges removed one by one: {causal} causal, {negligible} negligible, {inconclusive} "
            "inconclusive".format(**summary["ablation"])
        )
    return shown


def edges(
    atlas: o.AtlasFolder,
    reader: o.Reader = None,
    writer: o.Writer = None,
    question: o.EdgesOf = None,
    moments: o.Moments = None,
    where: o.Where = None,
    by: o.By = None,
    top: o.Top = 20,
    as_json: o.AsJson = False,
) -> None:
    """Show the strongest connections in an atlas: those of one reader, those of one writer, or all."""
    from virtual_weights.atlas.edges import common_stamp
    from virtual_weights.record import Header

    chosen = dict(convention(text) for text in where or [])
    if moments is not None:
        chosen["moments"] = vw.Moments.load(moments).identity
    question = question or ("composition" if moments is None else "contribution")
    store = vw.Atlas.open(atlas)
    rows = vw.edges(store, reader, writer, question=question, by=by, top=top, where=chosen)
    headers = {key: store.header(key) for key in {row["key"] for row in rows}}
    rows = [_edge(headers[row["key"]].axes, row) for row in rows]
    parameters = {"reader": reader, "writer": writer, "by": by, "top": top, "where": chosen}
    provenance = {name: store.manifest.get(name) for name in ("reference", "fingerprint", "version")}
    header = Header(
        question, (), (), parameters, common_stamp([header.stamp for header in headers.values()]), provenance
    )
    names = list(dict.fromkeys(name for row in rows for name in row if name not in _HIDDEN))
    table = Table(f"the {len(rows)} strongest edges · {question} · {atlas}", rows, names)
    Answer(header, rows, {"atlas": str(atlas)}, [table]).give(store.manifest.get("model"), as_json)


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


def convention(text: str) -> tuple[str, Any]:
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


def parts_of(only: str | None) -> tuple[vw.Part, ...]:
    """The parts asked for, in the order of the report."""
    wanted = list(vw.Part) if only is None else o.listed("--only", only, expected=PARTS)
    unknown = [name for name in wanted if name not in tuple(vw.Part)]
    if unknown:
        raise UsageError(f"no part {unknown[0]!r}", expected=PARTS, do="name some of these in --only")
    return tuple(part for part in vw.Part if part in wanted)


def _summary(stream: vw.Stream, records: list[vw.Record], top: int) -> dict[str, Any]:
    """The map in a few numbers and edges, as plain JSON values."""
    from virtual_weights.analysis.memory.neurons import census
    from virtual_weights.survey.strongest import among_heads, edges_of, groups_of

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
            counts = Counter(row["verdict"] for row in rows)
            verdicts = {name: counts[name] for name in ("causal", "negligible", "inconclusive")}
            summary["ablation"] = {"edges": len(rows), **verdicts}
        elif record.question == "statements":
            summary["statements"] = dict(Counter(map(str, record["verdict"])))
    return summary
