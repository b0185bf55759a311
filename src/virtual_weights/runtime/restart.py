"""Run a model's later blocks alone, from a state of the stream that an earlier run showed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from virtual_weights.runtime.places import module_name
from virtual_weights.stream import Stream


@contextmanager
def restarted(model: nn.Module, stream: Stream, layer: int, state: Tensor) -> Generator[None]:
    """Let the blocks before a layer give what they gave in an earlier run, at no cost.

    The model goes on as it does after them, by its own modules: embeddings, masks and rotary angles are made as ever.
    Hooks inside the blocks left out do not fire.

    Args:
        model: what runs, see ``load``.
        stream: the same model.
        layer: the first block that runs; ``n_layers`` runs none.
        state: (B, T, d) what that block is given, as an earlier run on the same tokens showed it: state
            ``attention_reads(stream.model, layer)``, the last of all where no block runs.
    """
    modules = dict(model.named_modules())
    names = [module_name(stream, "attn_norm", i).rpartition(".")[0] for i in range(layer)]
    blocks: list[Any] = [modules.get(name) or modules[name.partition(".")[2]] for name in names]
    kept = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *_, **__: state
    try:
        yield
    finally:
        for block, own in zip(blocks, kept, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
