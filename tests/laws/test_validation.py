"""Agreement of two measures of edges, and the commands that observe and validate."""

from __future__ import annotations

import json
import re
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
from virtual_weights.analysis.pairs.alignment import agreement
from virtual_weights.analysis.pairs.contribution import Contribution
from virtual_weights.analysis.pairs.overlap import Overlap
from virtual_weights.cli import run
from virtual_weights.cli.composition import composition
from virtual_weights.cli.observe import observe
from virtual_weights.cli.validate import validate
from virtual_weights.linalg import rank_correlation
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.ablation import EdgeAblation
from virtual_weights.runtime.edges.attribution import Attribution
from virtual_weights.runtime.edges.edge import group_readers
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import OperatingPoint
from virtual_weights.stream.moments import Moments
from virtual_weights.survey.validation import drawn_edges

NAN = float("nan")
app = typer.Typer()
app.command("observe")(observe)
app.command("validate")(validate)
app.command("composition")(composition)


def _record(values: Tensor, groups: tuple[str, ...] = (), readers: tuple[str, ...] = ()) -> Record:
    names = readers or tuple(f"r{i}" for i in range(len(values)))
    writers = tuple(f"w{i}" for i in range(values.shape[1]))
    return Record("made", (Axis("reader", names, groups), Axis("writer", writers)), (Column("x", values),))


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


def test_edges_are_matched_by_label_and_by_group() -> None:
    truth = torch.rand(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    groups = ("a", "a", "b", "b")
    turned = _record(truth.flip(0), groups[::-1], ("r3", "r2", "r1", "r0"))
    assert agreement(turned, _record(truth, groups), "x", "x").per_reader == pytest.approx(1)
    first = _record(truth[[0, 2]], ("a", "b"), ("r0", "r2"))
    shared = truth[[0, 0, 2, 2]]
    assert agreement(first, _record(shared, groups), "x", "x").per_reader == pytest.approx(1)
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
    figures = _answer("observe", folder, "-o", file, *options)["summary"]
    moments = Moments.load(file, stream)
    expected = Observation().moments(Run.on_repeats(stream, 80, 16, 3))
    assert (figures["tokens"], figures["length"], set(figures["held"].values()), figures["kind"]) == (
        80,
        16,
        {"exact"},
        "moments",
    )
    assert figures["identity"] == moments.identity
    for port in ("Q", "K", "V"):
        one, other = (Contribution(port, m)(stream)["contribution"] for m in (moments, expected))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7, equal_nan=True)
    (head,) = (row for row in figures["attention"] if row["head"] == "L1H2")
    assert head["previous"] == pytest.approx(float(expected.attention["L1.attn"][2, 1]), rel=1e-4)


def test_observe_writes_an_operating_point(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "point.safetensors"
    options = ("--prompt-ids", "3,17,5", "--dtype", "float64", "--json")
    figures = _answer("observe", folder, "-o", file, *options)["summary"]
    point = OperatingPoint.load(file, vw.open(folder))
    assert (figures["kind"], figures["tokens"], figures["identity"]) == ("operating point", 3, point.identity)
    assert point.tokens.tolist() == [3, 17, 5]
    assert replay(vw.open(folder), point).shape == (3, 24)


def test_more_than_one_text_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="more than one kind of text"):
        _answer("observe", folder, "-o", tmp_path / "x", "--repeated", "--prompt", "hello")
    with pytest.raises(vw.VirtualWeightsError, match="token ids 3,a"):
        _answer("observe", folder, "-o", tmp_path / "x", "--prompt-ids", "3,a")


def test_validate_says_how_records_agree(folder: Path) -> None:
    options = ("--repeated", "--tokens", 64, "--length", 16, "--edges", 14, "--seed", 5, "--json")
    given = _answer("validate", folder, *options)
    rows = {(row["target"], row["predictor"], row["port"]): row for row in given["rows"]}
    names = {"data-aware", "activity", "composition", "strength", "lift", "overlap"}
    asked = {("contribution", name) for name in names}
    asked |= {("effect", name) for name in (*names, "contribution", "attribution")}
    assert rows.keys() == {(*pair, port) for pair in asked for port in "QKV"}
    stream = vw.open(folder)
    run, another = (Run.on_repeats(stream, 64, 16, seed) for seed in (5, 6))
    target, other = (Contribution("K", Observation().moments(text))(stream) for text in (run, another))
    questions = [EdgeAblation(*edge, sequences=8) for edge in drawn_edges(stream, "K", 14, 5)]
    effects = _effects([record for _, record in EdgeAblation.together(questions, run)])
    for of, truth, name, record, column in (
        ("contribution", target, "data-aware", other, "contribution"),
        ("contribution", target, "overlap", Overlap("K")(stream), "overlap"),
        ("effect", effects, "contribution", target, "contribution"),
        ("effect", effects, "attribution", Attribution("K")(run), "size"),
    ):
        expected = agreement(record, truth, column, of)
        row = rows[of, name, "K"]
        assert row["per_reader_rank_correlation"] == pytest.approx(expected.per_reader, abs=1e-3)
        assert row["edges"] == expected.edges == (15 if of == "effect" else 108)
        assert row["precision_at_20"] == expected.precision
    assert "random tokens (seed 6" in given["summary"]["predicted_from"]
    assert (given["parameters"]["sequences"], given["parameters"]["length"]) == (8, 64)


def test_precision_that_chance_reaches_is_not_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--repeated", "--tokens", "64", "--length", "16", "--edges", "14", "--seed", "5"]
    assert run(["validate", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "precision at 20 is blank where it is not above that of a random order" in out
    assert "over 15 edges a rank correlation within ±0.52 is not above chance" in out
    rows = [line.split() for line in out.splitlines() if re.search(r" [QKV]  +(effect|contribution) ", line)]
    sizes = {target: {len(row) for row in rows if row[2] == target} for target in ("contribution", "effect")}
    assert sizes["effect"] == {6}, "predictor, port, target, two correlations, edges"
    assert 7 in sizes["contribution"], "with the precision"


def _effects(ablations: list[Record]) -> Record:
    """Sizes of the effects of single edges, over all readers and writers that occur."""
    rows: list[dict[str, Any]] = [next(iter(record.rows())) for record in ablations]
    assert any(row["effect_nats"] < 0 for row in rows), "sizes are what is compared"
    readers, writers = (sorted({row[end] for row in rows}) for end in ("reader", "writer"))
    sizes = torch.full((len(readers), len(writers)), NAN, dtype=torch.float64)
    for row in rows:
        sizes[readers.index(row["reader"]), writers.index(row["writer"])] = abs(row["effect_nats"])
    group = {row["reader"]: row["group"] for row in rows}
    axes = Axis("reader", tuple(readers), tuple(group[name] for name in readers)), Axis("writer", tuple(writers))
    return Record("ablations", axes, (Column("effect", sizes),), {"port": "K"})


def test_ablated_edges_are_drawn_evenly_and_reach(folder: Path) -> None:
    stream = vw.open(folder)
    edges = drawn_edges(stream, "K", 14, 0)
    assert len(edges) == len(set(edges))
    assert len(edges) >= 14  # a reader has three writers at least
    assert edges != drawn_edges(stream, "K", 14, 1)
    readers = {reader for _, reader in edges}
    assert readers <= set(group_readers(stream, "K"))
    layer = {name: int(name[1]) for edge in edges for name in edge}
    assert all(layer[writer] < layer[reader] for writer, reader in edges)
    assert drawn_edges(stream, "K", 0, 0) == []


def test_columns_of_another_record_stand_beside(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    _answer("observe", folder, "-o", file, "--repeated", "--tokens", 64, "--length", 16, "--json")
    stream = vw.open(folder)
    moments = Moments.load(file, stream)
    for port, writers in (("K", "heads"), ("up", "all")):
        flow = Contribution(port, moments, writers=writers)(stream)  # type: ignore[arg-type]
        given = _answer("composition", folder, "--moments", file, "--port", port, "--writers", writers, "--json")
        assert given["summary"]["by"] == "contribution"
        assert given["stamp"]["contribution"]["moments"] == moments.identity
        best = next(flow.top(1, "contribution").rows())
        first = given["rows"][0]
        assert (first["writer"], first["reader"]) == (best["writer"], best["reader"])
        assert first["contribution"] == pytest.approx(best["contribution"], rel=1e-6)
        plain = _answer("composition", folder, "--port", port, "--writers", writers, "--top", 999, "--json")
        scores = {(e["writer"], e["reader"]): e["score"] for e in plain["rows"]}
        assert first["score"] == scores[first["writer"], first["reader"]]
    with pytest.raises(vw.VirtualWeightsError, match="a text and a file of moments"):
        _answer("composition", folder, "--moments", file, "--text", "default")
