"""Vectors without an encoder: control vectors in GGUF, and plain arrays whose place the reader of them must name.

Sources: repeng 0ba7196 and llama.cpp, ``general.architecture = "controlvector"``, tensors ``direction.{layer}`` (d),
added to the stream at the end of that layer. Plain: ``(d,)`` or ``(k, d)`` in ``.npy``, or as the only tensor of a
``.safetensors`` file; each row is a reader and a writer.
"""

from __future__ import annotations

import re
from pathlib import Path

from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Decoder, Dictionary, DictionaryPart, Rows
from virtual_weights.checkpoint.dictionaries.npz import open_npy
from virtual_weights.checkpoint.dictionaries.tables import Tensors, malformed, open_tensors, unsupported
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
    hint = source.config.get("controlvector.model_hint")
    return Dictionary(str(path), "vec", "control vectors", parts, (source,), model=str(hint) if hint else None)


def open_plain_vectors(path: Path) -> Dictionary:
    """Open rows (k, d), or one vector (d,), that say nothing of where they belong.

    Raises:
        CheckpointError: the file is not sound, or holds anything else.
        UnsafeCheckpointError: it holds pickled objects.
    """
    tensors = open_npy(path) if path.suffix == ".npy" else open_tensors(path)
    names = list(tensors.source.tensors)
    if len(names) != 1:
        raise malformed(str(path), f"it holds {len(names)} tensors", "one, of vectors (k, d) or a vector (d,)")
    name = names[0]
    shape = tensors.source.tensors[name].shape
    if len(shape) not in (1, 2):
        raise malformed(str(path), f"{name!r} has shape {shape}", "vectors (k, d), or one vector (d,)")
    tensors.shape(name, *(None for _ in shape))
    rows = tensors.table(name, "rows") if len(shape) == 2 else _single(tensors, name)
    features = shape[0] if len(shape) == 2 else 1
    part = DictionaryPart(None, features, None, rows, activation=Activation("linear"), decoders=(Decoder("", rows),))
    return Dictionary(str(path), "vec", "plain vectors", (part,), (tensors.source,))


def _single(tensors: Tensors, name: str) -> Rows:
    return lambda rows: tensors.source.read(name)[None][rows]
