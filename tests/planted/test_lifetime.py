"""What is left of what a part wrote is what each token says, and a planted eraser is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import TOKENS, echo
from regauge import rotated
from tiny_models import norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.runtime.fate.persistence import Lifetime, lifetime
from virtual_weights.runtime.flow.trace import passage
from virtual_weights.runtime.running.text import PADDING

ROWS = (torch.tensor([3, 17, 5, 5, 30, 1, 22, 8, 9]), torch.tensor([4, 28, 11, 0, 12]), torch.tensor([36, 2, 2]))
FAMILIES = ("llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary")


def batch(*rows: Tensor) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PADDING)


def found(model: nn.Module, *batches: Tensor, centred: bool = False) -> Lifetime:
    with norms_in_full_precision():
        return lifetime(vw.open(model).to(torch.float64), batches, model, centred=centred)


@pytest.mark.parametrize("name", FAMILIES)
def test_projections_and_shares_are_those_of_every_token(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    along, taken, energy = dict[tuple[str, int], float](), dict[tuple[str, str], float](), dict[str, float]()
    first = {str(c.label): c.writes for c in stream.components if c.writes is not None}
    for tokens in ROWS:
        with norms_in_full_precision():
            whole = passage(stream, tokens, model)
        written = dict(whole.written(stream.states - 1))
        largest = torch.stack([whole.scalar(p) for p in range(stream.states)]).amax(0)
        for t in range(len(tokens)):
            w = float(largest[t]) ** -2
            for one, y in written.items():
                energy[one] = energy.get(one, 0.0) + w * float(y[t] @ y[t])
                for p in range(stream.states):
                    along[one, p] = along.get((one, p), 0.0) + w * float(whole.state(p)[t] @ y[t])
                for other, z in written.items():
                    taken[one, other] = taken.get((one, other), 0.0) + w * float(z[t] @ y[t])
    record = found(model, batch(*ROWS))
    assert record.projection.stamp["tokens"] == 17
    assert record.projection.stamp["error"] < 1e-12
    names = record.projection.axis("writer").labels
    assert set(names) == set(first)
    for i, one in enumerate(names):
        for p in range(stream.states):
            value = float(record.projection["projection"][i, p])
            assert (p < first[one]) == (value != value)
            if p >= first[one]:
                assert value == pytest.approx(along[one, p] / energy[one], rel=1e-9, abs=1e-9)
        for j, other in enumerate(names):
            value = float(record.erased_by["share"][i, j])
            assert (first[other] <= first[one]) == (value != value)
            if first[other] > first[one]:
                assert value == pytest.approx(taken[one, other] / energy[one], rel=1e-9, abs=1e-9)


def test_centred_leaves_out_what_every_token_gets() -> None:
    model = tiny("llama-biases-wide-heads", dtype=torch.float64)
    stream, record = vw.open(model).to(torch.float64), found(model, batch(*ROWS), centred=True)
    wrote, weights = dict[str, list[Tensor]](), list[Tensor]()
    for tokens in ROWS:
        with norms_in_full_precision():
            whole = passage(stream, tokens, model)
        weights.append(torch.stack([whole.scalar(p) for p in range(stream.states)]).amax(0) ** -2)
        for name, y in whole.written(stream.states - 1):
            wrote.setdefault(name, []).append(y)
    w = torch.cat(weights)[:, None]
    y = {name: torch.cat(parts) for name, parts in wrote.items()}
    varied = {name: each - (w * each).sum(0) / w.sum() for name, each in y.items()}
    for one, other in (("embed", "L1.mlp"), ("L0H1", "L2H3"), ("L1.mlp", "L2.mlp")):
        expected = (w * varied[one] * varied[other]).sum() / (w * varied[one].square()).sum()
        i, j = (record.erased_by.axis(axis).index(name) for axis, name in (("writer", one), ("eraser", other)))
        assert float(record.erased_by["share"][i, j]) == pytest.approx(float(expected), rel=1e-9)
    biases = [row["writer"] for row in record.summary.rows() if "bias" in str(row["writer"])]
    assert biases == [], "a constant differs nowhere"
    assert any("bias" in str(row["writer"]) for row in found(model, batch(*ROWS)).summary.rows())


def test_shares_sum_to_the_change_of_every_state() -> None:
    model = tiny("neox-parallel-partial-rotary", dtype=torch.float64)
    record, stream = found(model, batch(*ROWS)), vw.open(model)
    first = torch.tensor([c.writes for c in stream.components if c.writes is not None])
    projection, share = record.projection["projection"], record.erased_by["share"]
    for p in range(1, stream.states):
        held = first < p
        change = share[held][:, first == p].sum(1)
        torch.testing.assert_close(projection[held, p] - projection[held, p - 1], change, rtol=1e-9, atol=1e-9)


def test_neither_the_split_into_batches_nor_the_basis_matters() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    whole = found(model, batch(*ROWS))
    for other in (found(model, *(r[None] for r in ROWS)), found(rotated(model, 2), batch(*ROWS))):
        for name, column in (("projection", "projection"), ("erased_by", "share")):
            one, two = getattr(whole, name)[column], getattr(other, name)[column]
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_a_planted_eraser_is_named() -> None:
    record = found(echo(-1.0), torch.arange(TOKENS)[:30, None])
    row = next(r for r in record.summary.rows() if r["writer"] == "embed")
    assert (row["start"], row["final"]) == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert (row["eraser"], row["taken"], row["half_state"]) == ("L1H2", pytest.approx(-1), 3)
    assert [r["writer"] for r in record.summary.rows()] == ["embed", "L1H2"], "who writes nothing is absent"
    turned = next(r for r in found(echo(1.0), torch.arange(TOKENS)[:30, None]).summary.rows())
    assert (turned["final"], turned["eraser"], turned["taken"]) == (pytest.approx(2), None, None)
    assert turned["half_state"] is None


def test_what_cannot_be_is_refused() -> None:
    model = tiny("llama-full")
    with pytest.raises(vw.VirtualWeightsError, match="no tokens"):
        lifetime(vw.open(model), [], model)
    with pytest.raises(vw.VirtualWeightsError, match="padding before a token"):
        lifetime(vw.open(model), [torch.tensor([[PADDING, 3]])], model)


def test_the_command_says_what_the_records_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-grouped-untied").save_pretrained(tmp_path)
    options = ("--repeated", "--tokens", "64", "--length", "16", "--json")
    assert run(["lifetime", str(tmp_path), "--top", "5", *options]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    left = [abs(row["final"]) for row in told["lifetime"]]
    assert left == sorted(left)
    assert len(left) == 5
    assert {row["writer"] for row in told["erased_by"]} <= {row["writer"] for row in told["lifetime"]}
    assert told["stamp"]["tokens"] == 64
    name = told["lifetime"][0]["writer"]
    assert run(["lifetime", str(tmp_path), "--writer", name, *options]) == 0
    one: dict[str, Any] = json.loads(capsys.readouterr().out)
    (row,) = one["lifetime"]
    assert abs(row["projection"][-1]) == pytest.approx(left[0])
    assert all(each["writer"] == name for each in one["erased_by"])
    assert run(["lifetime", str(tmp_path), "--writer", "L9H9", *options]) == 2
    assert run(["lifetime", str(tmp_path), "--repeated", "--text", "default"]) == 2
