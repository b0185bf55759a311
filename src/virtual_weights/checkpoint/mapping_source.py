"""Weights in this process: a mapping of tensors, or a live module of transformers, nnsight or TransformerLens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from hashlib import sha256
from itertools import chain
from typing import Any, Protocol, TypeGuard, final

import torch
from torch import Tensor, nn

from virtual_weights.checkpoint.source import DTYPE_NAMES, AtRest, Source, TensorInfo, plain_names
from virtual_weights.errors import CheckpointError, UsageError


@final
class MappingSource(Source):
    """Tensors in memory under the names of a dialect, referred to and copied only when they are read.

    Whoever changes a tensor in place changes the source. Its fingerprint shows it at once where torch counts the change
    or a sample of the values differs, and otherwise when it is next computed, as it is for every map.

    Args:
        tensors: by name; on any device.
        config: the configuration that belongs to them, as plain JSON values.
        dialect: whose names these are, ``"hf"`` or ``"gguf"`` (then in GGUF's rotary row order).
        reference: what to call it; nothing can be opened again by it.
        allow_non_finite: do not refuse NaN and infinity.

    Raises:
        UsageError: a value is not a dense tensor with data, or the configuration is not plain JSON.

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
        values = {name: _checked(name, tensor) for name, tensor in tensors.items()}
        self._values = {name: values[given] for name, given in plain_names(values).items()}
        infos = {name: _info(tensor) for name, tensor in self._values.items()}
        super().__init__(reference, dialect, _plain(config), infos, allow_non_finite=allow_non_finite)

    @property
    def at_rest(self) -> AtRest:
        return AtRest((tuple(self.tensors),), {}, None)

    def token_texts(self) -> None:
        return None

    def tokenizer(self) -> None:
        return None

    def _read(self, name: str, first_row: int, shape: tuple[int, ...]) -> Tensor:
        values = self._values[name][first_row : first_row + shape[0]] if shape else self._values[name]
        return torch.empty(shape, dtype=values.dtype).copy_(values)

    def _state(self) -> object:
        changes = [None if values.is_inference() else values._version for values in self._values.values()]
        samples = sha256()
        for name, info in self.tensors.items():
            for begin, end in _sampled_spans(info.nbytes):
                samples.update(self._stored_bytes(name, begin, end))
        return changes, samples.hexdigest()

    def _stored_bytes(self, name: str, begin: int, end: int) -> bytes:
        values = self._values[name]
        # whole elements only: the sampled spans need not begin at one
        first, last = begin // values.itemsize, -(-end // values.itemsize)
        elements = values.reshape(-1)[first:last].contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return elements[begin - first * values.itemsize : end - first * values.itemsize]


_SAMPLE_BYTES = 64 * 1024


def _sampled_spans(nbytes: int) -> tuple[tuple[int, int], ...]:
    """The byte ranges of a tensor that are looked at for a change: all of it up to three samples, else three."""
    if nbytes <= 3 * _SAMPLE_BYTES:
        return ((0, nbytes),) if nbytes else ()
    begins = (0, (nbytes - _SAMPLE_BYTES) // 2, nbytes - _SAMPLE_BYTES)
    return tuple((begin, begin + _SAMPLE_BYTES) for begin in begins)


def _checked(name: object, tensor: Any) -> Tensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise UsageError(
            f"the entry {name!r} is a {type(tensor).__name__}",
            expected="names to torch tensors",
            do="pass a state dict, or its part that holds tensors",
        )
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
        raise UsageError(
            f"{name!r} is a tensor of type {tensor.dtype}, layout {tensor.layout}, on {tensor.device}",
            expected=f"dense tensors with data, of type {', '.join(DTYPE_NAMES.values())}",
            do="load the weights (a model on the meta device has none), dense and not quantised by torch",
        )
    return tensor.detach()


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], tensor.numel() * tensor.itemsize)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it would come back from a file."""
    try:
        return json.loads(json.dumps(dict(config), default=_name))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the configuration is not plain JSON: {error!s:.200}",
            expected="strings, numbers, booleans, None, lists and dicts",
            do="pass the content of config.json, or the transformers configuration's to_dict()",
        ) from error


def _name(value: Any) -> str:
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    raise TypeError(f"a {type(value).__name__}")


_WRAPPED = "_original_component"  # where a component of a bridge keeps the module that it wraps


_TORCH_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


class NnsightModel(Protocol):
    """An nnsight model, as far as it is used here; it is not a torch module itself."""

    _module: nn.Module


def open_module(
    module: nn.Module | NnsightModel, config: Mapping[str, Any] | None = None, *, allow_non_finite: bool = False
) -> MappingSource:
    """See a live module as a source, without copying a tensor.

    Args:
        module: a transformers model, a TransformerLens ``TransformerBridge`` or ``HookedTransformer`` (as its weights
            are now, folded or not), an nnsight ``LanguageModel``, or, with ``config``, any module with the tensor names
            of a table.
        config: replaces the module's own configuration.
        allow_non_finite: do not refuse NaN and infinity.

    Raises:
        UsageError: a module of another kind without ``config``, or an nnsight model without weights.
        CheckpointError: a TransformerLens model whose weights are no longer those of the checkpoint.
    """
    reference = f"<{type(module).__name__} in memory>"
    if isinstance(module, nn.Module) and derives_from(module, "transformer_lens", "HookedTransformer"):
        hooked: Any = module
        settings = hooked.cfg.to_dict() if config is None else config
        return MappingSource(module.state_dict(), settings, reference=reference, allow_non_finite=allow_non_finite)
    module = unwrapped(module)
    config = _transformers_config(module) if config is None else config
    return MappingSource(module.state_dict(), config, reference=reference, allow_non_finite=allow_non_finite)


def is_model(thing: object) -> TypeGuard[nn.Module | NnsightModel]:
    """Whether ``unwrapped`` accepts this: a torch module, or an nnsight model."""
    return isinstance(thing, nn.Module) or derives_from(thing, "nnsight", "Envoy", "NNsight")


def derives_from(thing: object, library: str, *names: str) -> bool:
    """Whether an object's class, or one that it derives from, is a library's class of one of these names."""
    return any(base.__name__ in names and base.__module__.split(".")[0] == library for base in type(thing).__mro__)


def unwrapped(model: nn.Module | NnsightModel) -> nn.Module:
    """The module that holds the weights under the checkpoint's own names and runs by itself.

    Args:
        model: any torch module, which is returned as it is, without what torch.compile or data parallelism wraps
            around it; an nnsight ``LanguageModel``, whose module is returned; or
            a TransformerLens ``TransformerBridge``, of whose ``original_model`` a twin without wrappers is returned.
            The twin shares the bridge's tensors, but neither its hooks nor its attention, which bypasses the fused
            maps.

    Returns:
        The module. No tensor is copied and ``model`` is left as it was.

    Raises:
        UsageError: an nnsight model whose weights are not loaded yet.
        CheckpointError: a TransformerLens model whose weights are no longer those of the checkpoint.
    """
    if derives_from(model, "nnsight", "Envoy", "NNsight"):
        return unwrapped(_dispatched(model))
    assert isinstance(model, nn.Module)
    inner = next((child for name, child in model.named_children() if name in ("_orig_mod", "module")), None)
    if inner is not None and derives_from(model, "torch", *_TORCH_WRAPPERS):
        return unwrapped(inner)
    if derives_from(model, "peft", "PeftModel"):
        raise CheckpointError(
            f"a {type(model).__name__} is a model with an adapter beside its weights",
            expected="a model whose weights are what runs",
            do="merge the adapter first: model.merge_and_unload()",
        )
    if derives_from(model, "transformer_lens", "HookedTransformer"):
        raise CheckpointError(
            f"a TransformerLens {type(model).__name__} runs by modules of its own",
            expected="a transformers model, or what nnsight or a TransformerBridge wraps around one",
            do="open it and leave model= out: what was opened runs",
        )
    return _unbridged(model) if derives_from(model, "transformer_lens", "TransformerBridge") else model


def twin(module: nn.Module) -> nn.Module:
    """A copy of the modules on the same tensors: switching or hooking something in it leaves the original alone."""
    return deepcopy(module, {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())})


def _transformers_config(module: nn.Module) -> Mapping[str, Any]:
    if not derives_from(module, "transformers", "PreTrainedModel"):
        raise UsageError(
            f"a {type(module).__name__} does not carry a configuration that is known here",
            expected="a transformers model, what nnsight or TransformerLens wraps around one, or `config` beside it",
            do="pass config={...} with the fields of the model's config.json",
        )
    return json.loads(module.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]


def _dispatched(model: object) -> nn.Module:
    module: Any = vars(model).get("_module", vars(model).get("_model"))
    parameters = list(module.parameters())
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise UsageError(
            f"the weights of this nnsight {type(model).__name__} are not loaded yet",
            expected="a dispatched model",
            do="call its dispatch(), or make it with dispatch=True",
        )
    return module


def _unbridged(bridge: nn.Module) -> nn.Module:
    model = vars(bridge).get("original_model")
    if not isinstance(model, nn.Module):
        raise _changed_by_transformer_lens(bridge, "holds no transformers model")
    if vars(bridge).get("_weights_processed"):
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


def _changed_by_transformer_lens(module: nn.Module, change: str) -> CheckpointError:
    return CheckpointError(
        f"the TransformerLens {type(module).__name__} {change}",
        expected="weights as the checkpoint has them; folding is done and recorded here",
        do="give the checkpoint itself, the transformers model, or a TransformerBridge before "
        "enable_compatibility_mode (or with no_processing=True)",
    )
