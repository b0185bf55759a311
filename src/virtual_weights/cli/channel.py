"""``vweights channel``: one virtual weight, or one circuit: spectrum, tokens, components, rotary offsets."""

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

_TOKEN = ("directions", "gain", "end", "side", "token", "text", "cosine", "random")
_BLOCK = ("directions", "end", "side", "random", "gain")
_COMPONENT = ("component", "reader", "score", "null_ratio", "z", "strength", "share", "gain", "gap")
_OFFSET = ("offset", "strength", "score", "null_ratio", "norm_reader")


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
        str,
        typer.Argument(
            metavar="WRITER", help="e.g. L16H0, L3.mlp, L3N7 or embed; a circuit such as L16H0.ov without READER"
        ),
    ],
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
    components: Annotated[
        bool,
        typer.Option(
            "--singular-components",
            help="also score each singular component of the writing head; without READER, against all later heads",
        ),
    ] = False,
    offsets: Offsets = None,
    rotary_offset: o.RotaryOffset = None,
    top: o.Top = 12,
    seed: o.Seed = 0,
) -> Answer:
    """Look inside one connection: how many directions it carries, how strongly, and near which tokens they lie.

    WRITER alone names a circuit, such as L16H0.ov. The option --singular-components adds scores for the single
    directions that the writing head writes, and --offsets shows how the connection changes with the distance between
    tokens.
    """
    _refuse_unused(context, reader or writer)
    span = None if offsets is None else _span(offsets)
    answers: list[Answer] = []
    if reader is not None or writer.endswith((".ov", ".qk")) or not components or nearest is not None:
        answers.append(_spectrum(session, writer, reader, rotary_offset, seed, top))
    if nearest is not None:
        tokens = vw.ChannelTokens(writer, reader, nearest, blocks, rotary_offset=rotary_offset)
        answers.append(_tokens(session.ask(tokens), reader or writer))
    if components:
        name = writer.removesuffix(".ov")
        scored = session.ask(vw.ComponentComposition(name, reader, rotary_offset=rotary_offset))
        answers.append(_components(scored, top))
    if span is not None and reader is not None:
        answers += _offsets(session, writer, reader, span)
    first, *rest = answers
    return replace(first, more=rest)


def _refuse_unused(context: typer.Context, end: str) -> None:
    """Refuse options of what is not asked for, and of offsets where nothing turns with them."""
    given = context.params
    if given["nearest"] is None:
        o.refuse_unused(context, "without --nearest", "blocks")
    if given["reader"] is None:
        o.refuse_unused(context, "without READER", "offsets", "seed")
    if given["reader"] is not None or not given["components"]:
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
    offset = record.stamp["rotary_offset"]  # words where the model has no rotary embedding
    return f" at rotary offset {offset}" if end.endswith((".Q", ".K", ".qk")) and isinstance(offset, int) else ""


def _tokens(record: vw.Record, end: str) -> Answer:
    """Every token with its cosine; only those that are nearer than chance are shown."""
    rows = [{name: row[name] for name in _TOKEN} | {"above_chance": _above(row)} for row in record.rows()]
    lines: dict[tuple[Any, ...], list[str]] = {}
    above = [row for row in rows if row["above_chance"]]
    for row in above:
        text = row["token"] if row["text"] is None else repr(row["text"])
        lines.setdefault(tuple(row[name] for name in _BLOCK), []).append(f"{text} {row['cosine']:.3f}")
    listed = [dict(zip(_BLOCK, key, strict=True)) | {"tokens": "  ".join(words)} for key, words in lines.items()]
    columns = {"directions": "directions", "end": "end", "side": "side", "tokens": "tokens and cosines"}
    columns |= {"random": "chance", "gain": "gain"}
    title = f"directions in tokens{_turned(record, end)} (chance: the largest cosine of as many random tokens)"
    shown: list[Table | str] = [Table(title, listed, columns)] if listed else []
    count = len({tuple(row[name] for name in _BLOCK) for row in rows})
    ends, sides = (dict.fromkeys(str(row[name]) for row in rows) for name in ("end", "side"))
    if not listed:
        where = f"at any end ({', '.join(ends)}), on any side ({', '.join(sides)})"
        shown.append(f"directions in tokens: no token is nearer to any direction than chance, {where}")
    elif len(listed) < count:
        missing = count - len(listed)
        shown.append(f"{missing} of {count} combinations of direction, end and side have no token nearer than chance")
    return Answer(record, rows, {"above_chance": len(above), "tokens": len(rows)}, shown)


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
