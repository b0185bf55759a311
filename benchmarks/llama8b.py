"""K-composition of a sharded bf16 checkpoint of Llama-3-8B's shape with random weights, as a whole process.

    python benchmarks/llama8b.py --folder SCRATCH

Writes the attention tensors and norms, shard by shard (about 2.7 GB), runs ``vweights composition``, reports its time
and peak memory, and deletes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from composition import COMMAND, process
from safetensors.torch import save_file

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
ROWS = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
LAYERS_PER_SHARD = 8


def write(folder: Path, layers: int) -> int:
    """Write the checkpoint; bytes of its tensors."""
    generator = torch.Generator().manual_seed(0)
    weight_map, size = {}, 0
    for first in range(0, layers, LAYERS_PER_SHARD):
        tensors = {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, layers)):
            stem = f"model.layers.{layer}."
            tensors[stem + "input_layernorm.weight"] = torch.ones(4096, dtype=torch.bfloat16)
            for name, shape in ROWS.items():
                weight = torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16)
                tensors[f"{stem}self_attn.{name}.weight"] = weight
        shard = f"model-{first // LAYERS_PER_SHARD + 1:05d}.safetensors"
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint; a temporary folder if none")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--port", default="K")
    parser.add_argument("--limit", type=float, default=3000)
    parser.add_argument("arguments", nargs="*", help="more arguments of vweights composition, after --")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        began = time.perf_counter()
        size = write(folder, options.layers)
        print(json.dumps({"bytes": size, "written_in_s": time.perf_counter() - began}), file=sys.stderr, flush=True)
        command = [*COMMAND, "composition", str(folder), "--port", options.port, "--partial", "--top", "3", "--json"]
        figures = process([*command, *options.arguments], options.limit)
        print(json.dumps({"layers": options.layers, **figures}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
