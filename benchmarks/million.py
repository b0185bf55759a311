"""A dictionary of a million random directions beside the heads of a model: its strongest edges in bounded memory.

    python benchmarks/million.py --folder SCRATCH [--features 1000000] [--executor local:2] [--model smollm2-135m]

Writes a transcoder of random directions in bfloat16 (circuit-tracer's form), asks which of its features every head is
most strongly connected with, both ways, and prints one JSON object; deletes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import virtual_weights as vw
from virtual_weights.checkpoint.writing import write_safetensors

_ROWS = 1 << 15


def write(folder: Path, features: int, d: int, layer: int) -> None:
    """The files of one layer, written some rows at a time."""
    folder.mkdir(parents=True)

    def rows(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        whole = torch.empty(features, d, dtype=torch.bfloat16)
        for start in range(0, features, _ROWS):
            part = whole[start : start + _ROWS]
            part.copy_(torch.randn(part.shape, generator=generator))
        return whole

    shapes = {
        "W_enc": (torch.bfloat16, (features, d)),
        "W_dec": (torch.bfloat16, (features, d)),
        "b_enc": (torch.float32, (features,)),
        "b_dec": (torch.float32, (d,)),
    }
    tensors = (rows(1), rows(2), torch.zeros(features), torch.zeros(d))
    write_safetensors(folder / f"layer_{layer}.safetensors", shapes, tensors, {})
    settings = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in"}
    settings |= {"feature_output_hook": "mlp.hook_out", "activation": "relu"}
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))


def peak_mb() -> dict[str, float]:
    """Of this process, and the largest of its workers."""
    return {
        name: resource.getrusage(who).ru_maxrss / 1024
        for name, who in (("here", resource.RUSAGE_SELF), ("workers_and_writing", resource.RUSAGE_CHILDREN))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--executor", default="local:2")
    parser.add_argument("--memory-mb", type=int, default=512)
    given = parser.parse_args()
    folder = given.folder / "million"
    sizes = (folder, given.features, vw.open(given.model).d_model, given.layer)
    writing = get_context("spawn").Process(target=write, args=sizes)  # what it holds is not what is measured
    writing.start()
    writing.join()
    answer: dict[str, Any] = {"features": given.features, "executor": given.executor, "before": peak_mb()}
    try:
        stream = vw.open(given.model, attach=[folder])
        survey = vw.Survey(stream, executor=given.executor)
        for port, units in (("enc", "all"), ("V", "features")):
            began = time.perf_counter()
            record = survey.ask(vw.HeadUnits(port, 10, units=units, memory_mb=given.memory_mb))
            seconds = time.perf_counter() - began
            best = next(record.top(1, "score").rows())
            answer[port] = {"seconds": seconds, "pairs": record.stamp["pairs"], "best": best, "peak_mb": peak_mb()}
    finally:
        shutil.rmtree(folder)
    print(json.dumps(answer, default=float, indent=2))


if __name__ == "__main__":
    main()
