"""Bounds of effective ranks, and the laws of subspaces and their angles."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    Dense,
    Spectrum,
    Subspace,
    column_space,
    complement,
    haar_orthogonal,
    intersection,
    overlap,
    principal_angles,
    row_space,
    sum_of,
    tolerance,
)

F64 = torch.float64
laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
values = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12)


def space(seed: int, d: int, r: int) -> Subspace:
    return Subspace(haar_orthogonal(d, torch.Generator().manual_seed(seed))[:, :r])


@st.composite
def two_spaces(draw: st.DrawFn) -> tuple[Subspace, Subspace, torch.Tensor]:
    """Two subspaces of one R^d (either may be {0} or everything) and a random rotation of it."""
    d = draw(st.integers(1, 9))
    a, b = (space(draw(seeds), d, draw(st.integers(0, d))) for _ in range(2))
    return a, b, haar_orthogonal(d, torch.Generator().manual_seed(draw(seeds)))


@laws
@given(values, st.floats(1e-6, 1e6))
def test_effective_ranks_are_bounded_and_free_of_scale(s: list[float], scale: float) -> None:
    assume(max(s) > 1e-3)
    spectrum = Spectrum(torch.tensor(s, dtype=F64))
    full = sum(x > 0 for x in s)
    # stable <= participation <= entropy <= Hartley: the Renyi entropies of orders infinity, 2, 1, 0
    chain = [1.0, spectrum.stable_rank, spectrum.participation_ratio, spectrum.entropy_rank, float(full)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(chain))
    assert 1 <= spectrum.numerical_rank() <= full
    other = Spectrum(torch.tensor(s, dtype=F64) * scale)
    for name in ("stable_rank", "participation_ratio", "entropy_rank"):
        assert getattr(other, name) == pytest.approx(getattr(spectrum, name), rel=1e-9)


@laws
@given(values, st.floats(0, 1))
def test_energy_rank_is_the_smallest_that_suffices(s: list[float], fraction: float) -> None:
    assume(max(s) > 1e-3)
    spectrum = Spectrum(torch.tensor(s, dtype=F64))
    r = spectrum.energy_rank(fraction)
    energy = np.cumsum(np.sort(np.square(s))[::-1]) / np.sum(np.square(s))
    assert r == 0 or energy[r - 1] >= fraction - 1e-12
    assert r <= 1 or energy[r - 2] < fraction + 1e-12
    assert (r == 0) == (fraction == 0)


def test_flat_and_zero_spectra() -> None:
    flat, zero = Spectrum(torch.full((5,), 3.0)), Spectrum(torch.zeros(4))
    assert [flat.stable_rank, flat.participation_ratio, flat.entropy_rank] == pytest.approx([5, 5, 5])
    assert (flat.numerical_rank(), flat.energy_rank(0.5), flat.energy_rank(1.0)) == (5, 3, 5)
    assert (flat.count_above(2.9), flat.count_above(3.0)) == (5, 0)
    for empty in (zero, Spectrum(torch.empty(0))):
        assert (empty.stable_rank, empty.participation_ratio, empty.entropy_rank) == (0.0, 0.0, 0.0)
        assert (empty.numerical_rank(), empty.energy_rank(0.9), empty.count_above(0.0)) == (0, 0, 0)
    assert Spectrum(torch.tensor([1e-17, 1.0])).numerical_rank() == 1
    for bad in (torch.tensor([-1.0]), torch.tensor([float("nan")]), torch.ones(2, 2)):
        with pytest.raises(UsageError):
            Spectrum(bad)
    with pytest.raises(UsageError):
        flat.energy_rank(1.5)


def test_entropy_and_participation_of_a_known_spectrum() -> None:
    spectrum = Spectrum(torch.tensor([math.sqrt(3.0), 1.0], dtype=F64))  # shares 3/4 and 1/4
    assert spectrum.entropy_rank == pytest.approx(4 / 3**0.75)
    assert spectrum.participation_ratio == pytest.approx(1.6)
    assert spectrum.stable_rank == pytest.approx(4 / 3)


def test_tolerance_grows_with_size_and_never_vanishes() -> None:
    assert tolerance(F64, (3, 100)) == 100 * torch.finfo(F64).eps
    assert tolerance(torch.float32, ()) == torch.finfo(torch.float32).eps


@laws
@given(two_spaces())
def test_angles_are_those_of_scipy(spaces: tuple[Subspace, Subspace, torch.Tensor]) -> None:
    a, b, _ = spaces
    angles = principal_angles(a, b)
    assert len(angles) == min(a.rank, b.rank)
    if len(angles):
        reference = np.sort(scipy.linalg.subspace_angles(a.basis.numpy(), b.basis.numpy()))
        np.testing.assert_allclose(angles.numpy(), reference, atol=1e-7)
    assert bool((angles[1:] >= angles[:-1]).all())
    torch.testing.assert_close(principal_angles(b, a), angles, atol=1e-9, rtol=0)


@pytest.mark.parametrize("theta", [1e-12, 1e-9, 1e-6, 1e-3, 0.7, 1.2, math.pi / 2])
def test_small_angles_keep_their_digits(theta: float) -> None:
    a = Subspace(torch.eye(4, dtype=F64)[:, :2])
    turned = torch.zeros(4, 1, dtype=F64)
    turned[0, 0], turned[2, 0] = math.cos(theta), math.sin(theta)
    assert float(principal_angles(a, Subspace(turned))[0]) == pytest.approx(theta, rel=1e-9)


@laws
@given(two_spaces(), seeds)
def test_overlap_is_a_mean_cosine_free_of_bases_and_rotation(
    spaces: tuple[Subspace, Subspace, torch.Tensor], seed: int
) -> None:
    a, b, rotation = spaces
    value = overlap(a, b)
    if not min(a.rank, b.rank):
        assert math.isnan(value)
        return
    inner = haar_orthogonal(a.rank, torch.Generator().manual_seed(seed))
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(float(principal_angles(a, b).cos().square().mean()), abs=1e-9)
    assert overlap(Subspace(a.basis @ inner), b) == pytest.approx(value, abs=1e-9)
    assert overlap(Subspace(rotation @ a.basis), Subspace(rotation @ b.basis)) == pytest.approx(value, abs=1e-9)
    assert overlap(b, a) == pytest.approx(value, abs=1e-12)
    assert overlap(a, a) == pytest.approx(1.0)


@laws
@given(two_spaces())
def test_dimensions_of_complement_sum_and_intersection(spaces: tuple[Subspace, Subspace, torch.Tensor]) -> None:
    a, b, _ = spaces
    both, shared, rest = sum_of([a, b]), intersection([a, b]), complement(a)
    assert both.rank + shared.rank == a.rank + b.rank
    assert max(a.rank, b.rank) <= both.rank <= min(a.dim, a.rank + b.rank)
    assert rest.rank == a.dim - a.rank
    assert torch.allclose(rest.basis.T @ a.basis, torch.zeros(rest.rank, a.rank, dtype=F64), atol=1e-12)
    assert both.contains(a.basis)
    assert both.contains(b.basis)
    assert a.contains(shared.basis)
    assert b.contains(shared.basis)
    x = torch.arange(float(a.dim), dtype=F64).cos()
    torch.testing.assert_close(a.project(x) + rest.project(x), x)


@laws
@given(seeds, seeds, st.integers(1, 8))
def test_one_space_in_two_bases_is_one_space(seed: int, turn: int, r: int) -> None:
    """Bases of equal spaces differ by many eps: a cut at eps itself would double the sum and empty the intersection."""
    a = space(seed, 8, r)
    b = Subspace(a.basis @ haar_orthogonal(r, torch.Generator().manual_seed(turn)))
    assert sum_of([a, b]).rank == intersection([a, b]).rank == r
    assert a.contains(b.basis)


@pytest.mark.parametrize(("theta", "ranks"), [(1e-5, (2, 0)), (1e-10, (1, 1))])
def test_an_angle_is_one_direction_or_two(theta: float, ranks: tuple[int, int]) -> None:
    line = torch.tensor([[1.0], [0.0]], dtype=F64)
    turned = torch.tensor([[math.cos(theta)], [math.sin(theta)]], dtype=F64)
    a, b = Subspace(line), Subspace(turned)
    assert (sum_of([a, b]).rank, intersection([a, b]).rank) == ranks


def test_intersection_and_sum_with_a_planted_overlap() -> None:
    q = haar_orthogonal(8, torch.Generator().manual_seed(3))
    a, b, c = Subspace(q[:, :3]), Subspace(q[:, 1:5]), Subspace(q[:, 2:4])
    assert overlap(intersection([a, b]), Subspace(q[:, 1:3])) == pytest.approx(1.0)
    assert intersection([a, b]).rank == 2
    assert overlap(intersection([a, b, c]), Subspace(q[:, 2:3])) == pytest.approx(1.0)
    assert intersection([a, b, c]).rank == 1
    assert intersection([a]).rank == 3
    assert sum_of([a, b, c]).rank == 5
    assert not a.contains(q[:, 4])
    assert a.contains(q[:, :3] @ torch.ones(3, dtype=F64))
    assert not a.contains(torch.stack([q[:, 0], q[:, 5]], dim=1))


def test_empty_subspaces_work() -> None:
    empty, line = Subspace(torch.empty(4, 0)), Subspace(torch.eye(4)[:, :1])
    assert (empty.rank, empty.dim, complement(empty).rank, complement(complement(empty)).rank) == (0, 4, 4, 0)
    assert (sum_of([empty, empty]).rank, sum_of([empty, line]).rank) == (0, 1)
    assert (intersection([empty, line]).rank, intersection([line, empty]).rank) == (0, 0)
    assert principal_angles(empty, line).shape == (0,)
    assert float(empty.project(torch.ones(4)).norm()) == 0.0
    assert not empty.contains(torch.ones(4))
    assert empty.contains(torch.zeros(4))


def test_spaces_of_a_map() -> None:
    q = haar_orthogonal(6, torch.Generator().manual_seed(4))
    gains = torch.tensor([10.0, 1.0, 1e-9], dtype=F64)
    thin = Dense(q[:, :3]) @ Dense(gains[:, None] * q[:, 3:].T)
    assert (column_space(thin).rank, column_space(thin, tolerance=1e-6).rank) == (3, 2)
    assert (column_space(thin, energy=0.9).rank, column_space(thin, energy=0.999).rank) == (1, 2)
    assert overlap(column_space(thin, tolerance=1e-6), Subspace(q[:, :2])) == pytest.approx(1.0)
    assert overlap(row_space(thin, tolerance=1e-6), Subspace(q[:, 3:5])) == pytest.approx(1.0)
    assert column_space(Dense(torch.zeros(3, 2))).rank == 0
    with pytest.raises(UsageError):
        column_space(thin, energy=0.9, tolerance=0.1)


def test_what_is_no_subspace_is_refused() -> None:
    with pytest.raises(UsageError, match="orthonormal"):
        Subspace(2 * torch.eye(3))
    with pytest.raises(UsageError, match=r"\(2, 3\)"):
        Subspace(torch.eye(3)[:2])
    with pytest.raises(UsageError, match=r"\[2, 3\]"):
        overlap(Subspace(torch.eye(3)), Subspace(torch.eye(2)))
    with pytest.raises(UsageError):
        sum_of([])
