"""The closed-form null against seeded draws, and false discovery rates against a definition written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    Dense,
    Diagonal,
    Identity,
    benjamini_hochberg,
    draw_null,
    frobenius_norm,
    haar_moments,
    haar_orthogonal,
    overlap_moments,
    singular_values,
    spectrum_null_edge,
)
from virtual_weights.linalg.linear_map import LinearMap

F64 = torch.float64
DRAWS = 20_000


def moments(a: LinearMap, b: LinearMap) -> tuple[float, float]:
    s_a, s_b = singular_values(a), singular_values(b)
    squares = (float(s.pow(p).sum()) for s in (s_a, s_b) for p in (2, 4))
    mean, variance = haar_moments(*squares, d=a.shape[1])
    return float(mean), float(variance)


def with_gains(d: int, gains: list[float], seed: int) -> Dense:
    q = haar_orthogonal(d, torch.Generator().manual_seed(seed))
    return Dense(q[:, : len(gains)] * torch.tensor(gains, dtype=F64))


CASES = {
    "uneven gains": (with_gains(6, [3.0, 1.0, 0.5], 1), with_gains(6, [2.0, 1.5, 0.1, 0.05], 2), 6),
    "projectors": (with_gains(8, [1.0] * 3, 3), with_gains(8, [1.0] * 3, 4), 8),
    "a line and a space": (with_gains(5, [2.0], 5), with_gains(5, [1.0, 3.0], 6), 5),
    "full rank": (with_gains(3, [1.0, 2.0, 3.0], 7), with_gains(3, [3.0, 0.2, 0.1], 8), 3),
    "the plane": (with_gains(2, [1.0], 9), with_gains(2, [1.0], 10), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_agrees_with_draws(name: str) -> None:
    """Mean and variance within 4 standard errors of 20,000 draws, for spectra of every kind."""
    a, b, d = CASES[name]
    draws = draw_null(a.T, b, DRAWS, seed=11)
    mean, variance = moments(a.T, b)
    spread = (draws - draws.mean()).square()
    assert draws.shape == (DRAWS,)
    assert a.shape[0] == d
    assert abs(float(draws.mean()) - mean) < 4 * math.sqrt(variance / DRAWS)
    assert abs(float(spread.mean()) - variance) < 4 * float(spread.std()) / math.sqrt(DRAWS)


def test_draws_have_the_law_of_the_full_product() -> None:
    """The thin corner of a frame gives what ``A U B`` with a whole U gives: quantiles of both, 4,000 draws each."""
    a, b, d = CASES["uneven gains"]
    generator = torch.Generator().manual_seed(21)
    whole = [float((a.T.dense() @ haar_orthogonal(d, generator) @ b.dense()).square().sum()) for _ in range(4000)]
    thin = draw_null(a.T, b, 4000, seed=22)
    grid = torch.linspace(0.05, 0.95, 19, dtype=F64)
    levels = (thin[:, None] <= torch.quantile(torch.tensor(whole, dtype=F64), grid)).to(F64).mean(dim=0)
    assert float((levels - grid).abs().max()) < 1.95 * math.sqrt(2 / 4000)  # Kolmogorov-Smirnov, p about 0.001


@pytest.mark.parametrize(("r", "d"), [(1, 4), (3, 9), (8, 8)])
def test_projectors_have_the_known_mean(r: int, d: int) -> None:
    mean, variance = haar_moments(r, r, r, r, d)
    assert float(mean) == pytest.approx(r * r / d)
    assert float(variance) == pytest.approx(2 * (r - r * r / d) ** 2 / ((d - 1) * (d + 2)))
    overlap_mean, overlap_variance = overlap_moments(r, r, d)
    assert float(overlap_mean) == pytest.approx(r / d)
    assert float(overlap_variance) == pytest.approx(float(variance) / r**2)
    assert float(overlap_moments(1, r, d)[0]) == pytest.approx(r / d)


def test_a_vector_on_a_line_is_beta() -> None:
    """cos^2 between random lines is Beta(1/2, (d-1)/2): an independent source for mean and variance."""
    d = 7
    mean, variance = overlap_moments(1, 1, d)
    a, b = 0.5, (d - 1) / 2
    assert float(mean) == pytest.approx(a / (a + b))
    assert float(variance) == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)))


def test_moments_broadcast_over_pairs() -> None:
    readers, writers = torch.tensor([1.0, 2.0, 3.0])[:, None], torch.tensor([5.0, 7.0])[None, :]
    mean, variance = haar_moments(readers, readers**2, writers, writers**2, 16)
    assert mean.shape == variance.shape == (3, 2)
    assert float(mean[2, 1]) == pytest.approx(21 / 16)
    assert float(variance[2, 1]) == pytest.approx(float(haar_moments(3.0, 9.0, 7.0, 49.0, 16)[1]))
    assert mean.dtype == F64


def test_degenerate_nulls() -> None:
    mean, variance = haar_moments(2.0, 4.0, 3.0, 9.0, 1)
    assert (float(mean), float(variance)) == (6.0, 0.0)
    assert float(haar_moments(5.0, 5.0, 2.0, 2.0, 5)[1]) == 0.0  # the identity meets everything alike
    assert draw_null(Identity(3), Diagonal(torch.ones(3)), 5, 0).tolist() == pytest.approx([3.0] * 5)
    assert draw_null(Dense(torch.zeros(2, 3)), Identity(3), 4, 0).tolist() == [0.0] * 4
    assert spectrum_null_edge(Dense(torch.zeros(2, 3)), Identity(3), 4, 0) == 0.0
    with pytest.raises(UsageError):
        haar_moments(1.0, 1.0, 1.0, 1.0, 0)
    with pytest.raises(UsageError, match=r"\(2, 3\) and \(2, 3\)"):
        draw_null(Dense(torch.zeros(2, 3)), Dense(torch.zeros(2, 3)), 4, 0)


def test_seeds_decide_everything() -> None:
    a, b, _ = CASES["uneven gains"]
    assert torch.equal(draw_null(a.T, b, 50, 1), draw_null(a.T, b, 50, 1))
    assert not torch.equal(draw_null(a.T, b, 50, 1), draw_null(a.T, b, 50, 2))
    assert spectrum_null_edge(a.T, b, 50, 1) == spectrum_null_edge(a.T, b, 50, 1)
    first, second = (haar_orthogonal(4, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second)


def test_haar_is_orthogonal_and_has_no_preferred_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    many = torch.stack([haar_orthogonal(3, generator) for _ in range(4000)])
    torch.testing.assert_close(many.mT @ many, torch.eye(3, dtype=F64).expand(4000, 3, 3), atol=1e-12, rtol=0)
    # every entry has mean 0 and variance 1/3; QR without the sign fix gives a diagonal of one sign
    assert float(many.mean(dim=0).abs().max()) < 4 * math.sqrt(1 / 3 / 4000)
    assert float((many.square().mean(dim=0) - 1 / 3).abs().max()) < 4 * math.sqrt(4 / 45 / 4000)
    assert abs(float((torch.linalg.det(many) > 0).to(F64).mean()) - 0.5) < 4 * 0.5 / math.sqrt(4000)


def test_edge_is_the_quantile_of_the_largest_gain() -> None:
    a, b, d = CASES["uneven gains"]
    edge = spectrum_null_edge(a.T, b, 2000, seed=3, quantile=0.9)
    generator = torch.Generator().manual_seed(4)
    above = [
        float(torch.linalg.matrix_norm(a.T.dense() @ haar_orthogonal(d, generator) @ b.dense(), 2)) > edge
        for _ in range(2000)
    ]
    assert abs(sum(above) / 2000 - 0.1) < 4 * math.sqrt(2 * 0.09 / 2000)
    assert edge <= float(singular_values(a)[0] * singular_values(b)[0])
    assert edge > frobenius_norm(a) * frobenius_norm(b) / d


@settings(deadline=None, max_examples=25)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=12))
def test_false_discovery_rates_are_the_definition(p: list[float]) -> None:
    q = benjamini_hochberg(torch.tensor(p, dtype=F64)).tolist()
    tested = [x for x in p if not math.isnan(x)]
    for x, found in zip(p, q, strict=True):
        if math.isnan(x):
            assert math.isnan(found)
            continue
        ladder = [y * len(tested) / sum(z <= y for z in tested) for y in tested if y >= x]
        assert found == pytest.approx(min(1.0, *ladder, 1.0))


def test_false_discovery_rates_keep_their_shape() -> None:
    q = benjamini_hochberg(torch.tensor([[0.01, float("nan")], [0.04, 0.03]]))
    torch.testing.assert_close(
        q, torch.tensor([[0.03, float("nan")], [0.04, 0.04]], dtype=F64), equal_nan=True, atol=1e-8, rtol=0
    )
    assert benjamini_hochberg(torch.empty(0, 3)).shape == (0, 3)
