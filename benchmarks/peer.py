"""One process of the peer: TransformerLens's all_composition_scores on a checkpoint folder. Run by composition.py."""

from __future__ import annotations

import json
import sys
import time

began = time.perf_counter()
import torch  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main(folder: str, port: str, save: str) -> None:
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=None, device="cpu")
    loaded = time.perf_counter()
    with torch.no_grad():
        scores = bridge.all_composition_scores(port).scores
    done = time.perf_counter()
    heads = scores.shape[0] * scores.shape[1]
    torch.save(scores.reshape(heads, heads).T.contiguous(), save)  # readers by writers, as ours
    print(json.dumps({"import": imported - began, "load": loaded - imported, "compute": done - loaded}))


main(*sys.argv[1:])
