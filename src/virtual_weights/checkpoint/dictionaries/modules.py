"""Which places of the stream the modules of a model read and write, by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, final

from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Decoder, DictionaryPart, Rows

_LAYER = re.compile(r"(?:^|.*\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)")
_ATTENTION = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "query": "q",
    "key": "k",
    "value": "v",
    "c_attn": "qkv",
    "query_key_value": "qkv",
    "qkv_proj": "qkv",
    "Wqkv": "qkv",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
    "c_proj": "o",
}
_MLP = {
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "c_fc": "up",
    "fc_in": "up",
    "fc1": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "c_proj": "down",
    "fc_out": "down",
    "fc2": "down",
    "dense_4h_to_h": "down",
}
TAGS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "embed", "unembed")
"""The tags of modules, in their order in a layer."""

_ATTENTION_OF = ("self_attn", "attn", "attention", "self_attention")


@final
@dataclass(frozen=True)
class Module:
    """A linear map of a model between the stream and the inside of a branch.

    Attributes:
        layer: None of the embedding and the unembedding.
        tag: one of ``TAGS``.
        side: whether it reads the stream or writes to it.
        place: where.
    """

    layer: int | None
    tag: str
    side: Literal["reads", "writes"]
    place: str


def module_of(path: str) -> Module | None:
    """The module at a path such as ``"model.layers.3.self_attn.q_proj"``; None where its name says no place.

    Example:
        >>> module_of("model.layers.3.self_attn.q_proj")
        Module(layer=3, tag='q', side='reads', place='blocks.3.attn.hook_in')
        >>> module_of("transformer.h.0.mlp.c_proj").place
        'blocks.0.mlp.hook_out'
    """
    leaf = path.rsplit(".", 1)[-1]
    if leaf in ("wte", "embed_tokens", "embed_in"):
        return Module(None, "embed", "writes", "hook_embed")
    if leaf in ("lm_head", "embed_out"):
        return Module(None, "unembed", "reads", f"{path}.input")
    match = _LAYER.fullmatch(path)
    if match is None:
        return None
    layer, parents = int(match[1]), match[2].split(".")[:-1]
    if any(parent in _ATTENTION_OF for parent in parents):
        tag, branch = _ATTENTION.get(leaf), "attn"
    elif any(parent in ("mlp", "ffn") for parent in parents) or leaf in ("fc1", "fc2"):
        tag, branch = _MLP.get(leaf), "mlp"
    else:
        return None
    if tag is None:
        return None
    side: Literal["reads", "writes"] = "writes" if tag in ("o", "down") else "reads"
    return Module(layer, tag, side, f"blocks.{layer}.{branch}.hook_{'out' if side == 'writes' else 'in'}")


def module_part(module: Module, features: int, vectors: Rows) -> DictionaryPart:
    """Linear features that read or write where a module does, with the module's tag.

    Args:
        module: whose place and side it is.
        features: how many.
        vectors: (F, d), readers or writers.
    """
    reads = module.side == "reads"
    return DictionaryPart(
        module.layer,
        features,
        module.place if reads else None,
        vectors if reads else None,
        activation=Activation("linear"),
        decoders=() if reads else (Decoder(module.place, vectors),),
        tag=module.tag,
    )
