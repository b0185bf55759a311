"""Composition without folding against TransformerLens 4.3, from its own scores stored beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import virtual_weights as vw

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_lens_composition.safetensors"


@pytest.mark.parametrize("port", ["Q", "K", "V"])
@pytest.mark.parametrize("name", ["gpt2", "llama-grouped-untied", "neox-parallel-partial-rotary"])
def test_scores_are_those_of_transformer_lens(name: str, port: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        prefix = f"{name}/weights/"
        names = file.keys()
        weights = {k.removeprefix(prefix): file.get_tensor(k) for k in names if k.startswith(prefix)}
        expected = file.get_tensor(f"{name}/scores/{port}").double()
        config = json.loads(file.metadata()["configs"])[name]
    score = vw.Composition(port)(vw.open(weights, config=config, fold=False))["score"]
    reach = ~torch.isnan(score)
    assert reach.sum() > 0
    assert torch.equal(expected != 0, reach)
    torch.testing.assert_close(score[reach], expected[reach], rtol=0, atol=1e-5)
    if port != "Q":
        folded = vw.Composition(port)(vw.open(weights, config=config))["score"]
        assert (folded[reach] - expected[reach]).abs().max() > 1e-3
