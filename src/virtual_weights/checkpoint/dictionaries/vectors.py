"""Vectors without an encoder: control vectors in GGUF, and plain arrays whose place the reader of them must name.

Sources: repeng 0ba7196 and llama.cpp, ``general.architecture = "controlvector"``, tensors ``direction.{layer}`` (d),
added to the stream at the end of that layer. Plain: ``(d,)`` or ``(k, d)`` in ``.npy``, or as the only tensor of a
``.safetensors`` file; each row is a reader and a writer.
"""

from __future__ import annotations

import re
from pathlib import Path

from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Decoder, Dictionary, DictionaryPart, Rows
from virtual_weights.checkpoint.dictionaries.tables import Tensors, malformed, unsupported
from virtual_weights.checkpoint.gguf_source import open_gguf
from virtual_weights.checkpoint.source import Opening

_DIRECTION = re.compile(r"direction\.(\d+)")


def open_control_vectors(path: Path) -> Dictionary:
    """Open the control vectors of a GGUF file, one feature a layer.

    Raises:
        CheckpointError: it is a GGUF file of something else, or its vectors disagree in size.
    """
    source = open_gguf(path, Opening(str(path), None, False))
    tensors = Tensors(source, str(path))
    if source.config.get("general.architecture") != "controlvector":
        raise unsupported(
            str(path),
            f"is of the architecture {source.config.get('general.architecture')!r}",
            "controlvector, as repeng writes and llama.cpp reads",
            "open a model's file as a model",
        )
    layers = {int(match[1]): name for name in source.tensors if (match := _DIRECTION.fullmatch(name))}
    if not layers or len(layers) != len(source.tensors):
        raise malformed(str(path), f"its tensors are {', '.join(list(source.tensors)[:8])}", "direction.{layer} alone")
    widths = {tensors.shape(name, None)[0] for name in layers.values()}
    if len(widths) != 1:
        raise malformed(str(path), f"its vectors have the sizes {sorted(widths)}", "one size")
    parts = tuple(
        DictionaryPart(
            layer,
            1,
            None,
            None,
            activation=Activation("linear"),
            decoders=(Decoder(f"blocks.{layer}.hook_resid_post", _single(tensors, layers[layer])),),
        )
        for layer in sorted(layers)
    )
    return Dictionary(str(path), "vec", "control vectors", parts, (source,))


def open_plain_vectors(tensors: Tensors) -> Dictionary:
    """The rows (k, d), or the one vector (d,), of a file's only tensor, which says nothing of where they belong.

    Raises:
        CheckpointError: it is anything else.
    """
    ((name, info),) = tensors.source.tensors.items()
    shape = info.shape
    if len(shape) not in (1, 2):
        raise malformed(tensors.where, f"{name!r} has shape {shape}", "vectors (k, d), or one vector (d,)")
    tensors.shape(name, *(None for _ in shape))
    rows = tensors.table(name, "rows") if len(shape) == 2 else _single(tensors, name)
    features = shape[0] if len(shape) == 2 else 1
    part = DictionaryPart(None, features, None, rows, activation=Activation("linear"), decoders=(Decoder("", rows),))
    return Dictionary(tensors.where, "vec", "plain vectors", (part,), (tensors.source,))


def _single(tensors: Tensors, name: str) -> Rows:
    return lambda rows: tensors.source.read(name)[None][rows]
