"""The transformers model of a stream, ready to run."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from typing import Any, final

import torch
from torch import nn

from virtual_weights.checkpoint.mapping_source import NnsightModel, derives_from, twin, unwrapped
from virtual_weights.errors import UsageError
from virtual_weights.stream import Stream


@final
@dataclass(frozen=True, eq=False)
class Runner:
    """What runs a model: a module, loaded when it is first needed and shared by whatever runs it.

    Attributes:
        stream: the model.
        model: a loaded model to take, see ``load``; None loads the checkpoint.
        dtype: of the weights, where the checkpoint is loaded.
        device: any torch device, likewise.
    """

    stream: Stream
    model: nn.Module | NnsightModel | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @cached_property
    def module(self) -> nn.Module:
        """The module itself."""
        return load(self.stream, self.model, dtype=self.dtype, device=self.device)

    @property
    def precision(self) -> str:
        """The dtype of the run; nothing is loaded to tell it."""
        return str(self.dtype if self.model is None else next(self.module.parameters()).dtype).removeprefix("torch.")


Runs = nn.Module | NnsightModel | Runner | None
"""What can be named as the model that runs; None is the checkpoint itself."""


def load(
    stream: Stream,
    model: nn.Module | NnsightModel | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """The model that a stream was opened from, loaded by transformers, with eager attention, in eval mode.

    Args:
        stream: the model's stream.
        model: a loaded model to take instead, neither moved nor converted: a transformers model, an nnsight
            ``LanguageModel`` or a TransformerLens ``TransformerBridge``. Where it is wrapped or its attention is not
            eager, a plain eager twin on the same tensors runs in its place; the model itself is left as it was.
        dtype: of the weights.
        device: any torch device.

    Raises:
        UsageError: transformers or accelerate is not installed, or the stream is of a model in memory and no ``model``
            is given, or an nnsight model has not loaded its weights.
        CheckpointError: a TransformerLens model whose weights are no longer those of the checkpoint.
    """
    if model is not None:
        return _eager(unwrapped(model)).eval()
    path = stream.source.at_rest.path
    installed = all(find_spec(name) is not None for name in ("transformers", "accelerate"))
    if path is None or not installed:
        in_memory = path is None
        raise UsageError(
            "this stream was opened from memory" if in_memory else "running a model needs transformers and accelerate",
            expected="its module" if in_memory else "the extra 'runtime' of this package",
            do="pass model=" if in_memory else "pip install '.[runtime]' in a clone of this project",
        )
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is shown in one way, on stderr
    auto: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "local_files_only": True}
    if path.is_file():
        folder, options["gguf_file"] = path.parent, path.name
    else:
        folder = path
    with redirect_stderr(StringIO()):  # bars of its own: progress is shown in one way
        loaded: nn.Module = auto.from_pretrained(folder, **options)
    return loaded.to(device).eval()


def _eager(model: nn.Module) -> nn.Module:
    """A transformers model whose attention keeps its pattern: the model itself, or a twin switched to that."""
    plain: Any = model
    if not derives_from(model, "transformers", "PreTrainedModel") or plain.config._attn_implementation == "eager":
        return model
    switched: Any = twin(model)
    switched.set_attn_implementation("eager")
    return switched
