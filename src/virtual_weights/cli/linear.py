"""``vweights linear``: blocks frozen at a point, composed along depth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from virtual_weights.analysis.depth.linear import MAPS, LinearComposition
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.stream.operating_point import OperatingPoint

PointFile = Annotated[
    Path | None,
    typer.Option("--operating-point", metavar="FILE", help="what a run fixed; without it a convention, no measurement"),
]
NormScalar = Annotated[float, typer.Option("--norm-scalar", metavar="S", help="norm scalar of the convention")]
Gate = Annotated[float, typer.Option("--gate", help="gate (ungated: slope) of the convention")]
Token = Annotated[int, typer.Option("--token", help="place of a token in the prompt; -1 is the last")]

_SHOWN = {
    "rank": "rank",
    "bound": "at most",
    "stable_rank": "stable",
    "entropy_rank": "entropy",
    "log10_largest": "lg S_1",
    "log10_smallest": "lg S_r",
}


def linear(
    model: o.ModelArgument,
    operating_point: PointFile = None,
    token: Token = -1,
    all_tokens: Annotated[bool, typer.Option("--all-tokens", help="all tokens exactly, where T d <= 1024")] = False,
    every: Annotated[int, typer.Option("--every", metavar="N", min=1, help="spectra at every N-th block")] = 6,
    norm_scalar: NormScalar = 1.0,
    gate: Gate = 1.0,
    no_fold: o.NoFold = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Ranks and gains, by depth, of blocks, of their residual composition, its update and the path through all."""
    with steps(progress) as step:
        stream = open_model(model, step("open"), fold=not no_fold, offline=offline, non_finite=allow_non_finite)
        point = None if operating_point is None else OperatingPoint.load(operating_point, stream)
        question = LinearComposition(point, None if all_tokens else token, every, norm_scalar, gate)
        record = question(stream, step("linear"))
    rows = list(record.rows())
    if as_json:
        found = {"parameters": record.parameters, "stamp": record.stamp, "provenance": record.provenance}
        put_json({"model": model, **found, "rows": rows})
        return
    for name, title in zip(MAPS, ("block T", "prod(I + T)", "prod(I + T) - I", "path T_n ... T_1"), strict=True):
        of = [row for row in rows if row["map"] == name]
        columns = {**_SHOWN, "certified_rank": "certain"} if name == "composition" else _SHOWN
        table(
            f"{title} · {model} · norm {record.stamp['norm']}",
            ["block", *columns.values()],
            [[row["block"], *(row[column] for column in columns)] for row in of],
        )
    errors = [float(row["pair_error"]) for row in rows if row["pair_error"] is not None]
    line(f"pairs against I + T1 + T2 + T2 T1: largest relative error {max(errors, default=0.0):.1e}")
    line(told(record.stamp))


def told(stamp: object) -> str:
    """One line that says at what point blocks were taken as linear."""
    assert isinstance(stamp, dict)
    if stamp["point"] != "convention":
        return f"operating point {str(stamp['point'])[:12]} of {stamp['tokens']} tokens: exact for that prompt"
    return (
        f"convention: norm scalar {stamp['norm_scalar']}, gate {stamp['gate']}, one token that attends to itself; "
        "what a run does is in no weight"
    )
