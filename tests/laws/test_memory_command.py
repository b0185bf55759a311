"""``vweights memory``: one JSON object that says what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_models import tiny
from typer.testing import CliRunner

import virtual_weights as vw
from virtual_weights.analysis.memory.clearing import Clearing
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons, census
from virtual_weights.cli.memory import memory

app = typer.Typer()
app.command()(memory)


def answer(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def test_json_is_the_records(folder: Path) -> None:
    given = answer(folder, "--top", 4, "--threshold", 0.3, "--norm-scalar", 2, "--component", "L1H2", "--json")
    stream = vw.open(folder)
    assert (given["model"], given["question"], given["stamp"]["norm"]) == (
        str(folder),
        "neurons",
        "gain folded, unembedding centred",
    )
    assert {**given["summary"], "by_layer": given["rows"]} == census(Neurons(0.3)(stream))
    of_heads, of_pairs, of_component = given["more"]
    heads = HeadErasers(2.0)(stream)
    assert [row["head"] for row in of_heads["rows"]] == list(heads.top(4, "negative_share")["head"])
    assert [row["head"] for row in of_heads["summary"]["copiers"]] == list(heads.top(4, "token_copying")["head"])
    assert of_heads["rows"][0]["kept"] == heads.top(1, "negative_share")["kept"][0]
    assert of_heads["stamp"]["null"] == heads.stamp["null"]
    pairs = Erasure(2.0)(stream).top(4, "erasure")
    assert [(row["writer"], row["eraser"]) for row in of_pairs["rows"]] == list(
        zip(pairs["writer"], pairs["reader"], strict=True)
    )
    assert [row["erasure"] for row in of_pairs["rows"]] == pairs["erasure"].tolist()
    spectrum = Clearing("L1H2", 2.0)(stream)
    assert [row["kept"] for row in of_component["rows"]] == spectrum["kept"].tolist()[:4]


def test_pairs_can_be_ordered_by_what_is_free_of_the_norm_scalar(folder: Path) -> None:
    orders = [
        answer(folder, "--by", by, "--json", "--norm-scalar", s)["more"][1]["rows"]
        for by in ("z", "erasure")
        for s in (1, 3)
    ]
    assert [row["z"] for row in orders[0]] == sorted((row["z"] for row in orders[0]), reverse=True)
    assert [row["writer"] for row in orders[0]] == [row["writer"] for row in orders[1]]
    assert orders[2][0]["erasure"] == pytest.approx(3 * orders[3][0]["erasure"])
    with pytest.raises(vw.VirtualWeightsError, match="--by size"):
        answer(folder, "--by", "size")


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel-partial-rotary"])
def test_people_see_tables(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, [str(tmp_path), "--component", "L0.mlp", "--top", "3"], catch_exceptions=False)
    assert done.exit_code == 0
    for word in ("weakening", "strengthening", "erase", "copy", "L0.mlp: eigenvalues", "norm scalar 1.0"):
        assert word in done.stdout
    assert "Column" not in done.stdout


def test_a_model_without_neurons_or_without_heads_answers_for_what_is_there(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny("llama-grouped-untied")
    for gone, questions in (("mlp", ["head_erasers", "erasure"]), ("self_attn", ["neurons"])):
        where = tmp_path / gone
        model.config.save_pretrained(where)
        held = {name: tensor.clone() for name, tensor in model.state_dict().items() if gone not in name}
        save_file(held, where / "model.safetensors")
        given = answer(where, "--partial", "--json")
        answers = [given, *given.get("more", [])]
        assert [part["question"] for part in answers] == questions
        assert all(part["rows"] for part in answers)


@pytest.mark.real
def test_the_real_model_has_the_classes_that_were_counted_independently() -> None:
    given = answer("smollm2-135m", "--json", "--top", 5)
    neurons, (heads, erasure) = given["summary"], given["more"]
    assert (neurons["count"], neurons["weakening"], neurons["strengthening"]) == (46080, 2207, 3871)
    assert neurons["null"]["weakening"] < 1e-20
    assert torch.tensor([row["weakening"] for row in given["rows"]]).argmax() == 18
    assert heads["rows"][0]["negative_share"] > 0.99
    assert heads["summary"]["copiers"][0]["token_copying"] > 0.99
    assert {row["eraser"] for row in erasure["rows"]} == {"L29H0"}
