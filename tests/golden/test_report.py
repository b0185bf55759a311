"""The report: one file, no request, and nothing in a checkpoint's names can break out of its data."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.cli.manifest import manifest_of
from virtual_weights.record import Axis, Column, Record
from virtual_weights.report import page, payload, write_report


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
        assert (drawn["readers"], drawn["writers"]) == (list(record.axes[0].labels), list(record.axes[1].labels))


def test_edges_are_the_strongest_of_each_port_and_name_their_channel(
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
    names = tuple(f"L{layer}H{head}" for layer in range(31) for head in range(20))
    score = torch.rand(620, 620, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = torch.arange(620) // 20
    score[layer[None, :] >= layer[:, None]] = float("nan")
    columns = tuple(Column(name, score) for name in ("score", "strength", "null_ratio", "z"))
    record = Record("composition", (Axis("reader", names), Axis("writer", names)), columns, {"port": "Q"})
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
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert data is not None
    assert json.loads(data.group(1))["model"]["model"] == hostile


def test_file_is_replaced_whole(records: list[Record], manifest: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, records, manifest)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_importing_the_report_brings_its_own_code_no_torch_calls() -> None:
    source = "".join(p.read_text() for p in Path(sys.modules["virtual_weights.report"].__file__).parent.glob("*.py"))
    assert "import torch" not in source


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_script_is_valid_javascript() -> None:
    script = Path(sys.modules["virtual_weights.report"].__file__).parent / "static" / "report.js"
    assert subprocess.run(["node", "--check", str(script)], check=False).returncode == 0
