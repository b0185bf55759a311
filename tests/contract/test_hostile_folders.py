"""No code of a model's folder is read, no network asked and no question put, whatever its files name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import transformers
from contract import hostile_folders
from contract.hostile_folders import FOLDERS, MARK, REFUSED
from tiny_models import LLAMA
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 2},
    "gpt2": dict(n_embd=24, n_layer=2, n_head=4, n_positions=32),
    "gpt_neox": dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    ),
}


def sound(folder: Path, family: str) -> Path:
    config = transformers.AutoConfig.for_model(
        family, **{**FAMILIES[family], "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def test_no_code_is_opened_no_network_asked_no_question_put_and_the_result_is_right(tmp_path: Path) -> None:
    """One test, since the folders run in one process of their own."""
    models_ = [sound(tmp_path / f"sound-{family}", family) for family in FAMILIES]
    folders = hostile_folders.make(tmp_path / "folders", models_)
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"sound": [str(p) for p in models_], "folders": [str(p) for p in folders]}))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, hostile_folders.__file__, str(given)],
        capture_output=True,
        check=False,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "home")},
        input="y\n" * 100,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["events"] == []
    assert [str(mark) for mark in tmp_path.rglob(MARK)] == []
    results = answer["results"]
    assert results.keys() == FOLDERS.keys()
    assert {name: result for name, result in results.items() if (result == "right") != (name not in REFUSED)} == {}
    assert {name: results[name] for name in REFUSED if "Error: " not in results[name]} == {}


def test_there_are_fifty_and_most_are_run() -> None:
    assert len(FOLDERS) >= 50
    assert len(REFUSED) < len(FOLDERS) / 3
    assert set(FOLDERS) >= REFUSED
