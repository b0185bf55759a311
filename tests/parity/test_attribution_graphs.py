"""Attribution graphs as circuit-tracer and Neuronpedia write them: read, kept whole, and refused where wrong."""

from __future__ import annotations

import csv
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars
import pytest
from hypothesis import given
from hypothesis import strategies as st

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import RecordError, UnsafeCheckpointError, UsageError
from virtual_weights.record.attribution_graph import STYLES
from virtual_weights.record.graph_node import cantor_pair, cantor_unpair

Capture = pytest.CaptureFixture[str]
Content = dict[str, Any]
LAYERS = 3
POISON = '<img src=x onerror="alert(1)">\x1b[2J\u202e=cmd|x!A1\n\ud800'


def node(name: str, number: int, layer: str, at: int, kind: str, page: str, **more: Any) -> Content:
    """A node as pydantic dumps circuit-tracer's ``Node``."""
    usual = {"token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0}
    row = {"node_id": name, "feature": number, "layer": layer, "ctx_idx": at, "feature_type": kind, **usual}
    return {**row, "jsNodeId": page, "clerp": "", "influence": None, "activation": None, **more}


def feature(layer: int, index: int, at: int, **more: Any) -> Content:
    number = (layer + index) * (layer + index + 1) // 2 + index
    return node(f"{layer}_{index}_{at}", number, str(layer), at, "cross layer transcoder", f"{layer}_{index}-0", **more)


def error(layer: int, at: int, form: str = "new") -> Content:
    """Before 0.5.1, between two commits, and since."""
    name = f"0_{layer}_{at}" if form == "old" else f"{layer}_-1_{at}"
    page = f"{layer}_-1-{at}" if form == "new" else f"{layer}_{at}-0"
    return node(name, -1, str(layer), at, "mlp reconstruction error", page, influence=0.5)


def circuit_tracer(form: str = "new") -> Content:
    """A graph as ``create_graph_files`` writes it."""
    wrong = error(2, 1, form)
    nodes = [
        feature(0, 391, 1, influence=0.25, activation=81.5),
        feature(2, 5, 1, influence=0.75, activation=2.0),
        wrong,
        node("E_464_0", 0, "E", 0, "embedding", "E_464-0", influence=0.1),
        node("E_3797_1", 1, "E", 1, "embedding", "E_3797-1", influence=0.2),
        node(
            f"{LAYERS + 1}_12_1",
            12,
            str(LAYERS + 1),
            1,
            "logit",
            "L_12-1",
            token_prob=0.328125,
            is_target_logit=True,
            clerp='Output " on" (p=0.328)',
        ),
    ]
    links = [("E_464_0", "0_391_1", -8.5), ("0_391_1", "2_5_1", 3.0), (wrong["node_id"], "4_12_1", 1.25)]
    metadata = {"slug": "cat", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["The", " cat"]}
    metadata |= {"prompt": "The cat", "node_threshold": 0.8, "schema_version": 1}
    view = {"pinnedIds": [wrong["node_id"]], "supernodes": [["0_2_1", wrong["node_id"], "2_5_1"]], "linkType": "both"}
    return {
        "metadata": metadata,
        "qParams": {**view, "clickedId": wrong["node_id"], "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": source, "target": target, "weight": weight} for source, target, weight in links],
    }


def neuronpedia() -> Content:
    """A graph as Neuronpedia's server for complete replacement models writes it: Lorsa, tagged ids, whole layers."""

    def row(name: str, number: int | None, kind: str, layer: int | str, at: int, **more: Any) -> Content:
        ends = {"layer": layer, "ctx_idx": at, "clerp": "F", "activation": None}
        return {"node_id": name, "jsNodeId": name, "feature": number, "feature_type": kind, **ends, **more}

    traced = {"pair_wise_contributors": [["1_cro_7_0", "1_bias_lorsa_bQ_1", 0.5]], "top_q_marginal_contributors": []}
    nodes = [
        row("E_464_0", None, "embedding", "E", 0, token="The"),
        row("1_cro_7_0", cantor_pair(1, 7), "cross layer transcoder", 1, 0, activation=2.5, influence=0.4),
        row("2_lor_7_1", cantor_pair(2, 7), "lorsa", 2, 1, activation=1.5, qk_tracing_results=traced),
        row("1_error_mlp_1", None, "mlp reconstruction error", 1, 1),
        row("1_error_attn_1", None, "lorsa error", 1, 1),
        row("3_12_1", 12, "logit", 3, 1, token_prob=0.5, token=" on"),
    ]
    links = [{"source": "1_cro_7_0", "target": "2_lor_7_1", "weight": 2, "note": "kept"}]
    bias = row("1_bias_lorsa_bQ_1", None, "bias", 1, 1)
    metadata = {"slug": "n", "scan": "qwen3-1.7b", "prompt_tokens": ["The", " cat"], "prompt": "The cat"}
    metadata |= {"schema_version": 1, "info": {"creator_name": "someone"}}
    return {
        "metadata": metadata,
        "qParams": {"subgraph": [1]},
        "nodes": nodes,
        "links": links,
        "qk_only_nodes": {"1_bias_lorsa_bQ_1": bias},
    }


def written(content: Any, path: Path) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
    return path


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], vw.AttributionGraph]:
    return lambda content: vw.AttributionGraph.load(written(content, tmp_path / "graph.json"))


Load = Callable[[Any], vw.AttributionGraph]


def test_a_graph_of_circuit_tracer_is_read(load: Load) -> None:
    graph = load(circuit_tracer())
    kinds = [(n.kind, n.layer, n.index, n.position) for n in graph.nodes]
    assert kinds == [
        ("feature", 0, 391, 1),
        ("feature", 2, 5, 1),
        ("error", 2, None, 1),
        ("token", None, 464, 0),
        ("token", None, 3797, 1),
        ("logit", 4, 12, 1),
    ]
    assert (graph.nodes[0].activation, graph.nodes[0].influence, graph.nodes[5].probability) == (81.5, 0.25, 0.328125)
    assert [n.name for n in graph.nodes] == ["L0F391", "L2F5", "L2 error", "token 464", "token 3797", "logit 12"]
    assert graph.links[0] == vw.GraphLink("E_464_0", "0_391_1", -8.5)
    assert all(not n.extras for n in graph.nodes[:5])


@pytest.mark.parametrize("form", ["old", "between"])
def test_errors_of_every_version_are_the_same_node(form: str, load: Load) -> None:
    graph = load(circuit_tracer(form))
    assert graph == load(circuit_tracer())
    assert graph.view["pinnedIds"] == ["2_-1_1"] == [graph.view["clickedId"]]
    assert graph.view["supernodes"] == [["0_2_1", "2_-1_1", "2_5_1"]], "the label of a group is no id"


def test_an_id_that_reads_as_an_error_is_a_feature_where_its_type_says_so(load: Load) -> None:
    content = circuit_tracer()
    content["nodes"] = [feature(0, 2, 1), feature(0, 0, 1), *content["nodes"]]
    nodes = load(content).nodes[:2]
    assert [(n.kind, n.id, n.index) for n in nodes] == [("feature", "0_2_1", 2), ("feature", "0_0_1", 0)]


def test_an_error_and_a_feature_of_one_id_cannot_be_told_apart(load: Load) -> None:
    content = circuit_tracer("old")
    content["nodes"].append(feature(0, 2, 1))
    with pytest.raises(RecordError, match=r"'0_2_1'.*(?s:.)*0\.5\.1"):
        load(content)


def test_what_is_written_is_what_circuit_tracer_writes(load: Load, tmp_path: Path) -> None:
    load(circuit_tracer("old")).save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == circuit_tracer()


@pytest.mark.parametrize("style", STYLES)
def test_reading_what_was_written_changes_nothing(style: Any, load: Load, tmp_path: Path) -> None:
    for content in (circuit_tracer(), circuit_tracer("old"), neuronpedia()):
        if style == "circuit-tracer" and "qk_only_nodes" in content:
            continue
        content["metadata"]["more"] = {"deep": [1, None, "é\ud800"]}
        content["nodes"][0]["more"] = [1.5]
        content["links"][0]["more"] = 2**70
        graph = load(content)
        graph.save(tmp_path / "again.json", style)
        assert vw.AttributionGraph.load(tmp_path / "again.json") == graph


def test_what_neuronpedia_adds_is_kept(load: Load, tmp_path: Path) -> None:
    content = neuronpedia()
    graph = load(content)
    assert [(n.kind, n.layer, n.index) for n in graph.nodes[1:5]] == [
        ("feature", 1, 7),
        ("feature", 2, 7),
        ("error", 1, None),
        ("error", 1, None),
    ]
    graph.save(tmp_path / "again.json", "neuronpedia")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["qk_only_nodes"] == content["qk_only_nodes"]
    assert again["nodes"][2]["qk_tracing_results"] == content["nodes"][2]["qk_tracing_results"]
    assert [n["node_id"] for n in again["nodes"]] == [n["node_id"] for n in content["nodes"]]
    assert again["nodes"][0]["token"] == "The"
    assert again["links"] == content["links"]
    assert again["qParams"] == content["qParams"]
    assert "node_threshold" not in again["metadata"], "null is no number to Neuronpedia's schema"
    with pytest.raises(UsageError, match="lorsa"):
        graph.save(tmp_path / "again.json", "circuit-tracer")


@pytest.mark.parametrize("number", [42, 300042, cantor_pair(3, 42), None])
def test_a_feature_is_numbered_in_the_ways_that_files_have(number: int | None, load: Load, tmp_path: Path) -> None:
    content = circuit_tracer()
    del content["metadata"]["schema_version"]
    content["nodes"].append(feature(3, 42, 0) | {"node_id": "3_00042_0", "feature": number})
    graph = load(content)
    assert (graph.nodes[-1].layer, graph.nodes[-1].index) == (3, 42)
    graph.save(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["nodes"][-1]["feature"] == cantor_pair(3, 42)
    assert again["metadata"]["schema_version"] == 1, "else Neuronpedia takes it for five digits"


@pytest.mark.parametrize(("newest", "number", "index"), [(1, cantor_pair(3, 42), 42), (0, 300042, 42), (0, 42, 42)])
def test_without_an_id_that_says_it_the_number_decides(newest: int, number: int, index: int, load: Load) -> None:
    content = circuit_tracer()
    content["metadata"]["schema_version"] = newest
    content["nodes"].append(feature(3, 42, 0) | {"node_id": "some feature", "feature": number})
    assert load(content).nodes[-1].index == index


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_a_cantor_number_is_undone_exactly(layer: int, index: int) -> None:
    assert cantor_unpair(cantor_pair(layer, index)) == (layer, index)


@given(st.integers(0, 10**60))
def test_every_number_is_one_of_a_pair(number: int) -> None:
    assert cantor_pair(*cantor_unpair(number)) == number


def test_cantor_numbers_beyond_those_of_javascript(load: Load) -> None:
    layer, index = 30, 2**28 + 1
    exact = cantor_pair(layer, index)
    assert int(float(exact)) != exact > 2**53, "JavaScript would write another"
    content = circuit_tracer()
    content["nodes"] += [feature(layer, index, 0), feature(layer, index, 1) | {"feature": int(float(exact))}]
    assert [n.index for n in load(content).nodes[-2:]] == [index, index]


def test_a_graph_is_made_of_values_in_memory(tmp_path: Path) -> None:
    Node = vw.GraphNode
    cat, feature_, missed = Node.token(3797, 1), Node.feature(0, 391, 1, activation=81.5), Node.error(2, 1)
    logit = Node.logit(LAYERS, 12, 1, " on", 0.328125, target=True)
    links = [(cat, feature_, 8.5), (feature_, logit.id, 1), (missed, logit, -0.5)]
    graph = vw.AttributionGraph.of(["The", " cat"], [feature_, missed, cat, logit], links, {"scan": "gemma-2-2b"})
    assert repr(graph) == "AttributionGraph 'graph': 4 nodes, 3 links, 2 tokens"
    for style in STYLES:
        graph.save(tmp_path / "graph.json", style)
        assert vw.AttributionGraph.load(tmp_path / "graph.json") == graph
    rows = {row["node_id"]: row for row in json.loads((tmp_path / "graph.json").read_text())["nodes"]}
    theirs = {row["node_id"]: row for row in circuit_tracer()["nodes"]}
    assert all(row == theirs[name] | {"influence": None} for name, row in rows.items())
    with pytest.raises(UsageError, match="no node 'E_1_0'"):
        vw.AttributionGraph.of(["a"], [cat], [("E_1_0", cat, 1.0)])
    with pytest.raises(UsageError, match="two nodes"):
        vw.AttributionGraph.of(["a"], [cat, cat], [])
    with pytest.raises(UsageError, match="weighs nan"):
        vw.AttributionGraph.of(["a"], [cat], [(cat, cat, math.nan)])


def without(*path: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def setting(value: Any, *path: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *((without(name), f"no '{name}'") for name in ("metadata", "qParams", "nodes", "links")),
        *((without("metadata", name), f"no '{name}'") for name in ("slug", "scan", "prompt_tokens", "prompt")),
        *(
            (without("nodes", 1, name), f"no '{name}'")
            for name in ("node_id", "feature", "layer", "ctx_idx", "feature_type")
        ),
        *((without("links", 1, name), f"no '{name}'") for name in ("source", "target", "weight")),
        (setting("9_9_9", "links", 1, "source"), "no node '9_9_9'"),
        (setting("9_9_9", "links", 1, "target"), "no node '9_9_9'"),
        (setting("2_5_1", "nodes", 2, "node_id"), "two nodes are called '2_5_1'"),
        (setting(math.nan, "links", 1, "weight"), "NaN"),
        (setting(math.inf, "nodes", 1, "activation"), "Infinity"),
        (setting(10**400, "links", 1, "weight"), "inf"),
        (setting("1", "links", 1, "weight"), "weight is '1'"),
        (setting(True, "links", 1, "weight"), "weight is True"),
        (setting(None, "links", 1, "weight"), "weight is None"),
        (setting(7, "nodes", 1, "feature"), "has the number 7"),
        (setting(-3, "nodes", 1, "feature"), "number -3"),
        (setting("E", "nodes", 1, "layer"), "layer None"),
        (setting("-1", "nodes", 1, "layer"), "layer is '-1'"),
        (setting("٣", "nodes", 1, "layer"), "layer is"),
        (setting(-1, "nodes", 3, "ctx_idx"), "negative position"),
        (setting(1.5, "nodes", 1, "ctx_idx"), "ctx_idx is 1.5"),
        (setting(True, "nodes", 1, "ctx_idx"), "ctx_idx is True"),
        (setting([], "nodes", 1, "clerp"), "clerp is"),
        (setting("row", "nodes", 1), "node 1 is str"),
        (setting(["a", 3], "metadata", "prompt_tokens"), "not all text"),
        (setting(2, "metadata", "schema_version"), "schema_version 2"),
    ],
)
def test_a_graph_that_is_wrong_is_refused(change: Callable[[Content], None], words: str, load: Load) -> None:
    content = circuit_tracer()
    load(content)
    change(content)
    with pytest.raises(RecordError) as refused:
        load(content)
    assert words in refused.value.what
    assert "graph.json" in refused.value.what
    assert str(refused.value).count("\n  ") == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 10**5, '{"links": 1e999}', "\ufeff\ufeff{}", '"'])
def test_what_is_not_such_json_is_refused(text: str, load: Load) -> None:
    with pytest.raises(RecordError):
        load(text)


def test_a_weight_that_becomes_infinite_is_refused(load: Load) -> None:
    text = json.dumps(circuit_tracer()).replace("-8.5", "1e999")
    with pytest.raises(RecordError, match="finite"):
        load(text)


def test_pickles_are_never_opened(tmp_path: Path, capsys: Capture) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return pytest.fail, ("a pickle was opened",)

    for name, raw in (
        ("graph.pt", b"{}"),
        ("graph.json", pickle.dumps(Harm())),
        ("zipped.json", b"PK\x03\x04" + b"\0" * 9),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UnsafeCheckpointError, match="create_graph_files"):
            vw.AttributionGraph.load(tmp_path / name)
        assert run(["graph", str(tmp_path / name)]) == 4
    with pytest.raises(RecordError, match="No such file"):
        vw.AttributionGraph.load(tmp_path / "absent.json")
    with pytest.raises(RecordError):
        vw.AttributionGraph.load(tmp_path)


def test_nodes_and_links_are_records(load: Load, tmp_path: Path) -> None:
    nodes, links = load(circuit_tracer()).records()
    assert (len(nodes), len(links)) == (6, 3)
    assert nodes["feature"] == (391, 5, None, 464, 3797, 12)
    assert nodes["influence"] == (0.25, 0.75, 0.5, 0.1, 0.2, None)
    assert nodes["token"] == (" cat", " cat", " cat", "The", " cat", " cat")
    first = next(links.top(1, "size").rows())
    assert (first["source_name"], first["target_name"], first["weight"]) == ("token 464", "L0F391", -8.5)
    assert (first["source_position"], first["target_position"]) == (0, 1)
    for record in (nodes, links):
        record.to_parquet(tmp_path / "table.parquet")
        assert vw.Record.from_parquet(tmp_path / "table.parquet") == record
        assert polars.DataFrame(record).height == len(record)
    assert len(vw.AttributionGraph.of([], [], []).records()[1]) == 0


LABELS = {
    "by_name.csv": 'feature,label\ntc2:F5,"cats, and dogs"\ntc8:F1,<b>\n',
    "by_layer.csv": 'layer,feature,label\r\n2,5,"cats, and dogs"\r\n8,1,<b>\r\n',
    "names.json": '{"tc2:F5": "cats, and dogs", "tc8:F1": "<b>"}',
    "layers.json": '{"2": {"5": "cats, and dogs"}, "8": {"1": "<b>"}}',
    "export.json": '[{"modelId": "m", "layer": "2-res-jb", "index": "5", "description": "cats, and dogs"},'
    '{"typeName": "", "layer": "8-res-jb", "index": "1", "description": "<b>"}]',
    "export.jsonl": '{"layer": "2-res-jb", "index": 5, "description": "cats, and dogs"}\n\n'
    '{"layer": "8-res-jb", "index": "1", "description": "<b>"}\r\n'
    '{"layer": "8-res-jb", "index": "2", "description": ""}\n',
}
CALLED: dict[str | int, str] = {"2-res-jb": "tc2", "8-res-jb": "tc8", 2: "tc2", "8": "tc8"}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_every_form_are_the_same(name: str, load: Load, tmp_path: Path) -> None:
    path = written(LABELS[name], tmp_path / name)
    labels = vw.FeatureLabels.load(path, CALLED)
    assert {feature: labels[feature] for feature in labels} == {"tc2:F5": "cats, and dogs", "tc8:F1": "<b>"}
    assert labels.at(2, 5) == "cats, and dogs"
    assert labels.at(2, 6) is labels.get("tc2:F6") is labels.get("else") is None
    assert "tc8:F1" in labels
    assert "tc8:F2" not in labels
    with pytest.raises(UsageError, match="tc8:F9"):
        labels["tc8:F9"]
    plain = vw.FeatureLabels.load(path)
    assert plain.of_layers() == labels.of_layers()
    graph = load(circuit_tracer()).labelled(plain)
    assert [n.label for n in graph.nodes[:3]] == ["", "cats, and dogs", ""]


def test_labels_of_attention_are_no_labels_of_transcoders(load: Load, tmp_path: Path) -> None:
    both = [(layer, kind) for layer in (1, 2) for kind in ("tc", "lorsa-8x")]
    rows = [{"layer": f"{layer}-{kind}", "index": 7, "label": f"{kind} {layer}"} for layer, kind in both]
    labels = vw.FeatureLabels.load(written(rows, tmp_path / "labels.json"))
    assert [n.label for n in load(neuronpedia()).labelled(labels).nodes[1:3]] == ["tc 1", "lorsa-8x 2"]


def test_two_dictionaries_of_a_layer_are_not_mixed(load: Load, tmp_path: Path) -> None:
    labels = vw.FeatureLabels.load(written({"tc2:F5": "a", "sae2:F5": "b"}, tmp_path / "labels.json"))
    assert labels["sae2:F5"] == "b"
    with pytest.raises(UsageError, match="tc2 and sae2"):
        load(circuit_tracer()).labelled(labels)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "feature,label\ntc8:F1,a\ntc8:F01,b\n", "line 3: tc8:F1 has a label already"),
        ("a.csv", "feature,label\ntc8:F1\n", "line 2: 1 cells under 2 heads"),
        ("a.csv", "feature,label\n123,a\n", "line 2: no feature such as"),
        ("a.csv", 'feature,label\ntc8:F1,"a\n', "unexpected end of data"),
        ("a.csv", "layer,feature,label\n8,-1,a\n", "line 2: the index is '-1'"),
        ("a.csv", "name,text\n", "its first line is 'name,text'"),
        ("a.csv", "", "its first line is ''"),
        ("a.csv", "feature,label\ntc8:F1," + "a" * 200_000, "field larger"),
        ("a.json", "{", "Expecting"),
        ("a.json", "3", "neither an object nor a list"),
        ("a.json", '{"tc8:F1": "a", "tc8:F1": "b"}', "'tc8:F1' stands twice"),
        ("a.json", '{"tc8:F1": 3}', "tc8:F1: the label is 3"),
        ("a.json", '[{"layer": "8", "index": "1"}]', "row 1: neither a label nor a description"),
        ("a.json", '[{"layer": "8", "index": true, "label": ""}]', "row 1: the index is True"),
        ("a.json", '[{"layer": [], "index": 1, "label": ""}]', "row 1: the layer is []"),
        ("a.json", "[3]", "row 1: int instead of an object"),
        ("a.json", "[" * 10**5, "recursion"),
        ("a.jsonl", '{"layer": "8", "index": 1, "label": "a"}\n{', "line 2: Expecting"),
        ("a.jsonl", '{"layer": 8, "index": 1, "label": "a"}\n{"layer": "8", "index": 1, "label": ""}', "line 2: 8:F1"),
        ("a.txt", "", "'.txt'"),
    ],
)
def test_labels_that_are_wrong_are_refused(name: str, text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError) as refused:
        vw.FeatureLabels.load(written(text, tmp_path / name))
    assert words in refused.value.what
    assert str(refused.value).count("\n  ") == 2


def test_labels_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("feature,label\ntc8:F1,é\n".encode("latin-1"))
    with pytest.raises(RecordError, match="utf-8"):
        vw.FeatureLabels.load(tmp_path / "a.csv")
    with pytest.raises(RecordError, match="No such file"):
        vw.FeatureLabels.load(tmp_path / "b.csv")


def test_poisoned_labels_stay_text(load: Load, tmp_path: Path, capsys: Capture) -> None:
    labels = written({"tc2:F5": POISON, "tc0:F391": "plain"}, tmp_path / "labels.json")
    graph = load(circuit_tracer()).labelled(vw.FeatureLabels.load(labels))
    assert graph.nodes[1].label == POISON
    graph.save(tmp_path / "again.json")
    assert vw.AttributionGraph.load(tmp_path / "again.json").nodes[1].label == POISON
    nodes, _ = graph.records()
    assert "<img" not in nodes._repr_html_()
    nodes.to_parquet(tmp_path / "nodes.parquet")
    for options in ([], ["--nodes"], ["--json"]):
        assert run(["graph", str(tmp_path / "graph.json"), "--labels", str(labels), *options]) == 0
        out = capsys.readouterr().out
        assert "onerror" in out
        assert not {"\x1b", "\u202e", "\ud800"}.intersection(out)


def test_the_command_shows_and_converts(tmp_path: Path, capsys: Capture) -> None:
    file = str(written(circuit_tracer("old"), tmp_path / "graph.json"))
    labels = str(written(LABELS["by_name.csv"], tmp_path / "labels.csv"))
    assert run(["graph", file, "--top", "2", "--labels", labels]) == 0
    out = capsys.readouterr().out
    assert "6 nodes, 3 links, 2 tokens" in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith(("token", "L0"))] == [
        ["token", "464", "0"],
        ["L0F391", "1", "L2F5"],
    ]
    assert "cats, and dogs" in out
    table, again = tmp_path / "links.csv", tmp_path / "again.json"
    conversion = ["--labels", labels, "-o", str(table), "--save-as", str(again), "--style", "neuronpedia", "--json"]
    assert run(["graph", file, *conversion]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["model"], answer["summary"]["links"]) == ("gemma-2-2b", 3)
    assert [row["weight"] for row in answer["rows"]] == [-8.5, 3.0, 1.25]
    assert vw.AttributionGraph.load(again).nodes[1].label == "cats, and dogs"
    with table.open(newline="") as lines:
        assert [row["source"] for row in csv.DictReader(lines)] == ["E_464_0", "0_391_1", "2_-1_1"]
    assert run(["graph", file, "--nodes", "-o", str(tmp_path / "nodes.parquet")]) == 0
    assert vw.Record.from_parquet(tmp_path / "nodes.parquet")["kind"].count("feature") == 2  # pyright: ignore
    capsys.readouterr()
    for wrong in (["-o", str(tmp_path / "links.txt")], ["--style", "neuronpedia"], ["--style", "other"]):
        assert run(["graph", file, *wrong]) == 2
        assert capsys.readouterr().err
