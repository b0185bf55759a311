"""Products of Grams in blocks: against the definition, at every scale, and the same bits however they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from virtual_weights.linalg import MapStack, haar_orthogonal
from virtual_weights.linalg.gram_blocks import GramBlock, ThinBlock, WideBlock, gram_products

F32, F64 = torch.float32, torch.float64


def stack(seed: int, shape: tuple[int, int, int], shared: int = 1, scale: float = 1.0, metric: bool = True) -> MapStack:
    """Maps in m outers (m, k, d), each shared by some maps, some metrics singular."""
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(*shape, generator=generator) * scale
    n = shape[0] * shared
    roots = torch.randn(n, shape[1], shape[1], generator=generator, dtype=F64)
    roots[0, :, 0] = 0.0
    index = torch.arange(shape[0]).repeat_interleave(shared)
    return MapStack(outer, index, roots.mT @ roots if metric else None, torch.zeros(n, dtype=torch.int64))


def grams(maps: MapStack | list[Tensor]) -> Tensor:
    """(n, d, d) float64 of trace 1, from the definition."""
    if isinstance(maps, list):
        dense = torch.stack([rows.to(F64).T @ rows.to(F64) for rows in maps])
    else:
        outer = maps.outer.to(F64)[maps.index]
        dense = outer.mT @ outer if maps.metric is None else outer.mT @ maps.metric @ outer
    return (dense / dense.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]).nan_to_num(0.0)


def block(maps: MapStack | list[Tensor], dtype: torch.dtype = F32) -> GramBlock:
    if isinstance(maps, list):
        return WideBlock([[rows] for rows in maps], maps[0].shape[1], dtype, "cpu")
    return ThinBlock(maps, dtype, "cpu")


def wide(seed: int, n: int, shape: tuple[int, int], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) * scale for _ in range(n)]


def error(reader: MapStack | list[Tensor], writer: MapStack | list[Tensor], dtype: torch.dtype) -> float:
    """The largest difference of scores, over the score at random orientation, 1/sqrt(d)."""
    ((found,),) = gram_products([block(reader, dtype)], [block(writer, dtype)], [[True]])
    exact = torch.einsum("rij,wij->rw", grams(reader), grams(writer))
    d = grams(reader).shape[-1]
    assert torch.allclose(found[-1, :-1], exact.sum(0), rtol=1e-5)
    assert torch.allclose(found[:-1, -1], exact.sum(1), rtol=1e-5)
    return float((found[:-1, :-1].clamp(min=0).sqrt() - exact.clamp(min=0).sqrt()).abs().max() * d**0.5)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 3), st.integers(2, 70), st.integers(-12, 12))
def test_products_are_those_of_the_definition(seed: int, k: int, shared: int, d: int, exponent: int) -> None:
    reader = stack(seed, (5, k, d), shared, 10.0**exponent)
    writer = stack(seed + 1, (4, k + 1, d), metric=False)
    rows = wide(seed, 2, (2 * d, d), 10.0**-exponent)
    for left, right in ((reader, writer), (reader, rows), (rows, writer), (rows, rows)):
        assert error(left, right, F32) < 1e-6
        assert error(left, right, F64) < 1e-12


@pytest.mark.parametrize("exponent", [-12, 0, 12])
def test_float32_is_good_to_a_millionth_of_the_null_at_every_tile_size(exponent: int) -> None:
    reader, writer = stack(1, (6, 20, 620), 2, 10.0**exponent), stack(2, (9, 20, 620))
    assert error(reader, writer, F32) < 1e-6
    assert error(reader, wide(3, 2, (900, 620), 10.0**-exponent), F32) < 1e-6


def test_pairs_that_are_nearly_orthogonal_keep_their_digits() -> None:
    """A turned basis of the stream, of which readers and writers take halves that share one faint direction."""
    generator = torch.Generator().manual_seed(0)
    basis = haar_orthogonal(64, generator).float()
    tilted = basis[:8] + 1e-5 * basis[40]
    reader = MapStack(tilted[None], torch.zeros(1, dtype=torch.int64), None, torch.zeros(1, dtype=torch.int64))
    writer = MapStack(basis[None, 40:48], torch.zeros(1, dtype=torch.int64), None, torch.zeros(1, dtype=torch.int64))
    assert error(reader, writer, F32) < 1e-6
    assert error(reader, [basis[40:]], F32) < 1e-6
    assert error([basis[40:]], [tilted], F32) < 1e-6


def test_circuits_whose_factors_nearly_cancel_keep_their_digits() -> None:
    """A metric of one large direction, inside an outer factor that hardly has it."""
    turn = haar_orthogonal(8, torch.Generator().manual_seed(0))
    metric = turn @ torch.diag(torch.tensor([1.0] + [1e-6] * 7, dtype=F64)) @ turn.T
    rows = torch.randn(8, 50, generator=torch.Generator().manual_seed(1), dtype=F64)
    rows[0] *= 1e-4
    zero = torch.zeros(1, dtype=torch.int64)
    reader = MapStack((turn @ rows)[None], zero, metric[None], zero)
    assert error(reader, stack(2, (5, 3, 50)), F32) < 1e-6


def test_a_map_that_is_zero_has_no_product_and_is_in_no_sum() -> None:
    maps = stack(0, (4, 3, 20))
    maps.outer[1] = 0.0
    rows = [*wide(1, 1, (9, 20)), torch.zeros(9, 20)]
    products = gram_products([block(maps)], [block(rows)], [[True]])[0][0]
    assert not bool(products[1].any())
    assert not bool(products[:, 1].any())
    torch.testing.assert_close(products[-1, 0], products[:-1, 0].sum(), rtol=1e-6, atol=0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_bits_depend_neither_on_threads_nor_on_what_is_computed_beside() -> None:
    readers = [stack(i, (20, 16, 700), 2) for i in range(3)]
    writers: list[MapStack | list[Tensor]] = [*(stack(10 + i, (30, 16, 700)) for i in range(2)), wide(5, 2, (800, 700))]
    reach = [[True, False, True], [True, True, False], [False, True, True]]
    results: list[list[list[Tensor]]] = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(gram_products([block(m) for m in readers], [block(m) for m in writers], reach))
    with threads(2):
        results.append(
            [
                gram_products([block(m)], [block(w) for w in writers], [row])[0]
                for m, row in zip(readers, reach, strict=True)
            ]
        )
        columns = [
            gram_products([block(m) for m in readers], [block(w)], [[row[j]] for row in reach])
            for j, w in enumerate(writers)
        ]
        results.append([[columns[j][i][0] for j in range(3)] for i in range(3)])
    for other in results[1:]:
        for i in range(3):
            for j in range(3):
                assert torch.equal(results[0][i][j], other[i][j]), (i, j)


def test_pairs_that_are_not_wanted_have_their_sums_alone() -> None:
    maps = stack(0, (4, 3, 20))
    wanted, sums = (gram_products([block(maps)], [block(maps)], [[want]])[0][0] for want in (True, False))
    torch.testing.assert_close(sums[-1], wanted[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[:, -1], wanted[:, -1], rtol=1e-6, atol=0)


def _noting(rows: Tensor, precisions: list[str]) -> Iterator[Tensor]:
    for part in rows.split(5):
        precisions.append(torch.get_float32_matmul_precision())
        yield part


def test_a_newer_setting_of_the_precision_is_left_as_it_was() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        gram_products([block(stack(0, (3, 4, 40)))], [block(stack(1, (3, 4, 40)))], [[True]])
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_float32_is_multiplied_as_float32_whatever_the_process_allows() -> None:
    maps, precisions = stack(0, (3, 4, 40)), list[str]()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        gram_products(
            [block(maps)], [block(maps)], [[True]], lambda *_: precisions.append(torch.get_float32_matmul_precision())
        )
        rows = torch.randn(20, 40)
        WideBlock([_noting(rows, precisions)], 40, F32, "cpu")
        assert set(precisions) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
