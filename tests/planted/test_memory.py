"""Planted truth: neurons and heads that are known to clear, copy or erase, and whom; the wrong direction is noticed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import D, frame, plant_head, plant_neuron, quiet
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.analysis.memory.clearing import Clearing
from virtual_weights.analysis.memory.erasure import Erasure
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.memory.neurons import Neurons, census


@given(st.integers(0, 39), st.floats(0.1, 3), st.integers(0, 10**6))
def test_a_clearing_neuron_is_found_with_its_gain(neuron: int, gain: float, seed: int) -> None:
    """w_out = -g w_in/||w_in||^2 has cosine -1 and clearing gain g, whatever ||w_in||; its mirror strengthens."""
    model, read = tiny("llama-full", dtype=torch.float64), 3 * frame(seed)[:, 0]
    plant_neuron(model, 1, neuron, read, -gain * read / read.square().sum())
    plant_neuron(model, 2, neuron, read, gain * read / read.square().sum())
    stream = vw.open(model)
    record = Neurons()(stream)
    clearing, strengthening = 40 + neuron, 80 + neuron
    assert record["cosine"][[clearing, strengthening]].tolist() == pytest.approx([-1, 1])
    assert record["gain"][[clearing, strengthening]].tolist() == pytest.approx([gain, -gain])
    assert (record["class"][clearing], record["class"][strengthening]) == ("weakening", "strengthening")
    assert record.top(1, largest=False)["neuron"] == (f"L1N{neuron}",)
    rest = Clearing(f"L1N{neuron}")(stream)["kept"]
    assert float(rest) == pytest.approx(abs(1 - gain))
    bare = Neurons()(vw.open(model, fold=False))
    assert float(bare["cosine"][clearing]) > -1 + 1e-4, "without the norm's gain the planted direction is another"


def test_planted_classes_are_counted_exactly() -> None:
    model, axes = tiny("llama-full", dtype=torch.float64), frame(1)
    for layer, signs in enumerate(([-1] * 30 + [1] * 10, [0] * 40, [1] * 25 + [0] * 15)):
        for neuron, sign in enumerate(signs):
            read = axes[:, neuron % D]
            plant_neuron(model, layer, neuron, read, sign * 0.8 * read + 0.6 * axes[:, (neuron + 1) % D])
    counts = census(Neurons()(vw.open(model)))
    assert (counts["weakening"], counts["strengthening"], counts["between"]) == (30, 35, 55)
    assert [row["weakening"] for row in counts["by_layer"]] == [30, 0, 0]
    edge = census(Neurons(0.81)(vw.open(model)))
    assert (edge["weakening"], edge["strengthening"]) == (0, 0)


def test_planted_heads_are_told_apart() -> None:
    """One head copies, one erases, one turns a plane, one does half of each; a cleared direction is shown."""
    model, axes = quiet(), frame(2)
    a = axes[:, :4]
    turn = torch.tensor([[0.0, -1], [1, 0]], dtype=torch.float64)
    cores = {
        0: torch.eye(4, dtype=torch.float64),
        1: -torch.eye(4, dtype=torch.float64),
        2: torch.block_diag(turn, turn),
        3: torch.diag(torch.tensor([2.0, 1, -1, -0.5], dtype=torch.float64)),
    }
    for head, core in cores.items():
        plant_head(model, 1, head, a @ core @ a.T)
    stream = vw.open(model)
    heads = HeadErasers(draws=2)(stream)
    names = ("negative_share", "copying", "complex_share", "trace", "kept", "most_negative", "most_positive")
    rows = {i: [pytest.approx(float(heads[n][6 + i]), abs=1e-8, nan_ok=True) for n in names] for i in range(4)}
    nan = float("nan")
    assert rows[0] == [0, 1, 0, 4, 2, nan, 1]
    assert rows[1] == [1, -1, 0, -4, 0, -1, nan]
    assert rows[2][2:5] == [1, 0, 2**0.5]
    assert rows[3] == [1.5 / 4.5, 1.5 / 4.5, 0, 1.5, 0, -1, 2]
    assert (~heads["copying"].isnan()).sum() == 4, "heads that write nothing have no shares"
    assert (heads["strength"] > 0).sum() == 4
    assert heads.top(1, "negative_share")["head"] == ("L1H1",)
    spectrum, (_, directions) = Clearing("L1H3")(stream), Clearing("L1H3").modes(stream)
    assert spectrum["real"].tolist() == pytest.approx([-1, -0.5, 1, 2])
    assert abs(float(directions[:, 0].real @ a[:, 2])) == pytest.approx(1)
    assert Clearing("L1H3", scalar=0.5)(stream)["real"].tolist() == pytest.approx([-1, -2, 2, 4])


def test_a_head_that_copies_tokens_is_found_though_it_turns_the_stream() -> None:
    """Embeddings live in one plane set, unembeddings read another: OV moves the first onto the second."""
    model, axes = quiet("llama-grouped-untied"), frame(3)
    with torch.no_grad():
        codes = torch.randn(37, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        model.model.embed_tokens.weight.copy_(codes @ axes[:, :4].T)
        model.lm_head.weight.copy_(codes @ axes[:, 4:8].T / model.model.norm.weight)
    attention, gain = model.model.layers[1].self_attn, model.model.layers[1].input_layernorm.weight
    with torch.no_grad():
        attention.v_proj.weight[:4] = axes[:, :4].T / gain  # the key/value head of query heads 0 to 2
        attention.o_proj.weight[:, :4] = axes[:, 4:8]
        attention.o_proj.weight[:, 4:8] = -axes[:, 4:8]
    heads = HeadErasers(draws=2)(vw.open(model))
    assert heads["token_copying"][[6, 7]].tolist() == pytest.approx([1, -1])
    assert heads["trace"][[6, 7]].tolist() == pytest.approx([0, 0], abs=1e-9)


def test_erasure_knows_who_erases_whom_and_in_which_direction() -> None:
    """L0H0 reads b and writes a; L1H1 erases a, L1H2 strengthens a, L2H0 erases b (which L0H0 only reads)."""
    model, axes = quiet(), frame(4)
    a, b = axes[:, :2], axes[:, 2:4]
    plant_head(model, 0, 0, 5 * a @ b.T)
    plant_head(model, 1, 1, -0.75 * a @ a.T)
    plant_head(model, 1, 2, 0.5 * a @ a.T)
    plant_head(model, 2, 0, -b @ b.T)
    plant_head(model, 2, 1, -a[:, :1] @ a[:, :1].T)
    plant_head(model, 2, 2, 3 * b @ a.T)
    record = Erasure()(vw.open(model))

    def erased(eraser: str, writer: str) -> float:
        return float(record["erasure"][record.axis("reader").index(eraser), record.axis("writer").index(writer)])

    assert erased("L1H1", "L0H0") == pytest.approx(0.75)
    assert erased("L1H2", "L0H0") == pytest.approx(-0.5)
    assert erased("L2H0", "L0H0") == pytest.approx(0, abs=1e-9), "a transposed writer would be erased by it"
    assert erased("L2H1", "L0H0") == pytest.approx(0.5), "one of two directions"
    assert erased("L2H2", "L0H0") == pytest.approx(0, abs=1e-9), "moved elsewhere, not taken away"
    assert erased("L2H1", "L1H1") == pytest.approx(0.5)
    assert erased("L0H0", "L1H1") != erased("L0H0", "L1H1"), "too early: absent"
    among_heads = [row for row in record.rows() if "H" in row["writer"] and row["erasure"] is not None]
    best = max(among_heads, key=lambda row: row["erasure"])
    assert (best["reader"], best["writer"]) == ("L1H1", "L0H0")


def test_erasure_of_what_an_mlp_and_an_embedding_wrote() -> None:
    """An MLP writes one direction, the embedding another; the heads after them take one off each."""
    model, axes = quiet(), frame(5)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.copy_(axes[:, :1] @ torch.ones(1, 40, dtype=torch.float64))
        model.model.embed_tokens.weight.copy_(torch.ones(37, 1, dtype=torch.float64) @ axes[:, 1:2].T)
    plant_head(model, 0, 3, -axes[:, :2] @ axes[:, :2].T)
    plant_head(model, 1, 3, -axes[:, :1] @ axes[:, :1].T)
    record = Erasure()(vw.open(model))
    columns = {name: record.axis("writer").index(name) for name in ("embed", "L0.mlp")}
    rows = [record.axis("reader").index(name) for name in ("L0H3", "L1H3")]
    assert record["erasure"][rows, columns["embed"]].tolist() == pytest.approx([1, 0], abs=1e-9)
    assert record["erasure"][rows, columns["L0.mlp"]].tolist() == pytest.approx([float("nan"), 1], nan_ok=True)


def test_an_ungated_mlp_erases_with_its_slope() -> None:
    model, axes = tiny("gpt2", dtype=torch.float64), frame(6)
    ones = torch.ones(D, dtype=torch.float64) / D**0.5
    v = axes[:, 0] - (axes[:, 0] @ ones) * ones
    v = v / v.norm()  # free of the mean, which LayerNorm takes away
    with torch.no_grad():
        early, late = model.transformer.h[0], model.transformer.h[2]
        early.mlp.c_proj.weight.copy_(torch.ones(96, 1, dtype=torch.float64) @ v[None])
        late.mlp.c_fc.weight.copy_((v / late.ln_2.weight)[:, None] @ torch.ones(1, 96, dtype=torch.float64))
        late.mlp.c_proj.weight.copy_(-torch.ones(96, 1, dtype=torch.float64) @ v[None] / 96)
    record = Erasure(slope=0.5, scalar=2.0)(vw.open(model))
    reader, writer = record.axis("reader").index("L2.mlp"), record.axis("writer").index("L0.mlp")
    expected = 0.25 * float(v @ (v - v.mean()))
    assert float(record["erasure"][reader, writer]) == pytest.approx(expected)
