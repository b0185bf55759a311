"""What is observed of a run is what transformers' own modules compute."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from operating import operate
from tiny_models import SHAPES, flow, norms_in_full_precision, tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.analysis.depth.frozen import replay
from virtual_weights.runtime.flow.observation import observe, operating_point
from virtual_weights.runtime.running.hooks import watching
from virtual_weights.runtime.running.text import PADDING, batches, repeated_tokens, texts, tokenizer_of
from virtual_weights.stream.moments import Moments
from virtual_weights.stream.operating_point import OperatingPoint

TOKENS = torch.tensor([3, 17, 5, 5, 30, 1, 22])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SHAPES)
def test_replay_of_an_observed_point_is_the_models_own_final_residual(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    model = tiny(name, seed=1, dtype=dtype)
    stream = vw.open(model)
    _, own = operate(model, stream, TOKENS)
    with norms_in_full_precision():
        point = operating_point(stream, TOKENS, model)
    point.check(stream)

    def error(p: OperatingPoint) -> float:
        return float((replay(stream, p) - own).norm() / own.norm())

    assert error(point) < bound
    assert error(replace(point, patterns={i: p.mT for i, p in point.patterns.items()})) > 1e-2


@pytest.mark.parametrize("name", SHAPES)
def test_hooks_see_what_the_modules_receive_and_give(name: str) -> None:
    model = tiny(name, seed=1)
    stream, seen = vw.open(model), dict[tuple[str, int], Tensor]()
    kinds: Any = ("inner", "neurons", "mlp", "embed", "Q", "K", "V", *(["pos"] if stream.model.has("pos") else []))
    with watching(model, stream, kinds, lambda kind, layer, x: seen.update({(kind, layer): x[0]})):
        own = flow(model, TOKENS)
    count = len(seen)
    assert count == 6 * stream.spec.n_layers + len(own.embeds)
    for port in "QKV":
        assert torch.equal(seen[port, 1].flatten(1), own.reads[port, 1])
        assert seen[port, 1].shape[1:] == stream.read(port, 1).maps.shape[:2]  # type: ignore[arg-type]
    assert torch.equal(seen["inner", 1].flatten(1), own.attention_inner[1])
    assert torch.equal(seen["neurons", 1], own.mlp_inner[1])
    torch.testing.assert_close(seen["mlp", 1], seen["neurons", 1] @ stream.write("mlp", 1)[0].T)
    for kind, x in own.embeds.items():
        assert torch.equal(seen[kind, 0], x)
    model(TOKENS[None])
    assert len(seen) == count  # hooks are gone
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attention_and_neurons_are_averages_over_tokens() -> None:
    model = tiny("llama-grouped-untied")
    stream = vw.open(model)
    rows = [TOKENS, TOKENS[2:5]]
    moments = observe(stream, [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)], model)
    with torch.no_grad():
        patterns = [model(row[None], output_attentions=True).attentions[1][0] for row in rows]
    own = torch.cat([p.diagonal(dim1=1, dim2=2)[:, 1:] for p in patterns], 1).mean(1)
    previous = torch.cat([p.diagonal(-1, 1, 2) for p in patterns], 1).mean(1)
    first = torch.cat([p[:, 1:, 0] for p in patterns], 1).mean(1)
    torch.testing.assert_close(moments.attention["1"], torch.stack([own, previous, first], 1))
    inner = torch.cat([flow(model, row).mlp_inner[2] for row in rows])
    expected = torch.stack([inner.mean(0), inner.square().mean(0), (inner > 0).float().mean(0)])
    torch.testing.assert_close(moments.neurons["2"], expected)
    states = torch.cat([model(row[None], output_hidden_states=True).hidden_states[0][0] for row in rows]).detach()
    s = (states.square().mean(1) + stream.spec.norm_eps).sqrt()
    torch.testing.assert_close(moments.states["norm"][0], s.mean())
    torch.testing.assert_close(moments.states["inverse_square"][0], s.pow(-2).mean())
    torch.testing.assert_close(moments.states["variance"][0], states.var(1, correction=0).mean())
    z = (states - states.mean(1, keepdim=True)) / states.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(moments.states["kurtosis"][0], z.pow(4).mean())


def test_a_file_gives_the_same_moments(tmp_path: Path) -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    moments = observe(stream, [TOKENS[None]], model)
    moments.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors", stream)
    assert again.identity == moments.identity
    assert again.identity != replace(moments, tokens=8).identity
    with pytest.raises(vw.VirtualWeightsError, match="another checkpoint"):
        Moments.load(tmp_path / "moments.safetensors", vw.open(tiny("gpt2", seed=9)))
    with pytest.raises(vw.VirtualWeightsError, match="gain"):
        moments.check(vw.open(model, fold=False))
    (tmp_path / "cut").write_bytes((tmp_path / "moments.safetensors").read_bytes()[:-8])
    with pytest.raises(vw.VirtualWeightsError, match="holds no moments"):
        Moments.load(tmp_path / "cut")
    with pytest.raises(vw.VirtualWeightsError, match=r"malformed: L1\.mlp"):
        replace(moments, mean={k: v for k, v in moments.mean.items() if k != "L1.mlp"})


def test_batches_hold_every_token_once_and_stop_at_the_limit() -> None:
    documents = [torch.arange(7), torch.arange(7, 9), torch.arange(9, 20)]
    found = list(batches(documents, length=4, batch=2))
    assert [tuple(b.shape) for b in found] == [(2, 4), (2, 4), (2, 4)]
    assert torch.cat([b[b != PADDING] for b in found]).tolist() == list(range(20))
    assert found[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, PADDING]]
    for limit in (1, 4, 9, 19, 20, 50):
        held = torch.cat([b[b != PADDING] for b in batches(documents, length=4, batch=2, limit=limit)])
        assert held.tolist() == list(range(min(limit, 20)))
    assert not list(batches([], 4))


def test_repeated_tokens_repeat_and_obey_their_seed() -> None:
    tokens = repeated_tokens(1000, 50, 3, seed=4)
    assert tokens.shape == (3, 100)
    assert torch.equal(tokens[:, :50], tokens[:, 50:])
    assert torch.equal(tokens, repeated_tokens(1000, 50, 3, seed=4))
    assert not torch.equal(tokens, repeated_tokens(1000, 50, 3, seed=5))


def test_texts_come_from_files_folders_standard_input_or_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("two", "utf-8")
    (tmp_path / "deep" / "c.txt").write_text("three", "utf-8")
    (tmp_path / "a.txt").write_text("öne", "utf-8")
    assert list(texts(tmp_path)) == ["öne", "two", "three"]
    assert list(texts(str(tmp_path / "b.txt"))) == ["two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert list(texts("-")) == ["piped"]
    assert "with" in next(texts())
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(vw.VirtualWeightsError, match="no text"):
            list(texts(wrong))
    with pytest.raises(vw.VirtualWeightsError, match="in memory"):
        tokenizer_of(vw.open(tiny("gpt2")))
