"""From anything that holds weights to a Stream."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from virtual_weights.architecture import Tables, resolve
from virtual_weights.architecture.gguf import LONG, SHORT
from virtual_weights.checkpoint import Source, open_source
from virtual_weights.checkpoint.mapping_source import NnsightModel
from virtual_weights.errors import ArchitectureError
from virtual_weights.stream.adapted import adapted
from virtual_weights.stream.attached import attached, divided
from virtual_weights.stream.stream import Stream


def open_stream(  # noqa: PLR0913 - how it is opened, by keyword only
    reference: str | Path | Source | Mapping[str, Tensor] | nn.Module | NnsightModel,
    *,
    fold: bool = True,
    config: Mapping[str, Any] | None = None,
    partial: bool = False,
    offline: bool = False,
    allow_non_finite: bool = False,
    table: str | Path | None = None,
    attach: Sequence[str | Path] = (),
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
        table: a TOML file that says what models of one's own types are, in the format of ``models.toml``: see
            docs/add-an-architecture.md.
        attach: LoRA adapters (folders as peft writes them), folded into the weights as they are read; and dictionaries
            (``"PATH"``, ``"NAME=PATH"``, ``"PATH@READS,WRITES"``), whose features read and write beside the model, see
            docs/dictionaries.md; ``"PATH@factors"`` attaches an adapter's factors instead of folding them.

    Returns:
        The stream.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        UnsafeCheckpointError: it is a pickle, or its names leave its folder.
        ArchitectureError: a tensor or configuration key is not accounted for, or shapes contradict it; the table is
            not there, or says what no table can.

    Example:
        >>> stream = vw.open("smollm2-135m")  # doctest: +SKIP
        >>> stream["L17H3"].qk.shape  # doctest: +SKIP
        (576, 576)
    """
    source = open_source(reference, config=config, offline=offline, allow_non_finite=allow_non_finite)
    read = config if config is not None and isinstance(reference, Source) else source.config
    read = {**read, **_told(source)}
    model = resolve(
        read,
        {name: info.shape for name, info in source.tensors.items()},
        source.dialect,
        partial=partial,
        dtypes={name: info.dtype for name, info in source.tensors.items()},
        equal=source.equal,
        zero=source.zero,
        tables=None if table is None else read_tables(table),
    )
    adapters, others = divided(attach)
    return Stream(adapted(source, model, adapters), model, fold, attached=attached(model, others))


def _told(source: Source) -> dict[str, list[float]]:
    """What a GGUF file has as small tensors and transformers in its configuration, by the tensor's name."""
    names = (SHORT, LONG) if source.dialect == "gguf" else ()
    stored = {name: source.tensors[name].shape for name in names if name in source.tensors}
    return {name: source.read(name).tolist() for name, shape in stored.items() if len(shape) == 1 and shape[0] < 10**5}


def read_tables(path: str | Path) -> Tables:
    """A user's tables from a TOML file.

    Raises:
        ArchitectureError: it is not there, or is not TOML.
    """
    try:
        content = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArchitectureError(
            f"the table {str(path)!r} cannot be read: {error}",
            expected="a TOML file with one entry for each model type",
            do="correct it: see docs/add-an-architecture.md",
        ) from error
    return Tables(content, Path(path).name)


open = open_stream  # its public name, virtual_weights.open, by which help() calls it
open.__name__ = open.__qualname__ = "open"
