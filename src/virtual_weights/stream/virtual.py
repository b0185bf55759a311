"""The virtual weight of one writer and one reader."""

from __future__ import annotations

from dataclasses import replace

from virtual_weights.errors import UsageError
from virtual_weights.linalg import Dense, LinearMap
from virtual_weights.stream.effective import as_seen
from virtual_weights.stream.names import Label, parse
from virtual_weights.stream.stream import Stream
from virtual_weights.stream.views import Features, Head, Mlp


def virtual_weight(stream: Stream, writer: str, reader: str, offset: int = 0) -> LinearMap:
    """The implicit matrix through which a reader sees a writer, in factors.

    ``V = R~ O`` for parts with an inner basis of their own (neurons, tokens, positions). A head's
    inner basis is arbitrary, so heads enter by their circuits: a writing head by ``OV``, a reading
    head by ``QK^T`` (port Q), ``QK`` (port K) or ``OV`` (port V).

    Args:
        stream: the model.
        writer: ``L16H0``, ``L3.mlp``, ``L3N7``, ``tc8:F12``, ``embed``, ``pos`` or a bias.
        reader: ``L17H3.K``, ``L5.mlp.up``, ``L5N7.gate``, ``tc8:F12.enc`` or ``unembed``.
        offset: rotary offset (query position minus key position) for ports Q and K.

    Returns:
        A factored map, shape (reader's outputs, writer's inputs); its singular values do not change
        when heads are re-based or, with RMSNorm folded, when the stream is rotated.

    Raises:
        UsageError: a name is wrong, the reader lacks a port, or the writer comes too late.
    """
    target = parse(reader)
    _check_reach(stream, parse(writer), target)
    stream, state = as_seen(stream, target.port or ""), stream.groups.of(target).reads
    return reading_map(stream, target, offset) @ writing_map(stream, writer, state)


def writing_map(stream: Stream, writer: str, state: int | None = None) -> LinearMap:
    """What a component adds to the stream: OV of a head, else its write map (d, k); of a dictionary by a state."""
    label = parse(writer)
    if label.kind == "unembed" or label.port not in (None, "O", "out", "dec"):
        raise UsageError(
            f"{writer} does not write", expected="a writer such as L16H0, L3.mlp or embed", do="name a writer"
        )
    if label.kind in ("dictionary", "feature"):
        grows = len(stream.groups.of(label).writes) > 1
        by_state = (state if label.state is None else label.state) if grows else label.state
        dec = stream[str(replace(label, port="dec", state=by_state))]
        assert isinstance(dec, LinearMap)
        return dec
    if label.kind not in ("head", "mlp", "neuron"):
        return Dense(stream.write(writer)[0])
    part = stream[str(Label(label.kind, label.layer, label.index))]
    if isinstance(part, Head):
        return part.ov
    assert isinstance(part, Mlp)
    return part.out


def reading_map(stream: Stream, reader: Label, offset: int = 0) -> LinearMap:
    """How a port sees the stream: a head's circuit, else its effective read map (k, d)."""
    if reader.kind == "unembed":
        return Dense(stream.read("unembed").maps[0])
    part = stream[str(replace(reader, port=None, state=None))]
    if isinstance(part, Features):
        return part.map("enc")
    if isinstance(part, Head):
        return part.circuit(_port(reader), offset)
    if isinstance(part, Mlp):
        return part.reader(_port(reader))
    raise UsageError(f"{reader} does not read", expected="a reader such as L17H3.K or unembed", do="name a reader")


def _port(reader: Label) -> str:
    if reader.port is None or reader.port in ("O", "out"):
        ports = "Q, .K or .V" if reader.kind == "head" else "gate, .up or .in"
        raise UsageError(
            f"{reader} names no reading port", expected=f"the name with .{ports}", do="say through which port it reads"
        )
    return reader.port


def _check_reach(stream: Stream, writer: Label, reader: Label) -> None:
    source, target = stream.groups.of(writer), stream.groups.of(reader)
    if source.writes and target.reads is not None and not source.reaches(target.reads):
        raise UsageError(
            f"{writer} cannot reach {reader}: it writes state {source.first}, the reader reads state {target.reads}",
            expected="a writer that comes before the reader in depth",
            do="exchange the two, or choose an earlier writer",
        )
