"""``vweights channel``: one virtual weight, or one circuit: spectrum, tokens, components, rotary offsets."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from virtual_weights.analysis import Channel, summary
from virtual_weights.analysis.channels.channel import circuit_summary
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens
from virtual_weights.analysis.channels.offsets import MeanCircuit, OffsetProfile
from virtual_weights.analysis.pairs.component_composition import ComponentComposition
from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.stream import Stream, parse

_TOKEN = ("directions", "gain", "end", "side", "token", "text", "cosine", "random")
_COMPONENT = ("component", "reader", "score", "null_ratio", "z", "strength", "share", "gain", "gap")
_OFFSET = ("offset", "strength", "score", "null_ratio", "norm_reader")


def channel(
    model: o.ModelArgument,
    writer: Annotated[str, typer.Argument(help="e.g. L16H0, L3.mlp, L3N7, embed; alone: a circuit, L16H0.ov")],
    reader: Annotated[str | None, typer.Argument(help="e.g. L17H3.K, L5.mlp.up, unembed")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", min=1, help="the N tokens nearest to each direction")
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", metavar="N", min=1, help="of how many directions or blocks")] = 3,
    components: Annotated[
        bool, typer.Option("--components", help="singular components of a writing head; alone: with all later heads")
    ] = False,
    offsets: Annotated[
        str | None, typer.Option("--offsets", metavar="A:B", help="over rotary offsets A to B - 1 (A:B:STEP)")
    ] = None,
    rotary_offset: o.RotaryOffset = None,
    no_fold: o.NoFold = False,
    top: o.Top = 12,
    seed: Annotated[int, typer.Option(help="seed of the null's random rotations")] = 0,
    partial: o.Partial = False,
    offline: o.Offline = False,
    allow_non_finite: o.AllowNonFinite = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Spectrum and effective ranks of the virtual weight from WRITER to READER; its tokens, components and offsets."""
    span = None if offsets is None else _span(offsets)
    if span is not None and reader is None:
        raise UsageError("--offsets without a reader", expected="a port Q or K, such as L17H3.K", do="name a reader")
    with steps(progress) as step:
        stream = open_model(
            model, step("open"), fold=not no_fold, partial=partial, offline=offline, non_finite=allow_non_finite
        )
        found = _spectrum(stream, writer, reader, rotary_offset, seed, components and tokens is None)
        if tokens is not None:
            shown = ChannelTokens(writer, reader, tokens, blocks, rotary_offset=rotary_offset)(stream)
            found["tokens"] = [{name: row[name] for name in _TOKEN} for row in shown.rows()]
        if components:
            name = writer.removesuffix(".ov")
            found["components"] = _components(ComponentComposition(name, reader, rotary_offset=rotary_offset)(stream))
        if span is not None and reader is not None:
            found["offsets"] = _offsets(stream, writer, reader, span)
    found = {
        "model": model,
        "writer": writer,
        "reader": reader,
        "rotary_offset": rotary_offset,
        "norm": stream.norm_stamp,
        **found,
        "provenance": stream.provenance,
    }
    if as_json:
        put_json(found)
    else:
        _show(found, top)


def _spectrum(
    stream: Stream, writer: str, reader: str | None, offset: int | None, seed: int, optional: bool
) -> dict[str, Any]:
    """Figures and gains of the virtual weight or of the circuit; nothing for a writer alone, where that will do."""
    if reader is not None:
        record = Channel(writer, reader, offset, seed=seed)(stream)
        return {**summary(record), "singular_values": [row["gain"] for row in record.rows()]}
    if optional and not writer.endswith((".ov", ".qk")):
        return {}
    figures, gains = circuit_summary(stream, writer, offset or 0)
    return {**figures, "singular_values": gains.tolist()}


def _components(record: Record) -> list[dict[str, Any]]:
    rows = sorted(record.rows(), key=lambda row: -float(row["z"] or 0.0))
    return [{name: row[name] for name in _COMPONENT} for row in rows]


def _offsets(stream: Stream, writer: str, reader: str, span: range) -> dict[str, Any]:
    profile = OffsetProfile(writer, reader, span)(stream)
    label = parse(reader)
    mean = MeanCircuit(f"L{label.layer}H{label.index}", span)(stream)
    return {
        "rotary_offset": profile.stamp["rotary_offset"],
        "profile": list(profile.rows()),
        "root_mean_square": profile.stamp["root_mean_square"],
        "mean_circuit": {"kept": mean.stamp["kept"], "singular_values": [row["gain"] for row in mean.rows()]},
    }


def _span(text: str) -> range:
    try:
        start, stop, *step = (int(part) for part in text.split(":"))
        return range(start, stop, *step)
    except (ValueError, TypeError):
        raise UsageError(f"--offsets {text!r}", expected="A:B or A:B:STEP", do="pass for example 0:16") from None


def _show(found: dict[str, Any], top: int) -> None:
    title = found["writer"] if found["reader"] is None else f"{found['writer']} -> {found['reader']}"
    if "singular_values" in found:
        kept = ("model", "writer", "reader", "rotary_offset", "norm", "singular_values", "provenance")
        extra = ("tokens", "components", "offsets")
        table(
            f"{title} · {found['model']}",
            ["quantity", "value"],
            [[name, value] for name, value in found.items() if name not in (*kept, *extra)],
        )
        _show_gains(found["singular_values"], top)
    if "tokens" in found:
        _show_tokens(found["tokens"])
    if "components" in found:
        rows = found["components"][:top]
        table(
            f"the {len(rows)} singular components of {found['writer']} with largest z, of {len(found['components'])}",
            list(_COMPONENT),
            [[row[name] for name in _COMPONENT] for row in rows],
        )
    if "offsets" in found:
        _show_offsets(found["offsets"], title)
    tail = "; the null's edge is the 99% quantile of the largest gain at random orientation"
    line(f"norm {found['norm']}{tail if 'null_edge' in found else ''}")


def _show_gains(gains: list[float], top: int) -> None:
    total = sum(gain**2 for gain in gains)
    rows = [[str(i), gain, gain**2 / total if total else None] for i, gain in enumerate(gains[:top], 1)]
    table(f"the {len(rows)} largest of {len(gains)} gains", ["direction", "gain", "energy"], rows)


def _show_tokens(rows: list[dict[str, Any]]) -> None:
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        text = row["token"] if row["text"] is None else repr(row["text"])
        key = tuple(row[name] for name in ("directions", "gain", "end", "side", "random"))
        lines.setdefault(key, []).append(f"{text} {row['cosine']:.3f}")
    table(
        "directions in tokens with cosines (random: what one of as many random tokens reaches)",
        ["directions", "gain", "end", "side", "random", "tokens"],
        [[*key, "  ".join(told)] for key, told in lines.items()],
    )


def _show_offsets(found: dict[str, Any], title: str) -> None:
    table(f"{title} by rotary offset", list(_OFFSET), [[row[name] for name in _OFFSET] for row in found["profile"]])
    mean, circuit_ = found["root_mean_square"], found["mean_circuit"]
    rotary = found["rotary_offset"]
    line(
        f"root mean square over {'these offsets' if isinstance(rotary, list) else rotary}: "
        f"strength {mean['strength']:.4g}, score {mean['score']:.4g}"
    )
    gains = ", ".join(f"{gain:.4g}" for gain in circuit_["singular_values"][:5])
    line(f"the QK circuit averaged over them keeps {circuit_['kept']:.3g} of its norm; gains {gains}")
