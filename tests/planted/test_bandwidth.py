"""Planted truth: streams whose ranks, unused dimensions and blind readers are known by construction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.analysis.ledger.bandwidth import Bandwidth, unread, unwritten
from virtual_weights.analysis.pairs.subspaces import Subspaces, figures

D, LAYERS = 24, 3


def frame(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def plant(model: nn.Module, *, never_written: Tensor, unread_from: dict[int, Tensor]) -> nn.Module:
    """Writers made orthogonal to ``never_written``; readers from a layer on blind to ``unread_from[layer]``."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.copy_(weight - never_written @ never_written.T @ weight)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(weight - weight @ never_written @ never_written.T)
        for layer, space in unread_from.items():
            for later in range(layer, LAYERS):
                block = model.model.layers[later]
                for port in "qkv":
                    _blind(block.self_attn.get_submodule(f"{port}_proj").weight, block.input_layernorm.weight, space)
                for port in ("gate", "up"):
                    _blind(block.mlp.get_submodule(f"{port}_proj").weight, block.post_attention_layernorm.weight, space)
            _blind(model.lm_head.weight, model.model.norm.weight, space)
    return model


def _blind(weight: Tensor, gain: Tensor, space: Tensor) -> None:
    """``R diag(gain)`` made orthogonal to a space: blind as the reader really reads, after the norm's gain."""
    folded = weight * gain
    weight.copy_((folded - folded @ space @ space.T) / gain)


def planted(seed: int, unwritten_dim: int, unread_dim: int, layer: int) -> tuple[nn.Module, Tensor, Tensor]:
    basis = frame(seed)
    never, blind = basis[:, :unwritten_dim], basis[:, unwritten_dim : unwritten_dim + unread_dim]
    model = tiny("llama-grouped-untied", seed=seed, dtype=torch.float64)
    return plant(model, never_written=never, unread_from={layer: blind}), never, blind


@given(st.integers(0, 9), st.integers(0, 6), st.integers(0, 6), st.integers(0, 2))
def test_unused_dimensions_are_counted_and_found(seed: int, missing: int, hidden: int, layer: int) -> None:
    model, never, blind = planted(seed, missing, hidden, layer)
    stream = vw.open(model)
    record = Bandwidth()(stream)
    for p in range(2 * layer, 7):
        assert record["unwritten_dim"][p] == missing
        assert record["unread_dim"][p] == hidden
        assert record["live_dim"][p] == D - missing - hidden  # the two planted spaces are orthogonal
    if layer:
        assert record["unread_dim"][2 * layer - 1] == 0  # the MLP before still reads
    for space, truth in ((unread(stream, 2 * layer), blind), (unwritten(stream, 6), never)):
        torch.testing.assert_close(space.basis @ space.basis.T, truth @ truth.T, rtol=0, atol=1e-6)


def test_what_is_blind_before_the_gain_is_not_blind_after_it() -> None:
    """Had the gain been left out of the planting, the folded reader would see."""
    model, _, _ = planted(0, 0, 3, 0)
    assert unread(vw.open(model), 0).rank == 3
    assert unread(vw.open(model, fold=False), 0).rank == 0


def test_ranks_of_writers_and_readers_are_the_planted_ones() -> None:
    model = tiny("llama-full", dtype=torch.float64)  # 6 heads of width 4
    generator = torch.Generator().manual_seed(1)

    def low(rows: int, columns: int, rank: int) -> Tensor:
        shapes = (rows, rank), (rank, columns)
        left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return left @ right

    with torch.no_grad():
        for block in model.model.layers:
            for head in range(6):
                block.self_attn.o_proj.weight[:, 4 * head : 4 * head + 4] = low(D, 4, 2)
            block.mlp.down_proj.weight.copy_(low(D, 40, 5))
            block.mlp.up_proj.weight.copy_(low(40, D, 7))
            block.self_attn.k_proj.weight[:4] = low(4, D, 1)
        model.model.embed_tokens.weight.copy_(low(37, D, 3))
        model.lm_head.weight.copy_(low(37, D, 9))
    stream = vw.open(model)
    record = Bandwidth()(stream)
    assert [unwritten(stream, state).rank for state in (0, 1, 2, 3)] == [21, 9, 4, 0]
    assert record["write_ranks"].tolist() == [3, 15, 20, 32, 37, 49, 54]
    assert record["written_dim"].tolist() == [3, 15, 20, 24, 24, 24, 24]
    # one layer reads Q 1 + 5 x 4 (its first key has rank 1, so has QK), K likewise, V 6 x 2 (as OV), gate 24, up 7
    attention, mlp = 21 + 21 + 12, 24 + 7
    assert record["read_ranks"].tolist() == [9 + 3 * (attention + mlp) - x for x in (0, 54, 85, 139, 170, 224, 255)]
    assert record["read_dim"][6] == 9
    assert record["live_dim"].tolist() == [3, 15, 20, 24, 24, 24, 9]
    assert record["unread_dim"][6] == 15
    assert record["oversubscription"][6].item() == pytest.approx(54 / 24)


def test_live_needs_more_than_two_large_spaces() -> None:
    """Half the stream is written, the other half read: nothing passes, although neither half is small."""
    model, never, _ = planted(2, 12, 0, 0)
    projection = torch.eye(D, dtype=torch.float64) - never @ never.T
    complement = torch.linalg.svd(projection)[0][:, :12]
    model = plant(model, never_written=never, unread_from={0: complement})
    record = Bandwidth()(vw.open(model))
    assert record["written_dim"].tolist() == [12] * 7
    assert record["read_dim"].tolist() == [12] * 7
    assert record["live_dim"].tolist() == [0] * 7


def test_one_reader_blind_to_one_writer_is_the_only_independent_pair() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        written = torch.linalg.qr(model.model.layers[0].self_attn.o_proj.weight[:, 4:8])[0]  # L0H1
        _blind(attention.k_proj.weight[8:12], model.model.layers[1].input_layernorm.weight, written)  # L1H2.K
    record = Subspaces("O", "K")(vw.open(model))
    assert figures(record).independent == 1
    pair = next(record.top(1, by="independent").rows())
    assert (pair["first"], pair["second"]) == ("L0H1.O", "L1H2.K")
    assert pair["angle"] == pytest.approx(torch.pi / 2, abs=1e-6)
    assert figures(Subspaces("O", "V")(vw.open(model))).independent == 0


def test_subspaces_that_share_only_zero_are_not_independent() -> None:
    """A 4-dimensional write and a 4-dimensional read of R^24 meet in 0, at random; the reader still sees the writer."""
    record = Subspaces("O", "Q")(vw.open(tiny("llama-full", dtype=torch.float64)))
    angles = record["angle"][~record["angle"].isnan()]
    assert float(angles.min()) > 1e-3
    assert figures(record).independent == 0


def test_a_reader_of_one_writer_alone_reaches_the_bound() -> None:
    """W_K^T = W_O of a writer, up to the gain: the same subspace; with equal gains the bound is reached."""
    model = tiny("llama-full", dtype=torch.float64)
    attention, first = model.model.layers[1].self_attn, model.model.layers[0].self_attn
    gain = model.model.layers[1].input_layernorm.weight
    with torch.no_grad():
        written = torch.linalg.qr(first.o_proj.weight[:, :4])[0]
        attention.k_proj.weight[:4] = written.T / gain
        attention.q_proj.weight[:4] = torch.linalg.qr(attention.q_proj.weight[:4].T)[0].T / gain
    rows = {(r["first"], r["second"]): r for r in Subspaces("O", "K")(vw.open(model)).rows()}
    pair = rows["L0H0.O", "L1H0.K"]
    assert pair["overlap"] == pytest.approx(1)
    assert pair["tightness"] == pytest.approx(1)
    assert max(r["tightness"] for key, r in rows.items() if key != ("L0H0.O", "L1H0.K")) < 0.99
