"""``vweights model fetch|list``: the models that come built in."""

from __future__ import annotations

from typing import Annotated

import typer

from virtual_weights.checkpoint import built_in, is_cached, locate
from virtual_weights.cli import options as o
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table

model_commands = typer.Typer(help="The models that come built in.", no_args_is_help=True)


@model_commands.command("list")
def list_models(as_json: o.AsJson = False) -> None:
    """Every built-in model, and whether it is on this machine."""
    rows = [{"name": m.name, "here": is_cached(m.name), "licence": m.licence, "about": m.about} for m in built_in()]
    if as_json:
        put_json({"models": rows})
        return
    table("built-in models", ["name", "here", "licence", "about"], [list(row.values()) for row in rows])


@model_commands.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="name of a built-in model")],
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Fetch a built-in model, check its sha256 and keep it in the cache."""
    with steps(progress) as step:
        tick = step(f"fetch {name}")
        path = locate(name, offline=offline, progress=lambda done, total, text: tick(done, total))
    if as_json:
        put_json({"name": name, "path": str(path)})
        return
    line(f"{name} is at {path}")
