"""What runs a model: built from the tensors and the configuration that were opened, or a loaded model, checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, final

import torch
from torch import Tensor, nn

from virtual_weights.architecture import Row
from virtual_weights.checkpoint.mapping_source import NnsightModel, derives_from, twin, unwrapped
from virtual_weights.errors import ArchitectureError, CheckpointError, MissingTensorError, UsageError
from virtual_weights.linalg.numerics import accumulate, exactness_bound
from virtual_weights.runtime.running.activations import Exactness, exactness, vocabulary
from virtual_weights.runtime.running.decoder import decoder
from virtual_weights.stream import Stream
from virtual_weights.stream.effective import as_stored
from virtual_weights.stream.layout import packed
from virtual_weights.stream.rotary import frequencies
from virtual_weights.stream.turned import Turned


class Runner(ABC):
    """What runs a model, shared by all runs that are given it; loaded when something first runs.

    Everything that runs a model goes through this, so that it can be run by other means than transformers.
    """

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module, with transformers' names for its parts, as the hooks find them.

        Raises:
            CheckpointError: it is not the model that the stream's maps describe.
        """

    @property
    @abstractmethod
    def precision(self) -> str:
        """The dtype of the run, known before anything is loaded where it can be."""

    @property
    @abstractmethod
    def exactness_error(self) -> float:
        """How far the module is from what the stream's maps say of it, see ``exactness``."""


_SAMPLED = 2**24
"""Weights that are read a second time, in about a second, to check a model that was built of them."""
_ALL = 2**28
"""The same to check a model that was built elsewhere: all of a small model's, some seconds."""


@final
@dataclass(frozen=True, eq=False)
class ModuleRunner(Runner):
    """Runs a module of transformers.

    Attributes:
        stream: the model.
        model: a loaded model to take, see ``load``; None builds one from what the stream was opened from.
        dtype: of the weights, where the model is built.
        device: any torch device, likewise.
    """

    stream: Stream
    model: nn.Module | NnsightModel | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def module(self) -> nn.Module:
        return self._checked[0]

    @property
    def precision(self) -> str:
        return str(self.dtype if self.model is None else next(self.module.parameters()).dtype).removeprefix("torch.")

    @property
    def exactness_error(self) -> float:
        return self._checked[1].error

    @cached_property
    def _checked(self) -> tuple[nn.Module, Exactness]:
        if self.model is None:
            module, weights = built(self.stream, self.dtype).to(self.device).eval(), _SAMPLED
        else:
            module, weights = _eager(unwrapped(self.model)).eval(), _ALL
        law, bound = exactness(self.stream, module, weights), exactness_bound(next(module.parameters()).dtype)
        if law.error <= bound:
            return module, law
        raise CheckpointError(
            f"what runs is not the model whose maps are read: {law.place} differs by {law.error:.1e} relatively",
            expected=f"at most {bound:.1e}, which rounding explains",
            do="pass as model= the model that was opened, with the same weights and settings; or leave it out, and "
            "what was opened runs",
        )


Runs = nn.Module | NnsightModel | Runner | None
"""What can be named as the model that runs; None is what was opened."""


def load(
    stream: Stream,
    model: nn.Module | NnsightModel | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """The model that a stream was opened from, as a transformers module with eager attention, in eval mode.

    It is built from the stream's own tensors and sizes: the class is the one of our table, and no file is looked at.

    Args:
        stream: the model's stream.
        model: a loaded model to take instead, neither moved nor converted: a transformers model, an nnsight
            ``LanguageModel`` or a TransformerLens ``TransformerBridge``. Where it is wrapped or its attention is not
            eager, a plain eager twin on the same tensors runs in its place; the model itself is left as it was.
        dtype: of the weights.
        device: any torch device.

    Raises:
        UsageError: transformers is not installed, or an nnsight model has not loaded its weights.
        CheckpointError: the module does not compute what the stream's maps say, or a tensor is missing, or a
            TransformerLens model's weights are no longer those of the checkpoint.
        ArchitectureError: transformers cannot run this model.
    """
    return ModuleRunner(stream, model, dtype, device).module


def _eager(model: nn.Module) -> nn.Module:
    """A transformers model whose attention keeps its pattern: the model itself, or a twin switched to that."""
    plain: Any = model
    if not derives_from(model, "transformers", "PreTrainedModel") or plain.config._attn_implementation == "eager":
        return model
    switched: Any = twin(model)
    switched.set_attn_implementation("eager")
    return switched


def turned_module(turned: Turned) -> nn.Module:
    """A transformers module in float64 with the tensors of a turned stream; raises what ``load`` and ``Turned`` do."""
    tensors = turned.parameters
    return built(turned.stream, accumulate, tensors, tied=turned.stream.spec.tied and not turned.unties).eval()


def built(
    stream: Stream, dtype: torch.dtype, tensors: dict[str, Tensor] | None = None, *, tied: bool | None = None
) -> nn.Module:
    """A module of a stream's sizes with its tensors or others, one copy of each in memory; not checked.

    It is transformers', or our own decoder where the model's table says so.
    """
    if stream.model.hf.values["runs"] == "here":
        return decoder(stream, dict(_parameters(stream, dtype)) if tensors is None else tensors)
    if find_spec("transformers") is None:
        raise UsageError(
            "running a model needs transformers",
            expected="the extra 'runtime' of this package",
            do="pip install '.[runtime]' in this project's folder",
        )
    module = _empty(stream, tied)
    tensors = dict(_parameters(stream, dtype)) if tensors is None else tensors
    names = set(dict(module.named_parameters(remove_duplicate=False)))
    absent = sorted(names - set(tensors))
    if absent:
        raise MissingTensorError(
            f"{len(absent)} tensors are missing to run this model: {', '.join(absent[:6])}",
            expected=f"every tensor of a {stream.spec.n_layers}-layer {stream.spec.model_type}",
            do="open the complete checkpoint",
        )
    left = module.load_state_dict(tensors, assign=True, strict=False).unexpected_keys
    if left:
        raise ArchitectureError(
            f"{type(module).__name__} has no place for {len(left)} tensors: {', '.join(sorted(left)[:6])}",
            expected="the tensors of its class",
            do="ask questions of the weights alone",
        )
    module.tie_weights()
    _retune(stream, module)
    return module


def _retune(stream: Stream, module: Any) -> None:
    """Frequencies that no configuration can say: those divided by stored factors, and those of a part of each head."""
    turning = next((group.rotary for group in stream.groups.heads if group.rotary), None)
    buffer = dict(module.named_buffers()).get("model.rotary_emb.inv_freq")
    factors = stream.weight("factors", "rotary")
    if turning is None or buffer is None or (factors is None and not turning.apart):
        return
    values = frequencies(turning, factors).float()
    buffer.copy_(torch.cat([values, buffer.new_zeros(len(buffer) - len(values))]))


def _empty(stream: Stream, tied: bool | None = None) -> Any:
    """A module of the class that our own table names, with uninitialised tensors, of the configuration opened."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.initialization import no_init_weights

    model = stream.model
    if model.hf.values["not_run"]:
        raise ArchitectureError(
            f"a model of type {model.spec.model_type} is not run here: {model.hf.values['not_run']}",
            expected="a type whose modules keep a batch apart",
            do="ask questions of the weights alone",
        )
    kind = next((name for name in model.hf.bases if name in CONFIG_MAPPING), None)
    settings = {key: _plain(value) for key, value in model.config.items() if key not in _OF_FILES and key[:1] != "_"}
    for trait, size in model.sizes.items():  # not every class fills in what is null
        if settings.get(trait) is None:
            settings[trait] = size
    settings["vocab_size"] = vocabulary(stream)
    settings["tie_word_embeddings"] = model.spec.tied if tied is None else tied
    # no text is generated, so that no token has a part to play
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    try:
        assert kind is not None
        config_class: Any = CONFIG_MAPPING[kind]
        config = config_class(**{**settings, **tokens}, attn_implementation="eager")
        module_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        with no_init_weights():  # every parameter is replaced, and no memory is touched before
            return module_class(config)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise ArchitectureError(
            f"transformers refuses the settings of this model: {' '.join(str(error).split())[:300]}",
            expected="settings that its class accepts",
            do="correct config.json, or pass config= with the right values",
        ) from error


def _plain(value: Any) -> Any:
    """A value of config.json, in which transformers writes infinity as ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    infinite = isinstance(value, dict) and value.keys() == {"__float__"}
    return float(value["__float__"]) if infinite else value


_OF_FILES = frozenset(
    "model_type architectures torch_dtype dtype transformers_version auto_map gguf_turned experts_implementation"
    " attn_implementation".split()
)
"""Keys that say something of the files, or of how a model is run."""


def _parameters(stream: Stream, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by transformers' name.

    Raises:
        ArchitectureError: the checkpoint holds what transformers' module has no place for.
    """
    model, placements = stream.model, stream.model.placements
    left = set(placements) - {("factors", "rotary")}
    ends: dict[str, Tensor] = {}  # one tensor for both ends of the stream stays one
    for row in model.rows:
        group = row.groups[0]
        left -= {(role, group) for role in row.roles for group in row.groups}
        place = placements.get((row.roles[0], group))
        if place is None:
            continue
        tensor = ends[place.tensor] if place.tensor in ends else _parameter(stream, row).to(dtype)
        if row.roles in (("embed",), ("unembed",)):
            ends[place.tensor] = tensor
        yield row.name, tensor
    if left:
        names = sorted({placements[place].tensor for place in left})
        raise ArchitectureError(
            f"{len(names)} tensors have no place in transformers' {stream.spec.model_type}: {', '.join(names[:6])}",
            expected="the tensors of its class",
            do="ask questions of the weights alone, or start from the safetensors form of this model",
        )


def _parameter(stream: Stream, row: Row) -> Tensor:
    """The parameter of one row of transformers' table, in transformers' layout."""
    group = row.groups[0]
    place = stream.model.placements[row.roles[0], group]
    if stream.source.dialect == "hf" and place.layout == row.layout:
        return stream.source.read(place.tensor)
    roles = [as_stored(stream, role, group) for role in row.roles]
    return packed([role for role in roles if role is not None], row, stream.model.axes(group))
