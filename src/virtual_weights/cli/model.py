"""``vweights model fetch|list``, the models that come built in; ``vweights rotate``, a model in another basis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table, header_of, steps
from virtual_weights.cli.verb import Session, verb

model_commands = typer.Typer(cls=o.Group, help="List and fetch the built-in models.", no_args_is_help=True)


@model_commands.command("list", cls=o.Command)
def list_models(as_json: o.AsJson = False) -> None:
    """List the built-in models and whether they are on this machine."""
    from virtual_weights.checkpoint import built_in, is_cached

    rows: list[dict[str, Any]] = [
        {"name": m.name, "here": is_cached(m.name), "licence": m.licence, "about": m.about} for m in built_in()
    ]
    summary = {"count": len(rows), "here": sum(row["here"] for row in rows)}
    Answer(header_of("models", {}), rows, summary, [Table("built-in models", rows)]).give(None, as_json)


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
    answer = Answer(header_of("fetch", {"offline": offline}), (), {"path": str(path)}, [f"{name} is at {path}"])
    answer.give(name, as_json)


@verb("offline", "allow_non_finite")
def rotate(
    session: Session,
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
) -> Answer:
    """Write a copy of a model in a rotated basis: the same function, ready for transformers to load."""
    from virtual_weights.checkpoint.writing import write_checkpoint
    from virtual_weights.stream.turned import Turned, config_of, random_turn

    stream = session.stream
    wide = any(info.dtype == "F64" for info in stream.source.tensors.values())
    dtype = dtype or (o.StoredDtype.float64 if wide else o.StoredDtype.float32)
    turned = Turned(stream, random_turn(stream, seed))
    files, config = turned.files, config_of(turned, dtype.torch)
    companions = stream.source.at_rest.companions
    write_checkpoint(out, files, dtype.torch, config, companions, session.step("rotate"))
    tensors = sum(map(len, files))
    summary = {"checkpoint": str(out), "tensors": tensors, "files": len(files)}
    summary |= {"changed": turned.changed, "copied": sorted(companions)}
    shown = [f"{tensors} tensors in {len(files)} files, turned with seed {seed}: {out}"]
    shown += [f"changed: {change}" for change in turned.changed]
    if not companions:
        shown.append("no tokenizer files were beside the source: take them from where the model was published")
    parameters = {"seed": seed, "dtype": dtype.value}
    return Answer(header_of("rotate", parameters, stream), (), summary, shown)
