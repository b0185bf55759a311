"""What runs on text found decides statements, and of another model or question nothing is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import TOKENS, D, blank, frame, plant_neuron
from tiny_models import norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.fate.erased import cleared
from virtual_weights.statements import STATEMENTS, Finding, Statements
from virtual_weights.statements.evidence import Bench

CHECKS = {s.id: s.check for s in STATEMENTS}


def gated(closed: Tensor) -> nn.Module:
    """A neuron that clears what it reads on tokens whose gate is not closed."""
    model, axes = blank(), frame(6)
    s = (1.01 / D) ** 0.5
    slope = float(torch.nn.functional.silu(torch.tensor(10 / s)))
    with torch.no_grad():
        sign = torch.where(closed, -1.0, 1.0).double()
        model.model.embed_tokens.weight.copy_(sign[:, None] * axes[:, 0] + 0.1 * axes[:, 1])
        mlp, norm = model.model.layers[1].mlp, model.model.layers[1].post_attention_layernorm.weight
        mlp.gate_proj.weight[0] = 10 * axes[:, 0] / norm
    plant_neuron(model, 1, 0, axes[:, 1], -axes[:, 1] * s / slope)
    return model


def ran(model: nn.Module, tokens: int = 30) -> Record:
    with norms_in_full_precision():
        return cleared(vw.open(model), [torch.arange(tokens)[None]], model)


def verdict(id: str, model: nn.Module, *runs: Record) -> Finding:
    return CHECKS[id](Bench(vw.open(model), runs={record.question: record for record in runs}))


def lifetime(model: nn.Module, projections: list[list[float]]) -> Record:
    axes = Axis("writer", tuple(f"L0H{i}" for i in range(len(projections)))), Axis("state", ("1", "2", "3", "4"))
    values = torch.tensor(projections, dtype=torch.float64)
    return Record("lifetime", axes, (Column("projection", values),), provenance=vw.open(model).provenance)


def frontier(model: nn.Module, erased: list[float], agreement: list[float]) -> Record:
    """Made up, at prices 0, 1, 2, ...: what counts is who erases how much."""
    prices = torch.arange(len(erased)).double()
    columns = {"lambda": prices, "erased_by_optimal": torch.tensor(erased), "agreement": torch.tensor(agreement)}
    rest = ("optimal", "model", "keep_all", "erase_all", "erased_by_model")
    columns |= {name: prices * 0 + i for i, name in enumerate(rest)}
    labels = tuple(f"{p:g}" for p in prices.tolist())
    told = tuple(Column(name, values) for name, values in columns.items())
    return Record("frontier", (Axis("price", labels),), told, provenance=vw.open(model).provenance)


def test_t7_by_a_run_on_text() -> None:
    half, never = torch.arange(TOKENS) % 2 == 0, torch.zeros(TOKENS, dtype=torch.bool)
    found = {name: verdict("T7", gated(at), ran(gated(at))) for name, at in {"half": half, "all": never}.items()}
    assert {name: each.verdict for name, each in found.items()} == {"half": "holds", "all": "fails"}
    assert found["half"].evidence["conditional"] == found["half"].evidence["conditional_with_two_modes"] == 1
    assert found["all"].evidence["unconditional"] == 1
    assert found["half"].evidence["tokens"] == 30
    assert found["half"].witnesses == ("L1N0: clears on 50% of tokens, coefficient 0.50 ± 0.50",)
    assert verdict("T7", gated(half)).verdict == "cannot tell"
    assert verdict("T7", gated(half), ran(gated(half), 6)).verdict == "cannot tell"
    assert verdict("T7", blank(), ran(blank())).verdict == "cannot tell"


def test_t6_counts_what_clears_while_the_model_runs() -> None:
    model = gated(torch.zeros(TOKENS, dtype=torch.bool))
    bare, found = verdict("T6", model), verdict("T6", model, ran(model))
    assert "unconditional_neurons" not in bare.evidence
    assert (found.evidence["unconditional_neurons"], found.evidence["conditional_neurons"]) == (1, 0)
    assert found.evidence["tokens_run"] == 30
    assert found.witnesses[-1].startswith("L1N0: clears on 100.0% of tokens, coefficient 1.000")
    half = gated(torch.arange(TOKENS) % 2 == 0)
    assert verdict("T6", half, ran(half)).evidence["conditional_neurons"] == 1


def test_t6_follows_what_was_written() -> None:
    nan, model = float("nan"), gated(torch.zeros(TOKENS, dtype=torch.bool))
    kept, erased, late = [1, 1.1, 0.9, 0.8], [nan, 0.2, 0.9, 0.01], [nan, nan, nan, 0.1]
    found = verdict("T6", model, lifetime(model, [kept, erased, late, [0.3, 0.6, 0.7, 0.8]]))
    assert found.evidence["writers_followed"] == 3, "nothing comes after the last state"
    assert found.evidence["share_of_writers_that_fall_below_half"] == pytest.approx(1 / 3)
    assert found.witnesses[-1] == "L0H1: 0.010 of what it wrote is left at 4"
    none = verdict("T6", model, lifetime(model, [late]))
    assert none.evidence["writers_followed"] == 0
    assert none.evidence["share_of_writers_that_fall_below_half"] is None


def test_l12_by_measured_utility_and_interference() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    found = verdict("L12", model, frontier(model, [0.2, 0.5, 0.8], [0.4, 0.9, 0.3]))
    assert found.verdict == "fails"
    assert "where_the_model_stands" not in found.evidence
    assert found.evidence["where_the_model_stands_price"] == 1
    assert found.evidence["where_the_model_stands_agreement"] == pytest.approx(0.9)
    assert found.evidence["measured_erased_by_optimal_at_price_2"] == pytest.approx(0.8)
    assert found.evidence["writers"] == verdict("L12", model).evidence["writers"], "what weights say stays"
    assert verdict("L12", model, frontier(model, [0.2, 0.2, 0.2], [0.4, 0.9, 0.3])).verdict == "holds"
    assert verdict("L12", model, frontier(model, [0.2], [0.4])).verdict == "cannot tell"
    assert verdict("L12", model).evidence["where_the_model_stands"] == "needs a run on text"


def test_a_run_is_of_this_model_and_is_told() -> None:
    model = gated(torch.arange(TOKENS) % 2 == 0)
    stream, record, question = vw.open(model), ran(model), Statements(("T7",))
    told = question(stream, runs={"cleared": record})
    assert told.stamp["run"] == "cleared on 30 tokens of text"
    assert question(stream).parameters == question.parameters
    again, other = question(stream, runs={"cleared": ran(model)}), question(stream, runs={"cleared": ran(model, 29)})
    assert told.parameters == again.parameters != other.parameters
    stranger = replace(record, provenance={"fingerprint": "another"})
    for wrong in ({"cleared": stranger}, {"lifetime": record}):
        with pytest.raises(vw.VirtualWeightsError, match="this checkpoint"):
            question(stream, runs=wrong)


def test_the_command_runs_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-grouped-untied").save_pretrained(tmp_path)

    def answer(*options: str) -> dict[str, Any]:
        assert run(["statements", str(tmp_path), "--only", "T6,T7", *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = answer("--repeated", "--tokens", "32")
    for name in ("cleared", "lifetime", "frontier"):
        assert f"{name} on 32 tokens of text" in found["run"]
    assert found["text"].startswith("random tokens")
    evidence = found["statements"][0]["evidence"]
    assert evidence["tokens_run"] == 32
    assert evidence["writers_followed"] > 20
    linear, policy = answer("--repeated", "--tokens", "32", "--only", "L3,L12")["statements"]
    assert linear["verdict"] == "holds under"
    assert policy["evidence"]["where_the_model_stands_agreement"] is not None
    assert answer()["run"] == "weights alone"
    assert run(["statements", str(tmp_path), "--repeated", "--text", "a.txt"]) == 2
