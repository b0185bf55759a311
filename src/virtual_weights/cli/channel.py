"""``vweights channel``: one virtual weight, one circuit or those of all heads: spectrum, tokens, angles, offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, figure, verb
from virtual_weights.errors import UsageError

_TOKEN = ("directions", "gain", "end", "side", "token", "text", "cosine", "random", "written_read")
_BLOCK = ("head", "directions", "end", "side", "random", "gain", "written_read")
_COMPONENT = ("component", "reader", "score", "null_ratio", "z", "strength", "share", "gain", "gap")
_OFFSET = ("offset", "strength", "score", "null_ratio", "norm_reader")

Components = Annotated[
    bool,
    typer.Option(
        "--singular-components",
        help="also score each singular component of the writing head; without READER, against all later heads",
    ),
]
Angles = Annotated[
    bool,
    typer.Option(
        "--angles",
        help="also show the principal angles between what WRITER writes and what READER reads, against chance",
    ),
]
Offsets = Annotated[
    str | None,
    typer.Option(
        "--offsets",
        metavar="A:B",
        help="also show the rotary offsets from A to B - 1, e.g. 0:16, or 0:16:2 with a step",
    ),
]


@verb("no_fold", "partial", "offline", "allow_non_finite")
def channel(
    session: Session,
    context: typer.Context,
    writer: Annotated[
        str | None,
        typer.Argument(
            metavar="WRITER",
            help="e.g. L16H0, L3.mlp, L3N7 or embed; a circuit such as L16H0.ov without READER; all heads if left out",
        ),
    ] = None,
    reader: Annotated[str | None, typer.Argument(metavar="READER", help="e.g. L17H3.K, L5.mlp.up, unembed")] = None,
    nearest: Annotated[
        int | None, typer.Option("--nearest", metavar="N", min=1, help="show the N tokens nearest to each direction")
    ] = None,
    blocks: Annotated[
        int,
        typer.Option(
            "--blocks",
            metavar="N",
            min=1,
            help="how many directions --nearest shows; directions of equal gain count as one",
        ),
    ] = 3,
    components: Components = False,
    angles: Angles = False,
    offsets: Offsets = None,
    rotary_offset: o.RotaryOffset = None,
    top: o.Top = 12,
    seed: o.Seed = 0,
) -> Answer:
    """Look inside one connection: how many directions it carries, how strongly, and near which tokens they lie.

    WRITER alone names a circuit, such as L16H0.ov; without WRITER the circuits of all heads are compared. The option
    --singular-components adds scores for the single directions that the writing head writes, and --offsets shows how
    the connection changes with the distance between tokens.
    """
    _refuse_unused(context, reader or writer)
    if writer is None:
        return _heads(session, rotary_offset, nearest, blocks, top)
    span = None if offsets is None else _span(offsets)
    answers: list[Answer] = []
    if reader is not None or writer.endswith((".ov", ".qk")) or not components or nearest is not None:
        answers.append(_spectrum(session, writer, reader, rotary_offset, seed, top))
    if nearest is not None:
        tokens = vw.ChannelTokens(writer, reader, nearest, blocks, rotary_offset=rotary_offset)
        answers.append(_tokens(session.ask(tokens), reader or writer))
    if angles and reader is not None:
        answers.append(_angles(session.ask(vw.PairAngles(writer, reader, rotary_offset, seed=seed)), top))
    if components:
        name = writer.removesuffix(".ov")
        scored = session.ask(vw.ComponentComposition(name, reader, rotary_offset=rotary_offset))
        answers.append(_components(scored, top))
    if span is not None and reader is not None:
        answers += _offsets(session, writer, reader, span)
    first, *rest = answers
    return replace(first, more=rest)


def _refuse_unused(context: typer.Context, end: str | None) -> None:
    """Refuse options of what is not asked for, and of offsets where nothing turns with them."""
    given = context.params
    if given["nearest"] is None:
        o.refuse_unused(context, "without --nearest", "blocks")
    if given["reader"] is None:
        o.refuse_unused(context, "without READER", "angles", "offsets", "seed")
    if end is None:
        o.refuse_unused(context, "without WRITER", "components")
    elif given["reader"] is not None or not given["components"]:
        o.refuse_offsets(context, end, "offsets", "rotary_offset")


def _plain(value: Any) -> Any:
    """A shape as ``rows x columns``, everything else as it is."""
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _spectrum(session: Session, writer: str, reader: str | None, offset: int | None, seed: int, top: int) -> Answer:
    """Figures and gains of the virtual weight, or of a circuit."""
    from virtual_weights.analysis.channels.channel import summary

    if reader is None:
        record = session.ask(vw.Circuit(writer, offset))
    else:
        record = session.ask(vw.Channel(writer, reader, offset, seed=seed))
    figures, rows = summary(record), list(record.rows())
    title = (
        f"{writer if reader is None else f'{writer} -> {reader}'}{_turned(record, reader or writer)} · {session.name}"
    )
    null = "null edge: the 99% quantile of the largest gain at random orientation; " if reader is not None else ""
    shown = [
        Table(title, [{"quantity": n.replace("_", " "), "value": _plain(value)} for n, value in figures.items()]),
        Table(f"the {len(rows[:top])} largest of {len(rows)} gains", rows[:top], ("direction", "gain", "energy")),
        f"{null}norm {record.stamp['norm']}",
    ]
    return Answer(record, rows, figures, shown)


def _turned(record: vw.Record, end: str) -> str:
    """The rotary offset of what depends on it, by the end through which one reads, for titles."""
    offset = record.stamp.get("rotary_offset")  # words where the model has no rotary embedding
    return f" at rotary offset {offset}" if end.endswith((".Q", ".K", ".qk")) and isinstance(offset, int) else ""


def _heads(session: Session, offset: int | None, nearest: int | None, blocks: int, top: int) -> Answer:
    """The circuits of all heads by strength, and on request their strongest OV directions in tokens."""
    from virtual_weights.analysis.channels.head_circuits import summary

    record = session.ask(vw.HeadCircuits(offset))
    heads = sorted(summary(record), key=lambda row: -(row["ov_strength"] or 0.0))
    title = f"the {len(heads[:top])} of {len(heads)} heads of strongest OV{_turned(record, '.qk')} · {session.name}"
    line = f"directions: how many of equal strength (entropy rank); norm {record.stamp['norm']}"
    answer = Answer(record, None, {"heads": heads}, [Table(title, heads[:top]), line])
    if nearest is None:
        return answer
    return replace(answer, more=[_tokens(session.ask(vw.HeadTokens(nearest, blocks)), "", top)])


def _tokens(record: vw.Record, end: str, top: int | None = None) -> Answer:
    """Every token with its cosine; only those that are nearer than chance are shown.

    Args:
        record: of one channel or of all heads.
        end: through which one reads, for the title.
        top: how many directions are shown, those of largest gain; None shows all.
    """
    columns = [name for name in ("head", *_TOKEN) if name in {column.name for column in record.columns}]
    rows = [{name: row[name] for name in columns} | {"above_chance": _above(row)} for row in record.rows()]
    block = [name for name in _BLOCK if name in columns]
    lines: dict[tuple[Any, ...], list[str]] = {}
    above = [row for row in rows if row["above_chance"]]
    for row in above:
        text = row["token"] if row["text"] is None else repr(row["text"])
        lines.setdefault(tuple(row[name] for name in block), []).append(f"{text} {row['cosine']:.3f}")
    listed = [dict(zip(block, key, strict=True)) | {"tokens": "  ".join(words)} for key, words in lines.items()]
    names = ("head", "directions", "end", "side") if "head" in columns else ("directions", "end", "side")
    heads = {name: name for name in names} | {"tokens": "tokens and cosines", "random": "chance", "gain": "gain"}
    heads["written_read"] = "cosine of ends"
    title = f"directions in tokens{_turned(record, end)} (chance: the largest cosine of as many random tokens)"
    shown: list[Table | str] = []
    if listed:
        table = listed if top is None else sorted(listed, key=lambda row: -float(row["gain"]))[:top]
        shown.append(Table(title, table, heads))
    count = len({tuple(row[name] for name in block) for row in rows})
    ends, sides = (dict.fromkeys(str(row[name]) for row in rows) for name in ("end", "side"))
    if not listed:
        where = f"at any end ({', '.join(ends)}), on any side ({', '.join(sides)})"
        shown.append(f"directions in tokens: no token is nearer to any direction than chance, {where}")
    elif len(listed) < count:
        missing = count - len(listed)
        shown.append(f"{missing} of {count} combinations of direction, end and side have no token nearer than chance")
    return Answer(record, rows, {"above_chance": len(above), "tokens": len(rows)}, shown)


def _angles(record: vw.Record, top: int) -> Answer:
    """The cosines of all principal angles, those of the smallest angles shown."""
    rows, stamp = list(record.rows()), record.stamp
    above = int((record.numbers("cosine") > record.numbers("random_high")).sum())
    ranks = f"{stamp['rank_writer']} dimensions written, {stamp['rank_reader']} read"
    title = f"the {len(rows[:top])} of {len(rows)} principal angles of largest cosine ({ranks})"
    heads = {"direction": "direction", "cosine": "cosine", "random_low": "chance, 5%", "random_high": "chance, 95%"}
    figures = {"above_chance": above, "rank_writer": stamp["rank_writer"], "rank_reader": stamp["rank_reader"]}
    line = f"{above} of {len(rows)} cosines are above 95% of those of random subspaces"
    return Answer(record, rows, figures, [Table(title, rows[:top], heads), line])


def _above(row: Mapping[str, Any]) -> bool:
    """Whether a token is nearer to a direction than the nearest of as many random ones."""
    return abs(row["cosine"]) > row["random"]


def _components(record: vw.Record, top: int) -> Answer:
    ordered = sorted(record.rows(), key=lambda row: -float(row["z"] or 0.0))
    rows = [{name: row[name] for name in _COMPONENT} for row in ordered]
    writer = f"{record.parameters['writer']}{_turned(record, str(record.parameters['reader'] or ''))}"
    title = f"the {len(rows[:top])} of {len(rows)} singular components of {writer} with largest z"
    return Answer(record, rows, {"components": len(rows)}, [Table(title, rows[:top])])


def _offsets(session: Session, writer: str, reader: str, span: range) -> list[Answer]:
    from virtual_weights.stream import parse

    profile, label = session.ask(vw.OffsetProfile(writer, reader, span)), parse(reader)
    mean = session.ask(vw.MeanCircuit(f"L{label.layer}H{label.index}", span))
    rows, average = list(profile.rows()), profile.stamp["root_mean_square"]
    rotary = profile.stamp["rotary_offset"]
    gains = ", ".join(f"{row['gain']:.4g}" for row in list(mean.rows())[:5])
    shown = [
        Table(f"{writer} -> {reader} by rotary offset", rows, _OFFSET),
        f"root mean square over {'these offsets' if isinstance(rotary, list) else rotary}: "
        f"strength {average['strength']:.4g}, score {figure(average['score'], 4)}",
    ]
    kept = figure(mean.stamp["kept"], 3)
    line = f"averaged over these offsets, the QK circuit keeps {kept} of its norm; its gains: {gains}"
    return [
        Answer(profile, rows, {"root_mean_square": average}, shown),
        Answer(mean, None, {"kept": mean.stamp["kept"]}, [line]),
    ]


def _span(text: str) -> range:
    try:
        start, stop, *step = (int(number) for number in text.split(":"))
        return range(start, stop, *step)
    except (ValueError, TypeError):
        raise UsageError(f"--offsets {text!r}", expected="A:B or A:B:STEP", do="pass for example 0:16") from None
