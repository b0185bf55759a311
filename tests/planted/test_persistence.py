"""Persistence equals the definition token by token, and a planted eraser is named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import TOKENS, echo
from regauge import rotated
from tiny_models import norms_in_full_precision, tiny
from torch import Tensor, nn
from uniform import sizes

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.record import Record
from virtual_weights.runtime.fate.persistence import ErasedBy, Persistence, PersistenceSummary
from virtual_weights.runtime.running.activations import prompted
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import PADDING
from virtual_weights.stream.question import asking

ROWS = (torch.tensor([3, 17, 5, 5, 30, 1, 22, 8, 9]), torch.tensor([4, 28, 11, 0, 12]), torch.tensor([36, 2, 2]))
FAMILIES = ("llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary")


def answers(
    model: nn.Module, tokens: Tensor | Iterable[Tensor] = ROWS, batch: int = 4, *, centred: bool = False
) -> tuple[Record, Record, Record]:
    """Projection, shares and summary of one run."""
    run = Run.on_tokens(vw.open(model).to(torch.float64), tokens, model=model, batch=batch)
    questions = [Persistence(centred), ErasedBy(centred), PersistenceSummary(centred)]
    with norms_in_full_precision():
        projection, erased_by, summary = dict(Persistence.together(questions, run)).values()
    return projection, erased_by, summary


@pytest.mark.parametrize("name", FAMILIES)
def test_projections_and_shares_are_those_of_every_token(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    along, products, energy = dict[tuple[str, int], float](), dict[tuple[str, str], float](), dict[str, float]()
    first = {str(c.label): c.writes for c in stream.components if c.writes is not None}
    for tokens in ROWS:
        with norms_in_full_precision():
            whole = prompted(Run.on_prompt(stream, tokens, model=model))
        seen = (lambda y: y - y.mean(1, keepdim=True)) if sizes(stream).norm == "layer" else (lambda y: y)
        written = {name: seen(y) for name, y in whole.written(stream.states - 1)}
        largest = torch.stack([whole.scalar(p) for p in range(stream.states)]).amax(0)
        for t in range(len(tokens)):
            w = float(largest[t]) ** -2
            for one, y in written.items():
                energy[one] = energy.get(one, 0.0) + w * float(y[t] @ y[t])
                for p in range(stream.states):
                    along[one, p] = along.get((one, p), 0.0) + w * float(seen(whole.state(p))[t] @ y[t])
                for other, z in written.items():
                    products[one, other] = products.get((one, other), 0.0) + w * float(z[t] @ y[t])
    projection, erased_by, _ = answers(model)
    assert projection.stamp["tokens"] == 17
    assert projection.stamp["error"] < 1e-12
    names = projection.axis("writer").labels
    assert set(names) == set(first)
    for i, one in enumerate(names):
        for p in range(stream.states):
            value = float(projection["projection"][i, p])
            assert (p < first[one]) == (value != value)
            if p >= first[one]:
                assert value == pytest.approx(along[one, p] / energy[one], rel=1e-9, abs=1e-9)
        for j, other in enumerate(names):
            value = float(erased_by["share"][i, j])
            assert (first[other] <= first[one]) == (value != value)
            if first[other] > first[one]:
                assert value == pytest.approx(products[one, other] / energy[one], rel=1e-9, abs=1e-9)


def test_centred_leaves_out_what_every_token_gets() -> None:
    model = tiny("llama-biases-wide-heads", dtype=torch.float64)
    stream, (_, erased_by, summary) = vw.open(model).to(torch.float64), answers(model, centred=True)
    wrote, weights = dict[str, list[Tensor]](), list[Tensor]()
    for tokens in ROWS:
        with norms_in_full_precision():
            whole = prompted(Run.on_prompt(stream, tokens, model=model))
        weights.append(torch.stack([whole.scalar(p) for p in range(stream.states)]).amax(0) ** -2)
        for name, y in whole.written(stream.states - 1):
            wrote.setdefault(name, []).append(y)
    w = torch.cat(weights)[:, None]
    y = {name: torch.cat(parts) for name, parts in wrote.items()}
    varied = {name: values - (w * values).sum(0) / w.sum() for name, values in y.items()}
    for one, other in (("embed", "L1.mlp"), ("L0H1", "L2H3"), ("L1.mlp", "L2.mlp")):
        expected = (w * varied[one] * varied[other]).sum() / (w * varied[one].square()).sum()
        i, j = (erased_by.axis(axis).index(name) for axis, name in (("writer", one), ("eraser", other)))
        assert float(erased_by["share"][i, j]) == pytest.approx(float(expected), rel=1e-9)
    biases = [row["writer"] for row in summary.rows() if "bias" in str(row["writer"])]
    assert biases == [], "a constant differs nowhere"
    assert any("bias" in str(row["writer"]) for row in answers(model)[2].rows())


def test_shares_sum_to_the_change_of_every_state() -> None:
    model = tiny("neox-parallel-partial-rotary", dtype=torch.float64)
    (persistence, erased_by, _), stream = answers(model), vw.open(model)
    first = torch.tensor([c.writes for c in stream.components if c.writes is not None])
    projection, share = persistence["projection"], erased_by["share"]
    for p in range(1, stream.states):
        earlier = first < p
        change = share[earlier][:, first == p].sum(1)
        torch.testing.assert_close(projection[earlier, p] - projection[earlier, p - 1], change, rtol=1e-9, atol=1e-9)


def test_neither_the_split_into_batches_nor_the_basis_matters() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    whole = answers(model)
    for other in (answers(model, batch=1), answers(rotated(model, 2))):
        for i, column in enumerate(("projection", "share")):
            torch.testing.assert_close(other[i][column], whole[i][column], rtol=1e-9, atol=1e-9, equal_nan=True)


def test_a_planted_eraser_is_named() -> None:
    _, _, summary = answers(echo(-1.0), torch.arange(TOKENS)[:30, None])
    row = next(r for r in summary.rows() if r["writer"] == "embed")
    assert (row["start"], row["final"]) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert (row["eraser"], row["taken"], row["half_state"]) == ("L1H2", pytest.approx(-1), 3)
    assert [r["writer"] for r in summary.rows()] == ["embed", "L1H2"], "who writes nothing is absent"
    turned = next(iter(answers(echo(1.0), torch.arange(TOKENS)[:30, None])[2].rows()))
    assert (turned["final"], turned["eraser"], turned["taken"]) == (pytest.approx(2), None, None)
    assert turned["half_state"] is None


def test_three_questions_centred_or_not_are_one_pass() -> None:
    model, calls = tiny("gpt2"), list[int]()
    run = Run.on_tokens(vw.open(model), ROWS, model=model)
    assert run.module is model  # it has been checked, which is a pass too
    model.base_model.register_forward_hook(lambda _module, _given, _output: calls.append(1))
    questions = [Persistence(), ErasedBy(), PersistenceSummary(), ErasedBy(centred=True)]
    records = asking(run)(questions)
    assert len(calls) == 1
    for question, record in zip(questions, records, strict=True):
        assert (record.question, record.parameters) == (question.question, {"centred": question.centred})
        for column in question(run).columns:
            assert_same(record[column.name], column.values)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, equal_nan=True)
    else:
        assert a == b


def test_what_cannot_be_is_refused() -> None:
    stream = vw.open(tiny("llama-full"))
    with pytest.raises(vw.VirtualWeightsError, match="no tokens"):
        Run.on_tokens(stream, [])
    with pytest.raises(vw.VirtualWeightsError, match="padding before a token"):
        Run.on_tokens(stream, torch.tensor([[PADDING, 3]]))


def test_the_command_says_what_the_records_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-grouped-untied").save_pretrained(tmp_path)
    options = ("--repeated", "--tokens", "64", "--length", "16", "--json")
    assert run(["persistence", str(tmp_path), "--top", "5", *options]) == 0
    given: dict[str, Any] = json.loads(capsys.readouterr().out)
    left = [abs(row["final"]) for row in given["rows"]]
    assert left == sorted(left)
    assert len(left) == 5
    (erased_by,) = given["more"]
    assert {row["writer"] for row in erased_by["rows"]} <= {row["writer"] for row in given["rows"]}
    assert given["stamp"]["tokens"] == 64
    name = given["rows"][0]["writer"]
    assert run(["persistence", str(tmp_path), "--writer", name, *options]) == 0
    one: dict[str, Any] = json.loads(capsys.readouterr().out)
    (row,), (projection, erased_by) = one["rows"], one["more"]
    assert abs(row["final"]) == abs(projection["rows"][-1]["projection"]) == pytest.approx(left[0])
    assert all(share["writer"] == name for share in erased_by["rows"])
    assert run(["persistence", str(tmp_path), "--writer", "1.0", *options]) == 0
    assert [row["writer"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["L1H0"]
    assert run(["persistence", str(tmp_path), "--writer", "L9H9", *options]) == 2
    assert run(["persistence", str(tmp_path), "--repeated", "--text", "default"]) == 2
