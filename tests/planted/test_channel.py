"""Planted truth: channels whose tokens, blocks, components and offsets are known; swapped sides are noticed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planting import HEADS, TOKENS, WIDTH, blank, frame, plant_head, plant_qk, quiet
from torch import Tensor

import virtual_weights as vw
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens
from virtual_weights.analysis.channels.offsets import MeanCircuit, OffsetProfile
from virtual_weights.analysis.pairs.composition import ComponentComposition

tokens = st.integers(0, TOKENS - 1)


def nearest(record: vw.Record, directions: str, end: str, side: str) -> tuple[int, float]:
    """The nearest token of one direction on one side, and its cosine."""
    rows = [r for r in record.rows() if (*_of(r), r["place"]) == (directions, end, side, 1)]
    assert len(rows) == 1
    return rows[0]["token"], rows[0]["cosine"]


def vectors(model: Any) -> tuple[Tensor, Tensor]:
    """Unit rows of the unembedding, its norm folded and less their mean, and unit embeddings."""
    said = model.lm_head.weight.detach() * model.model.norm.weight.detach()
    said = said - said.mean(0)
    return torch.nn.functional.normalize(said, dim=1), torch.nn.functional.normalize(
        model.model.embed_tokens.weight.detach(), dim=1
    )


@given(tokens, tokens, st.floats(0.1, 10))
def test_a_head_that_says_one_token_on_seeing_another(says: int, sees: int, gain: float) -> None:
    model = quiet()
    said, seen = vectors(model)
    ov = gain * torch.outer(said[says], seen[sees])
    plant_head(model, 0, 1, ov)
    record = ChannelTokens("L0H1.ov", count=2)(vw.open(model))
    assert set(record["directions"]) == {"1"}, "a circuit of rank one has one direction"
    assert record["gain"].tolist() == pytest.approx([gain] * len(record["gain"]))
    assert nearest(record, "1", "written", "unembed") == (says, pytest.approx(1))
    assert nearest(record, "1", "read", "embed") == (sees, pytest.approx(1))
    assert abs(nearest(record, "1", "written", "embed")[1]) < 0.95
    assert abs(nearest(record, "1", "read", "unembed")[1]) < 0.95
    plant_head(model, 0, 1, ov.T)
    turned = ChannelTokens("L0H1.ov", count=2)(vw.open(model))
    assert abs(nearest(turned, "1", "written", "unembed")[1]) < 0.95
    assert nearest(turned, "1", "read", "unembed")[0] == says
    bare = ChannelTokens("L0H1.ov")(vw.open(model, fold=False))
    assert abs(nearest(bare, "1", "read", "unembed")[1]) < 1 - 1e-4, "without the norm's gain it is another direction"


def test_all_four_ends_of_a_virtual_weight() -> None:
    """A head sees token 3 and writes what says 5; a later head's keys hear 5 and match queries that embed 8."""
    model = quiet()
    said, seen = vectors(model)
    plant_head(model, 0, 1, 2 * torch.outer(said[5], seen[3]))
    plant_qk(model, 1, 2, 3 * torch.outer(-seen[8], said[5]))
    stream = vw.open(model)
    record = ChannelTokens("L0H1", "L1H2.K", count=1)(stream)
    assert nearest(record, "1", "source", "embed") == (3, pytest.approx(1))
    assert nearest(record, "1", "written", "unembed") == (5, pytest.approx(1))
    assert nearest(record, "1", "read", "unembed") == (5, pytest.approx(1))
    assert nearest(record, "1", "target", "embed") == (8, pytest.approx(-1)), "queries against token 8"
    qk = ChannelTokens("L1H2.qk", count=1)(stream)
    assert set(qk["end"]) == {"query", "key"}
    key, query = nearest(qk, "1", "key", "unembed"), nearest(qk, "1", "query", "embed")
    assert (key[0], query[0], key[1] * query[1]) == (5, 8, pytest.approx(-1)), "signs of both ends belong together"
    assert nearest(ChannelTokens("L0H1", "L1H2.Q", count=1)(stream), "1", "read", "unembed")[0] != 5
    embed = ChannelTokens("embed", "L0H1.V", count=1)(stream)
    assert set(embed["end"]) == {"written", "read", "target"}, "an embedding's source is a token, not a direction"


@pytest.mark.parametrize("close", [0.0, 0.004])
def test_equal_gains_are_one_block(close: float) -> None:
    """Three gains, two of them (nearly) equal: a token in their plane has cosine 1 to it, whatever the basis."""
    model, a, b = quiet(), frame(1), frame(2)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = a[:, 1] * 0.8 - a[:, 0] * 0.6
        model.model.embed_tokens.weight[9] = b[:, 2]
    gains = torch.tensor([3.0, 3.0 * (1 - close), 1.0], dtype=torch.float64)
    plant_head(model, 0, 1, a[:, :3] * gains @ b[:, :3].T)
    stream = vw.open(model)
    record = ChannelTokens("L0H1.ov", tolerance=0.01)(stream)
    assert sorted(set(record["directions"])) == ["1-2", "3"]
    assert nearest(record, "1-2", "written", "embed") == (7, pytest.approx(1))
    assert nearest(record, "3", "read", "embed")[0] == 9
    first = next(record.rows())
    assert (first["size"], first["gain"]) == (2, pytest.approx(3))
    assert first["energy"] == pytest.approx(1 - 1 / float(gains.square().sum()))
    assert first["random"] > next(r for r in record.rows() if r["size"] == 1)["random"]
    if close:
        apart = ChannelTokens("L0H1.ov", tolerance=close / 2)(stream)
        assert sorted(set(apart["directions"])) == ["1", "2", "3"]
        found = [nearest(apart, i, "written", "embed") for i in ("1", "2")]
        assert found[1] == (7, pytest.approx(math.copysign(0.8, found[1][1])))
        cosine = next(abs(r["cosine"]) for r in apart.rows() if r["token"] == 7 and _of(r) == ("1", "written", "embed"))
        assert cosine == pytest.approx(0.6)


def _of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["directions"], row["end"], row["side"]


def test_a_weight_that_is_zero_has_no_direction() -> None:
    record = ChannelTokens("L0H1", "L1H2.V")(vw.open(quiet()))
    assert record.size == 0


def test_the_component_that_a_reader_hears_comes_first() -> None:
    """OV writes along three directions; later keys hear the second alone, though the first is 2.5 times as strong."""
    model, a, b = quiet(), frame(3), frame(4)
    plant_head(model, 0, 4, a[:, :3] * torch.tensor([5.0, 2, 1], dtype=torch.float64) @ b[:, :3].T)
    heard = 3 * torch.outer(a[:, 20], a[:, 1]) + 4 * torch.outer(a[:, 21], a[:, 10])
    plant_qk(model, 1, 3, heard)
    stream = vw.open(model)
    record = ComponentComposition("L0H4", "L1H3.K")(stream)
    assert record.axis("component").labels == ("1", "2", "3")
    assert record["score"][:, 0].tolist() == pytest.approx([0, 3 / 5, 0], abs=1e-9)
    assert record["strength"][:, 0].tolist() == pytest.approx([0, 6, 0], abs=1e-9)
    assert record["share"][:, 0].tolist() == pytest.approx([0, 1, 0], abs=1e-9)
    assert record["gap"][:, 0].tolist() == pytest.approx([3 / 5, 1 / 2, 1])
    everyone = ComponentComposition("L0H4", ports=("K",))(stream)
    assert everyone.axis("reader").labels == tuple(f"L{i}H{j}.K" for i in (1, 2) for j in range(HEADS))
    best = everyone.top(1, "share")
    assert (best["component"], best["reader"]) == (("2",), ("L1H3.K",))
    plant_qk(model, 1, 3, heard.T)
    stream = vw.open(model)
    assert ComponentComposition("L0H4", "L1H3.K")(stream)["score"].max() < 1e-9
    assert ComponentComposition("L0H4", "L1H3.Q")(stream).top(1)["component"] == ("2",)


@pytest.mark.parametrize(("port", "wrong"), [("K", "Q"), ("Q", "K")])
def test_a_slow_plane_is_kept_and_a_fast_one_averages_out(port: str, wrong: str) -> None:
    """One rotary plane turns by 1 radian a token, the other by 0.01: what meets over offsets is told by the plane."""
    model, axes = blank(), frame(5)
    rows, gain = slice(2 * WIDTH, 3 * WIDTH), model.model.layers[1].input_layernorm.weight.detach()
    attention = model.model.layers[1].self_attn
    with torch.no_grad():  # planes are (0, 2), fast, and (1, 3), slow
        attention.q_proj.weight[rows] = axes[:, :4].T / gain
        attention.k_proj.weight[rows] = axes[:, 4:8].T / gain
    heard = axes[:, 4:6] if port == "K" else axes[:, 0:2]
    plant_head(model, 0, 1, heard @ axes[:, 8:10].T)
    offsets = range(40)
    stream = vw.open(model)
    record = OffsetProfile("L0H1", f"L1H2.{port}", offsets)(stream)
    assert record["strength"].tolist() == pytest.approx([2**0.5] * 40), "a turn changes no length by itself"
    assert record.stamp["root_mean_square"]["score"] == pytest.approx(2**0.5 / (2 * 2**0.5))
    assert record.stamp["rotary_offset"] == list(offsets)
    assert OffsetProfile("L0H1", f"L1H2.{wrong}", offsets)(stream)["strength"].abs().max() < 1e-9
    mean = MeanCircuit("L1H2", offsets)(stream)
    phases = [abs(sum(complex(math.cos(f * n), math.sin(f * n)) for n in offsets)) / 40 for f in (1.0, 0.01)]
    assert mean["gain"].tolist() == pytest.approx([phases[1]] * 2 + [phases[0]] * 2)
    assert mean.stamp["kept"] == pytest.approx(math.hypot(*phases) / 2**0.5)
    with torch.no_grad():  # queries that use one vector of a plane: now the turn decides what is heard
        attention.q_proj.weight[rows.start + 2 : rows.stop] = 0
        attention.k_proj.weight[rows.start + 2 : rows.stop] = 0
    found = OffsetProfile("L0H1", f"L1H2.{port}", offsets)(vw.open(model))["strength"]
    assert found.tolist() == pytest.approx([math.hypot(math.cos(n), math.cos(0.01 * n)) for n in offsets])
