"""Planted truth: blocks of known rank, a path that must come first, an intermediate through which nothing changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from operating import operate
from tiny_models import tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.analysis.depth.linear_composition import LinearComposition, summary
from virtual_weights.analysis.depth.paths import Paths, discrepancy
from virtual_weights.cli import run
from virtual_weights.errors import UsageError
from virtual_weights.stream.operating_point import OperatingPoint

D, WIDTH = 24, 4
TOKENS = torch.tensor([3, 17, 5, 30])


def frame(seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def silent() -> nn.Module:
    """A model in which no block writes anything."""
    model = tiny("llama-full", dtype=torch.float64)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    return model


def plant_head(model: nn.Module, layer: int, head: int, writes: Tensor, reads: Tensor) -> None:
    """OV = writes @ reads, with the norm folded: writes (d, k), reads (k, d), k <= 4."""
    attention, gain = model.model.layers[layer].self_attn, model.model.layers[layer].input_layernorm.weight
    first = head * WIDTH
    with torch.no_grad():
        attention.v_proj.weight[first : first + WIDTH] = 0
        attention.o_proj.weight[:, first : first + writes.shape[1]] = writes
        attention.v_proj.weight[first : first + len(reads)] = reads / gain


def plant_mlp(model: nn.Module, layer: int, writes: Tensor, reads: Tensor) -> None:
    """The first neurons write these columns and read these rows (up)."""
    mlp, gain = model.model.layers[layer].mlp, model.model.layers[layer].post_attention_layernorm.weight
    with torch.no_grad():
        mlp.down_proj.weight[:, : writes.shape[1]] = writes
        mlp.up_proj.weight[: len(reads)] = reads / gain


@pytest.mark.parametrize("at_point", [False, True])
def test_ranks_three_and_five(at_point: bool) -> None:
    """A head of rank 3, then five neurons: their product has rank <= 3, the update 8, the composition all of d."""
    model, a, b = silent(), frame(0), frame(1)
    plant_head(model, 0, 2, a[:, :3], b[:, :3].T)
    plant_mlp(model, 0, frame(2)[:, :5], frame(3)[:, :5].T)
    stream = vw.open(model)
    point = operate(model, stream, TOKENS)[0] if at_point else None
    record = LinearComposition(point)(stream)
    row = {name: i for i, name in enumerate(record.axis("map").labels)}
    ranks = record["rank"]
    assert ranks[row["block"]].tolist() == [3, 5, 0, 0, 0, 0]
    assert ranks[row["path"]].tolist() == [3, 3, 0, 0, 0, 0]
    assert ranks[row["update"]].tolist() == [3, 8, 8, 8, 8, 8]
    assert ranks[row["composition"]].tolist() == record["certified_rank"][row["composition"]].tolist() == [D] * 6
    last = summary(record)
    assert last["path"]["log10_largest"] is None
    assert last["update"]["rank"] == 8


def test_a_block_that_clears_takes_its_directions_from_the_composition() -> None:
    """I + T singular on a plane: the rank falls by two for good, and nothing is certified any more."""
    model, plane = silent(), frame(4)[:, :2]
    plant_head(model, 1, 0, -plane, plane.T)
    record = LinearComposition()(vw.open(model))
    row = record.axis("map").labels.index("composition")
    assert record["rank"][row].tolist() == [D, D, D - 2, D - 2, D - 2, D - 2]
    certain = record["certified_rank"][row]
    assert certain[:2].tolist() == [D, D]
    assert bool(certain[2:].isnan().all())


def test_a_product_that_cancels_is_no_map() -> None:
    """T2 reads what T1 does not write: their product is rounding alone, and has rank 0 at that depth and after."""
    model, a, b = silent(), frame(0), frame(1)
    plant_head(model, 0, 2, a[:, :3], b[:, :3].T)
    plant_mlp(model, 0, frame(2)[:, :5], a[:, 3:8].T)
    plant_head(model, 1, 1, 1e3 * frame(3)[:, :4], frame(2)[:, :4].T)
    record = LinearComposition()(vw.open(model))
    assert record["rank"][3].tolist() == [3, 0, 0, 0, 0, 0]
    assert record["stable_rank"][3, 1:].tolist() == [0] * 5
    assert bool(record["log10_largest"][3, 1:].isnan().all())
    assert record["rank"][2].tolist() == [3, 8, 12, 12, 12, 12]  # the update keeps all of them: 3 + 5 + 4


def test_what_is_left_of_a_cancellation_is_counted_without_its_rounding() -> None:
    """What was 1e8 times as large leaves rounding of size 1e-8 behind, which no singular value of 1 can tell from."""
    model, a, b = silent(), frame(0), frame(1)
    plant_head(model, 0, 2, a[:, :3] * torch.tensor([1e8, 1e8, 1.0]), b[:, :3].T)
    plant_mlp(model, 0, frame(2)[:, :5], a[:, 2:7].T)  # reads the weakest of what was written, and what was not
    assert LinearComposition()(vw.open(model))["rank"][3, :2].tolist() == [3, 1]
    model, plane = silent(), frame(4)[:, :2]
    plant_head(model, 0, 0, 1e8 * plane[:, :1], frame(5)[:, :1].T)
    plant_mlp(model, 0, -plane, plane.T)  # clears the plane, with what was written into it
    assert LinearComposition()(vw.open(model))["rank"][2, :2].tolist() == [1, 2]


def test_orthogonal_blocks_at_known_gains() -> None:
    """T = 3 A A^T on a plane and then again: gains 4 and 16 there, 1 elsewhere; the path 9 and nothing elsewhere."""
    model, plane = silent(), frame(5)[:, :2]
    plant_head(model, 0, 1, 3 * plane, plane.T)
    plant_mlp(model, 0, 3 * plane, plane.T)
    record = LinearComposition(every=2)(vw.open(model))
    first = {str(row["map"]): row for row in record.rows() if row["block"] == "L0.mlp"}
    assert 10 ** first["composition"]["log10_largest"] == pytest.approx(16)
    assert 10 ** first["composition"]["log10_smallest"] == pytest.approx(1)
    assert 10 ** first["path"]["log10_largest"] == pytest.approx(9)
    assert first["path"]["entropy_rank"] == pytest.approx(2)
    assert first["composition"]["stable_rank"] == pytest.approx((2 * 256 + D - 2) / 256)
    assert 10 ** first["update"]["log10_smallest"] == pytest.approx(15)


def relay(backwards: bool = False) -> nn.Module:
    """L0H1 writes A, head L1H3 carries A to B, the values of L2H2 read B alone; L1H4 carries B to A, to no avail."""
    model, a, b = silent(), frame(6)[:, :2], frame(6)[:, 2:4]
    c = frame(6)[:, 4:6]
    source, target = (b, a) if backwards else (a, b)
    plant_head(model, 0, 1, source, c.T)
    plant_head(model, 1, 3, 2 * b, a.T)
    plant_head(model, 1, 4, 0.1 * a, b.T)
    plant_head(model, 2, 2, c, target.T)
    return model


def test_a_planted_relay_comes_first() -> None:
    record = Paths("L0H1", "L2H2.V")(vw.open(relay()))
    assert record.axis("path").labels[0] == "L0H1 > L1H3 > L2H2.V"
    assert record["strength"][0] == pytest.approx(2 * 2**0.5)
    assert record["share"][0] == pytest.approx(1)
    assert float(record["strength"][1:].max()) < 1e-12
    totals = record.stamp["totals"]
    assert totals["direct"] < 1e-12
    assert totals["total"] == pytest.approx(2 * 2**0.5)
    back = Paths("L0H1", "L2H2.V")(vw.open(relay(backwards=True)))
    assert back.axis("path").labels[0] == "L0H1 > L1H4 > L2H2.V"
    assert back["strength"][0] == pytest.approx(0.1 * 2**0.5)


def test_a_relay_between_tokens_takes_the_attention_between_them() -> None:
    model = relay()
    stream = vw.open(model)
    point, _ = operate(model, stream, TOKENS)
    record = Paths("L0H1", "L2H2.V", point=point, token=3, source=1)(stream)
    assert record.axis("path").labels[0] == "L0H1 > L1H3 > L2H2.V"
    s = point.scalars
    gain = 2 * float(point.patterns["L1.attn"][3, 3, 1] / s["L1.attn"][1] / s["L2.attn"][3])
    assert record["strength"][0] == pytest.approx(gain * 2**0.5)
    future = Paths("L0H1", "L2H2.V", point=point, token=1, source=3)(stream)
    assert float(future["strength"].max()) == 0
    assert future.stamp["totals"]["remainder_share"] is None


def test_the_product_through_a_component_is_the_direct_path_only_where_it_copies() -> None:
    model, a = silent(), frame(7)[:, :2]
    plant_head(model, 0, 0, a, frame(8)[:, :2].T)
    plant_head(model, 2, 0, frame(9)[:, :2], a.T)
    for gain in (1.0, 3.0, -1.0):
        plant_head(model, 1, 5, gain * a, a.T)
        assert discrepancy(vw.open(model), "L0H0", "L1H5", "L2H0.V") == pytest.approx(abs(1 - gain), abs=1e-12)
    assert discrepancy(vw.open(model), "L0H0", "L1H4", "L2H0.V") == 1  # writes nothing: the product is 0


def test_the_commands_say_what_the_questions_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = relay().to(torch.float32)
    model.save_pretrained(tmp_path / "relay")
    stream = vw.open(str(tmp_path / "relay"))
    point, _ = operate(model, stream, TOKENS)
    file = tmp_path / "point.safetensors"
    point.save(file)
    options = ["--point", str(file), "--position", "2", "--progress", "none", "--json"]

    assert run(["paths", str(tmp_path / "relay"), "L0H1", "L2H2.V", "--order", "3", "--top", "4", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = Paths("L0H1", "L2H2.V", order=3, top=4, point=point, token=2)(stream)
    assert answer["rows"] == list(expected.rows())
    assert answer["stamp"]["point"] == point.identity == answer["parameters"]["point"]

    assert run(["linear", str(tmp_path / "relay"), "--every", "2", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"] == list(LinearComposition(point, 2, 2)(stream).rows())

    assert run(["linear", str(tmp_path / "relay"), "--progress", "none"]) == 0
    assert "weights alone do not determine" in capsys.readouterr().out
    assert run(["paths", str(tmp_path / "relay"), "L0H1", "L2H2.V", "--progress", "none"]) == 0
    assert "L0H1 > L1H3 > L2H2.V" in capsys.readouterr().out
    assert run(["linear", str(tmp_path / "relay"), "--point", str(tmp_path / "none")]) == 3
    other = OperatingPoint("another", point.tokens, point.scalars, point.patterns, point.gates)
    other.save(file)
    assert run(["linear", str(tmp_path / "relay"), *options]) == UsageError.exit_code
    assert "another checkpoint" in capsys.readouterr().err
