"""The low-rank factors of an adapter of peft as readers and writers of their own, instead of folded into the base.

Source: huggingface/peft 5d602fd: ``Delta W = scale B A`` with A (r, in) and B (out, r), whatever the base's layout. Of
a module that reads the stream the rows of A are readers; of one that writes to it the columns of B times the scale are
writers. What A of an output map reads, and what B of an input map writes to, is the inside of the branch.
"""

from __future__ import annotations

from pathlib import Path

from virtual_weights.checkpoint.adapter import Adapter, LowRank
from virtual_weights.checkpoint.dictionaries.dictionary import Dictionary, DictionaryPart
from virtual_weights.checkpoint.dictionaries.modules import TAGS, Module, module_of, module_part
from virtual_weights.checkpoint.dictionaries.tables import Tensors, unsupported


def open_factors(path: str | Path) -> Dictionary:
    """Open an adapter's factors, a part for each module with the module's tag.

    Args:
        path: the folder that peft's ``save_pretrained`` wrote.

    Raises:
        CheckpointError: it is no such folder, adds anything but ``scale B A``, or to a module whose name says no place.
        UnsafeCheckpointError: its weights are pickled.
    """
    adapter = Adapter(path)
    tensors = Tensors(adapter.weights, str(adapter.folder))
    modules = {name: module_of(name) for name in adapter.modules}
    if unknown := [name for name, module in modules.items() if module is None]:
        raise unsupported(
            tensors.where,
            f"adapts {', '.join(map(repr, unknown[:5]))}, whose names do not say where they read or write",
            "maps of attention and of dense MLPs in numbered layers",
            "fold the adapter into its base instead: attach it to the model",
        )
    parts = [_part(tensors, module, adapter.modules[name]) for name, module in modules.items() if module is not None]
    parts.sort(key=lambda part: (1 << 30 if part.layer is None else part.layer, TAGS.index(part.tag)))
    return Dictionary(tensors.where, "lora", "low-rank factors of peft", tuple(parts), (adapter.weights,))


def _part(tensors: Tensors, module: Module, factors: LowRank) -> DictionaryPart:
    rank = tensors.shape(factors.down, None, None)[0]
    if module.side == "reads":
        return module_part(module, rank, tensors.table(factors.down, "rows", rank))
    return module_part(module, rank, tensors.table(factors.up, "columns", rank).times(factors.scale))
