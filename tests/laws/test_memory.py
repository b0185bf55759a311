"""Memory from weights: every figure against its naive dense twin, and the gauges under which it may not move."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from dense import seen
from hypothesis import given
from hypothesis import strategies as st
from regauge import rebased, rotated
from tiny_models import SHAPES, tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.memory.clearing import Clearing
from virtual_weights.analysis.memory.erasure import Erasure, _eraser_batches, _writer_batches
from virtual_weights.analysis.memory.head_erasers import HeadErasers, token_circuit
from virtual_weights.analysis.memory.neurons import Neurons, census
from virtual_weights.linalg.null import cosine_tail

GAUGED = ["llama-grouped-untied", "llama-multi-query-tied", "gpt2", "neox-parallel-partial-rotary"]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("fold", [True, False])
def test_neurons_equal_the_definition(name: str, fold: bool) -> None:
    stream = vw.open(tiny(name), fold=fold)
    record = Neurons()(stream)
    port = "up" if stream.spec.gated else "in"
    n = sizes(stream).d_mlp
    assert record.axis("neuron").labels[n + 1] == "L1N1"
    for row in (0, n - 1, n + 2):
        layer, i = divmod(row, n)
        read, out = (stream[f"L{layer}N{i}.{p}"].dense().double().flatten() for p in (port, "out"))
        assert math.isclose(record["cosine"][row], torch.cosine_similarity(read, out, 0), abs_tol=1e-9)
        assert math.isclose(record["gain"][row], -(read @ out), abs_tol=1e-9)
        if stream.spec.gated:
            gate = stream[f"L{layer}N{i}.gate"].dense().double().flatten()
            assert math.isclose(record["gate_cosine"][row], torch.cosine_similarity(gate, out, 0), abs_tol=1e-9)
            assert math.isclose(record["gate_gain"][row], -(gate @ out), abs_tol=1e-9)
            assert math.isclose(record["gate_up_cosine"][row], torch.cosine_similarity(gate, read, 0), abs_tol=1e-9)
    assert stream.spec.gated == ("gate_cosine" in {c.name for c in record.columns})


def test_neurons_are_those_of_transformers_own_modules() -> None:
    """Straight from the modules, without the stream: the up row with its norm's gain, and the down column."""
    model = tiny("mistral", dtype=torch.float64)
    layer = model.model.layers[1]
    up = layer.mlp.up_proj.weight * layer.post_attention_layernorm.weight
    gain = -(up * layer.mlp.down_proj.weight.T).sum(1)
    record = Neurons()(vw.open(model))
    torch.testing.assert_close(record["gain"][record["layer"] == 1], gain.detach())


@pytest.mark.parametrize("threshold", [0.2, 0.35])
def test_census_counts_what_the_columns_say(threshold: float) -> None:
    record = Neurons(threshold)(vw.open(tiny("llama-full")))
    counts, cosine = census(record), record["cosine"].tolist()
    assert counts["count"] == len(cosine) == 120
    assert counts["weakening"] == sum(c < -threshold for c in cosine) == record["class"].count("weakening") > 0
    assert counts["strengthening"] == sum(c > threshold for c in cosine) == record["class"].count("strengthening") > 0
    assert counts["between"] == record["class"].count("between")
    for name in ("count", "weakening", "strengthening", "between"):
        assert sum(row[name] for row in counts["by_layer"]) == counts[name]
    assert counts["gate"]["weakening"] == int((record["gate_cosine"] < -threshold).sum())
    assert counts["gate_up"]["strengthening"] == int((record["gate_up_cosine"] > threshold).sum())


def test_a_neuron_that_writes_nothing_has_strength_0_and_no_cosine() -> None:
    model = tiny("llama-full")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 3] = 0
    record = Neurons()(vw.open(model))
    assert record["class"][3] is None
    assert record.present()[3]
    assert [math.isnan(record["cosine"][3]), float(record["strength"][3])] == [True, 0.0]
    counts = census(record)
    assert (counts["absent"], counts["count"]) == (1, 119)
    assert math.isfinite(counts["null"]["shuffled"]["mean_square"])


@given(st.integers(2, 200), st.floats(0.001, 0.99))
def test_cosine_tail_is_the_integral_of_the_density(d: int, threshold: float) -> None:
    """Simpson's rule over the angle: P(c > t) = int_0^arccos(t) sin^(d-2) / int_0^pi sin^(d-2)."""

    def integral(end: float) -> float:
        angle = torch.linspace(0, end, 4001, dtype=torch.float64)
        weight = torch.tensor([1.0] + [4.0, 2.0] * 1999 + [4.0, 1.0], dtype=torch.float64)
        return float((angle.sin().pow(d - 2) * weight).sum()) * end / 12000

    assert math.isclose(cosine_tail(threshold, d), integral(math.acos(threshold)) / integral(math.pi), rel_tol=1e-6)


def test_cosine_tail_at_known_points() -> None:
    assert [cosine_tail(t, 3) for t in (0.0, 0.1, 0.7)] == pytest.approx([0.5, 0.45, 0.15])  # uniform on the sphere
    assert cosine_tail(0.5, 2) == pytest.approx(1 / 3)  # an angle below 60 degrees, of 180
    assert cosine_tail(2 / 576**0.5, 576) == pytest.approx(0.0228, abs=3e-4)  # nearly Gaussian: two deviations
    assert 0 < cosine_tail(0.5, 576) < 1e-30
    assert cosine_tail(1e-9, 4096) == pytest.approx(0.5, abs=1e-7)
    for bad in ((1.0, 8), (-0.1, 8), (0.5, 1)):
        with pytest.raises(vw.VirtualWeightsError, match="expected"):
            cosine_tail(*bad)


def test_nulls_of_neurons_are_calibrated_on_random_weights() -> None:
    """Unrelated in and out rows: counts and mean square as both nulls say; related ones far from them."""
    model = tiny("llama-full", seed=2)
    counts = census(Neurons(0.3, shuffles=40)(vw.open(model)))
    null = counts["null"]
    assert null["dimension"] == 24
    assert null["weakening"] == null["strengthening"] == pytest.approx(120 * cosine_tail(0.3, 24))
    assert abs(counts["weakening"] - null["weakening"]) < 4 * null["std"]
    assert abs(null["shuffled"]["strengthening"] - null["strengthening"]) < null["std"]
    assert counts["mean_square"] == pytest.approx(1 / 24, rel=0.4)
    assert null["shuffled"]["mean_square"] == pytest.approx(null["mean_square"], rel=0.2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(layer.mlp.up_proj.weight.T)
    aligned = census(Neurons(0.3, shuffles=40)(vw.open(model)))
    assert aligned["strengthening"] > 100
    assert aligned["null"]["shuffled"]["strengthening"] < 20


def _spectrum(matrix: Tensor, k: int) -> Tensor:
    """The k eigenvalues of largest modulus of a dense matrix."""
    values = torch.linalg.eigvals(matrix)
    return values[values.abs().argsort(descending=True)[:k]]


@pytest.mark.parametrize("name", SHAPES)
def test_head_eigenvalues_equal_dense(name: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    record = HeadErasers(scalar=2.0, draws=2)(stream)
    embed, unembed = seen(stream, "embed").dense(), seen(stream, "unembed").dense()
    for i in (0, sizes(stream).n_heads + 1):
        ov = stream[record.axis("head").labels[i]].ov.dense()
        eigenvalues = _spectrum(ov, sizes(stream).d_head)
        total, real = eigenvalues.abs().sum(), eigenvalues.real
        expected = {
            "negative_share": -real[real < 0].sum() / total,
            "copying": real.sum() / total,
            "complex_share": eigenvalues.imag.abs().sum() / total,
            "most_negative": real.min() if real.min() < 0 else torch.tensor(float("nan"), dtype=torch.float64),
            "most_positive": real.max() if real.max() > 0 else torch.tensor(float("nan"), dtype=torch.float64),
            "trace": ov.trace(),
            "trace_z": ov.trace() * stream.d_model**0.5 / ov.norm(),
            "kept": (1 + eigenvalues / 2).abs().min(),
            "strength": ov.norm(),
        }
        tokens = _spectrum(unembed @ ov @ embed, sizes(stream).d_head)
        expected["token_copying"] = tokens.real.sum() / tokens.abs().sum()
        expected["token_negative_share"] = -tokens.real.clamp(max=0).sum() / tokens.abs().sum()
        assert set(expected) == {c.name for c in record.columns}
        for column, value in expected.items():
            torch.testing.assert_close(record[column][i], value, rtol=1e-7, atol=1e-9, equal_nan=True, msg=column)


def test_token_circuit_folds_the_final_norm_as_the_stream_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    five_tokens = 8 * 24 * 5  # chunks of 5 of 37 tokens
    monkeypatch.setattr("virtual_weights.analysis.memory.head_erasers.WORKSPACE_BYTES", five_tokens)
    embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
    read = (unembed - unembed.mean(0)) * model.model.norm.weight
    for fold, rows in ((True, read), (False, unembed)):
        circuit = token_circuit(vw.open(model, fold=fold))
        torch.testing.assert_close(circuit, (embed.T @ rows).detach())


def test_null_of_heads_is_calibrated_on_random_heads() -> None:
    record = HeadErasers(draws=200)(vw.open(tiny("llama-full", seed=4)))
    for name in ("negative_share", "copying"):
        null, shares = record.stamp["null"][name], record[name]
        assert abs(float(shares.mean()) - null["mean"]) < 4 * null["std"] / len(shares) ** 0.5
        assert 0.5 < float(shares.std()) / null["std"] < 1.6
    assert abs(float(record["trace_z"].mean())) < 1
    assert 0.5 < float(record["trace_z"].std()) < 1.6


@pytest.mark.parametrize("component", ["L1H2", "L0.mlp", "L1N5"])
@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2"])
def test_clearing_spectrum_is_that_of_the_dense_update(name: str, component: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    part = stream[component]
    dense = part.ov.dense() / 2 if component.endswith("H2") else part.out.dense() @ part.up.dense() * 0.7 / 2
    question = Clearing(component, scalar=2.0, slope=0.7)
    record, (values, directions) = question(stream), question.modes(stream)
    eigenvalues = torch.complex(record["real"], record["imaginary"])
    expected = _spectrum(dense, len(eigenvalues))
    assert torch.allclose((1 + eigenvalues).abs().prod(), (1 + expected).abs().prod())
    assert torch.equal(record["kept"], record["kept"].sort().values)
    assert record.stamp["further_zeros"] == stream.d_model - len(eigenvalues)
    torch.testing.assert_close(eigenvalues, values)
    torch.testing.assert_close(dense.to(values.dtype) @ directions, directions * values, rtol=0, atol=1e-8)
    if component.endswith("N5"):
        neuron = sizes(stream).d_mlp + 5
        gain = Neurons()(stream)["gain"][neuron]
        assert math.isclose(eigenvalues.real, -0.35 * gain, rel_tol=1e-9)


def _erasure(stream: vw.Stream, scalar: float, slope: float, *, transposed: bool = False) -> Tensor:
    """Straight from the definition, every map dense: -tr(O_i^T T_j O_i) / ||O_i||^2, NaN where j comes too early."""
    writers = [c for c in stream.components if c.kind in ("embed", "pos", "head", "mlp")]
    erasers = [c for c in stream.components if c.kind == "head" or (c.kind == "mlp" and not stream.spec.gated)]
    shares = torch.full((len(erasers), len(writers)), float("nan"), dtype=torch.float64)
    for i, writer in enumerate(writers):
        part = seen(stream, str(writer.label))
        o = (part.ov if writer.kind == "head" else part.out if writer.kind == "mlp" else part).dense().double()
        o = o.T if transposed and writer.kind == "head" else o
        for j, eraser in enumerate(erasers):
            if writer.writes <= eraser.reads:
                acts = stream[str(eraser.label)]
                t = acts.ov.dense().double() if eraser.kind == "head" else slope * (acts.out @ acts.up).dense().double()
                shares[j, i] = -(o.T @ t @ o).trace() / scalar / o.square().sum()
    return shares


@pytest.mark.parametrize("name", SHAPES)
def test_erasure_equals_dense(name: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    record = Erasure(scalar=3.0, slope=0.5)(stream)
    torch.testing.assert_close(record["erasure"], _erasure(stream, 3.0, 0.5), rtol=1e-8, atol=1e-10, equal_nan=True)
    assert record.axis("writer").labels[0] == "embed"
    assert ("L1.mlp" in record.axis("reader").labels) == (not stream.spec.gated)
    wrong = _erasure(stream, 3.0, 0.5, transposed=True)
    assert (record["erasure"] - wrong).abs().nan_to_num().max() > 1e-2


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_erasure_in_small_blocks_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of erasers and one wide writer at a time, in chunks of columns."""
    stream = vw.open(tiny(name, dtype=torch.float64))
    whole = Erasure()(stream)
    monkeypatch.setattr("virtual_weights.analysis.maps.map_side.WORKSPACE_BYTES", 8 * 24 * 7)
    steps: list[tuple[float, float]] = []
    small = Erasure(memory_mb=1)
    for batches in (_eraser_batches, _writer_batches):
        one_byte = partial(lambda make, stream, groups, budget: make(stream, groups, 1), batches)
        monkeypatch.setattr(f"virtual_weights.analysis.memory.erasure.{batches.__name__}", one_byte)
    _same(whole, small(stream, lambda done, total: steps.append((done, total))))
    erasing = stream.spec.n_layers * (1 if stream.spec.gated else 2)
    wide = stream.spec.n_layers + 1 + ("pos" in stream.groups)
    assert steps[-1] == (erasing * (wide + 1),) * 2
    assert len(steps) == steps[-1][1]


def test_null_of_erasure_is_that_of_turned_erasers() -> None:
    """Turn an eraser's own basis at random many times: mean and deviation of e are baseline and (e - baseline)/z."""
    stream = vw.open(tiny("gpt2", dtype=torch.float64))
    record = Erasure()(stream)
    generator = torch.Generator().manual_seed(0)
    turns = torch.linalg.qr(torch.randn(4000, 24, 24, generator=generator, dtype=torch.float64))[0]
    for writer, eraser, transform in (("L0H1", "L2H3", "ov"), ("L0.mlp", "L1.mlp", "mlp"), ("pos", "L1H0", "ov")):
        j, i = record.axis("reader").index(eraser), record.axis("writer").index(writer)
        part = stream[eraser]
        t = part.ov.dense() if transform == "ov" else (part.out @ part.up).dense()
        w = seen(stream, writer)
        o = w.dense() if writer == "pos" else w.ov.dense() if "H" in writer else w.out.dense()
        p = o @ o.T
        draws = -(turns @ t @ turns.mT * p).sum((1, 2)) / p.trace()
        e, baseline, z = (float(record[name][j, i]) for name in ("erasure", "baseline", "z"))
        deviation = (e - baseline) / z
        assert abs(float(draws.mean()) - baseline) < 4 * deviation / 4000**0.5
        assert deviation == pytest.approx(float(draws.std()), rel=0.06)
        s = (t + t.T) / 2
        assert float(record["alignment"][j, i]) == pytest.approx(float(-(p * s).sum() / (p.norm() * s.norm())))


def test_scale_free_columns_do_not_move_with_the_norm_scalar() -> None:
    stream = vw.open(tiny("gpt2"))
    one, two = Erasure()(stream), Erasure(scalar=4.0)(stream)
    for name in ("alignment", "z"):
        torch.testing.assert_close(one[name], two[name], equal_nan=True)
    torch.testing.assert_close(one["erasure"], 4 * two["erasure"], equal_nan=True)
    turned = Erasure(slope=-1.0)(stream)
    row = one.axis("reader").index("L1.mlp")
    for name in ("erasure", "baseline", "alignment", "z"):
        torch.testing.assert_close(one[name][row], -turned[name][row], equal_nan=True)


@pytest.mark.parametrize("name", GAUGED)
def test_unchanged_when_heads_are_rebased(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    before, after = vw.open(model), vw.open(rebased(model, seed=3))
    assert not torch.allclose(before.weight("v", "L1.attn"), after.weight("v", "L1.attn"), atol=1e-2)
    for question in (Erasure(), HeadErasers(draws=2), Clearing("L1H1")):
        _same(question(before), question(after))


@pytest.mark.parametrize("name", ["llama-grouped-untied", "qwen2", "mistral"])
def test_unchanged_when_the_stream_of_a_folded_rmsnorm_is_rotated(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    before, after = vw.open(model), vw.open(rotated(model, seed=5))
    for question in (Neurons(), Erasure(), Clearing("L1H1"), Clearing("L1.mlp")):
        _same(question(before), question(after))
    heads = [HeadErasers(draws=2)(s) for s in (before, after)]
    for column in heads[0].columns:
        if not column.name.startswith("token"):  # the turned copy keeps its final norm, which is not folded there
            torch.testing.assert_close(column.values, heads[1][column.name], equal_nan=True)


def test_unchanged_when_neurons_change_places() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    before = vw.open(model)
    first = [census(Neurons(0.3, shuffles=0)(before)), Erasure()(before), Clearing("L1.mlp")(before)]
    with torch.no_grad():
        for block in model.transformer.h:
            order = torch.randperm(block.mlp.c_fc.nf, generator=torch.Generator().manual_seed(1))
            block.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[:, order])
            block.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[order])
    after = vw.open(model)
    second = [census(Neurons(0.3, shuffles=0)(after)), Erasure()(after), Clearing("L1.mlp")(after)]
    assert first[0] | {"mean_square": 0} == second[0] | {"mean_square": 0}
    for one, two in zip(first[1:], second[1:], strict=True):
        _same(one, two)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Neurons(1.0),
        lambda: Neurons(shuffles=-1),
        lambda: HeadErasers(scalar=0.0),
        lambda: HeadErasers(draws=1),
        lambda: Clearing("L0H0", scalar=-1.0),
        lambda: Erasure(scalar=float("nan")),
        lambda: Clearing("L0H0.V")(vw.open(tiny("gpt2"))),
        lambda: Clearing("embed")(vw.open(tiny("gpt2"))),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        wrong()


def test_a_partial_checkpoint_is_asked_only_what_it_holds() -> None:
    model = tiny("llama-grouped-untied")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "embed" not in name and "mlp" not in name}
    stream = vw.open(tensors, config=model.config.to_dict(), partial=True)
    heads = HeadErasers(draws=2)(stream)
    assert "token_copying" not in {c.name for c in heads.columns}
    assert "copying" in {c.name for c in heads.columns}
    part, whole = Erasure()(stream), Erasure()(vw.open(model))
    assert part.axis("writer").labels == tuple(str(c.label) for c in stream.heads)
    places = [whole.axis("writer").index(name) for name in part.axis("writer").labels]
    for column in part.columns:
        torch.testing.assert_close(column.values, whole[column.name][:, places], equal_nan=True)
    with pytest.raises(vw.VirtualWeightsError, match="no MLP"):
        Neurons()(stream)
    no_heads = {name: tensor for name, tensor in model.state_dict().items() if "self_attn" not in name}
    stream = vw.open(no_heads, config=model.config.to_dict(), partial=True)
    assert census(Neurons()(stream))["count"] == 120
    for question in (HeadErasers(), Erasure()):
        with pytest.raises(vw.VirtualWeightsError, match="no attention head"):
            question(stream)


def _same(one: vw.Record, two: vw.Record) -> None:
    for column in one.columns:
        if isinstance(column.values, Tensor):
            torch.testing.assert_close(column.values, two[column.name], rtol=1e-6, atol=1e-7, equal_nan=True)
        else:
            assert column.values == two[column.name]
