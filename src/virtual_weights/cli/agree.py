"""``vweights agree``: how far a score from weights, or moments of another text, can be trusted on this model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from virtual_weights.analysis.pairs.alignment import agreement
from virtual_weights.analysis.pairs.composition import Composition
from virtual_weights.analysis.pairs.contribution import Delivered
from virtual_weights.analysis.pairs.overlap import Overlap
from virtual_weights.cli import options as o
from virtual_weights.cli.observe import Batch, ChunkLength, Repeated, TextSource, Tokens, passages
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.removals import drawn_edges, removals
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.cli.tokens import passage
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import load
from virtual_weights.runtime.edges.attribution import attribute
from virtual_weights.runtime.edges.edge import next_token_loss
from virtual_weights.runtime.flow.observation import observe
from virtual_weights.runtime.running.text import batches
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HEAD_PORTS, HeadPort, Writers
from virtual_weights.stream.moments import Moments

_SHOWN = ("predictor", "port", "target", "per_reader_rank_correlation", "rank_correlation", "precision_at_20", "edges")
_SEQUENCES, _LENGTH = 8, 64  # of the target text, for removals


@dataclass(frozen=True)
class _Texts:
    """What predicts and what is predicted: batches of each, what they are, and the sequences that removals run on."""

    before: list[Tensor]
    target: list[Tensor]
    told: tuple[str, str]
    sequences: Tensor
    first: int

    @property
    def described(self) -> dict[str, Any]:
        """Where they come from, and what edges are removed on."""
        before, target = self.told
        return {"predicted_from": before, "target_text": target, "removed_on": list(self.sequences.shape)}


def agree(
    model: o.ModelArgument,
    text: TextSource = None,
    repeated: Repeated = False,
    tokens: Tokens = 4096,
    length: ChunkLength = 256,
    batch: Batch = 4,
    writers: o.WriterOption = o.WriterSet.heads,
    centred: Annotated[bool, typer.Option("--centred", help="leave out what a writer says to every token")] = False,
    edges: Annotated[
        int, typer.Option("--edges", metavar="N", min=0, help="of each port: edges to remove, drawn at random; 0: none")
    ] = 48,
    seed: Annotated[int, typer.Option("--seed", help="of random tokens, and of the edges that are drawn")] = 0,
    device: o.Device = "cpu",
    memory_mb: o.MemoryMb = 1024,
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """Rank correlation of each predictor of edges into heads with the energy that a run delivers, and with cause.

    The moments that predict are of other text: the default text where --text names one, or of --repeated tokens another
    seed's; else the tokens that come before those of the target. Cause is what the loss on the target's text loses when
    the edge is removed; attribution is its first order there.
    """
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        chosen = _texts(stream, text, tokens, length, batch, seed if repeated else None)
        runs = load(stream, device=device)
        ticks = step("observe one text"), step("observe another")
        before, target = (
            observe(stream, each, runs, memory_mb=memory_mb, progress=lambda done, t=tick: t(done, tokens))
            for each, tick in zip((chosen.before, chosen.target), ticks, strict=True)
        )
        compared = _Compared(stream, before, target, writers.value, centred, device)
        rows = list(compared.with_flow())
        if edges:
            metric = partial(next_token_loss, first=chosen.first)
            attributed = attribute(stream, chosen.sequences, metric, runs, progress=step("attribution"))
            for port in HEAD_PORTS:
                drawn = drawn_edges(stream, port, edges, seed)
                removed = removals(stream, drawn, chosen.sequences, chosen.first, runs, step(f"remove {port}"))
                rows += compared.with_cause(port, removed, attributed[port])
    found = {"model": model, "agreement": rows, **chosen.described, "tokens": [before.tokens, target.tokens]}
    found |= {"heads": target.form, "moment": "centred" if centred else "uncentred", "provenance": stream.provenance}
    if as_json:
        put_json(found)
        return
    title = f"rank correlation with delivered energy and with the effect of removing an edge · {model}"
    table(title, list(_SHOWN), [[row[name] for name in _SHOWN] for row in rows])
    line(f"delivered: {target.tokens} tokens of {chosen.told[1]}; data-aware: {before.tokens} of {chosen.told[0]}")
    if edges:
        n, t = chosen.sequences.shape
        line(f"causal: edges drawn at random, removed one by one on {n} sequences of {t} tokens of the former text")


def _texts(stream: Stream, text: str | None, tokens: int, length: int, batch: int, seed: int | None) -> _Texts:
    if seed is not None or text is not None:
        first, before = passages(stream, None, tokens, length, batch, None if seed is None else seed + 1)
        second, after = passages(stream, text, tokens, length, batch, seed)
        both = list(first), list(second), (before, after)
        if seed is not None:
            words = passage(stream, None, _SEQUENCES, _LENGTH // 2, seed)
            return _Texts(*both, words.tokens, words.first)
        return _Texts(*both, _sequences(both[1]), 1)
    chunks, name = passages(stream, None, 2 * tokens, length, 1, None)
    rows = [row for each in chunks for row in each]
    half = (len(rows) + 1) // 2
    first, second = (list(batches(part, length, batch)) for part in (rows[:half], rows[half:]))
    return _Texts(first, second, (f"{name}, earlier", f"{name}, later"), _sequences(second), 1)


def _sequences(batches: list[Tensor]) -> Tensor:
    """The first whole sequences of a text, of the length for removals or of the longest there is."""
    longest = min(_LENGTH, max((batch.shape[1] for batch in batches), default=0))
    whole = [row[:longest] for batch in batches for row in batch if int(row[:longest].min()) >= 0]
    return torch.stack(whole[:_SEQUENCES])


@dataclass(frozen=True, eq=False)
class _Compared:
    """Predictors of edges into heads, and what they are held against.

    Attributes:
        stream: the model.
        before: moments that predict.
        target: moments of what is predicted.
        writers: as in ``Delivered``.
        centred: as in ``Delivered``.
        device: of the kernels.
    """

    stream: Stream
    before: Moments
    target: Moments
    writers: Writers
    centred: bool
    device: str

    def with_flow(self) -> Iterator[dict[str, Any]]:
        """Every predictor against the energy delivered."""
        for port in HEAD_PORTS:
            delivered = self._delivered(port, self.target)
            if not bool(delivered.present().any()):
                raise UsageError(
                    "no head reads what another wrote", expected="two layers of attention", do="take another model"
                )
            yield from _rows(port, self._predictors(port), delivered, "delivered", "delivered")

    def with_cause(self, port: HeadPort, removed: Record, attributed: Record) -> list[dict[str, Any]]:
        """Every predictor, what is delivered and attributed, against the effect of removing edges."""
        flow = {"delivered": (self._delivered(port, self.target), "delivered"), "attribution": (attributed, "size")}
        return _rows(port, self._predictors(port) | flow, removed, "size", "causal")

    def _predictors(self, port: HeadPort) -> dict[str, tuple[Record, str]]:
        """Records that predict, each with its column."""
        composition = Composition(port, device=self.device, writers=self.writers)(self.stream)
        return {
            "data-aware": (self._delivered(port, self.before), "delivered"),
            "composition": (composition, "score"),
            "strength": (composition, "strength"),
            "overlap": (Overlap(port, self.device)(self.stream), "overlap"),
        }

    def _delivered(self, port: HeadPort, moments: Moments) -> Record:
        return Delivered(port, moments, self.centred, self.writers, device=self.device)(self.stream)


def _rows(
    port: HeadPort, predictors: dict[str, tuple[Record, str]], target: Record, of: str, name: str
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for predictor, (record, column) in predictors.items():
        found = agreement(record, target, column, of)
        rows.append(
            {
                "predictor": predictor,
                "port": port,
                "target": name,
                "per_reader_rank_correlation": found.per_reader,
                "rank_correlation": found.overall,
                "precision_at_20": found.precision,
                "precision_at_random": found.top / found.edges,
                "readers": found.readers,
                "edges": found.edges,
            }
        )
    return rows
