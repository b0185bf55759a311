"""Llama Scope as it was first published: ``hyperparams.json`` and ``checkpoints/final.safetensors``.

Sources: fnlp/Llama3_1-8B-Base-LX{R,M,A,TC}-{8,32}x; OpenMOSS/Language-Model-SAEs before its version 1, ``sae.py``::

    encoder.weight (F, d)  encoder.bias  decoder.weight (d, F)  decoder.bias
    pre = encoder.weight (c_in x - decoder.bias, if apply_decoder_bias_to_pre_encoder) + encoder.bias
    a = pre 1[pre n > jump_relu_threshold], n = ||decoder|| of a feature if sparsity_include_decoder_norm, else 1
    y = (decoder.weight a + decoder.bias) / c_out          c = sqrt(d) / dataset_average_activation_norm
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from virtual_weights.checkpoint.dictionaries.dictionary import (
    KIND_NAMES,
    Activation,
    Decoder,
    Dictionary,
    DictionaryPart,
)
from virtual_weights.checkpoint.dictionaries.hooks import layer_of
from virtual_weights.checkpoint.dictionaries.llamascopium import refuse_gated_encoder
from virtual_weights.checkpoint.dictionaries.tables import (
    Table,
    Tensors,
    count_setting,
    folded_bias,
    inner_folder,
    malformed,
    open_tensors,
    read_settings,
    unscaled,
    unsupported,
)
from virtual_weights.checkpoint.folder import names_in

CONFIG = "hyperparams.json"


def is_llama_scope(names: Sequence[str]) -> bool:
    """Whether a folder with these files is Llama Scope's."""
    return CONFIG in names and "checkpoints" in names


def open_llama_scope(folder: Path) -> Dictionary:
    """Open one autoencoder or transcoder.

    Raises:
        CheckpointError: the tensors contradict the settings, or the settings name what no part can say.
    """
    config = read_settings(folder, CONFIG)
    refuse_gated_encoder(folder, config)
    inner = inner_folder(folder, "checkpoints")
    names = names_in(inner)
    file = next((name for name in ("pruned.safetensors", "final.safetensors") if name in names), "final.safetensors")
    tensors = open_tensors(inner / file, config)
    width = count_setting(str(folder), "d_model", config.get("d_model"), 1 << 30)
    encoder = tensors.table("encoder.weight", "rows", config.get("d_sae"), width)
    decoder = tensors.table("decoder.weight", "columns", encoder.features, width)
    scale_in, scale_out = (_scale(str(folder), config, side, width) for side in ("in", "out"))
    offset = tensors.vector("decoder.bias", width) if config.get("use_decoder_bias", True) else None
    bias = tensors.vector("encoder.bias", encoder.features)
    subtracts = bool(config.get("apply_decoder_bias_to_pre_encoder"))
    folded = folded_bias(bias, encoder, offset) if subtracts and offset is not None else bias
    reads, writes = config.get("hook_point_in"), config.get("hook_point_out")
    reads, writes = (place if isinstance(place, str) else None for place in (reads, writes))
    part = DictionaryPart(
        layer_of(reads),
        encoder.features,
        reads,
        encoder.times(scale_in),
        folded,
        _activation(tensors, config, decoder),
        (Decoder(writes or "", decoder.times(1 / scale_out), unscaled(offset, scale_out)),),
    )
    kind = "sae" if reads == writes else "tc"
    return Dictionary(str(folder), kind, f"Llama Scope, {KIND_NAMES[kind]}", (part,), (tensors.source,))


def _activation(tensors: Tensors, config: Mapping[str, Any], decoder: Table) -> Activation:
    kind = config.get("act_fn", "jumprelu")
    norms = decoder.squared_norms().sqrt() if config.get("sparsity_include_decoder_norm") and kind != "relu" else None
    if kind == "relu":
        return Activation("relu")
    if kind == "topk":
        k = count_setting(tensors.where, "top_k", config.get("top_k"), decoder.features)
        return Activation("topk", k=k, weights=norms, positive=True)
    threshold = config.get("jump_relu_threshold")
    if kind != "jumprelu" or isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise unsupported(
            tensors.where,
            f"has act_fn = {kind!r} and jump_relu_threshold = {threshold!r}",
            "relu, topk, or jumprelu with a number",
            "use a dictionary of the same release with one of these",
        )
    if not math.isfinite(threshold) or threshold < 0:
        raise malformed(tensors.where, f"jump_relu_threshold is {threshold}", "a number of at least 0")
    values = torch.tensor(float(threshold), dtype=torch.float64)
    return Activation("jumprelu", threshold=values if norms is None else values / norms, positive=True)


def _scale(where: str, config: Mapping[str, Any], side: str, width: int) -> float:
    kind = config.get("norm_activation", "dataset-wise")
    if kind == "inference":
        return 1.0
    norms = config.get("dataset_average_activation_norm")
    norm = norms.get(side) if isinstance(norms, dict) else None
    if (
        kind != "dataset-wise"
        or isinstance(norm, bool)
        or not isinstance(norm, (int, float))
        or not 0 < norm < math.inf
    ):
        raise malformed(
            where,
            f"norm_activation is {kind!r} and the mean norm {side} is {norm!r}",
            "dataset-wise with a number above 0, or inference",
        )
    return math.sqrt(width) / norm
