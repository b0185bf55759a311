"""Rank correlation and joint central moments against scipy's, with absent entries and in any split."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from virtual_weights.linalg import CentralMoments, mean_estimate, rank_correlation
from virtual_weights.linalg.statistics import student_quantile, student_tail

F64, NAN = torch.float64, float("nan")
laws = settings(deadline=None, max_examples=50)
entries = st.one_of(st.integers(-3, 3).map(float), st.just(NAN))  # few values: ties, constants and gaps are common


def samples(columns: int) -> st.SearchStrategy[Tensor]:
    rows = st.lists(st.lists(entries, min_size=columns, max_size=columns), min_size=1, max_size=12)
    return rows.map(lambda values: torch.tensor(values, dtype=F64))


@laws
@given(samples(2))
def test_rank_correlation_is_scipys_over_common_entries(values: Tensor) -> None:
    common = values[~values.isnan().any(1)]
    relation = rank_correlation(*values.T)
    if len(common) < 3 or any(len(side.unique()) == 1 for side in common.T):
        assert relation is None
    else:
        assert relation == pytest.approx(scipy.stats.spearmanr(*common.T.numpy()).statistic, abs=1e-12)


@laws
@given(samples(3), st.integers(0, 12), st.sampled_from([1.0, torch.inf]))
def test_moments_are_scipys_in_any_split(values: Tensor, cut: int, clamp: float) -> None:
    moments = CentralMoments.of(values[:cut], clamp) + CentralMoments.of(values[cut:], clamp)
    for i, column in enumerate(values.T):
        present = column[~column.isnan()].clamp(-clamp, clamp).numpy()
        count, *powers = (float(part[i]) for part in moments)
        bimodality = float(moments.bimodality()[i])
        assert count == len(present)
        if len(set(present)) < 2:  # scipy warns of a constant sample
            assert powers == pytest.approx([*(present[:1] if count else [0]), 0, 0, 0])
            assert math.isnan(bimodality)
            continue
        sums = [count * float(scipy.stats.moment(present, order)) for order in (2, 3, 4)]
        skewness, kurtosis = scipy.stats.skew(present), scipy.stats.kurtosis(present, fisher=False)
        assert powers == pytest.approx([present.mean(), *sums], abs=1e-9)
        assert float(moments.variance[i]) == pytest.approx(present.var())
        assert bimodality == pytest.approx((skewness**2 + 1) / kurtosis)


def test_a_spread_of_rounding_has_no_form() -> None:
    noise = 3 + 1e-7 * torch.tensor([[0.0], [1.0], [1.0]], dtype=F64)
    moments = CentralMoments.of(noise)
    assert float(moments.bimodality()) == pytest.approx(1, rel=1e-6)
    assert bool(moments.bimodality(torch.finfo(torch.float32).eps).isnan())


@pytest.mark.parametrize("freedom", [1, 2, 7, 31, 255])
def test_students_law_is_scipys(freedom: int) -> None:
    t = torch.tensor([0.0, 0.3, -1.0, 2.5, -6.0, 30.0], dtype=F64)
    assert student_tail(t, freedom).numpy() == pytest.approx(2 * scipy.stats.t.sf(t.abs().numpy(), freedom), rel=1e-9)
    assert student_quantile(0.95, freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-9)


def test_without_skewness_the_interval_is_students() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=F64) + 3
    estimate, test = mean_estimate(values), scipy.stats.ttest_1samp(values.numpy(), 0)
    assert (float(estimate.low), float(estimate.high)) == pytest.approx(tuple(test.confidence_interval()), rel=1e-6)
    assert float(estimate.p) == pytest.approx(test.pvalue, rel=1e-4)


def test_an_interval_leaves_out_0_where_p_is_below_its_level() -> None:
    values = torch.randn(400, 9, dtype=F64, generator=torch.Generator().manual_seed(0)).exp() - 1
    estimate = mean_estimate(values)
    outside = (estimate.low > 0) | (estimate.high < 0)
    assert torch.equal(outside, estimate.p < 0.05)
    assert 0 < outside.sum() < 400
    mirrored = mean_estimate(-values)
    assert torch.allclose(mirrored.low, -estimate.high)
    assert torch.allclose(mirrored.p, estimate.p)


@pytest.mark.parametrize(("sigma", "least"), [(1.0, 0.915), (0.5, 0.935), (0.1, 0.94)])
def test_intervals_of_32_skewed_effects_cover(sigma: float, least: float) -> None:
    """The plain t-interval covers 0.886 of the time at sigma 1; a percentile bootstrap less still."""
    effects = (sigma * torch.randn(20_000, 32, dtype=F64, generator=torch.Generator().manual_seed(0))).exp()
    estimate, mean = mean_estimate(effects), math.exp(sigma**2 / 2)
    covered = float(((estimate.low <= mean) & (mean <= estimate.high)).double().mean())
    assert least < covered < 0.96
    if sigma == 1.0:
        half = student_quantile(0.95, 31) * effects.std(-1) / math.sqrt(32)
        plain = float(((effects.mean(-1) - mean).abs() <= half).double().mean())
        assert plain < 0.9, "why the correction"


def test_of_one_value_there_is_no_interval_and_of_equal_ones_no_width() -> None:
    one, none, same = (mean_estimate(torch.tensor(x)) for x in ([1.0], [0.0, 0.0], [2.0, 2.0, 2.0]))
    assert [math.isnan(float(x)) for x in (one.low, one.high, one.p)] == [True] * 3
    assert [float(x) for x in (none.low, none.high, none.p)] == [0.0, 0.0, 1.0]
    assert [float(x) for x in (same.low, same.high, same.p)] == [2.0, 2.0, 0.0]
