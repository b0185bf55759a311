"""A checkpoint that is in memory already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from virtual_weights.checkpoint.source import (
    STORAGE_DTYPES,
    AtRest,
    Source,
    TensorInfo,
    check_finite,
    find_tensor,
    fingerprint,
    row_span,
)
from virtual_weights.errors import UsageError

_DTYPE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}


class MappingSource(Source):
    """Tensors in memory under the names of a dialect; they are held, not copied, until they are read.

    Whoever changes a tensor in place changes the source; its fingerprint, taken anew each time, shows it.

    Args:
        tensors: by name; on any device.
        config: the configuration that belongs to them, as plain JSON values.
        dialect: whose names these are, ``"hf"`` or ``"gguf"`` (then in GGUF's rotary row order).
        reference: what to call it; nothing can be opened again by it.
        allow_non_finite: do not refuse NaN and infinity.

    Raises:
        UsageError: a value is no dense tensor with data, or the configuration is not plain JSON.

    Example:
        >>> source = MappingSource({"w": torch.eye(2)}, {"model_type": "none"})
        >>> source.read("w", slice(1, 2))
        tensor([[0., 1.]])
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        dialect: str = "hf",
        *,
        reference: str = "<state dict>",
        allow_non_finite: bool = False,
    ) -> None:
        self._held = {name: _checked(name, tensor) for name, tensor in tensors.items()}
        self._config = MappingProxyType(_plain(config))
        self._dialect = dialect
        self._reference = reference
        self._allow_non_finite = allow_non_finite
        self._tensors = MappingProxyType({name: _info(tensor) for name, tensor in self._held.items()})

    @property
    def reference(self) -> str:
        return self._reference

    @property
    def dialect(self) -> str:
        return self._dialect

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._dialect, self._config, self._tensors, self._read_bytes)

    @property
    def at_rest(self) -> AtRest:
        return AtRest((tuple(self._tensors),), {}, None)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        info = find_tensor(self._tensors, name)
        span = row_span(name, info.shape, rows)
        held = self._held[name] if span is None else self._held[name][span[0] : span[1]]
        tensor = torch.empty(held.shape, dtype=held.dtype).copy_(held)
        return tensor if self._allow_non_finite else check_finite(tensor, name, span[0] if span else 0)

    def token_texts(self) -> tuple[str, ...] | None:
        return None

    def _read_bytes(self, name: str, begin: int, end: int) -> bytes:
        held = self._held[name]
        # whole elements only: the sampled spans need not begin at one
        first, last = begin // held.itemsize, -(-end // held.itemsize)
        part = held.reshape(-1)[first:last].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return part[begin - first * held.itemsize : end - first * held.itemsize]


def _checked(name: object, tensor: Any) -> Tensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise UsageError(
            f"the entry {name!r} is a {type(tensor).__name__}",
            expected="names to torch tensors",
            do="pass a state dict, or its part that holds tensors",
        )
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPE_NAMES:
        raise UsageError(
            f"{name!r} is a tensor of type {tensor.dtype}, layout {tensor.layout}, on {tensor.device}",
            expected=f"dense tensors with data, of type {', '.join(_DTYPE_NAMES.values())}",
            do="load the weights (a model on the meta device has none), dense and not quantised by torch",
        )
    return tensor.detach()


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype], tensor.numel() * tensor.itemsize)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it would come back from a file."""
    try:
        return json.loads(json.dumps(dict(config), default=_name_of_dtype))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the configuration is not plain JSON: {error!s:.200}",
            expected="strings, numbers, booleans, None, lists and dicts",
            do="pass the content of config.json, or the transformers configuration's to_dict()",
        ) from error


def _name_of_dtype(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"a {type(value).__name__}")
