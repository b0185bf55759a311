"""All pairs: both forms against a naive dense product, in every shape, sharing, order and budget."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.linalg import MapStack, all_pairs, haar_orthogonal, self_moments
from virtual_weights.linalg.pairing import pairing

F64, NAN = torch.float64, float("nan")
FORMS = ("gram", "direct")


def stack(seed: int, n: int, shape: tuple[int, int, int], *, metric: bool = True, positions: int = 4) -> MapStack:
    """n random maps over m shared outers (m, k, d), some metrics singular, positions in no order."""
    m, k, _ = shape
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(n, k, k, generator=generator, dtype=F64)
    roots[:: max(1, n // 2), :, 0] = 0.0  # a zero pivot: Cholesky alone would fail
    return MapStack(
        outer=torch.randn(m, k, shape[2], generator=generator, dtype=F64),
        index=torch.randint(m, (n,), generator=generator),
        metric=roots.mT @ roots if metric else None,
        position=torch.randint(positions, (n,), generator=generator),
    )


def grams(maps: MapStack) -> Tensor:
    """(n, d, d) written down from the definition."""
    outer = maps.outer.to(F64)[maps.index]
    metric = torch.eye(maps.inner, dtype=F64) if maps.metric is None else maps.metric
    return outer.mT @ metric @ outer


def naive(readers: MapStack, writers: MapStack) -> Tensor:
    squared = torch.einsum("rij,wij->rw", grams(readers), grams(writers))
    return squared.masked_fill(writers.position[None, :] > readers.position[:, None], NAN)


def norms(readers: MapStack, writers: MapStack) -> Tensor:
    """||R||^2 ||O||^2 of each pair: what errors are relative to."""
    return self_moments(readers)[0][:, None] * self_moments(writers)[0][None, :]


def assert_same(found: Tensor, expected: Tensor, scale: Tensor, tol: float) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    assert float(((found - expected) / scale).nan_to_num().abs().max()) <= tol


stacks = st.builds(
    lambda seed, n, m, k, d, metric: (seed, n, (m, k, d), metric),
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 4),
    st.just(0),
    st.booleans(),
)


@settings(deadline=None, max_examples=25)
@given(stacks, stacks, st.integers(1, 13), st.sampled_from(FORMS))
def test_every_form_is_the_naive_product(reader, writer, d: int, form) -> None:
    readers, writers = (stack(seed, n, (m, k, d), metric=metric) for seed, n, (m, k, _), metric in (reader, writer))
    found = all_pairs(readers, writers, form=form)
    expected = naive(readers, writers)
    assert_same(found.squared, expected, norms(readers, writers).clamp(min=1e-30), 1e-12)
    assert found.form == form
    assert bool((found.squared.nan_to_num() >= 0).all())
    assert (found.flops > 0) == bool((~expected.isnan()).any())


@pytest.fixture(scope="module")
def generic() -> tuple[MapStack, MapStack]:
    """Sizes above every tile boundary: 90 and 75 maps, k = 5 and 7, d = 150."""
    return stack(1, 90, (30, 5, 150), positions=12), stack(2, 75, (75, 7, 150), positions=12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_relative_accuracy_on_generic_data(generic, form, dtype: torch.dtype, tol: float) -> None:
    readers, writers = generic
    expected = naive(readers, writers)
    found = all_pairs(readers, writers, form=form, dtype=dtype).squared
    assert found.dtype == F64
    assert_same(found, expected, expected.nan_to_num(1.0), tol)


@pytest.mark.parametrize("form", FORMS)
def test_small_budgets_give_the_same_result(form) -> None:
    """Budgets down to the smallest that works: tiles of one row, chunks of one map."""
    readers, writers = stack(1, 20, (5, 3, 30)), stack(2, 15, (15, 4, 30))
    expected = naive(readers, writers)
    with pytest.raises(ResourceError, match="at least") as refused:
        all_pairs(readers, writers, form=form, memory=1000)
    least = int(refused.value.expected.split()[2])
    for memory in (least, int(1.1 * least), 2 * least, 5 * least):
        found = all_pairs(readers, writers, form=form, memory=memory).squared
        assert_same(found, expected, expected.nan_to_num(1.0), 1e-10)
    with pytest.raises(ResourceError):
        all_pairs(readers, writers, form=form, memory=least - 1)


class LiveBytes(TorchDispatchMode):
    """Counts the storage that operations allocate and still hold; inputs made outside do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.holders: dict[int, int] = {}
        self.outside: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for each in tree_leaves((args, kwargs or {})):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in self.holders:
                self.outside.add(each.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in self.outside:
                self._hold(each)
        self.peak = max(self.peak, self.live)
        return result

    def _hold(self, tensor: Tensor) -> None:
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        self.live += 0 if self.holders.get(key) else size
        self.holders[key] = self.holders.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.live -= size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_workspace_stays_within_the_budget(generic, form, dtype: torch.dtype) -> None:
    readers, writers = (replace(side, outer=side.outer.to(torch.bfloat16)) for side in generic)
    all_pairs(readers, writers, form=form, dtype=dtype)
    for memory in (600_000, 2_000_000, 10_000_000):
        with LiveBytes() as bytes_:
            all_pairs(readers, writers, form=form, dtype=dtype, memory=memory)
        # the result alone is 54,000 bytes; a few lists of map numbers are not in the budget
        assert 8 * 90 * 75 < bytes_.peak < memory + 30_000


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_storage_is_taken_as_exact(generic, form, storage: torch.dtype) -> None:
    readers, writers = (replace(side, outer=side.outer.to(storage)) for side in generic)
    expected = naive(readers, writers)
    found = all_pairs(readers, writers, form=form).squared
    assert_same(found, expected, expected.nan_to_num(1.0), 1e-10)


def test_the_cheaper_form_is_taken() -> None:
    """d < 2 k^2 is where the Gram form begins to pay."""
    wide, deep = (stack(3, 200, (200, k, d), metric=False, positions=1) for k, d in ((2, 256), (16, 32)))
    assert all_pairs(wide, wide).form == "direct"
    assert all_pairs(deep, deep).form == "gram"
    for maps in (wide, deep):
        chosen = all_pairs(maps, maps)
        other = all_pairs(maps, maps, form="gram" if chosen.form == "direct" else "direct")
        assert chosen.flops < other.flops


def test_pairs_that_cannot_reach_are_skipped_and_cost_nothing() -> None:
    side = stack(4, 320, (320, 4, 16), metric=False)
    triangle = replace(side, position=torch.arange(320))
    everything = replace(side, position=torch.zeros(320, dtype=torch.int64))
    part, whole = pairing(triangle, triangle), pairing(everything, everything)
    assert whole.pairs == 320 * 320
    assert part.pairs < 0.57 * whole.pairs
    assert all_pairs(triangle, triangle).flops < 0.7 * all_pairs(everything, everything).flops
    assert int(all_pairs(triangle, triangle).squared.isnan().sum()) == 320 * 319 // 2
    early = replace(side, position=torch.full((320,), -1))
    nothing = all_pairs(early, everything)
    assert nothing.flops == 0
    assert bool(nothing.squared.isnan().all())


@pytest.mark.parametrize("form", FORMS)
def test_empty_stacks(form) -> None:
    some, none = stack(5, 3, (2, 2, 4)), stack(6, 0, (2, 2, 4), metric=False)
    assert all_pairs(some, none, form=form).squared.shape == (3, 0)
    assert all_pairs(none, some, form=form).squared.shape == (0, 3)
    assert self_moments(none)[0].shape == (0,)


def planted(d: int, k: int, theta: float) -> tuple[MapStack, MapStack, Tensor]:
    """Two readers and one writer: reader 0 within theta of orthogonal to it, reader 1 aligned."""
    q = haar_orthogonal(d, torch.Generator().manual_seed(7))
    a, b = q[:, :k].T, q[:, k : 2 * k].T
    readers = torch.stack([b * (1 - theta**2) ** 0.5 + theta * a, a])
    zero = torch.zeros(2, dtype=torch.int64)
    expected = torch.tensor([k * theta**2, k], dtype=F64)
    return MapStack(readers, torch.arange(2), None, zero), MapStack(a[None], zero[:1], None, zero[:1]), expected


@pytest.mark.parametrize("theta", [1e-2, 1e-4, 1e-7])
def test_nearly_orthogonal_pairs_are_as_accurate_as_stated(theta: float) -> None:
    """Gram: eps ||G_r|| ||G_w||. Direct: relative to the small value itself, down to eps^2 ||R||^2 ||O||^2."""
    k = 8
    readers, writers, expected = planted(96, k, theta)
    for dtype, eps in ((torch.float64, 2.3e-16), (torch.float32, 1.2e-7)):
        gram = all_pairs(readers, writers, form="gram", dtype=dtype).squared[:, 0]
        direct = all_pairs(readers, writers, form="direct", dtype=dtype).squared[:, 0]
        assert float((gram - expected).abs().max()) < 10 * eps * k  # ||G||_F^2 = k
        # (R O)_ij has an error of eps, so its square one of 2 theta eps + eps^2
        assert float((direct - expected)[0].abs()) < 10 * k * k * (theta * eps + eps**2)


def test_orthogonal_pairs_are_zero_and_never_below() -> None:
    q = haar_orthogonal(96, torch.Generator().manual_seed(14))
    blocks = MapStack(q.reshape(12, 8, 96), torch.arange(12), None, torch.zeros(12, dtype=torch.int64))
    for form in FORMS:
        squared = all_pairs(blocks, blocks, form=form).squared
        assert bool((squared >= 0).all())
        assert float((squared - 8 * torch.eye(12, dtype=F64)).abs().max()) < 10 * 2.3e-16 * 8


def test_float32_keeps_the_trace_part_in_float64() -> None:
    """Maps close to a multiple of the identity: all that float32 may round is the small part beside it."""
    generator = torch.Generator().manual_seed(15)
    d = 64
    outer = torch.stack([haar_orthogonal(d, generator) for _ in range(6)]).to(torch.float32)
    outer += 1e-3 * torch.randn(outer.shape, generator=generator)
    near = MapStack(outer, torch.arange(6), None, torch.zeros(6, dtype=torch.int64))
    expected = naive(near, near)
    found = all_pairs(near, near, form="gram", dtype=torch.float32).squared
    assert float(((found - expected) / expected).abs().max()) < 2e-9  # eps(float32) is 1.2e-7


def test_scores_do_not_move_under_rotation_and_rebasing(generic) -> None:
    readers, writers = generic
    before = all_pairs(readers, writers).squared
    rotation = haar_orthogonal(150, torch.Generator().manual_seed(8))
    inner = torch.randn(5, 5, generator=torch.Generator().manual_seed(9), dtype=F64) + 3 * torch.eye(5, dtype=F64)
    back = torch.linalg.inv(inner)
    assert readers.metric is not None
    turned = replace(readers, outer=inner @ readers.outer @ rotation, metric=back.mT @ readers.metric @ back)
    after = all_pairs(turned, replace(writers, outer=writers.outer @ rotation)).squared
    assert_same(after, before, before.nan_to_num(1.0), 1e-9)


def test_a_transposed_writer_is_another_result() -> None:
    """The mutation this catches: reading O where O^T is meant gives a matrix of the same shape when k = d."""
    readers, writers = stack(10, 6, (6, 5, 5), positions=1), stack(11, 6, (6, 5, 5), positions=1)
    right, wrong = naive(readers, writers), naive(readers, replace(writers, outer=writers.outer.mT))
    for form in FORMS:
        found = all_pairs(readers, writers, form=form).squared
        assert float(((found - right) / right).abs().max()) < 1e-10
        assert float(((found - wrong) / right).abs().max()) > 0.1


def test_order_of_maps_does_not_matter(generic) -> None:
    readers, writers = generic
    shuffle = torch.randperm(readers.count, generator=torch.Generator().manual_seed(12))
    assert readers.metric is not None
    mixed = MapStack(readers.outer, readers.index[shuffle], readers.metric[shuffle], readers.position[shuffle])
    before, after = all_pairs(readers, writers).squared[shuffle], all_pairs(mixed, writers).squared
    assert_same(after, before, before.nan_to_num(1.0), 1e-12)


@pytest.mark.parametrize("metric", [True, False])
def test_self_moments_are_traces_of_grams(metric: bool) -> None:
    maps = stack(13, 17, (5, 3, 11), metric=metric)
    trace, square = self_moments(maps)
    dense = grams(maps)
    torch.testing.assert_close(trace, dense.diagonal(dim1=1, dim2=2).sum(dim=1))
    torch.testing.assert_close(square, (dense @ dense).diagonal(dim1=1, dim2=2).sum(dim=1))
    low = replace(maps, outer=maps.outer.to(torch.bfloat16))
    torch.testing.assert_close(self_moments(low)[0], grams(low).diagonal(dim1=1, dim2=2).sum(dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_progress_ends_at_the_whole(generic, form) -> None:
    seen: list[tuple[float, float]] = []
    readers, writers = generic
    result = all_pairs(readers, writers, form=form, memory=4 * 2**20, progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert {step[1] for step in seen} == {result.flops}
    assert done[-1] == pytest.approx(result.flops)
    assert len(seen) > 2


def test_stacks_that_cannot_be_meant_are_refused(generic) -> None:
    readers, writers = generic
    with pytest.raises(UsageError, match=r"150.*149"):
        all_pairs(readers, replace(writers, outer=writers.outer[:, :, :149]))
    with pytest.raises(UsageError, match="bfloat16"):
        all_pairs(readers, writers, dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="index from"):
        replace(readers, index=readers.index + 1000)
    for bad in ({"metric": torch.zeros(90, 4, 4)}, {"position": torch.zeros(3)}, {"outer": torch.zeros(3, 150)}):
        with pytest.raises(UsageError, match="a stack of outer"):
            replace(readers, **bad)
