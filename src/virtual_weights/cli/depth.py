"""``vweights linear`` and ``paths``: blocks in sequence, linear at a point."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, verb

_RANKS = {
    "block": "block",
    "rank": "rank",
    "bound": "at most",
    "stable_rank": "stable",
    "entropy_rank": "entropy",
    "log10_largest": "lg S_1",
    "log10_smallest": "lg S_r",
}


@verb("no_fold", "offline", "allow_non_finite")
def linear(
    session: Session,
    point: o.Point = None,
    position: o.Position = -1,
    all_tokens: Annotated[
        bool, typer.Option("--all-tokens", help="all tokens exactly, where tokens times d are at most 1024")
    ] = False,
    every: Annotated[int, typer.Option("--every", metavar="N", min=1, help="show spectra at every N-th block")] = 6,
    norm_scalar: o.NormScalar = 1.0,
    gate: o.Gate = 1.0,
) -> Answer:
    """Take blocks as linear maps, and show how their ranks and gains change with depth.

    For single blocks, for all blocks so far with the stream between them, for the change that these make, and for the
    blocks in sequence without the stream.
    """
    from virtual_weights.analysis.depth.linear_composition import MAPS

    token = None if all_tokens else position
    record = session.ask(vw.LinearComposition(_point(session, point), token, every, norm_scalar, gate))
    rows = list(record.rows())
    shown: list[Table | str] = []
    for name, title in zip(MAPS, ("block T", "prod(I + T)", "prod(I + T) - I", "path T_n ... T_1"), strict=True):
        columns = (
            {"block": "block", "rank": "rank", "certified_rank": "certain"} | _RANKS
            if name == "composition"
            else _RANKS
        )
        of_map = [row for row in rows if row["map"] == name]
        shown.append(Table(f"{title} · {session.name} · norm {record.stamp['norm']}", of_map, columns))
    errors = [float(row["pair_error"]) for row in rows if row["pair_error"] is not None]
    largest = max(errors, default=0.0)
    shown += [f"pairs against I + T1 + T2 + T2 T1: largest relative error {largest:.1e}", _assumed(record.stamp)]
    return Answer(record, rows, {"largest_pair_error": largest}, shown)


@verb("no_fold", "offline", "allow_non_finite")
def paths(
    session: Session,
    writer: Annotated[str, typer.Argument(metavar="WRITER", help="e.g. L16H0, L3.mlp, L3N7, embed")],
    reader: Annotated[str, typer.Argument(metavar="READER", help="e.g. L17H3.K, L5.mlp.up, unembed")],
    order: Annotated[
        int, typer.Option("--order", min=1, help="longest paths: 1 direct, 2 through one other component, and so on")
    ] = 2,
    point: o.Point = None,
    position: o.Position = -1,
    source: Annotated[
        int | None, typer.Option("--source", help="token at which WRITER writes; that of --position by default")
    ] = None,
    norm_scalar: o.NormScalar = 1.0,
    gate: o.Gate = 1.0,
    rotary_offset: o.RotaryOffset = None,
    top: o.Top = 20,
) -> Answer:
    """List the direct and indirect paths from WRITER to READER, strongest first, and their sum."""
    ends = writer, reader, order, top, _point(session, point), position, source, norm_scalar, gate
    record = session.ask(vw.Paths(*ends, offset=rotary_offset or 0))
    rows, totals = list(record.rows()), record.stamp["totals"]
    rest = totals["remainder_share"]
    shown = [
        Table(f"paths {writer} -> {reader} · {session.name}", rows, ("path", "order", "strength", "share")),
        Table("all paths of an order, summed", totals["orders"], ("order", "paths", "strength", "share")),
        f"in all {totals['total']:.4g}, direct {totals['direct']:.4g}; "
        + ("nothing arrives" if rest is None else f"share of the orders above {order}: {rest:.4g}"),
        _assumed(record.stamp),
    ]
    return Answer(record, rows, totals, shown)


def _point(session: Session, file: Path | None) -> vw.OperatingPoint | None:
    return None if file is None else vw.OperatingPoint.load(file, session.stream)


def _assumed(stamp: Mapping[str, Any]) -> str:
    """One line that says at what point blocks were taken as linear."""
    if stamp["point"] != "convention":
        return f"operating point {str(stamp['point'])[:12]} of {stamp['tokens']} tokens: exact for that prompt"
    return (
        f"convention: norm scalar {stamp['norm_scalar']}, gate {stamp['gate']}, one token that attends to itself; "
        "weights alone do not say what a run does"
    )
