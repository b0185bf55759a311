"""The tolerances of the package, each with its reason, and the dtype in which sums and decompositions are taken."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from virtual_weights.errors import UsageError

Item = TypeVar("Item")
Value = TypeVar("Value")

accumulate = torch.float64
"""Decompositions and long sums are taken in float64: cores are at most a few hundred wide, so the cost is small, and
no figure depends on the rounding of the storage dtype."""

WORKSPACE_BYTES = 64 * 2**20
"""Bytes that one step works on at once, such as rows converted to float64: a vocabulary is never converted whole."""

SAME_DIRECTION = torch.finfo(accumulate).eps ** 0.5
"""Angle in radians below which two directions count as one: there ``cos`` differs from 1 by less than eps. Bases from
separate decompositions of one space differ by many eps, so a cut at eps itself would tell equals apart."""

ORTHONORMAL = 1e-6
"""Largest entry of ``Q^T Q - I``: far above rounding, far below what a basis that was never orthonormalised shows."""

PROPORTIONAL = 1e-5
"""Sine of the angle between two maps that count as proportional: the root of what rounding leaves of ``1 - cos^2``,
with room."""

BELOW_ONE = 1 - 1e-7
"""Largest cosine that counts as less than 1: cosines of unit vectors in float32 are uncertain by about its eps."""

GRAM_CUT = 1e-7
"""Smallest singular value, relative to the largest, that a Gram matrix in float64 holds: it stores their squares, and
the root of eps is 1.5e-8, to which the sum over the stream adds."""

SINGULAR = 1e-10
"""Relative cut for the rank of ``I + T`` in float64: an eigenvalue of T at -1 falls below it, while a large gain of T
does not push the 1 of other directions below."""

FOLDED_RANK_CUT = 1e-5
"""Relative cut for ranks of weights whose norm gain was folded in in float32: rounding, about 1e-6 of the largest
singular value, is not a direction."""

FOLDED_ROUNDING = 1e-6
"""Relative difference of two figures that agree, where they come from weights folded in float32."""

FLOAT64_ROUNDING = 1e-9
"""Relative difference of two figures that agree, where they are sums and products over the stream in float64: rounding
is far below, the effect of a norm gain far above."""

ZERO = 1e-12
"""A float64 figure below this is zero relative to the terms it is a difference of: cancellation leaves some 1e-15 of
them."""

PRODUCT_ROUNDING = 4 * torch.finfo(accumulate).eps
"""``||fl(A B) - A B|| / (||A|| ||B||)`` of a float64 product, in Frobenius norms."""

SPREAD_ROUNDING = 16
"""Spread over root mean square, in eps of the values' dtype, up to which a sample counts as constant: a value that a
few operations computed carries a few eps."""

THREE_DIGITS = 1e-3
"""Relative difference that counts as none where a run is involved or digits are printed: a float32 run through many
blocks keeps three digits of every norm scalar."""


ROUNDINGS = 16
"""How many eps of what a figure could have been count as rounding: what products of a few factors leave, with room."""

STORED_ROUNDINGS = 2
"""The same for rounding of stored weights, whose errors are some .2 eps of an entry each and independent."""


def beyond_rounding(values: Tensor, size: Tensor | float, eps: float = torch.finfo(accumulate).eps) -> Tensor:
    """``values``, and 0 where they are rounding: ``|value| <= ROUNDINGS eps size``.

    Args:
        values: figures, such as ``||R O||``, a cosine or the parts of an eigenvalue.
        size: what each could have been, such as ``||R|| ||O||``, >= 0; broadcasts.
        eps: relative rounding of what they were computed from, that of float64 by default.

    Returns:
        A tensor like ``values``; NaN stays NaN.

    Example:
        >>> beyond_rounding(torch.tensor([1e-16, 0.5], dtype=torch.float64), 1.0)
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    return values.masked_fill(values.abs() <= ROUNDINGS * eps * size, 0.0)


@contextmanager
def in_full_float32() -> Generator[None]:
    """Multiply float32 as float32, whatever the process allows otherwise (TF32 keeps 10 bits of 23, bfloat16 7).

    The setting is of the whole process; while several threads are in here at once, it stays until the last has left.
    """
    with _PRECISION_LOCK:
        if not _PRECISION:
            _PRECISION.append(_precision())
            torch.set_float32_matmul_precision("highest")
        else:
            _PRECISION.append(_PRECISION[0])
    try:
        yield
    finally:
        with _PRECISION_LOCK:
            general, backends = _PRECISION.pop()
            if not _PRECISION:
                torch.set_float32_matmul_precision(general)
                for backend, precision in backends:
                    backend.fp32_precision = precision


_PRECISION_LOCK = Lock()
_PRECISION: list[tuple[str, list[tuple[Any, str]]]] = []
"""What the process allowed before, once for every thread that is in ``in_full_float32``."""


def _precision() -> tuple[str, list[tuple[Any, str]]]:
    """What the process allows, in the older setting and, where torch has them, in the newer ones."""
    matmuls: list[Any] = [getattr(of, "matmul", None) for of in (torch.backends.cuda, torch.backends.mkldnn)]
    backends = [(matmul, matmul.fp32_precision) for matmul in matmuls if hasattr(matmul, "fp32_precision")]
    try:
        return torch.get_float32_matmul_precision(), backends
    except RuntimeError:  # the newer settings alone are in use
        return "highest", backends


@contextmanager
def one_thread() -> Generator[None]:
    """Compute on one thread, for what would otherwise give other bits on another number of threads.

    Batched products and decompositions of small matrices do not need it. Products and decompositions of single matrices
    do: there the library divides one sum among its threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(function: Callable[[Item], Value], items: Iterable[Item], device: str = "cpu") -> Iterator[Value]:
    """``function`` of every item in order, several at a time, each computed on one thread.

    Decompositions hardly gain from threads that share one matrix: two matrices on a thread each are done sooner than
    one after the other on two. The values are the same to the last bit on any number of threads.

    Args:
        function: what is computed; it may run on another thread.
        items: what it is asked of.
        device: where it is computed; on any other than the CPU one item after the other.
    """
    threads = torch.get_num_threads()
    if threads == 1 or torch.device(device).type != "cpu":
        yield from map(function, items)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)  # what a thread sets for itself is also what threads begin with


def random_generator(seed: int) -> torch.Generator:
    """What draws the random choices of a seed, on the CPU.

    Args:
        seed: a whole number in [-2^63, 2^64), as torch takes it.

    Raises:
        UsageError: it does not fit into 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise UsageError(
            f"seed {seed}", expected="a whole number from -2^63 to 2^64 - 1", do="pass a smaller one, such as 0"
        )
    return torch.Generator().manual_seed(seed)


def exactness_bound(dtype: torch.dtype) -> float:
    """Relative error of one step of a running model up to which it is rounding: its dtype's, or the check's own.

    Args:
        dtype: of the running model. The check is in float32, and transformers takes norms and softmax in float32
            whatever the dtype, so that float64 is no better.

    Returns:
        Dimensionless, > 0: 1e-5, or 8 eps where that is more.
    """
    return max(1e-5, 8 * torch.finfo(dtype).eps)


def tolerance(dtype: torch.dtype, shape: Sequence[int]) -> float:
    """Relative cut below which a singular value is rounding: ``eps(dtype) * max(shape)``.

    Args:
        dtype: the dtype in which the decomposition was **computed** (not stored: stored entries are taken as exact,
            and eps(bfloat16) * 4096 would cut everything).
        shape: shape of the map.

    Returns:
        The cut relative to the largest singular value, dimensionless, > 0.

    Reference: Golub and Van Loan, *Matrix Computations*, section 5.4; the rule of LAPACK-based rank functions.

    Example:
        >>> tolerance(torch.float64, (4, 8)) == 8 * 2.0**-52
        True
    """
    # backward error of an SVD is a modest multiple of eps times S_1, growing no faster than the larger side
    return torch.finfo(dtype).eps * max((1, *shape))
