"""Write transformer_lens_composition.safetensors: tiny models' weights and the scores that TransformerLens gives them.

Run once with an interpreter that has transformer-lens 4.3 (tests on the path for tiny_models):

    PYTHONPATH=tests python tests/golden/make_transformer_lens_composition.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import transformer_lens
from safetensors.torch import save_file
from tiny_models import tiny
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

NAMES = ("gpt2", "llama-grouped-untied", "neox-parallel-partial-rotary")

tensors, configs = {}, {}
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(37)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", pad_token="w0")
for name in NAMES:
    model = tiny(name, seed=7)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for key, value in model.state_dict().items():
            if key != "lm_head.weight" or not model.config.tie_word_embeddings:
                tensors[f"{name}/weights/{key}"] = value.clone().contiguous()
        configs[name] = json.loads((Path(folder) / "config.json").read_text())
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=None, device="cpu")
    for port in "QKV":
        scores = bridge.all_composition_scores(port).scores  # (writer layer, head, reader layer, head)
        heads = scores.shape[0] * scores.shape[1]
        tensors[f"{name}/scores/{port}"] = scores.detach().reshape(heads, heads).T.contiguous()
metadata = {"configs": json.dumps(configs), "transformer_lens": transformer_lens.__dict__.get("__version__", "4.3.0")}
save_file(tensors, Path(__file__).with_name("transformer_lens_composition.safetensors"), metadata)
