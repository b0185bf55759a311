"""Strongest partners, histogram and squares of all pairs of unit vectors, against the dense matrix of cosines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from virtual_weights.linalg import cosines
from virtual_weights.linalg.cosines import BINS, CosineTable, partners


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def units(n: int, d: int, seed: int) -> Tensor:
    vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=1, keepdim=True)


def quarters(n: int, seed: int) -> Tensor:
    """Vectors of four entries of a half, up to sign: cosines are multiples of a quarter, exactly, many equal."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(n, 9, generator=generator).topk(4, dim=1).indices
    signs = torch.randint(0, 2, (n, 4), generator=generator) * 1.0 - 0.5
    return torch.zeros(n, 9).scatter_(1, places, signs)


def strongest(cosine: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """By row, partner and cosine by falling modulus; of equal ones the smaller number first."""
    rows = (sorted(enumerate(row), key=lambda pair: -abs(pair[1]))[:top] for row in cosine.tolist())
    return [list(row) for row in rows]


def read(keys: Tensor, numbers: Tensor) -> list[list[tuple[int, float]]]:
    """The same of keys, with partners as places among these numbers."""
    number, cosine = partners(keys)
    place = {int(name): i for i, name in enumerate(numbers)}
    return [
        [(place[int(i)], float(c)) for i, c, key in zip(*row, strict=True) if key >= 0]
        for row in zip(number, cosine, keys, strict=True)
    ]


@given(st.integers(0, 50), st.integers(1, 40), st.integers(0, 40), st.sampled_from([1, 3, 60]), st.integers(0, 99))
def test_equal_cosines_are_ordered_by_number(n: int, first: int, second: int, top: int, seed: int) -> None:
    """Columns come in two calls; whatever comes first, the order is that of a stable sort of the dense matrix."""
    rows, columns = quarters(n, seed), quarters(first + second, seed + 1)
    row_numbers, column_numbers = torch.arange(n) * 3 + 5, torch.arange(first + second) + 2**31 - 200
    table = CosineTable(rows, row_numbers, top)
    of_columns = [table.add(columns[cut], column_numbers[cut]) for cut in (slice(first), slice(first, None))]
    cosine = rows @ columns.T
    assert read(table.strongest, column_numbers) == strongest(cosine, top)
    assert read(torch.cat(of_columns), row_numbers) == strongest(cosine.T, top)
    assert int(table.counts.sum()) == cosine.numel()
    for quarter in range(-4, 5):
        count = int(table.counts[min(BINS - 1, (quarter + 4) * BINS // 8)])
        assert count == int((cosine == quarter / 4).sum())
    assert table.squares == pytest.approx(float(cosine.square().sum()), rel=1e-6)


def test_tiles_of_any_size_have_the_same_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, numbers = units(300, 20, 0), units(500, 20, 1), torch.arange(500)
    cosine = (rows.double() @ columns.double().T).abs()
    for tile, cached in ((2**22, 2**17), (300 * 32, 320)):
        monkeypatch.setattr(cosines, "_TILE", tile)
        monkeypatch.setattr(cosines, "_CACHED", cached)
        table = CosineTable(rows, numbers[:300], 10)
        of_columns = table.add(columns, numbers)
        for keys, dense in ((table.strongest, cosine), (of_columns, cosine.T)):
            number, score = partners(keys)
            assert torch.equal(number, dense.topk(10, dim=1).indices)
            torch.testing.assert_close(score.double().abs(), dense.topk(10, dim=1).values, rtol=0, atol=1e-6)
        assert table.squares == pytest.approx(float(cosine.square().sum()), rel=1e-6)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [1, 7, 200, 300])
def test_threads_change_no_bit(n: int) -> None:
    """At these sizes the bits of a single product do depend on the number of threads."""
    rows, columns = units(n, 2048, 0), units(1100, 2048, 1)
    answers = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        table = CosineTable(rows, torch.arange(n), 10)
        answers.append((table.add(columns, torch.arange(1100)), table.strongest, table.counts, table.squares))
    for other in answers[1:]:
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(answers[0], other, strict=True))


def test_equal_directions_are_counted_in_the_last_bins() -> None:
    """Products of unit vectors round to a little more than 1; they are cosines of 1 all the same."""
    rows = units(400, 33, 3)
    table = CosineTable(rows, torch.arange(400), 1)
    of_columns = table.add(torch.cat([rows, -rows]), torch.arange(800))
    assert int(table.counts[-1]) == int(table.counts[0]) == 400
    number, score = partners(table.strongest)
    assert float(score.abs().max()) <= 1
    assert set(number[:, 0].remainder(400).eq(torch.arange(400)).tolist()) == {True}
    assert set(partners(of_columns)[1].round(decimals=5).abs().flatten().tolist()) == {1.0}
