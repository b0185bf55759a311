"""What is observed of a run is what transformers' own modules compute."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operating import operate
from tiny_models import SHAPES, flow, norms_in_full_precision, tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.depth.frozen import replay
from virtual_weights.runtime import Run
from virtual_weights.runtime.flow.observation import Observation, operating_point
from virtual_weights.runtime.running.hooks import Place, places, watching
from virtual_weights.runtime.running.text import PADDING, chunks, padded, repeated_tokens, texts, tokenizer_of
from virtual_weights.stream import OperatingPoint, centred
from virtual_weights.stream.moments import Moments

TOKENS = torch.tensor([3, 17, 5, 5, 30, 1, 22])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SHAPES)
def test_replay_of_an_observed_point_is_the_models_own_final_residual(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    model = tiny(name, seed=1, dtype=dtype)
    stream = vw.open(model)
    final = centred(stream, operate(model, stream, TOKENS)[1])
    with norms_in_full_precision():
        point = operating_point(Run.on_prompt(stream, TOKENS, model=model))
    point.check(stream)

    def error(p: OperatingPoint) -> float:
        return float((replay(stream, p) - final).norm() / final.norm())

    assert error(point) < bound
    assert error(replace(point, patterns={group: p.mT for group, p in point.patterns.items()})) > 1e-2


@pytest.mark.parametrize("name", SHAPES)
def test_hooks_see_what_the_modules_receive_and_give(name: str) -> None:
    model = tiny(name, seed=1)
    stream, signals = vw.open(model), dict[Place, Tensor]()
    wanted = places(stream, "inner", "written", "Q", "K", "V")
    with watching(model, stream, wanted, lambda signal, where, x: signals.update({(signal, where): x[0]})):
        expected = flow(model, TOKENS)
    count = len(signals)
    assert count == 6 * stream.spec.n_layers + len(expected.embeds)
    for port in ("Q", "K", "V"):
        assert torch.equal(signals[port, "L1.attn"].flatten(1), expected.reads[port, 1])
        assert signals[port, "L1.attn"].shape[1:] == stream.read(port, "L1.attn").maps.shape[:2]
    assert torch.equal(signals["inner", "L1.attn"].flatten(1), expected.attention_inner[1])
    neurons = signals["inner", "L1.mlp"][:, 0]
    assert torch.equal(neurons, expected.mlp_inner[1])
    torch.testing.assert_close(signals["written", "L1.mlp"], neurons @ stream.write("L1.mlp")[0].T)
    for kind, x in expected.embeds.items():
        assert torch.equal(signals["written", kind], centred(stream, x))
    model(TOKENS[None])
    assert len(signals) == count  # hooks are gone
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attention_and_neurons_are_averages_over_tokens() -> None:
    model = tiny("llama-grouped-untied")
    stream = vw.open(model)
    rows = [TOKENS, TOKENS[2:5]]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    moments = Observation().moments(Run.on_tokens(stream, tokens, model=model))
    with torch.no_grad():
        patterns = [model(row[None], output_attentions=True).attentions[1][0] for row in rows]
    to_self = torch.cat([p.diagonal(dim1=1, dim2=2)[:, 1:] for p in patterns], 1).mean(1)
    previous = torch.cat([p.diagonal(-1, 1, 2) for p in patterns], 1).mean(1)
    first = torch.cat([p[:, 1:, 0] for p in patterns], 1).mean(1)
    torch.testing.assert_close(moments.attention["L1.attn"], torch.stack([to_self, previous, first], 1))
    inner = torch.cat([flow(model, row).mlp_inner[2] for row in rows])
    expected = torch.stack([inner.mean(0), inner.square().mean(0), (inner > 0).float().mean(0)])
    torch.testing.assert_close(moments.neurons["L2.mlp"], expected)
    states = torch.cat([model(row[None], output_hidden_states=True).hidden_states[0][0] for row in rows]).detach()
    s = (states.square().mean(1) + sizes(stream).norm_eps).sqrt()
    torch.testing.assert_close(moments.states["norm"][0], s.mean())
    torch.testing.assert_close(moments.states["inverse_square"][0], s.pow(-2).mean())
    torch.testing.assert_close(moments.states["variance"][0], states.var(1, correction=0).mean())
    z = (states - states.mean(1, keepdim=True)) / states.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(moments.states["kurtosis"][0], z.pow(4).mean())


def test_a_file_gives_the_same_moments(tmp_path: Path) -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    moments = Observation().moments(Run.on_prompt(stream, TOKENS, model=model))
    moments.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors", stream)
    assert again.identity == moments.identity
    assert again.identity != replace(moments, tokens=8).identity
    with pytest.raises(vw.VirtualWeightsError, match="another checkpoint"):
        Moments.load(tmp_path / "moments.safetensors", vw.open(tiny("gpt2", seed=9)))
    with pytest.raises(vw.VirtualWeightsError, match="gain"):
        moments.check(vw.open(model, fold=False))
    (tmp_path / "cut").write_bytes((tmp_path / "moments.safetensors").read_bytes()[:-8])
    with pytest.raises(vw.VirtualWeightsError, match="is not a file of moments"):
        Moments.load(tmp_path / "cut")
    with pytest.raises(vw.VirtualWeightsError, match=r"malformed: L1\.mlp"):
        replace(moments, mean={k: v for k, v in moments.mean.items() if k != "L1.mlp"})


def test_batches_hold_every_token_once_and_stop_at_the_limit() -> None:
    documents = [torch.arange(7), torch.arange(7, 9), torch.arange(9, 20)]
    batches = list(padded(chunks(documents, length=4), batch=2))
    assert [tuple(b.shape) for b in batches] == [(2, 4), (2, 4), (2, 4)]
    assert torch.cat([b[b != PADDING] for b in batches]).tolist() == list(range(20))
    assert batches[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, PADDING]]
    for limit in (1, 4, 9, 19, 20, 50):
        tokens = torch.cat([b[b != PADDING] for b in padded(chunks(documents, length=4, limit=limit), batch=2)])
        assert tokens.tolist() == list(range(min(limit, 20)))
    assert not list(padded(chunks([], 4), 4))


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
