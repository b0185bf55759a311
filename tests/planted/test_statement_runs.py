"""What a run shows decides statements that the weights leave open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import TOKENS, D, blank, frame, plant_neuron
from tiny_models import norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.cli import run as command
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.flow.observation import operating_point
from virtual_weights.runtime.running.activations import Activations, prompted
from virtual_weights.runtime.running.run import Run
from virtual_weights.statements import STATEMENTS, Finding, Statements
from virtual_weights.statements.evidence import Evidence
from virtual_weights.stream import Question
from virtual_weights.stream.question import asking
from virtual_weights.stream.turned import random_turn

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


def run_of(model: nn.Module, tokens: int = 30) -> Run:
    return Run.on_tokens(vw.open(model), torch.arange(tokens)[None], model=model)


def verdict(id: str, model: nn.Module, run: Run | None = None, *records: Record) -> Finding:
    """By the weights, or by a run; records that are passed stand for what it would answer to their questions."""
    stream = vw.open(model) if run is None else run.stream
    measured = asking(stream) if run is None else asking(run, stream)
    assumed = {record.question: record for record in records}

    def answer(questions: Sequence[Question[Any]]) -> list[Record]:
        return [assumed[q.question] if q.question in assumed else measured([q])[0] for q in questions]

    with norms_in_full_precision():
        return CHECKS[id](Evidence(stream, answer, run))


def persistence(projections: list[list[float]]) -> Record:
    axes = Axis("writer", tuple(f"L0H{i}" for i in range(len(projections)))), Axis("state", ("1", "2", "3", "4"))
    return Record("persistence", axes, (Column("projection", torch.tensor(projections, dtype=torch.float64)),))


def frontier(erased: list[float], agreement: list[float]) -> Record:
    """Made up, at prices 0, 1, 2, ...: what counts is how much is erased."""
    prices = torch.arange(len(erased)).double()
    columns = {"lambda": prices, "erased_by_optimal": torch.tensor(erased), "agreement": torch.tensor(agreement)}
    rest = ("optimal", "model", "keep_all", "erase_all", "erased_by_model")
    columns |= {name: prices * 0 + i for i, name in enumerate(rest)}
    axis = Axis("price", tuple(f"{p:g}" for p in prices.tolist()))
    return Record("frontier", (axis,), tuple(Column(name, values) for name, values in columns.items()))


def test_t7_by_a_run_on_text() -> None:
    half, never = torch.arange(TOKENS) % 2 == 0, torch.zeros(TOKENS, dtype=torch.bool)
    models = {"half": gated(half), "all": gated(never)}
    findings = {name: verdict("T7", model, run_of(model)) for name, model in models.items()}
    assert {name: finding.verdict for name, finding in findings.items()} == {"half": "holds", "all": "fails"}
    figures = findings["half"].figures
    assert figures["conditional"] == figures["conditional_with_two_modes"] == 1
    assert findings["all"].figures["unconditional"] == 1
    assert figures["tokens"] == 30
    assert findings["half"].witnesses == ("L1N0: erases on 50% of tokens, coefficient 0.50 ± 0.50",)
    assert verdict("T7", models["half"]).verdict == "cannot tell"
    assert verdict("T7", models["half"], run_of(models["half"], 6)).verdict == "cannot tell"
    assert verdict("T7", blank(), run_of(blank())).verdict == "cannot tell"


def test_t6_counts_what_clears_while_the_model_runs() -> None:
    model = gated(torch.zeros(TOKENS, dtype=torch.bool))
    bare, finding = verdict("T6", model), verdict("T6", model, run_of(model), persistence([[1, 1, 1, 1]]))
    assert "unconditional_neurons" not in bare.figures
    assert (finding.figures["unconditional_neurons"], finding.figures["conditional_neurons"]) == (1, 0)
    assert finding.figures["tokens_run"] == 30
    assert finding.witnesses[-2].startswith("L1N0: erases on 100.0% of tokens, coefficient 1.000")
    half = gated(torch.arange(TOKENS) % 2 == 0)
    assert verdict("T6", half, run_of(half)).figures["conditional_neurons"] == 1


def test_t6_follows_what_was_written() -> None:
    nan, model = float("nan"), gated(torch.zeros(TOKENS, dtype=torch.bool))
    kept, erased, late = [1, 1.1, 0.9, 0.8], [nan, 0.2, 0.9, 0.01], [nan, nan, nan, 0.1]
    finding = verdict("T6", model, run_of(model), persistence([kept, erased, late, [0.3, 0.6, 0.7, 0.8]]))
    assert finding.figures["writers_followed"] == 3, "nothing comes after the last state"
    assert finding.figures["share_of_writers_that_fall_below_half"] == pytest.approx(1 / 3)
    assert finding.witnesses[-1] == "L0H1: 0.010 of what it wrote is left at state 4"
    none = verdict("T6", model, run_of(model), persistence([late]))
    assert none.figures["writers_followed"] == 0
    assert none.figures["share_of_writers_that_fall_below_half"] is None


def test_l12_by_measured_utility_and_interference() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    run = run_of(model)
    finding = verdict("L12", model, run, frontier([0.2, 0.5, 0.8], [0.4, 0.9, 0.3]))
    assert finding.verdict == "fails"
    assert "where_the_model_stands" not in finding.figures
    assert finding.figures["where_the_model_stands_price"] == 1
    assert finding.figures["where_the_model_stands_agreement"] == pytest.approx(0.9)
    assert finding.figures["measured_erased_by_optimal_at_price_2"] == pytest.approx(0.8)
    assert finding.figures["writers"] == verdict("L12", model).figures["writers"], "what weights say stays"
    assert verdict("L12", model, run, frontier([0.2, 0.2, 0.2], [0.4, 0.9, 0.3])).verdict == "holds"
    assert verdict("L12", model, run, frontier([0.2], [0.4])).verdict == "cannot tell"
    assert verdict("L12", model).figures["where_the_model_stands"] == "needs a run on text"


def test_l12_goes_by_the_weights_where_a_run_predicts_nothing() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    single = Run.on_tokens(vw.open(model), torch.arange(9)[:, None], model=model)
    assert verdict("L12", model, single) == verdict("L12", model)
    assert verdict("L12", model, run_of(model)).figures["where_the_model_stands_agreement"] is not None


def test_l3_takes_its_point_from_the_run_where_none_is_passed() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    run = Run.on_tokens(vw.open(model), torch.arange(40)[None] % TOKENS, model=model)
    with norms_in_full_precision():
        point = operating_point(run.prompt(7))
        findings = {tokens: Statements(("L3",), point=p)(run) for tokens, p in ((32, None), (7, point))}
    for tokens, record in findings.items():
        (row,) = record.rows()
        assert row["verdict"] == "holds under"
        assert json.loads(str(row["evidence"]))["tokens"] == tokens


def test_l1_goes_by_the_logits_of_a_run() -> None:
    """Rotated the model is the same; with the gains left in the norm, or another map than a rotation, it is not."""
    for name in ("llama-grouped-untied", "gpt2"):
        model = tiny(name, dtype=torch.float64)
        finding = verdict("L1", model, run_of(model))
        assert finding.verdict == "holds under", finding.why
        assert finding.figures["logits_rotated"] < 1e-4 < 1e-2 < finding.figures["logits_not_orthogonal"]
        assert finding.figures["logits_rotated_with_the_gains_in_the_norm"] > 1e-2
        assert finding.figures["kl_rotated"] < 1e-6 < finding.figures["kl_not_orthogonal"]
    flat: Any = tiny("llama-grouped-untied", dtype=torch.float64)
    with torch.no_grad():
        for weight in flat.parameters():
            if weight.ndim == 1:
                weight.fill_(1)
    assert verdict("L1", flat, run_of(flat)).verdict == "holds"
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    assert "logits" in verdict("L1", flat, run_of(flat)).figures, "without logits the weights decide"


def test_l1_fails_where_a_rotated_model_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)

    def wrong(stream: vw.Stream, seed: int) -> Tensor:
        return 1.2 * random_turn(stream, seed) + 0.1

    monkeypatch.setattr("virtual_weights.statements.basis.random_turn", wrong)
    assert verdict("L1", model, run_of(model)).verdict == "fails"


def test_l3_compares_states_and_not_their_lengths() -> None:
    """A model that runs on states turned by half a turn has the same norm scalars, and other states."""
    model = tiny("llama-full", dtype=torch.float64)
    run = run_of(model)
    with norms_in_full_precision():
        finding = verdict("L3", model, run)
        assert (finding.verdict, finding.figures["compared"]) == ("holds under", "states")

        def turned(prompt: Run) -> Activations:
            whole = prompted(prompt)
            return replace(whole, signals={k: -v if k[0] == "state" else v for k, v in whole.signals.items()})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("virtual_weights.statements.running.prompted", turned)
            assert verdict("L3", model, run).verdict == "fails"


def test_the_record_says_what_was_run() -> None:
    model = gated(torch.arange(TOKENS) % 2 == 0)
    run, question = run_of(model), Statements(("T7",))
    record, bare = question(run), question(run.stream)
    assert record.stamp["run"] == "token ids, 30 tokens"
    assert (record.stamp["text"], record.stamp["tokens"]) == ("token ids", 30)
    assert bare.stamp["run"] == "weights alone"
    assert record.parameters == bare.parameters == question.parameters
    assert run.identity == run_of(model).identity != run_of(model, 29).identity
    point = operating_point(run.prompt(8))
    passed = Statements(("T7",), point=point)
    assert passed(run.stream).stamp["run"] == "a prompt of 8 tokens"
    assert passed.parameters == {**question.parameters, "point": point.identity}


def test_the_command_runs_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-grouped-untied").save_pretrained(tmp_path)

    def answer(*options: str) -> dict[str, Any]:
        assert command(["statements", str(tmp_path), "--only", "T6,T7", *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    given = answer("--repeated", "--tokens", "32", "--length", "32")
    assert given["stamp"]["run"].startswith("repeated random tokens")
    assert given["stamp"]["run"].endswith("32 tokens")
    evidence = given["rows"][0]["evidence"]
    assert evidence["tokens_run"] == 32
    assert evidence["writers_followed"] > 20
    linear, policy = answer("--repeated", "--tokens", "32", "--length", "32", "--only", "L3,L12")["rows"]
    assert linear["verdict"] == "holds under"
    assert policy["evidence"]["where_the_model_stands_agreement"] is not None
    assert answer()["stamp"]["run"] == "weights alone"
    assert command(["statements", str(tmp_path), "--repeated", "--text", "a.txt"]) == 2
