"""Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors`` with ``config.json``): autoencoders and transcoders.

Sources: arXiv 2408.05147; the cards of google/gemma-scope-2b-pt-* and google/gemma-scope-2-*; SAELens 6.54.12 and
circuit-tracer 4bb8c0e, which load them. Both subtract nothing from their input::

    1: W_enc (d, F)  W_dec (F, d)  b_enc  b_dec  threshold     2: w_enc  w_dec  ..., affine_skip_connection (d, d)
    pre = x W_enc + b_enc     a = relu(pre) 1[pre > threshold]      y = a W_dec + b_dec + x affine_skip_connection
    a cross-layer one of 2 has a file for each layer, w_dec (F, L, d), of which the slots from its own layer on count

Version 1 says only by its path where it reads: its transcoders behind the norm before the MLP and before that norm's
gain, version 2 behind the gain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from virtual_weights.checkpoint.dictionaries.dictionary import (
    KIND_NAMES,
    Activation,
    Decoder,
    Dictionary,
    DictionaryKind,
    DictionaryPart,
)
from virtual_weights.checkpoint.dictionaries.hooks import at_layer, layer_of
from virtual_weights.checkpoint.dictionaries.npz import open_npz
from virtual_weights.checkpoint.dictionaries.tables import (
    Table,
    Tensors,
    malformed,
    open_tensors,
    read_settings,
    refuse_factor,
    unsupported,
)
from virtual_weights.checkpoint.folder import names_in

ARCHIVE, WEIGHTS, CONFIG = "params.npz", "params.safetensors", "config.json"
_LAYER = re.compile(r"layer_(\d+)")
_LAYER_FILE = re.compile(r"(?:params_)?layer_(\d+)\.safetensors")


@final
@dataclass(frozen=True)
class _Site:
    """Where a dictionary reads and writes.

    Attributes:
        kind: what it is.
        layer: of the model.
        reads, writes: the places; None where nothing says them.
    """

    kind: DictionaryKind
    layer: int | None
    reads: str | None
    writes: str | None


def is_gemma_scope(names: Sequence[str]) -> bool:
    """Whether a folder with these files holds one dictionary of Gemma Scope."""
    return ARCHIVE in names or WEIGHTS in names


def is_gemma_scope_crossing(folder: Path, names: Sequence[str]) -> bool:
    """Whether the layers' files in a folder are those of a cross-layer transcoder of Gemma Scope 2."""
    files = [name for name in names if _LAYER_FILE.fullmatch(name)]
    return bool(files) and "w_enc" in open_tensors(folder / files[0])


def open_gemma_scope(folder: Path) -> Dictionary:
    """Open one autoencoder or transcoder.

    Raises:
        CheckpointError: tensors are missing, or contradict each other or the settings.
    """
    return open_gemma_scope_archive(folder / ARCHIVE) if ARCHIVE in names_in(folder) else _second(folder)


def open_gemma_scope_archive(path: Path) -> Dictionary:
    """Open one dictionary of Gemma Scope 1.

    Raises:
        CheckpointError: tensors are missing or of wrong shapes.
        UnsafeCheckpointError: the archive holds pickled objects.
    """
    site = _site_of_path(path)
    tensors = open_npz(path, {"place": site.reads})
    lower = "w_enc" in tensors
    encoder = tensors.table("w_enc" if lower else "W_enc", "columns")
    refuse_factor(tensors, "scaling_factor", "write the archive")
    decoder = tensors.table("w_dec" if lower else "W_dec", "rows", encoder.features)
    offset = tensors.vector("b_dec", decoder.width)
    if site.reads == "hook_embed":  # trained on rows of the embedding, which the model multiplies by sqrt(d)
        width = encoder.width
        encoder, decoder, offset = encoder.times(width**-0.5), decoder.times(width**0.5), offset.double() * width**0.5
    part = _part(tensors, site.layer, site.reads, encoder, (Decoder(site.writes or "", decoder, offset),))
    name = f"Gemma Scope, {KIND_NAMES[site.kind]}"
    return Dictionary(str(path), site.kind, name, (part,), (tensors.source,), settings=f"{site.reads} {site.writes}")


def open_gemma_scope_crossing(folder: Path) -> Dictionary:
    """Open a cross-layer transcoder of Gemma Scope 2, with a file for each layer.

    Raises:
        CheckpointError: files are missing, or contradict each other.
    """
    names = names_in(folder)
    config = read_settings(folder, CONFIG) if CONFIG in names else {}
    files_by_layer = {int(match[1]): match[0] for match in map(_LAYER_FILE.fullmatch, names) if match}
    layers = sorted(files_by_layer)
    if layers != list(range(len(layers))):
        raise malformed(str(folder), f"there are files of layers {layers}", "one of every layer from 0")
    files = [open_tensors(folder / files_by_layer[layer], config) for layer in layers]
    reads = _place(config, "hf_hook_point_in") or "model.layers.0.pre_feedforward_layernorm.output"
    writes = _place(config, "hf_hook_point_out") or "model.layers.0.post_feedforward_layernorm.output"
    parts = tuple(_crossing_part(layer, files, reads, writes) for layer in layers)
    sources = tuple(file.source for file in files)
    return Dictionary(str(folder), "clt", f"Gemma Scope 2, {KIND_NAMES['clt']}", parts, sources)


def _crossing_part(layer: int, files: Sequence[Tensors], reads: str, writes: str) -> DictionaryPart:
    tensors = files[layer]
    encoder = tensors.table("w_enc", "columns")
    decoder = tensors.table("w_dec", "row slots", encoder.features)
    slots = tensors.source.tensors["w_dec"].shape[1]
    if slots != len(files):
        raise malformed(tensors.where, f"w_dec writes to {slots} layers of {len(files)}", "a slot for each layer")
    offset = tensors.vector("b_dec", decoder.width)
    decoders = tuple(
        Decoder(at_layer(writes, to), decoder.at(to), offset if to == layer else None)
        for to in range(layer, len(files))
    )
    skip = _skip(tensors, encoder.width, decoder.width)
    return _part(tensors, layer, at_layer(reads, layer), encoder, decoders, skip)


def _second(folder: Path) -> Dictionary:
    names = names_in(folder)
    config = read_settings(folder, CONFIG) if CONFIG in names else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise unsupported(
            str(folder),
            f"has the architecture {config['architecture']!r}",
            "jump_relu",
            "choose one of the other dictionaries of the same release",
        )
    tensors = open_tensors(folder / WEIGHTS, config)
    encoder = tensors.table("w_enc", "columns")
    decoder = tensors.table("w_dec", "rows", encoder.features)
    site = _site_of_config(folder, config)
    skip = _skip(tensors, encoder.width, decoder.width)
    if config.get("affine_connection") is not None and bool(config["affine_connection"]) != (skip is not None):
        says = f"affine_connection is {config['affine_connection']!r}"
        raise malformed(
            str(folder),
            f"{says}, and there is {'one' if skip is not None else 'none'}",
            "settings that fit the tensors",
        )
    offset = tensors.vector("b_dec", decoder.width)
    part = _part(tensors, site.layer, site.reads, encoder, (Decoder(site.writes or "", decoder, offset),), skip)
    name = f"Gemma Scope 2, {KIND_NAMES[site.kind]}"
    return Dictionary(str(folder), site.kind, name, (part,), (tensors.source,), settings=f"{site.reads} {site.writes}")


def _part(
    tensors: Tensors,
    layer: int | None,
    reads: str | None,
    encoder: Table,
    decoders: tuple[Decoder, ...],
    skip: Tensor | None = None,
) -> DictionaryPart:
    """The part of an encoder and its decoders, with the bias and the thresholds that every file has."""
    features = encoder.features
    activation = Activation("jumprelu", threshold=tensors.vector("threshold", features), positive=True)
    return DictionaryPart(
        layer, features, reads, encoder, tensors.vector("b_enc", features), activation, decoders, skip
    )


def _skip(tensors: Tensors, width: int, width_out: int) -> Tensor | None:
    """The affine connection as (d_out, d_in)."""
    name = "affine_skip_connection"
    return tensors.matrix(name, width, width_out).T if name in tensors else None


def _place(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) and value else None


def _site_of_config(folder: Path, config: Mapping[str, Any]) -> _Site:
    """By the settings; without them by the folder's names, as SAELens does."""
    reads, writes = _place(config, "hf_hook_point_in"), _place(config, "hf_hook_point_out")
    match = _LAYER.match(folder.name)
    layer = int(match[1]) if match else None
    site = folder.parent.name
    transcoding = (
        "transcoder" in site or config.get("type") == "transcoder" or bool(reads and writes and reads != writes)
    )
    if reads is None and layer is not None:
        module = f"model.layers.{layer}."
        if transcoding:
            reads = f"{module}pre_feedforward_layernorm.output"
            writes = f"{module}post_feedforward_layernorm.output"
        elif site.startswith(("resid_post", "attn_out", "mlp_out")):
            tail = {"r": "output", "a": "self_attn.o_proj.input", "m": "post_feedforward_layernorm.output"}[site[0]]
            reads = module + tail
    writes = writes or (None if transcoding else reads)
    return _Site("tc" if transcoding else "sae", layer if layer is not None else layer_of(reads), reads, writes)


def _site_of_path(path: Path) -> _Site:
    """By the names of the folders, as in google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    folders = path.absolute().parts[:-1]
    layers = [match[1] for match in map(_LAYER.fullmatch, folders) if match]
    release = " ".join(folders)
    kind: DictionaryKind = "tc" if re.search(r"gemma-scope-\w+-\w+-transcoders|\btranscoders\b", release) else "sae"
    if "embedding" in folders:
        return _Site("sae", None, "hook_embed", "hook_embed")
    if not layers:
        return _Site(kind, None, None, None)
    layer = int(layers[-1])
    block = f"blocks.{layer}."
    if kind == "tc":
        return _Site("tc", layer, f"{block}ln2.hook_normalized", f"{block}hook_mlp_out")
    hooks = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}
    match = re.search(r"gemma-scope-\w+-\w+-(res|att|mlp)\b", release)
    place = block + hooks[match[1]] if match else None
    return _Site("sae", layer, place, place)
