"""The explorer: its documents say what the records say, and its bundle is what its sources give."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from browsing import dom
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.report.documents import documents
from virtual_weights.report.page import page
from virtual_weights.survey.plan import Part, Plan, map_model, shown_of

ROOT = Path(__file__).parents[2]
STATIC = files("virtual_weights.report") / "static"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> vw.Atlas:
    path = tmp_path_factory.mktemp("explored")
    tiny("llama-grouped-untied").save_pretrained(path / "model")
    stream = vw.open(path / "model")
    run = vw.Run.on_repeats(stream, 64, 16)
    map_model(stream, path / "atlas", plan=Plan((Part.composition,), edges=4), run=run)
    atlas = vw.Atlas.open(path / "atlas")
    vw.report(atlas)
    return atlas


def decoded(contents: dict[str, Any], port: str, column: str) -> np.ndarray:
    pairs = contents[f"pairs-{port}"]
    parts = [base64.b64decode(contents[name]["values"]) for name in pairs["columns"][column]]
    return np.frombuffer(b"".join(parts), "<f2").astype(np.float64).reshape(len(pairs["readers"]), -1)


def test_documents_say_what_records_say(atlas: vw.Atlas) -> None:
    records, contents = shown_of(atlas), documents(shown_of(atlas), atlas.manifest)
    composition = {str(r.parameters["port"]): r for r in records if r.question == "composition"}
    stored = contents["map"]["stored"]
    numbers = {n for port in composition for of in contents[f"pairs-{port}"]["columns"].values() for n in of}
    assert set(contents) == {"map", *(f"pairs-{port}" for port in composition), *numbers, *stored.values()}
    channels = {(r.parameters["writer"], r.parameters["reader"]): r for r in records if r.question == "channel"}
    assert set(stored) == {"heads", *(f"{writer}/{reader}" for writer, reader in channels)}
    for (writer, reader), record in channels.items():
        carried = contents[stored[f"{writer}/{reader}"]]
        shown = {"channel", "channel_tokens", "pair_angles", *([] if reader.endswith("V") else ["offset_profile"])}
        assert set(carried) - {"edge_tokens"} == shown
        gains = next(column["values"] for column in carried["channel"]["columns"] if column["name"] == "gain")
        assert gains == torch.as_tensor(record["gain"]).tolist()
    for port, record in composition.items():
        pairs = contents[f"pairs-{port}"]
        assert pairs["writers"] == list(record.axis("writer").labels)
        assert pairs["groups"] == list(record.axis("reader").groups)
        for name in ("score", "lift"):
            values = decoded(contents, port, name)
            expected = torch.as_tensor(record[name]).double().numpy()
            np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)
    shares = {str(r.parameters["port"]): r for r in records if r.question == "contribution"}
    columns = {port: record for port, record in shares.items() if "share" in [c.name for c in record.columns]}
    assert columns
    for port, record in columns.items():
        values = decoded(contents, port, "share")
        np.testing.assert_allclose(values, torch.as_tensor(record["share"]).double().numpy(), rtol=1e-3, atol=1e-4)
    labels = next(record for record in records if record.question == "labels")
    behaviours = contents["map"]["behaviours"]
    assert {head: entry["label"] for head, entry in behaviours.items()} == dict(
        zip(labels.axes[0].labels, labels["label"], strict=True)
    )
    ablation = next(record for record in records if record.question == "ablation")
    removed = [(row["writer"], row["reader"]) for row in ablation.rows() if row["kind"] == "asked"]
    assert {pair for pair in channels if "edge_tokens" in contents[stored["/".join(pair)]]} == set(removed)
    assert [row["effect"] for row in contents["map"]["effects"]] == [row["effect_nats"] for row in ablation.rows()]
    assert {part["label"] for part in contents["map"]["parts"]} == {c["label"] for c in atlas.manifest["components"]}


def test_documents_are_as_the_schema_says(atlas: vw.Atlas) -> None:
    schema = json.loads((STATIC / "explorer.schema.json").read_text(encoding="utf-8"))
    contents = json.loads(json.dumps(documents(shown_of(atlas), atlas.manifest)))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(contents, schema)
    index = {"$ref": "#/$defs/index", "$defs": schema["$defs"]}
    jsonschema.validate(json.loads((atlas.path / "explorer" / "index.json").read_text()), index)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(contents | {"map": contents["map"] | {"model": 3}}, schema)


def test_tokens_of_directions_come_once_and_nearest_first(atlas: vw.Atlas) -> None:
    records = shown_of(atlas)
    contents, record = documents(records, atlas.manifest), next(r for r in records if r.question == "head_tokens")
    rows = list(record.rows())
    shown = contents["heads"]["tokens"]
    assert set(shown) == {row["head"] for row in rows}
    for head, blocks in shown.items():
        for block in blocks:
            own = [r for r in rows if (r["head"], r["directions"]) == (head, block["directions"])]
            assert block["gain"] == pytest.approx(own[0]["gain"], rel=1e-3)
            assert block["written_read"] == pytest.approx(own[0]["written_read"], rel=1e-3, abs=1e-4)
            for end, tokens in block["ends"].items():
                nearest: dict[int, float] = {}
                for row in own:
                    if row["end"] == end:
                        nearest[row["token"]] = max(abs(row["cosine"]), nearest.get(row["token"], 0.0))
                assert {token for _, token, _ in tokens} == set(nearest)
                sizes = [abs(cosine) for *_, cosine in tokens]
                assert sizes == sorted(sizes, reverse=True)
                assert sizes == pytest.approx([nearest[token] for _, token, _ in tokens], rel=1e-3)


def test_the_index_knows_every_document(atlas: vw.Atlas) -> None:
    folder = atlas.path / "explorer"
    index = json.loads((folder / "index.json").read_text())
    assert {entry["file"] for entry in index["documents"].values()} | {"index.json"} == {
        p.name for p in folder.iterdir()
    }
    for entry in index["documents"].values():
        content = (folder / entry["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert vw.status(atlas, check=True).faults == ()


def test_the_bundle_is_what_its_sources_give(tmp_path: Path) -> None:
    if shutil.which("npm") is None or not (ROOT / "explorer").is_dir():
        pytest.skip("there is no npm to build the bundle with")
    copy = tmp_path / "explorer"
    shutil.copytree(ROOT / "explorer", copy, ignore=shutil.ignore_patterns("node_modules"))
    fetched = subprocess.run(["npm", "ci"], cwd=copy, capture_output=True, text=True, timeout=300, check=False)
    if fetched.returncode:
        pytest.skip(f"npm could not fetch what the bundle is built with: {fetched.stderr[-200:]}")
    subprocess.run(["npm", "run", "--silent", "check"], cwd=copy, check=True, timeout=120)
    (tmp_path / "built").mkdir()
    subprocess.run(["node", "build.mjs", "../built"], cwd=copy, check=True, timeout=60)
    for name in ("explorer.js", "explorer.css", "explorer.licences.txt"):
        assert (tmp_path / "built" / name).read_bytes() == (STATIC / name).read_bytes(), name
    assert len((STATIC / "explorer.js").read_bytes()) < 600_000


def test_pages_show_heads_and_edges_and_run_no_names(atlas: vw.Atlas, tmp_path: Path) -> None:
    contents = documents(shown_of(atlas), atlas.manifest)
    poison = "<img src=x onerror=document.title='poisoned'><script>document.title='poisoned'</script>"
    contents["map"]["model"] = poison
    contents["map"]["run"]["text"] = poison
    path = tmp_path / "page.html"
    path.write_text(page(contents), encoding="utf-8")
    shown = dom(path, "#/map?port=K&least=-9")
    assert "Which connections stand out" in shown
    assert html.escape(poison, quote=False) in shown
    assert "<title>poisoned" not in shown
    assert "<img" not in shown
    edges = vw.edges(atlas, "L2H0.K", top=3)
    card = dom(path, "#/head/L2H0")
    assert "Where it attends" in card
    assert f'aria-label="{len(vw.edges(atlas, "L2H0.K", top=10_000))} writers, port K"' in card
    assert all(f">{edge['writer']}<" in card or edge["writer"] in card for edge in edges)
    assert "No part L9H9" in dom(path, "#/head/L9H9")


def test_an_atlas_without_edges_between_heads_says_so(atlas: vw.Atlas, tmp_path: Path) -> None:
    contents = documents(shown_of(atlas), atlas.manifest)
    whole = contents["map"]
    path = tmp_path / "page.html"
    path.write_text(page({"map": {**whole, "ports": []}}), encoding="utf-8")
    for address in ("#/map", "#/layers?port=K"):
        assert "They are not stored" in dom(path, address)
    headless = [part for part in whole["parts"] if part["kind"] != "head"]
    path.write_text(page({"map": {**whole, "ports": [], "parts": headless, "behaviours": {}}}), encoding="utf-8")
    assert "has no attention heads" in dom(path, "#/map")
