"""Attached dictionaries read where they say: what all writers wrote, by their maps, is their own pre-activation."""

from __future__ import annotations

import pickle
from pathlib import Path

import dictionary_files as files
import numpy as np
import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.errors import ArchitectureError, UsageError
from virtual_weights.runtime.features.law import dictionary_fits
from virtual_weights.stream.effective import as_seen, centring

TOKENS = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(3))
MODELS = ("llama-biases-wide-heads", "gpt2", "gemma3", "neox-parallel-partial-rotary")
FEATURES, LAYERS = 7, 2
OUTSIDE = ("embed", "unembed")
"""Tags of parts at the ends of the model, which the tiny files have none of."""


def attached(model: nn.Module, *references: str, dtype: torch.dtype = torch.float64) -> tuple[vw.Stream, vw.Run]:
    stream = vw.open(model, attach=references).to(dtype)
    return stream, vw.Run.on_tokens(stream, TOKENS[:1], model=model)


def written(name: str, model: nn.Module, folder: Path) -> files.Written:
    return files.FORMATS[name](folder / "d", vw.open(model).d_model, FEATURES, LAYERS, 5)


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("name", [n for n in files.FORMATS if not n.startswith(("vectors", "control"))])
def test_pre_activations_are_what_was_written(name: str, shape: str, tmp_path: Path) -> None:
    """And one that reads elsewhere is far off: each other reading of the same state by a tenth at least."""
    model = tiny(shape, dtype=torch.float64)
    path = str(written(name, model, tmp_path).path)
    reference = f"{path}@factors" if name == "lora" else path
    particular = name in ("gemma scope 2 transcoder", "gemma scope 2 clt") and shape != "gemma3"
    if particular or (name, shape) == ("gemma scope embedding", "gpt2"):
        with pytest.raises(UsageError, match="not a place of this model"):  # of Gemma alone, or before positions
            attached(model, reference)
        return
    if name == "gemma scope att" and shape == "llama-biases-wide-heads":
        return  # its heads side by side are wider than the file's vectors
    stream, run = attached(model, reference)
    fits = dictionary_fits(run)
    assert len(fits) == len(stream.attached.parts) > 0
    reading = [f for f, part in zip(fits, stream.attached.parts, strict=True) if part.reading and not f.unfolded]
    for fit in reading:
        assert fit.error < 1e-5, fit
        assert all(other.distance > 0.1 for other in fit.elsewhere), fit
    raw = any(part.reading is not None and part.reading.norm is None for part in stream.attached.parts)
    assert centring(as_seen(stream, "enc")) == (stream.spec.centring and not raw)
    assert centring(stream) == stream.spec.centring


@pytest.mark.parametrize("shape", MODELS)
def test_a_decoder_is_what_a_part_adds(shape: str, tmp_path: Path) -> None:
    """Of one feature with one token's activation: its decoder column is the change of the state behind the part."""
    model = tiny(shape, dtype=torch.float64)
    d = vw.open(model).d_model
    np.save(tmp_path / "v.npy", np.eye(d)[:4] + 0.3)
    for place, module in (("L1.mlp.output", "down"), ("L1.attn.output", "o")):
        stream, run = attached(model, f"v={tmp_path / 'v.npy'}@L1.begin,{place}")
        plain = vw.open(model).to(torch.float64)
        group = plain.groups[place.rpartition(".")[0]]
        rows = torch.from_numpy(np.load(tmp_path / "v.npy"))
        maps = as_seen(stream, "enc").write("v")[0]
        assert maps.shape == (d, 4)
        assert stream.groups["v"].writes == group.writes
        gain = plain.weight("after", group.id)
        plus = 0.0 if group.after is None else group.after.plus
        expected = rows if gain is None else rows * (gain.double() + plus)
        expected = expected * (1.0 if group.branch is None else group.branch.factor)
        torch.testing.assert_close(maps.T, expected)
        assert module in ("down", "o")
        assert len(dictionary_fits(run)) == 1


def test_each_decoder_of_a_cross_layer_transcoder_counts_once(tmp_path: Path) -> None:
    model = tiny("llama-full", dtype=torch.float64)
    d = vw.open(model).d_model
    files.circuit_tracer_clt(tmp_path / "clt", d, FEATURES, 3, 5)
    stream = vw.open(model, attach=[tmp_path / "clt"]).to(torch.float64)
    dictionary = stream.attached.dictionaries[0]
    for i, source in enumerate(dictionary.parts):
        for j, target in enumerate(dictionary.parts):
            if i >= j:
                with pytest.raises(UsageError, match="cannot reach"):
                    vw.virtual_weight(stream, f"clt{i}:F1", f"clt{j}:F2.enc")
                continue
            assert target.encoder is not None
            some = slice(0, FEATURES)
            before = sum(decoder.rows(some).double() for decoder in source.decoders[: j - i])
            assert isinstance(before, Tensor)
            gain = stream.weight("norm", f"L{j}.mlp")
            assert gain is not None
            expected = target.encoder(some).double() * gain @ before.T
            found = vw.virtual_weight(stream, f"clt{i}:F", f"clt{j}:F.enc").dense()
            torch.testing.assert_close(found, expected)
            single = vw.virtual_weight(stream, f"clt{i}:F1", f"clt{j}:F2.enc").dense()
            torch.testing.assert_close(single[0, 0], expected[2, 1])
            edges = vw.NeuronNeuron("enc", 3 * FEATURES, writers="features")(stream)
            rows = {(r["writer"], r["reader"]): r["strength"] for r in edges.rows()}
            for f in range(FEATURES):
                for g in range(FEATURES):
                    assert rows[f"clt{i}:F{f}", f"clt{j}:F{g}.enc"] == pytest.approx(float(expected[g, f]), abs=1e-5)


def test_other_processes_attach_the_same(tmp_path: Path) -> None:
    tiny("llama-full").save_pretrained(tmp_path / "model")
    files.circuit_tracer_set(tmp_path / "tc", 24, FEATURES, 3, 5)
    stream = vw.open(tmp_path / "model", attach=[f"early={tmp_path / 'tc'}"])
    again = pickle.loads(pickle.dumps(stream))
    assert (
        again.provenance["fingerprint"]
        == stream.provenance["fingerprint"]
        != vw.open(tmp_path / "model").provenance["fingerprint"]
    )
    torch.testing.assert_close(again.read("enc", "early1").maps, stream.read("enc", "early1").maps)
    files.circuit_tracer_set(tmp_path / "tc", 24, FEATURES, 3, 6)  # other content under the same name
    assert (
        vw.open(tmp_path / "model", attach=[f"early={tmp_path / 'tc'}"]).provenance["fingerprint"]
        != stream.provenance["fingerprint"]
    )
    moved = vw.open(
        tmp_path / "model", attach=[f"early={tmp_path / 'tc' / 'layer_1.safetensors'}@L1.mlp.normed,L1.mlp.added"]
    )
    other = vw.open(
        tmp_path / "model", attach=[f"early={tmp_path / 'tc' / 'layer_1.safetensors'}@L1.mlp.state,L1.mlp.added"]
    )
    assert moved.provenance["fingerprint"] != other.provenance["fingerprint"]


def test_what_cannot_be_attached_says_why(tmp_path: Path) -> None:
    model = tiny("llama-full")
    np.save(tmp_path / "v.npy", np.ones((2, 24)))
    np.save(tmp_path / "wide.npy", np.ones((2, 25)))
    with pytest.raises(UsageError, match="does not say where it reads"):
        vw.open(model, attach=[tmp_path / "v.npy"])
    with pytest.raises(UsageError, match="not a place"):
        vw.open(model, attach=[f"{tmp_path / 'v.npy'}@L9.mlp.normed"])
    with pytest.raises(UsageError, match="two dictionaries are called vec"):
        vw.open(model, attach=[f"{tmp_path / 'v.npy'}@2", f"{tmp_path / 'v.npy'}@3"])
    with pytest.raises(UsageError, match="called embed, as a part of the model"):
        vw.open(model, attach=[f"embed={tmp_path / 'v.npy'}@2"])
    with pytest.raises(UsageError, match="names nothing to attach"):
        vw.open(model, attach=[f"{tmp_path / 'v.npy'}@"])
    wide = vw.open(model, attach=[f"{tmp_path / 'wide.npy'}@2"])
    with pytest.raises(ArchitectureError, match="25 coordinates"):
        wide.read("enc", "vec")
    both = vw.open(model, attach=[f"a={tmp_path / 'v.npy'}@2", f"b={tmp_path / 'v.npy'}@L1.mlp.normed"])
    assert [group.id for group in both.groups.attached] == ["a", "b"]
    assert both.groups["a"].reads == both.groups["a"].writes[0] == 2
    assert (both.groups["b"].writes, both.groups["b"].ports) == ((), ("enc",)), "what is read behind a norm is no sum"
    with pytest.raises(UsageError, match="nothing that is attached"):
        vw.Composition("enc")(vw.open(model))


@pytest.mark.real
def test_a_transcoder_of_the_real_model_reads_where_it_says(tmp_path: Path) -> None:
    """Trained for seconds, it explains more than the mean; read before the gain, far less than nothing."""
    stream = vw.open("smollm2-135m")
    run = vw.Run.on_text(stream, tokens=1024, length=128)
    vw.train_transcoders(run, tmp_path, (8,), features=128, k=16, steps=60)
    path = tmp_path / "layer_8.safetensors"
    references = [f"right={path}@L8.mlp.normed,L8.mlp.output", f"wrong={path}@L8.mlp.normalized,L8.mlp.output"]
    attached = vw.open("smollm2-135m", attach=references)
    prompt = vw.Run.on_text(attached, tokens=128, length=128, model=run.module)
    right, wrong = dictionary_fits(prompt)
    assert max(right.error, wrong.error) < 1e-5
    assert right.unexplained < 0.9
    assert wrong.unexplained > 1.0
    assert min(other.distance for other in right.elsewhere) > 0.1
