"""Frozen blocks, their composition and the paths through them: dense twins from the definition, gauges, sums."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from operating import operate
from regauge import rebased, rotated
from tiny_models import SHAPES, tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.depth.frozen import Convention, frozen_blocks
from virtual_weights.analysis.depth.linear_composition import LinearComposition
from virtual_weights.analysis.depth.paths import Paths, discrepancy
from virtual_weights.stream.operating_point import OperatingPoint

TOKENS = torch.tensor([3, 17, 5, 30])
SOME = ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"]


def _at_point(name: str, seed: int = 0) -> tuple[vw.Stream, OperatingPoint]:
    model = tiny(name, seed, torch.float64)
    stream = vw.open(model)
    return stream, operate(model, stream, TOKENS)[0]


def _twins(stream: vw.Stream, point: OperatingPoint | Convention) -> list[Tensor]:
    """Every block over all tokens, (T d, T d), component by component from the definition."""
    blocks: dict[int, Tensor] = {}
    n, d = 1 if isinstance(point, Convention) else len(point.tokens), stream.d_model
    for component in stream.components:
        if component.kind not in ("head", "mlp"):
            continue
        layer, part = component.label.layer, stream[str(component.label)]
        t = blocks.setdefault(component.reads, torch.zeros(n * d, n * d, dtype=torch.float64))
        for to in range(n):
            for of in range(n):
                s, p, g = 1.0, float(to == of), torch.ones(sizes(stream).d_mlp, dtype=torch.float64)
                if isinstance(point, Convention):
                    s, g = point.scalar, g * point.gate
                else:
                    s = point.scalars[f"L{layer}.{'attn' if component.kind == 'head' else 'mlp'}"][of]
                    p = (
                        point.patterns[f"L{layer}.attn"][component.label.index, to, of]
                        if component.kind == "head"
                        else p
                    )
                    g = point.gates[f"L{layer}.mlp"][to]
                if component.kind == "head":
                    one = p * part.o.dense() @ part.v.dense() / s
                else:
                    one = p * part.out.dense() @ g.diag() @ part.up.dense() / s
                t[to * d : (to + 1) * d, of * d : (of + 1) * d] += one
    return [blocks[i] for i in sorted(blocks)]


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_are_those_of_the_definition(name: str) -> None:
    stream, point = _at_point(name)
    d, generator = stream.d_model, torch.Generator().manual_seed(0)
    for where in (point, Convention(2.0, 0.7)):
        blocks, twins = list(frozen_blocks(stream, where)), _twins(stream, where)
        assert len(blocks) == len(twins) == stream.states - 1
        for block, twin in zip(blocks, twins, strict=True):
            torch.testing.assert_close(block.dense(), twin, rtol=0, atol=1e-12)
            n = len(twin) // d
            torch.testing.assert_close(block.at(n - 1), twin[-d:, -d:])
            torch.testing.assert_close(block.between(-1, 0), twin[-d:, :d])
            x = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
            torch.testing.assert_close(block.linear(x).flatten(1), x.flatten(1) @ twin.T)
            assert (x.flatten(1) @ twin.T - x.flatten(1) @ twin).norm() > 1e-2
            torch.testing.assert_close(block.apply(x[0]), x[0] + block.linear(x[0]) + block.constant)


def test_a_point_with_one_token_left_is_that_token_alone() -> None:
    stream, point = _at_point("llama-grouped-untied")
    whole, alone = frozen_blocks(stream, point), frozen_blocks(stream, point.only(2))
    for all_tokens, one in zip(whole, alone, strict=True):
        torch.testing.assert_close(one.dense(), all_tokens.at(2))
        torch.testing.assert_close(one.at(0), all_tokens.at(2))


def _check(record: vw.Record, twins: list[Tensor]) -> None:
    """Every column of every depth against plain products and full decompositions."""
    eye = torch.eye(len(twins[0]), dtype=torch.float64)
    composition, path, names = eye, eye, record.axis("block").labels
    assert len(names) == len(twins)
    for i, t in enumerate(twins):
        composition, path = (eye + t) @ composition, t @ path
        for map, dense in (("block", t), ("composition", composition), ("update", composition - eye), ("path", path)):
            cell, s = (record.axis("map").index(map), i), torch.linalg.svdvals(dense)
            assert record["stable_rank"][cell] == pytest.approx(float((s / s[0]).square().sum()), rel=1e-6)
            p = s.square() / s.square().sum()
            assert record["entropy_rank"][cell] == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)
            assert record["log10_largest"][cell] == pytest.approx(math.log10(s[0]), abs=1e-8)
            rank = int(record["rank"][cell])
            assert rank <= record["bound"][cell]
            assert record["log10_smallest"][cell] == pytest.approx(math.log10(s[rank - 1]), abs=1e-3)
        step = eye + t
        assert record["condition"][0, i] == pytest.approx(float(step.norm() * torch.linalg.inv(step).norm()), rel=1e-6)
        assert record["certified_rank"][1, i] == record["rank"][1, i] == len(eye)
        assert record["rank"][3, i] <= record["rank"][0, : i + 1].min()
    assert float(record["pair_error"][0, 1:].max()) < 1e-12
    assert bool(record["pair_error"][0, :1].isnan().all())


@pytest.mark.parametrize("name", SOME)
def test_composition_equals_dense(name: str) -> None:
    stream, point = _at_point(name)
    d = stream.d_model
    _check(LinearComposition(scalar=2.0, gate=0.5)(stream), _twins(stream, Convention(2.0, 0.5)))
    whole = _twins(stream, point)
    _check(LinearComposition(point, token=None)(stream), whole)
    _check(LinearComposition(point, token=1)(stream), [t[d : 2 * d, d : 2 * d] for t in whole])


def test_two_layers_are_one_plus_both_plus_their_product() -> None:
    stream, point = _at_point("gpt2")
    x = torch.randn(len(TOKENS), stream.d_model, dtype=torch.float64)
    for first, second in pairwise(frozen_blocks(stream, point)):
        once, both = x + first.linear(x), second.linear(first.linear(x))
        expanded = x + first.linear(x) + second.linear(x) + both
        torch.testing.assert_close(once + second.linear(once), expanded)
        assert float(both.norm() / expanded.norm()) > 1e-4, "the product term is no rounding"


def test_scales_are_kept_apart() -> None:
    """At norm scalar 1e-60 every block is 1e60 times as large: a product of six would overflow nothing."""
    stream = vw.open(tiny("llama-full", dtype=torch.float64))
    one, big, small = (LinearComposition(scalar=s)(stream) for s in (1.0, 1e-60, 1e60))
    blocks = torch.arange(1, 7, dtype=torch.float64)
    for other, sign in ((big, 60), (small, -60)):
        torch.testing.assert_close(other["log10_largest"][3], one["log10_largest"][3] + sign * blocks)
        torch.testing.assert_close(other["stable_rank"][3], one["stable_rank"][3])
    torch.testing.assert_close(big["log10_largest"][1:3], big["log10_largest"][3].expand(2, -1))
    torch.testing.assert_close(small["stable_rank"][1], torch.full((6,), 24.0, dtype=torch.float64))
    assert float(small["log10_largest"][2].max()) == pytest.approx(float(small["log10_largest"][0].max()), abs=1)


def test_fewer_depths_are_the_same_figures() -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    every, some = LinearComposition()(stream), LinearComposition(every=4)(stream)
    assert some.axis("block").labels == ("L0.attn", "L1.mlp", "L2.mlp")
    for name in ("rank", "stable_rank", "log10_smallest", "bound"):
        torch.testing.assert_close(some[name], every[name][:, [0, 3, 5]])
    assert every["bound"][0].tolist() == [8, 24] * 3  # two heads of keys and values, 40 neurons of 24 dimensions
    assert every["bound"][1:].tolist() == [[24] * 6, [8] + [24] * 5, [8] * 6]
    assert every.stamp["point"] == "convention"
    assert every.parameters == {"point": None, "token": -1, "every": 1, "seed": 0, "scalar": 1.0, "gate": 1.0}


@pytest.mark.parametrize("name", SOME)
def test_paths_of_all_orders_sum_to_the_total(name: str) -> None:
    """Every single path is there, and together they are R prod(I + T) O, formed dense, between two tokens."""
    stream, point = _at_point(name)
    d, last = stream.d_model, stream.spec.n_layers - 1
    ends = {"L0H1": f"L{last}H2.V", "embed": f"L{min(last, 1)}.mlp.{'up' if stream.spec.gated else 'in'}"}
    for writer, reader in ends.items():
        source = next(c for c in stream.components if str(c.label) == writer)
        target = next(c for c in stream.components if reader.startswith(str(c.label)))
        between = range(source.writes, target.reads)
        question = Paths(writer, reader, order=len(between) + 1, top=10**6, point=point, token=3, source=1)
        record = question(stream)
        product = torch.eye(len(TOKENS) * d, dtype=torch.float64)
        for t in (_twins(stream, point)[i] for i in between):
            product = product + t @ product
        part = stream[writer]
        o = part.o.dense() @ part.v.dense() if writer == "L0H1" else part.dense()
        r = stream[reader].dense()
        if reader.endswith("V"):
            r = stream[reader.removesuffix(".V")].o.dense() @ r
        s = point.scalars[f"L{target.label.layer}.{'attn' if reader.endswith('V') else 'mlp'}"][3]
        total = r @ product[3 * d :, d : 2 * d] @ o / s
        totals = record.stamp["totals"]
        assert totals["total"] == pytest.approx(float(total.norm()))
        counts = [1]
        for position in between:  # one more block: every path so far goes on directly or through one component
            n = _passing(stream, position)
            counts = [a + n * b for a, b in zip([*counts, 0], [0, *counts], strict=True)]
        assert [row["paths"] for row in totals["orders"]] == counts[: len(between) + 1]
        assert len(record.axis("path").labels) == sum(counts)
        assert float(record["share"].sum()) == pytest.approx(1)
        assert abs(totals["remainder_share"]) < 1e-9
        assert sum(row["share"] for row in totals["orders"]) == pytest.approx(1)
        assert torch.equal(record["strength"], record["strength"].sort(descending=True).values)


def _passing(stream: vw.Stream, position: int) -> int:
    return sum(c.reads == position and c.kind in ("head", "mlp") for c in stream.components)


def test_a_path_is_the_product_along_it() -> None:
    stream, point = _at_point("llama-grouped-untied")
    frozen = Paths("L0H1", "L2H2.K", order=3, top=10**6, point=point, token=2, offset=1)(stream)
    one = Paths("L0H1", "L2H2.K", order=3, top=10**6, scalar=2.0, gate=0.5)(stream)
    i, j, k, mlp = (stream[name] for name in ("L0H1", "L1H3", "L2H2", "L1.mlp"))
    ov, qk = i.ov.dense(), k.qk.dense()
    twice = mlp.out.dense() @ mlp.up.dense() @ j.ov.dense()
    strength = one["strength"][one.axis("path").index("L0H1 > L1H3 > L1.mlp > L2H2.K")]
    assert strength == pytest.approx(float((qk @ twice @ ov).norm()) * 0.5 / 2**3)
    s, p, g = point.scalars, point.patterns["L1.attn"][3], point.gates["L1.mlp"][2]
    # from token 2 to token 2: attention of one component in between goes to itself alone, as all is causal
    twice = mlp.out.dense() * g @ mlp.up.dense() @ j.ov.dense() * p[2, 2] / s["L1.attn"][2] / s["L1.mlp"][2]
    direct = k.qk_at(1).dense() / s["L2.attn"][2]
    strength = frozen["strength"][frozen.axis("path").index("L0H1 > L1H3 > L1.mlp > L2H2.K")]
    assert strength == pytest.approx(float((direct @ twice @ ov).norm()))
    assert frozen.stamp["totals"]["direct"] == pytest.approx(float((direct @ ov).norm()))
    assert len(Paths("L0H1", "L2H2.K", top=3)(stream).axis("path").labels) == 3


def test_discrepancy_is_that_of_the_definition() -> None:
    stream = vw.open(tiny("gpt2", dtype=torch.float64))
    o, r = stream["L0H1"].ov.dense(), stream["L2.mlp.in"].dense()
    for via in ("L1H2", "L1.mlp"):
        part = stream[via]
        middle = part.ov.dense() if via == "L1H2" else part.out.dense() @ part.up.dense()
        expected = float((r @ o - r @ middle @ o).norm() / (r @ o).norm())
        assert discrepancy(stream, "L0H1", via, "L2.mlp.in") == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_unchanged_when_heads_are_rebased(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    _same_everywhere(model, rebased(model, seed=3), ("L0H1", "L1H2.K"), rerun=False)  # rotary and biases stay behind


@pytest.mark.parametrize("name", ["llama-grouped-untied", "qwen2"])
def test_unchanged_when_the_stream_of_a_folded_rmsnorm_is_rotated(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    _same_everywhere(model, rotated(model, seed=5), ("embed", "L1.mlp.up"), rerun=True)


def _same_everywhere(one: torch.nn.Module, other: torch.nn.Module, between: tuple[str, str], *, rerun: bool) -> None:
    records: list[list[vw.Record]] = []
    for model in (one, other):
        stream = vw.open(model)
        point, _ = operate(model if rerun else one, stream, TOKENS)
        linear = [LinearComposition(), LinearComposition(point)]
        questions = [*linear, Paths(*between), Paths(*between, point=point, source=0)]
        records.append([question(stream) for question in questions])
    for before, after in zip(*records, strict=True):
        assert before.axes == after.axes
        for column in before.columns:
            if column.name not in ("pair_error", "log10_smallest"):  # one is rounding, one is near it
                torch.testing.assert_close(column.values, after[column.name], rtol=1e-5, atol=1e-9, equal_nan=True)


def test_what_cannot_be_meant_is_refused() -> None:
    stream, point = _at_point("gpt2")
    other = vw.open(tiny("gpt2", seed=7))
    for wrong, message in (
        (lambda: LinearComposition(every=0), "every 0"),
        (lambda: LinearComposition(scalar=0.0), "norm scalar"),
        (lambda: LinearComposition(point, token=4)(stream), "no token 4"),
        (lambda: LinearComposition(point)(other), "another checkpoint"),
        (lambda: Paths("L0H0", "L1H0.K", order=0), "order 0"),
        (lambda: Paths("L0H0", "L1H0")(stream), "no reading port"),
        (lambda: Paths("L1H0", "L1H1.K")(stream), "cannot reach"),
        (lambda: Paths("L0H0", "L1H1.K", point=point, token=9)(stream), "positions 9"),
        (lambda: Paths("L0H0", "L1H1.K", point=point)(other), "another checkpoint"),
        (lambda: discrepancy(stream, "L0H0", "L0H1", "L1H1.K"), "does not lie between"),
        (lambda: discrepancy(stream, "L0H0", "embed", "L1H1.K"), "is neither a head nor an MLP"),
    ):
        with pytest.raises(vw.VirtualWeightsError, match=message):
            wrong()


def test_bounds_on_time_and_memory_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, point = _at_point("gpt2")
    monkeypatch.setattr("virtual_weights.analysis.depth.linear_composition.LIMIT", 4 * 24 - 1)
    with pytest.raises(vw.VirtualWeightsError, match="96 dimensions"):
        LinearComposition(point, token=None)(stream)
    monkeypatch.setattr("virtual_weights.analysis.depth.paths.MOST_PATHS", 7)
    with pytest.raises(vw.VirtualWeightsError, match="more than 7 paths"):
        Paths("embed", "L1H0.V", order=3)(stream)
    assert len(Paths("embed", "L1H0.V", order=2)(stream).axis("path").labels) == 6
