"""Weights of a live torch module: a transformers model, or what nnsight or TransformerLens wraps around one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from virtual_weights.checkpoint.foreign import NnsightModel, derives_from, unwrapped
from virtual_weights.checkpoint.mapping_source import MappingSource
from virtual_weights.errors import UsageError


def open_module(
    module: nn.Module | NnsightModel, config: Mapping[str, Any] | None = None, *, allow_non_finite: bool = False
) -> MappingSource:
    """See a live module as a source, without copying a tensor.

    Args:
        module: a transformers model, a TransformerLens ``TransformerBridge``, an nnsight ``LanguageModel``, or, with
            ``config``, any module with Hugging Face's tensor names.
        config: replaces the module's own configuration.
        allow_non_finite: do not refuse NaN and infinity.

    Raises:
        UsageError: a module of another kind without ``config``, or an nnsight model without weights.
        CheckpointError: a TransformerLens model whose weights are no longer those of the checkpoint.
    """
    reference = f"<{type(module).__name__} in memory>"
    plain = unwrapped(module)
    found = _own_config(plain) if config is None else config
    return MappingSource(plain.state_dict(), found, "hf", reference=reference, allow_non_finite=allow_non_finite)


def _own_config(module: nn.Module) -> Mapping[str, Any]:
    if not derives_from(module, "transformers", "PreTrainedModel"):
        raise UsageError(
            f"a {type(module).__name__} does not carry a configuration that is known here",
            expected="a transformers model, what nnsight or TransformerLens wraps around one, or `config` beside it",
            do="pass config={...} with the fields of the model's config.json",
        )
    return json.loads(module.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
