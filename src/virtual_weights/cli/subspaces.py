"""``vweights subspaces``: principal angles between all pairs of heads in two roles."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, cast, get_args

import typer

from virtual_weights.analysis.maps.circuits import HeadRole
from virtual_weights.analysis.pairs.subspaces import Subspaces, figures
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.errors import UsageError


def subspaces(
    model: o.ModelArgument,
    roles: Annotated[str, typer.Option("--roles", metavar="A-B", help="two of Q, K, V, O, e.g. O-K or V-V")] = "O-K",
    by: Annotated[str, typer.Option("--by", help="column to sort by, e.g. overlap, z, cosine, strength")] = "overlap",
    energy: Annotated[
        float | None, typer.Option("--energy", help="keep directions with this share of the energy")
    ] = None,
    no_fold: o.NoFold = False,
    top: o.Top = 20,
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 512,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Overlap, smallest angle and interference bound of every pair of heads in two ROLES, largest first."""
    question = Subspaces(*_roles(roles), energy=energy, device=device, memory_mb=memory_mb)
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        record = question(stream, step(f"{roles} subspaces"))
    pairs = [{name: row[name] for name in row if name != "place"} for row in record.top(top, by=by).rows()]
    summary = asdict(figures(record))
    if as_json:
        put_json(
            {
                "model": model,
                "roles": roles.upper(),
                "norm": record.stamp["norm"],
                "summary": summary,
                "pairs": pairs,
                "stamp": record.stamp,
                "provenance": record.provenance,
            }
        )
        return
    names = ["first", "second", *(c.name for c in record.columns if not c.name.startswith("rank_"))]
    title = f"{roles.upper()} subspaces · {model} · norm {record.stamp['norm']}"
    table(title, names, [[pair[name] for name in names] for pair in pairs])
    line("; ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in summary.items() if value is not None))


def _roles(text: str) -> tuple[HeadRole, HeadRole]:
    parts = text.upper().split("-")
    if len(parts) != 2 or not set(parts) <= set(get_args(HeadRole)):
        raise UsageError(
            f"--roles {text}", expected="two of Q, K, V, O with a hyphen, e.g. O-K", do="correct the roles"
        )
    return cast(HeadRole, parts[0]), cast(HeadRole, parts[1])


def _text(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
