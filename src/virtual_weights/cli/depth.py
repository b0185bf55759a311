"""``vweights linear`` and ``paths``: blocks in sequence, linear at a point."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table, figure
from virtual_weights.cli.verb import Session, verb

_RANKS = {
    "block": "block",
    "rank": "rank",
    "bound": "at most",
    "stable_rank": "stable",
    "entropy_rank": "entropy",
    "log10_largest": "log10 S_1",
    "log10_smallest": "log10 S_r",
}
_TITLES = (
    "each block alone: T",
    "all blocks so far, added to the stream: prod(I + T)",
    "the change that they make: prod(I + T) - I",
    "all blocks so far in sequence, without the stream: T_n ... T_1",
)


@verb("no_fold", "offline", "allow_non_finite")
def linear(
    session: Session,
    context: typer.Context,
    point: o.Point = None,
    position: o.Position = -1,
    all_tokens: Annotated[
        bool,
        typer.Option("--all-tokens", help="all tokens of the prompt together; tokens times d may be at most 1024"),
    ] = False,
    every: Annotated[int, typer.Option("--every", metavar="N", min=1, help="show every N-th block")] = 6,
    norm_scalar: o.NormScalar = 1.0,
    gate: o.Gate = 1.0,
) -> Answer:
    """Take blocks as linear maps, and show how their ranks and gains change with depth.

    Four maps at every depth: the block itself (T); all blocks so far, each added to the stream (prod(I + T)); the
    change that these make (prod(I + T) - I); and the blocks in sequence without the stream (T_n ... T_1).
    """
    from virtual_weights.analysis.depth.linear_composition import MAPS

    _refuse_unused(context, "position", "all_tokens")
    if all_tokens:
        o.refuse_unused(context, "with --all-tokens", "position")
    token = None if all_tokens else position
    record = session.ask(vw.LinearComposition(_point(session, point), token, every, norm_scalar, gate))
    rows = list(record.rows())
    shown: list[Table | str] = []
    for name, title in zip(MAPS, _TITLES, strict=True):
        columns = (
            {"block": "block", "rank": "rank", "certified_rank": "certified"} | _RANKS
            if name == "composition"
            else _RANKS
        )
        of_map = [row for row in rows if row["map"] == name]
        shown.append(Table(f"{title} · {session.name} · norm {record.stamp['norm']}", of_map, columns))
    errors = [float(row["pair_error"]) for row in rows if row["pair_error"] is not None]
    largest = max(errors, default=None)
    shown += [
        "check of neighbouring blocks against I + T1 + T2 + T2 T1: "
        + ("no pair could be checked" if largest is None else f"largest relative error {largest:.1e}"),
        _assumed(record.stamp),
    ]
    return Answer(record, rows, {"largest_pair_error": largest}, shown)


@verb("no_fold", "offline", "allow_non_finite")
def paths(
    session: Session,
    context: typer.Context,
    writer: Annotated[str, typer.Argument(metavar="WRITER", help="e.g. L16H0, L3.mlp, L3N7, embed")],
    reader: Annotated[str, typer.Argument(metavar="READER", help="e.g. L17H3.K, L5.mlp.up, unembed")],
    order: Annotated[
        int,
        typer.Option(
            "--order",
            metavar="N",
            min=1,
            help="longest paths: 1 is direct, 2 goes through one other component, and so on",
        ),
    ] = 2,
    point: o.Point = None,
    position: o.Position = -1,
    source: Annotated[
        int | None,
        typer.Option("--source", metavar="I", help="position at which WRITER writes; that of --position by default"),
    ] = None,
    norm_scalar: o.NormScalar = 1.0,
    gate: o.Gate = 1.0,
    rotary_offset: o.RotaryOffset = None,
    top: o.Top = 20,
) -> Answer:
    """List the direct and indirect paths from WRITER to READER, strongest first, and their sum."""
    _refuse_unused(context, "position", "source")
    o.refuse_offsets(context, reader, "rotary_offset")
    ends = writer, reader, order, top, _point(session, point), position, source, norm_scalar, gate
    record = session.ask(vw.Paths(*ends, offset=rotary_offset or 0))
    rows, totals = list(record.rows()), record.stamp["totals"]
    rest = totals["remainder_share"]
    shown = [
        Table(f"paths {writer} -> {reader} · {session.name}", rows, ("path", "order", "strength", "share")),
        Table("all paths of an order, summed", totals["orders"], ("order", "paths", "strength", "share")),
        f"all paths together have strength {figure(totals['total'])}, the direct one {figure(totals['direct'])}; "
        + (
            "nothing arrives" if rest is None else f"paths of orders above {order} contribute a share of {figure(rest)}"
        ),
        _assumed(record.stamp),
    ]
    return Answer(record, rows, totals, shown)


def _refuse_unused(context: typer.Context, *places: str) -> None:
    """Refuse places in a prompt where there is none, and assumptions where a prompt makes them needless."""
    if context.params["point"] is None:
        o.refuse_unused(context, "without --point", *places)
    else:
        o.refuse_unused(context, "with --point", "norm_scalar", "gate")


def _point(session: Session, file: Path | None) -> vw.OperatingPoint | None:
    return None if file is None else vw.OperatingPoint.load(file, session.stream)


def _assumed(stamp: Mapping[str, Any]) -> str:
    """One line about the point at which blocks are taken as linear."""
    if stamp["point"] != "convention":
        return f"at operating point {str(stamp['point'])[:12]} of {stamp['tokens']} tokens: exact for that prompt"
    return (
        f"assumed: norm scalar {stamp['norm_scalar']}, gate {stamp['gate']}, one token that attends to itself; "
        "the weights alone do not determine these"
    )
