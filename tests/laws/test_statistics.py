"""Rank correlation and joint central moments against scipy's, with absent entries and in any split."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from virtual_weights.linalg import CentralMoments, rank_correlation

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
