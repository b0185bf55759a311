"""The few LAPACK calls that this folder makes, with the types that torch's own stubs leave open."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

# torch.linalg is a C module without signatures: one cast here instead of unknown types everywhere
_SMALL = 256  # sides of matrices too small to share between threads
Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
_qr = cast(Callable[..., Pair], torch.linalg.qr)
_svd = cast(Callable[..., Triple], torch.linalg.svd)
_cholesky = cast(Callable[..., Pair], torch.linalg.cholesky_ex)
_eigh = cast(Callable[..., Pair], torch.linalg.eigh)


def orthonormal(a: Tensor, *, complete: bool = False) -> Pair:
    """``a = Q R``: Q with orthonormal columns, R upper triangular; ``complete`` makes Q square."""
    return _qr(a, mode="complete" if complete else "reduced")


def triangular(a: Tensor) -> Tensor:
    """R of ``a = Q R``, without Q."""
    return _qr(a, mode="r")[1]


def singular(a: Tensor, *, full: bool = False) -> Triple:
    """``a = U diag(S) Vh``, S descending; ``full`` makes U and Vh square."""
    return _svd(a, full_matrices=full)


def gains(a: Tensor) -> Tensor:
    """Singular values of the last two axes, descending."""
    with _one_thread(a):
        return cast(Tensor, torch.linalg.svdvals(a))


def eigen(a: Tensor) -> Tensor:
    """Eigenvalues of a square matrix, complex, in no order."""
    return cast(Tensor, torch.linalg.eigvals(a))


def lengths(a: Tensor) -> Tensor:
    """Euclidean norm of each column, without overflow."""
    return cast(Tensor, torch.linalg.vector_norm(a, dim=0))


@contextmanager
def _one_thread(a: Tensor) -> Generator[None]:
    """For a batch of small matrices: threads that share a small matrix wait for each other more than they work.

    Where other processes use the cores too, that waiting made such batches five times slower.
    """
    threads = torch.get_num_threads()
    if a.ndim < 3 or min(a.shape[-2:]) > _SMALL or a.device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def square_roots(metric: Tensor) -> Tensor:
    """L with ``L^T L = metric`` for each symmetric positive semidefinite (k, k) matrix of a batch.

    Cholesky where it exists; else the symmetric eigenvalues, those below 0 being rounding and dropped.
    """
    lower, failed = _cholesky(metric)
    roots = lower.mT
    semidefinite = failed > 0
    if bool(semidefinite.any()):
        values, vectors = _eigh(metric[semidefinite])
        roots[semidefinite] = values.clamp(min=0.0).sqrt()[:, :, None] * vectors.mT
    return roots
