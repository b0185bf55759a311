"""Subspaces of heads, all pairs, against one pair at a time; the interference bound; the gauges."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from regauge import rebased, rotated
from tiny_models import SHAPES, tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.pairs.subspaces import Subspaces, figures
from virtual_weights.linalg import Dense, Subspace, column_space, overlap, overlap_moments, principal_angles, row_space
from virtual_weights.stream import Stream, parse

NAMES = ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"]
ALL_ROLES = list(itertools.product("QKVO", repeat=2))


def dense_circuit(stream: Stream, label: str) -> Tensor:
    """(., d) for a reader, all its query heads stacked; (d, .) for O."""
    name, role = label.split(".")
    head = stream[name]
    if role == "O":
        return head.ov.dense().double()
    if role == "Q":
        return head.qk.dense().double().T
    parsed = parse(name)
    served = [stream[f"L{parsed.layer}H{parsed.index + i}"] for i in range(sizes(stream).group)]
    return torch.cat([(h.qk if role == "K" else h.ov).dense().double() for h in served])


def space(stream: Stream, label: str, energy: float | None = None) -> Subspace:
    make = column_space if label.endswith("O") else row_space
    chosen = {"tolerance": 1e-6} if energy is None else {"energy": energy}
    return make(Dense(dense_circuit(stream, label)), **chosen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("roles", [("O", "K"), ("Q", "O"), ("O", "V"), ("V", "V"), ("O", "O"), ("Q", "K")])
def test_every_pair_equals_the_pair_alone(name: str, roles: tuple[str, str]) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    record = Subspaces(*roles)(stream)
    rows = list(record.rows())
    assert rows
    for row in rows[:: max(1, len(rows) // 12)]:
        a, b = space(stream, row["first"]), space(stream, row["second"])
        assert (row["rank_first"], row["rank_second"]) == (a.rank, b.rank)
        assert row["overlap"] == pytest.approx(overlap(a, b), abs=1e-9)
        assert row["angle"] == pytest.approx(float(principal_angles(a, b)[0]), abs=1e-6)
        mean, variance = overlap_moments(a.rank, b.rank, stream.d_model)
        assert row["null_ratio"] == pytest.approx(row["overlap"] / float(mean), rel=1e-9)
        if variance > 1e-12:
            assert row["z"] == pytest.approx((row["overlap"] - float(mean)) / float(variance.sqrt()), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ["Q", "K", "V"])
def test_interference_is_the_norm_of_the_product_and_stays_below_its_bound(name: str, role: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    record = Subspaces(role, "O")(stream)
    rows = list(record.rows())
    for row in rows[:: max(1, len(rows) // 12)]:
        reader, writer = dense_circuit(stream, row["first"]), dense_circuit(stream, row["second"])
        strength = float(torch.linalg.matrix_norm(reader @ writer, 2))
        norms = float(torch.linalg.matrix_norm(reader, 2) * torch.linalg.matrix_norm(writer, 2))
        assert row["strength"] == pytest.approx(strength, rel=1e-9)
        assert row["bound"] == pytest.approx(norms * row["cosine"], rel=1e-9)
        wrong = float(torch.linalg.matrix_norm(reader @ writer.T, 2))
        assert abs(wrong - strength) > 1e-6 * strength
    tightness = record["tightness"][~record["tightness"].isnan()]
    assert bool((tightness <= 1 + 1e-9).all())
    assert bool((tightness > 0).all())
    assert figures(record).independent == 0


def test_pairs_are_each_once_or_those_that_reach() -> None:
    stream = vw.open(tiny("llama-grouped-untied"))  # 3 layers, 6 heads, 2 keys and values
    sizes = {
        ("Q", "Q"): 18 * 17 // 2,
        ("K", "K"): 6 * 5 // 2,
        ("Q", "K"): 18 * 6,
        ("O", "V"): 6 * 4 + 6 * 2,
        ("Q", "O"): 6 * 6 + 6 * 12,
    }
    for roles, count in sizes.items():
        record = Subspaces(*roles)(stream)
        assert len(list(record.rows())) == record.stamp["pairs"] == figures(record).pairs == count
    parallel = vw.open(tiny("neox-parallel-partial-rotary"))  # 3 layers, 4 heads; a write is read at once
    assert Subspaces("O", "V")(parallel).stamp["pairs"] == Subspaces("K", "O")(parallel).stamp["pairs"] == 4 * 8 + 4 * 4
    record = Subspaces("O", "K")(stream)
    assert record.axis("second").labels[:2] == ("L0H0.K", "L0H3.K")
    assert record.axis("second").groups[:2] == ("L0.kv0", "L0.kv1")


def test_one_layer_has_pairs_of_readers_but_none_that_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "one-layer", ("llama", {**SHAPES["llama-full"][1], "num_hidden_layers": 1}))
    stream = vw.open(tiny("one-layer"))
    summary = figures(Subspaces("O", "K")(stream))
    assert (summary.pairs, summary.mean_overlap, summary.least_angle, summary.independent) == (0, None, None, None)
    assert figures(Subspaces("Q", "K")(stream)).pairs == 36


@pytest.mark.parametrize("role", ["Q", "K", "V"])
def test_agrees_with_overlap(role: str) -> None:
    stream = vw.open(tiny("llama-grouped-untied", dtype=torch.float64))
    one, other = Subspaces(role, "O")(stream), vw.Overlap(role)(stream)
    for name in ("overlap", "null_ratio", "z"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("roles", ALL_ROLES)
def test_unchanged_when_heads_are_rebased(roles: tuple[str, str]) -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    before, after = (Subspaces(*roles)(vw.open(m)) for m in (model, rebased(model, seed=3)))
    _same(before, after)


@pytest.mark.parametrize("roles", [("O", "K"), ("Q", "Q"), ("O", "O")])
@pytest.mark.parametrize("energy", [None, 0.8])
def test_unchanged_when_the_stream_is_rotated_or_heads_rebased_at_an_energy(
    roles: tuple[str, str], energy: float | None
) -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    before = Subspaces(*roles, energy=energy)(vw.open(model))
    for changed in (rotated(model, seed=5), rebased(model, seed=6)):
        _same(before, Subspaces(*roles, energy=energy)(vw.open(changed)))


def test_energy_keeps_fewer_directions_and_offers_no_bound() -> None:
    stream = vw.open(tiny("gpt2", dtype=torch.float64))
    record = Subspaces("O", "K", energy=0.7)(stream)
    assert "bound" not in {c.name for c in record.columns}
    for row in list(record.rows())[::9]:
        a, b = (space(stream, row[side], 0.7) for side in ("first", "second"))
        assert (row["rank_first"], row["rank_second"]) == (a.rank, b.rank)
        assert row["overlap"] == pytest.approx(overlap(a, b), abs=1e-9)
    assert float(record["rank_first"].mean()) < 6


def test_small_workspace_changes_nothing() -> None:
    stream = vw.open(tiny("gpt2"))
    _same(Subspaces("O", "Q")(stream), Subspaces("O", "Q", memory_mb=0)(stream))


@pytest.mark.parametrize("bad", [{"role_a": "X"}, {"energy": 0.0}, {"energy": 1.5}])
def test_wrong_parameters_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        Subspaces(**bad)


def _same(one: vw.Record, two: vw.Record) -> None:
    assert {c.name for c in one.columns} == {c.name for c in two.columns}
    for column in one.columns:
        torch.testing.assert_close(column.values, two[column.name], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("roles", [("O", "K"), ("V", "V")])
def test_blocks_are_the_same_to_the_last_bit_whatever_is_computed_beside_them(roles: tuple[str, str]) -> None:
    stream, question = vw.open(tiny("llama-grouped-untied")), Subspaces(*roles)
    work = [(question, name) for question in (question, Subspaces("O", "V")) for name in question.blocks(stream)]
    together = list(Subspaces.compute(work, stream))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        alone = [block for of, name in work for block in Subspaces.compute([(replace(of, memory_mb=0), name)], stream)]
    finally:
        torch.set_num_threads(threads)
    assert len(alone) == len(together)
    for (_, _, one), (_, _, other) in zip(together, alone, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name].nan_to_num(-1), other[name].nan_to_num(-1)) for name in one)
