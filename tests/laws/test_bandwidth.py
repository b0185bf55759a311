"""The bandwidth ledger against its dense twin, and the gauges under which it may not move."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import seen
from regauge import rebased, rotated
from tiny_models import SHAPES, tiny
from torch import Tensor, nn
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.ledger.bandwidth import Bandwidth, bottleneck, in_tokens, unread, unwritten
from virtual_weights.analysis.maps.circuits import head_circuits, rank_cut
from virtual_weights.linalg import gram_sum
from virtual_weights.stream import Stream


def dense_writers(stream: Stream, state: int) -> list[Tensor]:
    components = [seen(stream, str(c.label)) for c in stream.components if c.writes is not None and c.writes <= state]
    return [_dense(x, "write") for x in components]


def dense_readers(stream: Stream, state: int, *, unembed: bool = True) -> list[Tensor]:
    maps: list[Tensor] = []
    for c in stream.components:
        if c.reads is None or c.reads < state or (c.kind == "unembed" and not unembed):
            continue
        part = seen(stream, str(c.label))
        if c.kind == "head":
            maps.append(part.qk.dense().double().T)
            if c.label.index % sizes(stream).group == 0:
                heads = [stream[f"L{c.label.layer}H{c.label.index + i}"] for i in range(sizes(stream).group)]
                maps.append(torch.cat([head.qk.dense().double() for head in heads]))
                maps.append(torch.cat([head.ov.dense().double() for head in heads]))
        elif c.kind == "mlp":
            maps += [m.dense().double() for m in (part.gate, part.up) if m is not None]
        else:
            maps.append(part.dense().double())
    return maps


def _dense(part: object, side: str) -> Tensor:
    if hasattr(part, "ov"):
        return part.ov.dense().double()
    return (part.out if hasattr(part, "out") else part).dense().double()


def spectrum(maps: list[Tensor], axis: int) -> vw.Spectrum:
    return vw.Spectrum(torch.linalg.svdvals(torch.cat([m / torch.linalg.norm(m) for m in maps], axis)))


@pytest.mark.parametrize("name", SHAPES)
def test_ledger_equals_its_dense_twin(name: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    record = Bandwidth()(stream)
    d = stream.d_model
    for p, row in enumerate(record.rows()):
        writers, readers = dense_writers(stream, p), dense_readers(stream, p)
        blocks = dense_readers(stream, p, unembed=False)
        ranks = [int(torch.linalg.matrix_rank(m, rtol=1e-8)) for m in writers]
        assert (row["writers"], row["readers"]) == (len(writers), len(readers))
        assert row["write_ranks"] == sum(ranks)
        assert row["read_ranks"] == sum(int(torch.linalg.matrix_rank(m, rtol=1e-8)) for m in readers)
        assert row["oversubscription"] == pytest.approx(sum(ranks) / d)
        for key, maps, axis in (("written", writers, 1), ("read", readers, 0)):
            exact = spectrum(maps, axis)
            assert row[f"{key}_dim"] == exact.numerical_rank(1e-7)
            assert row[f"{key}_entropy_rank"] == pytest.approx(exact.entropy_rank, rel=1e-6)
            assert row[{"written": "unwritten_dim", "read": "unread_dim"}[key]] == d - row[f"{key}_dim"]
        live = [
            torch.cat([m / torch.linalg.norm(m) for m in maps], axis) for maps, axis in ((readers, 0), (writers, 1))
        ]
        product = torch.linalg.svdvals(live[0] @ live[1])
        assert row["live_dim"] == int((product > 1e-8 * product[0]).sum())
        assert row["live_entropy_rank"] == pytest.approx(vw.Spectrum(product).entropy_rank, rel=1e-6)
        assert row["read_dim_blocks"] == (spectrum(blocks, 0).numerical_rank(1e-7) if blocks else 0)


def test_every_neuron_is_before_or_after_and_the_saving_is_that_of_a_map_through_d() -> None:
    stream = vw.open(tiny("llama-full"))  # 3 layers of 40 neurons, d = 24
    record = Bandwidth()(stream)
    assert record["neurons_before"].tolist() == [0, 0, 40, 40, 80, 80, 120]
    assert record["neurons_after"].tolist() == [120, 120, 80, 80, 40, 40, 0]
    saving = 40 * 80 / (24 * (40 + 80 - 24))
    nan = float("nan")
    expected = torch.tensor([nan, nan, saving, saving, saving, saving, nan], dtype=record["saving"].dtype)
    torch.testing.assert_close(record["saving"], expected, equal_nan=True)
    assert record["neuron_product"][2].item() == pytest.approx(40 * 80 / 24**2)
    assert record["after"] == ("embed", "L0.attn", "L0.mlp", "L1.attn", "L1.mlp", "L2.attn", "L2.mlp")
    assert bottleneck(record)["state"] == "2"


def test_fewer_neurons_than_dimensions_are_no_bottleneck() -> None:
    record = Bandwidth()(vw.open(tiny("gpt2-untied-narrow")))  # 20 neurons a layer, d = 24
    assert record["saving"][2].item() == 1.0


def test_parallel_blocks_write_both_parts_at_once() -> None:
    stream = vw.open(tiny("neox-parallel-partial-rotary"))
    record = Bandwidth()(stream)
    assert record["after"] == ("embed", "L0", "L1", "L2")
    assert record["neurons_before"].tolist() == [0, 40, 80, 120]


@pytest.mark.parametrize("name", ["gpt2", "neox-parallel-partial-rotary"])
def test_centring_hides_the_constant_direction(name: str) -> None:
    stream = vw.open(tiny(name))
    hidden = unread(stream, 0)
    assert hidden.rank == 1
    ones = torch.ones(stream.d_model, dtype=torch.float64) / stream.d_model**0.5
    assert abs(float(hidden.basis[:, 0] @ ones)) == pytest.approx(1, abs=1e-6)
    assert unread(vw.open(tiny(name), fold=False), 0).rank == 0


@pytest.mark.parametrize(
    "name", ["llama-grouped-untied", "llama-multi-query-tied", "gpt2", "neox-parallel-partial-rotary"]
)
def test_unchanged_when_heads_are_rebased(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    before, after = vw.open(model), vw.open(rebased(model, seed=3))
    raw, thin = before.write("L1.attn").mT, head_circuits(before, "O", before.groups["L1.attn"])
    assert not torch.allclose(thin, raw)  # raw maps would not do
    _same(Bandwidth()(before), Bandwidth()(after))


def test_unchanged_when_the_stream_is_rotated() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    turned, turn = turned_whole(model, seed=5)
    before, after = vw.open(model), vw.open(turned)
    _same(Bandwidth()(before), Bandwidth()(after))
    spaces = [unread(stream, 5, unembed=False, cut=0.4).basis for stream in (before, after)]
    assert 0 < spaces[0].shape[1] < 24
    torch.testing.assert_close(turn @ spaces[0] @ spaces[0].T @ turn.T, spaces[1] @ spaces[1].T)


def test_scaling_a_writer_changes_no_span() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    larger = copy.deepcopy(model)
    with torch.no_grad():
        larger.model.layers[0].mlp.down_proj.weight.mul_(1e4)
    _same(Bandwidth()(vw.open(model)), Bandwidth()(vw.open(larger)))


def test_sums_that_are_not_kept_are_added_up_again() -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    record = Bandwidth(memory_mb=0)(stream)
    _same(Bandwidth()(stream), record)


@pytest.mark.parametrize("rows", [3, 5])  # a thin map and a wide one: the smaller Gram of each
def test_ranks_count_singular_values_above_the_cut(rows: int) -> None:
    graded = torch.zeros(rows, 4, dtype=torch.float64)
    graded[[0, 1, 2], [0, 1, 2]] = torch.tensor([1.0, 1e-2, 1e-3], dtype=torch.float64)
    for cut, rank in ((0.1, 1), (0.005, 2), (0.0005, 3)):
        total = gram_sum([graded[None]], 4, cut)
        assert (total.ranks, total.count, total.spectrum.numerical_rank(cut)) == (rank, 1, rank)
        used, unused = total.split(cut)
        assert (used.rank, unused.rank) == (rank, 4 - rank)
    nothing = gram_sum([torch.zeros(1, rows, 4)], 4, 0.1)
    assert (nothing.ranks, nothing.count, nothing.split(0.1)[1].rank) == (0, 1, 4)


def test_the_cut_follows_the_precision_of_the_fold() -> None:
    model = tiny("llama-full")
    single, double = vw.open(model), vw.open(model).to(torch.float64)
    assert rank_cut(single) == 24 * 2.0**-23
    assert rank_cut(double) == rank_cut(vw.open(model.double())) == (40 * 2.0**-52) ** 0.5  # 40 neurons, 37 tokens


def test_bfloat16_storage_does_not_lower_a_rank() -> None:
    exact, coarse = (Bandwidth()(vw.open(tiny("llama-full", dtype=t))) for t in (torch.float32, torch.bfloat16))
    assert exact["write_ranks"].tolist() == coarse["write_ranks"].tolist()
    assert exact["read_ranks"].tolist() == coarse["read_ranks"].tolist()


def test_tokens_nearest_to_a_direction_with_sign() -> None:
    stream = vw.open(tiny("llama-grouped-untied", dtype=torch.float64))
    rows, columns = stream.read("unembed").maps[0], stream.write("embed")[0]
    directions = torch.stack([rows[5] * 3, -rows[30]], 1)
    nearest = in_tokens(stream, directions, count=2)
    assert [(f[0].token, round(f[0].cosine, 9)) for f in nearest] == [(5, 1.0), (30, -1.0)]
    cosines = rows @ rows[5] / rows.norm(dim=1) / rows[5].norm()
    assert nearest[0][1].token == cosines.abs().argsort(descending=True)[1]
    assert nearest[0][1].cosine == pytest.approx(float(cosines[nearest[0][1].token]))
    assert in_tokens(stream, columns[:, 7:8], side="embed", count=1)[0][0].token == 7


@pytest.mark.parametrize("bad", [0.0, 1e-9, 1.0])
def test_a_cut_that_a_gram_cannot_hold_is_refused(bad: float) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="1e-7"):
        Bandwidth(cut=bad)


@pytest.mark.parametrize("ask", [unread, unwritten])
def test_a_state_that_is_not_there_is_refused(ask: object) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="no state 7"):
        ask(vw.open(tiny("llama-full")), 7)


def turned_whole(model: nn.Module, seed: int) -> tuple[nn.Module, Tensor]:
    """``rotated`` with the unembedding turned too, its gain folded; and the rotation."""
    changed = rotated(model, seed)
    d = model.config.hidden_size
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    with torch.no_grad():
        changed.lm_head.weight.copy_(model.lm_head.weight * model.model.norm.weight @ turn.T)
        changed.model.norm.weight.fill_(1)
    return changed, turn


def _same(one: vw.Record, two: vw.Record) -> None:
    for column in one.columns:
        if isinstance(column.values, Tensor):
            torch.testing.assert_close(column.values, two[column.name], rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert column.values == two[column.name]
