"""Edges as a file for other programs hold what ``edges`` answers; what cannot be written leaves nothing changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import duckdb
import polars
import pytest
import torch

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record import Axis, Column, Record

NAN = math.nan
COMPONENTS = [
    {"label": "embed", "kind": "embed", "layer": None},
    {"label": "L0H0", "kind": "head", "layer": 0},
    {"label": "L1H0", "kind": "head", "layer": 1},
    {"label": "L1.mlp", "kind": "mlp", "layer": 1},
]


@pytest.fixture
def atlas(tmp_path: Path) -> vw.Atlas:
    """Scores into two ports, neuron edges, an ablation of two kinds, and labels of heads."""
    manifest = {"fingerprint": "f00d", "model": "tiny", "reference": "tiny", "components": COMPONENTS}
    atlas = vw.Atlas.create(tmp_path / "atlas", manifest)
    writers = Axis("writer", ("embed", "L0H0"))
    for port, readers, scores in (
        ("K", ("L0H0.K", "L1H0.K"), [[0.5, NAN], [0.25, 0.75]]),
        ("in", ("L1.mlp.in",), [[0.125, math.inf]]),
    ):
        axes = Axis("reader", readers, ("L0.kv0", "L1.kv0") if port == "K" else ()), writers
        atlas.put(
            Record("composition", axes, (Column("score", torch.tensor(scores)),), {"port": port}, {"norm": "folded"})
        )
    ends = Column("reader", ("L1N3.in", "unembed", "L1.mlp")), Column("writer", ("L0N'1", "L0H0", "L0H0"))
    neurons = Column("score", torch.tensor([1.0, 2.0, 3.0])), Column("target", ("x", None, None))
    atlas.put(Record("neuron_edges", (Axis("edge", ("1", "2", "3")),), (*ends, *neurons)))
    for kind in ("random", "asked"):
        row = (Column("reader", ("L1H0.K",)), Column("writer", ("L0H0",)), Column("kind", (kind,)))
        numbers = Column("effect_nats", torch.tensor([1.0])), Column("rank", torch.tensor([1.0]))
        atlas.put(Record("ablation", (Axis("edge", ("1",)),), (*row, *numbers), {"edges": kind}))
    atlas.put(Record("labels", (Axis("head", ("L0H0",)),), (Column("label", ("induction",)),)))
    return atlas


def exported(path: Path) -> list[dict[str, Any]]:
    frame = polars.read_parquet(path) if path.suffix == ".parquet" else polars.read_csv(path)
    return frame.to_dicts()


def brief(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    return {
        tuple(row.get(name) for name in ("key", "port", "reader", "writer", "score", "reader_label")) for row in rows
    }


@pytest.mark.parametrize("name", ["edges.parquet", "edges.csv"])
def test_a_table_has_every_edge_with_its_columns(atlas: vw.Atlas, tmp_path: Path, name: str):
    assert vw.export(atlas, tmp_path / name) == 5
    rows = exported(tmp_path / name)
    expected = [row | ({"score": math.inf} if row["score"] is None else {}) for row in vw.edges(atlas)]
    assert brief(rows) == brief(expected)
    assert set(rows[0]) == {*expected[0], "reader_group"}
    assert {row["reader_group"] for row in rows} == {"L0.kv0", "L1.kv0", None}


def test_some_edges_are_chosen_as_in_a_query(atlas: vw.Atlas, tmp_path: Path):
    path = tmp_path / "edges.parquet"
    assert vw.export(atlas, path, "L1H0", where={"port": "K"}) == 2
    assert brief(exported(path)) == brief(vw.edges(atlas, "L1H0", where={"port": "K"}))
    assert vw.export(atlas, path, writer="embed", by="score", top=2) == 2
    assert [row["score"] for row in exported(path)] == [0.5, 0.25]
    assert vw.export(atlas, path, question="ablation") == 1
    assert exported(path)[0]["kind"] == "asked"


def test_a_graph_has_components_and_their_connections(atlas: vw.Atlas, tmp_path: Path):
    path = tmp_path / "edges.json"
    assert vw.export(atlas, path) == 5
    graph = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (graph["directed"], graph["multigraph"]) == (True, True)
    assert (graph["graph"]["question"], graph["graph"]["stamp"]) == ("composition", {"norm": "folded"})
    assert graph["nodes"] == [{"id": c["label"], **c} for c in COMPONENTS]
    assert {edge["key"] for edge in graph["edges"]} == set(range(5))
    (edge,) = (e for e in graph["edges"] if e["reader"] == "L1H0.K" and e["source"] == "L0H0")
    assert (edge["target"], edge["port"], edge["score"], edge["writer_label"]) == ("L1H0", "K", 0.75, "induction")
    assert edge["record"] in atlas.keys("composition")
    (infinite,) = (e for e in graph["edges"] if e["score"] is None)
    assert (infinite["source"], infinite["target"]) == ("L0H0", "L1.mlp")


def test_what_the_model_does_not_list_is_a_node_all_the_same(atlas: vw.Atlas, tmp_path: Path):
    vw.export(atlas, tmp_path / "g", question="neuron_edges", format="graph")
    graph = json.loads((tmp_path / "g").read_text())
    assert [(node["id"], node["kind"], node["layer"]) for node in graph["nodes"]] == [
        ("L0H0", "head", 0),
        ("L1.mlp", "mlp", 1),
        ("L0N'1", None, None),
        ("L1N3", "neuron", 1),
        ("unembed", "unembed", None),
    ]
    by_reader = {edge["reader"]: edge for edge in graph["edges"]}
    assert by_reader["L1N3.in"]["target"] == "L1N3"
    assert by_reader["L1N3.in"]["target_"] == "x", "a column of that name keeps its values"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"path": "edges.txt"}, "edges.txt"),
        ({"format": "xlsx"}, "xlsx"),
        ({"by": "score"}, "without top"),
        ({"top": 0}, "top=0"),
        ({"top": 1, "by": "port"}, "no column of numbers"),
        ({"reader": "L9H9"}, "no reader 'L9H9'"),
        ({"reader": "L0H0", "writer": "L0H0"}, "no edges"),
        ({"question": "overlap"}, "no edges of 'overlap'"),
        ({"path": "nowhere/edges.csv"}, "no folder"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_refused(atlas: vw.Atlas, tmp_path: Path, asked: dict[str, Any], message: str):
    with pytest.raises(UsageError) as caught:
        vw.export(atlas, **{"path": "edges.csv", **asked} | {"path": tmp_path / asked.get("path", "edges.csv")})
    assert message in caught.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["atlas"]


def test_a_file_is_replaced_whole_or_not_at_all(atlas: vw.Atlas, tmp_path: Path):
    path = tmp_path / "it's [1].csv"
    path.write_text("before")
    part = atlas.edge_tables(atlas.keys("composition")[0])[0]
    raw = part.read_bytes()
    part.write_bytes(raw[:-1])
    with pytest.raises(RecordError, match="checksum differs"):
        vw.export(atlas, path)
    assert path.read_text() == "before"
    part.write_bytes(raw)
    vw.export(atlas, path)
    assert path.read_text().startswith("key,question,port,")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["atlas", "it's [1].csv"]


def test_the_verb_says_what_it_wrote(atlas: vw.Atlas, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "edges.parquet"
    command = ["export", str(atlas.path), "-o", str(path), "--where", "port=K", "--top", "2"]
    assert run(command) == 0
    assert capsys.readouterr().out.startswith("2 edges · composition")
    assert run([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["model"], answer["summary"]["edges"]) == ("tiny", 2)
    with duckdb.connect() as database:
        assert [score for (score,) in database.read_parquet(str(path)).select("score").fetchall()] == [0.75, 0.5]
    assert run(["export", str(atlas.path), "-o", str(path), "--by", "score"]) == 2
    assert "--by without --top" in capsys.readouterr().err
    assert run(["export", str(atlas.path), "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
