"""``vweights paths``: through which components what a writer writes comes to a reader."""

from __future__ import annotations

from typing import Annotated

import typer

from virtual_weights.analysis.depth.paths import Paths
from virtual_weights.cli import options as o
from virtual_weights.cli.linear import Gate, NormScalar, PointFile, Token, told
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.stream.operating_point import OperatingPoint


def paths(
    model: o.ModelArgument,
    writer: Annotated[str, typer.Argument(help="e.g. L16H0, L3.mlp, L3N7, embed")],
    reader: Annotated[str, typer.Argument(help="e.g. L17H3.K, L5.mlp.up, unembed")],
    order: Annotated[int, typer.Option("--order", min=1, help="1 is direct, 2 passes one component, ...")] = 2,
    operating_point: PointFile = None,
    token: Token = -1,
    source: Annotated[
        int | None, typer.Option("--source", help="place of the token at which WRITER writes; the same without it")
    ] = None,
    norm_scalar: NormScalar = 1.0,
    gate: Gate = 1.0,
    rotary_offset: o.RotaryOffset = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many paths to show")] = 20,
    no_fold: o.NoFold = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Paths from WRITER to READER, strongest first, and what all of them together do."""
    with steps(progress) as step:
        stream = open_model(model, step("open"), fold=not no_fold, offline=offline, non_finite=allow_non_finite)
        point = None if operating_point is None else OperatingPoint.load(operating_point, stream)
        question = Paths(writer, reader, order, top, point, token, source, norm_scalar, gate, offset=rotary_offset or 0)
        record = question(stream, step("paths"))
    rows, totals = list(record.rows()), record.stamp["totals"]
    if as_json:
        found = {"parameters": record.parameters, "stamp": record.stamp, "provenance": record.provenance}
        put_json({"model": model, **found, "paths": rows})
        return
    names = ["path", "order", "strength", "share"]
    table(f"paths {writer} -> {reader} · {model}", names, [[row[name] for name in names] for row in rows])
    names = ["order", "paths", "strength", "share"]
    table("all paths of an order, summed", names, [[each[name] for name in names] for each in totals["orders"]])
    rest = totals["remainder_share"]
    line(
        f"in all {totals['total']:.4g}, direct {totals['direct']:.4g}; "
        + ("nothing arrives" if rest is None else f"share of the orders above {order}: {rest:.4g}")
    )
    line(told(record.stamp))
