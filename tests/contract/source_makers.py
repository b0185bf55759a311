"""The same tensors as every kind of source."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from virtual_weights.checkpoint import Source, open_source

Maker = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], Source]


def example() -> dict[str, Tensor]:
    """Types and ranks that every format holds; the large one has more bytes than its fingerprint samples."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(5, 64, generator=generator),
        "b.weight": torch.randn(3, 4, 32, generator=generator).half(),
        "c.bias": torch.randn(7, generator=generator),
        "d.weight": torch.randn(6, 32, generator=generator).bfloat16(),
        "large": torch.randn(400, 256, generator=generator),
    }


def as_safetensors_file(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Source:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "some.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_source(folder / "some.safetensors")


def as_shards(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Source:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return open_source(str(folder))


def as_gguf(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Source:
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in config.items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bfloat16:
            raw = tensor.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    write(writer)
    return open_source(folder / "model.gguf")


def as_state_dict(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Source:
    return open_source(dict(tensors), config=config)


MAKERS: dict[str, Maker] = {
    "safetensors": as_safetensors_file,
    "shards": as_shards,
    "gguf": as_gguf,
    "state-dict": as_state_dict,
}


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Quantised rows of arbitrary bytes whose half-precision scales are finite."""
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (rows, blocks, nbytes), dtype=np.uint8)
    for begin in SCALES[kind.name]:
        raw[..., begin : begin + 2] = generator.uniform(-1, 1, (rows, blocks, 1)).astype("<f2").view(np.uint8)
    return raw.reshape(rows, blocks * nbytes)


# where in a block its half-precision scales lie
SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
