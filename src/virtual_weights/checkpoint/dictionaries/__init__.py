"""Dictionaries of features on the disk: every published file format, read into one form.

What a format does to its input before the encoder is folded into encoder and bias, and what it does to its output into
the decoders, so that ``encoder x + bias`` is the format's own pre-activation of a state x as it flows, and ``sum of
activations times decoder vectors + bias`` is what it puts in the place of the state. What no fixed map holds is said in
words. Vectors are read when they are used; pickles are refused; nothing is fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from virtual_weights.checkpoint.dictionaries.circuit_tracer import (
    is_circuit_tracer,
    open_circuit_tracer,
    open_layer_file,
)
from virtual_weights.checkpoint.dictionaries.clt_forge import is_clt_forge, open_clt_forge
from virtual_weights.checkpoint.dictionaries.components import is_components, open_components
from virtual_weights.checkpoint.dictionaries.dictionary import Activation, Decoder, Dictionary, DictionaryPart
from virtual_weights.checkpoint.dictionaries.dictionary_learning import (
    is_dictionary_learning,
    open_dictionary_learning,
)
from virtual_weights.checkpoint.dictionaries.gemma_scope import (
    is_gemma_scope,
    is_gemma_scope_crossing,
    open_gemma_scope,
    open_gemma_scope_archive,
    open_gemma_scope_crossing,
)
from virtual_weights.checkpoint.dictionaries.llama_scope import is_llama_scope, open_llama_scope
from virtual_weights.checkpoint.dictionaries.llamascopium import is_llamascopium, open_llamascopium
from virtual_weights.checkpoint.dictionaries.lora import open_factors
from virtual_weights.checkpoint.dictionaries.npz import open_npy
from virtual_weights.checkpoint.dictionaries.saelens import is_saelens, open_saelens
from virtual_weights.checkpoint.dictionaries.sparsify import is_sparsify, open_sparsify
from virtual_weights.checkpoint.dictionaries.tables import inner_folder, malformed, open_tensors
from virtual_weights.checkpoint.dictionaries.vectors import open_control_vectors, open_plain_vectors
from virtual_weights.checkpoint.folder import names_in
from virtual_weights.errors import CheckpointError, MissingTensorError, UnsafeCheckpointError

__all__ = [
    "open_dictionary",
    "open_factors",
    "Dictionary",
    "DictionaryPart",
    "Decoder",
    "Activation",
]

READABLE = (
    "an adapter (adapter_config.json), or a folder of circuit-tracer (config.yaml, layer_{i}.safetensors, "
    "W_enc_{i}.safetensors), of SAELens (cfg.json, sae_weights.safetensors), of sparsify (cfg.json, sae.safetensors), "
    "of Gemma Scope (params.npz, params.safetensors), of dictionary_learning (config.json, one .safetensors), of "
    "llamascopium (config.json, sae_weights.safetensors), of Llama Scope (hyperparams.json), of CLT-Forge (cfg.json, "
    "clt_weights.safetensors); parameter components in one .safetensors; control vectors in .gguf; plain vectors in "
    ".npy or .safetensors"
)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".dcp")
_Opener = Callable[[Path], Dictionary]
_FORMATS: tuple[tuple[Callable[[Path, Sequence[str]], bool], _Opener], ...] = (
    (is_gemma_scope_crossing, open_gemma_scope_crossing),
    (lambda _, names: is_circuit_tracer(names), open_circuit_tracer),
    (lambda _, names: is_saelens(names), open_saelens),
    (lambda _, names: is_sparsify(names), open_sparsify),
    (lambda _, names: is_clt_forge(names), open_clt_forge),
    (lambda _, names: is_gemma_scope(names), open_gemma_scope),
    (lambda _, names: is_llama_scope(names), open_llama_scope),
    (is_llamascopium, open_llamascopium),
    (is_dictionary_learning, open_dictionary_learning),
)
"""Whether a folder with these names is of a format, and what opens it, in the order in which they are tried."""


def open_dictionary(path: str | Path) -> Dictionary:
    """Open a dictionary of whatever format; what it is follows from the files and their contents.

    Args:
        path: a file, the folder of one dictionary, or a folder with a folder for each of several layers or places.

    Returns:
        Its parts in order of depth, none of whose vectors is read yet.

    Raises:
        CheckpointError: it is of no known format, contradicts its format, or computes what no part can say.
        UnsafeCheckpointError: it is pickled, or leads out of its folder.
    """
    where = Path(path).expanduser().absolute()
    if not os.path.lexists(where):  # where a name is too long, Path.exists raises
        raise MissingTensorError(
            f"there is no dictionary {str(path)!r:.300}",
            expected=READABLE,
            do="check the path; files of a hub must be fetched first, nothing is fetched here",
        )
    if not where.is_dir():
        return _open_file(where)
    names = names_in(where)
    opener = _opener(where, names)
    if opener is not None:
        return opener(where)
    folders = [inner_folder(where, name) for name in names if (where / name).is_dir()]
    openers = [(folder, opener) for folder in folders if (opener := _opener(folder, names_in(folder)))]
    if not openers:
        raise _unknown(where, names)
    return _together(where, [opener(folder) for folder, opener in openers])


def _opener(folder: Path, names: Sequence[str]) -> _Opener | None:
    """What opens a folder; None where it holds no dictionary itself."""
    if opener := _opener_of_format(folder, names):
        return opener
    files = [name for name in names if name.endswith((".safetensors", ".npy", ".gguf"))]
    if "adapter_config.json" in names or len(files) != 1:
        return None
    return lambda parent: _open_file(parent / files[0])


def _opener_of_format(folder: Path, names: Sequence[str]) -> _Opener | None:
    """What opens a folder of settings and weights; None where it is none."""
    return next((opener for is_of_format, opener in _FORMATS if is_of_format(folder, names)), None)


def _open_file(path: Path) -> Dictionary:
    """Open one file, by itself or with the settings beside it."""
    if path.suffix == ".npz":
        return open_gemma_scope_archive(path)
    if path.suffix == ".npy":
        return open_plain_vectors(open_npy(path))
    if path.suffix == ".gguf":
        return open_control_vectors(path)
    if path.suffix != ".safetensors":
        raise _unknown(path, [path.name])
    if path.name in ("sae_weights.safetensors", "sae.safetensors", "params.safetensors", "clt_weights.safetensors"):
        names = [name for name in names_in(path.parent) if name == path.name or not name.endswith(".safetensors")]
        opener = _opener_of_format(path.parent, names)
        if opener is None:  # without its settings, it could be misread
            raise _unknown(path, [path.name])
        return opener(path.parent)
    tensors = open_tensors(path)
    infos = tensors.source.tensors
    if {"W_enc", "b_enc", "W_dec", "b_dec"} <= infos.keys():
        return open_layer_file(path)
    if is_components(infos):
        return open_components(tensors)
    if len(infos) == 1:
        return open_plain_vectors(tensors)
    raise _unknown(path, list(infos))


def _together(folder: Path, dictionaries: Sequence[Dictionary]) -> Dictionary:
    """The dictionaries of a folder's folders as one."""
    first = dictionaries[0]
    if {dictionary.kind for dictionary in dictionaries} != {first.kind}:
        kinds = ", ".join(sorted({dictionary.format for dictionary in dictionaries}))
        raise malformed(str(folder), f"its folders hold {kinds}", "folders of one kind", "open one of them by its path")
    parts = [part for dictionary in dictionaries for part in dictionary.parts]
    marks = [(part.layer, part.reads, part.tag) for part in parts]
    if len(set(marks)) != len(marks):
        double = next(mark for mark in marks if marks.count(mark) > 1)
        raise malformed(
            str(folder),
            f"several folders hold dictionaries that read {double[1]!r} of layer {double[0]}",
            "one for each place",
            "open one of them by its path, or put the wanted ones in a folder of their own",
        )
    parts.sort(key=lambda part: (-1 if part.layer is None else part.layer, part.reads or ""))
    return Dictionary(
        str(folder),
        first.kind,
        first.format,
        tuple(parts),
        tuple(source for dictionary in dictionaries for source in dictionary.sources),
        "\n".join(dictionary.settings for dictionary in dictionaries),
    )


def _unknown(path: Path, names: Sequence[str]) -> CheckpointError | UnsafeCheckpointError:
    if "adapter_config.json" in names:
        return CheckpointError(
            f"{str(path)!r} holds a low-rank adapter",
            expected=READABLE,
            do="attach it to its base, or read its factors as vectors of their own: open_factors(path)",
        )
    if pickled := next((name for name in names if name.endswith(_PICKLES)), None):
        return _pickled(path, pickled)
    return CheckpointError(
        f"{str(path)!r} is no dictionary that can be read (it holds {', '.join(names[:10]) or 'nothing'})",
        expected=READABLE,
        do="open the folder that holds settings and weights, or convert the dictionary to one of these formats",
    )


def _pickled(path: Path, name: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{str(path)!r} holds {name!r}, a pickle, which can run any code when it is opened",
        expected=READABLE,
        do="convert it where its origin is trusted: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        "'NAME.safetensors'), and put it in a folder with the settings of its format",
    )
