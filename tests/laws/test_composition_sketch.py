"""A sketch is right on average, knows its error, and what it computes exactly is what Composition says."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.linalg import MapStack
from virtual_weights.linalg.sketch import Signs, estimates

WIDTH = 48


def _maps(seed: int, count: int = 5) -> MapStack:
    """Maps with a common part, so that products range from chance to nearly one."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.linspace(0, 3, count, dtype=torch.float64)[:, None, None]
    outer = torch.randn(count, 4, WIDTH, generator=generator, dtype=torch.float64) + weights * common
    metric = torch.randn(count, 4, 4, generator=generator, dtype=torch.float64)
    return MapStack.unplaced(outer, metric @ metric.mT)


def _unit_grams(stack: MapStack) -> torch.Tensor:
    assert stack.metric is not None
    grams = stack.outer.mT @ stack.metric @ stack.outer
    return grams / grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def test_estimates_are_right_on_average_and_know_their_error() -> None:
    stack = _maps(0)
    grams = _unit_grams(stack) - torch.eye(WIDTH, dtype=torch.float64) / WIDTH
    exact = torch.einsum("nij,mij->nm", grams, grams)
    found = [estimates(sketch, sketch) for seed in range(400) if (sketch := Signs(WIDTH, 144, seed).sketch(stack))]
    means, errors = (torch.stack(values) for values in zip(*found, strict=True))
    spread = means.std(0)
    assert ((means.mean(0) - exact).abs() < 4 * spread / 400**0.5).all()
    # the root mean square of the stated errors is the spread over seeds
    ratio = errors.square().mean(0).sqrt() / spread
    assert 0.85 < float(ratio.min())
    assert float(ratio.max()) < 1.35


def test_rows_and_factors_give_the_same_sketch_at_any_scale() -> None:
    stack, signs = _maps(1), Signs(WIDTH, 64, 0)
    assert stack.metric is not None
    rows = torch.linalg.cholesky(stack.metric).mT @ stack.outer
    one = signs.sketch(stack)
    for scale in (1e-12, 1.0, 1e12):
        other = signs.sketch([[part * scale for part in map_.split(3)] for map_ in rows])
        assert torch.allclose(one.entries, other.entries, rtol=1e-4, atol=1e-6)
        assert torch.allclose(one.traces * scale**2, other.traces)


def test_a_map_that_is_zero_has_no_products() -> None:
    signs, outer = Signs(WIDTH, 64, 0), torch.zeros(2, 4, WIDTH, dtype=torch.float64)
    outer[1] = 1.0
    sketch = signs.sketch(MapStack.unplaced(outer))
    mean, error = estimates(sketch, sketch)
    assert not mean[0].any()
    assert not error[:, 0].any()
    assert bool(mean[1, 1])


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2-untied-narrow", "neox-parallel-partial-rotary"])
def test_edges_are_those_of_composition(name: str) -> None:
    stream = vw.open(tiny(name, seed=2, dtype=torch.float64)).to(torch.float64)
    for port in stream.groups.ports:
        for offset in (None, 2) if port in ("Q", "K") else (None,):
            every = vw.Composition(port, offset, "all", "float64")(stream)
            edges = vw.CompositionSketch(port, offset, "all", top=12, samples=64)(stream)
            strongest = torch.tensor([row["score"] for row in every.top(12, "score").rows()], dtype=torch.float64)
            assert torch.allclose(edges.numbers("score"), strongest, rtol=1e-9, atol=1e-9)
            for row in edges.rows():
                assert row["score"] == pytest.approx(every[str(row["reader"]), str(row["writer"])]["score"], abs=1e-9)
            assert edges.stamp["doubtful"] == 0
            assert edges.stamp["pairs"] == int(every.numbers("score").isfinite().sum())


def test_what_is_left_out_and_might_be_stronger_is_counted() -> None:
    stream = vw.open(tiny("llama-grouped-untied", seed=2))
    few = vw.CompositionSketch("K", None, "all", top=2, exact=2, samples=16)(stream)
    all_of_them = vw.CompositionSketch("K", None, "all", top=2, samples=16)(stream)
    weakest = float(few.numbers("score")[-1])
    stronger = int((vw.Composition("K", None, "all")(stream).numbers("score").nan_to_num(0) > weakest + 1e-6).sum())
    assert stronger - 1 <= few.stamp["doubtful"]
    assert few.stamp["doubtful"] > 0 == all_of_them.stamp["doubtful"]


def test_a_seed_gives_the_same_answer_and_another_other_estimates() -> None:
    stream = vw.open(tiny("llama-grouped-untied", seed=2))
    one, same, other = (vw.CompositionSketch("K", samples=64, seed=seed)(stream) for seed in (1, 1, 2))
    assert one == same
    assert not torch.equal(one.numbers("estimate"), other.numbers("estimate"))


@pytest.mark.parametrize("options", [{"samples": 15}, {"top": 0}, {"top": 11, "exact": 10}, {"port": "O"}])
def test_impossible_parameters_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        vw.CompositionSketch(**options)  # pyright: ignore[reportArgumentType]
