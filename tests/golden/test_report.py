"""The report: one file, no request, and nothing in a checkpoint's names can break out of its data."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import drawn_by_node, needs_node
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.record import Axis, Column, Record
from virtual_weights.report import page, payload, write_report
from virtual_weights.survey import manifest_of


@pytest.fixture(scope="module")
def records() -> list[Record]:
    stream = vw.open(tiny("llama-grouped-untied"))
    return [question(port)(stream) for question in (vw.Composition, vw.Overlap) for port in ("Q", "K", "V")]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return manifest_of(vw.open(tiny("llama-grouped-untied")), "tiny")


def test_matrices_survive_quantisation(records: list[Record], manifest: dict[str, Any]) -> None:
    for record, drawn in zip(records, payload(records, manifest)["maps"], strict=True):
        column = "score" if record.question == "composition" else "overlap"
        values = record[column].numpy()
        steps = np.frombuffer(base64.b64decode(drawn["steps"]), "<u2").reshape(values.shape)
        assert np.array_equal(steps == 0, np.isnan(values))
        found = np.where(steps == 0, np.nan, (steps.astype(float) - 1) / 65534 * drawn["largest"])
        np.testing.assert_allclose(found, values, atol=drawn["largest"] / 65534)
        readers = [f"{name}.{record.parameters['port']}" for name in drawn["readers"]]
        assert (readers, drawn["writers"]) == (list(record.axes[0].labels), list(record.axes[1].labels))


def test_edges_are_the_strongest_of_each_port_and_name_their_group(
    records: list[Record], manifest: dict[str, Any]
) -> None:
    edges = payload(records, manifest)["edges"]
    for record in records[:3]:
        own = [e for e in edges if e["port"] == record.parameters["port"]]
        assert [e["score"] for e in own] == [row["score"] for row in record.top(150).rows()]
    keys = next(e for e in edges if e["port"] == "K")
    assert keys["reader"] in keys["shared"]
    assert len(keys["shared"]) == 3


def test_large_models_are_shown_by_layer(manifest: dict[str, Any]) -> None:
    writers = tuple(f"L{layer}H{head}" for layer in range(31) for head in range(20))
    readers = tuple(f"{name}.Q" for name in writers)
    score = torch.rand(620, 620, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = torch.arange(620) // 20
    score[layer[None, :] >= layer[:, None]] = float("nan")
    columns = tuple(Column(name, score) for name in ("score", "strength", "null_ratio", "z"))
    record = Record("composition", (Axis("reader", readers), Axis("writer", writers)), columns, {"port": "Q"})
    drawn = payload([record], manifest)["maps"][0]
    assert drawn["by_layer"]
    assert drawn["readers"] == [f"L{i}" for i in range(31)]
    steps = np.frombuffer(base64.b64decode(drawn["steps"]), "<u2").reshape(31, 31)
    assert np.array_equal(steps == 0, ~np.tri(31, 31, -1, dtype=bool))
    best = float(score[20 * 5 : 20 * 6, 20 * 2 : 20 * 3].max())
    assert (steps[5, 2] - 1) / 65534 * drawn["largest"] == pytest.approx(best, abs=1e-4)


def test_nothing_is_fetched_and_hostile_names_stay_data(records: list[Record], manifest: dict[str, Any]) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    text = page(payload(records, {**manifest, "model": hostile}))
    assert "<img" not in text
    assert text.count("<script") == 2
    plain = page(payload(records, manifest)).split("<script id")[0]
    assert not re.search(r"\s(?:src|href)\s*=|@import|url\(", plain)
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\"'`\s]+", plain + text.split("<script>")[1])) <= {"http://www.w3.org/2000/svg"}
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert data is not None
    assert json.loads(data.group(1))["model"]["model"] == hostile


def test_file_is_replaced_whole(records: list[Record], manifest: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, records, manifest)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def composed(port: str, readers: tuple[str, ...], writers: tuple[str, ...]) -> Record:
    """A Composition with writers of every kind; the first reader is reached by the first writer alone."""
    score = torch.rand(len(readers), len(writers), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    score[0, 1:] = float("nan")
    columns = tuple(Column(name, score * i) for i, name in enumerate(("score", "strength", "null_ratio", "z"), 1))
    return Record("composition", (Axis("reader", readers), Axis("writer", writers)), columns, {"port": port})


WRITERS = ("embed", "L0H0", "L0.mlp", "L0.mlp.bias", "L1H1", "L1.attn.bias")


def test_heads_and_other_writers_are_drawn_apart(manifest: dict[str, Any]) -> None:
    record = composed("Q", ("L0H0.Q", "L1H0.Q", "L2H1.Q"), WRITERS)
    found = payload([record], manifest)
    assert [(m["from"], m["writers"]) for m in found["maps"]] == [
        ("heads", ["L0H0", "L1H1"]),
        ("others", ["embed", "L0.mlp", "L0.mlp.bias", "L1.attn.bias"]),
    ]
    for drawn in found["maps"]:
        steps = np.frombuffer(base64.b64decode(drawn["steps"]), "<u2").reshape(3, -1)
        values = record["score"].numpy()[:, [WRITERS.index(name) for name in drawn["writers"]]]
        np.testing.assert_allclose(
            np.where(steps == 0, np.nan, (steps.astype(float) - 1) / 65534 * drawn["largest"]), values, atol=1e-4
        )
    assert {(e["writer"], e["reader"]): e["score"] for e in found["edges"]} == {
        (row["writer"], str(row["reader"]).removesuffix(".Q")): row["score"] for row in record.rows()
    }


def test_a_table_keeps_every_value_and_says_what_is_absent(manifest: dict[str, Any]) -> None:
    record = Bandwidth()(vw.open(tiny("llama-grouped-untied")))
    (table,) = payload([record], manifest)["bandwidth"]
    assert table["labels"] == list(record.axes[0].labels)
    for column, drawn in zip(record.columns, table["columns"], strict=True):
        values = column.values if isinstance(column.values, tuple) else column.values.tolist()
        assert drawn["values"] == [None if v != v else v for v in values]
        assert (drawn["name"], drawn["unit"], drawn["meaning"]) == (column.name, column.unit, column.meaning)
    saving = next(c for c in table["columns"] if c["name"] == "saving")
    assert saving["values"][0] is None, "no neuron has written yet"


def neurons(count: int, layers: int) -> Record:
    generator = torch.Generator().manual_seed(2)
    cosine = torch.rand(count, generator=generator, dtype=torch.float64) ** 2 * 1.6 - 0.8
    gain = -cosine * 10 ** (4 * torch.rand(count, generator=generator, dtype=torch.float64) - 3)
    cosine[0] = gain[0] = float("nan")
    classes = tuple(
        None if c != c else "strengthening" if c > 0.5 else "weakening" if c < -0.5 else "between"
        for c in cosine.tolist()
    )
    layer = torch.arange(count) * layers // count
    columns = Column("cosine", cosine), Column("gain", gain), Column("class", classes), Column("layer", layer)
    null = {"tail": 1e-3, "shuffled": {"weakening_share": 0.0, "strengthening_share": 0.01}}
    names = tuple(f"N{i}" for i in range(count))
    return Record("neurons", (Axis("neuron", names),), columns, {"threshold": 0.5}, {"null": null, "classes_by": "up"})


def test_neurons_are_counted_where_they_lie(manifest: dict[str, Any]) -> None:
    record = neurons(500, 3)
    (drawn,) = payload([record], manifest)["neurons"]
    columns, rows = drawn["bins"]
    counts = np.frombuffer(base64.b64decode(drawn["counts"]), "<u4").reshape(columns, rows)
    naive = np.zeros_like(counts)
    (left, right), (low, high) = drawn["cosine"], drawn["log_gain"]
    for cosine, gain in zip(record["cosine"].tolist()[1:], record["gain"].tolist()[1:], strict=True):
        height = max(np.log10(abs(gain)), low)
        place = int((cosine - left) / (right - left) * columns), int((height - low) / (high - low) * rows)
        naive[place] += 1
    assert np.array_equal(counts, naive)
    assert (drawn["absent"], counts.sum()) == (1, 499)
    assert left < -drawn["threshold"] < drawn["threshold"] < right
    assert drawn["below"] == sum(np.log10(abs(g)) < low for g in record["gain"].tolist()[1:]) > 0
    layer = record["layer"].tolist()
    for name, by_layer in drawn["classes"].items():
        assert by_layer == [
            sum(c == name and at == i for c, at in zip(record["class"], layer, strict=True)) for i in (0, 1, 2)
        ]


def test_strongest_pairs_by_each_measure_come_once(manifest: dict[str, Any]) -> None:
    record = Erasure()(vw.open(tiny("llama-grouped-untied")))
    (drawn,) = payload([record], manifest)["erasure"]
    rows = list(record.rows())
    wanted = {
        (row["reader"], row["writer"])
        for by in ("alignment", "z", "erasure")
        for row in sorted(rows, key=lambda row: -row[by])[:150]
    }
    assert len(drawn["rows"]) == len(wanted)
    assert {(row["reader"], row["writer"]) for row in drawn["rows"]} == wanted
    assert all(row in rows for row in drawn["rows"])


VERDICTS = ("holds", "holds under RMSNorm", "fails", "cannot tell")


@pytest.fixture(scope="module")
def verdicts() -> Record:
    names = tuple(f"S{i}" for i in range(len(VERDICTS)))
    texts = {
        "title": names,
        "seed": tuple(f"claim {name}" for name in names),
        "corrected": tuple(f"truth {name}" for name in names),
        "verdict": VERDICTS,
        "condition": (None, "RMSNorm", None, None),
        "why": ("1e-9 apart", None, "0.7 < 1", None),
        "witnesses": (None, None, "L1H2", None),
        "evidence": ('{"difference": 1.5e-9, "where": "state 3"}', '{"gap": NaN}', "see the text", None),
    }
    return Record(
        "statements",
        (Axis("statement", names),),
        tuple(Column(k, v) for k, v in texts.items()),
        {},
        {"run": "a prompt of 5 tokens"},
    )


def test_evidence_is_read_where_it_is_json(verdicts: Record, manifest: dict[str, Any]) -> None:
    (found,) = payload([verdicts], manifest)["statements"]
    rows = found["rows"]
    assert found["run"] == "a prompt of 5 tokens"
    assert [row["id"] for row in rows] == ["S0", "S1", "S2", "S3"]
    assert [row["evidence"] for row in rows] == [
        {"difference": 1.5e-9, "where": "state 3"},
        {"gap": None},
        "see the text",
        None,
    ]
    assert rows[2] | {"evidence": None} == {
        "id": "S2", "title": "S2", "seed": "claim S2", "corrected": "truth S2", "verdict": "fails",
        "condition": None, "why": "0.7 < 1", "witnesses": "L1H2", "evidence": None,
    }  # fmt: skip


def test_nothing_computed_is_lost(manifest: dict[str, Any]) -> None:
    values = torch.arange(3, dtype=torch.float64)
    small = Record(
        "coherence", (Axis("set", ("a", "b", "c")),), (Column("largest", values), Column("of", ("x", "y", None)))
    )
    long = Record("recovery", (Axis("n", tuple(map(str, range(201)))),), (Column("error", torch.zeros(201)),))
    wide = Record("interference", (small.axes[0], Axis("with", ("a",))), (Column("error", torch.zeros(3, 1)),))
    found = payload([small, long, wide], manifest)
    assert [(t["question"], [c["values"] for c in t["columns"]]) for t in found["others"]] == [
        ("coherence", [[0.0, 1.0, 2.0], ["x", "y", None]])
    ]
    assert found["too_large"] == [
        {"question": "recovery", "axes": {"n": 201}},
        {"question": "interference", "axes": {"set": 3, "with": 1}},
    ]


@pytest.fixture(scope="module")
def everything(records: list[Record], verdicts: Record) -> list[Record]:
    stream = vw.open(tiny("llama-grouped-untied"))
    pairs = ("L0H0", "L0H1"), ("L1H0.K", "L2H1.V")
    return [
        composed("gate", ("L0.mlp.gate", "L1.mlp.gate"), WRITERS),
        composed("unembed", ("unembed",), WRITERS),
        *records,
        *(question(stream) for question in (Bandwidth(), HeadErasers(draws=3), Erasure())),
        *(vw.Channel(writer, reader, draws=3)(stream) for writer, reader in zip(*pairs, strict=True)),
        neurons(46_080, 30),
        verdicts,
        Record("coherence", (Axis("set", ("a", "b")),), (Column("largest", torch.tensor([0.25, 0.5])),)),
    ]


@needs_node
def test_the_page_has_a_section_for_every_answer(
    everything: list[Record], manifest: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(path, everything, manifest)
    assert path.stat().st_size < 4e6
    shown = drawn_by_node(path)
    assert shown["sections"] == [
        "stream", "statements", "pairs", "edges", "bandwidth", "channel",
        "neurons", "heads", "erasure", "others", "guide",
    ]  # fmt: skip
    assert shown["contents"] == [f"#{name}" for name in shown["sections"]]
    assert shown["struck"] == ["claim S1", "claim S2"]
    assert "46,079 neurons" in shown["text"]["neurons"]
    assert "L1H0.K" in shown["text"]["channel"]
    assert "coherence" in shown["text"]["others"]
    assert all(text in shown["text"]["statements"] for text in ("a prompt of 5 tokens", "0.7 < 1", "1.5 × 10⁻⁹"))
    assert shown["bad"] == [], "no mark is drawn at a place that is no number"


@needs_node
def test_a_section_is_absent_without_its_record(
    records: list[Record], manifest: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(path, records[:3], manifest)
    assert drawn_by_node(path)["sections"] == ["stream", "pairs", "edges", "guide"]
    write_report(path, [], manifest)
    assert drawn_by_node(path)["sections"] == ["guide"]


@needs_node
def test_arcs_start_and_end_where_the_parts_stand(manifest: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    starts, ends = {}, {}
    for writer in WRITERS:
        write_report(path, [composed("unembed", ("unembed",), (writer,))], manifest)
        (arc,) = drawn_by_node(path)["arcs"]
        starts[writer], ends[writer] = (
            float(re.findall(pattern, arc)[0]) for pattern in (r"^M([\d.]+)", r"([\d.]+),\d+$")
        )
    order = ["embed", "L0H0", "L0.mlp", "L0.mlp.bias", "L1H1", "L1.attn.bias"]
    assert sorted(starts, key=lambda name: starts[name]) == order
    assert len(set(starts.values())) == len(order)
    assert len(set(ends.values())) == 1
    assert min(ends.values()) > max(starts.values())


def test_importing_the_report_brings_its_own_code_no_torch_calls() -> None:
    source = "".join(p.read_text() for p in Path(sys.modules["virtual_weights.report"].__file__).parent.glob("*.py"))
    assert "import torch" not in source
