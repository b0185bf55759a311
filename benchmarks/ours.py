"""One process of ours: Composition on a checkpoint folder, timed inside. Run by composition.py."""

from __future__ import annotations

import json
import sys
import time

began = time.perf_counter()
import torch  # noqa: E402

import virtual_weights as vw  # noqa: E402
from virtual_weights.analysis.maps.circuits import reading_circuits, writing_circuits  # noqa: E402
from virtual_weights.linalg import all_pairs  # noqa: E402


def main(folder: str, port: str, save: str) -> None:
    imported = time.perf_counter()
    source = vw.open(folder).source
    weights = {name: source.read(name) for name in source.tensors}  # as the peer, which holds the whole model
    stream = vw.open(weights, config=source.config, fold=False)
    loaded = time.perf_counter()
    record = vw.Composition(port)(stream)
    done = time.perf_counter()
    torch.save(record["score"], save)
    readers, writers = reading_circuits(stream, port), writing_circuits(stream)
    kernels = []
    for _ in range(3):
        start = time.perf_counter()
        pairs = all_pairs(readers, writers, memory=256 * 2**20)
        kernels.append(time.perf_counter() - start)
    times = {"import": imported - began, "load": loaded - imported, "compute": done - loaded, "kernel": min(kernels)}
    print(json.dumps({**times, "form": pairs.form, "flops": pairs.flops}))


main(*sys.argv[1:])
