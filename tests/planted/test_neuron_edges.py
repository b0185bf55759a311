"""Planted pairs of neurons and heads come first, with their sign, and only in the planted direction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.analysis.pairs.neuron_heads import HeadNeuron, NeuronHead
from virtual_weights.analysis.pairs.neuron_neuron import NeuronCosines, NeuronNeuron, NeuronReaders
from virtual_weights.stream.question import asking

D, WIDTH = 24, 4


def frame(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def plant_read(model: nn.Module, port: str, layer: int, neuron: int, row: Tensor) -> None:
    """Give a neuron this effective row of a port, with the norm folded."""
    block = model.model.layers[layer]
    with torch.no_grad():
        getattr(block.mlp, f"{port}_proj").weight[neuron] = row / block.post_attention_layernorm.weight


def plant_write(model: nn.Module, layer: int, neuron: int, column: Tensor) -> None:
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[:, neuron] = column


def plant_head(model: nn.Module, layer: int, head: int, name: str, matrix: Tensor) -> None:
    """Give a head these rows of Q, K or V (folded) or these columns of O; matrix is (4, 24)."""
    block, rows = model.model.layers[layer], slice(head * WIDTH, (head + 1) * WIDTH)
    projection = getattr(block.self_attn, f"{name}_proj").weight
    with torch.no_grad():
        if name == "o":
            projection[:, rows] = matrix.T
        else:
            projection[rows] = matrix / block.input_layernorm.weight


@given(
    writer=st.integers(0, 39),
    reader=st.integers(0, 39),
    sign=st.sampled_from([-1.0, 1.0]),
    port=st.sampled_from(["up", "gate"]),
    seed=st.integers(0, 10**6),
)
def test_a_planted_pair_of_neurons_is_first_with_its_sign(
    writer: int, reader: int, sign: float, port: str, seed: int
) -> None:
    """L0 writes what L2 reads, and L2 writes what L0 reads: only the first can reach; a transpose finds the second."""
    model, axes = tiny("llama-full", dtype=torch.float64), frame(seed)
    plant_write(model, 0, writer, 2 * axes[:, 0])
    plant_read(model, port, 2, reader, sign * 3 * axes[:, 0])
    plant_write(model, 2, reader, 5 * axes[:, 1])
    plant_read(model, port, 0, writer, 5 * axes[:, 1])
    stream = vw.open(model)
    questions = [table(port, 3) for table in (NeuronNeuron, NeuronReaders, NeuronCosines)]
    *tables, cosines = asking(stream)(questions)
    for record in tables:
        (best,) = record.top(1, "magnitude").rows()
        assert (best["reader"], best["writer"], best["rank"]) == (f"L2N{reader}.{port}", f"L0N{writer}", 1)
        assert best["score"] == pytest.approx(sign, abs=1e-6)
        assert best["strength"] == pytest.approx(6 * sign, rel=1e-6)
        assert best["z"] == pytest.approx(sign * D**0.5, rel=1e-6)
    assert int(cosines["count"][-1 if sign > 0 else 0]) == 1
    other = NeuronNeuron("gate" if port == "up" else "up", 1)(stream)
    assert float(other["magnitude"].max()) < 0.99, "the other port reads something else"


def test_neurons_of_one_layer_never_reach_each_other() -> None:
    model, axes = tiny("llama-full", dtype=torch.float64), frame(0)
    plant_write(model, 1, 4, axes[:, 0])
    plant_read(model, "up", 1, 5, axes[:, 0])
    assert float(NeuronNeuron("up")(vw.open(model))["magnitude"].max()) < 0.99
    plant_read(model, "up", 2, 5, axes[:, 0])
    best = NeuronNeuron("up")(vw.open(model)).top(1, "magnitude")
    assert (best["writer"], best["reader"]) == (("L1N4",), ("L2N5.up",))


def test_a_sequential_mlp_hears_its_own_heads_and_a_parallel_one_does_not() -> None:
    for name, heard in (("neox-sequential-no-attention-bias", True), ("neox-parallel-partial-rotary", False)):
        record = HeadNeuron("in")(vw.open(tiny(name)))
        own = record["score"][record.axis("neuron").index("L1N0.in"), record.axis("head").index("L1H0")]
        assert bool(own.isnan()) is not heard


@given(st.integers(0, 5), st.integers(0, 39), st.integers(0, 10**6))
def test_a_planted_head_to_neuron_edge_is_first(head: int, neuron: int, seed: int) -> None:
    """OV of rank 1 writes a and reads b. The neuron reading a is found; the one reading b would be, transposed."""
    model, axes = tiny("llama-full", dtype=torch.float64), frame(seed)
    a, b = axes[:, 0], axes[:, 1]
    plant_head(model, 0, head, "o", torch.outer(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), 2 * a))
    plant_head(model, 0, head, "v", torch.outer(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), 3 * b))
    plant_read(model, "up", 1, neuron, 0.5 * a)
    plant_read(model, "up", 2, neuron, 0.5 * b)
    record = HeadNeuron("up")(vw.open(model))
    (best,) = record.top(1).rows()
    assert (best["neuron"], best["head"]) == (f"L1N{neuron}.up", f"L0H{head}")
    assert best["score"] == pytest.approx(1, abs=1e-6)
    assert best["strength"] == pytest.approx(3, rel=1e-6)
    assert best["null_ratio"] == pytest.approx(D**0.5, rel=1e-6)
    assert record[f"L0H{head}", f"L2N{neuron}.up"]["score"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("port", ["Q", "K", "V"])
@pytest.mark.parametrize("head", [0, 5])
def test_a_planted_neuron_to_head_edge_is_first(port: str, head: int) -> None:
    """A rank-1 circuit reads a through the port and b through the other side: a neuron writing b is not heard."""
    model, axes = tiny("llama-full", dtype=torch.float64), frame(head)
    a, b = axes[:, 0], axes[:, 1]
    one = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    other = {"Q": "k", "K": "q", "V": "o"}[port]
    plant_head(model, 2, head, port.lower(), torch.outer(one, 2 * a))
    plant_head(model, 2, head, other, torch.outer(one, 3 * b))
    plant_write(model, 0, 11, 0.5 * a)
    plant_write(model, 1, 12, 0.5 * b)
    record = NeuronHead(port)(vw.open(model))
    (best,) = record.top(1).rows()
    assert (best["head"], best["neuron"]) == (f"L2H{head}.{port}", "L0N11")
    assert best["score"] == pytest.approx(1, abs=1e-6)
    assert best["strength"] == pytest.approx(3, rel=1e-6)
    at = record.axis("head").index(f"L2H{head}.{port}"), record.axis("neuron").index("L1N12")
    assert float(record["score"][at]) == pytest.approx(0, abs=1e-6)
    if port != "V":
        swapped = NeuronHead("K" if port == "Q" else "Q")(vw.open(model))["score"][at[0]]
        heard = [float(swapped[record.axis("neuron").index(name)]) for name in ("L0N11", "L1N12")]
        assert heard == pytest.approx([0, 1], abs=1e-6), "through the other port it hears the other neuron"


def test_query_heads_that_share_keys_are_one_group() -> None:
    """Three query heads share keys that read a: all three hear the neuron, and the axis calls them one group."""
    model, axes = tiny("llama-grouped-untied", dtype=torch.float64), frame(7)
    plant_head(model, 2, 1, "k", torch.outer(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), axes[:, 0]))
    plant_write(model, 1, 8, axes[:, 0])
    rows = list(NeuronHead("K")(vw.open(model)).top(3).rows())
    assert {(row["head"], row["head_group"], row["neuron"]) for row in rows} == {
        (f"L2H{i}.K", "L2.kv1", "L1N8") for i in (3, 4, 5)
    }
    assert all(row["score"] == pytest.approx(1, abs=1e-6) for row in rows)
