"""Autoencoders of dictionary_learning, written as safetensors: ``config.json`` and one file of tensors.

Source: saprmarks/dictionary_learning 60ec6bf, ``dictionary.py`` and ``trainers/*.py``. By ``trainer.dict_class``::

    AutoEncoder              encoder.weight (F, d) .bias  decoder.weight (d, F)  bias: relu(E (x - bias) + b), + bias
    AutoEncoderNew           the same without a subtraction, decoder.bias
    GatedAutoEncoder         encoder.weight  gate_bias mag_bias r_mag  decoder.weight  decoder_bias (subtracted, added)
    AutoEncoderTopK          encoder.*  decoder.weight  b_dec (subtracted, added)  k: the k largest of relu(pre)
    BatchTopKSAE             the same tensors and threshold: relu(pre) 1[pre > threshold]
    MatryoshkaBatchTopKSAE   W_enc (d, F)  b_enc  W_dec (F, d)  b_dec (subtracted, added)  threshold
    JumpReluAutoEncoder      the same tensors, threshold (F), nothing subtracted

Activations are those of stored weights: some versions of the library also multiply them by decoder norms for show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Decoder, Dictionary, DictionaryPart
from virtual_weights.checkpoint.dictionaries.tables import (
    Tensors,
    count_setting,
    folded_bias,
    gated_activation,
    malformed,
    open_tensors,
    read_settings,
    unsupported,
)
from virtual_weights.checkpoint.folder import names_in
from virtual_weights.errors import UnsafeCheckpointError

CONFIG, PICKLE = "config.json", "ae.pt"
_CLASSES = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
    "JumpReluAutoEncoder": "b_dec",
}
"""What a class adds to its output, and subtracts from its input unless it is one of these two."""
_SUBTRACT_NOTHING = ("AutoEncoderNew", "JumpReluAutoEncoder")

_SITES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attention_out": "hook_attn_out",
    "attn_out": "hook_attn_out",
}


def is_dictionary_learning(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder is a trainer's of dictionary_learning."""
    return PICKLE in names or (CONFIG in names and isinstance(read_settings(folder, CONFIG).get("trainer"), dict))


def open_dictionary_learning(folder: Path) -> Dictionary:
    """Open the autoencoder in a folder.

    Raises:
        CheckpointError: the tensors contradict the settings, or are of a class that is not known.
        UnsafeCheckpointError: its weights are pickled.
    """
    names = names_in(folder)
    files = [name for name in names if name.endswith(".safetensors")]
    if not files and PICKLE in names:
        raise UnsafeCheckpointError(
            f"{str(folder)!r} holds {PICKLE}, a pickle, which can run any code when it is opened",
            expected=f"the same tensors in one .safetensors file beside {CONFIG}",
            do=f"where its origin is trusted: safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), "
            "'ae.safetensors'), with every tensor made contiguous()",
        )
    if len(files) != 1:
        raise malformed(str(folder), f"there are {len(files)} .safetensors files", "one")
    settings = read_settings(folder, CONFIG) if CONFIG in names else {}
    trainer = settings.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    tensors = open_tensors(folder / files[0], settings)
    name = _class(tensors, trainer)
    part = _part(tensors, name, trainer)
    return Dictionary(str(folder), "sae", f"{name} of dictionary_learning", (part,), (tensors.source,))


def _class(tensors: Tensors, trainer: Mapping[str, Any]) -> str:
    """The class that the settings name; without them, the one that the tensors leave, if it is one."""
    name = trainer.get("dict_class")
    if "encoder.weight" in tensors and len(tensors.source.tensors["encoder.weight"].shape) == 3:
        raise unsupported(
            tensors.where,
            "is a crosscoder, whose features read several layers or models at once",
            "features that read one place",
            "write the vectors of one layer as plain vectors (.safetensors with a single tensor) and open those",
        )
    if name is None:
        marks = {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew", "gate_bias": "GatedAutoEncoder"}
        known = [kind for mark, kind in marks.items() if mark in tensors]
        name = known[0] if len(known) == 1 else None
    if not isinstance(name, str) or name not in _CLASSES:
        raise unsupported(
            tensors.where,
            f"is of the class {name!r}" if name else f"does not say its class in {CONFIG} (trainer.dict_class)",
            f"one of {', '.join(_CLASSES)}",
            f"write {CONFIG} with the class beside the tensors, or convert it to one of these",
        )
    return name


def _part(tensors: Tensors, name: str, trainer: Mapping[str, Any]) -> DictionaryPart:
    plain = "W_enc" in tensors
    encoder = tensors.table("W_enc", "columns") if plain else tensors.table("encoder.weight", "rows")
    features, width = encoder.features, encoder.width
    decoder = tensors.table(*(("W_dec", "rows") if plain else ("decoder.weight", "columns")), features, width)
    offset = tensors.vector(_CLASSES[name], width)
    bias_name = "gate_bias" if name == "GatedAutoEncoder" else "b_enc" if plain else "encoder.bias"
    bias: Tensor | None = tensors.vector(bias_name, features)
    activation = _activation(tensors, name, features)
    if name not in _SUBTRACT_NOTHING:
        bias = folded_bias(bias, encoder, offset)
    if name == "GatedAutoEncoder":
        activation = gated_activation(tensors, "mag_bias", encoder, bias, offset)
    layer = trainer.get("layer")
    layer = layer if isinstance(layer, int) and not isinstance(layer, bool) else None
    place = _place(trainer, layer)
    return DictionaryPart(layer, features, place, encoder, bias, activation, (Decoder(place or "", decoder, offset),))


def _activation(tensors: Tensors, name: str, features: int) -> Activation:
    if name == "AutoEncoderTopK":
        return Activation("topk", k=count_setting(tensors.where, "k", tensors.number("k"), features), positive=True)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = tensors.number("threshold")
        if not threshold >= 0:
            raise malformed(
                tensors.where,
                f"threshold is {threshold}: training ended before it was estimated",
                "a number of at least 0, above which features are active outside training",
                "train it beyond threshold_start_step, or store the mean of the smallest active activations",
            )
        return Activation("jumprelu", threshold=tensors.source.read("threshold").reshape(()), positive=True)
    if name == "JumpReluAutoEncoder":
        return Activation("jumprelu", threshold=tensors.vector("threshold", features), positive=True)
    return Activation("relu")


def _place(trainer: Mapping[str, Any], layer: int | None) -> str | None:
    """The place that a submodule's name such as ``resid_post_layer_8`` says; None for names of other kinds."""
    match = re.fullmatch(r"(\w+?)(?:_layer_(\d+))?", str(trainer.get("submodule_name") or ""))
    number = int(match[2]) if match and match[2] else layer
    if match is None or match[1] not in _SITES or number is None:
        return None
    return f"blocks.{number}.{_SITES[match[1]]}"
