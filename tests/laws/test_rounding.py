"""Rounding is no effect: what is 0, nilpotent, orthogonal or isometric up to rounding is so in every figure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from planting import D, blank, frame, plant_head, plant_neuron
from tiny_models import ROPE, tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.analysis.channels.channel import summary
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons
from virtual_weights.analysis.pairs.composition import ComponentComposition
from virtual_weights.analysis.pairs.neuron_heads import HeadNeuron, NeuronHead
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.linalg import Dense, beyond_rounding, haar_moments, haar_tail, singular_values, standardised
from virtual_weights.linalg.decompose import product_eigen
from virtual_weights.linalg.null import draw_null

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def llama(d: int, k: int, heads: int, layers: int, **sizes: int) -> Any:
    config = transformers.LlamaConfig(
        **{"vocab_size": 40, "intermediate_size": 16, **sizes},
        hidden_size=d,
        head_dim=k,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_parameters=ROPE,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def jordan(k: int, basis: Tensor) -> Tensor:
    return basis @ torch.diag(torch.ones(k - 1, dtype=torch.float64), 1) @ torch.linalg.inv(basis)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_only_what_could_have_been_larger_is_rounding() -> None:
    values = torch.tensor([1e-16, -1e-16, 1e-3, float("nan")], dtype=torch.float64)
    torch.testing.assert_close(
        beyond_rounding(values, 1.0), torch.tensor([0.0, 0.0, 1e-3, float("nan")]).double(), equal_nan=True
    )
    assert beyond_rounding(values, 1e-13)[0] == 1e-16
    assert beyond_rounding(values, 1.0, eps=1e-3)[2] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 8, 16])
def test_every_eigenvalue_of_a_nilpotent_product_is_0(k: int, dtype: torch.dtype) -> None:
    """Also in an oblique basis, which makes it a hundred times more sensitive, and beside an identity."""
    axes, eps = frame(3, 4 * k), torch.finfo(dtype).eps
    turn, gains = frame(4, k), 1 + 0.3 * random(4 * k)

    def eigenvalues(core: Tensor) -> Tensor:
        read, write = core @ axes[:, :k].T / gains, axes[:, :k]
        return product_eigen(read.to(dtype).double() * gains.to(dtype).double(), write.to(dtype).double(), eps)

    assert not eigenvalues(jordan(k, turn)).any()
    assert not eigenvalues(jordan(k, turn + 0.3 * frame(5, k))).any()
    half = torch.block_diag(jordan(k // 2, torch.eye(k // 2).double()), torch.eye(k - k // 2).double())
    beside = eigenvalues(turn @ half @ turn.T)
    assert int((beside != 0).sum()) == k - k // 2
    torch.testing.assert_close(beside[beside != 0].real, torch.ones(k - k // 2).double(), atol=32 * eps, rtol=0)


def test_other_eigenvalues_stay_as_they_are() -> None:
    read, write = random(8, 32), random(32, 8, seed=1)
    values, expected = product_eigen(read, write), torch.linalg.eigvals(read @ write)
    torch.testing.assert_close(values.abs().sort().values, expected.abs().sort().values)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert product_eigen(turn @ frame(1)[:, :2].T, frame(1)[:, :2]).real.tolist() == [0, 0], (
        "it turns, and erases nothing"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nilpotent_head_has_no_shares_and_keeps_everything(dtype: torch.dtype) -> None:
    model, axes = tiny("llama-full", dtype=torch.float64), frame(2)
    turn = frame(6, 4)
    plant_head(model, 1, 0, axes[:, 4:8] @ axes[:, :4].T)
    plant_head(model, 1, 1, axes[:, :4] @ turn @ jordan(4, torch.eye(4).double()) @ turn.T @ axes[:, :4].T)
    plant_head(model, 1, 2, -axes[:, :2] @ axes[:, :2].T)
    heads = HeadErasers(draws=2)(vw.open(model.to(dtype)))
    for name in ("copying", "negative_share", "complex_share", "most_negative", "most_positive"):
        assert heads[name][6:8].isnan().all(), name
    assert heads["kept"][6:8].tolist() == [1, 1]
    assert heads.present()[6:8].all(), "it writes something: it has a row"
    assert heads["negative_share"][8] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_that_only_rounding_turns_around_is_an_eraser(dtype: torch.dtype) -> None:
    """Heads copy by a projector of rank 3 of 4; one neuron strengthens, the others write past what they read."""
    model, axes = blank(), frame(7)
    for layer in range(3):
        for head in range(6):
            basis = random(D, 3, seed=head)
            plant_head(model, layer, head, basis @ basis.T)
        for neuron in range(12):
            plant_neuron(model, layer, neuron, axes[:, neuron], axes[:, neuron + 12] if neuron else axes[:, 0])
    stream = vw.open(model.to(dtype))
    assert HeadErasers(draws=2)(stream)["most_negative"].isnan().all()
    neurons = Neurons()(stream)
    assert (neurons["gain"] != 0).sum() == 3
    (row,) = vw.Statements(only=("T6",))(stream).rows()
    assert row["verdict"] == "fails"


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_orthogonal_blocks_have_no_strength_and_no_rank(dtype: torch.dtype) -> None:
    """Every head reads and writes two dimensions of its own."""
    model, axes = llama(24, 2, 2, 4), frame(8)
    with torch.no_grad():
        for layer in model.model.layers:
            for head in range(2):
                rows = slice(2 * head, 2 * head + 2)
                layer.self_attn.v_proj.weight[rows] = axes[:, rows].T
                layer.self_attn.o_proj.weight[:, rows] = axes[:, rows]
    stream = vw.open(model.to(dtype))
    statements = {row["statement"]: row["verdict"] for row in vw.Statements(only=("C5", "L6"))(stream).rows()}
    assert statements == {"C5": "holds", "L6": "holds"}
    across, along = (summary(vw.Channel("L0H0", f"L1H{head}.V")(stream)) for head in (1, 0))
    names = ("score", "strength", "numerical_rank", "stable_rank", "entropy_rank", "participation_ratio")
    assert [across[name] for name in names] == [0] * 6
    assert along["numerical_rank"] == 2
    assert vw.Overlap("V")(stream)["overlap"][3, 0] == 0
    composition = vw.Composition("V")(stream)
    assert (composition["score"][3, 0], composition["strength"][3, 0]) == (0, 0)
    pairs = Subspaces("O", "V")(stream)
    assert [float(pairs[name][0, 3]) for name in ("overlap", "cosine", "strength", "independent")] == [0, 0, 0, 1]
    assert not ComponentComposition("L0H0", "L1H1.V")(stream)["strength"].any()


def test_c5_is_a_theorem_whatever_the_gains() -> None:
    """Projectors, of which some share a direction, with gains that rise where the overlap falls."""
    for seed in range(3):
        model, axes = blank(), frame(seed)
        for layer in range(3):
            for head in range(6):
                first = 4 * head if layer % 2 else 3 * head
                gain = 10.0 ** (head - 3)
                plant_head(model, layer, head, gain * axes[:, first : first + 4] @ axes[:, first : first + 4].T)
        (row,) = vw.Statements(only=("C5",))(vw.open(model)).rows()
        assert row["verdict"] == "holds", row["why"]


def test_a_product_of_orthogonal_maps_has_rank_0_and_a_small_one_keeps_its_own() -> None:
    axes = frame(9)
    read, write = Dense(axes[:, :4].T.clone()), Dense(axes[:, 4:8].clone())
    assert not singular_values(read @ write).any()
    small = Dense(1e-20 * axes[:, :4])
    torch.testing.assert_close(singular_values(read @ small), torch.full((4,), 1e-20).double(), rtol=1e-6, atol=0)


def test_no_z_without_a_null_in_any_question() -> None:
    """One head as wide as the stream with orthogonal maps: every orientation gives the same."""
    model = llama(16, 16, 1, 3)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for j, part in enumerate("qkvo"):
                layer.self_attn.get_submodule(f"{part}_proj").weight.copy_(frame(10 * i + j, 16))
    for dtype in DTYPES[:2]:
        stream = vw.open(model.to(dtype))
        for port in "QKV":
            for question in (vw.Composition, vw.Overlap):
                record = question(port)(stream)
                assert record["z"].isnan().all(), (question, port)
                assert int(record.present().sum()) == 3
            assert vw.Channel("L0H0", f"L1H0.{port}")(stream).stamp["z"] is None
        assert ComponentComposition("L0H0", "L1H0.V")(stream)["z"].isnan().all()
        assert Subspaces("O", "V")(stream)["z"].isnan().all()
        assert HeadNeuron("up")(stream)["z"].isnan().all()
        assert NeuronHead("V")(stream)["z"].isnan().all()
        assert vw.Erasure()(stream).select("writer", ["L0H0"])["z"].isnan().all()
        (row,) = vw.Statements(only=("C1",))(stream).rows()
        assert row["verdict"] == "cannot tell"


@pytest.mark.parametrize(("k", "d", "uneven"), [(1, 64, False), (2, 32, False), (8, 16, False), (4, 24, True)])
def test_the_tail_of_chance_is_that_of_seeded_draws(k: int, d: int, uneven: bool) -> None:
    gains = torch.logspace(0, -1, k, dtype=torch.float64) if uneven else torch.ones(k, dtype=torch.float64)
    read, write = Dense(gains[:, None] * random(k, d)), Dense(random(d, k, seed=1) * gains)
    draws = draw_null(read, write, 20_000, seed=2)
    moments = [tuple((singular_values(m) ** (2 * n)).sum() for n in (1, 2, 3)) for m in (read, write)]
    p = haar_tail(draws, *moments, d)
    for level in (0.1, 0.01, 0.001):
        share = float((p < level).double().mean())
        assert share < level + 4 * (level / len(draws)) ** 0.5 + 0.15 * level, level
        assert level == 0.001 or share > 0.7 * level
    z = standardised(draws, *haar_moments(moments[0][0], moments[0][1], moments[1][0], moments[1][1], d))
    normal = torch.special.erfc(z / 2**0.5) / 2
    assert k == 8 or float((normal < 0.001).double().mean()) > 0.003, "a normal law would claim too much"


def test_random_models_do_not_talk_beyond_chance() -> None:
    held = 0
    for seed in range(8):
        model = llama(32, 2, 16, 6)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) if weight.ndim == 2 else 1.0)
        (row,) = vw.Statements(only=("C1",))(vw.open(model)).rows()
        held += row["verdict"] == "holds"
    assert held <= 1
