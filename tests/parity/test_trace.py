"""What all writers put on a reader, summed, is what transformers computes, on every family and for every port."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPES, norms_in_full_precision, tiny

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.runtime.flow.trace import CONSTANT, Passage, lens, passage, trace

TOKENS = torch.tensor([3, 14, 15, 9, 2, 6, 5, 35])


def run_of(name: str, dtype: torch.dtype) -> tuple[vw.Stream, Passage]:
    model = tiny(name, dtype=dtype)
    stream = vw.open(model)
    stream = stream.to(torch.float64)
    with norms_in_full_precision():
        return stream, passage(stream, TOKENS, model)


def readers(stream: vw.Stream) -> list[str]:
    ports = ("gate", "up") if stream.spec.gated else ("in",)
    found = [f"L{i}H{h}.{port}" for i in (0, 1) for h in (0, stream.spec.n_heads - 1) for port in "QKV"]
    return [*found, *(f"L{i}.mlp.{port}" for i in (0, 1) for port in ports), f"L1N3.{ports[-1]}", "unembed"]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SHAPES)
def test_the_sum_over_writers_is_what_the_model_computes(name: str, dtype: torch.dtype, bound: float) -> None:
    stream, seen = run_of(name, dtype)
    for reader in readers(stream):
        record = trace(seen, reader)
        assert record.stamp["error"] < bound, reader
        torch.testing.assert_close(record["share"].sum(1), torch.ones(len(TOKENS), dtype=torch.float64))
    logit = trace(seen, "unembed", 5, against=9)
    assert logit.stamp["error"] < bound * 10
    expected = (seen.logits[:, 5] - seen.logits[:, 9]).double()
    torch.testing.assert_close(logit["logit"].sum(1), expected, rtol=bound * 10, atol=bound * 10)


def test_a_writer_left_out_or_turned_round_is_noticed() -> None:
    _, seen = run_of("llama-grouped-untied", torch.float64)
    whole = trace(seen, "L1H2.K").stamp["error"]
    wrong = dict(seen.seen)
    wrong["inner", 0] = wrong["inner", 0].clone()
    wrong["inner", 0][:, 1] = 0
    assert trace(Passage(seen.stream, seen.tokens, wrong, seen.logits), "L1H2.K").stamp["error"] > 1e-3 > whole
    wrong["inner", 0] = seen.seen["inner", 0].flip(-1)
    assert trace(Passage(seen.stream, seen.tokens, wrong, seen.logits), "L1H2.K").stamp["error"] > 1e-3


def test_only_writers_that_reach_are_there_and_the_constant_is_named() -> None:
    stream, seen = run_of("gpt2", torch.float64)
    names = trace(seen, "L1H0.Q").axis("writer").labels
    places = {str(c.label): c for c in stream.components}
    reads = places["L1H0"].reads
    assert set(names) - {CONSTANT} == {n for n, c in places.items() if c.writes is not None and c.writes <= reads}
    assert names[-1] == CONSTANT
    assert CONSTANT not in trace(run_of("llama-full", torch.float64)[1], "L1H0.Q").axis("writer").labels


def test_the_lens_ends_with_the_models_own_words() -> None:
    stream, seen = run_of("gpt2", torch.float64)
    record = lens(seen, top=3)
    last = [row for row in record.rows() if row["state"] == stream.states - 1]
    own = seen.logits[-1].topk(3)
    assert [row["token"] for row in last] == own.indices.tolist()
    assert [row["logit"] for row in last] == pytest.approx(own.values.tolist())
    assert [row["probability"] for row in last] == pytest.approx(seen.logits[-1].softmax(0)[own.indices].tolist())
    assert len(list(record.rows())) == 3 * stream.states


@pytest.mark.parametrize(
    "wrong", [("L9H0.Q",), ("L1H0",), ("embed",), ("L1H0.K", 5), ("unembed", 99), ("L1.mlp.gate",)]
)
def test_what_is_no_reader_is_refused(wrong: tuple[object, ...]) -> None:
    _, seen = run_of("gpt2", torch.float64)
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        trace(seen, *wrong)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-full").save_pretrained(tmp_path / "m")
    base = ["trace", str(tmp_path / "m"), "--ids", "3,14,15,9"]
    assert run([*base, "--reader", "L1H2.K", "--top", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    record = trace(passage(vw.open(tmp_path / "m"), TOKENS[:4]), "L1H2.K")
    best = record["share"][3].abs().topk(3).indices
    assert [row["writer"] for row in told["rows"]] == [record.axis("writer").labels[int(i)] for i in best]
    assert told["error"] < 1e-4
    assert run([*base, "--position", "1"]) == 0
    assert "the logit of" in capsys.readouterr().out
    assert run([*base, "--lens"]) == 0
    assert "logit lens" in capsys.readouterr().out
    assert run(["trace", str(tmp_path / "m"), "--ids", "3,99"]) == 2
    assert run(["trace", str(tmp_path / "m"), "--ids", "3,x"]) == 2
    assert run(["trace", str(tmp_path / "m")]) == 2
    assert run([*base, "--position", "4"]) == 2
    assert run([*base, "--token", "37"]) == 2
    assert run([*base, "--reader", "L1H2.K", "--token", "3"]) == 2
    assert run([*base, "--token", "5", "--against", "9", "--position", "2", "--top", "99", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    record = trace(passage(vw.open(tmp_path / "m"), TOKENS[:4]), "unembed", 5, 9).select("token", ["2"])
    logits = dict(zip(record.axis("writer").labels, record["logit"][0].tolist(), strict=True))
    assert {row["writer"]: row["logit"] for row in told["rows"]} == pytest.approx(logits, rel=1e-4)
