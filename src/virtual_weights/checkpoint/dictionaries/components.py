"""Parameter components: each weight of a model as a sum of rank-one maps, ``W = sum over c of U_c V_c``.

Sources: goodfire-ai/spd and goodfire-ai/param-decomp, ``models/component_model.py`` and ``decomposed_module.py``: for
each decomposed module V (d_in, C) and U (C, d_out), ``component = V_c . x``, under the names ``_components.{module with
- for .}.V``, ``target_model.{module}.components.V`` (older) or ``target_model.{module}.V`` (newer). Checkpoints are
pickles there; here, the same tensors in safetensors. Their masks (causal importances) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from virtual_weights.checkpoint.dictionaries.dictionary import Dictionary, DictionaryPart
from virtual_weights.checkpoint.dictionaries.modules import TAGS, module_of, module_part
from virtual_weights.checkpoint.dictionaries.tables import Tensors, malformed, unsupported

_DASHED = re.compile(r"(?:.*\.)?_components\.(?P<path>[^.]+)\.(?P<side>[UV])")
_DOTTED = re.compile(r"(?:target_model|patched_model)\.(?P<path>.+?)(?:\.components)?\.(?P<side>[UV])")


def is_components(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold parameter components."""
    return any(_module_and_side(name) for name in names)


def open_components(tensors: Tensors) -> Dictionary:
    """The components of all modules that read the stream or write to it, each a part with the module's tag.

    Raises:
        CheckpointError: a side is missing, sizes disagree, or no module reads the stream or writes to it.
    """
    sides: dict[str, dict[str, str]] = {}
    for name in tensors.source.tensors:
        if parsed := _module_and_side(name):
            module, side = parsed
            sides.setdefault(module, {})[side] = name
    parts, unknown = list[DictionaryPart](), list[str]()
    for module, names in sides.items():
        part = _part(tensors, module, names)
        parts.append(part) if part else unknown.append(module)
    if not parts or unknown:
        raise unsupported(
            tensors.where,
            f"decomposes {', '.join(unknown[:5])}" if unknown else "decomposes no module",
            "modules whose names say where they read and write: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj, c_attn, c_fc, c_proj, ... of numbered layers",
            "write a file without these modules, or rename them as transformers does",
        )
    ends = {"embed": -1, "unembed": 1 << 30}
    parts.sort(key=lambda part: (ends.get(part.tag, part.layer or 0), TAGS.index(part.tag)))
    return Dictionary(tensors.where, "comp", "parameter components", tuple(parts), (tensors.source,))


def _module_and_side(name: str) -> tuple[str, str] | None:
    """The module's path and ``"U"`` or ``"V"``; None where a tensor of this name is no side of a component."""
    if match := _DASHED.fullmatch(name):
        return match["path"].replace("-", "."), match["side"]
    match = _DOTTED.fullmatch(name)
    return (match["path"], match["side"]) if match else None


def _part(tensors: Tensors, path: str, names: dict[str, str]) -> DictionaryPart | None:
    if names.keys() != {"U", "V"}:
        raise malformed(tensors.where, f"{path!r} has {', '.join(names)} alone", "V (d_in, C) and U (C, d_out)")
    components = tensors.shape(names["V"], None, None)[1]
    tensors.shape(names["U"], components, None)
    module = module_of(path)
    if module is None:
        return None
    vectors = tensors.table(names["V"], "columns") if module.side == "reads" else tensors.table(names["U"], "rows")
    return module_part(module, components, vectors)
