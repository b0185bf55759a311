"""One process of ours: Composition on a checkpoint folder, timed inside. Run by composition.py."""

from __future__ import annotations

import json
import sys
import time

began = time.perf_counter()
import torch  # noqa: E402

import virtual_weights as vw  # noqa: E402
from virtual_weights.linalg.gram_blocks import gram_products, triangle  # noqa: E402


def main(folder: str, port: str, save: str) -> None:
    imported = time.perf_counter()
    source = vw.open(folder).source
    weights = {name: source.read(name) for name in source.tensors}  # as the peer, which holds the whole model
    stream = vw.open(weights, config=source.config, fold=False)
    loaded = time.perf_counter()
    record = vw.Composition(port)(stream)
    done = time.perf_counter()
    torch.save(record["score"], save)
    question = vw.Composition(port)
    sides = question.readers(stream).pieces, question.written(stream).pieces
    reach = [[bool(w.position.min() <= r.position.max()) for w in sides[1]] for r in sides[0]]
    blocks = [[piece.load(question.dtype, "cpu") for piece in side] for side in sides]
    kernels = []
    for _ in range(5):
        start = time.perf_counter()
        gram_products(*blocks, reach)
        kernels.append(time.perf_counter() - start)
    pairs = sum(r.count * w.count * reach[i][j] for i, r in enumerate(sides[0]) for j, w in enumerate(sides[1]))
    flops = 2.0 * triangle(stream.d_model) * (pairs + sum(piece.rows for side in sides for piece in side))
    times = {"import": imported - began, "load": loaded - imported, "compute": done - loaded, "kernel": min(kernels)}
    print(json.dumps({**times, "flops": flops}))


main(*sys.argv[1:])
