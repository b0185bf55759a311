"""Transcoder sets and cross-layer transcoders in circuit-tracer's files, and ByteDance's cross-layer top-k ones.

Sources: circuit-tracer 4bb8c0e, ``transcoder/single_layer_transcoder.py``, ``transcoder/cross_layer_transcoder.py`` and
``utils/hf_utils.py``; the model card of ByteDance-Seed/Cross-Layer-TopK-CLT.

::

    layer_{i}.safetensors    W_enc (F, d)  W_dec (F, d)  b_enc  b_dec  [activation_function.threshold] [W_skip] [k]
        pre = W_enc x + b_enc       y = a W_dec + b_dec + W_skip x
    W_enc_{i}.safetensors    W_enc_{i} (F, d)  b_enc_{i}  b_dec_{i}  [threshold_{i}] [W_skip_{i}]
    W_dec_{i}.safetensors    W_dec_{i} (F, L - i, d), whose m-th slot writes to layer i + m
        y_l = sum over i <= l of a_i W_dec_{i}[:, l - i] + b_dec_{l} + x_l W_skip_{l}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from virtual_weights.checkpoint.dictionaries.dictionary import (
    Activation,
    Decoder,
    Dictionary,
    DictionaryKind,
    DictionaryPart,
)
from virtual_weights.checkpoint.dictionaries.flat_yaml import parse_flat_yaml
from virtual_weights.checkpoint.dictionaries.hooks import full_hook
from virtual_weights.checkpoint.dictionaries.tables import (
    Tensors,
    count_setting,
    malformed,
    numbers_in,
    open_tensors,
    read_settings,
)
from virtual_weights.checkpoint.folder import MAX_CONFIG, names_in, pin_inside
from virtual_weights.errors import MissingTensorError

CONFIG = "config.yaml"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")


def is_circuit_tracer(names: Sequence[str]) -> bool:
    """Whether a folder with these files is circuit-tracer's."""
    return CONFIG in names or any(_LAYER.fullmatch(name) or _ENCODER.fullmatch(name) for name in names)


def open_circuit_tracer(folder: Path) -> Dictionary:
    """Open the local files of a set of transcoders or of a cross-layer transcoder.

    Raises:
        CheckpointError: files are missing, or contradict each other or their settings.
    """
    names = names_in(folder)
    settings = _settings(folder) if CONFIG in names else {}
    crossing = any(_ENCODER.fullmatch(name) for name in names)
    kind = settings.get("model_kind", "cross_layer_transcoder" if crossing else "transcoder_set")
    if kind == "cross_layer_transcoder":
        return _cross_layer(folder, names, settings)
    if kind == "transcoder_set":
        return _per_layer(folder, names, settings)
    raise malformed(str(folder), f"model_kind is {kind!r}", "transcoder_set or cross_layer_transcoder")


def open_layer_file(path: Path) -> Dictionary:
    """Open one ``layer_{i}.safetensors`` by itself; the settings beside it hold, if there are any."""
    settings = _settings(path.parent) if CONFIG in names_in(path.parent) else {}
    match = _LAYER.fullmatch(path.name)
    tensors = open_tensors(path, settings)
    part = _layer_part(tensors, int(match[1]) if match else None, settings)
    return _dictionary(path, "tc", "a transcoder of circuit-tracer", [part], [tensors])


def _per_layer(folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Dictionary:
    layers = numbers_in(names, _LAYER)
    listed = settings.get("transcoders")
    if not layers:
        raise MissingTensorError(
            f"{str(folder)!r} holds no layer_0.safetensors, layer_1.safetensors, ..."
            + (f"; its {CONFIG} names files elsewhere, such as {str(listed[0])!r:.200}" if listed else ""),
            expected=f"the files of the set beside {CONFIG}",
            do=f"fetch them and put them beside {CONFIG} as layer_{{i}}.safetensors; nothing is fetched here",
        )
    if isinstance(listed, list) and len(listed) != len(layers):
        raise malformed(str(folder), f"{len(layers)} layers lie beside a list of {len(listed)}", "a file for each")
    files = [open_tensors(folder / f"layer_{layer}.safetensors", settings) for layer in layers]
    parts = [_layer_part(file, layer, settings) for file, layer in zip(files, layers, strict=True)]
    return _dictionary(folder, "tc", "transcoders of circuit-tracer", parts, files)


def _layer_part(tensors: Tensors, layer: int | None, settings: Mapping[str, Any]) -> DictionaryPart:
    (features,) = tensors.shape("b_enc", None)
    encoder = tensors.table("W_enc", "rows", features)
    (width,) = tensors.shape("b_dec", None)
    if tensors.shape("W_dec", None, None) == (width, features) != (features, width):
        raise malformed(
            tensors.where,
            f"W_dec has shape {(width, features)}, features along its columns, as before they were turned in 2025",
            f"({features}, {width})",
            "fetch the file anew, or write it again with W_dec transposed",
        )
    decoder = tensors.table("W_dec", "rows", features, width)
    skip = tensors.matrix("W_skip", width, encoder.width) if "W_skip" in tensors else None
    reads, writes = _hooks(settings)
    placed = layer is not None and bool(settings)  # the library's default hooks count only beside settings
    return DictionaryPart(
        layer,
        features,
        full_hook(reads, layer) if placed else None,
        encoder,
        tensors.vector("b_enc", features),
        _activation(tensors, "activation_function.threshold", features, settings),
        (Decoder(full_hook(writes, layer) if placed else "", decoder, tensors.vector("b_dec", width)),),
        skip,
    )


def _hooks(settings: Mapping[str, Any]) -> tuple[str, str]:
    """The hooks that are read and written, by default those of the library."""
    return (
        str(settings.get("feature_input_hook") or "hook_resid_mid"),
        str(settings.get("feature_output_hook") or "hook_mlp_out"),
    )


def _activation(tensors: Tensors, threshold: str, features: int, settings: Mapping[str, Any]) -> Activation:
    kind = settings.get("activation")
    if kind not in (None, "relu", "topk", "jumprelu", "jump_relu"):
        raise malformed(tensors.where, f"activation is {kind!r}", "relu, topk, or none for JumpReLU or ReLU")
    if kind == "topk" or (kind is None and "k" in tensors):
        stored = int(tensors.number("k")) if "k" in tensors else None
        k = count_setting(tensors.where, "k", settings.get("k", stored), features)
        if stored not in (None, k):
            raise malformed(tensors.where, f"k is {k} in {CONFIG} and {stored} in the tensors", "one k")
        return Activation("topk", k=k)
    if kind == "relu" or (kind is None and threshold not in tensors):
        return Activation("relu")
    return Activation("jumprelu", threshold=tensors.vector(threshold, features))


def _cross_layer(folder: Path, names: Sequence[str], settings: Mapping[str, Any]) -> Dictionary:
    layers = numbers_in(names, _ENCODER)
    if layers != list(range(len(layers))) or not layers:
        raise malformed(str(folder), f"there are W_enc files of layers {layers}", "one of every layer from 0")
    if joint := any(name.startswith("W_dec_norm") for name in names):
        settings = {**settings, **(read_settings(folder, "config.json") if "config.json" in names else {})}
    encoders = [open_tensors(folder / f"W_enc_{i}.safetensors", settings) for i in layers]
    decoders = [open_tensors(folder / f"W_dec_{i}.safetensors", settings) for i in layers]
    parts = [_crossing_part(i, encoders, decoders, settings) for i in layers]
    if joint:
        parts = [_of_joint_top_k(part, folder, settings, len(layers)) for part in parts]
        name = "a cross-layer top-k transcoder of ByteDance"
    else:
        name = "a cross-layer transcoder of circuit-tracer"
    return _dictionary(folder, "clt", name, parts, [*encoders, *decoders])


def _crossing_part(
    i: int, encoders: Sequence[Tensors], decoders: Sequence[Tensors], settings: Mapping[str, Any]
) -> DictionaryPart:
    file, layers = encoders[i], len(encoders)
    encoder = file.table(f"W_enc_{i}", "rows")
    features = encoder.features
    shape = encoders[0].shape("W_enc_0", None, None)
    if encoder.shape() != shape:
        raise malformed(file.where, f"its shape is {encoder.shape()}", f"{shape}")
    decoder = decoders[i].table(f"W_dec_{i}", "row slots", features)
    shape = decoders[i].source.tensors[f"W_dec_{i}"].shape
    if shape[1] != layers - i:
        raise malformed(decoders[i].where, f"W_dec_{i} has shape {shape}", f"({features}, {layers - i}, d)")
    bias = file.vector(f"b_dec_{i}", decoder.width) if f"b_dec_{i}" in file else None
    reads, writes = _hooks(settings)
    skip = file.matrix(f"W_skip_{i}", encoder.width, decoder.width).T if f"W_skip_{i}" in file else None
    jumps = f"threshold_{i}" in file
    if jumps != ("threshold_0" in encoders[0]):
        raise malformed(file.where, f"it has {'a' if jumps else 'no'} threshold, unlike layer 0", "one in each or none")
    return DictionaryPart(
        i,
        features,
        full_hook(reads, i),
        encoder,
        file.vector(f"b_enc_{i}", features) if f"b_enc_{i}" in file else None,
        Activation("jumprelu", threshold=file.vector(f"threshold_{i}", features)) if jumps else Activation("relu"),
        tuple(
            Decoder(full_hook(writes, i + slot), decoder.at(slot), None if slot else bias) for slot in range(layers - i)
        ),
        skip,
    )


def _of_joint_top_k(part: DictionaryPart, folder: Path, settings: Mapping[str, Any], layers: int) -> DictionaryPart:
    k = count_setting(str(folder), "k", settings.get("k"), part.features)
    return replace(
        part,
        activation=Activation("relu"),
        unfolded=f"of all features of all {layers} layers together, only the {k * layers} with the largest activation "
        "times decoder norm stay",
    )


def _settings(folder: Path) -> dict[str, Any]:
    file = pin_inside(folder, CONFIG)
    if file.size > MAX_CONFIG:
        raise malformed(str(file.path), f"it has {file.size:,} bytes", f"at most {MAX_CONFIG:,}")
    try:
        text = file.read(0, file.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise malformed(str(file.path), f"it is not text: {error}", "YAML in UTF-8") from error
    return parse_flat_yaml(text, str(file.path))


def _dictionary(
    path: Path, kind: DictionaryKind, name: str, parts: Sequence[DictionaryPart], files: Sequence[Tensors]
) -> Dictionary:
    return Dictionary(str(path), kind, name, tuple(parts), tuple(file.source for file in files))
