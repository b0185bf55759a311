"""``vweights edges``: the strongest stored edges of an atlas, without opening the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from virtual_weights.atlas import Atlas
from virtual_weights.atlas import edges as strongest
from virtual_weights.cli import options as o
from virtual_weights.cli.show import put_json, table
from virtual_weights.stream.moments import Moments

_NEVER_SHOWN = ("key", "question")


def edges(
    atlas: Annotated[Path, typer.Argument(metavar="ATLAS", help="folder that vweights map has written")],
    reader: Annotated[
        str | None, typer.Option("--reader", metavar="NAME", help="only edges into it, e.g. L18H6.K, L18H6, L5.mlp.up")
    ] = None,
    writer: Annotated[
        str | None, typer.Option("--writer", metavar="NAME", help="only edges out of it, e.g. L16H0, L3.mlp, embed")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question",
            help="composition (where nothing is said), overlap, erasure, delivered, attribution, prove or neuron_edges",
        ),
    ] = None,
    operating_point: Annotated[
        Path | None,
        typer.Option("--operating-point", metavar="FILE", help="only energy delivered by these moments"),
    ] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="COLUMN", help="order; the question's first column")] = None,
    top: o.Top = 20,
    as_json: o.AsJson = False,
) -> None:
    """The strongest edges that an atlas holds: of one reader, of one writer, or of all."""
    moments = None if operating_point is None else Moments.load(operating_point).identity
    question = question or ("composition" if moments is None else "delivered")
    found = strongest(Atlas.open(atlas), reader, writer, question=question, by=by, top=top, moments=moments)
    if as_json:
        put_json({"atlas": str(atlas), "question": question, "edges": found})
        return
    names = list(dict.fromkeys(name for row in found for name in row if name not in _NEVER_SHOWN))
    rows: list[list[Any]] = [[row.get(name) for name in names] for row in found]
    table(f"{len(found)} strongest edges · {question} · {atlas}", names, rows)
