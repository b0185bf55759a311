"""``vweights model``, what opens; ``vweights check``, how exactly; ``vweights rotate``, a model in another basis."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table, header_of, steps
from virtual_weights.cli.verb import Session, verb
from virtual_weights.errors import CheckpointError

if TYPE_CHECKING:
    from virtual_weights.runtime.features.law import DictionaryFit

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
    """Fetch a built-in model, check its sha256 and keep it in the cache; one that is made on demand is made here."""
    from virtual_weights.checkpoint import locate

    with steps(progress) as step:
        path = locate(name, offline=offline, progress=step(f"fetch {name}"))
    summary, shown = {"path": str(path)}, [f"{name} is at {path}"]
    if path.is_dir():
        made, sentence = _checked(path)
        summary, shown = summary | made, [*shown, sentence]
    Answer(header_of("fetch", {"offline": offline}), (), summary, shown).give(name, as_json)


def _checked(path: Path) -> tuple[dict[str, Any], str]:
    """How a model was made, and what the exactness law says of it now."""
    import virtual_weights as vw
    from virtual_weights.runtime.running import load

    stream = vw.open(str(path))
    load(stream)  # raises where it is not what its maps say
    made = stream.source.config["made"]
    sentence = (
        "trained in {steps} steps to {loss_on_text:.2f} nats a token of text, {loss_on_repeats:.2f} of repeats; exact"
    )
    return {"made": made}, sentence.format(**made)


@model_commands.command("types", cls=o.Command)
def list_types(as_json: o.AsJson = False) -> None:
    """List the model types that open, in which formats, and those that do not, with what is missing for them."""
    from virtual_weights.architecture.gguf import serving
    from virtual_weights.architecture.table import built_in, model_types

    rows: list[dict[str, Any]] = [
        {"type": name, "opens": True, "gguf": list(serving(name)), "missing": None} for name in model_types()
    ]
    outside = sorted(built_in()["outside"].items())
    rows += [{"type": name, "opens": False, "gguf": [], "missing": missing} for name, missing in outside]
    opening = len(rows) - len(outside)
    summary = {"open": opening, "do_not": len(outside)}
    shown: list[Any] = [
        Table(
            "model types that open", [{"type": r["type"], "GGUF": ", ".join(r["gguf"]) or None} for r in rows[:opening]]
        )
    ]
    shown += [Table("model types that do not", [{"type": name, "because": why} for name, why in outside])]
    Answer(header_of("types", {}), rows, summary, shown).give(None, as_json)


@verb("offline", "allow_non_finite")
def check(session: Session, dtype: o.RunDtype = o.StoredDtype.float32) -> Answer:
    """Run a model on a prompt and compare it, step by step, with what its maps say; needs the extra 'runtime'.

    The prompt is 32 random tokens. Every state must be the sum of what was written, every reader must receive what its
    map says, and patterns, values and nonlinearities must be what follows from that. The largest error is remembered on
    this machine, and stands in the provenance of later results.

    Of attached dictionaries it also shows whether they receive what their maps say, how far off they would be if they
    read elsewhere, and which share of what they stand for they leave unexplained on the default text; one that would
    explain much more if it read elsewhere is refused.
    """
    from virtual_weights.linalg.numerics import exactness_bound
    from virtual_weights.runtime.running.activations import exactness_steps
    from virtual_weights.runtime.running.model import built
    from virtual_weights.stream.provenance import checked_table

    stream, worst = session.stream, dict[str, Any]()
    module = built(stream, dtype.torch).eval()
    for step in exactness_steps(stream, module, 2**62):
        if step.kind not in worst or not step.error <= worst[step.kind].error:
            worst[step.kind] = step
    bound = exactness_bound(dtype.torch)
    rows = [{"step": kind, "largest_error": step.error, "at": step.place} for kind, step in worst.items()]
    error, exact = max(step.error for step in worst.values()), all(step.error <= bound for step in worst.values())
    if not exact:
        beyond = [f"{step.place} by {step.error:.1e}" for step in worst.values() if not step.error <= bound]
        raise CheckpointError(
            f"the maps are not what the model computes; of each kind of step the worst: {', '.join(beyond)}",
            expected=f"at most {bound:.0e} relatively, which rounding explains",
            do="correct the table"
            if stream.model.entry.origin != "built in"
            else "do not use these maps; please report it",
        )
    table = checked_table(stream.model.entry, stream.source.fingerprint, error)
    shown: list[Any] = [Table("largest relative error of each kind of step", rows)]
    shown.append(f"exact: {error:.1e}, where rounding explains {bound:.0e}")
    summary = {"largest_error": error, "bound": bound, "table": table}
    if stream.attached:
        summary["attached"] = attached = _attached(stream, module, dtype.torch, bound)
        title = "attached dictionaries on a text: pre-activations from maps beside their own"
        shown.append(Table(title, [{name.replace("_", " "): x for name, x in row.items()} for row in attached]))
    return Answer(header_of("check", {"dtype": dtype.value}, stream), rows, summary, shown)


def _attached(stream: vw.Stream, module: Any, dtype: Any, bound: float) -> list[dict[str, Any]]:
    """Every attached dictionary on a prompt: whether it reads where it says, and what it explains."""
    from virtual_weights.runtime.features.law import dictionary_fits

    if stream.source.token_texts() is None:
        run = vw.Run.on_repeats(stream, 128, 128, model=module, dtype=dtype)
    else:
        run = vw.Run.on_text(stream, tokens=128, length=128, model=module, dtype=dtype)
    fits = dictionary_fits(run)
    for fit in fits:
        best = min(fit.elsewhere, key=lambda other: other.unexplained, default=None)
        if fit.error > bound:
            raise CheckpointError(
                f"the encoder of {fit.name} is {fit.error:.1e} from what its maps say",
                expected=f"at most {bound:.0e} of the largest pre-activation, which rounding explains",
                do="please report it",
            )
        if best is not None and fit.unexplained > max(1.0, 2 * best.unexplained):
            raise CheckpointError(
                f"{fit.name} leaves {fit.unexplained:.2f} of the variance unexplained where it reads, {fit.reads}",
                expected=f"the place that it was trained at; read as {best.what} it leaves {best.unexplained:.2f}",
                do=f"name the place behind the path: PATH@{best.what}, or both places: PATH@{best.what},WRITES",
            )
    return [_fit_row(fit) for fit in fits]


def _fit_row(fit: DictionaryFit) -> dict[str, Any]:
    others = [f"{other.what.rpartition('.')[2]}: {other.distance:.0%} off" for other in fit.elsewhere]
    figures = {name: getattr(fit, name) for name in ("error", "unexplained", "active")}
    figures = {name: None if math.isnan(value) else value for name, value in figures.items()}
    row = {"name": fit.name, "reads": fit.reads, "error": figures["error"]}
    return {**row, "read_elsewhere": ", ".join(others) or fit.unfolded, **figures}


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
