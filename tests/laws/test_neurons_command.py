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
from virtual_weights.analysis.pairs.neuron_neuron import NeuronNeuron, NeuronReaders
from virtual_weights.cli.neurons import neurons

app = typer.Typer()
app.command()(neurons)


def answer(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def tables(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [given, *given.get("more", [])]


def ends(given: dict[str, Any]) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    of = ((table["summary"], table["rows"]) for table in tables(given))
    return [(s["from"], s["to"], s["port"], [(e["writer"], e["reader"]) for e in rows]) for s, rows in of]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def test_the_whole_model(folder: Path) -> None:
    given, stream = answer(folder, "--top", 4), vw.open(folder)
    pairs, heads = NeuronNeuron("up")(stream).top(4, "magnitude"), HeadNeuron("up")(stream).top(4)
    assert ends(given) == [
        ("neuron", "neuron", "up", list(zip(pairs["writer"], pairs["reader"], strict=True))),
        ("head", "neuron", "up", list(zip(heads["head"], heads["neuron"], strict=True))),
    ]
    assert [e["score"] for e in given["rows"]] == pairs["score"].tolist()
    assert min(e["score"] for e in given["rows"]) < 0 < max(pairs["score"]), "signed, by magnitude"
    assert given["summary"]["pairs"] == 3 * 40 * 40
    assert (given["model"], given["stamp"]["norm"]) == (str(folder), "gain folded, unembedding centred")
    assert given["provenance"] == stream.provenance


def test_one_reader_or_one_writer(folder: Path) -> None:
    stream = vw.open(folder)
    given = answer(folder, "--reader", "L2N5.gate", "--top", 3)
    assert [t[:3] for t in ends(given)] == [("neuron", "neuron", "gate"), ("head", "neuron", "gate")]
    assert {reader for t in ends(given) for _, reader in t[3]} == {"L2N5.gate"}
    best = NeuronReaders("gate", 3, writer="L0N9")(stream)
    (only,) = ends(answer(folder, "--writer", "L0N9.out", "--port", "gate", "--top", 3))
    assert only[3] == [("L0N9", reader) for reader in best["reader"]]
    (only,) = ends(answer(folder, "--writer", "0.3", "--top", 3))
    assert only == (
        "head",
        "neuron",
        "up",
        [("L0H3", neuron) for neuron in HeadNeuron("up", writer="L0H3")(stream).top(3)["neuron"]],
    )
    by_port = tables(answer(folder, "--reader", "L2H4", "--top", 2))
    assert [table["summary"]["port"] for table in by_port] == ["Q", "K", "V"]
    best_k = NeuronHead("K", "L2H4")(stream).top(2)
    assert [(e["writer"], e["score"]) for e in by_port[1]["rows"]] == list(
        zip(best_k["neuron"], best_k["score"].tolist(), strict=True)
    )
    assert ["group" in table["rows"][0] for table in by_port] == [False, True, True]
    assert by_port[1]["rows"][0]["shared_with"] == ["L2H3", "L2H5"]
    (one,) = tables(answer(folder, "--reader", "L2N5", "--writer", "L1N6"))
    assert [(e["writer"], e["reader"]) for e in one["rows"]] == [("L1N6", "L2N5.up")]


def test_tables_for_people(folder: Path) -> None:
    done = CliRunner().invoke(app, [str(folder), "--top", "2"], catch_exceptions=False)
    assert "the 2 strongest edges from neurons to neurons, port up" in done.stdout
    assert "4,800 pairs; of so many at random orientation the largest |z| is near 4.1" in done.stdout
    assert "mean square cosine" in done.stdout
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
        (("--writer", "L1.mlp"), "cannot be that end"),
        (("--writer", "L1N3.up"), "cannot be that end"),
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
