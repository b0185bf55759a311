"""Cross-layer transcoders of CLT-Forge: ``cfg.json`` and ``clt_weights.safetensors``, whole or one file per rank.

Source: CLT-Forge dcf4cc8, ``clt.py`` and ``attribution/loading.py``::

    W_enc (L, d, F)  b_enc (L, F)  log_threshold (L, F)  estimated_norm_scaling_factor_in, _out (L)
    W_dec (L (L + 1) / 2, F, d), b_dec (L (L + 1) / 2, d): pairs i <= j, ordered by i, then by j; without
    cross_layer_decoders (L, F, d) and (L, d), each layer's own
    pre_i = in_i x_i W_enc_i + b_enc_i      a = pre 1[pre > exp(log_threshold)]
    y_j = (sum over i <= j of a_i W_dec_ij + b_dec_ij) / out_j

``rank{r}_clt_weights.safetensors`` hold parts of the F features; what does not depend on F is in each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Decoder, Dictionary, DictionaryPart
from virtual_weights.checkpoint.dictionaries.tables import (
    Tensors,
    count_setting,
    joined,
    malformed,
    numbers_in,
    open_tensors,
    read_settings,
    switch_setting,
    unscaled,
    unsupported,
)
from virtual_weights.checkpoint.folder import names_in

CONFIG, WEIGHTS = "cfg.json", "clt_weights.safetensors"
_RANK = re.compile(r"rank(\d+)_clt_weights\.safetensors")
_IN, _OUT = "estimated_norm_scaling_factor_in", "estimated_norm_scaling_factor_out"


def is_clt_forge(names: Sequence[str]) -> bool:
    """Whether a folder with these files is CLT-Forge's."""
    return CONFIG in names and any(name == WEIGHTS or _RANK.fullmatch(name) for name in names)


def open_clt_forge(folder: Path) -> Dictionary:
    """Open the cross-layer transcoder in a folder.

    Raises:
        CheckpointError: files are missing, or contradict each other or the settings.
    """
    settings = read_settings(folder, CONFIG)
    if settings.get("activation_fn", "jumprelu") != "jumprelu":
        raise unsupported(
            str(folder), f"has activation_fn = {settings['activation_fn']!r}", "jumprelu", "train it with jumprelu"
        )
    names = names_in(folder)
    ranks = numbers_in(names, _RANK)
    if WEIGHTS in names:
        files = [open_tensors(folder / WEIGHTS, settings)]
    elif not ranks or ranks != list(range(len(ranks))) or settings.get("world_size", len(ranks)) != len(ranks):
        raise malformed(str(folder), f"there are files of ranks {ranks}", "one of every rank from 0")
    else:
        files = [open_tensors(folder / f"rank{rank}_{WEIGHTS}", settings) for rank in ranks]
    layers = count_setting(str(folder), "n_layers", settings.get("n_layers"), 1 << 12)
    width = count_setting(str(folder), "d_in", settings.get("d_in"), 1 << 30)
    crossing = switch_setting(str(folder), "cross_layer_decoders", settings.get("cross_layer_decoders", True))
    pairs = layers * (layers + 1) // 2 if crossing else layers
    features = sum(_features(file, layers, width, pairs) for file in files)
    if features != settings.get("d_latent", features):
        raise malformed(str(folder), f"d_latent is {settings['d_latent']!r}, the files hold {features}", "the same")
    parts = tuple(_part(files, layer, layers, crossing=crossing) for layer in range(layers))
    name = f"a {'cross-layer transcoder' if crossing else 'set of transcoders'} of CLT-Forge"
    sources = tuple(file.source for file in files)
    return Dictionary(str(folder), "clt" if crossing else "tc", name, parts, sources)


def _features(file: Tensors, layers: int, width: int, pairs: int) -> int:
    """How many features a file holds; refuses shapes that disagree."""
    features = file.shape("W_enc", layers, width, None)[2]
    for name, sizes in {
        "b_enc": (layers, features),
        "log_threshold": (layers, features),
        "W_dec": (pairs, features, width),
        "b_dec": (pairs, width),
    }.items():
        file.shape(name, *sizes)
    return features


def _part(files: Sequence[Tensors], layer: int, layers: int, *, crossing: bool) -> DictionaryPart:
    row = slice(layer, layer + 1)
    encoders = tuple(
        file.table("W_enc", "column planes").at(layer).times(_factor(files[0], _IN, layer)) for file in files
    )
    first = layer * layers - layer * (layer - 1) // 2 if crossing else layer  # pairs of the layers before come first
    targets = range(layer, layers if crossing else layer + 1)
    offsets = files[0].source.read("b_dec")
    decoders = list[Decoder]()
    for target in targets:
        scale, pair = _factor(files[0], _OUT, target), first + target - layer
        rows = joined(tuple(file.table("W_dec", "row planes").at(pair).times(1 / scale) for file in files))
        decoders.append(Decoder(f"blocks.{target}.hook_mlp_out", rows, unscaled(offsets[pair], scale)))
    thresholds = torch.cat([file.source.read("log_threshold", row)[0] for file in files])
    return DictionaryPart(
        layer,
        len(thresholds),
        f"blocks.{layer}.ln2.hook_normalized",
        joined(encoders),
        torch.cat([file.source.read("b_enc", row)[0] for file in files]),
        Activation("jumprelu", threshold=thresholds.double().exp()),
        tuple(decoders),
    )


def _factor(file: Tensors, name: str, layer: int) -> float:
    """By what states are multiplied before the transcoder sees them; 1 where the file has no such tensor."""
    if name not in file:
        return 1.0
    shape = file.source.tensors[name].shape
    if len(shape) != 1 or layer >= shape[0]:
        raise malformed(file.where, f"{name!r} has shape {shape}", "a factor for each layer")
    value = float(file.source.read(name)[layer])
    if not 0 < value < math.inf:
        raise malformed(file.where, f"{name!r} is {value} for layer {layer}", "a number above 0")
    return value
