"""Telling one checkpoint from another without reading all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from virtual_weights.checkpoint.source import TensorInfo

BLOCK = 64 * 1024


def fingerprint(
    dialect: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    read_bytes: Callable[[str, int, int], bytes],
) -> str:
    """Hash what ``Source.fingerprint`` promises.

    Args:
        dialect: whose names these are.
        config: plain JSON values.
        tensors: every tensor by name.
        read_bytes: gives bytes [begin, end) of a tensor as stored.

    Returns:
        A hex sha256.
    """
    total = sha256(_canonical(["virtual-weights 1", dialect, config]))
    for name in sorted(tensors):
        info = tensors[name]
        content = sha256()
        for begin, end in sampled_spans(info.nbytes):
            content.update(read_bytes(name, begin, end))
        total.update(_canonical([name, info.dtype, info.shape, content.hexdigest()]))
    return total.hexdigest()


def sampled_spans(nbytes: int) -> tuple[tuple[int, int], ...]:
    """The byte ranges of a tensor that count: all of it up to three blocks, else start, middle and end."""
    if nbytes <= 3 * BLOCK:
        return ((0, nbytes),) if nbytes else ()
    return tuple((begin, begin + BLOCK) for begin in (0, (nbytes - BLOCK) // 2, nbytes - BLOCK))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict).encode("ascii")
