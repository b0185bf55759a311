"""Dictionaries of OpenMOSS's llamascopium (Language-Model-SAEs): autoencoders, transcoders, cross-layer ones and Lorsa.

Source: llamascopium 2.0, 95281ac, ``models/{sparse_dictionary,sae,clt,lorsa}.py``: ``config.json`` and
``sae_weights.safetensors`` (before: ``checkpoints/{pruned,final}.safetensors``)::

    sae    W_E (d, F)  b_E (F)  W_D (F, d)  b_D (d)                     pre = c_in x W_E + b_E
    clt    W_E (L, d, F)  b_E (L, F)  W_D.{j} (j + 1, F, d)  b_D.{j}    W_D.{j}[i] maps features of layer i to layer j
    lorsa  W_Q, W_K (h, d, k)  b_Q, b_K (h, k)  W_V, W_O (F, d)  b_V  b_D
    a = pre g(pre n), n = ||W_D|| of a feature if sparsity_include_decoder_norm, else 1      y = (a W_D + b_D) / c_out
    g: 1[pre n > 0] (relu), 1[pre n > exp(log_jumprelu_threshold)] (jumprelu), the k largest (topk)

c = sqrt(d) / dataset_average_activation_norm.{hook} if norm_activation is dataset-wise, 1 if it is inference; n is of
the stored decoder. With n, a threshold moves to exp(.) / n, and a top-k compares n pre.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from virtual_weights.checkpoint.dictionaries.dictionary import (
    KIND_NAMES,
    Activation,
    Decoder,
    Dictionary,
    DictionaryPart,
)
from virtual_weights.checkpoint.dictionaries.hooks import layer_of
from virtual_weights.checkpoint.dictionaries.tables import (
    Tensors,
    count_setting,
    inner_folder,
    joined,
    malformed,
    open_tensors,
    read_settings,
    unscaled,
    unsupported,
)
from virtual_weights.checkpoint.folder import names_in
from virtual_weights.errors import MissingTensorError, UnsafeCheckpointError

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_BEFORE = ("pruned.safetensors", "final.safetensors")
_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
_BATCHED = {
    "batchtopk": "keeps the largest activations of a whole batch",
    "layertopk": "keeps the largest activations of all layers together",
    "batchlayertopk": "keeps the largest activations of a whole batch and all layers together",
}


def is_llamascopium(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder is llamascopium's."""
    return CONFIG in names and "sae_type" in read_settings(folder, CONFIG)


def open_llamascopium(folder: Path) -> Dictionary:
    """Open the dictionary in a folder.

    Raises:
        CheckpointError: the tensors contradict the settings, or the settings name what no part can say.
        UnsafeCheckpointError: its weights are pickled.
    """
    config = read_settings(folder, CONFIG)
    kind = config.get("sae_type")
    if kind not in ("sae", "clt", "lorsa"):
        raise unsupported(
            str(folder),
            f"has the sae_type {kind!r}",
            "sae, clt or lorsa",
            "of a crosscoder, write the vectors of one place as plain vectors and open those",
        )
    refuse_gated_encoder(folder, config)
    tensors = open_tensors(_weights(folder), config)
    if kind == "clt":
        parts = _cross_layer(tensors, config)
    else:
        parts = (_single(tensors, config, lorsa=kind == "lorsa"),)
        parts = (*parts, *_query_key(tensors, config)) if kind == "lorsa" else parts
    if kind == "sae" and config.get("hook_point_in") != config.get("hook_point_out"):
        kind = "tc"
    return Dictionary(str(folder), kind, f"{KIND_NAMES[kind]} of llamascopium", parts, (tensors.source,))


def refuse_gated_encoder(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse settings, of this library or of its versions before, that say that the encoder is gated.

    Raises:
        CheckpointError: they do.
    """
    if config.get("use_glu_encoder"):
        raise unsupported(
            str(folder),
            "has a gated encoder (use_glu_encoder): its pre-activation is a product of two products",
            "use_glu_encoder false",
            "use a dictionary of the same release without it",
        )


def _weights(folder: Path) -> Path:
    names = names_in(folder)
    if WEIGHTS in names:
        return folder / WEIGHTS
    inner = inner_folder(folder, "checkpoints")
    before = names_in(inner) if "checkpoints" in names else []
    for name in _BEFORE:
        if name in before:
            return inner / name
    pickled = [name for name in (*names, *before) if name.endswith((".pt", ".dcp"))]
    if pickled:
        raise UnsafeCheckpointError(
            f"{str(folder)!r} holds {pickled[0]!r}, which can run any code when it is opened",
            expected=WEIGHTS,
            do="where its origin is trusted, load it with llamascopium and call save_pretrained without a device mesh",
        )
    raise MissingTensorError(
        f"{str(folder)!r} holds no {WEIGHTS}", expected=f"{WEIGHTS} beside {CONFIG}", do="fetch the weights into it"
    )


def _single(tensors: Tensors, config: Mapping[str, Any], *, lorsa: bool) -> DictionaryPart:
    reads, writes = _hook(tensors, config, "hook_point_in"), _hook(tensors, config, "hook_point_out")
    scale_in, scale_out = _scale(tensors, config, reads), _scale(tensors, config, writes)
    encoder = tensors.table("W_V", "rows") if lorsa else tensors.table("W_E", "columns")
    features = encoder.features
    if config.get("d_model") != encoder.width:
        says = f"d_model is {config.get('d_model')!r}, the vectors have {encoder.width}"
        raise malformed(tensors.where, says, "the same")
    decoder = tensors.table("W_O" if lorsa else "W_D", "rows", features)
    offset = tensors.vector("b_D", decoder.width) if config.get("use_decoder_bias", True) else None
    norms = decoder.squared_norms().sqrt() if _weighs(config) else None
    threshold = tensors.vector(_THRESHOLD, features) if config.get("act_fn") == "jumprelu" else None
    activation, batched = _activation(tensors, config, features, threshold, norms)
    sums = "sums the encoder's products over earlier tokens by the pattern of a head before the activation"
    return DictionaryPart(
        layer_of(reads),
        features,
        reads,
        encoder.times(scale_in),
        tensors.vector("b_V" if lorsa else "b_E", features),
        activation,
        (Decoder(writes, decoder.times(1 / scale_out), unscaled(offset, scale_out)),),
        unfolded=_all_of(_per_token(tensors, config), batched, sums if lorsa else None),
    )


def _query_key(tensors: Tensors, config: Mapping[str, Any]) -> tuple[DictionaryPart, ...]:
    """What the heads of a Lorsa compare: the columns of their queries' and keys' maps, head after head."""
    reads = _hook(tensors, config, "hook_point_in")
    scale = _scale(tensors, config, reads)
    normed = "divides each head's vector by its root mean square" if config.get("use_post_qk_ln") else None
    rotary = config.get("positional_embedding_type", "rotary") == "rotary"
    rotated = "rotates pairs of channels by the token's position" if rotary else None
    unfolded = _all_of(_per_token(tensors, config), normed, rotated)
    parts = list[DictionaryPart]()
    for tag, name in (("q", "Q"), ("k", "K")):
        heads, _, channels = tensors.shape(f"W_{name}", None, config.get("d_model"), config.get("d_qk_head"))
        tensors.shape(f"b_{name}", heads, channels)
        table = tensors.table(f"W_{name}", "column planes")
        parts.append(
            DictionaryPart(
                layer_of(reads),
                heads * channels,
                reads,
                joined([table.at(head).times(scale) for head in range(heads)]),
                tensors.source.read(f"b_{name}").reshape(-1),
                Activation("linear"),
                tag=tag,
                unfolded=unfolded,
            )
        )
    return tuple(parts)


def _cross_layer(tensors: Tensors, config: Mapping[str, Any]) -> tuple[DictionaryPart, ...]:
    reads, writes = config.get("hook_points_in"), config.get("hook_points_out")
    if not _are_hooks(reads) or not _are_hooks(writes) or len(reads) != len(writes):
        says = f"hook_points_in is {reads!r:.200}, hook_points_out {writes!r:.200}"
        raise malformed(tensors.where, says, "a hook of every layer, in and out alike")
    layers = len(reads)
    _, width, features = tensors.shape("W_E", layers, config.get("d_model"), None)
    tensors.shape("b_E", layers, features)
    for to in range(layers):
        tensors.shape(f"W_D.{to}", to + 1, features, width)
    biased = bool(config.get("use_decoder_bias", True))
    encoder, biases = tensors.table("W_E", "column planes"), tensors.source.read("b_E")
    jumps = config.get("act_fn") == "jumprelu"
    if jumps:
        tensors.shape(_THRESHOLD, layers, features)
    parts = list[DictionaryPart]()
    for layer in range(layers):
        tables = [tensors.table(f"W_D.{to}", "row planes").at(layer) for to in range(layer, layers)]
        norms = None
        if _weighs(config):
            norms = torch.stack([table.squared_norms() for table in tables]).sum(0).sqrt()
        threshold = tensors.source.read(_THRESHOLD, slice(layer, layer + 1))[0] if jumps else None
        activation, batched = _activation(tensors, config, features, threshold, norms)
        scales = [_scale(tensors, config, writes[to]) for to in range(layer, layers)]
        offset = unscaled(tensors.vector(f"b_D.{layer}", width), scales[0]) if biased else None
        parts.append(
            DictionaryPart(
                layer_of(reads[layer]),
                features,
                reads[layer],
                encoder.at(layer).times(_scale(tensors, config, reads[layer])),
                biases[layer],
                activation,
                tuple(
                    Decoder(writes[layer + i], table.times(1 / scale), None if i else offset)
                    for i, (table, scale) in enumerate(zip(tables, scales, strict=True))
                ),
                unfolded=_all_of(_per_token(tensors, config), batched),
            )
        )
    return tuple(parts)


def _weighs(config: Mapping[str, Any]) -> bool:
    """Whether pre-activations are compared times the norms of their decoders."""
    return bool(config.get("sparsity_include_decoder_norm", True)) and config.get("act_fn") != "relu"


def _activation(
    tensors: Tensors, config: Mapping[str, Any], features: int, threshold: Tensor | None, norms: Tensor | None
) -> tuple[Activation, str | None]:
    """The gate, and what it does that is not of one token and layer."""
    kind = config.get("act_fn", "relu")
    if kind == "relu":
        return Activation("relu"), None
    if kind == "topk":
        k = count_setting(tensors.where, "k", config.get("top_k", 50), features)
        return Activation("topk", k=k, weights=norms, positive=True), None
    if kind == "jumprelu" and threshold is not None:
        values = threshold.double().exp()
        return Activation("jumprelu", threshold=values if norms is None else values / norms), None
    if isinstance(kind, str) and kind in _BATCHED:
        return Activation("relu"), _BATCHED[kind]
    raise unsupported(
        tensors.where,
        f"has act_fn = {kind!r}",
        f"relu, jumprelu, topk, {', '.join(_BATCHED)}",
        "convert it to jumprelu",
    )


def _scale(tensors: Tensors, config: Mapping[str, Any], hook: str) -> float:
    """The factor c of the states at a hook."""
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return 1.0
    if _NORM + hook not in tensors:
        raise MissingTensorError(
            f"{tensors.where!r} has norm_activation dataset-wise and no tensor {_NORM + hook!r}",
            expected="the mean norm of the states at every hook",
            do="fetch the file again, or save it with fold_activation_scale=True",
        )
    norm = tensors.number(_NORM + hook)
    if not 0 < norm < math.inf:
        raise malformed(tensors.where, f"{_NORM + hook!r} is {norm}", "a number above 0")
    return math.sqrt(count_setting(tensors.where, "d_model", config.get("d_model"), 1 << 30)) / norm


def _per_token(tensors: Tensors, config: Mapping[str, Any]) -> str | None:
    kind = config.get("norm_activation", "dataset-wise")
    if kind in ("dataset-wise", "inference"):
        return None
    if kind in ("token-wise", "batch-wise"):
        return f"scales the input to the norm sqrt(d), {kind}, and undoes it in the output"
    raise malformed(tensors.where, f"norm_activation is {kind!r}", "token-wise, batch-wise, dataset-wise or inference")


def _all_of(*texts: str | None) -> str | None:
    """The texts that there are as one; None where there are none."""
    return "; ".join(filter(None, texts)) or None


def _hook(tensors: Tensors, config: Mapping[str, Any], name: str) -> str:
    hook = config.get(name)
    if not isinstance(hook, str) or not hook:
        raise malformed(tensors.where, f"{name} is {hook!r}", "the name of a hook")
    return hook


def _are_hooks(hooks: Any) -> TypeGuard[list[str]]:
    return isinstance(hooks, list) and bool(hooks) and all(isinstance(hook, str) and hook for hook in hooks)
