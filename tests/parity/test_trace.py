"""What all writers put on a reader, summed, is what transformers computes, on every family and for every port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPES, norms_in_full_precision, tiny
from uniform import sizes

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.runtime import Run
from virtual_weights.runtime.flow.trace import CONSTANT, Lens, Trace
from virtual_weights.runtime.running.activations import prompted

TOKENS = torch.tensor([3, 14, 15, 9, 2, 6, 5, 35])


@pytest.fixture(autouse=True)
def norms() -> Iterator[None]:
    with norms_in_full_precision():
        yield


def run_of(name: str, dtype: torch.dtype) -> Run:
    model = tiny(name, dtype=dtype)
    return Run.on_prompt(vw.open(model).to(torch.float64), TOKENS, model=model)


def readers(stream: vw.Stream) -> list[str]:
    ports = ("gate", "up") if stream.spec.gated else ("in",)
    heads = [f"L{i}H{h}.{port}" for i in (0, 1) for h in (0, sizes(stream).n_heads - 1) for port in "QKV"]
    return [*heads, *(f"L{i}.mlp.{port}" for i in (0, 1) for port in ports), f"L1N3.{ports[-1]}", "unembed"]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SHAPES)
def test_the_sum_over_writers_is_what_the_model_computes(name: str, dtype: torch.dtype, bound: float) -> None:
    prompt = run_of(name, dtype)
    logits = prompted(prompt).logits
    for reader in readers(prompt.stream):
        record = Trace(reader)(prompt)
        assert record.stamp["error"] < bound, reader
        torch.testing.assert_close(record["share"].sum(1), torch.ones(len(TOKENS), dtype=torch.float64))
    logit = Trace("unembed", 5, against=9)(prompt)
    assert logit.stamp["error"] < bound * 10
    expected = (logits[:, 5] - logits[:, 9]).double()
    torch.testing.assert_close(logit["logit"].sum(1), expected, rtol=bound * 10, atol=bound * 10)


def test_a_writer_left_out_or_turned_round_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, question = run_of("llama-grouped-untied", torch.float64), Trace("L1H2.K")
    whole, activations = question(prompt).stamp["error"], prompted(prompt)
    inner = activations.signals["inner", "L0.attn"]
    without = inner.clone()
    without[:, 1] = 0
    for wrong in (without, inner.flip(-1)):
        other = replace(activations, signals={**activations.signals, ("inner", "L0.attn"): wrong})
        monkeypatch.setattr(f"{Trace.__module__}.prompted", lambda _run, other=other: other)
        assert question(prompt).stamp["error"] > 1e-3 > whole


def test_only_writers_that_reach_are_there_and_the_constant_is_named() -> None:
    prompt = run_of("gpt2", torch.float64)
    names = Trace("L1H0.Q")(prompt).axis("writer").labels
    places = {str(c.label): c for c in prompt.stream.components}
    reads = places["L1H0"].reads
    assert set(names) - {CONSTANT} == {n for n, c in places.items() if c.writes is not None and c.writes <= reads}
    assert names[-1] == CONSTANT
    assert CONSTANT not in Trace("L1H0.Q")(run_of("llama-full", torch.float64)).axis("writer").labels


def test_the_lens_ends_with_the_models_own_words() -> None:
    prompt = run_of("gpt2", torch.float64)
    states, logits = prompt.stream.states, prompted(prompt).logits[-1]
    record = Lens(top=3)(prompt)
    last = [row for row in record.rows() if row["state"] == states - 1]
    best = logits.topk(3)
    assert [row["token"] for row in last] == best.indices.tolist()
    assert [row["logit"] for row in last] == pytest.approx(best.values.tolist())
    assert [row["probability"] for row in last] == pytest.approx(logits.softmax(0)[best.indices].tolist())
    assert len(list(record.rows())) == 3 * states


@pytest.mark.parametrize(
    "wrong", [("L9H0.Q",), ("L1H0",), ("embed",), ("L1H0.K", 5), ("unembed", 99), ("L1.mlp.gate",)]
)
def test_what_is_no_reader_is_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        Trace(*wrong)(run_of("gpt2", torch.float64))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-full").save_pretrained(tmp_path / "m")
    prompt = Run.on_prompt(vw.open(tmp_path / "m"), TOKENS[:4])
    base = ["trace", str(tmp_path / "m"), "--prompt-ids", "3,14,15,9"]
    assert run([*base, "--reader", "L1H2.K", "--top", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    record = Trace("L1H2.K")(prompt)
    best = record["share"][3].abs().topk(3).indices
    assert [row["writer"] for row in answer["rows"]] == [record.axis("writer").labels[int(i)] for i in best]
    assert answer["summary"]["error"] == answer["stamp"]["error"] < 1e-4
    assert run([*base, "--position", "1"]) == 0
    assert "the logit of" in capsys.readouterr().out
    assert run([*base, "--lens"]) == 0
    assert "logit lens" in capsys.readouterr().out
    assert run(["trace", str(tmp_path / "m"), "--prompt-ids", "3,99"]) == 2
    assert run(["trace", str(tmp_path / "m"), "--prompt-ids", "3,x"]) == 2
    assert run(["trace", str(tmp_path / "m")]) == 2
    assert run([*base, "--position", "4"]) == 2
    assert run([*base, "--token", "37"]) == 2
    assert run([*base, "--reader", "L1H2.K", "--token", "3"]) == 2
    assert run([*base, "--token", "5", "--against", "9", "--position", "2", "--top", "99", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    record = Trace("unembed", 5, 9)(prompt).select("token", ["2"])
    logits = dict(zip(record.axis("writer").labels, record["logit"][0].tolist(), strict=True))
    assert {row["writer"]: row["logit"] for row in answer["rows"]} == pytest.approx(logits, rel=1e-4)
