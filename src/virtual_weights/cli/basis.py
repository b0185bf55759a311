"""``vweights basis``: whether the coordinates of the stream are special."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from virtual_weights.analysis.ledger.basis import Basis, summary
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table


def basis(
    model: o.ModelArgument,
    massive: Annotated[
        float, typer.Option("--massive", help="multiple of the mean energy that is called massive")
    ] = 3.0,
    seed: Annotated[int, typer.Option("--seed", help="seed of the rotation to compare with")] = 0,
    no_fold: o.NoFold = False,
    top: o.Top = 10,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Kurtosis of weights over the stream's coordinates, as trained and rotated, and massive coordinates."""
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        record = Basis(massive, seed)(stream, step("basis"))
    found = summary(record)
    strongest = list(record.top(top, "write_energy").rows())
    if as_json:
        told: dict[str, Any] = {"model": model, "norm": stream.norm_stamp, **found, "coordinates": strongest}
        put_json({**told, "parameters": record.parameters, "provenance": record.provenance})
        return
    rows = [[side, found[f"{side}_kurtosis"], found[f"{side}_kurtosis_turned"]] for side in ("write", "read")]
    table(f"mean kurtosis over coordinates · {model} · norm {stream.norm_stamp}", ["", "trained", "rotated"], rows)
    line(f"a direction without preferred basis has {found['gaussian']:.3f}")
    names = ["coordinate", "write_energy", "write_kurtosis", "read_energy", "read_kurtosis"]
    table("coordinates into which most is written", names, [[row[name] for name in names] for row in strongest])
    coordinates = ", ".join(str(each["coordinate"]) for each in found["massive"][:20])
    line(f"{len(found['massive'])} coordinates above {massive:g} times the mean energy: {coordinates or 'none'}")
