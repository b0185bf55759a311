"""``vweights memory``: which neurons and heads strengthen or erase what is in the stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, figure, verb
from virtual_weights.errors import UsageError

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


@verb("no_fold", "partial", "offline", "allow_non_finite")
def memory(
    session: Session,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            metavar="X",
            help="cosine above which neurons count as strengthening, or below its negative as weakening",
        ),
    ] = 0.5,
    norm_scalar: o.NormScalar = 1.0,
    gate: o.Gate = 1.0,
    component: Annotated[
        str | None,
        typer.Option("--component", metavar="NAME", help="also show how one component erases, e.g. L5H3 or L5.mlp"),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", metavar="COLUMN", help="column to sort pairs by, e.g. erasure, alignment or z")
    ] = "erasure",
    seed: o.Seed = 0,
    top: o.Top = 10,
    device: o.Device = "cpu",
    memory_mb: o.Memory = None,
) -> Answer:
    """Find neurons and heads that amplify or erase what they read, and which erase what others wrote."""
    neurons, heads = vw.Neurons(threshold, seed=seed), vw.HeadErasers(norm_scalar, seed=seed)
    pairs = vw.Erasure(norm_scalar, gate, device=device, memory_mb=memory_mb or 512)
    o.checked_column(by, pairs.columns)
    groups, answers = session.stream.groups, list[Answer]()
    spectrum = None if component is None else session.ask(vw.Clearing(component, norm_scalar, gate))
    if groups.mlps:
        answers.append(_neurons(session.name, session.ask(neurons)))
    if groups.heads:
        answers.append(_heads(session.ask(heads), top))
    if groups.heads or any("in" in group.ports for group in groups.mlps):
        answers.append(_pairs(session.ask(pairs), top, by))
    if spectrum is not None:
        answers.append(_spectrum(component or "", spectrum, top))
    if not answers:
        raise UsageError(
            "this checkpoint holds no MLP and no head", expected="one of them", do="open the complete checkpoint"
        )
    line = f"assumed: norm scalar {norm_scalar}, attention 1; the weights alone do not determine these"
    answers[-1] = replace(answers[-1], shown=[*answers[-1].shown, line])
    first, *rest = answers
    return replace(first, more=rest)


def _neurons(model: str, record: vw.Record) -> Answer:
    """The census of a model's neurons; their rows are the layers."""
    from virtual_weights.analysis.memory.neurons import census

    figures = census(record)
    null, total, layers = figures["null"], figures["count"], figures.pop("by_layer")
    rows = [{"neurons": "in all", **{name: figures[name] for name in _CLASSES}}]
    rows += [{"neurons": f"layer {row['layer']}", **{name: row[name] for name in _CLASSES}} for row in layers]
    limit = figures["threshold"]
    title = f"{total} neurons by cos(w_in, w_out) · {model} · norm {record.stamp['norm']}"
    shown: list[Table | str] = [
        Table(title, rows),
        f"weakening: cosine below -{limit}; strengthening: above {limit}",
        f"mean square cosine {figures['mean_square'] or 0:.4g}; independent directions in {null['dimension']} "
        f"dimensions would have {null['mean_square']:.4g}, and {null['weakening']:.3g} neurons in either class",
    ]
    if "shuffled" in null:
        shuffled = null["shuffled"]
        shown.append(
            f"with outputs shuffled within their layers: mean square cosine {shuffled['mean_square']:.4g}, "
            f"{shuffled['weakening']:.3g} weakening and {shuffled['strengthening']:.3g} strengthening"
        )
    return Answer(record, layers, figures, shown)


def _heads(record: vw.Record, top: int) -> Answer:
    """The heads that most erase, and those that most copy."""
    names = {column.name for column in record.columns}
    copying = "token_copying" if "token_copying" in names else "copying"
    best = {name: _plain(record.top(top, by)) for name, by in (("erasers", "negative_share"), ("copiers", copying))}
    count = int((~record.numbers("copying").isnan()).sum())
    titles = {"erasers": "erase, by negative share of OV's eigenvalues", "copiers": "copy, by copying between tokens"}
    shown: list[Table | str] = [
        Table(
            f"the {len(rows)} of {count} heads that most {titles[kind]}",
            rows,
            [n for n in _HEAD if n in names | {"head"}],
        )
        for kind, rows in best.items()
    ]
    null = {name: figures for name, figures in record.stamp["null"].items() if name != "draws"}
    shown.append(
        "random heads: "
        + ", ".join(
            f"{name.replace('_', ' ')} {figure(f['mean'], 3)} ± {figure(f['std'], 2)}" for name, f in null.items()
        )
    )
    return Answer(record, best["erasers"], {"count": count, "copiers": best["copiers"]}, shown)


def _pairs(record: vw.Record, top: int, by: str) -> Answer:
    """Which components erase what others wrote."""
    renamed = ({"eraser": row["reader"], **row} for row in record.top(top, by).rows())
    rows = [{name: row[name] for name in _PAIR} for row in renamed]
    title = f"the {len(rows)} pairs of largest {by} (erasure: share of what was written that is removed)"
    return Answer(record, rows, {"by": by}, [Table(title, rows, _PAIR)])


def _spectrum(component: str, record: vw.Record, top: int) -> Answer:
    rows = list(record.rows())[:top]
    title = f"{component}: eigenvalues of its update nearest to -1 (kept: what is left of that direction)"
    return Answer(record, rows, {"component": component}, [Table(title, rows, ("kept", "real", "imaginary"))])


def _plain(record: vw.Record) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "place"} for row in record.rows()]
