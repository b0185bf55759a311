"""``vweights graph``: an attribution graph from a file, its strongest links, and the same graph in another form."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.errors import UsageError, writing

_LINKS = {
    "source_name": "source",
    "source_position": "at",
    "target_name": "target",
    "target_position": "at",
    "weight": "weight",
    "source_label": "label of the source",
    "target_label": "label of the target",
}
_NODES = ("name", "position", "token", "influence", "activation", "label", "kind")
_TABLES = (".parquet", ".csv")
_Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        callback=o.checked_file,
        help="write all links, or nodes, as .parquet or .csv",
    ),
]


class GraphStyle(StrEnum):
    """Whose form a file has."""

    circuit_tracer = "circuit-tracer"
    neuronpedia = "neuronpedia"


def graph(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="an attribution graph: .json of circuit-tracer or Neuronpedia")
    ],
    nodes: Annotated[bool, typer.Option("--nodes", help="nodes instead of links, the most influential first")] = False,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE", help="labels of features: .csv, .json or .jsonl, see docs/graphs.md"),
    ] = None,
    top: o.Top = 10,
    output: _Output = None,
    save_as: Annotated[
        Path | None,
        typer.Option("--save-as", metavar="OUT.json", callback=o.checked_file, help="write the graph, labels included"),
    ] = None,
    style: Annotated[
        GraphStyle, typer.Option("--style", help="whose form --save-as writes")
    ] = GraphStyle.circuit_tracer,
    as_json: o.AsJson = False,
) -> None:
    """Show the strongest links of an attribution graph, and convert it.

    A link is the direct effect of a source on a target at two positions of one prompt, attention included. It is not a
    virtual weight, which belongs to the model and not to a prompt. Labels are somebody's text, and prove nothing.
    """
    from virtual_weights.record import Header
    from virtual_weights.record.durable import sha256_of

    if save_as is None:
        o.refuse_unused(context, "without --save-as", "style")
    if output is not None and output.suffix.lower() not in _TABLES:
        raise UsageError(f"-o {output}", expected=f"a file called {' or '.join(_TABLES)}", do="call it otherwise")
    read = vw.AttributionGraph.load(file)
    read = read if labels is None else read.labelled(vw.FeatureLabels.load(labels))
    record = read.records()[0 if nodes else 1]
    rows = _foremost(record, nodes, top)
    counts = {"nodes": len(read.nodes), "links": len(read.links), "tokens": len(read.tokens)}
    slug, model = str(read.metadata["slug"]), str(read.metadata["scan"]) or "unnamed"
    shown: list[Table | str] = [f"{slug} · {model} · {', '.join(f'{n} {name}' for name, n in counts.items())}"]
    shown.append(f"prompt  {read.metadata['prompt']}")
    shown.append(
        Table(*(("the most influential nodes", rows, _NODES) if nodes else ("the strongest links", rows, _LINKS)))
    )
    if output is not None:
        _write_table(record, output)
        shown.append(f"{len(record)} rows: {output}")
    if save_as is not None:
        read.save(save_as, style.value)
        shown.append(f"{style.value}: {save_as}")
    summary = {"graph": slug, **counts, "output": output and str(output), "saved": save_as and str(save_as)}
    parameters = {"nodes": nodes, "labels": labels and str(labels), "top": top, "style": style.value}
    header = Header(record.question, (), (), parameters, {}, {"file": str(file), "fingerprint": sha256_of(file)})
    Answer(header, rows, summary, shown).give(model, as_json)


def _foremost(record: vw.Record, nodes: bool, top: int) -> list[dict[str, Any]]:
    """The strongest links; or nodes by their influence, a cumulative share of which small is strong."""
    if not nodes:
        return [{k: v for k, v in row.items() if k not in ("place", "size")} for row in record.top(top, "size").rows()]
    rows: list[dict[str, Any]] = list(record.rows())
    rows.sort(key=lambda row: (row["influence"] is None, row["influence"] or 0.0))
    return rows[:top]


def _write_table(record: vw.Record, path: Path) -> None:
    if path.suffix.lower() == ".parquet":
        return record.to_parquet(path)
    import csv

    from virtual_weights.record.durable import replacing

    rows = list(record.rows())
    with replacing(path) as aside, writing(path), aside.open("w", encoding="utf-8", newline="") as file:
        names = [*(axis.name for axis in record.axes), *(column.name for column in record.columns)]
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)
    return None
