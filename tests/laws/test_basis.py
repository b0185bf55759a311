"""Kurtosis against its dense twin, a planted privileged basis and its loss under rotation, massive coordinates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense import seen
from planting import D, blank
from regauge import rebased
from safetensors.torch import save_file
from tiny_models import tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.ledger.basis import Basis, summary
from virtual_weights.cli import run


def kurtosis(rows: Tensor) -> Tensor:
    rows = rows.double()
    rows = rows[rows.abs().sum(1) > 0]
    return rows.shape[1] * rows.pow(4).sum(1) / rows.square().sum(1).square()


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-sequential-no-attention-bias"])
def test_kurtosis_equals_its_dense_twin(name: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    columns, rows = [], []
    for component in stream.components:
        label, kind = component.label, component.kind
        part = seen(stream, str(label))
        if kind == "head":
            columns.append(torch.linalg.svd(part.ov.dense())[0][:, : sizes(stream).d_head].T)
            rows.append(torch.linalg.svd(part.qk.T.dense())[2][: sizes(stream).d_head])
            if label.index % sizes(stream).group == 0:
                heads = [stream[f"L{label.layer}H{label.index + i}"] for i in range(sizes(stream).group)]
                for circuit in ("K", "V"):
                    stacked = torch.cat([head.circuit(circuit).dense() for head in heads])
                    rows.append(torch.linalg.svd(stacked)[2][: sizes(stream).d_head])
        elif kind == "mlp":
            columns.append(part.out.dense().T)
            rows += [part.up.dense()] + ([part.gate.dense()] if part.gate is not None else [])
        elif kind == "unembed":
            rows.append(part.dense())
        else:
            columns.append(part.dense().T)
    means, writes = summary(Basis()(stream)), torch.cat(columns)
    writes = writes - writes.mean(1, keepdim=True) if sizes(stream).norm == "layer" else writes
    assert means["write_kurtosis"] == pytest.approx(float(kurtosis(writes).mean()), rel=1e-6)
    # heads' queries: QK has q's directions on its left
    assert means["read_kurtosis"] == pytest.approx(float(kurtosis(torch.cat(rows)).mean()), rel=1e-6)


def test_heads_inner_bases_do_not_matter() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    one, two = (Basis()(vw.open(m)) for m in (model, rebased(model, 2)))
    for column in one.columns:
        torch.testing.assert_close(two[column.name], column.values, rtol=1e-6, atol=1e-8)


def test_a_planted_basis_is_seen_and_lost_under_rotation() -> None:
    """Everything is written along single coordinates, one of them four times as often as it should be."""
    model = blank()
    with torch.no_grad():
        for layer in model.model.layers:
            axes = torch.arange(40) % D
            axes[:10] = 5
            layer.mlp.down_proj.weight[axes, torch.arange(40)] = torch.randn(40, dtype=torch.float64)
            layer.mlp.up_proj.weight.copy_(torch.randn(40, D, dtype=torch.float64))
    record = Basis(massive=4.0)(vw.open(model))
    means = summary(record)
    assert means["write_kurtosis"] == pytest.approx(D)
    assert means["write_kurtosis_turned"] == pytest.approx(means["gaussian"], rel=0.4)
    assert means["read_kurtosis"] == pytest.approx(3, abs=1)
    assert [row["coordinate"] for row in means["massive"]] == [5]
    assert means["massive"][0]["energy"] == pytest.approx(D * 11 / 40)
    assert float(record["write_energy"].mean()) == pytest.approx(1)


def test_a_random_model_has_no_basis() -> None:
    model = tiny("neox-parallel-partial-rotary")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1)  # a gain of its own for every coordinate is a basis
    means = summary(Basis()(vw.open(model)))
    for side in ("write", "read"):
        assert means[f"{side}_kurtosis"] == pytest.approx(means[f"{side}_kurtosis_turned"], rel=0.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-full").save_pretrained(tmp_path / "m")
    assert run(["basis", str(tmp_path / "m"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["summary"]["write_kurtosis"] == pytest.approx(
        summary(Basis()(vw.open(tmp_path / "m")))["write_kurtosis"]
    )
    assert run(["basis", str(tmp_path / "m")]) == 0
    assert "mean kurtosis" in capsys.readouterr().out
    assert run(["basis", str(tmp_path / "m"), "--massive", "0.5"]) == 2


@pytest.mark.parametrize("name", ["gpt2-untied-narrow", "neox-parallel-partial-rotary"])
def test_what_layer_norm_takes_away_does_not_count(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    before = Basis()(vw.open(model))
    assert before.stamp["gaussian"] == 3 * (model.config.hidden_size - 1) / (model.config.hidden_size + 1)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(5.0)
    after = Basis()(vw.open(model))
    for column in before.columns:
        torch.testing.assert_close(after[column.name], column.values)


@pytest.mark.parametrize(("side", "parts"), [("write", ("embed", "layernorm")), ("read", ("lm_head", "norm"))])
def test_a_side_that_is_not_there_is_absent(
    side: str, parts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama-grouped-untied")
    model.config.save_pretrained(tmp_path)
    tensors = {name: x.clone() for name, x in model.state_dict().items() if any(part in name for part in parts)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert run(["basis", str(tmp_path), "--partial", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["summary"]
    present = {name for name in figures if "_kurtosis" in name and figures[name] is not None}
    assert present == {f"{side}_kurtosis", f"{side}_kurtosis_turned"}
    assert run(["basis", str(tmp_path), "--partial"]) == 0
