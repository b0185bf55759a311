"""Agreement of two measures of edges, and the commands that observe and compare."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import typer
from tiny_models import tiny
from torch import Tensor
from typer.testing import CliRunner

import virtual_weights as vw
from virtual_weights.analysis.depth.frozen import replay
from virtual_weights.analysis.pairs.alignment import agreement, rank_correlation
from virtual_weights.analysis.pairs.contribution import Delivered
from virtual_weights.analysis.pairs.overlap import Overlap
from virtual_weights.cli.agree import agree
from virtual_weights.cli.composition import composition
from virtual_weights.cli.observe import observe_model
from virtual_weights.cli.removals import drawn_edges, removals
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime import load
from virtual_weights.runtime.edges.ablation import Trial, prove
from virtual_weights.runtime.edges.attribution import attribute
from virtual_weights.runtime.edges.edge import channel_readers, next_token_loss
from virtual_weights.runtime.flow.observation import observe
from virtual_weights.runtime.running.text import repeated_tokens
from virtual_weights.stream import OperatingPoint
from virtual_weights.stream.moments import Moments

NAN = float("nan")
app = typer.Typer()
app.command("observe")(observe_model)
app.command("agree")(agree)
app.command("composition")(composition)


def _record(values: Tensor, channels: tuple[str, ...] = (), readers: tuple[str, ...] = ()) -> Record:
    names = readers or tuple(f"r{i}" for i in range(len(values)))
    writers = tuple(f"w{i}" for i in range(values.shape[1]))
    return Record("made", (Axis("reader", names, channels), Axis("writer", writers)), (Column("x", values),))


def test_rank_correlation_is_scipys_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randint(6, (2, 12), generator=generator).double()
        assert rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-12)
    assert rank_correlation(torch.ones(4), torch.arange(4)) is None


def test_agreement_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    guess, truth = torch.rand(2, 4, 9, generator=generator, dtype=torch.float64)
    truth[0, 2:] = NAN  # two writers: too few for a correlation
    truth[3] = NAN
    found = agreement(_record(guess), _record(truth), "x", "x", top=5)
    rows = [scipy.stats.spearmanr(guess[i], truth[i])[0] for i in (1, 2)]
    both = ~truth.isnan()
    assert found.per_reader == pytest.approx(sum(rows) / 2)
    assert (found.readers, found.edges, found.top) == (2, 20, 5)
    assert found.overall == pytest.approx(scipy.stats.spearmanr(guess[both], truth[both])[0])
    best = [set(x[both].argsort(descending=True)[:5].tolist()) for x in (guess, truth)]
    assert found.precision == len(best[0] & best[1]) / 5
    assert agreement(_record(-truth), _record(truth), "x", "x").per_reader == pytest.approx(-1)


def test_edges_are_matched_by_label_and_by_channel() -> None:
    truth = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    channels = ("a", "a", "b", "b")
    turned = _record(truth.flip(0), channels[::-1], ("r3", "r2", "r1", "r0"))
    assert agreement(turned, _record(truth, channels), "x", "x").per_reader == pytest.approx(1)
    first = _record(truth[[0, 2]], ("a", "b"), ("r0", "r2"))
    shared = truth[[0, 0, 2, 2]]
    assert agreement(first, _record(shared, channels), "x", "x").per_reader == pytest.approx(1)
    with pytest.raises(vw.VirtualWeightsError, match="no edge in common"):
        agreement(_record(truth, readers=tuple("abcd")), _record(truth), "x", "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def _answer(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_observe_writes_what_the_functions_give(folder: Path, tmp_path: Path) -> None:
    stream, file = vw.open(folder), tmp_path / "moments.safetensors"
    options = ("--repeated", "--tokens", 80, "--length", 16, "--seed", 3, "--batch", 2, "--json")
    found = _answer("observe", folder, "-o", file, *options)
    moments = Moments.load(file, stream)
    expected = observe(stream, [repeated_tokens(37, 8, 5, seed=3)], load(stream))
    assert (found["tokens"], found["length"], found["heads"], found["kind"]) == (80, 16, "exact", "moments")
    assert found["identity"] == moments.identity
    for port in ("Q", "K", "V"):
        one, other = (Delivered(port, m)(stream)["delivered"] for m in (moments, expected))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7, equal_nan=True)
    assert found["attention"]["L1H2"]["previous"] == pytest.approx(float(expected.attention["1"][2, 1]), rel=1e-4)


def test_observe_writes_an_operating_point(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "point.safetensors"
    found = _answer("observe", folder, "-o", file, "--prompt-ids", "3,17,5", "--dtype", "float64", "--json")
    point = OperatingPoint.load(file, vw.open(folder))
    assert (found["kind"], found["tokens"], found["identity"]) == ("operating point", 3, point.identity)
    assert point.tokens.tolist() == [3, 17, 5]
    assert replay(vw.open(folder), point).shape == (3, 24)


def test_more_than_one_text_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="more than one kind of text"):
        _answer("observe", folder, "-o", tmp_path / "x", "--repeated", "--prompt", "hello")
    with pytest.raises(vw.VirtualWeightsError, match="prompt-ids"):
        _answer("observe", folder, "-o", tmp_path / "x", "--prompt-ids", "3,a")


def test_agree_tells_the_records_agreement(folder: Path) -> None:
    options = ("--repeated", "--tokens", 64, "--length", 16, "--edges", 14, "--seed", 5, "--json")
    found = _answer("agree", folder, *options)
    rows = {(row["target"], row["predictor"], row["port"]): row for row in found["agreement"]}
    names = {"data-aware", "composition", "strength", "overlap"}
    asked = {("delivered", name) for name in names}
    asked |= {("causal", name) for name in (*names, "delivered", "attribution")}
    assert rows.keys() == {(*pair, port) for pair in asked for port in "QKV"}
    stream = vw.open(folder)
    runs = load(stream)
    target = Delivered("K", observe(stream, [repeated_tokens(37, 8, 4, seed=5)], runs))(stream)
    other = Delivered("K", observe(stream, [repeated_tokens(37, 8, 4, seed=6)], runs))(stream)
    words = repeated_tokens(37, 32, 8, seed=5)
    cause = removals(stream, drawn_edges(stream, "K", 14, 5), words, 32, runs)
    torch.testing.assert_close(cause["size"], cause["effect_nats"].abs(), rtol=0, atol=0, equal_nan=True)
    assert bool((cause["effect_nats"] < 0).any())
    edge = next(row for row in cause.rows() if row["effect_nats"] < 0)
    (alone,) = prove(stream, [(edge["writer"], edge["reader"])], words, Trial(first=32, random=0), runs).rows()
    assert edge["effect_nats"] == pytest.approx(alone["effect_nats"], rel=1e-3)
    metric = partial(next_token_loss, first=32)
    for of, truth, name, record, column in (
        ("delivered", target, "data-aware", other, "delivered"),
        ("delivered", target, "overlap", Overlap("K")(stream), "overlap"),
        ("causal", cause, "delivered", target, "delivered"),
        ("causal", cause, "attribution", attribute(stream, words, metric, runs)["K"], "size"),
    ):
        expected = agreement(record, truth, column, "size" if of == "causal" else "delivered")
        row = rows[of, name, "K"]
        assert row["per_reader_rank_correlation"] == pytest.approx(expected.per_reader, abs=1e-3)
        assert row["edges"] == expected.edges == (15 if of == "causal" else 108)
        assert row["precision_at_20"] == expected.precision
    assert "random tokens (seed 6)" in found["predicted_from"]
    assert found["removed_on"] == [8, 64]


def test_removed_edges_are_drawn_evenly_and_reach(folder: Path) -> None:
    stream = vw.open(folder)
    edges = drawn_edges(stream, "K", 14, 0)
    assert len(edges) == len(set(edges))
    assert len(edges) >= 14  # a reader has three writers at least
    assert edges != drawn_edges(stream, "K", 14, 1)
    readers = {reader for _, reader in edges}
    assert readers <= set(channel_readers(stream, "K"))
    layer = {name: int(name[1]) for edge in edges for name in edge}
    assert all(layer[writer] < layer[reader] for writer, reader in edges)
    assert drawn_edges(stream, "K", 0, 0) == []


def test_columns_of_another_record_stand_beside(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    _answer("observe", folder, "-o", file, "--repeated", "--tokens", 64, "--length", 16, "--json")
    stream = vw.open(folder)
    moments = Moments.load(file, stream)
    for port, writers in (("K", "heads"), ("up", "all")):
        flow = Delivered(port, moments, writers=writers)(stream)  # type: ignore[arg-type]
        found = _answer(
            "composition", folder, "--operating-point", file, "--port", port, "--writers", writers, "--json"
        )
        assert (found["by"], found["stamp"]["delivered"]["moments"]) == ("delivered", moments.identity)
        best = next(flow.top(1, "delivered").rows())
        first = found["edges"][0]
        assert (first["writer"], first["reader"]) == (best["writer"], best["reader"])
        assert first["delivered"] == pytest.approx(best["delivered"], rel=1e-6)
        plain = _answer("composition", folder, "--port", port, "--writers", writers, "--top", 999, "--json")
        scores = {(e["writer"], e["reader"]): e["score"] for e in plain["edges"]}
        assert first["score"] == scores[first["writer"], first["reader"]]
    with pytest.raises(vw.VirtualWeightsError, match="a text and an operating point"):
        _answer("composition", folder, "--operating-point", file, "--text", "default")
