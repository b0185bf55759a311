"""Edges at the level of single neurons: against dense twins in float64, in every gauge, counted to the last pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from regauge import rebased, rotated
from tiny_models import tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.pairs.neuron_heads import HeadNeuron, NeuronHead
from virtual_weights.analysis.pairs.neuron_neuron import NeuronCosines, NeuronNeuron, NeuronReaders
from virtual_weights.atlas import Atlas, edges
from virtual_weights.linalg import haar_moments
from virtual_weights.linalg.cosines import BINS
from virtual_weights.record import Record
from virtual_weights.stream.question import asking

MODELS = ("llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary")


def neuron_ports(stream: vw.Stream) -> tuple[str, ...]:
    return ("up", "gate") if stream.spec.gated else ("in",)


def positions(stream: vw.Stream, kind: str, side: str) -> Tensor:
    """State that every head or neuron reads or writes, from the components."""
    times = sizes(stream).d_mlp if kind == "mlp" else 1
    return torch.tensor([getattr(c, side) for c in stream.components if c.kind == kind]).repeat_interleave(times)


def all_neurons(stream: vw.Stream, port: str) -> Tensor:
    """Every neuron's vector, (n, d) float64, layer by layer from its named map."""
    maps = [stream[f"L{layer}.mlp.{port}"].dense().double() for layer in range(stream.spec.n_layers)]
    return torch.cat([m.T if port == "out" else m for m in maps])


def circuit(stream: vw.Stream, head: str, port: str) -> Tensor:
    q, k, v, o = (stream[f"{head}.{each}"].dense().double() for each in "QKVO")
    return {"Q": k.T @ q, "K": q.T @ k, "V": o @ v, "O": o @ v}[port]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6, equal_nan=True)


def agree(record: Record, strength: Tensor, own: tuple[Tensor, Tensor], square: Tensor, d: int) -> None:
    """All columns from a dense strength, both Frobenius norms squared (neuron, head) and tr G^2 of the head."""
    mean, variance = haar_moments(own[0], own[0] ** 2, own[1], square, d)
    score = strength / (own[0] * own[1]).sqrt()
    close(record["score"], score)
    close(record["strength"], strength)
    close(record["null_ratio"], score * d**0.5)
    close(record["z"], (strength**2 - mean) / variance.sqrt())


@pytest.fixture(params=["whole", "ragged"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as they come, or a few neurons at a time and MLPs in pieces, as in a large model."""
    if request.param == "ragged":
        monkeypatch.setattr("virtual_weights.analysis.pairs.neuron_heads._ROWS", 7)
        monkeypatch.setattr("virtual_weights.analysis.maps.neuron_side._PIECE", 13)
        monkeypatch.setattr("virtual_weights.linalg.cosines._TILE", 16 * 32)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wide() -> nn.Module:
    """Large enough for threads to divide its products: with other sums, the last bits would differ."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "num_attention_heads": 2, "intermediate_size": 300, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=8))


BLOCKED = {
    "neurons": lambda **cost: NeuronCosines("up", 4, **cost),
    "one reader": lambda **cost: NeuronCosines("up", 4, "L2N7", **cost),
    "one writer": lambda **cost: NeuronCosines("gate", 4, None, "L0N7", **cost),
    "heads into neurons": lambda **cost: HeadNeuron("up", **cost),
    "neurons into heads": lambda **cost: NeuronHead("K", **cost),
    "one head": lambda **cost: NeuronHead("V", "L2H1", **cost),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", BLOCKED)
def test_no_bit_of_a_block_depends_on_what_is_computed_beside_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other or all together, in any order, on one thread or two, within any memory."""
    monkeypatch.setattr("virtual_weights.analysis.maps.neuron_side._PIECE", 200)
    stream, bits = vw.open(wide()), []
    for count, memory in ((1, 1), (2, 512)):
        torch.set_num_threads(count)
        question = BLOCKED[name](memory_mb=memory)
        work = [(question.basis, block) for block in question.blocks(stream)]
        for batches in ([work[::-1]], [[block] for block in work]):
            blocks = {block: tensors for batch in batches for _, block, tensors in question.compute(batch, stream)}
            assert set(blocks) == set(question.blocks(stream))
            bits.append(
                {(block, key): blocks[block][key].numpy().tobytes() for block in blocks for key in blocks[block]}
            )
    assert bits[0] == bits[1] == bits[2] == bits[3]
    assert "one" in name or "L2.mlp.200" in question.blocks(stream)


@pytest.mark.usefixtures("tiles")
def test_equal_edges_are_ordered_by_depth() -> None:
    """Vectors of four equal entries up to sign: cosines are multiples of a quarter, exactly, and many are equal."""
    model = tiny("llama-full")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for rows in (layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
                places = torch.rand(rows.shape, generator=generator).topk(4, dim=1).indices
                rows.copy_(torch.zeros(rows.shape).scatter_(1, places, torch.randn(40, 4, generator=generator).sign()))
    stream = vw.open(model, fold=False)
    cosine, _, _ = dense_cosines(stream, "up")
    neurons = [f"L{layer}N{i}" for layer in range(3) for i in range(40)]
    for record, side, other, dense in zip(
        three(stream, "up", 5), ("reader", "writer"), ("writer", "reader"), (cosine, cosine.T), strict=False
    ):
        order = dense.abs().nan_to_num(-1.0).sort(dim=1, descending=True, stable=True).indices[:, :5]
        expected = [(i, j) for i, row in enumerate(order.tolist()) for j in row if not dense[i, j].isnan()]
        ends = ([neurons.index(name.partition(".")[0]) for name in record[end]] for end in (side, other))
        assert list(zip(*ends, strict=True)) == expected


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_heads_into_neurons_equal_their_dense_twins(name: str, fold: bool) -> None:
    stream = vw.open(tiny(name), fold=fold)
    names = [str(c.label) for c in stream.heads]
    ovs = torch.stack([circuit(stream, head, "O") for head in names])
    reach = positions(stream, "mlp", "reads")[:, None] >= positions(stream, "head", "writes")
    for port in neuron_ports(stream):
        record, rows = HeadNeuron(port)(stream), all_neurons(stream, port)
        assert record.axis("head").labels == tuple(names)
        assert record.axis("neuron").labels[sizes(stream).d_mlp + 2] == f"L1N2.{port}"
        strength = torch.einsum("nd,hde->hne", rows, ovs).norm(dim=2).T.where(reach, torch.nan)
        square = (ovs.mT @ ovs).square().sum((1, 2))
        own = rows.square().sum(1)[:, None], ovs.square().sum((1, 2))
        agree(record, strength, own, square, stream.d_model)
        assert torch.equal(record["score"].isnan(), ~reach)
        assert all(column.values.dtype == torch.float32 for column in record.columns)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", MODELS)
def test_neurons_into_heads_equal_their_dense_twins(name: str) -> None:
    stream = vw.open(tiny(name))
    names = [str(c.label) for c in stream.heads]
    reach = positions(stream, "head", "reads")[:, None] >= positions(stream, "mlp", "writes")
    rows = all_neurons(stream, "out")
    for port in ("Q", "K", "V"):
        record = NeuronHead(port)(stream)
        readers = torch.stack([circuit(stream, head, port) for head in names])
        strength = torch.einsum("hde,ne->hnd", readers, rows).norm(dim=2).where(reach, torch.nan)
        square = (readers.mT @ readers).square().sum((1, 2))[:, None]
        own = rows.square().sum(1), readers.square().sum((1, 2))[:, None]
        agree(record, strength, own, square, stream.d_model)
        assert torch.equal(record["score"].isnan(), ~reach)
        shared = port != "Q" and sizes(stream).group > 1
        assert record.axis("head").groups == (tuple(c.kv_group for c in stream.heads) if shared else ())


def dense_cosines(stream: vw.Stream, port: str) -> tuple[Tensor, Tensor, Tensor]:
    """cos and product of all pairs, (readers, writers), NaN where the writer comes too late; and where it does not."""
    read, written = all_neurons(stream, port), all_neurons(stream, "out")
    reach = positions(stream, "mlp", "reads")[:, None] >= positions(stream, "mlp", "writes")
    product = read @ written.T
    cosine = product / read.norm(dim=1)[:, None] / written.norm(dim=1)
    return cosine.where(reach, torch.nan), product.where(reach, torch.nan), reach


def brute(cosine: Tensor, top: int) -> dict[int, list[float]]:
    """By row the largest cosines by modulus, with their sign."""
    rows = {}
    for i, row in enumerate(cosine):
        there = sorted(row[~row.isnan()].tolist(), key=abs, reverse=True)[:top]
        if there:
            rows[i] = there
    return rows


def three(stream: vw.Stream, port: str, top: int) -> list[Record]:
    """The writers of every reader, the readers of every writer, and the histogram, of one pass."""
    return asking(stream)([table(port, top) for table in (NeuronNeuron, NeuronReaders, NeuronCosines)])


def by(record: Record, side: str, labels: list[str]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for name, score, rank in zip(record[side], record["score"].tolist(), record["rank"].tolist(), strict=True):
        found.setdefault(labels.index(name), []).append(score)
        assert rank == len(found[labels.index(name)]), "ranks go up from 1"
    return found


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("top", [3, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_the_strongest_edges_are_those_of_brute_force(name: str, top: int) -> None:
    stream = vw.open(tiny(name))
    neurons = [f"L{layer}N{i}" for layer in range(stream.spec.n_layers) for i in range(sizes(stream).d_mlp)]
    for port in neuron_ports(stream):
        labels = {"reader": [f"{name}.{port}" for name in neurons], "writer": neurons}
        cosine, product, _ = dense_cosines(stream, port)
        readers, writers, _ = three(stream, port, top)
        for record, side, dense in ((readers, "reader", cosine), (writers, "writer", cosine.T)):
            expected, got = brute(dense, top), by(record, side, labels[side])
            assert list(got) == list(expected), "in order, and only those that have a partner"
            for i, scores in expected.items():
                assert got[i] == pytest.approx(scores, abs=1e-6)
            reader, writer = (
                torch.tensor([labels[each].index(x) for x in record[each]]) for each in ("reader", "writer")
            )
            close(record["score"], cosine[reader, writer])
            close(record["strength"], product[reader, writer])
            close(record["z"], cosine[reader, writer] * stream.d_model**0.5)
            assert torch.equal(record["magnitude"], record["score"].abs())


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", MODELS)
def test_the_histogram_counts_every_reaching_pair_once(name: str) -> None:
    stream = vw.open(tiny(name))
    for port in neuron_ports(stream):
        cosine, _, reach = dense_cosines(stream, port)
        record = NeuronCosines(port)(stream)
        there = cosine[reach]
        assert int(record["count"].sum()) == record.stamp["pairs"] == int(reach.sum())
        assert record["count"].dtype == torch.int64
        assert record.stamp["mean_square"] == pytest.approx(float(there.square().mean()), rel=1e-5)
        assert record.stamp["null_mean_square"] == 1 / stream.d_model
        expected = torch.histc(there, BINS, -1, 1)
        close_to_an_edge = ((there + 1) * BINS / 2).frac().sub(0.5).abs().gt(0.4999).sum()
        assert float((record["count"] - expected).abs().sum()) <= 2 * float(close_to_an_edge)
        assert float(record["expected"].sum()) == pytest.approx(int(reach.sum()))


def test_expected_counts_are_those_of_random_directions() -> None:
    """d = 24: the model's own rows are Gaussian, so its histogram is its null, up to chance."""
    record = NeuronCosines("in")(vw.open(tiny("gpt2"), fold=False))
    count, expected = record["count"].double(), record["expected"]
    wide = expected.reshape(-1, 10).sum(1)
    assert float((count.reshape(-1, 10).sum(1) - wide).abs().sum()) < 0.05 * record.stamp["pairs"]
    assert record.stamp["mean_square"] == pytest.approx(1 / 24, rel=0.1)
    assert record["low"].tolist() == pytest.approx([-1 + 0.01 * i for i in range(200)])
    assert record.axis("bin").labels[99:101] == ("-0.01 to 0.00", "0.00 to 0.01")


def tables(stream: vw.Stream) -> list[Tensor]:
    """What may not move: scores of all pairs, and the sorted signed cosines."""
    port = neuron_ports(stream)[-1]
    readers, writers, _ = three(stream, port, 4)
    heads = [HeadNeuron(port)(stream), *(NeuronHead(p)(stream) for p in ("Q", "K", "V"))]
    names = ("score", "strength", "z")
    return [readers["score"], writers["score"], *(record[name] for record in heads for name in names)]


@pytest.mark.parametrize("name", MODELS)
def test_no_edge_depends_on_a_gauge(name: str) -> None:
    model: nn.Module = tiny(name, dtype=torch.float64)
    expected = tables(vw.open(model))
    others = [rebased(model, 3)] + ([rotated(model, 4)] if name.startswith("llama") else [])
    for other in others:
        for found, before in zip(tables(vw.open(other)), expected, strict=True):
            torch.testing.assert_close(found, before, rtol=1e-3, atol=1e-5, equal_nan=True)
    bare = NeuronNeuron(neuron_ports(vw.open(model))[-1], 4)(vw.open(model, fold=False))
    assert float((bare["score"] - expected[0]).abs().max()) > 1e-3, "the norm's gain matters"


def test_neurons_without_direction_have_no_edge() -> None:
    model = tiny("llama-full")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 0
        model.model.layers[2].mlp.up_proj.weight[5] = 0
        model.model.layers[0].self_attn.o_proj.weight[:, 4:8] = 0
    stream = vw.open(model)
    readers, writers, cosines = three(stream, "up", 200)
    assert cosines.stamp["pairs"] == 40 * 40 * 3 - 80 - 80 + 1
    assert not {"L0N3"} & {*readers["writer"], *writers["writer"]}
    assert not {"L2N5.up"} & {*readers["reader"], *writers["reader"]}
    assert len(readers["reader"]) == len(writers["reader"]) == 40 * 40 * 3 - 80 - 80 + 1
    heads = HeadNeuron("up")(stream)
    assert heads["score"][85].isnan().all()
    assert heads["score"][:, 1].isnan().all()
    assert NeuronHead("V")(stream)["score"][:, 3].isnan().all()


def test_a_cosine_of_zero_is_an_edge_all_the_same() -> None:
    model = tiny("llama-full")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, 0] = 0
            layer.mlp.down_proj.weight[1:] = 0
    readers, writers, _ = three(vw.open(model), "up", 50)
    assert readers["score"].tolist() == [0.0] * (40 * 40 + 40 * 50)
    assert writers["rank"].tolist() == [*range(1, 51)] * 40 + [*range(1, 41)] * 40


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2"])
def test_one_neuron_or_head_is_the_same_cut_out_of_all(name: str) -> None:
    stream = vw.open(tiny(name))
    port = neuron_ports(stream)[0]
    heads, from_neurons = HeadNeuron(port)(stream), NeuronHead("K")(stream)
    n, h = heads.axis("neuron").index(f"L2N7.{port}"), heads.axis("head").index("L1H2")
    w = from_neurons.axis("neuron").index("L0N7")
    torch.testing.assert_close(HeadNeuron(port, f"L2N7.{port}")(stream)["z"], heads["z"][n : n + 1], equal_nan=True)
    one = HeadNeuron(port, "L2N7", "L1H2")(stream)
    assert (one.axis("neuron").labels, one.axis("head").labels) == ((f"L2N7.{port}",), ("L1H2",))
    torch.testing.assert_close(one["strength"][0, 0], heads["strength"][n, h])
    for reader in ("L1H2", "L1H2.K"):
        alone = NeuronHead("K", reader)(stream)
        assert alone.axis("head").labels == ("L1H2.K",)
        torch.testing.assert_close(alone["score"][0], from_neurons["score"][h], equal_nan=True)
    into = NeuronHead("K", writer="L0N7")(stream)
    torch.testing.assert_close(into["score"][:, 0], from_neurons["score"][:, w], equal_nan=True)
    cosine, _, _ = dense_cosines(stream, port)
    alone = NeuronNeuron(port, 6, reader="L2N7")(stream)
    assert set(alone["reader"]) == {f"L2N7.{port}"}
    assert alone["score"].tolist() == pytest.approx(brute(cosine, 6)[n], abs=1e-6)
    out = NeuronReaders(port, 6, writer="L0N7")(stream)
    assert out["score"].tolist() == pytest.approx(brute(cosine.T, 6)[w], abs=1e-6)
    assert out.axis("edge").labels == tuple("123456")


def test_progress_ends_where_all_is_done() -> None:
    stream = vw.open(tiny("neox-parallel-partial-rotary"))
    for question in (NeuronNeuron("in"), HeadNeuron("in"), NeuronHead("Q")):
        seen: list[tuple[float, float]] = []
        question(stream, lambda *at, seen=seen: seen.append(at))
        assert seen[-1][0] == seen[-1][1] > 0
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_atlas_keeps_them_and_answers(tmp_path: Path) -> None:
    stream = vw.open(tiny("llama-full"))
    atlas, tables = Atlas.create(tmp_path, stream.provenance), three(stream, "up", 5)
    for record in (*tables, HeadNeuron("up")(stream), NeuronHead("K")(stream)):
        kept = atlas.get(atlas.put(record))
        for column in record.columns:
            other = kept[column.name]
            if isinstance(other, Tensor):
                torch.testing.assert_close(other, column.values, rtol=0, atol=0, equal_nan=True)
            else:
                assert other == column.values
    rows = edges(atlas, "L2N7.up", question="neuron_edges", by="magnitude", top=5)
    there = [i for i, name in enumerate(tables[0]["reader"]) if name == "L2N7.up"]
    assert [row["writer"] for row in rows] == [tables[0]["writer"][i] for i in there]


def test_the_smallest_and_the_wrong() -> None:
    first = vw.open(tiny("neox-parallel-partial-rotary"))
    assert len(NeuronNeuron("in", reader="L0N0")(first)["score"]) == 0, "nothing writes before the first layer"
    assert math.isnan(HeadNeuron("in", "L0N0", "L0H0")(first)["score"]), "a parallel block does not hear its own heads"
    wrong = [
        (lambda: NeuronNeuron("Q"), "no neuron reads through port 'Q'"),
        (lambda: HeadNeuron("out"), "no neuron reads through port 'out'"),
        (lambda: NeuronHead("up"), "no head reads through port 'up'"),
        (lambda: NeuronNeuron(top=0), "top=0"),
        (lambda: NeuronNeuron("up")(first), "no port 'up'"),
        (lambda: NeuronNeuron("in", reader="L9N0")(first), "no neuron 'L9N0'"),
        (lambda: HeadNeuron("in", writer="L0H4")(first), "no head 'L0H4'"),
        (lambda: HeadNeuron("in", reader="L0N0.up")(first), "no neuron 'L0N0.up'"),
        (lambda: NeuronHead("Q", reader="L0H0.K")(first), "no head 'L0H0.K'"),
    ]
    for call, message in wrong:
        with pytest.raises(vw.VirtualWeightsError, match=message):
            call()
