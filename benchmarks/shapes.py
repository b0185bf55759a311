"""Checkpoints of the shapes of known models with random bfloat16 weights, in shards, and what questions cost on them.

    python benchmarks/shapes.py 1b --folder SCRATCH --parts composition,bandwidth --memory 2GB
    python benchmarks/shapes.py 8b --folder SCRATCH --parts composition --ports Q,K,V --memory 4GB

Writes the checkpoint, runs ``vweights map`` part by part (with ``--ports``, ``vweights composition --writers all`` port
by port) as whole processes, prints a JSON line with time and peak memory for each, and deletes what it wrote unless
``--keep``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from composition import COMMAND, process
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of Llama's kind."""

    layers: int
    d: int
    heads: int
    kv_heads: int
    d_head: int
    d_mlp: int
    vocab: int
    tied: bool = True


SHAPES = {
    "10m": Shape(6, 256, 8, 4, 32, 1024, 8192),
    "100m": Shape(12, 768, 12, 12, 64, 3072, 32000),
    "300m": Shape(24, 1024, 16, 8, 64, 4096, 32000),
    "1b": Shape(16, 2048, 32, 8, 64, 8192, 32000),
    "3b": Shape(28, 3072, 24, 8, 128, 8192, 32000),
    "8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, tied=False),
}


def config(shape: Shape) -> dict[str, object]:
    """The configuration that goes with the weights."""
    return {
        "model_type": "llama",
        "hidden_size": shape.d,
        "intermediate_size": shape.d_mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.d_head,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
    }


def rows(shape: Shape) -> dict[str, tuple[int, int]]:
    """The matrices of one layer."""
    queries, keys = shape.heads * shape.d_head, shape.kv_heads * shape.d_head
    return {
        "self_attn.q_proj": (queries, shape.d),
        "self_attn.k_proj": (keys, shape.d),
        "self_attn.v_proj": (keys, shape.d),
        "self_attn.o_proj": (shape.d, queries),
        "mlp.gate_proj": (shape.d_mlp, shape.d),
        "mlp.up_proj": (shape.d_mlp, shape.d),
        "mlp.down_proj": (shape.d, shape.d_mlp),
    }


def write(folder: Path, shape: Shape) -> int:
    """Write the checkpoint, a shard a layer; bytes of its tensors."""
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    size = 0

    def matrix(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).mul_(0.02).to(torch.bfloat16)

    def save(tensors: dict[str, torch.Tensor], name: str) -> int:
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(t.numel() * t.element_size() for t in tensors.values())

    ones = torch.ones(shape.d, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        stem = f"model.layers.{layer}."
        tensors = {f"{stem}{name}.weight": matrix(*sizes) for name, sizes in rows(shape).items()}
        tensors |= {f"{stem}{n}.weight": ones.clone() for n in ("input_layernorm", "post_attention_layernorm")}
        size += save(tensors, f"layer-{layer:03d}.safetensors")
    ends = {"model.embed_tokens.weight": matrix(shape.vocab, shape.d), "model.norm.weight": ones.clone()}
    if not shape.tied:
        ends["lm_head.weight"] = matrix(shape.vocab, shape.d)
    size += save(ends, "ends.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config(shape)))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if none")
    parser.add_argument("--parts", default="composition")
    parser.add_argument("--ports", help="compositions of these ports alone, with all writers")
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--limit", type=float, default=3000, help="seconds for each process")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint, and use one that is there")
    parser.add_argument("arguments", nargs="*", help="more arguments of the command, after --")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    parent = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    folder = parent / f"shape-{options.shape}"
    if not (folder / "config.json").exists():
        began = time.perf_counter()
        folder.mkdir(parents=True)
        size = write(folder, shape)
        seconds = time.perf_counter() - began
        print(json.dumps({"bytes": size, "written_in_s": seconds}), file=sys.stderr, flush=True)
    shared = ["--memory", options.memory, *options.arguments, "--json", "--progress", "none"]
    try:
        for port in options.ports.split(",") if options.ports else ():
            question = ["composition", str(folder), "--port", port, "--writers", "all", "--top", "3"]
            print(
                json.dumps({"port": port, **_figures(process([*COMMAND, *question, *shared], options.limit))}),
                flush=True,
            )
        for part in () if options.ports else options.parts.split(","):
            atlas = folder.parent / f"{folder.name}-{part}"
            command = [*COMMAND, "map", str(folder), "-o", str(atlas), "--only", part, *shared]
            print(json.dumps({"part": part, **_figures(process(command, options.limit))}), flush=True)
            shutil.rmtree(atlas, ignore_errors=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def _figures(row: dict[str, object]) -> dict[str, object]:
    return {name: row[name] for name in ("process", "peak_mb", "code", "complaint") if name in row}


if __name__ == "__main__":
    main()
