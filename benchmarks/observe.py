"""Observation beside the model's plain forward pass, and memory against the number of tokens.

    python benchmarks/observe.py time smollm2-135m 4096       # both in turn, three times
    python benchmarks/observe.py memory smollm2-135m 100000   # peak memory after every tenth of the text

Chunks of 256 tokens, 4 at once, float32. The plain pass is transformers' own, logits included, with eager attention as
observation needs it, and with the attention that transformers would choose (sdpa).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import virtual_weights as vw


def default_text(stream: vw.Stream, tokens: int) -> vw.Run:
    """The default text."""
    return vw.Run.on_text(stream, None, tokens, 256, batch=4)


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def compare(name: str, tokens: int) -> None:
    """Both in turn; ratios are of neighbours in time."""
    run = default_text(vw.open(name), tokens)
    model: Any = run.module
    batches = list(run.batches())

    def plain(attention: str) -> Callable[[], None]:
        def forward() -> None:
            model.set_attn_implementation(attention)
            for batch in batches:
                model(batch.clamp(min=0), use_cache=False)
            model.set_attn_implementation("eager")

        return forward

    def observed() -> None:
        vw.Observation().moments(run)

    model(batches[0].clamp(min=0))
    for _ in range(3):
        eager, observing, sdpa = (seconds(work) for work in (plain("eager"), observed, plain("sdpa")))
        times = f"plain {eager:.2f} s, observed {observing:.2f} s, plain with sdpa {sdpa:.2f} s"
        print(f"{times}: {observing / eager:.2f} times, {observing / sdpa:.2f} times", flush=True)


def memory(name: str, tokens: int) -> None:
    """Peak resident memory as tokens go by."""
    run, next_line = default_text(vw.open(name), tokens), [0]

    def report(done: float, total: float) -> None:
        if done >= next_line[0]:
            next_line[0] += tokens // 10
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{done:>7} of {total} tokens: peak {peak} MB", flush=True)

    duration = seconds(lambda: vw.Observation().moments(run, report))
    print(f"{run.count} tokens in {duration:.0f} s")


if __name__ == "__main__":
    {"time": compare, "memory": memory}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
