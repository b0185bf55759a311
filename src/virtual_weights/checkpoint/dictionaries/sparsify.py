"""Sparse coders in the folders of EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``, a folder a hookpoint.

Source: eai-sparsify 1.3.3, ``sparse_coder.py`` and ``fused_encoder.py``::

    encoder.weight (F, d)  encoder.bias  W_dec (F, d)  b_dec  [W_skip (d, d)]
    pre = encoder.weight (x - b_dec) + encoder.bias, a transcoder subtracts nothing
    a = the k largest of relu(pre)       y = a W_dec + b_dec + W_skip x

A folder's name is a module: an autoencoder reads and writes its output, a transcoder maps its input to its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from virtual_weights.checkpoint.dictionaries.dictionary import (
    KIND_NAMES,
    Activation,
    Decoder,
    Dictionary,
    DictionaryPart,
)
from virtual_weights.checkpoint.dictionaries.hooks import layer_of
from virtual_weights.checkpoint.dictionaries.tables import (
    count_setting,
    folded_bias,
    malformed,
    open_tensors,
    read_settings,
    switch_setting,
    unsupported,
)

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def is_sparsify(names: Sequence[str]) -> bool:
    """Whether a folder with these files is sparsify's."""
    return CONFIG in names and WEIGHTS in names


def open_sparsify(folder: Path) -> Dictionary:
    """Open the sparse coder of one hookpoint.

    Raises:
        CheckpointError: the tensors contradict the settings, or the activation is another than top-k.
    """
    settings = read_settings(folder, CONFIG)
    tensors = open_tensors(folder / WEIGHTS, settings)
    where = str(folder)
    if settings.get("activation", "topk") != "topk":
        raise unsupported(
            where,
            f"has the activation {settings['activation']!r}",
            "topk",
            "train it with activation topk: in a group maximum, features of one group exclude each other",
        )
    width = count_setting(where, "d_in", settings.get("d_in"), 1 << 30)
    if settings.get("num_latents"):
        features = count_setting(where, "num_latents", settings["num_latents"], 1 << 40)
    else:
        factor = count_setting(where, "expansion_factor", settings.get("expansion_factor", 32), 1 << 20)
        features = width * factor
    encoder = tensors.table("encoder.weight", "rows", features, width)
    offset, bias = tensors.vector("b_dec", width), tensors.vector("encoder.bias", features)
    transcoding = switch_setting(where, "transcode", settings.get("transcode", False))
    skipping = switch_setting(where, "skip_connection", settings.get("skip_connection", False))
    if skipping != ("W_skip" in tensors):
        raise malformed(where, f"skip_connection is {skipping}", "W_skip if and only if it is true")
    module = folder.name
    reads, writes = f"{module}.{'input' if transcoding else 'output'}", f"{module}.output"
    part = DictionaryPart(
        layer_of(module),
        features,
        reads,
        encoder,
        bias if transcoding else folded_bias(bias, encoder, offset),
        Activation("topk", k=count_setting(where, "k", settings.get("k", 32), features), positive=True),
        (Decoder(writes, tensors.table("W_dec", "rows", features, width), offset),),
        tensors.matrix("W_skip", width, width) if skipping else None,
    )
    kind = "tc" if transcoding else "sae"
    return Dictionary(where, kind, f"{KIND_NAMES[kind]} of sparsify", (part,), (tensors.source,), settings=module)
