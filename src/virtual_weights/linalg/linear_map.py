"""Lazy linear maps: columns are vectors, a map has shape ``(out, in)``, and nothing is dense until ``.dense()``.

The classes are one abstract base and a handful of finals. Every result of ``map @ tensor`` has the dtype
``torch.promote_types(map.dtype, tensor.dtype)``; storage is never rounded down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import final, overload

import torch
from torch import Tensor

from virtual_weights.errors import UsageError

Shape = tuple[int, int]
_CPU = torch.device("cpu")


class LinearMap(ABC):
    """A linear map from R^in to R^out, held in whatever form is cheapest.

    ``A @ B`` of two maps is a lazy :class:`Product`; ``A @ x`` of a tensor of shape (in,) or (in, n) applies the map to
    each column.
    """

    def __repr__(self) -> str:
        factors = self.factors if isinstance(self, Product) else ()
        sizes = " @ ".join(f"({factor.shape[0]}, {factor.shape[1]})" for factor in factors[:6])
        thin = f" = {sizes}{' @ ...' if len(factors) > 6 else ''}" if factors else ""
        return f"{type(self).__name__} {self.shape}{thin}, {self.dtype}, {self.device}; .dense() forms it"

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """(out, in)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The storage dtype, promoted over all factors."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the entries are."""

    @property
    @abstractmethod
    def T(self) -> LinearMap:
        """The transpose, as lazy as the map itself."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """The map applied to the columns of ``x``, shape (in, n); returns (out, n)."""

    @abstractmethod
    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LinearMap:
        """The same map with its entries in another dtype or on another device."""

    @abstractmethod
    def chain(self) -> tuple[LinearMap, ...]:
        """The map as a product of factors, outermost first; the map alone when it has no thinner form."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The (out, in) matrix itself; the only place where it is formed."""

    def scaled(self, alpha: float) -> LinearMap:
        """``alpha * self``, lazily: the entries of the map stay as stored."""
        # at least float32: a factor such as 1/sqrt(80) rounded to bfloat16 would move the whole map by 0.4 %
        dtype = torch.promote_types(self.dtype, torch.float32)
        gain = torch.full((self.shape[0],), alpha, dtype=dtype, device=self.device)
        return Product((Diagonal(gain), self))

    @overload
    def __matmul__(self, other: LinearMap) -> LinearMap: ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    def __matmul__(self, other: LinearMap | Tensor) -> LinearMap | Tensor:
        if isinstance(other, LinearMap):
            return Product((self, other))
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            raise UsageError(
                f"a map of shape {self.shape} was applied to a tensor of shape {tuple(other.shape)}",
                expected=f"columns of length {self.shape[1]}: shape ({self.shape[1]},) or ({self.shape[1]}, n)",
                do="transpose the tensor, or the map (.T), so that columns are vectors",
            )
        return self.apply(other) if other.ndim == 2 else self.apply(other[:, None])[:, 0]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Dense(LinearMap):
    """A matrix as it is stored, shape (out, in)."""

    matrix: Tensor

    def __post_init__(self) -> None:
        _require(self.matrix, 2, "a matrix (out, in)")

    @property
    def shape(self) -> Shape:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def T(self) -> Dense:
        return Dense(self.matrix.T)

    def apply(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.dtype, x.dtype)
        return self.matrix.to(dtype) @ x.to(dtype)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Dense:
        return Dense(self.matrix.to(device=device, dtype=dtype))

    def chain(self) -> tuple[LinearMap, ...]:
        return (self,)

    def dense(self) -> Tensor:
        return self.matrix


@final
@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(LinearMap):
    """diag(vector), such as the gain of a norm."""

    vector: Tensor

    def __post_init__(self) -> None:
        _require(self.vector, 1, "a vector (n,)")

    @property
    def shape(self) -> Shape:
        return self.vector.shape[0], self.vector.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.vector.dtype

    @property
    def device(self) -> torch.device:
        return self.vector.device

    @property
    def T(self) -> Diagonal:
        return self

    def apply(self, x: Tensor) -> Tensor:
        return self.vector[:, None] * x

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Diagonal:
        return Diagonal(self.vector.to(device=device, dtype=dtype))

    def chain(self) -> tuple[LinearMap, ...]:
        return (self,)

    def dense(self) -> Tensor:
        return torch.diag(self.vector)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Identity(LinearMap):
    """I on R^n. It has no entries: ``dtype`` is what ``dense()`` returns and what results are promoted to at least."""

    n: int
    dtype: torch.dtype = torch.float32  # pyright: ignore[reportIncompatibleMethodOverride,reportAssignmentType]
    device: torch.device = _CPU  # pyright: ignore[reportIncompatibleMethodOverride,reportAssignmentType]

    @property
    def shape(self) -> Shape:
        return self.n, self.n

    @property
    def T(self) -> Identity:
        return self

    def apply(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(self.dtype, x.dtype))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Identity:
        return replace(self, dtype=dtype or self.dtype, device=torch.device(device or self.device))

    def chain(self) -> tuple[LinearMap, ...]:
        return (self,)

    def dense(self) -> Tensor:
        return torch.eye(self.n, dtype=self.dtype, device=self.device)


@final
@dataclass(frozen=True, eq=False, repr=False)
class Centring(LinearMap):
    """P = I - 11^T/n, the projection that takes the mean of a vector away (LayerNorm's linear part)."""

    n: int
    dtype: torch.dtype = torch.float32  # pyright: ignore[reportIncompatibleMethodOverride,reportAssignmentType]
    device: torch.device = _CPU  # pyright: ignore[reportIncompatibleMethodOverride,reportAssignmentType]

    @property
    def shape(self) -> Shape:
        return self.n, self.n

    @property
    def T(self) -> Centring:
        return self

    def apply(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(self.dtype, x.dtype))
        return x - x.sum(dim=0, keepdim=True) / max(self.n, 1)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Centring:
        return replace(self, dtype=dtype or self.dtype, device=torch.device(device or self.device))

    def chain(self) -> tuple[LinearMap, ...]:
        return (self,)

    def dense(self) -> Tensor:
        return self.apply(torch.eye(self.n, dtype=self.dtype, device=self.device))


@final
@dataclass(frozen=True, eq=False, repr=False)
class Product(LinearMap):
    """factors[0] @ factors[1] @ ..., flattened, never multiplied out until asked."""

    factors: tuple[LinearMap, ...]

    def __init__(self, factors: Sequence[LinearMap]) -> None:
        _require_some(factors, "Product")
        for left, right in pairwise(factors):
            if left.shape[1] != right.shape[0]:
                raise UsageError(
                    f"maps of shapes {left.shape} and {right.shape} were multiplied",
                    expected="the inner dimensions to agree: (out, m) @ (m, in)",
                    do="transpose one of them (.T), or check that both are on the same stream",
                )
        flat = [leaf for factor in factors for leaf in (factor.factors if isinstance(factor, Product) else (factor,))]
        object.__setattr__(self, "factors", tuple(flat))

    @property
    def shape(self) -> Shape:
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (factor.dtype for factor in self.factors))

    @property
    def device(self) -> torch.device:
        return _device(self.factors)

    @property
    def T(self) -> Product:
        return Product(tuple(factor.T for factor in reversed(self.factors)))

    def apply(self, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.apply(x)
        return x

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Product:
        return Product(tuple(factor.to(dtype, device) for factor in self.factors))

    def chain(self) -> tuple[LinearMap, ...]:
        return tuple(leaf for factor in self.factors for leaf in factor.chain())

    def dense(self) -> Tensor:
        left, right = halves(self, self.dtype)
        return left @ right


@final
@dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearMap):
    """terms[0] + terms[1] + ..., such as I + T."""

    terms: tuple[LinearMap, ...]

    def __init__(self, terms: Sequence[LinearMap]) -> None:
        _require_some(terms, "Sum")
        for term in terms[1:]:
            if term.shape != terms[0].shape:
                raise UsageError(
                    f"maps of shapes {terms[0].shape} and {term.shape} were added",
                    expected="equal shapes",
                    do="check that both maps have the same domain and range",
                )
        object.__setattr__(self, "terms", tuple(terms))

    @property
    def shape(self) -> Shape:
        return self.terms[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (term.dtype for term in self.terms))

    @property
    def device(self) -> torch.device:
        return _device(self.terms)

    @property
    def T(self) -> Sum:
        return Sum(tuple(term.T for term in self.terms))

    def apply(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (term.apply(x) for term in self.terms))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Sum:
        return Sum(tuple(term.to(dtype, device) for term in self.terms))

    def chain(self) -> tuple[LinearMap, ...]:
        """A B + C D = [A C] [B; D] when that is thinner than the sum itself; else the sum alone."""
        inner = sum(_narrowest(term.chain())[1] for term in self.terms)
        if inner >= min(self.shape):
            return (self,)
        pairs = [halves(term, self.dtype) for term in self.terms]
        return (
            Dense(torch.cat([left for left, _ in pairs], dim=1)),
            Dense(torch.cat([right for _, right in pairs], dim=0)),
        )

    def dense(self) -> Tensor:
        return reduce(torch.add, (term.dense() for term in self.terms)).to(self.dtype)


def halves(map: LinearMap, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``map = left @ right``, cut at the narrowest dimension r of its chain and multiplied outwards from there.

    Args:
        map: any map; of shape (out, in).
        dtype: dtype in which the factors are multiplied.

    Returns:
        left (out, r) and right (r, in). No intermediate is wider than r on one side.
    """
    chain = map.to(dtype).chain()
    cut, rank = _narrowest(chain)
    left = _multiplied(chain[:cut], rank, dtype, map.device)
    right = _multiplied(tuple(factor.T for factor in reversed(chain[cut:])), rank, dtype, map.device)
    return left, right.T


def _narrowest(chain: Sequence[LinearMap]) -> tuple[int, int]:
    dims = [chain[0].shape[0], *(factor.shape[1] for factor in chain)]
    rank = min(dims)
    return dims.index(rank), rank


def _multiplied(factors: Sequence[LinearMap], rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not factors:
        return torch.eye(rank, dtype=dtype, device=device)
    return reduce(lambda x, factor: factor.apply(x), reversed(factors[:-1]), factors[-1].dense())


def _device(maps: Sequence[LinearMap]) -> torch.device:
    # maps without entries (Identity, Centring) say cpu; a map that holds entries on an accelerator decides
    return next((m.device for m in maps if m.device.type != "cpu"), _CPU)


def _require(entries: Tensor, ndim: int, expected: str) -> None:
    if entries.ndim != ndim or not entries.is_floating_point():
        raise UsageError(
            f"a map was given entries of shape {tuple(entries.shape)} and dtype {entries.dtype}",
            expected=f"{expected} of floating-point numbers",
            do="reshape or convert the tensor first",
        )


def _require_some(maps: Sequence[LinearMap], name: str) -> None:
    if not maps:
        raise UsageError(f"{name} of no maps", expected="at least one map", do="use Identity(n) for an empty product")
