"""Broken and hostile checkpoints by name, each made in a folder, with the error it must give.

``CASES[name](folder)`` writes the checkpoint and returns how to open it. The bytes are written by hand:
a writer library would refuse to write most of them.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from virtual_weights.errors import (
    CheckpointError,
    MalformedCheckpointError,
    MissingTensorError,
    NonFiniteError,
    UnsafeCheckpointError,
    VirtualWeightsError,
)

CONFIG = {"model_type": "llama", "hidden_size": 2}


@dataclass(frozen=True)
class Case:
    """How a checkpoint's defect shows.

    Attributes:
        reference: what to open.
        error: exactly the type that must be raised.
        says: a word that its first part must hold, so that the right defect is what is reported.
        read: the tensor to read where the defect lies in the data; None where opening must fail.
    """

    reference: str
    error: type[VirtualWeightsError]
    says: str
    read: str | None = None


CASES: dict[str, Callable[[Path], Case]] = {}
Maker = Callable[[Path], Case]


def case(make: Maker) -> Maker:
    CASES[make.__name__.replace("_", "-")] = make
    return make


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def single(folder: Path, content: bytes, config: bytes | None = None) -> str:
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_bytes(json.dumps(CONFIG).encode() if config is None else config)
    return str(folder)


def sharded(folder: Path, weight_map: Any, **shards: list[str]) -> str:
    """A folder with an index; ``shards`` gives the tensors of ``<key>.safetensors``."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for shard, names in shards.items():
        header = {name: entry(8 * i, 8 * i + 8) for i, name in enumerate(names)}
        (folder / f"{shard}.safetensors").write_bytes(safetensors_bytes(header, bytes(8 * len(names))))
    return str(folder)


# -- formats that are not opened


class _Trap:
    """Unpickling this makes a file: if it ever appears, we ran a stranger's code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def trapped(path: Path) -> Path:
    path.write_bytes(pickle.dumps(_Trap(path.parent / "code-was-run")))
    return path


@case
def pickle_bin(folder: Path) -> Case:
    return Case(str(trapped(folder / "pytorch_model.bin")), UnsafeCheckpointError, "pickled")


@case
def pickle_pt(folder: Path) -> Case:
    return Case(str(trapped(folder / "model.pt")), UnsafeCheckpointError, "pickled")


@case
def pickle_ckpt(folder: Path) -> Case:
    return Case(str(trapped(folder / "last.ckpt")), UnsafeCheckpointError, "pickled")


@case
def pickle_without_suffix(folder: Path) -> Case:
    return Case(str(trapped(folder / "weights")), UnsafeCheckpointError, "pickled")


@case
def pickle_named_safetensors(folder: Path) -> Case:
    return Case(str(trapped(folder / "model.safetensors")), MalformedCheckpointError, "header claims")


@case
def pickle_index(folder: Path) -> Case:
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": {"w": "pytorch_model-1.bin"}}))
    return Case(str(path), UnsafeCheckpointError, "pickled")


@case
def folder_with_pickles_only(folder: Path) -> Case:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    trapped(folder / "pytorch_model.bin")
    return Case(str(folder), UnsafeCheckpointError, "pickled")


@case
def npz_archive(folder: Path) -> Case:
    np.savez(folder / "weights.npz", w=np.ones(2))
    return Case(str(folder / "weights.npz"), CheckpointError, "no format")


@case
def zip_archive(folder: Path) -> Case:
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        archive.writestr("model.safetensors", safetensors_bytes({}))
    return Case(str(folder / "model.zip"), CheckpointError, "no format")


@case
def unknown_format(folder: Path) -> Case:
    (folder / "model.xyz").write_bytes(b"hello")
    return Case(str(folder / "model.xyz"), CheckpointError, "no format")


@case
def path_that_is_not_there(folder: Path) -> Case:
    return Case(str(folder / "nothing"), MissingTensorError, "no checkpoint")


@case
def unknown_name(folder: Path) -> Case:
    return Case("smollm2-135n", MissingTensorError, "no checkpoint")


@case
def empty_folder(folder: Path) -> Case:
    return Case(str(folder), MissingTensorError, "no checkpoint")


@case
def several_files_without_index(folder: Path) -> Case:
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(safetensors_bytes({}))
    return Case(str(folder), MissingTensorError, "several")


# -- configuration


@case
def no_config(folder: Path) -> Case:
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"w": entry(0, 8)}, bytes(8)))
    return Case(str(folder), MissingTensorError, "config.json")


@case
def config_is_a_list(folder: Path) -> Case:
    return Case(single(folder, safetensors_bytes({}), b"[1, 2]"), MalformedCheckpointError, "list")


@case
def config_not_json(folder: Path) -> Case:
    return Case(single(folder, safetensors_bytes({}), b"{model_type: llama}"), MalformedCheckpointError, "not JSON")


@case
def config_not_utf8(folder: Path) -> Case:
    return Case(single(folder, safetensors_bytes({}), b'{"a": "\xff"}'), MalformedCheckpointError, "not JSON")


@case
def config_nested_deeply(folder: Path) -> Case:
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return Case(single(folder, safetensors_bytes({}), deep), MalformedCheckpointError, "nested")


@case
def config_nested_somewhat(folder: Path) -> Case:
    deep = b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}"  # what Python's own limit lets through
    return Case(single(folder, safetensors_bytes({}), deep), MalformedCheckpointError, "nested")


@case
def config_huge(folder: Path) -> Case:
    reference = single(folder, safetensors_bytes({}))
    os.truncate(folder / "config.json", 1 << 33)
    return Case(reference, MalformedCheckpointError, "bytes")


@case
def config_with_endless_number(folder: Path) -> Case:
    return Case(
        single(folder, safetensors_bytes({}), b'{"a": ' + b"9" * 100_000 + b"}"), MalformedCheckpointError, "not JSON"
    )


@case
def config_with_a_key_twice(folder: Path) -> Case:
    twice = b'{"hidden_size": 2, "hidden_size": 3}'
    return Case(single(folder, safetensors_bytes({}), twice), MalformedCheckpointError, "twice")


@case
def config_leads_out_of_the_folder(folder: Path) -> Case:
    inside, secret = folder / "model", folder / "secret.json"
    inside.mkdir()
    secret.write_text('{"password": 1}')
    single(inside, safetensors_bytes({}))
    (inside / "config.json").unlink()
    (inside / "config.json").symlink_to(secret)
    return Case(str(inside), UnsafeCheckpointError, "link")


# -- shards


@case
def shard_missing(folder: Path) -> Case:
    return Case(sharded(folder, {"w": "a.safetensors", "v": "b.safetensors"}, a=["w"]), MissingTensorError, "'b.safe")


@case
def shard_in_parent_folder(folder: Path) -> Case:
    inside = folder / "model"
    inside.mkdir()
    (folder / "x.safetensors").write_bytes(safetensors_bytes({"w": entry(0, 8)}, bytes(8)))
    return Case(sharded(inside, {"w": "../x.safetensors"}), UnsafeCheckpointError, "'../x.safe")


@case
def shard_in_subfolder(folder: Path) -> Case:
    return Case(sharded(folder, {"w": "sub/x.safetensors"}), UnsafeCheckpointError, "'sub/x.safe")


@case
def shard_with_backslash(folder: Path) -> Case:
    return Case(sharded(folder, {"w": "..\\x.safetensors"}), UnsafeCheckpointError, "x.safe")


@case
def shard_absolute(folder: Path) -> Case:
    target = folder / "x.safetensors"
    target.write_bytes(safetensors_bytes({"w": entry(0, 8)}, bytes(8)))
    inside = folder / "model"
    inside.mkdir()
    return Case(sharded(inside, {"w": str(target)}), UnsafeCheckpointError, "x.safe")


@case
def shard_with_nul(folder: Path) -> Case:
    return Case(sharded(folder, {"w": "a\0.safetensors"}), UnsafeCheckpointError, "\\x00")


@case
def shard_link_out_of_the_folder(folder: Path) -> Case:
    inside = folder / "model"
    inside.mkdir()
    (folder / "x.safetensors").write_bytes(safetensors_bytes({"w": entry(0, 8)}, bytes(8)))
    (inside / "a.safetensors").symlink_to(folder / "x.safetensors")
    return Case(sharded(inside, {"w": "a.safetensors"}), UnsafeCheckpointError, "link")


@case
def shard_link_to_itself(folder: Path) -> Case:
    (folder / "a.safetensors").symlink_to("a.safetensors")
    return Case(sharded(folder, {"w": "a.safetensors"}), CheckpointError, "cannot be reached")


@case
def shard_is_a_pipe(folder: Path) -> Case:
    os.mkfifo(folder / "a.safetensors")
    return Case(sharded(folder, {"w": "a.safetensors"}), UnsafeCheckpointError, "regular")


@case
def shard_is_a_folder(folder: Path) -> Case:
    (folder / "a.safetensors").mkdir()
    return Case(sharded(folder, {"w": "a.safetensors"}), UnsafeCheckpointError, "regular")


@case
def shard_is_a_pickle(folder: Path) -> Case:
    trapped(folder / "a.bin")
    return Case(sharded(folder, {"w": "a.bin"}), UnsafeCheckpointError, "'a.bin'")


@case
def index_names_a_tensor_that_is_not_in_its_shard(folder: Path) -> Case:
    return Case(sharded(folder, {"w": "a.safetensors", "v": "a.safetensors"}, a=["w"]), MissingTensorError, "'v'")


@case
def tensor_in_two_shards(folder: Path) -> Case:
    reference = sharded(folder, {"w": "a.safetensors", "v": "b.safetensors"}, a=["w"], b=["v", "w"])
    return Case(reference, MalformedCheckpointError, "'b.safetensors' holds 'w'")


@case
def tensor_that_the_index_does_not_name(folder: Path) -> Case:
    return Case(sharded(folder, {"w": "a.safetensors"}, a=["w", "v"]), MalformedCheckpointError, "'v'")


@case
def index_not_json(folder: Path) -> Case:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("weight_map: none")
    return Case(str(folder), MalformedCheckpointError, "not JSON")


@case
def index_without_weight_map(folder: Path) -> Case:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    return Case(str(folder), MalformedCheckpointError, "weight_map")


@case
def index_with_numbers_for_files(folder: Path) -> Case:
    return Case(sharded(folder, {"w": 1}), MalformedCheckpointError, "weight_map")


@case
def index_nested_deeply(folder: Path) -> Case:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return Case(str(folder), MalformedCheckpointError, "nested")


# -- safetensors


def bad_header(name: str, content: bytes, says: str) -> None:
    CASES[name] = lambda folder: Case(single(folder, content), MalformedCheckpointError, says)


def bad_entry(name: str, value: Any, says: str, data: int = 8) -> None:
    bad_header(name, safetensors_bytes({"w": value}, bytes(data)), says)


bad_header("file-empty", b"", "0 bytes")
bad_header("file-of-five-bytes", b"\1\0\0\0\0", "5 bytes")
bad_header("header-longer-than-the-file", safetensors_bytes({}, length=1000), "1,000")
bad_header("header-length-2-63", safetensors_bytes({}, length=2**63), "9,223,372,036,854,775,808")
bad_header("header-not-json", safetensors_bytes(b"{nothing"), "not JSON")
bad_header("header-not-utf8", safetensors_bytes(b'{"\xff": 1}'), "not JSON")
bad_header("header-is-a-list", safetensors_bytes([]), "list")
bad_header("header-nested-deeply", safetensors_bytes(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested")
bad_header("header-of-many-items", safetensors_bytes(b'{"a": [' + b"1," * 5_000_000 + b"1]}"), "entry")
bad_header(
    "header-with-a-key-twice",
    safetensors_bytes(b'{"w": %s, "w": %s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)),
    "twice",
)
bad_header("header-metadata-not-text", safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__")
bad_header("tensor-name-empty", safetensors_bytes({"": entry(0, 8)}, bytes(8)), "name")
bad_header("tensor-name-steers-the-terminal", safetensors_bytes({"\x1b[2J": entry(0, 8)}, bytes(8)), "name")
bad_header("tensor-name-half-a-character", safetensors_bytes({"\ud800": entry(0, 8)}, bytes(8)), "name")
bad_header("tensor-name-endless", safetensors_bytes({"w" * 100_000: entry(0, 8)}, bytes(8)), "name")
bad_header("tensors-overlap", safetensors_bytes({"w": entry(0, 8), "v": entry(4, 12)}, bytes(12)), "overlaps")
bad_header("tensors-share-all-bytes", safetensors_bytes({"w": entry(0, 8), "v": entry(0, 8)}, bytes(8)), "overlaps")
bad_header("hole-between-tensors", safetensors_bytes({"w": entry(0, 8), "v": entry(12, 20)}, bytes(20)), "hole")
bad_header("bytes-after-the-last-tensor", safetensors_bytes({"w": entry(0, 8)}, bytes(9)), "follow")
bad_entry("offsets-reversed", {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "offsets")
bad_entry("offsets-negative", {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "offsets")
bad_entry("offsets-beyond-64-bits", {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**70]}, "offsets")
bad_entry("offsets-fractional", {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}, "offsets")
bad_entry("offsets-missing", {"dtype": "F32", "shape": [2]}, "entry")
bad_entry("data-truncated", entry(0, 8000), "ends at byte", data=7000)
bad_entry("dtype-unknown", entry(0, 8, [2], "F33"), "type")
bad_entry("dtype-not-text", {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "type")
bad_entry("shape-overflows", entry(0, 8, [2**40, 2**40]), "takes 8 bytes")
bad_entry("shape-overflows-to-the-right-size", entry(0, 8, [2**62, 4, 2]), "takes 8 bytes")
bad_entry("shape-negative", entry(0, 8, [-2, -1]), "shape")
bad_entry("shape-of-truths", entry(0, 8, [True, 2]), "shape")
bad_entry("shape-of-many-axes", entry(0, 4, [1] * 1000), "shape", data=4)
bad_entry("extent-contradicts-shape", entry(0, 8, [3]), "takes 8 bytes")


def bad_value(name: str, values: list[float], dtype: str, form: str) -> None:
    data = np.array(values, dtype=form).tobytes()
    content = safetensors_bytes({"w": entry(0, len(data), [len(values)], dtype)}, data)
    CASES[name] = lambda folder: Case(single(folder, content), NonFiniteError, "w[1] is", read="w")


bad_value("value-nan", [1.0, np.nan, 2.0], "F32", "<f4")
bad_value("value-infinite", [1.0, -np.inf, 2.0], "F32", "<f4")
bad_value("value-nan-half", [1.0, np.nan], "F16", "<f2")
bad_value("value-nan-bfloat16", [0, 0x7FC0], "BF16", "<u2")
bad_value("value-nan-float8", [0, 0x7F], "F8_E4M3", "u1")


@case
def header_larger_than_allowed(folder: Path) -> Case:
    reference = single(folder, safetensors_bytes({}, length=200_000_000))
    os.truncate(folder / "model.safetensors", 1 << 30)  # a hole: it takes no room
    return Case(reference, MalformedCheckpointError, "claims 200,000,000")


# -- GGUF


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def info(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry; ``shape`` in the file's own order, fastest axis first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(
    infos: tuple[bytes, ...] = (), pairs: tuple[bytes, ...] = (), data: int = 0, counts: tuple[int, int] | None = None
) -> bytes:
    tensors, keys = counts or (len(infos), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return header + bytes(-len(header) % 32) + bytes(data)


def bad_gguf(name: str, content: bytes, says: str) -> None:
    def make(folder: Path) -> Case:
        (folder / "model.gguf").write_bytes(content)
        return Case(str(folder / "model.gguf"), MalformedCheckpointError, says)

    CASES["gguf-" + name] = make


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def _nested(depth: int) -> bytes:
    return array(9, 1, _nested(depth - 1)) if depth else array(4, 0)


bad_gguf("empty", b"", "magic")
bad_gguf("bad-magic", b"GGML" + gguf_bytes()[4:], "does not begin")
bad_gguf("version-99", b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99")
bad_gguf("version-1", b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1")
bad_gguf("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian")
bad_gguf("tensor-count-2-60", gguf_bytes(counts=(2**60, 0)), "tensors")
bad_gguf("tensor-count-beyond-the-file", gguf_bytes(counts=(1000, 0)), "1,000 tensors")
bad_gguf("key-count-2-60", gguf_bytes(counts=(0, 2**60)), "metadata keys")
bad_gguf("key-count-beyond-the-file", gguf_bytes(counts=(0, 1000)), "name ''")  # zeros of the padding read as a key
bad_gguf("string-length-2-60", gguf_bytes(pairs=(struct.pack("<Q", 2**60),)), "1,152,921,504,606,846,976 bytes")
bad_gguf("string-not-utf8", gguf_bytes(pairs=(pair("a", 8, text(b"\xff")),)), "UTF-8")
bad_gguf("key-twice", gguf_bytes(pairs=(pair("a", 4, bytes(4)),) * 2), "twice")
bad_gguf("value-type-unknown", gguf_bytes(pairs=(pair("a", 13, b""),)), "type 13")
bad_gguf("array-type-unknown", gguf_bytes(pairs=(pair("a", 9, array(77, 1)),)), "type 77")
bad_gguf("array-count-2-60", gguf_bytes(pairs=(pair("a", 9, array(4, 2**60)),)), "items")
bad_gguf("array-beyond-the-file", gguf_bytes(pairs=(pair("a", 9, array(4, 1_000_000)),)), "4,000,000 bytes")
bad_gguf("string-array-beyond-the-file", gguf_bytes(pairs=(pair("a", 9, array(8, 1_000_000, bytes(80))),)), "bytes")
bad_gguf("array-nested", gguf_bytes(pairs=(pair("a", 9, _nested(500)),)), "nests")
bad_gguf(
    "array-bomb", gguf_bytes(pairs=(pair("a", 9, array(9, 3000, array(9, 3000, array(9, 2**40)) * 3000)),)), "items"
)
bad_gguf("alignment-3", gguf_bytes(pairs=(pair("general.alignment", 4, struct.pack("<I", 3)),)), "alignment")
bad_gguf("alignment-0", gguf_bytes(pairs=(pair("general.alignment", 4, bytes(4)),)), "alignment")
bad_gguf("alignment-2-30", gguf_bytes(pairs=(pair("general.alignment", 4, struct.pack("<I", 2**30)),)), "alignment")
bad_gguf("alignment-is-text", gguf_bytes(pairs=(pair("general.alignment", 8, text("32")),)), "alignment")
bad_gguf("name-twice", gguf_bytes((info("w"), info("w", offset=32)), data=64), "twice")
bad_gguf("name-steers-the-terminal", gguf_bytes((info("\x1b[2J"),), data=32), "name")
bad_gguf("tensors-overlap", gguf_bytes((info("w", (16,)), info("v", offset=32)), data=64), "overlaps")
bad_gguf("data-past-the-end", gguf_bytes((info("w", (64,)),), data=32), "ends at byte")
bad_gguf("offset-past-the-end", gguf_bytes((info("w", offset=2**40),), data=32), "ends at byte")
bad_gguf("offset-beyond-64-bits-when-added", gguf_bytes((info("w", offset=2**64 - 32),), data=32), "ends at byte")
bad_gguf("offset-not-aligned", gguf_bytes((info("w", offset=4),), data=64), "begins at 4")
bad_gguf("shape-overflows", gguf_bytes((info("w", (2**40, 2**40)),), data=32), "ends at byte")
bad_gguf("shape-of-five-axes", gguf_bytes((info("w", (1,) * 5),), data=32), "5 dimensions")
bad_gguf("shape-of-2-31-axes", gguf_bytes((text("w") + struct.pack("<I", 2**31),), data=32), "2,147,483,648 dimensions")
bad_gguf("shape-with-zero", gguf_bytes((info("w", (0, 4)),), data=32), "shape")
bad_gguf("type-unknown", gguf_bytes((info("w", kind=4242),), data=32), "type 4242")
bad_gguf("rows-not-of-whole-blocks", gguf_bytes((info("w", (33,), kind=8),), data=64), "shape")
bad_gguf(
    # what gguf's own reader (0.19) loops on: an array of 2**62 numbers, 49 bytes in all
    "49-bytes",
    b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 9) + array(4, 2**62),
    "items",
)


bad_gguf(
    "arrays-too-large-together",
    gguf_bytes(pairs=tuple(pair(f"a{i}", 9, array(0, 1_000_000, bytes(1_000_000))) for i in range(5))),
    "items",
)


@case
def gguf_value_infinite(folder: Path) -> Case:
    block = np.array([np.inf], dtype="<f2").tobytes() + bytes([1] * 32)  # Q8_0 with an infinite scale
    content = gguf_bytes((info("w", (32, 2), kind=8),), data=0) + bytes(34) + block
    (folder / "model.gguf").write_bytes(content)
    return Case(str(folder / "model.gguf"), NonFiniteError, "w[1, 0] is inf", read="w")


@case
def file_is_a_device(folder: Path) -> Case:
    return Case("/dev/zero", UnsafeCheckpointError, "regular")
