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
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.analysis.ledger.bandwidth import Bandwidth
from virtual_weights.record import Axis, Column, Record
from virtual_weights.report.documents import documents
from virtual_weights.report.page import page
from virtual_weights.report.tables import density
from virtual_weights.survey import manifest_of


@pytest.fixture(scope="module")
def records() -> list[Record]:
    stream = vw.open(tiny("llama-grouped-untied"))
    return [vw.Composition(port)(stream) for port in ("Q", "K", "V")]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return manifest_of(vw.open(tiny("llama-grouped-untied")), "tiny")


def values(contents: dict[str, Any], port: str, column: str) -> np.ndarray:
    """A column of a port, put together from its windows."""
    pairs = contents[f"pairs-{port}"]
    parts = [base64.b64decode(contents[name]["values"]) for name in pairs["columns"][column]]
    return np.frombuffer(b"".join(parts), "<f2").astype(np.float64).reshape(-1, len(pairs["writers"]))


def test_windows_hold_every_number_once(
    records: list[Record], manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = documents(records, manifest)
    monkeypatch.setattr(sys.modules["virtual_weights.report.pairs"], "WINDOW", 40)
    parts = documents(records, manifest)
    for record in records:
        port = str(record.parameters["port"])
        pairs = parts[f"pairs-{port}"]
        assert len(pairs["columns"]["score"]) > 2
        assert pairs["windows"][0] == 0
        assert pairs["windows"][-1] == len(pairs["readers"])
        assert len(pairs["windows"]) == len(pairs["columns"]["score"]) + 1
        np.testing.assert_array_equal(values(parts, port, "score"), values(whole, port, "score"))
        np.testing.assert_allclose(values(parts, port, "score"), record["score"].numpy(), rtol=1e-3)


def test_main_effects_and_lift_add_up_to_the_score(records: list[Record], manifest: dict[str, Any]) -> None:
    contents = documents(records, manifest)
    for record in records:
        pairs = contents[f"pairs-{record.parameters['port']}"]
        energy = 2 * np.log2(record["null_ratio"].numpy())
        heard, listens = (np.array(pairs[name], dtype=np.float64) for name in ("writer_effect", "reader_effect"))
        rest = energy - record["lift"].numpy() - heard[None, :] - listens[:, None]
        there = ~np.isnan(rest)
        assert there.sum() > 10
        assert np.ptp(rest[there]) < 1e-3, "what is left is the mean of all, one number"


def test_a_dead_pair_is_told_from_one_that_cannot_reach(manifest: dict[str, Any]) -> None:
    score = torch.tensor([[0.5, float("nan"), float("nan")], [0.25, 0.5, float("nan")]], dtype=torch.float64)
    strength = torch.where(torch.tensor([[True, True, False], [True, True, True]]), torch.nan_to_num(score), torch.nan)
    axes = Axis("reader", ("L1H0.Q", "L2H0.Q")), Axis("writer", ("L0H0", "L0H1", "L1H0"))
    record = Record("composition", axes, (Column("score", score), Column("strength", strength)), {"port": "Q"})
    shown = values(documents([record], manifest), "Q", "score")
    assert shown.tolist()[0][:2] == [0.5, np.inf]
    assert np.isnan(shown[0, 2])
    assert shown.tolist()[1] == [0.25, 0.5, np.inf]


def test_nothing_is_fetched_and_hostile_names_stay_data(records: list[Record], manifest: dict[str, Any]) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    text = page(documents(records, {**manifest, "model": hostile}))
    assert "<img" not in text
    assert text.count("<script") == 2
    plain = page(documents(records, manifest)).split("<script id")[0]
    assert not re.search(r"\s(?:src|href)\s*=|@import|url\(", plain)
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\"'`\s]+", plain + text.split("<script>")[1]))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)
    data = re.search(r'<script id="documents" type="application/json">(.*?)</script>', text, re.S)
    assert data is not None
    assert json.loads(data.group(1))["map"]["model"] == hostile


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    atlas = vw.Atlas.create(tmp_path / "atlas", manifest_of(stream, "tiny"))
    path = tmp_path / "report.html"
    path.write_text("old")
    assert vw.report(atlas, path) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "atlas"}
    assert not (atlas.path / "explorer").exists()


def test_a_table_keeps_every_value_and_says_what_is_absent(manifest: dict[str, Any]) -> None:
    record = Bandwidth()(vw.open(tiny("llama-grouped-untied")))
    table = documents([record], manifest)["bandwidth"]
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


def test_neurons_are_counted_where_they_lie() -> None:
    record = neurons(500, 3)
    drawn = density(record)
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
    found = documents([verdicts], manifest)["statements"]
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


def test_importing_the_report_brings_its_own_code_no_torch_calls() -> None:
    source = "".join(p.read_text() for p in Path(sys.modules["virtual_weights.report"].__file__).parent.glob("*.py"))
    assert "import torch" not in source
