"""``vweights memory``: which neurons and heads strengthen or erase what is in the stream."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from virtual_weights.analysis.memory.clearing import Clearing
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons, census
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.record import Record

_HEAD = (
    "head",
    "negative_share",
    "copying",
    "token_copying",
    "complex_share",
    "most_negative",
    "most_positive",
    "trace_z",
    "kept",
)
_PAIR = ("writer", "eraser", "erasure", "baseline", "alignment", "z")
_CLASSES = ("weakening", "between", "strengthening")


def memory(
    model: o.ModelArgument,
    threshold: Annotated[float, typer.Option("--threshold", help="cosine that divides the classes of neurons")] = 0.5,
    scalar: Annotated[
        float, typer.Option("--norm-scalar", metavar="S", help="norm scalar assumed of heads and MLPs")
    ] = 1.0,
    slope: Annotated[float, typer.Option("--slope", help="slope assumed of MLPs taken as linear")] = 1.0,
    component: Annotated[
        str | None,
        typer.Option("--component", metavar="NAME", help="show its clearing spectrum too, e.g. L5H3 or L5.mlp"),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="order of the pairs: erasure, alignment or z")] = "erasure",
    seed: Annotated[int, typer.Option("--seed", help="seed of the nulls")] = 0,
    no_fold: o.NoFold = False,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="how many heads and pairs to show")] = 10,
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 512,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Classes of neurons, heads that copy or erase, and who erases what whom wrote, from the weights alone."""
    neurons = Neurons(threshold, seed=seed)
    heads, pairs = HeadErasers(scalar, seed=seed), Erasure(scalar, slope, device, memory_mb)
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        spectrum = None if component is None else Clearing(component, scalar, slope)(stream)
        has_mlps = any(c.kind == "mlp" for c in stream.components)
        found: dict[str, Any] = {"model": model, "norm": stream.norm_stamp}
        found["neurons"] = census(neurons(stream, step("neurons"))) if has_mlps else None
        found["heads"] = _heads(heads(stream, step("heads")), top) if stream.heads else None
        can_erase = bool(stream.heads) or (has_mlps and not stream.spec.gated)
        found["erasure"] = _pairs(pairs(stream, step("erasure")), top, by) if can_erase else []
    found["component"] = None if spectrum is None else {"name": component, "spectrum": list(spectrum.rows())[:top]}
    found |= {
        "parameters": {"norm_scalar": scalar, "slope": slope, "by": by, "seed": seed},
        "provenance": stream.provenance,
    }
    if as_json:
        put_json(found)
    else:
        _show(found)


def _heads(record: Record, top: int) -> dict[str, Any]:
    names = {column.name for column in record.columns}
    return {
        "count": int(record.present().sum()),
        "null": record.stamp["null"],
        "erasers": _plain(record.top(top, "negative_share")),
        "copiers": _plain(record.top(top, "token_copying" if "token_copying" in names else "copying")),
    }


def _pairs(record: Record, top: int, by: str) -> list[dict[str, Any]]:
    renamed = ({"eraser": row["reader"], **row} for row in record.top(top, by).rows())
    return [{name: row[name] for name in _PAIR} for row in renamed]


def _plain(record: Record) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "place"} for row in record.rows()]


def _show(found: dict[str, Any]) -> None:
    if found["neurons"] is not None:
        _show_neurons(found["model"], found["norm"], found["neurons"])
    if found["heads"] is not None:
        _show_heads(found["heads"])
    rows = [[pair[name] for name in _PAIR] for pair in found["erasure"]]
    table(
        f"the {len(rows)} pairs of largest {found['parameters']['by']} (erasure: share of what was written)",
        list(_PAIR),
        rows,
    )
    if found["component"] is not None:
        spectrum = found["component"]["spectrum"]
        names = ["kept", "real", "imaginary"]
        table(
            f"{found['component']['name']}: eigenvalues of its update nearest to -1",
            names,
            [[r[n] for n in names] for r in spectrum],
        )
    line(f"norm scalar {found['parameters']['norm_scalar']}, attention 1: what a run does is in no weight")


def _show_neurons(model: str, norm: str, neurons: dict[str, Any]) -> None:
    null, total = neurons["null"], neurons["count"]
    kinds = {"in all": neurons, **{f"layer {row['layer']}": row for row in neurons["by_layer"]}}
    rows = [[name, *(row[each] for each in _CLASSES)] for name, row in kinds.items()]
    title = f"{total} neurons by cos(w_in, w_out) at ±{neurons['threshold']} · {model} · norm {norm}"
    table(title, ["neurons", *_CLASSES], rows)
    line(
        f"mean square cosine {neurons['mean_square']:.4g}; independent directions in {null['dimension']} dimensions: "
        f"{null['mean_square']:.4g}, and {null['weakening']:.3g} neurons in each outer class"
    )
    if "shuffled" in null:
        each = null["shuffled"]
        line(
            f"the same outputs shuffled within their layers: mean square {each['mean_square']:.4g}, "
            f"{each['weakening']:.3g} weakening and {each['strengthening']:.3g} strengthening"
        )


def _show_heads(heads: dict[str, Any]) -> None:
    for kind, title in (
        ("erasers", "erase (negative share of OV's eigenvalues)"),
        ("copiers", "copy (between tokens)"),
    ):
        names = [name for name in _HEAD if name in heads[kind][0]] if heads[kind] else list(_HEAD)
        rows = [[row[name] for name in names] for row in heads[kind]]
        table(f"the heads that most {title}, of {heads['count']}", names, rows)
    null = {name: each for name, each in heads["null"].items() if name != "draws"}
    line("random heads: " + ", ".join(f"{name} {each['mean']:.3g} ± {each['std']:.2g}" for name, each in null.items()))
