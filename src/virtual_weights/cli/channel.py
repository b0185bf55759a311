"""``vweights channel``: one virtual weight, or one circuit: spectrum, tokens, components, rotary offsets."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from virtual_weights.analysis.channels.channel import Channel, Circuit, summary
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens
from virtual_weights.analysis.channels.offsets import MeanCircuit, OffsetProfile
from virtual_weights.analysis.pairs.composition import ComponentComposition
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, verb
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.stream import parse

_TOKEN = ("directions", "gain", "end", "side", "token", "text", "cosine", "random")
_COMPONENT = ("component", "reader", "score", "null_ratio", "z", "strength", "share", "gain", "gap")
_OFFSET = ("offset", "strength", "score", "null_ratio", "norm_reader")


@verb("no_fold", "partial", "offline", "allow_non_finite")
def channel(
    session: Session,
    writer: Annotated[str, typer.Argument(help="e.g. L16H0, L3.mlp, L3N7, embed; alone: a circuit, L16H0.ov")],
    reader: Annotated[str | None, typer.Argument(help="e.g. L17H3.K, L5.mlp.up, unembed")] = None,
    nearest: Annotated[
        int | None, typer.Option("--nearest", metavar="N", min=1, help="the N tokens nearest to each direction")
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", metavar="N", min=1, help="of how many directions or blocks")] = 3,
    components: Annotated[
        bool, typer.Option("--components", help="singular components of a writing head; alone: with all later heads")
    ] = False,
    offsets: Annotated[
        str | None, typer.Option("--offsets", metavar="A:B", help="over rotary offsets A to B - 1 (A:B:STEP)")
    ] = None,
    rotary_offset: o.RotaryOffset = None,
    top: o.Top = 12,
    seed: o.Seed = 0,
) -> Answer:
    """Gains and effective ranks of the virtual weight from WRITER to READER; its tokens, components and offsets."""
    span = None if offsets is None else _span(offsets)
    if span is not None and reader is None:
        raise UsageError("--offsets without a reader", expected="a port Q or K, such as L17H3.K", do="name a reader")
    answers: list[Answer] = []
    circuit = writer.endswith((".ov", ".qk"))
    if reader is not None or circuit or not components or nearest is not None:
        answers.append(_spectrum(session, writer, reader, rotary_offset, seed, top))
    if nearest is not None:
        tokens = ChannelTokens(writer, reader, nearest, blocks, rotary_offset=rotary_offset)
        answers.append(_tokens(session.ask(tokens)))
    if components:
        name = writer.removesuffix(".ov")
        answers.append(_components(session.ask(ComponentComposition(name, reader, rotary_offset=rotary_offset)), top))
    if span is not None and reader is not None:
        answers += _offsets(session, writer, reader, span)
    first, *rest = answers
    return replace(first, more=rest)


def _spectrum(session: Session, writer: str, reader: str | None, offset: int | None, seed: int, top: int) -> Answer:
    """Figures and gains of the virtual weight, or of a circuit."""
    if reader is None:
        record = session.ask(Circuit(writer, offset))
    else:
        record = session.ask(Channel(writer, reader, offset, seed=seed))
    figures, rows = summary(record), list(record.rows())
    title = f"{writer if reader is None else f'{writer} -> {reader}'} · {session.name}"
    tail = "; the null's edge is the 99% quantile of the largest gain at random orientation"
    shown = [
        Table(title, [{"quantity": name.replace("_", " "), "value": value} for name, value in figures.items()]),
        Table(f"the {len(rows[:top])} largest of {len(rows)} gains", rows[:top], ("direction", "gain", "energy")),
        f"norm {record.stamp['norm']}{'' if reader is None else tail}",
    ]
    return Answer(record, rows, figures, shown)


def _tokens(record: Record) -> Answer:
    rows = [{name: row[name] for name in _TOKEN} for row in record.rows()]
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        text = row["token"] if row["text"] is None else repr(row["text"])
        key = tuple(row[name] for name in ("directions", "gain", "end", "side", "random"))
        lines.setdefault(key, []).append(f"{text} {row['cosine']:.3f}")
    names = ("directions", "gain", "end", "side", "random")
    listed = [dict(zip(names, key, strict=True)) | {"tokens": "  ".join(words)} for key, words in lines.items()]
    title = "directions in tokens with cosines (random: what one of as many random tokens reaches)"
    return Answer(record, rows, {}, [Table(title, listed)])


def _components(record: Record, top: int) -> Answer:
    ordered = sorted(record.rows(), key=lambda row: -float(row["z"] or 0.0))
    rows = [{name: row[name] for name in _COMPONENT} for row in ordered]
    title = f"the {len(rows[:top])} singular components of {record.parameters['writer']} with largest z, of {len(rows)}"
    return Answer(record, rows, {}, [Table(title, rows[:top])])


def _offsets(session: Session, writer: str, reader: str, span: range) -> list[Answer]:
    profile, label = session.ask(OffsetProfile(writer, reader, span)), parse(reader)
    mean = session.ask(MeanCircuit(f"L{label.layer}H{label.index}", span))
    rows, average = list(profile.rows()), profile.stamp["root_mean_square"]
    rotary = profile.stamp["rotary_offset"]
    gains = ", ".join(f"{row['gain']:.4g}" for row in list(mean.rows())[:5])
    shown = [
        Table(f"{writer} -> {reader} by rotary offset", rows, _OFFSET),
        f"root mean square over {'these offsets' if isinstance(rotary, list) else rotary}: "
        f"strength {average['strength']:.4g}, score {average['score']:.4g}",
    ]
    line = f"the QK circuit averaged over them keeps {mean.stamp['kept']:.3g} of its norm; gains {gains}"
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
