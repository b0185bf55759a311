"""``vweights rotate``: the same model with its stream turned by a random rotation, as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from virtual_weights.checkpoint.writing import write_checkpoint
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json
from virtual_weights.stream.turned import Turned, config_of, random_turn


def rotate(
    model: o.ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the new checkpoint; new, or empty")],
    seed: Annotated[int, typer.Option("--seed", help="seed of the rotation")] = 0,
    dtype: Annotated[
        o.StoredDtype | None,
        typer.Option("--dtype", help="of the new tensors; the source's, but float32 at least, where none is given"),
    ] = None,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Write a rotated copy of a model: the same function in another basis, for transformers to load."""
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline, non_finite=allow_non_finite)
        wide = any(info.dtype == "F64" for info in stream.source.tensors.values())
        dtype = dtype or (o.StoredDtype.float64 if wide else o.StoredDtype.float32)
        turned = Turned(stream, random_turn(stream, seed))
        files, config = turned.files, config_of(turned, dtype.torch)
        companions = stream.source.at_rest.companions
        write_checkpoint(out, files, dtype.torch, config, companions, step("rotate"))
    found = {
        "model": model,
        "checkpoint": str(out),
        "seed": seed,
        "dtype": dtype.value,
        "tensors": sum(map(len, files)),
        "files": len(files),
        "changed": turned.changed,
        "copied": sorted(companions),
    }
    if as_json:
        put_json(found)
        return
    line(f"{found['tensors']} tensors in {found['files']} files, turned with seed {seed}: {out}")
    for change in turned.changed:
        line(f"changed: {change}")
    if not companions:
        line("no tokenizer files were beside the source: take them from where the model was published")
