"""A rotated checkpoint is the same model to transformers; left-in gains and maps that are no rotation are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import SHAPES, norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.checkpoint.writing import write_checkpoint
from virtual_weights.cli import run
from virtual_weights.stream.turned import Turned, config_of, random_turn

TOKENS = torch.tensor([[3, 14, 1, 5, 9, 2, 6, 5, 35, 8]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), norms_in_full_precision():
        return model(TOKENS).logits


def rotated(model: nn.Module, folder: Path, dtype: torch.dtype, *, fold: bool = True, skew: float = 0.0) -> nn.Module:
    """Turn a model, write it, and let transformers load it; ``skew`` makes the turn no rotation."""
    stream = vw.open(model)
    turn = random_turn(stream, 7)
    stretch = torch.logspace(-skew, skew, len(turn), dtype=torch.float64)
    turned = Turned(stream, turn * stretch, fold)
    write_checkpoint(folder, turned.files, dtype, config_of(turned, dtype), {})
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return loaded.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_a_rotated_model_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = tiny(name, dtype=dtype)
        own = logits(model)
        turned = logits(rotated(model, tmp_path / str(dtype), dtype))
        assert float((own - turned).norm() / own.norm()) < bound
    stored = load_file(tmp_path / "torch.float64" / "model.safetensors")
    ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
    embed = next(value for key, value in stored.items() if key.endswith(ends))
    assert float((embed - model.get_input_embeddings().weight.detach()).abs().max()) > 0.1, "nothing was turned"


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_without_folding_or_without_a_rotation_it_is_another_model(name: str, tmp_path: Path) -> None:
    model = tiny(name, dtype=torch.float64)
    own = logits(model)
    for label, options in {"gains": {"fold": False}, "skew": {"skew": 0.3}}.items():
        other = logits(rotated(model, tmp_path / label, torch.float64, **options))
        assert float((own - other).norm() / own.norm()) > 1e-2, label


def test_layer_norm_needs_its_mean_direction_kept(tmp_path: Path) -> None:
    stream = vw.open(tiny("gpt2", dtype=torch.float64))
    turn = random_turn(stream, 3)
    ones = torch.ones(stream.d_model, dtype=torch.float64)
    torch.testing.assert_close(turn @ ones, ones)
    torch.testing.assert_close(turn @ turn.T, torch.eye(stream.d_model, dtype=torch.float64))
    assert float((turn - torch.eye(stream.d_model)).norm()) > 1


def test_the_command_keeps_shards_tokenizer_and_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama-multi-query-tied")
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, max_shard_size="20KB")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    shards = len(list(source.glob("*.safetensors")))
    assert shards > 2
    assert run(["rotate", str(source), str(out), "--seed", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == shards == len(list(out.glob("*.safetensors")))
    assert told["copied"] == ["generation_config.json", "tokenizer.json"]
    assert any("unembedding" in change for change in told["changed"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    own = logits(model)
    assert float((logits(loaded) - own).norm() / own.norm()) < 1e-4
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert {k: v for k, v in after.items() if k not in ("tie_word_embeddings", "dtype")} == {
        k: v for k, v in before.items() if k not in ("tie_word_embeddings", "dtype")
    }
    scores = [vw.Composition("K")(vw.open(folder))["score"] for folder in (source, out)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert run(["rotate", str(source), str(out)]) == 2
    assert "there already" in capsys.readouterr().err
    assert run(["rotate", str(source), str(tmp_path / "no" / "where")]) == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")] == []


def test_what_cannot_be_held_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=torch.float64)
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight[3] = 0
    stream = vw.open(model)
    turned = Turned(stream, random_turn(stream, 0))
    with pytest.raises(vw.VirtualWeightsError, match=r"h\.1\.ln_2\.weight is 0 at 1 places"):
        write_checkpoint(tmp_path / "out", turned.files, torch.float64, config_of(turned, torch.float64), {})
    assert list(tmp_path.iterdir()) == []
