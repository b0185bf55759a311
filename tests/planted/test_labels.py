"""Labels from planted attention patterns, and from a run of a tiny model against its own patterns."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.runtime import Run
from virtual_weights.runtime.flow.labels import BEHAVIOURS, Labels
from virtual_weights.runtime.running.text import repeated_tokens

LENGTH = 6


def test_planted_patterns_get_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six heads: one for every behaviour, and one that looks everywhere alike."""
    n = 2 * LENGTH
    patterns = torch.zeros(1, 6, n, n)
    for t in range(n):
        goals = [max(t - 1, 0), t - LENGTH + 1 if t >= LENGTH else 0, t - LENGTH if t >= LENGTH else t, t, 0]
        for head, goal in enumerate(goals):
            patterns[0, head, t, goal] = 1
        patterns[0, 5, t, : t + 1] = 1 / (t + 1)

    @contextmanager
    def planted(model: Any, stream: Any, places: Any, see: Any) -> Any:
        see("pattern", "L0.attn", patterns)
        yield

    model = tiny("llama-full")
    monkeypatch.setattr(f"{Labels.__module__}.watching", planted)
    monkeypatch.setattr(f"{Labels.__module__}.forward", lambda model, tokens: None)
    record = Labels()(Run.on_tokens(vw.open(model), repeated_tokens(37, LENGTH, 1), LENGTH, model=model))
    assert record["label"][:6] == (*BEHAVIOURS, None)
    assert record["previous_token"][0] == 1
    assert float(record["induction"][1]) == 1
    assert float(record["duplicate_token"][1]) == 0, "induction looks one past the first occurrence"


def test_scores_are_means_of_the_models_own_patterns() -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    tokens = repeated_tokens(37, LENGTH, 3, 5)
    record = Labels()(Run.on_tokens(stream, tokens, LENGTH, model=model))
    with pytest.raises(vw.VirtualWeightsError, match="repeats the first"):
        Labels()(Run.on_tokens(stream, tokens.flip(1)[:, 1:], LENGTH, model=model))
    with torch.no_grad():
        patterns = torch.stack(model(tokens, output_attentions=True).attentions, 1).double()  # (B, layers, heads, T, T)
    later, second = range(1, 2 * LENGTH), range(LENGTH, 2 * LENGTH)
    expected = torch.stack([patterns[..., t, t - LENGTH + 1] for t in second]).mean((0, 1)).flatten()
    torch.testing.assert_close(record["induction"], expected, rtol=1e-5, atol=1e-6)
    expected = torch.stack([patterns[..., t, t - 1] for t in later]).mean((0, 1)).flatten()
    torch.testing.assert_close(record["previous_token"], expected, rtol=1e-5, atol=1e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-full").save_pretrained(tmp_path / "m")
    assert run(["labels", str(tmp_path / "m"), "--length", "10", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["rows"]) == answer["summary"]["heads"] == 18
    assert run(["labels", str(tmp_path / "m"), "--length", "10"]) == 0
    assert "induction" in capsys.readouterr().out
    assert run(["labels", str(tmp_path / "m"), "--threshold", "2"]) == 2
