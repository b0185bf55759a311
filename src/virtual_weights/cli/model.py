"""``vweights model fetch|list``, the models that come built in; ``vweights rotate``, a model in another basis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.show import Table, line, put_json, steps
from virtual_weights.cli.verb import Session

model_commands = typer.Typer(cls=o.Group, help="List and fetch the built-in models.", no_args_is_help=True)


@model_commands.command("list", cls=o.Command)
def list_models(as_json: o.AsJson = False) -> None:
    """List the built-in models and whether they are on this machine."""
    from virtual_weights.checkpoint import built_in, is_cached

    rows: list[dict[str, Any]] = [
        {"name": m.name, "here": is_cached(m.name), "licence": m.licence, "about": m.about} for m in built_in()
    ]
    if as_json:
        shape: dict[str, Any] = {"model": None, "question": "models", "parameters": {}, "stamp": {}, "provenance": {}}
        put_json({**shape, "summary": {"count": len(rows), "here": sum(row["here"] for row in rows)}, "rows": rows})
    else:
        Table("built-in models", rows).show()


@model_commands.command("fetch", cls=o.Command)
def fetch(
    name: Annotated[str, typer.Argument(help="name of a built-in model")],
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.Progress = o.ProgressMode.auto,
) -> None:
    """Fetch a built-in model, check its sha256 and keep it in the cache."""
    from virtual_weights.checkpoint import locate

    with steps(progress) as step:
        path = locate(name, offline=offline, progress=step(f"fetch {name}"))
    if as_json:
        shape = {"model": name, "question": "fetch", "parameters": {"offline": offline}, "stamp": {}, "provenance": {}}
        put_json({**shape, "summary": {"path": str(path)}, "rows": []})
    else:
        line(f"{name} is at {path}")


def rotate(
    model: o.Model,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            callback=o.checked_folder,
            help="folder of the new checkpoint, new or empty",
        ),
    ],
    seed: o.Seed = 0,
    dtype: Annotated[
        o.StoredDtype | None,
        typer.Option(
            "--save-dtype",
            metavar="DTYPE",
            help="precision of the new tensors: float64, float32, float16 or bfloat16; by default that of the source, "
            "but at least float32",
        ),
    ] = None,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.Progress = o.ProgressMode.auto,
) -> None:
    """Write a copy of a model in a rotated basis: the same function, ready for transformers to load."""
    from virtual_weights.checkpoint.writing import write_checkpoint
    from virtual_weights.stream.turned import Turned, config_of, random_turn

    with steps(progress) as step:
        stream = Session(model, step, {"offline": offline, "allow_non_finite": allow_non_finite}).stream
        wide = any(info.dtype == "F64" for info in stream.source.tensors.values())
        dtype = dtype or (o.StoredDtype.float64 if wide else o.StoredDtype.float32)
        turned = Turned(stream, random_turn(stream, seed))
        files, config = turned.files, config_of(turned, dtype.torch)
        companions = stream.source.at_rest.companions
        write_checkpoint(out, files, dtype.torch, config, companions, step("rotate"))
    summary = {"checkpoint": str(out), "tensors": sum(map(len, files)), "files": len(files)}
    summary |= {"changed": turned.changed, "copied": sorted(companions)}
    if as_json:
        parameters = {"seed": seed, "dtype": dtype.value}
        shape = {"model": model, "question": "rotate", "parameters": parameters, "stamp": {"norm": stream.norm_stamp}}
        put_json({**shape, "provenance": stream.provenance, "summary": summary, "rows": []})
        return
    line(f"{summary['tensors']} tensors in {summary['files']} files, turned with seed {seed}: {out}")
    for change in turned.changed:
        line(f"changed: {change}")
    if not companions:
        line("no tokenizer files were beside the source: take them from where the model was published")
