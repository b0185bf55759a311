"""Every map obeys its dense twin: shapes, transposes, application, decompositions, norms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.linalg import (
    Centring,
    Dense,
    Diagonal,
    Identity,
    LinearMap,
    Product,
    Sum,
    eigenvalues,
    frobenius_norm,
    singular_values,
    spectral_norm,
    svd,
    trace,
)
from virtual_weights.linalg.linear_map import halves

F64 = torch.float64
laws = settings(deadline=None, max_examples=25)
dims = st.integers(1, 6)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64)


def leaf(generator: torch.Generator, kind: str, out: int, n: int) -> tuple[LinearMap, Tensor]:
    """A map and its dense twin, which is written down without the map's own code."""
    if kind == "diagonal" and out == n:
        vector = random(generator, n)
        return Diagonal(vector), torch.eye(n, dtype=F64) * vector
    if kind == "identity" and out == n:
        return Identity(n, dtype=F64), torch.eye(n, dtype=F64)
    if kind == "centring" and out == n:
        return Centring(n, dtype=F64), torch.eye(n, dtype=F64) - torch.ones(n, n, dtype=F64) / n
    if kind == "sum":
        a, b, c = random(generator, out, 1), random(generator, 1, n), random(generator, out, n)
        return Sum((Dense(a) @ Dense(b), Dense(c))), a @ b + c
    if kind == "thin sum":
        a, b, c, e = (random(generator, *shape) for shape in ((out, 1), (1, n), (out, 1), (1, n)))
        return Sum((Dense(a) @ Dense(b), Dense(c) @ Dense(e))), a @ b + c @ e
    matrix = random(generator, out, n)
    return Dense(matrix), matrix


@st.composite
def twins(draw: st.DrawFn, square: bool = False) -> tuple[LinearMap, Tensor]:
    """A chain of one to four random maps of matching shapes, and the matrix it stands for."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = draw(
        st.lists(
            st.sampled_from(["dense", "diagonal", "identity", "centring", "sum", "thin sum"]), min_size=1, max_size=4
        )
    )
    sizes = [draw(dims)]
    for kind in kinds:
        sizes.append(draw(dims) if kind in ("dense", "sum", "thin sum") else sizes[-1])
    if square and sizes[-1] != sizes[0]:
        kinds, sizes = [*kinds, "dense"], [*sizes, sizes[0]]
    pairs = [leaf(generator, kind, a, b) for kind, a, b in zip(kinds, sizes, sizes[1:], strict=False)]
    lazy, matrix = pairs[0]
    for other, twin in pairs[1:]:
        lazy, matrix = lazy @ other, matrix @ twin
    return lazy, matrix


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-10, atol=1e-9)


@laws
@given(twins())
def test_a_map_is_its_dense_twin(twin: tuple[LinearMap, Tensor]) -> None:
    lazy, matrix = twin
    x = torch.arange(2.0 * matrix.shape[1], dtype=F64).reshape(-1, 2).cos()
    assert lazy.shape == tuple(matrix.shape)
    assert close(lazy.dense(), matrix)
    assert close(lazy.T.dense(), matrix.T)
    assert close(lazy @ x, matrix @ x)
    assert close(lazy @ x[:, 0], matrix @ x[:, 0])
    assert close(lazy.T.T.dense(), matrix)
    assert close(lazy.scaled(-2.5).dense(), -2.5 * matrix)
    assert close(Sum((lazy, lazy.scaled(2.0))).dense(), 3.0 * matrix)


@laws
@given(twins(), st.integers(1, 5))
def test_transpose_reverses_a_product(twin: tuple[LinearMap, Tensor], n: int) -> None:
    lazy, matrix = twin
    other = torch.arange(float(matrix.shape[1] * n), dtype=F64).sin().reshape(-1, n)
    both, reversed_ = (lazy @ Dense(other)).T, Dense(other).T @ lazy.T
    assert both.shape == reversed_.shape
    assert close(both.dense(), reversed_.dense())
    assert close(both.dense(), (matrix @ other).T)


@laws
@given(twins())
def test_svd_reconstructs(twin: tuple[LinearMap, Tensor]) -> None:
    lazy, matrix = twin
    parts = svd(lazy)
    eye = torch.eye(len(parts.S), dtype=F64)
    assert close(parts.U * parts.S @ parts.V.T, matrix)
    assert close(parts.U.T @ parts.U, eye)
    assert close(parts.V.T @ parts.V, eye)
    assert bool((parts.S[:-1] >= parts.S[1:]).all())
    assert bool((parts.S >= 0).all())
    assert bool((parts.U.gather(0, parts.U.abs().argmax(0, keepdim=True)) > 0).all())
    expected = torch.linalg.svdvals(matrix)
    assert close(parts.S, expected[: len(parts.S)])
    assert close(singular_values(lazy), parts.S)
    assert bool((expected[len(parts.S) :] < 1e-9).all())


@laws
@given(twins())
def test_norms(twin: tuple[LinearMap, Tensor]) -> None:
    lazy, matrix = twin
    assert frobenius_norm(lazy) == pytest.approx(float(torch.linalg.matrix_norm(matrix)), rel=1e-10, abs=1e-9)
    assert spectral_norm(lazy) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-10, abs=1e-9)


@laws
@given(twins(square=True))
def test_eigenvalues_have_the_power_sums_of_the_dense_matrix(twin: tuple[LinearMap, Tensor]) -> None:
    """tr A^p = sum lambda^p for p = 1..n fixes the multiset, and is stable where eigenvalues themselves are not."""
    lazy, matrix = twin
    values = eigenvalues(lazy)
    size = max(1.0, float(torch.linalg.matrix_norm(matrix)))
    power = torch.eye(len(matrix), dtype=F64)
    assert values.dtype == torch.complex128
    assert trace(lazy) == pytest.approx(float(matrix.trace()), abs=1e-9 * size)
    for p in range(1, len(matrix) + 1):
        power = power @ matrix
        assert abs(complex((values**p).sum()) - complex(power.trace())) < 1e-9 * size**p


def test_eigenvalues_of_a_thin_circuit_are_those_of_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(5)
    o, v = random(generator, 9, 3), random(generator, 3, 9)
    found = eigenvalues(Dense(o) @ Dense(v))
    dense = torch.linalg.eigvals(o @ v)
    largest = dense[dense.abs().argsort(descending=True)[:3]]
    assert found.shape == (3,)
    assert float((found[:, None] - largest[None, :]).abs().min(dim=1).values.max()) < 1e-10
    assert float((found[:, None] - largest[None, :]).abs().min(dim=0).values.max()) < 1e-10
    assert bool((found.abs()[:-1] >= found.abs()[1:] - 1e-12).all())


def test_a_chain_of_low_rank_never_becomes_wide() -> None:
    """Two virtual weights of rank 2: whatever is formed has 2 columns, and their sum 4 singular values, not d."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, e = (random(generator, 2_000, 2) for _ in range(4))
    chain = Dense(a) @ Dense(b).T @ Centring(2_000) @ Dense(c) @ Dense(e).T
    left, right = halves(chain, F64)
    assert left.shape == (2_000, 2)
    assert right.shape == (2, 2_000)
    core = b.T @ (c - c.mean(dim=0))
    assert trace(chain) == pytest.approx(float((core * (e.T @ a).T).sum()), rel=1e-9)
    both = Sum((chain, Dense(c) @ Dense(e).T))
    assert len(svd(both).S) == 4
    assert trace(both) == pytest.approx(trace(chain) + float((c * e).sum()), rel=1e-9)


def test_rank_truncates_and_signs_do_not_depend_on_the_factoring() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b, inner = random(generator, 7, 3), random(generator, 3, 8), random(generator, 3, 3)
    whole = svd(Dense(a) @ Dense(b))
    rebased = svd(Dense(a @ inner) @ Dense(torch.linalg.solve(inner, b)), rank=2)
    assert rebased.U.shape == (7, 2)
    assert rebased.V.shape == (8, 2)
    assert close(rebased.U, whole.U[:, :2])
    assert close(rebased.S, whole.S[:2])
    assert close(rebased.V, whole.V[:, :2])
    with pytest.raises(UsageError):
        svd(Dense(a), rank=-1)


def test_empty_and_zero_maps() -> None:
    nothing = Dense(torch.empty(4, 0)) @ Dense(torch.empty(0, 4))
    assert svd(nothing).U.shape == (4, 0)
    assert eigenvalues(nothing).shape == (0,)
    assert (frobenius_norm(nothing), spectral_norm(nothing), trace(nothing)) == (0.0, 0.0, 0.0)
    assert singular_values(Dense(torch.zeros(3, 2))).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_stays_and_decompositions_are_float64(storage: torch.dtype) -> None:
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).to(storage)
    lazy = Dense(matrix) @ Diagonal(torch.ones(3, dtype=storage))
    assert lazy.dtype == storage
    assert (lazy @ torch.ones(3, dtype=F64)).dtype == F64
    assert (lazy @ torch.ones(3, dtype=storage)).dtype == storage
    assert svd(lazy).S.dtype == F64
    assert close(svd(lazy).S, torch.linalg.svdvals(matrix.to(F64)))
    assert close(lazy.scaled(1 / 3).to(F64).dense(), matrix.to(F64) * float(torch.tensor(1 / 3)))
    assert lazy.to(F64).dtype == F64
    assert lazy.device.type == "cpu"


def test_shapes_that_do_not_meet_are_named() -> None:
    with pytest.raises(UsageError, match=r"\(2, 3\) and \(4, 5\)"):
        Dense(torch.zeros(2, 3)) @ Dense(torch.zeros(4, 5))
    with pytest.raises(UsageError, match=r"\(2, 3\) and \(3, 2\)"):
        Sum((Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2))))
    with pytest.raises(UsageError, match=r"\(2, 3\).*\(2,\)"):
        Dense(torch.zeros(2, 3)) @ torch.zeros(2)
    with pytest.raises(UsageError):
        Dense(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UsageError):
        Product(())
    with pytest.raises(UsageError):
        Sum(())
    with pytest.raises(UsageError, match=r"\(2, 3\)"):
        eigenvalues(Dense(torch.zeros(2, 3)))
    with pytest.raises(UsageError, match=r"\(2, 3\)"):
        trace(Dense(torch.zeros(2, 3)))


def test_products_are_flat() -> None:
    a = Dense(torch.eye(2))
    assert [type(f) for f in ((a @ Identity(2)) @ (a @ a)).chain()] == [Dense, Identity, Dense, Dense]
    assert len(Product((a @ a, a)).factors) == 3
