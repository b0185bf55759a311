"""Weights of a live torch module: a transformers model or a TransformerLens bridge around one.

Both are recognised by the names of their classes, so that neither library is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from virtual_weights.checkpoint.mapping_source import MappingSource
from virtual_weights.errors import CheckpointError, UsageError

_WRAPPED = "_original_component"  # where TransformerLens's bridge keeps the module that it wraps


def open_module(
    module: nn.Module, config: Mapping[str, Any] | None = None, *, allow_non_finite: bool = False
) -> MappingSource:
    """See a live module as a source, without copying a tensor.

    Args:
        module: a transformers model, a TransformerLens ``TransformerBridge``, or, with ``config``, any
            module with Hugging Face's tensor names.
        config: replaces the module's own configuration.
        allow_non_finite: do not refuse NaN and infinity.

    Raises:
        UsageError: a module of another kind without ``config``.
        CheckpointError: a TransformerLens model whose weights are no longer those of the checkpoint.
    """
    reference = f"<{type(module).__name__} in memory>"
    if _derives_from(module, "transformer_lens", "HookedTransformer"):
        raise _changed_by_transformer_lens(module, "keeps weights in its own names, folded and rearranged")
    if _derives_from(module, "transformer_lens", "TransformerBridge"):
        module, tensors = _unwrapped(module)
    else:
        tensors = module.state_dict()
    found = _own_config(module) if config is None else config
    return MappingSource(tensors, found, "hf", reference=reference, allow_non_finite=allow_non_finite)


def _derives_from(module: nn.Module, library: str, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.split(".")[0] == library for base in type(module).__mro__)


def _own_config(module: nn.Module) -> Mapping[str, Any]:
    if not _derives_from(module, "transformers", "PreTrainedModel"):
        raise UsageError(
            f"a {type(module).__name__} does not carry a configuration that is known here",
            expected="a transformers model, a TransformerLens bridge, or `config` beside the module",
            do="pass config={...} with the fields of the model's config.json",
        )
    return json.loads(module.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]


def _unwrapped(bridge: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The transformers model inside a bridge, and its tensors under their own names."""
    inside = vars(bridge)
    model = inside.get("original_model")
    if not isinstance(model, nn.Module):
        raise _changed_by_transformer_lens(bridge, "holds no transformers model")
    if inside.get("_weights_processed"):
        raise _changed_by_transformer_lens(bridge, "has folded or centred its weights in place")
    stored = model.state_dict()
    tensors = {name: stored[key] for key, name in own_names(stored).items()}
    bias, parameters = tensors.get("lm_head.bias"), own_names(dict(model.named_parameters(remove_duplicate=False)))
    # the bridge gives every unembedding a buffer of zeros as bias; a parameter would be the model's own
    if bias is not None and "lm_head.bias" not in parameters.values() and not bias.any():
        del tensors["lm_head.bias"]
    return model, tensors


def own_names(keys: Iterable[str]) -> dict[str, str]:
    """The wrapped model's own names, seen through the bridge's wrappers.

    A wrapper keeps the module that it wraps beside aliases of that module's parts; only what is
    reached through the wrapped module has a name of its own.

    Args:
        keys: names as ``state_dict`` gives them.

    Returns:
        Each key that is no alias, with the name it has without wrappers.

    Example:
        >>> own_names(["h.0._original_component.ln._original_component.w", "h.0.ln1._original_component.w"])
        {'h.0._original_component.ln._original_component.w': 'h.0.ln.w'}
    """
    paths = {key: key.split(".") for key in keys}
    wrappers = {tuple(path[:i]) for path in paths.values() for i, part in enumerate(path) if part == _WRAPPED}
    return {
        key: ".".join(part for part in path if part != _WRAPPED)
        for key, path in paths.items()
        if all(path[i] == _WRAPPED for i in range(len(path)) if tuple(path[:i]) in wrappers)
    }


def _changed_by_transformer_lens(module: nn.Module, how: str) -> CheckpointError:
    return CheckpointError(
        f"the TransformerLens {type(module).__name__} {how}",
        expected="weights as the checkpoint has them; folding is done and recorded here",
        do="open the checkpoint itself, the transformers model, or a TransformerBridge before "
        "enable_compatibility_mode (or with no_processing=True)",
    )
