"""The first notebook: its code runs on any model, and its stored outputs are fit to be shown.

After a change of its code: ``jupyter nbconvert --execute --inplace docs/notebooks/first.ipynb``, then ``make fmt``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PATH = Path(__file__).parents[2] / "docs" / "notebooks" / "first.ipynb"
MODEL = '"smollm2-135m"'
SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, vocab_size=97)


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_code_of_the_notebook_runs_on_a_random_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    code = "\n".join("".join(cell["source"]) for cell in code_cells())
    assert code.count(MODEL) == 1
    exec(compile(code.replace(MODEL, '"model"'), str(PATH), "exec"), {"__name__": "notebook"})
    out, err = capsys.readouterr()
    assert re.search(r"the circuit: L\dH\d L\dH\d", out)
    assert re.search(r"^without L\dH\d -> L\dH\d\.K: [+-]\d\.\d\d", out, re.MULTILINE)
    assert err == ""


def test_the_stored_outputs_are_those_of_one_execution() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name") for output in outputs} == {"stdout"}  # no warning, no error
    text = "".join("".join(output["text"]) for output in outputs)
    assert 500 < len(text) < 5_000
    assert not re.search(r"/(home|root|tmp|work|usr|Users)\b", text)
    assert "the circuit: L16H0 L18H6\n" in text
