"""Research models of TransformerLens's kind: they open by its names and settings, and run without transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from research_models import MLPS, SHAPES, logits, research
from safetensors.torch import save_file
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import ArchitectureError, CheckpointError, UsageError, VirtualWeightsError
from virtual_weights.runtime.running import load
from virtual_weights.stream.lens_shapes import in_lens_shapes

TOKENS = torch.tensor([3, 17, 5, 5, 30, 1, 22, 9])


def opened(name: str, dtype: torch.dtype = torch.float64) -> vw.Stream:
    tensors, config = research(name, dtype=dtype)
    return vw.open(tensors, config=config).to(dtype)


def saved(folder: Path, name: str) -> Path:
    tensors, config = research(name)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_what_runs_is_what_transformer_lens_defines(name: str) -> None:
    tensors, config = research(name, dtype=torch.float64)
    module = load(opened(name), dtype=torch.float64)  # which checks every map, pattern and nonlinearity
    torch.testing.assert_close(module(TOKENS[None]).logits[0], logits(tensors, config, TOKENS), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_in_its_own_shapes_a_model_is_what_was_opened(name: str) -> None:
    tensors, _ = research(name)
    stream = opened(name, torch.float32)
    shown = in_lens_shapes(vw.Stream(stream.source, stream.model, folded=False))
    for key, tensor in shown.items():
        stored = key if key in tensors else key.replace("attn.", "attn._")
        assert torch.equal(tensor, tensors[stored])
    assert {key.replace("._", ".") for key in tensors if ".W_" in key or "._W" in key} <= {*shown, "pos_embed.W_pos"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type"),
        ({"attention_dir": "bidirectional"}, "attention_dir"),
        ({**MLPS, "act_fn": "solu_ln"}, "act_fn"),
        ({"num_experts": 4}, "num_experts"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"normalization_type": "LN", "final_rms": True}, "final_rms"),
        ({"n_heads": -1}, "n_heads"),
        ({"strange": 1}, "strange"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_carried_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    tensors, config = research("attention-only")
    with pytest.raises(ArchitectureError, match=named):
        vw.open(tensors, config=config | settings)


def test_a_bias_behind_the_product_with_a_gate_is_refused() -> None:
    tensors, config = research("gated-grouped")
    tensors["blocks.1.mlp.b_in"][3] = 0.1
    with pytest.raises(ArchitectureError, match=r"not zero: blocks\.1\.mlp\.b_in"):
        vw.open(tensors, config=config)


def test_a_tensor_of_no_role_is_refused() -> None:
    tensors, config = research("attention-only")
    with pytest.raises(ArchitectureError, match=r"blocks\.0\.mlp\.W_in"):
        vw.open(tensors | {"blocks.0.mlp.W_in": torch.ones(24, 20)}, config=config)


def test_a_folder_opens_by_the_keys_of_its_settings(tmp_path: Path) -> None:
    stream = vw.open(str(saved(tmp_path, "shortformer")))
    assert stream.model.family == "hooked_transformer"
    assert (len(stream.heads), stream.groups.mlps, "pos" in stream.groups) == (8, (), False)


def test_a_live_model_opens_as_it_is_now() -> None:
    """A HookedTransformer has its settings beside its weights; what runs is made of them."""
    tensors, config = research("shortformer", dtype=torch.float64)
    kind = type("HookedTransformer", (nn.Module,), {"__module__": "transformer_lens.HookedTransformer"})
    hooked: Any = kind()
    hooked.cfg = SimpleNamespace(to_dict=lambda: config | {"dtype": torch.float64, "device": torch.device("cpu")})
    hooked.state_dict = lambda: tensors
    stream = vw.open(hooked)
    expected = logits(tensors, config, TOKENS)
    torch.testing.assert_close(load(stream, dtype=torch.float64)(TOKENS[None]).logits[0], expected)
    with pytest.raises(CheckpointError, match="leave model= out"):
        load(stream, hooked)


def test_it_runs_where_transformers_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("virtual_weights.cli.verb.find_spec", lambda name: None if name == "transformers" else True)
    assert run(["check", str(saved(tmp_path, "unscaled"))]) == 0
    assert run(["labels", str(tmp_path), "--tokens", "32", "--length", "16"]) == 0
    assert "exact: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shortformer", "unscaled", "rotary-pairs", "answers-of-their-own"])
def test_a_turned_copy_is_the_same_function(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = saved(tmp_path / "plain", name)
    assert run(["rotate", str(plain), "-o", str(tmp_path / "turned"), "--save-dtype", "float64"]) == 0
    before, after = (load(vw.open(str(folder)), dtype=torch.float64) for folder in (plain, tmp_path / "turned"))
    torch.testing.assert_close(after(TOKENS[None]).logits, before(TOKENS[None]).logits, rtol=1e-9, atol=1e-9)


def test_positions_behind_a_norm_cannot_be_turned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rotate", str(saved(tmp_path, "shortformer-behind-norms")), "-o", str(tmp_path / "turned")]) == 3
    assert "positions are added behind a norm" in capsys.readouterr().err


def asks(stream: vw.Stream) -> list[tuple[str, Any]]:
    """Questions about what these models lack, and what is missing."""
    heads, mlps = "no attention head", "holds no MLP"
    return [
        *((mlps, question) for question in (vw.Neurons(), vw.Coherence(), vw.NeuronReaders("in"))),
        *((mlps, question) for question in (vw.Composition("up"), vw.NeuronHead("K"), vw.Recovery())),
        *((heads, question) for question in (vw.Subspaces("O", "K"), vw.HeadErasers()) if not stream.heads),
    ]


@pytest.mark.parametrize("name", ["attention-only", "no-layers"])
def test_what_is_absent_is_named(name: str) -> None:
    stream = opened(name)
    for missing, question in asks(stream):
        with pytest.raises(UsageError, match=missing):
            question(stream)


def test_a_model_without_layers_has_a_map(tmp_path: Path) -> None:
    record = vw.map(opened("no-layers"), tmp_path / "atlas").find("composition", port="unembed")
    assert record is not None
    assert set(record.axis("writer").labels) == {"embed", "pos"}


@pytest.mark.parametrize("name", ["no-layers", "one-layer-no-positions", "shortformer"])
def test_averages_over_a_text_are_those_of_the_parts_that_are_there(name: str) -> None:
    stream = opened(name)
    moments = vw.Observation().moments(vw.Run.on_tokens(stream, TOKENS[None], dtype=torch.float64))
    assert set(moments.second) == {group.id for group in stream.groups.writers if not group.constant}
    assert set(moments.attention) == {group.id for group in stream.groups.heads}


@pytest.mark.parametrize("name", ["attention-only", "no-layers", "one-layer-no-positions", "shortformer"])
def test_every_statement_gives_a_verdict_or_says_what_is_missing(name: str) -> None:
    stream = opened(name)
    record = vw.Statements()(vw.Run.on_tokens(stream, TOKENS.repeat(4, 1), dtype=torch.float64))
    why = dict(zip(record.axes[0].labels, record["why"], strict=True))
    for statement in ("L9", "L10", "L11", "T5", "T7", "C6"):
        assert "no MLP" in str(why[statement])
    assert all(why.values())


def test_without_norms_any_basis_will_do() -> None:
    """L1 holds without condition: no norm sees lengths."""
    run = vw.Run.on_tokens(opened("attention-only"), TOKENS[None], dtype=torch.float64)
    record = vw.Statements(("L1",))(run)
    assert record["verdict"] == ("holds",)
    assert "any invertible map" in str(record["why"][0])


def test_tokens_without_a_logit_have_no_loss_and_others_are_measured() -> None:
    tokens = TOKENS.repeat(4, 1)
    tokens[:, -1] = 2
    run = vw.Run.on_tokens(opened("answers-of-their-own"), tokens, dtype=torch.float64)
    with pytest.raises(UsageError, match="30 among those to predict, and 5 logits"):
        vw.Ablation([("L0H1", "L1H2.K")], 2)(run)
    record = vw.Ablation([("L0H1", "L1H2.K")], 2, metric=vw.LogitDifference(2, 3))(run)
    assert bool(record.numbers("effect_nats").isfinite().all())
    assert bool(record.numbers("loss_changed").isnan().all())


def lens_model(settings: dict[str, Any]) -> Any:
    lens = pytest.importorskip("transformer_lens")
    if not hasattr(lens, "HookedTransformer"):
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**settings, device="cpu", seed=0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            zero = settings.get("gated_mlp") and name.endswith("mlp.b_in")
            parameter.copy_((1 if name.endswith(".w") else 0) + (0 if zero else noise))
    return model


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "one-layer-no-positions"])
def test_transformer_lens_computes_the_same(name: str) -> None:
    _, config = research(name)
    model = lens_model(config)
    expected: Tensor = model(TOKENS[None])
    for stream in (vw.open(model), vw.open(model.state_dict(), config=model.cfg.to_dict())):
        torch.testing.assert_close(load(stream)(TOKENS[None]).logits, expected, rtol=1e-4, atol=1e-5)


def test_every_error_is_one_of_ours() -> None:
    """A size that contradicts the tensors, or a setting that is missing, is refused by type."""
    tensors, config = research("attention-only")
    for key in config:
        try:
            vw.open(
                tensors, config={k: v for k, v in config.items() if k != key} | {"model_type": "hooked_transformer"}
            )
        except VirtualWeightsError:
            continue
