"""``vweights composition`` and ``subspaces``: every pair of a writer and a reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table, figure
from virtual_weights.cli.verb import Session, need_runtime, verb
from virtual_weights.errors import UsageError

if TYPE_CHECKING:
    from virtual_weights.analysis.maps.circuits import HeadRole


_By = Annotated[
    str | None,
    typer.Option(
        "--by", metavar="COLUMN", help="column to sort by, e.g. score, the default, strength, lift or contribution"
    ),
]
_Sketch = Annotated[
    int | None,
    typer.Option(
        "--sketch",
        metavar="N",
        min=16,
        help="for very large models: estimate all pairs from N random numbers of each map, such as 16384, and compute "
        "only the foremost",
    ),
]


@verb("no_fold", "partial", "offline", "allow_non_finite")
def composition(
    session: Session,
    context: typer.Context,
    port: Annotated[
        o.PortName,
        typer.Option("--port", metavar="PORT", help="port of the readers: Q, K, V, gate, up, in or unembed"),
    ] = o.PortName.K,
    writers: o.WriterOption = o.WriterSet.heads,
    by: _By = None,
    rotary_offset: o.RotaryOffset = None,
    moments: o.Moments = None,
    text: o.Text = None,
    tokens: o.Tokens = 4096,
    top: o.Top = 20,
    save: o.Save = None,
    sketch: _Sketch = None,
    seed: o.Seed = 0,
    compute_dtype: o.ComputeDtype = "float32",
    device: o.Device = "cpu",
    memory_mb: o.Memory = None,
) -> Answer:
    """Rank connections from the weights: how strongly each reader reads what each earlier writer writes.

    With --text or --moments, also how much each connection carries on a text.
    """
    from virtual_weights.analysis.pairs.alignment import beside
    from virtual_weights.survey.strongest import edges_of, groups_of

    _check_files(save, moments, text)
    if text is None:
        o.refuse_unused(context, "without --text", "tokens")
    else:
        need_runtime(session)
    if port.value not in ("Q", "K"):
        o.refuse_unused(context, f"with port {port.value}, which no rotary embedding turns", "rotary_offset")
    if sketch is not None:
        alone = ("by", "moments", "text", "save", "compute_dtype", "memory_mb")
        o.refuse_unused(context, "with --sketch, which ranks by score", *alone)
        counts = top, max(2000, 20 * top), sketch
        return _sketched(session, vw.CompositionSketch(port.value, rotary_offset, writers.value, *counts, seed, device))
    o.refuse_unused(context, "without --sketch", "seed")
    memory, observed = memory_mb or 1024, moments is not None or text is not None
    by = by or ("contribution" if observed else "score")
    o.checked_column(by, columns(port.value, observed=observed))
    averages = _moments(session, moments, text, tokens, device)  # first: a file that is not there is refused at once
    question = vw.Composition(port.value, rotary_offset, writers.value, compute_dtype, device=device, memory_mb=memory)
    record = question(session.stream, session.step(f"composition {port.value}"))
    if averages is not None:
        flow = vw.Contribution(port.value, averages, False, writers.value, rotary_offset, device, memory)
        contribution = flow(session.stream, session.step(f"contribution {port.value}"))
        record = beside(record, contribution, [column.name for column in contribution.columns])
    if save is not None:
        save_matrices(record, save)
    edges = edges_of(record, top, by)
    title = f"{port.value}-composition by {by.replace('_', ' ')} · {session.name} · norm {record.stamp['norm']}"
    written = [] if save is None else [f"matrices written to {save}"]
    summary = {"by": by, "groups": groups_of(edges, by)}
    return Answer(record, edges, summary, [*edge_tables(title, record, edges, by), *written])


@verb("no_fold", "partial", "offline", "allow_non_finite")
def subspaces(
    session: Session,
    roles: Annotated[str, typer.Option("--roles", metavar="A-B", help="two of Q, K, V, O, e.g. O-K or V-V")] = "O-K",
    by: Annotated[
        str, typer.Option("--by", metavar="COLUMN", help="column to sort by, e.g. overlap, z, cosine, strength")
    ] = "overlap",
    energy: Annotated[
        float | None,
        typer.Option("--energy", metavar="SHARE", help="keep the directions that hold this share of the energy"),
    ] = None,
    top: o.Top = 20,
    device: o.Device = "cpu",
    memory_mb: o.Memory = None,
) -> Answer:
    """Compare the subspaces that heads read and write: how much they overlap, and how far they can interfere.

    Shows for every pair of heads, in the two roles of --roles, their overlap, their smallest angle and a bound on
    interference, largest overlap first.
    """
    from virtual_weights.analysis.pairs.subspaces import figures

    question = vw.Subspaces(*_roles(roles), energy=energy, device=device, memory_mb=memory_mb or 512)
    o.checked_column(by, question.columns)
    record = question(session.stream, session.step(f"subspaces {roles}"))
    rows = [{name: row[name] for name in row if name != "place"} for row in record.top(top, by=by).rows()]
    summary = {name: value for name, value in asdict(figures(record)).items() if value is not None}
    names = ["first", "second", *(c.name for c in record.columns if not c.name.startswith("rank_"))]
    title = f"{roles.upper()} subspaces · {session.name} · norm {record.stamp['norm']}"
    line = "; ".join(
        f"{name.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else figure(value)}"
        for name, value in summary.items()
    )
    return Answer(record, rows, summary, [Table(title, rows, names), line])


def _check_files(save: Path | None, moments: Path | None, text: str | None) -> None:
    if save is not None and save.suffix != ".safetensors":
        raise UsageError(f"--save {save} does not end in .safetensors", expected="FILE.safetensors", do="rename it")
    if moments is not None and text is not None:
        raise UsageError("a text and a file of moments", expected="one of --text and --moments", do="leave one out")


def _sketched(session: Session, question: vw.CompositionSketch) -> Answer:
    """The strongest edges by a sketch, and how complete they are."""
    record = session.ask(question)
    rows, stamp = list(record.rows()), record.stamp
    title = f"{question.port}-composition by score, from a sketch · {session.name} · norm {stamp['norm']}"
    exact = min(question.exact, stamp["pairs"])
    said = f"{exact:,} of {stamp['pairs']:,} pairs were computed; of the others {stamp['doubtful']:,} may be stronger "
    said += f"than the last edge shown, by an estimate from {stamp['samples']:,} numbers and three standard errors"
    summary = {"computed": exact, "pairs": stamp["pairs"], "doubtful": stamp["doubtful"]}
    heads = {"writer": "writer", "reader": "reader", "score": "score", "null_ratio": "null ratio"}
    heads |= {"estimate": "estimated square", "error": "its error"}
    return Answer(record, rows, summary, [Table(title, rows, heads), said])


def edge_tables(title: str, record: vw.Record, edges: Sequence[dict[str, Any]], by: str = "score") -> list[Table | str]:
    """Edges sorted by a column as a table, and below it the distinct ones where readers share a key/value head."""
    from virtual_weights.survey.strongest import groups_of

    names = dict.fromkeys(["writer", "reader", by, *(column.name for column in record.columns)])
    heads = {name: name.replace("_", " ") for name in names}
    shared = {"group": "key/value group"} if any("group" in edge for edge in edges) else {}
    shown: list[Table | str] = [Table(title, edges, heads | shared)]
    merged = groups_of(edges, by)
    if len(merged) < len(edges):
        count = "one edge" if len(merged) == 1 else f"{len(merged)} edges"
        shown.append(f"{len(edges)} rows are {count}, because query heads share key and value heads:")
        shown.append(Table("", merged, ("writer", "group", "readers", by)))
    return shown


def save_matrices(record: vw.Record, path: Path) -> None:
    """Every column as a matrix (readers, writers), NaN where the writer cannot reach, labels in the metadata."""
    from virtual_weights.checkpoint.writing import write_safetensors
    from virtual_weights.record.durable import replacing

    metadata = {
        "question": record.question,
        "readers": json.dumps(record.axis("reader").labels),
        "writers": json.dumps(record.axis("writer").labels),
        "parameters": json.dumps(record.parameters),
        "stamp": json.dumps(record.stamp),
        "provenance": json.dumps(dict(record.provenance)),
    }
    matrices = {c.name: c.values for c in record.columns if not isinstance(c.values, tuple)}
    shapes = {name: (values.dtype, tuple(values.shape)) for name, values in matrices.items()}
    with replacing(path) as temporary:
        write_safetensors(temporary, shapes, matrices.values(), metadata)


def columns(port: str, *, observed: bool) -> tuple[str, ...]:
    """The columns of an answer, known before it is computed; ``observed`` is with contributions."""
    from virtual_weights.stream.group import HEAD_PORTS

    scores = ("score", "strength", "null_ratio", "z", "lift", "writer_effect", "reader_effect")
    of_heads, of_keys = ("share",) if port in HEAD_PORTS else (), ("varying",) if port == "K" else ()
    return (*scores, "contribution", *of_heads, "activity", *of_keys) if observed else scores


def _moments(session: Session, file: Path | None, text: str | None, tokens: int, device: str) -> vw.Moments | None:
    """The moments of a file or of a text; None where neither is named."""
    if file is not None:
        return vw.Moments.load(file, session.stream)
    if text is None:
        return None
    run = vw.Run.on_text(session.stream, text, tokens, device=device)
    return vw.Observation().moments(run, session.step("observation"))


def _roles(text: str) -> tuple[HeadRole, HeadRole]:
    from virtual_weights.analysis.maps.circuits import HeadRole

    roles = text.upper().split("-")
    if len(roles) != 2 or not set(roles) <= set(get_args(HeadRole)):
        raise UsageError(
            f"--roles {text}", expected="two of Q, K, V, O with a hyphen, e.g. O-K", do="correct the roles"
        )
    return cast(HeadRole, roles[0]), cast(HeadRole, roles[1])
