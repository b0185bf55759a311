"""All heads' circuits, the ends of a channel, and the angles of a pair: equal to one at a time and to dense twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planting import frame, plant_head, quiet
from regauge import rebased, rotated
from tiny_models import tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.analysis.channels.channel import Circuit
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens
from virtual_weights.analysis.channels.head_circuits import HeadCircuits, summary
from virtual_weights.analysis.channels.head_tokens import HeadTokens
from virtual_weights.analysis.channels.pair_angles import PairAngles
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.linalg import Dense, Spectrum, principal_angles, random_cosines
from virtual_weights.linalg.subspace import column_space, row_space

SHAPES = ["llama-grouped-untied", "llama-multi-query-tied", "llama-biases-wide-heads", "gpt2"]
SHAPES += ["neox-parallel-partial-rotary"]


def same(one: vw.Record, two: vw.Record, rtol: float = 1e-7) -> None:
    assert [axis.labels for axis in one.axes] == [axis.labels for axis in two.axes]
    for column in one.columns:
        if isinstance(column.values, Tensor):
            torch.testing.assert_close(column.values, two[column.name], rtol=rtol, atol=1e-9, equal_nan=True)
        else:
            assert column.values == two[column.name], column.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
def test_gains_of_all_heads_are_those_of_each_circuit(name: str, dtype: torch.dtype) -> None:
    stream = vw.open(tiny(name, dtype=dtype))
    record = HeadCircuits(rotary_offset=3)(stream)
    assert record.axis("head").labels == tuple(str(head.label) for head in stream.heads)
    for i, head in enumerate(record.axis("head").labels):
        for kind in ("ov", "qk"):
            alone = Circuit(f"{head}.{kind}", 3)(stream)
            torch.testing.assert_close(record[kind][i], alone["gain"], rtol=1e-10, atol=0)
        row = summary(record)[i]
        assert row["head"] == head
        assert row["ov_directions"] == pytest.approx(Spectrum(Circuit(f"{head}.ov")(stream)["gain"]).entropy_rank)
        assert row["qk_strength"] == pytest.approx(float(alone["gain"].square().sum().sqrt()))


def test_a_gain_that_is_rounding_is_0_and_a_circuit_that_is_not_there_is_absent() -> None:
    model: Any = quiet()
    plant_head(model, 0, 1, 2 * torch.outer(frame(1)[:, 0], frame(2)[:, 0]))
    record = HeadCircuits()(vw.open(model))
    assert record["ov"][1].tolist() == pytest.approx([2.0, 0, 0, 0], abs=0, rel=1e-6)
    assert record["ov"][0].tolist() == [0.0] * 4
    model = tiny("llama-grouped-untied")
    state = {name: tensor for name, tensor in model.state_dict().items() if "q_proj" not in name}
    partial = HeadCircuits()(vw.open(state, config=model.config.to_dict(), partial=True))
    assert partial["qk"].isnan().all()
    torch.testing.assert_close(partial["ov"], HeadCircuits()(vw.open(model))["ov"])
    assert summary(partial)[0]["qk_strength"] is None


@pytest.mark.parametrize("tolerance", [0.01, 0.3])
@pytest.mark.parametrize("name", SHAPES)
def test_tokens_of_all_heads_are_those_of_each(name: str, tolerance: float) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    record = HeadTokens(count=3, blocks=3, tolerance=tolerance)(stream)
    rows = list(record.rows())
    assert tuple(dict.fromkeys(record["head"])) == tuple(str(head.label) for head in stream.heads)
    for head in stream.heads:
        alone = ChannelTokens(f"{head.label}.ov", count=3, blocks=3, tolerance=tolerance)(stream)
        those = [row for row in rows if row["head"] == str(head.label)]
        for row, one in zip(those, alone.rows(), strict=True):
            assert set(row) == {*one, "head"}
            for name, value in one.items():
                expected = pytest.approx(value, rel=1e-9, abs=1e-10) if isinstance(value, float) else value
                assert name == "row" or row[name] == expected
    sizes = set(record["size"].tolist())
    assert sizes == {1} if tolerance == 0.01 else max(sizes) > 1


def test_memory_changes_no_row_and_a_head_that_writes_nothing_has_none() -> None:
    stream = vw.open(tiny("llama-grouped-untied", dtype=torch.float64))
    same(HeadTokens(memory_mb=0)(stream), HeadTokens()(stream))
    model = quiet()
    plant_head(model, 0, 1, 2 * torch.outer(frame(1)[:, 0], frame(2)[:, 0]))
    assert set(HeadTokens()(vw.open(model))["head"]) == {"L0H1"}


@pytest.mark.parametrize("reader", ["L2H1.K", "L2H1.V", "L2.mlp.up", "unembed", "ov", "qk"])
def test_written_read_is_the_cosine_of_the_two_ends(reader: str) -> None:
    stream = vw.open(tiny("llama-grouped-untied", dtype=torch.float64))
    head = stream["L0H1"]
    if reader in ("ov", "qk"):
        u, _, vh = torch.linalg.svd(getattr(head, reader).dense())
        a, b, record = u, vh.T, ChannelTokens(f"L0H1.{reader}", count=1)(stream)
    else:
        maps = {"L2H1.K": "L2H1.qk", "L2H1.V": "L2H1.ov"}
        r = stream.read("unembed").maps[0] if reader == "unembed" else None
        if r is None:
            part, port = maps.get(reader, reader).rsplit(".", 1)
            r = getattr(stream[part], port).dense()
        u, _, vh = torch.linalg.svd(r @ head.ov.dense(), full_matrices=False)
        a, b, record = head.ov.dense() @ vh.T, r.T @ u, ChannelTokens("L0H1", reader, count=1)(stream)
    for row in record.rows():
        i = int(row["directions"]) - 1
        assert row["written_read"] == pytest.approx(float(torch.cosine_similarity(a[:, i], b[:, i], 0)), abs=1e-9)
        assert (row["written_read"] > 0) or reader in ("ov", "qk"), "what is read of what is written has a gain > 0"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_head_that_copies_or_erases_writes_along_what_it_reads(sign: float) -> None:
    model, a = quiet(), frame(1)
    plant_head(model, 0, 1, sign * 3 * torch.outer(a[:, 0], a[:, 0]))
    cosines = ChannelTokens("L0H1.ov")(vw.open(model)).numbers("written_read")
    torch.testing.assert_close(cosines, torch.full_like(cosines, sign))


def test_of_a_block_it_is_the_mean_over_principal_angles() -> None:
    """Equal gains from the plane (a0, a1) to one at angles 0.3 and 1.2 from it."""
    model, a = quiet(), frame(1)
    angles = torch.tensor([0.3, 1.2], dtype=torch.float64)
    read = a[:, :2]
    written = -(read * angles.cos() + a[:, 2:4] * angles.sin())
    plant_head(model, 0, 1, 3 * written @ read.T)
    record = ChannelTokens("L0H1.ov")(vw.open(model))
    assert set(record["directions"]) == {"1-2"}
    assert record["written_read"].tolist() == pytest.approx([float(angles.cos().mean())] * len(record["size"]))


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
@pytest.mark.parametrize("port", ["Q", "K", "V"])
def test_angles_of_a_pair_are_those_of_all_pairs(name: str, port: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    everyone = Subspaces("O", port)(stream)
    second = everyone.axis("second").labels[-1]
    for writer in ("L0H0", "L1H2"):
        record, row = PairAngles(writer, second)(stream), everyone[f"{writer}.O", second]
        cosines = record["cosine"]
        assert (record.stamp["rank_writer"], record.stamp["rank_reader"]) == (row["rank_first"], row["rank_second"])
        assert float(cosines.square().mean()) == pytest.approx(row["overlap"], abs=1e-9)
        assert float(cosines[0]) == pytest.approx(row["cosine"], abs=1e-7)
        map = {"Q": stream[second[:-2]].qk.T, "K": stream[second[:-2]].qk, "V": stream[second[:-2]].ov}[port]
        spaces = column_space(Dense(stream[writer].ov.dense())), row_space(Dense(map.dense()), tolerance=1e-9)
        torch.testing.assert_close(cosines, principal_angles(*spaces).cos(), rtol=0, atol=1e-9)


def test_the_band_holds_nine_of_ten_random_subspaces() -> None:
    stream = vw.open(tiny("llama-grouped-untied", dtype=torch.float64))
    record = PairAngles("L0H1", "L1H2.K", draws=2000)(stream)
    drawn = random_cosines(4, 4, 24, 2000, seed=7)
    assert float(drawn.square().mean()) == pytest.approx(4 / 24, rel=0.03)
    within = ((drawn >= record["random_low"]) & (drawn <= record["random_high"])).double().mean(0)
    assert within.tolist() == pytest.approx([0.9] * 4, abs=0.03)
    same(PairAngles("L0H1", "L1H2.K", seed=1)(stream), PairAngles("L0H1", "L1H2.K", seed=1)(stream), 0)
    first, second = (PairAngles("L0H1", "L1H2.K", seed=seed)(stream)["random_low"] for seed in (0, 1))
    assert not torch.equal(first, second)
    unequal = random_cosines(5, 3, 24, 2000, seed=7)
    assert unequal.shape == (2000, 3)
    assert float(unequal.square().mean()) == pytest.approx(5 / 24, rel=0.03)


def test_angles_of_other_parts() -> None:
    stream = vw.open(tiny("llama-grouped-untied", dtype=torch.float64))
    row, column = stream["L1N5.up"].dense().flatten(), stream["L0N7.out"].dense().flatten()
    neurons = PairAngles("L0N7", "L1N5.up")(stream)["cosine"]
    assert neurons.tolist() == [pytest.approx(abs(float(torch.cosine_similarity(row, column, 0))))]
    for writer, reader in (("L0.mlp", "L1H2.K"), ("embed", "L1H2.K"), ("L0H1", "unembed"), ("L0H1", "L1.mlp.up")):
        with pytest.raises(vw.UsageError, match="fewer directions than the stream"):
            PairAngles(writer, reader)(stream)
    with pytest.raises(vw.UsageError, match="cannot reach"):
        PairAngles("L2H1", "L1H2.K")(stream)
    with pytest.raises(vw.UsageError, match="at least one"):
        PairAngles("L0H1", "L1H2.K", draws=0)
    assert PairAngles("L0H1", "L1H2.V")(vw.open(quiet())).size == 0


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_unchanged_when_heads_are_rebased_or_the_stream_is_rotated(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    changed = [rebased(model, seed=3)] + ([rotated(model, seed=5)] if name.startswith("llama") else [])
    questions = HeadCircuits(), HeadTokens(tolerance=0.05), PairAngles("L0H1", "L1H2.K"), PairAngles("L0H1", "L1H2.V")
    for question in questions:
        for other in changed:
            same(question(vw.open(model)), question(vw.open(other)), 1e-6)
