"""Composition against its naive dense twin, and the gauges under which it may not move."""

from __future__ import annotations

import pytest
import torch
from dense import dense_composition, dense_lift
from regauge import rebased, rotated
from tiny_models import SHAPES, in_float64, tiny

import virtual_weights as vw

PORTS = ("Q", "K", "V")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("fold", [True, False])
def test_composition_equals_dense_float64(name: str, fold: bool) -> None:
    model = tiny(name)
    stream = vw.open(model, fold=fold)
    for port in PORTS:
        record = vw.Composition(port)(stream)
        score, strength = dense_composition(stream, port)
        torch.testing.assert_close(record["score"], score, rtol=1e-6, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(record["strength"], strength, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", ["llama-grouped-untied", "neox-parallel-partial-rotary"])
@pytest.mark.parametrize("offset", [1, 7])
def test_composition_at_an_offset_equals_dense(name: str, offset: int) -> None:
    stream = vw.open(tiny(name))
    for port in ("Q", "K"):
        found = vw.Composition(port, rotary_offset=offset)(stream)
        torch.testing.assert_close(found["score"], dense_composition(stream, port, offset)[0], equal_nan=True)
        assert not torch.allclose(
            found["score"], vw.Composition(port)(stream)["score"], rtol=1e-3, atol=1e-4, equal_nan=True
        )
        assert found.stamp["rotary_offset"] == offset


def test_a_transposed_writer_would_be_noticed() -> None:
    """The dense twin with OV transposed must differ, or the comparison above could not fail."""
    stream = vw.open(tiny("llama-full"))
    right = vw.Composition("K")(stream)["score"]
    wrong, _ = dense_composition(stream, "K", transpose_writer=True)
    assert (right - wrong).abs().nan_to_num().max() > 1e-2


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_pairs_that_cannot_reach_are_absent(name: str) -> None:
    stream = vw.open(tiny(name))
    layers = torch.tensor([c.label.layer for c in stream.heads])
    unreachable = layers[None, :] >= layers[:, None]
    for port in PORTS:
        assert torch.equal(torch.isnan(vw.Composition(port)(stream)["score"]), unreachable)


@pytest.mark.parametrize(
    "name", ["llama-grouped-untied", "llama-multi-query-tied", "gpt2", "neox-parallel-partial-rotary"]
)
def test_unchanged_when_heads_are_rebased(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    before, after = vw.open(model), vw.open(rebased(model, seed=3))
    for port in PORTS:
        _same(vw.Composition(port)(before), vw.Composition(port)(after))
        _same(vw.Overlap(port)(before), vw.Overlap(port)(after))
    virtual = [vw.virtual_weight(s, "L0H1", "L1H3.K") for s in (before, after)]
    torch.testing.assert_close(vw.svd(virtual[0]).S, vw.svd(virtual[1]).S)


@pytest.mark.parametrize("name", ["llama-grouped-untied", "qwen2", "mistral"])
def test_unchanged_when_the_stream_of_a_folded_rmsnorm_is_rotated(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    before, after = vw.open(model), vw.open(rotated(model, seed=5))
    assert not torch.allclose(before.weight("o", "L1.attn"), after.weight("o", "L1.attn"), atol=1e-2)
    for port in PORTS:
        _same(vw.Composition(port)(before), vw.Composition(port)(after))
        _same(vw.Overlap(port)(before), vw.Overlap(port)(after))


def test_left_out_gains_change_the_score_and_the_record_says_so() -> None:
    model = tiny("llama-full")
    folded, bare = (vw.Composition("K")(vw.open(model, fold=fold)) for fold in (True, False))
    assert folded.stamp["norm"] == "gain folded, unembedding centred"
    assert bare.stamp["norm"] == "left out"
    assert (folded["score"] - bare["score"]).abs().nan_to_num().max() > 1e-3


def test_null_is_calibrated_on_random_weights() -> None:
    """Independent random maps: mean ratio about 1, z of mean about 0 and deviation about 1."""
    stream = vw.open(tiny("llama-full", seed=11))
    record = vw.Composition("V")(stream)
    z, ratio = (record[name][~torch.isnan(record[name])] for name in ("z", "null_ratio"))
    assert abs(float(ratio.square().mean()) - 1) < 0.1
    assert abs(float(z.mean())) < 0.5
    assert 0.6 < float(z.std()) < 1.6


def test_shared_keys_are_one_group() -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    axis = vw.Composition("K")(stream).axis("reader")
    assert axis.groups[3:9] == ("L0.kv1",) * 3 + ("L1.kv0",) * 3
    assert vw.Composition("Q")(stream).axis("reader").groups == ()
    overlap = vw.Overlap("K")(stream).axis("reader")
    assert overlap.labels[:3] == ("L0H0.K", "L0H3.K", "L1H0.K")


def test_float32_compute_is_close_and_said() -> None:
    stream = vw.open(tiny("gpt2"))
    exact, quick = vw.Composition("K", compute_dtype="float64")(stream), vw.Composition("K")(stream)
    null = stream.d_model**-0.5
    torch.testing.assert_close(exact["score"], quick["score"], rtol=0, atol=1e-6 * null, equal_nan=True)
    assert quick.stamp["compute_dtype"] == "float32"


@pytest.mark.parametrize("bad", [{"port": "O"}, {"compute_dtype": "float16"}])
def test_wrong_parameters_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        vw.Composition(**bad)


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_lift_and_main_effects_equal_their_definition(name: str) -> None:
    _, stream = in_float64(name)
    for port in stream.groups.ports:
        quick, dense = vw.Composition(port, writers="all")(stream), dense_lift(stream, port)
        exact = vw.Composition(port, writers="all", compute_dtype="float64")(stream)
        absent = exact["score"].isnan()
        for column, expected in dense.items():
            expected = expected.masked_fill(absent, torch.nan)
            torch.testing.assert_close(exact[column], expected, rtol=0, atol=1e-12, equal_nan=True)
            torch.testing.assert_close(quick[column], expected, rtol=0, atol=1e-5, equal_nan=True)


def test_lift_of_subspaces_is_that_of_their_projectors() -> None:
    _, stream = in_float64("llama-grouped-untied")
    record = vw.Overlap("V")(stream)
    first = record.axis("reader").labels
    reads = [vw.svd(stream[label.partition(".")[0]].ov).V for label in first]
    writes = [vw.svd(stream[label].ov).U for label in record.axis("writer").labels]
    r, w = (torch.stack([q[:, :4] @ q[:, :4].T / 4 for q in side]) for side in (reads, writes))
    product, heard, listening = (
        torch.einsum("rij,wij->rw", *pair) for pair in ((r, w), (r.mean(0, True), w), (r, w.mean(0, True)))
    )
    lift = (product * listening.mean() / (heard * listening)).log2()
    lift = lift.masked_fill(record["overlap"].isnan(), torch.nan)
    torch.testing.assert_close(record["lift"], lift, rtol=0, atol=1e-5, equal_nan=True)


def test_a_writer_that_most_readers_hear_has_a_main_effect_and_little_lift() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    hub, private = torch.eye(24, dtype=torch.float64)[:2]
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.fill_(1)
            keys = layer.self_attn.k_proj.weight
            keys -= (keys @ hub)[:, None] * hub + (keys @ private)[:, None] * private
            keys[:, 0] = 1.0
            if number == 2:
                keys[:4, 1] = 3.0  # head 0 alone reads what L0H1 writes
        out = model.model.layers[0].self_attn.o_proj.weight
        out[:, :4], out[:, 4:8] = hub[:, None], private[:, None]
    record = vw.Composition("K")(vw.open(model))
    heard, found = record["L0H0", "L2H3.K"], record["L0H1", "L2H0.K"]
    assert heard["writer_effect"] > 2
    assert abs(heard["lift"]) < 0.3
    assert found["lift"] > 2


def test_what_is_zero_has_no_lift_and_is_in_no_mean() -> None:
    model = tiny("llama-full", dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :4] = 0  # L0H0 writes nothing
    record = vw.Composition("K")(vw.open(model))
    lift, dead = record["lift"], record.axis("writer").labels.index("L0H0")
    assert bool(lift[:, dead].isnan().all())
    assert torch.equal(lift.isnan().sum(0)[1:], record["strength"].isnan().sum(0)[1:])


def _same(one: vw.Record, two: vw.Record) -> None:
    for column in one.columns:
        torch.testing.assert_close(one[column.name], two[column.name], rtol=1e-6, atol=1e-6, equal_nan=True)
