"""A rotated checkpoint is the same model to transformers; left-in gains and maps that are no rotation are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import SHAPES, gguf_sizes, gguf_tensors, norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.checkpoint import MappingSource
from virtual_weights.checkpoint.writing import write_checkpoint
from virtual_weights.cli import run
from virtual_weights.errors import ArchitectureError
from virtual_weights.stream.turned import Turned, config_of, random_turn

TOKENS = torch.tensor([[3, 14, 1, 5, 9, 2, 6, 5, 35, 8]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad(), norms_in_full_precision():
        return model(TOKENS).logits


def rotated(
    model: nn.Module | vw.Stream, folder: Path, dtype: torch.dtype, *, fold: bool = True, skew: float = 0.0
) -> nn.Module:
    """Turn a model, write it, and let transformers load it; ``skew`` makes the turn no rotation."""
    stream = model if isinstance(model, vw.Stream) else vw.open(model)
    turn = random_turn(stream, 7)
    stretch = torch.logspace(-skew, skew, len(turn), dtype=torch.float64)
    turned = Turned(stream, turn * stretch, fold)
    write_checkpoint(folder, turned.files, dtype, config_of(turned, dtype), {})
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return loaded.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_a_rotated_model_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = tiny(name, dtype=dtype)
        expected = logits(model)
        turned = logits(rotated(model, tmp_path / str(dtype), dtype))
        assert float((expected - turned).norm() / expected.norm()) < bound
    stored = load_file(tmp_path / "torch.float64" / "model.safetensors")
    ends = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
    embed = next(value for key, value in stored.items() if key.endswith(ends))
    assert float((embed - model.get_input_embeddings().weight.detach()).abs().max()) > 0.1, "nothing was turned"


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_without_folding_or_without_a_rotation_it_is_another_model(name: str, tmp_path: Path) -> None:
    model = tiny(name, dtype=torch.float64)
    expected = logits(model)
    for label, options in {"gains": {"fold": False}, "skew": {"skew": 0.3}}.items():
        other = logits(rotated(model, tmp_path / label, torch.float64, **options))
        assert float((expected - other).norm() / expected.norm()) > 1e-2, label


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
    assert run(["rotate", str(source), "-o", str(out), "--seed", "4", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["files"] == shards == len(list(out.glob("*.safetensors")))
    assert summary["copied"] == ["generation_config.json", "tokenizer.json"]
    assert any("unembedding" in change for change in summary["changed"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    expected = logits(model)
    assert float((logits(loaded) - expected).norm() / expected.norm()) < 1e-4
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert {k: v for k, v in after.items() if k not in ("tie_word_embeddings", "dtype")} == {
        k: v for k, v in before.items() if k not in ("tie_word_embeddings", "dtype")
    }
    scores = [vw.Composition("K")(vw.open(folder))["score"] for folder in (source, out)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert run(["rotate", str(source), "-o", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert run(["rotate", str(source), "-o", str(tmp_path / "no" / "where")]) == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gain", [0.0, 1e-7])
@pytest.mark.parametrize("name", ["gpt2", "neox-sequential-no-attention-bias"])
def test_a_shift_is_carried_where_the_gain_is_nothing(
    name: str, gain: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A division by the gain would refuse the one and lose the digits of the other."""
    model = tiny(name, dtype=dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("ln_1.weight", "ln_f.weight", "input_layernorm.weight", "final_layer_norm.weight")):
                parameter[3] = gain
    expected, turned = logits(model), logits(rotated(model, tmp_path / "out", dtype))
    assert float((expected - turned).norm() / expected.norm()) < (1e-10 if dtype is torch.float64 else 1e-5)


def gguf(name: str, without: tuple[str, ...] = (), **keys: object) -> tuple[nn.Module, MappingSource]:
    """A tiny Llama, and the same under GGUF's names, with its queries' and keys' rows in GGUF's order."""
    model = tiny(name, dtype=torch.float64)
    config = model.config
    named = gguf_tensors(config, model.state_dict())
    tensors = {key: weight for key, weight in named.items() if not key.endswith(without)}
    sizes = {
        **gguf_sizes(config),
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "context_length": 4096,
        **keys,
    }
    metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in sizes.items()}}
    return model, MappingSource(tensors, metadata, "gguf")


@pytest.mark.parametrize("name", ["llama-grouped-untied", "llama-biases-wide-heads"])
def test_a_gguf_model_keeps_its_biases_and_its_context(name: str, tmp_path: Path) -> None:
    model, source = gguf(name)
    loaded = rotated(vw.open(source), tmp_path / "out", torch.float64)
    assert loaded.config.max_position_embeddings == 4096
    expected, turned = logits(model), logits(loaded)
    assert float((expected - turned).norm() / expected.norm()) < 1e-10


@pytest.mark.parametrize(
    ("without", "keys", "message"),
    [
        (("attn_output.bias",), {}, r"needs 3 more tensors: model\.layers\.0\.self_attn\.o_proj\.bias"),
        (("1.ffn_down.bias",), {}, r"needs 1 more tensors: model\.layers\.1\.mlp\.down_proj\.bias"),
        ((), {"rope.dimension_count": 2}, "turns 2 dimensions of a head, not all"),
    ],
)
def test_what_transformers_cannot_be_told_is_refused_by_name(
    without: tuple[str, ...], keys: dict[str, object], message: str, tmp_path: Path
) -> None:
    _, source = gguf("llama-biases-wide-heads", without, **keys)
    with pytest.raises(ArchitectureError, match=message):
        rotated(vw.open(source), tmp_path / "out", torch.float64)
    assert list(tmp_path.iterdir()) == []


def test_rotary_factors_of_their_own_are_refused_by_name(tmp_path: Path) -> None:
    _, source = gguf("llama-grouped-untied")
    tensors = {name: source.read(name) for name in source.tensors} | {"rope_freqs.weight": torch.ones(2)}
    with pytest.raises(ArchitectureError, match=r"rope_freqs\.weight"):
        rotated(vw.open(MappingSource(tensors, source.config, "gguf")), tmp_path / "out", torch.float64)


@pytest.mark.parametrize(
    ("stored", "options", "written"),
    [
        (torch.float64, (), "float64"),
        (torch.bfloat16, (), "float32"),
        (torch.float64, ("--save-dtype", "bfloat16"), "bfloat16"),
    ],
)
def test_precision_is_kept_unless_another_is_asked_for(
    stored: torch.dtype, options: tuple[str, ...], written: str, tmp_path: Path
) -> None:
    tiny("llama-full", dtype=stored).save_pretrained(tmp_path / "source")
    assert run(["rotate", str(tmp_path / "source"), "-o", str(tmp_path / "out"), *options, "--json"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == written
    assert {str(x.dtype) for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {f"torch.{written}"}
