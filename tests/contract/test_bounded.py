"""A header costs no more memory than a small multiple of its own bytes, whether it is sound or refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from virtual_weights.checkpoint import folder, open_source, safetensors_source
from virtual_weights.checkpoint.folder import parse_json_object
from virtual_weights.errors import CheckpointError, MalformedCheckpointError

SIZE = 1_500_000
MULTIPLE, LEAST = 12, 2 << 20  # of the header's bytes; what few bytes may cost


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def safetensors(at: Path, header: bytes) -> Path:
    (at / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return at / "m.safetensors"


def gguf(at: Path, pairs: list[bytes], tensors: list[bytes]) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    (at / "m.gguf").write_bytes(head + b"".join(pairs) + b"".join(tensors) + bytes(1 << 10))
    return at / "m.gguf"


def pair(number: int, kind: int, value: bytes) -> bytes:
    return text(b"a%d" % number) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def filled(make: Callable[[int], bytes]) -> list[bytes]:
    """As many parts as fill the size, all of the length of the first."""
    return [make(i) for i in range(SIZE // len(make(0)))]


def index(at: Path) -> Path:
    weight_map = {f"{i:x}": "a.safetensors" for i in range(SIZE // 26)}
    (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return at / "model.safetensors.index.json"


ENTRY = b'"%07x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HEADERS: dict[str, Callable[[Path], Path]] = {
    "tensors": lambda f: safetensors(f, b"{" + b",".join(filled(lambda i: ENTRY % i)) + b"}"),
    "metadata": lambda f: safetensors(f, b'{"__metadata__":{' + b",".join(filled(lambda i: b'"%07x":""' % i)) + b"}}"),
    "a shape of millions": lambda f: safetensors(f, b'{"a":{"shape":[' + b"1," * (SIZE // 2) + b"1]}}"),
    "millions of objects": lambda f: safetensors(f, b'{"a":[' + b"{}," * (SIZE // 3) + b"{}]}"),
    "millions of keys": lambda f: safetensors(f, b"{" + b",".join(filled(lambda i: b'"%07x":{}' % i)) + b"}"),
    "arrays of numbers": lambda f: gguf(f, filled(lambda i: pair(i, 9, array(2, 1000, b"\x01\x02" * 1000))), []),
    "arrays of texts": lambda f: gguf(f, filled(lambda i: pair(i, 9, array(8, 1000, text(b"xyz") * 1000))), []),
    "arrays of arrays": lambda f: gguf(f, [pair(0, 9, array(9, SIZE // 12, array(0, 0, b"") * (SIZE // 12)))], []),
    "one long text": lambda f: gguf(f, [pair(0, 8, text("é".encode() * (SIZE // 2)))], []),
    "a large vocabulary": lambda f: gguf(f, [pair(0, 9, array(8, SIZE // 10, text(b"ab") * (SIZE // 10)))], []),
    "tensors of GGUF": lambda f: gguf(
        f, [], [text(b"%07x" % i) + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(SIZE // 39)]
    ),
    "an index": index,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_costs_a_small_multiple_of_its_bytes(name: str, tmp_path: Path) -> None:
    path = HEADERS[name](tmp_path)
    assert path.stat().st_size > SIZE / 2
    open_source({"w": torch.ones(1)}, config={})  # so that nothing is imported while memory is measured
    tracemalloc.start()
    try:
        with suppress(CheckpointError):
            open_source(path, config={"model_type": "none"})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LEAST + MULTIPLE * path.stat().st_size


def test_counts_are_refused_before_they_are_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = HEADERS["tensors"](tmp_path)
    monkeypatch.setattr(safetensors_source, "MAX_TENSORS", 1000)
    with pytest.raises(MalformedCheckpointError, match="more than 1,000 tensors"):
        open_source(path, config={})
    monkeypatch.setattr("json.loads", None)
    for values in (b"1," * 200 + b"1", b"[" * 200, b'{"a":' * 200):
        with pytest.raises(MalformedCheckpointError, match="more than 100 items"):
            parse_json_object(b'{"a":[' + values + b"]}", "a file", 100)
    monkeypatch.setattr(folder, "MAX_INDEX_ITEMS", 1000)
    with pytest.raises(MalformedCheckpointError, match="more than 1,000 items"):
        open_source(index(tmp_path), config={})
