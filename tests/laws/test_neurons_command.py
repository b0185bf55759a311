"""``vweights neurons``: one JSON object that says what the records say, and only what can be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_models import tiny
from typer.testing import CliRunner

import virtual_weights as vw
from virtual_weights.analysis.pairs.neuron_heads import HeadNeuron, NeuronHead
from virtual_weights.analysis.pairs.neuron_neuron import NeuronNeuron
from virtual_weights.cli.neurons import neurons

app = typer.Typer()
app.command()(neurons)


def answer(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def ends(found: dict[str, Any]) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    return [(t["from"], t["to"], t["port"], [(e["writer"], e["reader"]) for e in t["edges"]]) for t in found["tables"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def test_the_whole_model(folder: Path) -> None:
    found, stream = answer(folder, "--top", 4), vw.open(folder)
    pairs, heads = NeuronNeuron("up")(stream).top(4, "magnitude"), HeadNeuron("up")(stream).top(4)
    assert ends(found) == [
        ("neuron", "neuron", "up", list(zip(pairs["writer"], pairs["reader"], strict=True))),
        ("head", "neuron", "up", list(zip(heads["head"], heads["neuron"], strict=True))),
    ]
    assert [e["score"] for e in found["tables"][0]["edges"]] == pairs["score"].tolist()
    assert min(e["score"] for e in found["tables"][0]["edges"]) < 0 < max(pairs["score"]), "signed, by magnitude"
    assert found["tables"][0]["pairs"] == 3 * 40 * 40
    assert (found["model"], found["norm"], found["provenance"]) == (str(folder), "gain folded", stream.provenance)


def test_one_reader_or_one_writer(folder: Path) -> None:
    stream = vw.open(folder)
    found = answer(folder, "--reader", "L2N5.gate", "--top", 3)
    assert [t[:3] for t in ends(found)] == [("neuron", "neuron", "gate"), ("head", "neuron", "gate")]
    assert {reader for t in ends(found) for _, reader in t[3]} == {"L2N5"}
    best = NeuronNeuron("gate", 3, writer="L0N9").all(stream).writers
    (only,) = ends(answer(folder, "--writer", "L0N9.out", "--port", "gate", "--top", 3))
    assert only[3] == [("L0N9", reader) for reader in best["reader"]]
    (only,) = ends(answer(folder, "--writer", "0.3", "--top", 3))
    assert only == (
        "head",
        "neuron",
        "up",
        [("L0H3", n) for n in HeadNeuron("up", writer="L0H3")(stream).top(3)["neuron"]],
    )
    tables = answer(folder, "--reader", "L2H4", "--top", 2)["tables"]
    assert [t["port"] for t in tables] == ["Q", "K", "V"]
    best_k = NeuronHead("K", "L2H4")(stream).top(2)
    assert [(e["writer"], e["score"]) for e in tables[1]["edges"]] == list(
        zip(best_k["neuron"], best_k["score"].tolist(), strict=True)
    )
    assert ["channel" in t["edges"][0] for t in tables] == [False, True, True]
    (one,) = answer(folder, "--reader", "L2N5", "--writer", "L1N6")["tables"]
    assert [(e["writer"], e["reader"]) for e in one["edges"]] == [("L1N6", "L2N5")]


def test_tables_for_people(folder: Path) -> None:
    done = CliRunner().invoke(app, [str(folder), "--top", "2"], catch_exceptions=False)
    assert "2 strongest edges from neuron to neuron by up" in done.stdout
    assert "4,800 pairs, mean square cosine" in done.stdout
    first = NeuronNeuron("up")(vw.open(folder)).top(1, "magnitude")
    assert first["reader"][0] in done.stdout
    early = CliRunner().invoke(app, [str(folder), "--reader", "L0N0", "--writer", "L2N0"], catch_exceptions=False)
    assert "0 strongest edges" in early.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reader", "L2N5.gate", "--port", "up"), "one port"),
        (("--reader", "L2H1", "--writer", "L1H1"), "vweights composition"),
        (("--reader", "L2N5", "--port", "K"), "no edges of single neurons"),
        (("--port", "unembed"), "no edges of single neurons"),
        (("--port", "in"), "no port 'in'"),
        (("--writer", "L1.mlp"), "no such end"),
        (("--writer", "L1N3.up"), "no such end"),
        (("--reader", "L9N3"), "no neuron 'L9N3'"),
        (("--writer", "L0H9"), "no head 'L0H9'"),
        (("--reader", "who"), "names no component"),
    ],
)
def test_what_cannot_be_asked(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(vw.VirtualWeightsError, match=message):
        CliRunner().invoke(app, [str(folder), *arguments], catch_exceptions=False)


def test_an_ungated_model_reads_in(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    assert [t[:3] for t in ends(answer(tmp_path, "--top", 1))] == [("neuron", "neuron", "in"), ("head", "neuron", "in")]
