"""Coherence, capacity, interference and recovery: dense twins, known answers, gauges, planted directions."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import NEURONS, D, frame
from regauge import rebased, rotated
from tiny_models import tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.analysis.crowding.coherence import Coherence, capacity, gap, welch
from virtual_weights.analysis.crowding.directions import directions
from virtual_weights.analysis.crowding.interference import Interference
from virtual_weights.analysis.crowding.recovery import METHODS, Recovery


def writing(rows: Tensor) -> nn.Module:
    """A model whose neurons write along these directions, (120, 24), layer after layer."""
    model = tiny("llama-full", dtype=torch.float64)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.copy_(rows[i * NEURONS : (i + 1) * NEURONS].T)
    return model


@pytest.mark.parametrize("kind", ["out", "in", "gate", "ov"])
def test_coherence_equals_its_dense_twin(kind: str) -> None:
    stream = vw.open(tiny("llama-grouped-untied", dtype=torch.float64))
    rows = []
    for layer in range(3):
        mlp = stream[f"L{layer}.mlp"]
        if kind == "ov":
            heads = [stream[label].ov.dense() for label in stream.groups[f"L{layer}.attn"].labels]
            rows += [torch.linalg.svd(ov)[0][:, 0] for ov in heads]
        else:
            map = {"out": mlp.out.T, "in": mlp.up, "gate": mlp.gate}[kind]
            rows += list(map.dense())
    unit = torch.nn.functional.normalize(torch.stack(rows).double(), dim=1)
    cosines = (unit @ unit.T).abs()
    pairs = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
    record = Coherence(kind)(stream)
    figures = gap(record)
    assert figures["largest"] == pytest.approx(float(pairs.max()), abs=1e-6)
    assert figures["mean_square"] == pytest.approx(float(pairs.square().mean()), abs=1e-6)
    assert figures["frame_potential"] == pytest.approx(float(cosines.square().sum()), rel=1e-5)
    assert int(record["count"].sum()) == int(record["random"].sum()) == len(pairs)
    names, unit_rows = directions(stream, kind)
    i, j = (names.index(name) for name in figures["largest_pair"])
    assert abs(float(unit_rows[i] @ unit_rows[j])) == pytest.approx(figures["largest"], abs=1e-6)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = vw.open(tiny("gpt2"))
    whole = Coherence("out")(stream)
    monkeypatch.setattr("virtual_weights.analysis.crowding.coherence._TILE", 37)
    tiled = Coherence("out")(stream)
    assert torch.equal(whole["count"], tiled["count"])
    assert tiled.stamp["largest_pair"] == whole.stamp["largest_pair"]
    assert tiled.stamp["largest"] == pytest.approx(whole.stamp["largest"])
    assert tiled.stamp["mean_square"] == pytest.approx(whole.stamp["mean_square"])


def test_known_frames() -> None:
    """Orthonormal directions have coherence 0, a simplex meets Welch, a repeated direction has 1."""
    assert gap(Coherence("out", sample=None)(vw.open(writing(frame(0).T.repeat(5, 1)))))["largest"] == pytest.approx(1)
    simplex = torch.eye(D + 1, dtype=torch.float64) - 1 / (D + 1)
    basis = torch.linalg.svd(simplex)[0][:, :D]
    unit = torch.nn.functional.normalize(simplex @ basis, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(0).abs()
    assert float(cosines.max()) == pytest.approx(welch(D + 1, D))
    assert float(cosines[0, 1:].min()) == pytest.approx(welch(D + 1, D))
    assert welch(D, D) == 0.0
    few = torch.zeros(120, D, dtype=torch.float64)
    few[:D] = frame(1).T
    figures = gap(Coherence("out")(vw.open(writing(few))))
    assert (figures["directions"], figures["largest"]) == (D, pytest.approx(0, abs=1e-6))


@given(st.integers(2, 60), st.integers(2, 40), st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_no_directions_come_below_welch(n: int, d: int, seed: int) -> None:
    rows = torch.nn.functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )
    assert float((rows @ rows.T).fill_diagonal_(0).abs().max()) >= welch(n, d) - 1e-12


def test_gauges() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    first, *others = (vw.open(m) for m in (model, rebased(model, 1), rotated(model, 2)))
    for kind in ("out", "in", "gate", "ov"):
        before = gap(Coherence(kind)(first))
        for other in others:
            after = gap(Coherence(kind)(other))
            for name in ("largest", "mean_square", "frame_potential"):
                assert after[name] == pytest.approx(before[name], rel=1e-4)
    for question in (Interference(most=64), Recovery(size=40, most=16, methods=("matched", "least_squares"))):
        for other in others:
            for column in question(first).columns:
                torch.testing.assert_close(question(other)[column.name], column.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d", "eps"), [(24, 0.5), (576, 0.1), (4096, 0.03)])
def test_capacity_counts(d: int, eps: float) -> None:
    counts = capacity(d, eps)
    assert counts.published == pytest.approx(d / eps**2)
    assert counts.active_signals == pytest.approx(1 + d * eps**2)
    if counts.welch is not None:
        assert welch(math.floor(counts.welch), d) <= eps <= welch(math.ceil(counts.welch) + 1, d)


def test_the_random_code_is_there_as_promised() -> None:
    """As many random directions as the count says stay within eps, in most draws."""
    d, eps = 400, 0.28
    n = int(10 ** capacity(d, eps).log10_random_code)
    assert n > 2000
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)
    assert float((rows @ rows.T).fill_diagonal_(0).abs().max()) < eps
    assert n < d / eps**2, "here the count is the more careful one; it overtakes d / eps^2 as d grows"
    assert 10 ** capacity(4000, eps).log10_random_code > 4000 / eps**2


def test_interference_of_random_directions_has_both_powers() -> None:
    record = Interference(most=1024, trials=8)(vw.open(wide_random()))
    powers = record.stamp["exponents"]
    assert powers["total"]["low"] - 0.05 < 2 < powers["total"]["high"] + 0.05
    assert powers["error"]["low"] - 0.05 < 1 < powers["error"]["high"] + 0.05
    torch.testing.assert_close(record["total"], record["random_total"], rtol=0.1, atol=0.0)
    torch.testing.assert_close(record["error"], record["random_error"], rtol=0.4, atol=0.0)


def wide_random() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=8, vocab_size=11, n_inner=600)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_recovery_knows_orthogonal_directions_and_repeated_ones() -> None:
    few = torch.zeros(120, D, dtype=torch.float64)
    few[:D] = frame(2).T
    perfect = Recovery(size=D, most=16)(vw.open(writing(few)))
    for column in perfect.columns:
        assert torch.equal(column.values, torch.ones_like(column.values)), column.name
    crowded = Recovery(size=120, most=64)(vw.open(writing(torch.randn(120, D, dtype=torch.float64))))
    assert set(METHODS) == {column.name for column in crowded.columns}
    for name in ("matched", "least_squares", "sparse"):
        assert float(crowded[name][0]) > 0.8 > float(crowded[name][-1]), name
    assert float(crowded["known_support"][3]) == 1.0
    assert float(crowded["sparse"][2]) >= float(crowded["matched"][2])


def test_sparse_recovery_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtual_weights.analysis.crowding.recovery.find_spec", lambda name: None)
    stream = vw.open(tiny("llama-full"))
    record = Recovery(size=40, most=8)(stream)
    assert [column.name for column in record.columns] == ["matched", "least_squares", "known_support"]
    with pytest.raises(vw.VirtualWeightsError, match="scikit-learn") as error:
        Recovery(methods=("sparse",))(stream)
    assert "pip install" in str(error.value)
    assert "sklearn" not in vars(sys.modules["virtual_weights.analysis.crowding.recovery"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: Coherence("sideways"),
        lambda s: Coherence(sample=1),
        lambda s: Coherence("gate")(vw.open(tiny("gpt2"))),
        lambda s: Interference(most=8),
        Interference("ov"),
        lambda s: Recovery(methods=("magic",)),
        lambda s: capacity(10, 1.0),
    ],
)
def test_what_cannot_be_asked_is_refused(wrong: object) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        wrong(vw.open(tiny("llama-full")))
