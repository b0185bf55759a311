"""From anything that holds weights to a Stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from virtual_weights.architecture import resolve
from virtual_weights.checkpoint import Source, open_source
from virtual_weights.checkpoint.mapping_source import NnsightModel
from virtual_weights.stream.stream import Stream


def open_stream(
    reference: str | Path | Source | Mapping[str, Tensor] | nn.Module | NnsightModel,
    *,
    fold: bool = True,
    config: Mapping[str, Any] | None = None,
    partial: bool = False,
    offline: bool = False,
    allow_non_finite: bool = False,
) -> Stream:
    """Open a checkpoint and see the residual stream in it; no weight is read yet.

    Args:
        reference: a built-in name (``"smollm2-135m"``), a folder or ``.safetensors`` file, a ``.gguf``
            file, ``hf://org/name@revision``, a state dict (with ``config``), a transformers module, a
            TransformerLens bridge or an nnsight model.
        fold: every reader contains the norm's gain and LayerNorm's centring, and what nothing sees is taken from
            writers and unembedding, see ``Stream.read`` and ``write``; False leaves all maps as stored.
        config: replaces the checkpoint's own configuration; of a source, in reading which tensor plays which role.
        partial: accept a checkpoint in which tensors are missing and leave those parts out.
        offline: never fetch anything.
        allow_non_finite: do not refuse NaN and infinity.

    Returns:
        The stream.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        UnsafeCheckpointError: it is a pickle, or its names leave its folder.
        ArchitectureError: a tensor or configuration key is not accounted for, or shapes contradict it.

    Example:
        >>> stream = vw.open("smollm2-135m")  # doctest: +SKIP
        >>> stream["L17H3"].qk.shape  # doctest: +SKIP
        (576, 576)
    """
    source = open_source(reference, config=config, offline=offline, allow_non_finite=allow_non_finite)
    read = config if config is not None and isinstance(reference, Source) else source.config
    model = resolve(
        read,
        {name: info.shape for name, info in source.tensors.items()},
        source.dialect,
        partial=partial,
        dtypes={name: info.dtype for name, info in source.tensors.items()},
        equal=source.equal,
    )
    return Stream(source, model, fold)


open = open_stream  # its public name, virtual_weights.open, by which help() calls it
open.__name__ = open.__qualname__ = "open"
