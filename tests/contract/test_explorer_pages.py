"""The pages Structure, Compare and of a direction: their documents say what the records say, and they are drawn."""

from __future__ import annotations

import base64
import html
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import dom
from tiny_models import tiny
from typer.testing import CliRunner

import virtual_weights as vw
from virtual_weights.cli.app import app
from virtual_weights.report.against import against
from virtual_weights.report.documents import documents
from virtual_weights.report.page import page
from virtual_weights.report.structure import PAIRS, structure
from virtual_weights.report.vectors import NEURONS, vectors
from virtual_weights.survey.plan import Part, Plan, map_model, shown_of

POISON = "<img src=x onerror=document.title='poisoned'>/../é%"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> vw.Atlas:
    path = tmp_path_factory.mktemp("structured")
    tiny("llama-grouped-untied").save_pretrained(path / "model")
    parts = Part.composition, Part.memory, Part.superposition, Part.basis, Part.bandwidth
    atlas = map_model(vw.open(path / "model"), path / "atlas", plan=Plan(parts), name="tiny")
    stream = vw.open(path / "model")
    survey = vw.Survey(stream, atlas)
    direction = torch.arange(1.0, 25.0).double()
    for name, at in (("happy", "L1"), (POISON, "L1")):
        vector = vw.Vector(direction if name == "happy" else -direction, name)
        survey.answers([vw.VectorReaders(vector, at, 5), vw.VectorWriters(vector, at, 5)])
    vw.report(atlas)
    return atlas


@pytest.fixture(scope="module")
def records(atlas: vw.Atlas) -> dict[str, vw.Record]:
    return {record.question: record for record in shown_of(atlas)}


@pytest.fixture(scope="module")
def contents(atlas: vw.Atlas) -> dict[str, Any]:
    return documents(shown_of(atlas), atlas.manifest)


@pytest.fixture(scope="module")
def other(atlas: vw.Atlas) -> vw.Atlas:
    """An atlas of a smaller model: K and V, every score half as large, of the first two layers and fewer writers."""
    components = [c for c in atlas.manifest["components"] if c["layer"] != 2]
    extra = {**components[-1], "label": "L7.mlp", "layer": 7}
    manifest = {**atlas.manifest, "model": "smaller", "fingerprint": "0" * 64, "components": [*components, extra]}
    other = vw.Atlas.create(atlas.path.parent / "other", manifest)
    for record in shown_of(atlas):
        if record.question == "composition" and record.parameters["port"] in "KV":
            halved = [replace(c, values=c.values / 2) if c.name == "score" else c for c in record.columns]  # pyright: ignore[reportOperatorIssue]
            part = replace(record, columns=tuple(halved), provenance={}, stamp={**record.stamp, "norm": "raw"})
            for axis in ("reader", "writer"):
                names = [label for label in record.axis(axis).labels if not label.startswith(("L2", "embed"))]
                part = part.select(axis, names)
            other.put(part)
    return other


def halves(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


def numbers(record: vw.Record, column: str) -> np.ndarray:
    return np.asarray(record[column], dtype=np.float64)


def test_structure_says_what_records_say(contents: dict[str, Any], records: dict[str, vw.Record]) -> None:
    document = contents[contents["map"]["stored"]["structure"]]
    crowd = document["crowds"]["out"]
    assert crowd["coherence"]["welch"] == records["coherence"].stamp["welch"]
    assert crowd["coherence"]["count"] == numbers(records["coherence"], "count").tolist()
    np.testing.assert_allclose(crowd["interference"]["error"], numbers(records["interference"], "error"), rtol=1e-3)
    methods = {method["name"]: method["fidelity"] for method in crowd["recovery"]["methods"]}
    np.testing.assert_allclose(methods["matched"], numbers(records["recovery"], "matched"), rtol=1e-3)
    counts = np.frombuffer(base64.b64decode(document["neurons"]["counts"]), "<u4")
    assert counts.sum() == (~np.isnan(numbers(records["neurons"], "cosine"))).sum()
    heads = document["heads"]
    assert heads["of"] == len(heads["labels"]) == records["head_erasers"].size
    np.testing.assert_allclose(heads["columns"]["copying"], numbers(records["head_erasers"], "copying"), rtol=1e-3)
    basis = document["basis"]
    np.testing.assert_allclose(basis["columns"]["write_energy"], numbers(records["basis"], "write_energy"), rtol=1e-3)
    assert basis["of_massive"] == int(numbers(records["basis"], "massive").sum())


def test_erasing_pairs_are_the_strongest_of_every_two_layers(
    contents: dict[str, Any], records: dict[str, vw.Record]
) -> None:
    erasure, values = contents["structure"]["erasure"], numbers(records["erasure"], "alignment")
    erasers, writers = (records["erasure"].axis(name).labels for name in ("reader", "writer"))
    assert erasure["of"] == (~np.isnan(values)).sum()
    assert len(erasure["pairs"]) == min(PAIRS, erasure["of"])
    best: dict[tuple[int, int], float] = {}
    for (row, column), value in np.ndenumerate(values):
        layers = tuple(int(n[1]) if n.startswith("L") else -1 for n in (erasers[row], writers[column]))
        if not np.isnan(value):
            best[layers] = max(best.get(layers, -np.inf), float(value))  # pyright: ignore[reportArgumentType]
    found = dict(zip(zip(erasure["erasing"], erasure["writing"], strict=True), erasure["largest"], strict=True))
    assert found == pytest.approx(best, rel=1e-3)
    for eraser, writer, value in zip(erasure["eraser"], erasure["writer"], erasure["largest"], strict=True):
        assert values[erasers.index(eraser), writers.index(writer)] == pytest.approx(value, rel=1e-3)


def test_structure_is_there_only_where_something_is_stored(records: dict[str, vw.Record]) -> None:
    assert structure([records["bandwidth"]]) == {}
    assert set(structure([records["basis"]])) == {"basis"}


def test_a_direction_lists_all_heads_and_the_foremost_neurons(
    contents: dict[str, Any], records: dict[str, vw.Record]
) -> None:
    names = contents["map"]["vectors"]
    assert set(names) == {"happy", POISON}
    document = contents[names[POISON]]
    assert document["name"] == POISON
    record = records["vector_readers"]
    assert document["identity"] == record.parameters["vector"], "the last one that was asked"
    readers = document["readers"]
    assert readers["state"] == record.stamp["state"]
    score = dict(zip(record.axes[0].labels, numbers(record, "score"), strict=True))
    assert readers["columns"]["score"] == pytest.approx([score[label] for label in readers["labels"]], rel=1e-3)
    assert readers["of"] == {kind: record["kind"].count(kind) for kind in set(record["kind"])}
    assert set(readers["labels"]) == set(score), f"fewer than {NEURONS} neurons: all are listed"


def test_of_many_neurons_a_direction_lists_the_foremost_of_every_layer(
    monkeypatch: pytest.MonkeyPatch, atlas: vw.Atlas
) -> None:
    monkeypatch.setattr(sys.modules[vectors.__module__], "NEURONS", 3)
    records = shown_of(atlas)
    side = vectors(records)["happy"]["readers"]
    record = next(r for r in records if r.question == "vector_readers" and r.parameters["vector"].startswith("happy"))
    rows = [row for row in record.rows() if row["kind"] == "neuron"]
    rows.sort(key=lambda row: -row["score"])
    best = {row["reader"] for row in rows[:3]}
    firsts = dict[tuple[Any, ...], str]()
    for row in rows:
        layer, _, port = str(row["reader"]).replace("N", ".").split(".")
        firsts.setdefault((layer, port, row["sign"]), str(row["reader"]))
    assert len(firsts) == 8, "two layers, gate and up, along and against"
    best |= set(firsts.values())
    assert {label for label, kind in zip(side["labels"], side["kinds"], strict=True) if kind == "neuron"} == best


def test_files_of_directions_bear_no_names(atlas: vw.Atlas) -> None:
    index = json.loads((atlas.path / "explorer" / "index.json").read_text())
    assert {index["documents"][f"vector-{i}"]["file"] for i in (0, 1)} == {"vector-0.json", "vector-1.json"}


def test_pages_are_drawn_and_run_no_names(contents: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page(contents), encoding="utf-8")
    shown = dom(path, "#/structure")
    for text in ("Welch bound", "What neurons do to what they read", "Who could erase what whom wrote", "Massive"):
        assert text in shown, text
    shown = dom(path, "#/vector")
    assert html.escape(POISON, quote=False) in shown
    assert "<img" not in shown
    assert "Heads that read it" in dom(path, "#/vector/happy")
    shown = dom(path, "#/vector/" + POISON.replace("%", "%25").replace(" ", "%20"))
    assert "Heads that read it" in shown
    assert "<img" not in shown
    assert "<title>poisoned" not in shown


def test_pages_name_the_command_of_what_is_not_stored(contents: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    missing = {**contents, "map": {**contents["map"], "stored": {}, "vectors": {}}}
    path.write_text(page(missing), encoding="utf-8")
    shown = dom(path, "#/structure")
    for part in ("superposition", "memory", "basis"):
        assert f"vweights map tiny -o ATLAS --only {part}" in shown
    assert "vweights vector tiny FILE --at STATE --atlas ATLAS" in dom(path, "#/vector/happy")


def test_the_verb_keeps_a_direction_in_an_atlas(atlas: vw.Atlas, tmp_path: Path) -> None:
    np.save(tmp_path / "calm.npy", np.ones(24))
    model, file = str(atlas.path.parent / "model"), str(tmp_path / "calm.npy")
    refused = CliRunner().invoke(app, ["vector", model, file, "--atlas", str(tmp_path / "none")])
    assert refused.exit_code != 0
    assert not (tmp_path / "none").exists()
    done = CliRunner().invoke(app, ["vector", model, file, "--at", "L2", "--atlas", str(atlas.path)])
    assert done.exit_code == 0, done.output
    assert "calm" in json.loads((atlas.path / "explorer" / "map.json").read_text())["vectors"]


def test_another_atlas_stands_in_this_ones_order(atlas: vw.Atlas, other: vw.Atlas) -> None:
    compared = against(shown_of(atlas), atlas.manifest, other)
    assert {name for name in compared if name.count("-") < 2} == {"against", "against-K", "against-V"}
    record = atlas.find("composition", port="K")
    assert record is not None
    values = halves(compared[compared["against-K"]["columns"]["score"][0]]["values"]).reshape(record["score"].shape)
    expected = numbers(record, "score") / 2
    gone = [np.array([label.startswith(("L2", "embed")) for label in axis.labels]) for axis in record.axes]
    expected[gone[0][:, None] | gone[1]] = np.nan
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    assert np.isfinite(values).any()
    summary = compared["against"]
    assert (summary["model"], summary["ports"]) == ("smaller", ["K", "V"])
    assert {"L2H0", "L2.mlp", "port Q"} <= set(summary["only_here"]["names"])
    assert summary["only_there"] == {"names": ["L7.mlp"], "of": 1}
    assert summary["conventions"] == {"norm": [record.stamp["norm"], "raw"]}


def test_compare_shows_what_both_have_and_names_the_rest(atlas: vw.Atlas, other: vw.Atlas, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(atlas.path), "--against", str(other.path)])
    assert done.exit_code == 0, done.output
    index = json.loads((atlas.path / "explorer" / "index.json").read_text())["documents"]
    contents = {n: json.loads((atlas.path / "explorer" / e["file"]).read_text()) for n, e in index.items()}
    path = tmp_path / "page.html"
    path.write_text(page(contents), encoding="utf-8")
    shown = dom(path, "#/compare?least=0")
    assert "<b>12</b> edges" in shown, "six heads of layer 0 into the two keys of layer 1, each shared by three heads"
    assert "−1.00" in shown, "log2 of one half"
    assert "Only in smaller: 1 part" in shown
    assert "different conventions" in shown
    vw.report(atlas)
    assert json.loads((atlas.path / "explorer" / "map.json").read_text())["against"] is None
    path.write_text(page({**contents, "map": {**contents["map"], "against": None}}), encoding="utf-8")
    assert "vweights report ATLAS --against OTHER" in dom(path, "#/compare")
