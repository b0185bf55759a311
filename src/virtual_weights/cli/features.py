"""``vweights features`` and ``train``: which features of attached dictionaries feed which, and small ones to try."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb
from virtual_weights.errors import UsageError


@running_verb("text", "repeated", tokens=16384)
def features(
    session: Session,
    source: Annotated[
        str | None, typer.Option("--from", metavar="NAME", help="only what this dictionary writes")
    ] = None,
    target: Annotated[str | None, typer.Option("--to", metavar="NAME", help="only what this dictionary reads")] = None,
    by: Annotated[
        str, typer.Option("--by", metavar="COLUMN", help="column to rank by: era, the default, twera or weight")
    ] = "era",
    least: Annotated[
        int,
        typer.Option("--least-active", metavar="N", min=1, help="leave out features that are active at fewer tokens"),
    ] = 20,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE", help="labels of features: .csv, .json or .jsonl")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", callback=o.checked_file, help="safetensors file for the averages"
        ),
    ] = None,
    top: o.Top = 20,
    memory_mb: o.Memory = None,
) -> Answer:
    """Find which features of attached dictionaries feed which, by their virtual weights and by what a text activates.

    The virtual weight of two features is the same on every text, and most of the large ones carry nothing. ERA weighs
    it by how much the source is active while the target is; TWERA by how much both are.

    The text is run in two halves, which are compared: what one half says about the other is what the figures are worth.
    """
    from virtual_weights.runtime.features.coactivity import coactivations

    stream = session.stream
    _check_names(stream, source, target)
    column: Any = o.checked_column(by, ("era", "twera", "weight"))
    names = None if labels is None else vw.FeatureLabels.load(labels)
    halves = [
        coactivations(half, memory_mb or 2048, progress=session.step(f"half {number}"))
        for number, half in enumerate(session.run.halves(), 1)
    ]
    both = halves[0].joined(halves[1], session.run.text)
    if output is not None:
        both.save(output)
    record, interference = session.survey.answers(
        [
            vw.FeatureEdges(both, top, column, least, source, target),
            vw.FeatureInterference(halves[0], halves[1], least=max(1, least // 2)),
        ]
    )
    rows = [_labelled(row, names) for row in record.rows()]
    compared = list(interference.rows())
    title = f"the {len(rows)} strongest edges between features, by {by} · {both.tokens:,} tokens · {session.name}"
    shown: list[Table | str] = [Table(title, rows), *_comparison(compared)]
    if output is not None:
        shown.append(f"averages of {both.tokens:,} tokens written to {output}")
    summary = {"tokens": both.tokens, "identity": both.identity, "least": least, "halves": compared}
    return Answer(record, rows, summary, shown)


def _check_names(stream: vw.Stream, *names: str | None) -> None:
    """Refuse, before the model runs, one without a dictionary, and names of none."""
    readers = {group.id for group in stream.groups.readers("enc")}
    unknown = next((name for name in names if name is not None and name not in readers), None)
    if unknown is not None:
        raise UsageError(
            f"no dictionary {unknown!r} reads from this stream",
            expected=f"one of {', '.join(sorted(readers))}",
            do="correct the name",
        )


def _labelled(row: dict[str, Any], names: vw.FeatureLabels | None) -> dict[str, Any]:
    """An edge without its number, and with the labels of both features where there are any."""
    edge = {name: value for name, value in row.items() if name != "edge"}
    if names is None:
        return edge
    ends = {f"{side}_label": names.get(str(edge[side]).removesuffix(".enc")) for side in ("writer", "reader")}
    return {**edge, **ends}


_SHORT = {
    "pair": "from > to",
    "pairs": "pairs",
    "never": "never together",
    "never_of_largest": "of the largest |weight|",
    "weight_era": "|weight| ~ |ERA|",
    "era_era": "|ERA| ~ |ERA|",
    "twera_twera": "|TWERA| ~ |TWERA|",
}


def _comparison(halves: list[dict[str, Any]]) -> list[Table | str]:
    """What one half of the text says about the other."""
    return [
        Table("both halves of the text compared, over all pairs of features", [_short(row) for row in halves]),
        "edges go along the stream directly: what attention moves, and what inhibits a target that is off, is in none",
    ]


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {shown: row[name] for name, shown in _SHORT.items()}


@running_verb("text", "repeated", tokens=20000)
def train(
    session: Session,
    folder: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="where it is written; by default in the cache"),
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", metavar="NUMBERS", help="layers whose MLPs get a transcoder")
    ] = "8,10,12",
    features: Annotated[int, typer.Option("--features", metavar="N", min=1, help="features of each transcoder")] = 1024,
    k: Annotated[int, typer.Option("--k", metavar="N", min=1, help="features active at one token")] = 32,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="training steps")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="train a LoRA adapter instead")] = False,
) -> Answer:
    """Train small transcoders of MLPs, or a LoRA adapter, on a text: something real to attach, in minutes.

    Transcoders are written as circuit-tracer writes them, an adapter as peft does. They are made to try things on, not
    to be published: a few thousand tokens do not make good features.
    """
    from virtual_weights.checkpoint.pinned_file import cache_folder
    from virtual_weights.runtime.features.training import train_lora, train_transcoders
    from virtual_weights.stream.provenance import fingerprint_of

    what = "lora" if lora else "transcoders"
    sizes = "" if lora else f"-{layers.replace(',', '-').replace(' ', '')}-{features}-{k}"
    folder = folder or cache_folder() / "trained" / f"{fingerprint_of(session.stream)[:16]}-{what}{sizes}"
    run, seed = session.run, session.options["seed"]
    if lora:
        first, last = train_lora(run, folder, steps=steps or 60, seed=seed, progress=session.step("adapter"))
        rows = [{"loss at first": first, "at last": last}]
    else:
        parts = o.listed("--layers", layers, "layers such as 8,10,12")
        wanted = [int(part) for part in parts if part.isdecimal()]
        if len(wanted) < len(parts):
            raise UsageError(f"--layers {layers}", expected="layers such as 8,10,12", do="correct them")
        step = session.step("transcoders")
        fits = train_transcoders(
            run, folder, wanted, features=features, k=k, steps=steps or 500, seed=seed, progress=step
        )
        rows = [
            {
                "layer": fit.layer,
                "unexplained": fit.unexplained,
                "held out": fit.held_out,
                "never active": fit.never_active,
            }
            for fit in fits
        ]
    from virtual_weights.record import Axis

    stamp = {"norm": session.stream.norm_stamp, "text": run.text, "tokens": run.count, "run": run.identity}
    record = vw.Record(what, (Axis("row", ()),), (), {}, stamp, session.stream.provenance)
    shown: list[Table | str] = [
        Table(f"{what} trained on {run.count:,} tokens of {run.text} · {session.name}", rows),
        f"written to {folder}: attach it with --attach {folder}",
    ]
    return Answer(record, rows, {"folder": str(folder), "kind": what}, shown)
