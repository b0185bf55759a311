"""Dictionaries in SAELens's folders: ``cfg.json`` and ``sae_weights.safetensors``.

Source: SAELens 6.54.12, ``saes/*.py`` and ``loading/pretrained_sae_loaders.py``. Vectors are rows of ``W_dec`` (F, d)
and columns of ``W_enc`` (d, F)::

    x' = c x - b_dec if apply_b_dec_to_input              (a transcoder subtracts nothing)
    pre = x' W_enc + b_enc                                y = (a W_dec + b_dec) / c  (+ x W_skip^T)
    standard  relu(pre)            jumprelu  relu(pre) 1[pre > threshold]            topk  relu of the k largest
    gated     1[x' W_enc + b_gate > 0] relu(x' (W_enc exp(r_mag)) + b_mag)
    topk with rescale_acts_by_decoder_norm: relu of the k largest of n pre, n = ||W_dec||, decoded by W_dec / n

c is 1, or the factor of the input that training estimated (expected_average_only_in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from virtual_weights.checkpoint.dictionaries.hooks import full_hook, layer_of
from virtual_weights.checkpoint.dictionaries.tables import (
    Tensors,
    count_setting,
    folded_bias,
    gated_activation,
    malformed,
    open_tensors,
    read_settings,
    refuse_factor,
    unscaled,
    unsupported,
)
from virtual_weights.checkpoint.folder import names_in

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
_ARCHITECTURES = {
    "standard": "relu",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "matching_pursuit": "pursuit",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_PER_TOKEN = {
    "layer_norm": "subtracts the input's mean and divides it by its standard deviation",
    "constant_norm_rescale": "scales the input to the norm sqrt(d)",
}


def is_saelens(names: Sequence[str]) -> bool:
    """Whether a folder with these files is SAELens's."""
    return CONFIG in names and WEIGHTS in names


def open_saelens(folder: Path) -> Dictionary:
    """Open the sparse autoencoder or transcoder in a folder.

    Raises:
        CheckpointError: the tensors contradict the settings, or the settings name what cannot be said in a part.
    """
    settings = _current(read_settings(folder, CONFIG))
    tensors = open_tensors(folder / WEIGHTS, settings)
    architecture = settings["architecture"]
    if architecture not in _ARCHITECTURES:
        raise unsupported(
            str(folder),
            f"has the architecture {architecture!r}",
            f"one of {', '.join(_ARCHITECTURES)}",
            "of a training checkpoint, save the inference model with SAELens (save_inference_model)",
        )
    _refuse(tensors, settings)
    transcoding = "transcoder" in architecture
    part = _part(tensors, settings, transcoding)
    if _ARCHITECTURES[architecture] == "pursuit":
        part = replace(part, unfolded=_pursuit(settings) + (f"; it {part.unfolded}" if part.unfolded else ""))
    kind = "tc" if transcoding else "sae"
    name = f"{KIND_NAMES[kind]} of SAELens ({architecture})"
    return Dictionary(str(folder), kind, name, (part,), (tensors.source,))


def _part(tensors: Tensors, settings: Mapping[str, Any], transcoding: bool) -> DictionaryPart:
    decoder = tensors.table("W_dec", "rows", settings.get("d_sae"))
    kind = _ARCHITECTURES[settings["architecture"]]
    features = decoder.features
    encoder = decoder if kind == "pursuit" else tensors.table("W_enc", "columns", features, settings.get("d_in"))
    offset = tensors.vector("b_dec", decoder.width)
    factor, per_token = _scaling(Path(tensors.where).parent, settings)
    bias = None if kind == "pursuit" else tensors.vector("b_gate" if kind == "gated" else "b_enc", features)
    subtracts = settings["apply_b_dec_to_input"] and not transcoding
    if subtracts:
        bias = folded_bias(bias, encoder, offset)
    elif kind == "pursuit":
        offset = torch.zeros_like(offset)
    if kind == "gated":
        activation = gated_activation(tensors, "b_mag", encoder, bias, offset if subtracts else None)
    else:
        activation = _activation(kind, tensors, features, settings)
    encode, decode = encoder.times(factor), decoder.times(1 / factor)
    if kind == "topk" and settings.get("rescale_acts_by_decoder_norm"):
        norms = decoder.squared_norms().sqrt()
        encode, decode = encode.scaled(norms), decode.scaled(1 / norms)
        bias = bias.double() * norms if bias is not None else None
    skip = None
    if "skip" in settings["architecture"]:
        skip = tensors.matrix("W_skip", decoder.width, encoder.width)
    reads, writes = _places(settings["metadata"], transcoding)
    if settings["normalize_activations"] in _PER_TOKEN and not transcoding:
        per_token = f"{per_token}, and undoes it in the output"
    return DictionaryPart(
        layer_of(reads),
        features,
        reads,
        encode,
        bias,
        activation,
        (Decoder(writes or "", decode, unscaled(offset, factor)),),
        skip,
        unfolded=per_token,
    )


def _activation(kind: str, tensors: Tensors, features: int, settings: Mapping[str, Any]) -> Activation:
    if kind == "jumprelu":
        return Activation("jumprelu", threshold=tensors.vector("threshold", features), positive=True)
    if kind == "topk":
        return Activation("topk", k=count_setting(tensors.where, "k", settings.get("k"), features), positive=True)
    return Activation("linear" if kind == "pursuit" else "relu")


def _pursuit(settings: Mapping[str, Any]) -> str:
    return (
        "features are chosen one by one, each by what the chosen ones leave of the input (matching pursuit with "
        f"residual_threshold {settings.get('residual_threshold', 0.01)}, max_iterations "
        f"{settings.get('max_iterations')}); the pre-activation here is that of the first choice"
    )


def _scaling(folder: Path, settings: Mapping[str, Any]) -> tuple[float, str | None]:
    """By what the input is multiplied, and what else is done to it at every token."""
    kind = settings["normalize_activations"]
    if kind in _PER_TOKEN:
        return 1.0, _PER_TOKEN[kind]
    if kind == "none":
        return 1.0, None
    if kind == "expected_average_only_in":
        if SCALER not in names_in(folder):
            return 1.0, "expects an input scaled to a mean norm of sqrt(d), by a factor that the folder does not say"
        scaler = read_settings(folder, SCALER)
        factor = scaler.get("scaling_factor")
        if factor is None:
            return 1.0, None
        if not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor <= 0:
            raise malformed(str(folder / SCALER), f"scaling_factor is {factor!r}", "a number above 0, or null")
        return float(factor), None
    raise unsupported(
        str(folder),
        f"has normalize_activations = {kind!r}",
        f"none, expected_average_only_in, {' or '.join(_PER_TOKEN)}",
        "fold the normalization into the weights with SAELens (fold_activation_...) and save the model again",
    )


def _places(metadata: Mapping[str, Any], transcoding: bool) -> tuple[str | None, str | None]:
    """Where it reads and writes, by its names for hooks, or for modules where it has only those."""
    hook, layer = metadata.get("hook_name"), metadata.get("hook_layer")
    if not isinstance(hook, str) or not hook:
        module = metadata.get("hf_hook_name")
        return (module, module) if isinstance(module, str) and not transcoding else (None, None)
    reads = full_hook(hook, layer if isinstance(layer, int) else None)
    if not transcoding:
        return reads, reads
    out, layer_out = metadata.get("hook_name_out"), metadata.get("hook_layer_out", layer)
    if not isinstance(out, str) or not out:
        return reads, None
    return reads, full_hook(out, layer_out if isinstance(layer_out, int) else layer_of(reads))


def _current(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of any version under today's names, with the defaults of their version."""
    settings = dict(given)
    nested = isinstance(settings.get("metadata"), dict)
    for old, new in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        if old in settings:
            settings.setdefault(new, settings.pop(old))
    settings["metadata"] = {**settings, **settings["metadata"]} if nested else dict(settings)
    settings["architecture"] = str(settings.get("architecture") or "standard")
    keywords = settings.get("activation_fn_kwargs")
    k = keywords.get("k") if isinstance(keywords, dict) else None
    if settings.get("activation_fn") == "topk" and k is not None:
        settings |= {"architecture": "topk", "k": k}
    normalize: Any = settings.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        normalize = "expected_average_only_in" if normalize else "none"
    settings["normalize_activations"] = str(normalize)
    settings.setdefault("apply_b_dec_to_input", True)
    if settings.get("rescale_acts_by_decoder_norm") is None:
        settings["rescale_acts_by_decoder_norm"] = False
    return settings


def _refuse(tensors: Tensors, settings: Mapping[str, Any]) -> None:
    """Refuse what would change the function and no part can say."""
    where = tensors.where
    if settings.get("activation_fn") not in (None, "relu", "topk"):
        raise unsupported(where, f"has activation_fn = {settings['activation_fn']!r}", "relu or topk", "retrain it")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        refuse_factor(tensors, name, "save the weights")
    if settings.get("hook_head_index", settings["metadata"].get("hook_head_index")) is not None:
        raise unsupported(
            where,
            f"reads head {settings['metadata'].get('hook_head_index')} alone",
            "a dictionary of a state of the stream or of all heads",
            "use a dictionary of attn.hook_z, or the head's channels themselves",
        )
    for name, architectures in (("W_skip", "skip"), ("threshold", "jumprelu"), ("r_mag", "gated")):
        if name in tensors and architectures not in settings["architecture"]:
            raise malformed(
                where, f"there is {name!r} and the architecture {settings['architecture']!r}", "no such tensor in it"
            )
