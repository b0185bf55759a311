"""A component whose map is exactly zero, as of a pruned head, ends no command; ratios to it are absent, not 0."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn

import virtual_weights as vw
from virtual_weights.analysis.channels.channel import summary
from virtual_weights.cli import run

ZEROS: dict[str, tuple[tuple[str, slice], ...]] = {
    "a head": (("layers.0.self_attn.o_proj.weight", slice(0, 4)),),
    "what follows the first attention": (
        ("layers.1.self_attn.o_proj.weight", slice(None)),
        ("layers.1.mlp.down_proj.weight", slice(None)),
        ("layers.2.self_attn.o_proj.weight", slice(None)),
    ),
    "every key": tuple((f"layers.{layer}.self_attn.k_proj.weight", slice(None)) for layer in range(3)),
    "every gain": tuple((f"layers.{layer}.input_layernorm.weight", slice(None)) for layer in range(3)),
    "the unembedding": (("lm_head.weight", slice(None)),),
    "the embedding": (("embed_tokens.weight", slice(None)),),
}


def with_zeros(name: str) -> Any:
    model: Any = tiny("llama-grouped-untied")
    with torch.no_grad():
        for ending, columns in ZEROS[name]:
            parameter = next(p for n, p in model.named_parameters() if n.endswith(ending))
            parameter[..., columns].zero_()
    return model


@pytest.mark.parametrize("name", ZEROS)
def test_a_map_is_drawn_and_every_figure_is_finite_or_absent(name: str, tmp_path: Path) -> None:
    model = with_zeros(name)
    assert isinstance(model, nn.Module)
    vw.map(vw.open(model), tmp_path / "atlas")
    records = [json.loads(path.read_text()) for path in (tmp_path / "atlas" / "records").glob("*/record.json")]
    assert len(records) > 10
    with pytest.raises(StopIteration):
        next(f for record in records for f in floats(record) if not math.isfinite(f))


def floats(value: Any) -> Any:
    if isinstance(value, float):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from floats(item)


def test_of_a_zero_channel_strength_is_0_and_ratios_are_absent() -> None:
    stream = vw.open(with_zeros("a head"))
    figures = summary(vw.Channel("L0H0", "L1H0.K")(stream))
    assert figures["strength"] == 0.0
    assert figures["score"] is None
    assert figures["z"] is None
    profile = vw.OffsetProfile("L0H0", "L1H0.K", range(3))(stream)
    assert profile.stamp["root_mean_square"]["score"] is None
    assert vw.MeanCircuit("L1H0", range(3))(vw.open(with_zeros("every key"))).stamp["kept"] is None


@pytest.mark.parametrize("end", [["L0H0", "L1H0.K"], ["L0H0", "L1H0.K", "--offsets", "0:3"], ["L0H0.ov"]])
def test_a_zero_channel_is_shown(end: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_zeros("a head").save_pretrained(tmp_path)
    for form in ([], ["--json"]):
        assert run(["channel", str(tmp_path), *end, *form, "--progress", "none"]) == 0
    assert not re.search(r"\bnan\b", capsys.readouterr().out.lower())


def test_a_state_that_is_zero_is_observed(tmp_path: Path) -> None:
    with_zeros("the embedding").save_pretrained(tmp_path)
    stream = vw.open(tmp_path)
    record = vw.Observation()(vw.Run.on_repeats(stream, tokens=64, length=16))
    assert torch.isfinite(record.numbers("kurtosis")).all()


def test_an_unknown_configuration_key_is_ignored_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-full").save_pretrained(tmp_path)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text()) | {"some_tool_note": 1, "other_note": [2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["composition", str(tmp_path), "--port", "K", "--json"]
    assert run(command) == 3
    assert "--ignore-config" in capsys.readouterr().err
    assert run([*command, "--ignore-config", "some_tool_note"]) == 3
    assert run([*command, "--ignore-config", "some_tool_note", "--ignore-config", "other_note"]) == 0
    assert run([*command, "--ignore-config", "hidden_size"]) == 3
    assert "hidden_size" in capsys.readouterr().err
