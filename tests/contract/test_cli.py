"""The command line: one JSON object on stdout, everything else on stderr, exit codes as promised."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.hostile import CASES
from operating import operate
from safetensors import safe_open
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.atlas import Atlas
from virtual_weights.cli import run
from virtual_weights.errors import ResourceError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def answer(arguments: list[Any], capsys: Capture) -> dict[str, Any]:
    code = run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.mark.parametrize("port", ["Q", "K", "V"])
def test_composition_json_is_the_record(folder: Path, port: str, capsys: Capture) -> None:
    given = answer(["composition", folder, "--port", port, "--top", 5, "--json"], capsys)
    expected = list(vw.Composition(port)(vw.open(folder)).top(5).rows())
    assert (given["model"], given["question"]) == (str(folder), "composition")
    assert given["parameters"] == vw.Composition(port).parameters
    assert given["stamp"]["norm"] == "gain folded, unembedding centred"
    for edge, row in zip(given["rows"], expected, strict=True):
        assert edge["reader"] == row["reader"]
        assert {k: edge[k] for k in ("writer", "score", "strength", "null_ratio", "z")} == {
            k: row[k] for k in ("writer", "score", "strength", "null_ratio", "z")
        }


def test_heads_that_share_keys_are_shown_as_one_group(folder: Path, capsys: Capture) -> None:
    given = answer(["composition", folder, "--port", "K", "--top", 30, "--json"], capsys)
    edge, groups = given["rows"][0], given["summary"]["groups"]
    reader = edge["reader"].removesuffix(".K")
    layer, head = reader[1:].split("H")
    members = {f"L{layer}H{h}" for h in range(6) if h // 3 == int(head) // 3}
    assert edge["group"] == f"L{layer}.kv{int(head) // 3}"
    assert set(edge["shared_with"]) | {reader} == members
    assert len(groups) < 30
    assert sum(len(group["readers"]) for group in groups) == 30
    assert "group" not in answer(["composition", folder, "--port", "Q", "--json"], capsys)["rows"][0]


def test_save_writes_the_matrix_with_its_labels(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "k.safetensors"
    given = answer(
        ["composition", folder, "--port", "K", "--no-fold", "--rotary-offset", 2, "--save", path, "--json"], capsys
    )
    assert (given["stamp"]["norm"], given["parameters"]["rotary_offset"]) == ("left out", 2)
    with safe_open(path, "pt") as file:
        score, metadata = file.get_tensor("score"), file.metadata()
    readers, writers = json.loads(metadata["readers"]), json.loads(metadata["writers"])
    assert score.shape == (18, 18)
    edge = given["rows"][0]
    assert score[readers.index(edge["reader"]), writers.index(edge["writer"])].item() == edge["score"]
    assert torch.isnan(score[0]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]


def test_channel_json(folder: Path, capsys: Capture) -> None:
    given = answer(["channel", folder, "L0H1", "L1H3.K", "--json"], capsys)
    figures = given["summary"]
    stream = vw.open(folder)
    dense = stream["L1H3"].qk.dense().double() @ stream["L0H1"].ov.dense().double()
    gains = torch.linalg.svdvals(dense)
    torch.testing.assert_close(torch.tensor([row["gain"] for row in given["rows"]], dtype=torch.float64), gains[:4])
    assert figures["numerical_rank"] == 4
    assert figures["strength"] == pytest.approx(float(dense.norm()))
    assert 1 <= figures["stable_rank"] <= figures["numerical_rank"]


def test_map_writes_atlas_and_report_and_resumes(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "atlas"
    first = answer(["map", folder, "-o", out, "--json"], capsys)["summary"]
    assert Path(first["report"]).read_text().startswith("<!doctype html>")
    assert set(first["composition"]) == {"Q", "K", "V"}
    assert first["neurons"]["count"] == 120
    assert sum(first["statements"].values()) == 25
    ledger = (out / "ledger.sqlite").stat().st_mtime_ns
    again = answer(["map", folder, "-o", out, "--json"], capsys)["summary"]
    assert (out / "ledger.sqlite").stat().st_mtime_ns == ledger
    assert {name: again[name] for name in first if name != "seconds"} == {
        name: first[name] for name in first if name != "seconds"
    }
    edges = answer(["edges", out, "--reader", "L2H1.K", "--top", 4, "--json"], capsys)["rows"]
    stream = vw.open(folder)
    column = vw.Composition("K", writers="all")(stream)
    row = column.axis("reader").index("L2H1.K")
    best = column["score"][row].nan_to_num(-1).topk(4)
    assert [edge["writer"] for edge in edges] == [column.axis("writer").labels[int(i)] for i in best.indices]
    assert [edge["score"] for edge in edges] == pytest.approx(best.values.tolist())
    pairs = answer(["edges", out, "--question", "neuron_edges", "--by", "magnitude", "--json"], capsys)["rows"]
    assert pairs[0]["magnitude"] == max(edge["magnitude"] for edge in pairs)
    assert run(["edges", str(out), "--reader", "L9H9"]) == 2
    assert "no reader 'L9H9'" in capsys.readouterr().err


def test_a_part_of_the_map_alone(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "atlas"
    summary = answer(["map", folder, "-o", out, "--only", "bandwidth,basis", "--json"], capsys)["summary"]
    assert set(summary["bandwidth"]) == {"state", "oversubscription", "unread_dim"}
    assert summary["composition"] == {}
    assert "statements" not in summary
    assert run(["map", str(folder), "-o", str(out), "--only", "everything"]) == 2
    assert "composition, overlap" in capsys.readouterr().err


def test_a_map_with_norms_left_out_has_no_statements(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    given = answer(
        ["map", folder, "-o", tmp_path / "a", "--no-fold", "--only", "composition,statements", "--json"], capsys
    )
    assert "statements" not in given["summary"]
    assert given["stamp"]["norm"] == "left out"


def test_statements_json_and_words(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = answer(["statements", folder, "--sample", 8, "--json"], capsys)["rows"]
    ids = [*(f"L{i}" for i in range(1, 13)), *(f"T{i}" for i in range(1, 8)), *(f"C{i}" for i in range(1, 7))]
    assert [row["id"] for row in rows] == ids
    assert all(row["verdict"] in ("holds", "holds under", "fails", "cannot tell") for row in rows)
    assert all(row["evidence"] or row["verdict"] == "cannot tell" for row in rows)
    stream, point = vw.open(folder), tmp_path / "point.safetensors"
    model = tiny("llama-grouped-untied")
    operate(model, stream, torch.arange(9))[0].save(point)
    run_on = answer(["statements", folder, "--only", "T7, L3", "--point", point, "--json"], capsys)
    assert {row["id"]: row["verdict"] for row in run_on["rows"]}["L3"] == "holds under"
    assert run_on["summary"]["run"] == "a prompt of 9 tokens"
    assert run(["statements", str(folder), "--only", "L4"]) == 0
    assert "verdict  FAILS" in capsys.readouterr().out
    assert run(["statements", str(folder), "--only", "L40"]) == 2


def test_tables_for_people(folder: Path, capsys: Capture) -> None:
    assert run(["composition", str(folder), "--port", "V", "--top", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "V-composition" in out
    assert "key/value group" in out


def test_progress_as_json_lines_stays_on_stderr(folder: Path, capsys: Capture) -> None:
    assert run(["composition", str(folder), "--json", "--progress", "json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    steps = [json.loads(line) for line in err.splitlines()]
    assert steps[-1]["step"] == "composition K"
    assert steps[-1]["done"] == pytest.approx(steps[-1]["total"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, ""),
        (["composition"], 2, "Missing"),
        (["composition", "MODEL", "--port", "O"], 2, "port"),
        (["composition", "MODEL", "--nonsense"], 2, "nonsense"),
        (["nonsense"], 2, "nonsense"),
        (["composition", "MODEL", "--top", "0"], 2, "top"),
        (["composition", "MODEL", "--save", "x.txt"], 2, "does not end in"),
        (["composition", "MODEL", "--save", "nowhere/x.safetensors"], 2, "no folder"),
        (["composition", "MODEL", "--compute-dtype", "float16"], 2, "float16"),
        (["channel", "MODEL", "L0H1", "L1H3"], 2, "reading port"),
        (["channel", "MODEL", "L2H1", "L1H3.K"], 2, "cannot reach"),
        (["channel", "MODEL", "L0H1", "bogus"], 2, "names no component"),
        (["composition", "no-such-model"], 3, "no checkpoint"),
        (["model", "fetch", "no-such-model"], 2, "no-such-model"),
    ],
)
def test_errors_have_their_exit_code_and_no_traceback(
    arguments: list[str], code: int, said: str, folder: Path, capsys: Capture
) -> None:
    assert run([str(folder) if a == "MODEL" else a for a in arguments]) == code
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in err
    assert out == "" or not arguments


def test_interruption_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("virtual_weights.checkpoint.open_source", stop)
    assert run(["composition", str(folder)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_too_small_a_budget_is_5(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with pytest.raises(ResourceError, match="at least"):
        vw.Composition("K", memory_mb=0)(vw.open(folder))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("virtual_weights.checkpoint.open_source", full)
    assert run(["composition", str(folder)]) == 5
    assert "out of resources" in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_hostile_checkpoints_end_with_their_code_and_no_traceback(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name](tmp_path)
    if not isinstance(case.reference, (str, Path)):
        pytest.skip("cannot be named on a command line")
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    code = run(["composition", str(case.reference), "--offline", "--json"])
    out, err = capsys.readouterr()
    assert code == case.error.exit_code, err
    assert out == ""
    assert "to do:" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 10


def test_a_map_says_what_flows_and_what_edges_cause(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "atlas"
    asked = ["map", folder, "-o", out, "--only", "composition,statements", "--repeated", "--tokens", 512, "--edges", 4]
    asked.append("--json")
    ablation = answer(asked, capsys)["summary"]["ablation"]
    assert ablation["edges"] == 4
    atlas = Atlas.open(out)
    kinds = Counter(entry["question"] for entry in atlas.ledger())
    ablated_edges = {row["edge"] for row in chain(*(atlas.get(key).rows() for key in atlas.keys("edge_ablation")))}
    assert kinds["labels"] == 1
    assert kinds["edge_ablation"] == len(ablated_edges) > 4
    assert kinds["ablation"] == 1, "the summary, with verdicts"
    assert (kinds["contribution"], kinds["attribution"]) == (6, 3)
    ablated = atlas.find("ablation")
    assert ablated is not None
    assert "random tokens" in ablated.stamp["text"]
    record = atlas.find("statements")
    assert record is not None
    verdicts = {row["statement"]: row["verdict"] for row in record.rows()}
    assert verdicts["L3"] == "holds under"
    assert record.stamp["run"].endswith("512 tokens")
    assert (kinds["erased"], kinds["persistence"], kinds["frontier"]) == (1, 1, 1)
    ledger = (out / "ledger.sqlite").stat().st_mtime_ns
    assert answer(asked, capsys)["summary"]["ablation"] == ablation
    assert (out / "ledger.sqlite").stat().st_mtime_ns == ledger

    (moments,) = out.glob("moments-*.safetensors")
    other = tmp_path / "other"
    answer(["map", folder, "-o", other, "--only", "bandwidth", "--moments", moments, "--json"], capsys)
    atlas = Atlas.open(other)
    assert Counter(entry["question"] for entry in atlas.ledger()) == {"bandwidth": 1, "contribution": 6}
    given = answer(["edges", other, "--moments", moments, "--reader", "L2H1.K", "--json"], capsys)
    assert given["question"] == "contribution"
    assert given["rows"][0]["contribution"] > 0
    rows = answer(["edges", out, "--question", "contribution", "--reader", "L2H1.K", "--json"], capsys)["rows"]
    assert [e["contribution"] for e in rows] == pytest.approx([e["contribution"] for e in given["rows"]])
    summary = answer(["composition", folder, "--moments", moments, "--top", 1, "--json"], capsys)["summary"]
    assert (summary["by"], set(summary["groups"][0])) == (
        "contribution",
        {"writer", "group", "readers", "contribution"},
    )
    assert run(["composition", str(folder), "--moments", str(moments)]) == 0
    assert re.search(r"^writer +reader +contribution +score", capsys.readouterr().out, re.MULTILINE)
    point = tmp_path / "other.safetensors"
    answer(["observe", folder, "-o", point, "--repeated", "--tokens", 64, "--length", 16, "--json"], capsys)
    assert run(["edges", str(other), "--moments", str(point)]) == 2
    assert "no edges of 'contribution' with moments" in capsys.readouterr().err
    assert run(["map", str(folder), "-o", str(other), "--repeated", "--text", "default"]) == 2
    assert "more than one kind of text" in capsys.readouterr().err
