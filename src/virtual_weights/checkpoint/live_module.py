"""Weights of a live torch module: a transformers model, or what nnsight or TransformerLens wraps around one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, Protocol, TypeGuard

from torch import nn

from virtual_weights.checkpoint.mapping_source import MappingSource
from virtual_weights.errors import CheckpointError, UsageError

_WRAPPED = "_original_component"  # where a component of a bridge keeps the module that it wraps


class NnsightModel(Protocol):
    """An nnsight model, as far as it is used here; it is no torch module itself."""

    _module: nn.Module


def is_model(given: object) -> TypeGuard[nn.Module | NnsightModel]:
    """Whether ``unwrapped`` can be asked about this: a torch module, or an nnsight model."""
    return isinstance(given, nn.Module) or derives_from(given, "nnsight", "Envoy", "NNsight")


def derives_from(given: object, library: str, *names: str) -> bool:
    """Whether an object's class, or one that it derives from, is a library's class of one of these names."""
    return any(base.__name__ in names and base.__module__.split(".")[0] == library for base in type(given).__mro__)


def unwrapped(model: nn.Module | NnsightModel) -> nn.Module:
    """The module that holds the weights under the checkpoint's own names and runs by itself.

    Args:
        model: any torch module, which is its own answer; an nnsight ``LanguageModel``, whose module is the answer; or
            a TransformerLens ``TransformerBridge``, which gets a twin of its ``original_model`` without wrappers. The
            twin has the bridge's own tensors, and neither its hooks nor its attention, which never asks the fused maps.

    Returns:
        The module. No tensor is copied and ``model`` is left as it was.

    Raises:
        UsageError: an nnsight model whose weights are not loaded yet.
        CheckpointError: a TransformerLens model whose weights are no longer those of the checkpoint.
    """
    if derives_from(model, "nnsight", "Envoy", "NNsight"):
        return unwrapped(_dispatched(model))
    assert isinstance(model, nn.Module)
    if derives_from(model, "transformer_lens", "HookedTransformer"):
        raise _changed_by_transformer_lens(model, "keeps weights in its own names, folded and rearranged")
    return _unbridged(model) if derives_from(model, "transformer_lens", "TransformerBridge") else model


def twin(module: nn.Module) -> nn.Module:
    """A copy of the modules that has the same tensors: what is switched or hooked in it leaves the first alone."""
    return deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})


def _dispatched(model: object) -> nn.Module:
    inside: Any = vars(model).get("_module", vars(model).get("_model"))
    parameters = list(inside.parameters())
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise UsageError(
            f"the weights of this nnsight {type(model).__name__} are not loaded yet",
            expected="a dispatched model",
            do="call its dispatch(), or make it with dispatch=True",
        )
    return inside


def _unbridged(bridge: nn.Module) -> nn.Module:
    inside = vars(bridge)
    model = inside.get("original_model")
    if not isinstance(model, nn.Module):
        raise _changed_by_transformer_lens(bridge, "holds no transformers model")
    if inside.get("_weights_processed"):
        raise _changed_by_transformer_lens(bridge, "has folded or centred its weights in place")
    plain = twin(model)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            module.add_module(name, _innermost(child))
    for module in plain.modules():
        # the bridge gives every unembedding a buffer of zeros as bias; a parameter would be the model's own
        bias = dict(module.named_buffers(recurse=False)).get("bias") if isinstance(module, nn.Linear) else None
        if bias is not None and not bias.any():
            del module.bias
            module.register_parameter("bias", None)
    return plain


def _innermost(module: nn.Module) -> nn.Module:
    while (wrapped := dict(module.named_children()).get(_WRAPPED)) is not None:
        module = wrapped
    return module


def _changed_by_transformer_lens(module: nn.Module, how: str) -> CheckpointError:
    return CheckpointError(
        f"the TransformerLens {type(module).__name__} {how}",
        expected="weights as the checkpoint has them; folding is done and recorded here",
        do="give the checkpoint itself, the transformers model, or a TransformerBridge before "
        "enable_compatibility_mode (or with no_processing=True)",
    )


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
