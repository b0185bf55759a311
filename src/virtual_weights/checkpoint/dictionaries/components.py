"""Parameter components: each weight of a model as a sum of rank-one maps, ``W = sum over c of U_c V_c``.

Sources: goodfire-ai/spd and goodfire-ai/param-decomp, ``models/component_model.py`` and ``decomposed_module.py``: for
each decomposed module V (d_in, C) and U (C, d_out), ``component = V_c . x``, under the names ``_components.{module with
- for .}.V``, ``target_model.{module}.components.V`` (older) or ``target_model.{module}.V`` (newer). Checkpoints are
pickles there; here, the same tensors in safetensors. Their masks (causal importances) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Decoder, Dictionary, DictionaryPart
from virtual_weights.checkpoint.dictionaries.modules import module_of
from virtual_weights.checkpoint.dictionaries.tables import Tensors, malformed, open_tensors, unsupported

_DASHED = re.compile(r"(?:.*\.)?_components\.(?P<path>[^.]+)\.(?P<side>[UV])")
_DOTTED = re.compile(r"(?:target_model|patched_model)\.(?P<path>.+?)(?:\.components)?\.(?P<side>[UV])")


@final
@dataclass(frozen=True)
class _Name:
    path: str
    side: str


def _parsed(name: str) -> _Name | None:
    if match := _DASHED.fullmatch(name):
        return _Name(match["path"].replace("-", "."), match["side"])
    match = _DOTTED.fullmatch(name)
    return _Name(match["path"], match["side"]) if match else None


def is_components(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold parameter components."""
    return any(_parsed(name) is not None for name in names)


def open_components(path: Path) -> Dictionary:
    """Open the components of all modules that read the stream or write to it, each a part with the module's tag.

    Raises:
        CheckpointError: a side is missing, sizes disagree, or no module reads the stream or writes to it.
    """
    tensors = open_tensors(path)
    sides: dict[str, dict[str, str]] = {}
    for name in tensors.source.tensors:
        if parsed := _parsed(name):
            sides.setdefault(parsed.path, {})[parsed.side] = name
    parts, unknown = list[DictionaryPart](), list[str]()
    for module, names in sides.items():
        part = _part(tensors, module, names)
        parts.append(part) if part else unknown.append(module)
    if not parts or unknown:
        raise unsupported(
            str(path),
            f"decomposes {', '.join(unknown[:5])}" if unknown else "decomposes no module",
            "modules whose names say where they read and write: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj, c_attn, c_fc, c_proj, ... of numbered layers",
            "write a file without these modules, or rename them as transformers does",
        )
    order = ("embed", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "unembed")
    ends = {"embed": -1, "unembed": 1 << 30}
    parts.sort(key=lambda part: (ends.get(part.tag, part.layer or 0), order.index(part.tag)))
    return Dictionary(str(path), "comp", "parameter components", tuple(parts), (tensors.source,))


def _part(tensors: Tensors, path: str, names: dict[str, str]) -> DictionaryPart | None:
    if names.keys() != {"U", "V"}:
        raise malformed(tensors.where, f"{path!r} has {', '.join(names)} alone", "V (d_in, C) and U (C, d_out)")
    components = tensors.shape(names["V"], None, None)[1]
    tensors.shape(names["U"], components, None)
    module = module_of(path)
    if module is None:
        return None
    if module.side == "reads":
        encoder = tensors.table(names["V"], "columns")
        return DictionaryPart(
            module.layer, components, module.place, encoder, activation=Activation("linear"), tag=module.tag
        )
    decoder = Decoder(module.place, tensors.table(names["U"], "rows"))
    return DictionaryPart(
        module.layer, components, None, None, activation=Activation("linear"), decoders=(decoder,), tag=module.tag
    )
