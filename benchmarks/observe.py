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
from virtual_weights.runtime import load, observe
from virtual_weights.runtime.running.text import batches, texts, token_ids, tokenizer_of


def chunks(stream: vw.Stream, tokens: int) -> list[torch.Tensor]:
    """The default text."""
    return list(batches(token_ids(texts(), tokenizer_of(stream)), 256, 4, tokens))


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def compare(name: str, tokens: int) -> None:
    """Both in turn; ratios are of neighbours in time."""
    stream = vw.open(name)
    model: Any = load(stream)
    text = chunks(stream, tokens)

    def plain(attention: str) -> Callable[[], None]:
        def run() -> None:
            model.set_attn_implementation(attention)
            for batch in text:
                model(batch.clamp(min=0), use_cache=False)
            model.set_attn_implementation("eager")

        return run

    model(text[0])
    for _ in range(3):
        eager, own, sdpa = (seconds(w) for w in (plain("eager"), lambda: observe(stream, text, model), plain("sdpa")))
        told = f"plain {eager:.2f} s, observed {own:.2f} s, plain with sdpa {sdpa:.2f} s"
        print(f"{told}: {own / eager:.2f} times, {own / sdpa:.2f} times", flush=True)


def memory(name: str, tokens: int) -> None:
    """Peak resident memory as tokens go by."""
    stream = vw.open(name)
    model, text, told = load(stream), chunks(stream, tokens), [0]

    def tick(done: int) -> None:
        if done >= told[0]:
            told[0] += tokens // 10
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(f"{done:>7} tokens: peak {peak} MB", flush=True)

    took = seconds(lambda: observe(stream, text, model, progress=tick))
    print(f"{sum(int((b >= 0).sum()) for b in text)} tokens in {took:.0f} s")


if __name__ == "__main__":
    {"time": compare, "memory": memory}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
