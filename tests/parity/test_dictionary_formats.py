"""Every dictionary file is read as its format computes: the same pre-activations, activations and outputs."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dictionary_files as files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from virtual_weights.checkpoint.dictionaries import Dictionary, open_dictionary, open_factors
from virtual_weights.checkpoint.dictionaries.flat_yaml import parse_flat_yaml
from virtual_weights.checkpoint.source import Source
from virtual_weights.errors import CheckpointError, MissingTensorError, UnsafeCheckpointError, VirtualWeightsError

WIDTH, FEATURES, LAYERS = 6, 10, 3
UNFOLDED = ("bytedance clt", "saelens matching_pursuit", "llamascopium lorsa")
DENSE = ("components", "lora", "vectors", "control", "saelens matching_pursuit", "llamascopium lorsa")
"""How the names of those begin whose activations need not be 0 anywhere."""


def write(name: str, folder: Path) -> files.Written:
    return files.FORMATS[name](folder / "dictionary", WIDTH, FEATURES, LAYERS, 5)


def opened(name: str, written: files.Written) -> Dictionary:
    return open_factors(written.path) if name == "lora" else open_dictionary(written.path)


@pytest.mark.parametrize("name", files.FORMATS)
def test_a_dictionary_computes_what_its_format_says(name: str, tmp_path: Path) -> None:
    written = write(name, tmp_path)
    dictionary = opened(name, written)
    assert dictionary.kind == written.kind
    assert len(dictionary.parts) == len(written.parts)
    x = files.Draw(11)(9, WIDTH).double()
    for part, expected in zip(dictionary.parts, written.parts, strict=True):
        assert (part.layer, part.reads, part.tag) == (expected.layer, expected.reads, expected.tag)
        assert [decoder.writes for decoder in part.decoders] == expected.writes
        pre, activations, outputs = expected.function(x)
        ours = pre
        if part.encoder is not None:
            encoder = part.encoder(slice(0, part.features)).double()
            ours = x @ encoder.T + (0 if part.bias is None else part.bias.double())
            torch.testing.assert_close(part.encoder(slice(1, 4)).double(), encoder[1:4], rtol=0, atol=0)
        torch.testing.assert_close(ours, pre, rtol=0, atol=1e-9)
        active = part.activation(ours)
        torch.testing.assert_close(active, activations, rtol=0, atol=1e-9)
        for index, (decoder, output) in enumerate(zip(part.decoders, outputs, strict=True)):
            rows = decoder.rows(slice(0, part.features)).double()
            y = active @ rows + (0 if decoder.bias is None else decoder.bias.double())
            if index == 0 and part.skip is not None:
                y = y + x @ part.skip.double().T
            torch.testing.assert_close(y, output, rtol=0, atol=1e-9)
            torch.testing.assert_close(decoder.rows(slice(2, part.features)).double(), rows[2:], rtol=0, atol=0)
        assert (part.unfolded is not None) == (name in UNFOLDED)
        assert bool((activations == 0).any()) or name.startswith(DENSE)


LAZY = ("circuit-tracer relu", "gemma scope res", "gemma scope 2 clt", "sparsify transcoder", "clt-forge", "components")


def test_opening_reads_no_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = Source.read, list[str]()
    monkeypatch.setattr(Source, "read", lambda self, name, rows=None: names.append(name) or read(self, name, rows))
    for name in LAZY:
        open_dictionary(write(name, tmp_path / name.replace(" ", "-")).path)
    written = write("circuit-tracer clt", tmp_path)
    dictionary = open_dictionary(written.path)
    assert not [name for name in names if name.lower().startswith(("w_enc", "w_dec", "encoder.weight", "_components"))]
    names.clear()
    assert dictionary.parts[0].decoders[2].rows(slice(0, 2)).shape == (2, WIDTH)
    assert names == ["W_dec_0"]


def test_features_are_read_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["saelens standard", "sparsify sae", "llamascopium clt", "llama scope", "clt-forge ranks"]
    monkeypatch.setattr("virtual_weights.checkpoint.dictionaries.tables._VALUES_AT_ONCE", 25)
    for name in names:
        test_a_dictionary_computes_what_its_format_says(name, tmp_path / name.replace(" ", "-"))


def test_settings_count_in_the_fingerprint(tmp_path: Path) -> None:
    written = write("saelens jumprelu", tmp_path)
    before = open_dictionary(written.path).sources[0].fingerprint
    edit(written.path / "cfg.json", apply_b_dec_to_input=False)
    assert open_dictionary(written.path).sources[0].fingerprint != before


def test_one_layer_of_a_set_is_read_by_its_file(tmp_path: Path) -> None:
    written = write("circuit-tracer relu", tmp_path)
    dictionary = open_dictionary(written.path / "layer_1.safetensors")
    assert [part.layer for part in dictionary.parts] == [1]
    assert dictionary.parts[0].activation.kind == "relu"
    (written.path / "config.yaml").unlink()
    part = open_dictionary(written.path / "layer_1.safetensors").parts[0]
    assert part.reads is None
    assert part.decoders[0].writes == ""


def test_a_pursuit_without_an_offset_adds_none(tmp_path: Path) -> None:
    written = write("saelens matching_pursuit", tmp_path)
    edit(written.path / "cfg.json", apply_b_dec_to_input=False)
    part = open_dictionary(written.path).parts[0]
    assert part.bias is None
    assert part.decoders[0].bias is not None
    assert not part.decoders[0].bias.any()


def test_what_happens_at_every_token_is_said(tmp_path: Path) -> None:
    written = write("saelens standard", tmp_path)
    for kind, text in {"layer_norm": "standard deviation", "constant_norm_rescale": "sqrt(d)"}.items():
        edit(written.path / "cfg.json", normalize_activations=kind)
        assert text in str(open_dictionary(written.path).parts[0].unfolded)
    edit(written.path / "cfg.json", normalize_activations="expected_average_only_in")
    assert "does not say" in str(open_dictionary(written.path).parts[0].unfolded)


def edit(path: Path, **changes: Any) -> None:
    """Change settings; None removes one."""
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def change(path: Path, **changes: Any) -> None:
    """Change tensors; None removes one, what stands for a dot is two underscores."""
    tensors = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


NAN = torch.full((FEATURES,), float("nan"))
BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a missing tensor": ("saelens standard", lambda p: change(p / "sae_weights.safetensors", b_enc=None), "'b_enc'"),
    "a wrong shape": (
        "saelens standard",
        lambda p: change(p / "sae_weights.safetensors", W_enc=torch.zeros(WIDTH, 3)),
        "'W_enc' is F32 (6, 3)",
    ),
    "thresholds that are no numbers": (
        "saelens jumprelu",
        lambda p: change(p / "sae_weights.safetensors", threshold=NAN),
        "threshold[0] is nan",
    ),
    "settings that are missing": (
        "saelens standard",
        lambda p: (p / "cfg.json").unlink(),
        "is no dictionary that can be read (it holds sae_weights.safetensors)",
    ),
    "an unknown architecture": (
        "saelens standard",
        lambda p: edit(p / "cfg.json", architecture="temporal"),
        "'temporal'",
    ),
    "k of 0": ("saelens topk", lambda p: edit(p / "cfg.json", k=0), "k is 0"),
    "k beyond the features": ("saelens topk", lambda p: edit(p / "cfg.json", k=11), "k is 11"),
    "a whitened input": (
        "saelens standard",
        lambda p: edit(p / "cfg.json", normalize_activations="covariance_whitening"),
        "covariance_whitening",
    ),
    "an activation of old times": ("saelens standard", lambda p: edit(p / "cfg.json", activation_fn="tanh"), "'tanh'"),
    "a skip that is not told": (
        "saelens transcoder",
        lambda p: change(p / "sae_weights.safetensors", W_skip=torch.zeros(WIDTH, WIDTH)),
        "'W_skip'",
    ),
    "a group maximum": ("sparsify sae", lambda p: edit(p / "layers.0/cfg.json", activation="groupmax"), "'groupmax'"),
    "a skip that is missing": (
        "sparsify sae",
        lambda p: edit(p / "layers.0/cfg.json", skip_connection=True),
        "skip_connection is True",
    ),
    "two sizes of features": ("sparsify sae", lambda p: edit(p / "layers.0/cfg.json", num_latents=9), "(10, 6)"),
    "a gated encoder": (
        "llamascopium relu",
        lambda p: edit(p / "config.json", use_glu_encoder=True),
        "use_glu_encoder",
    ),
    "a crosscoder": ("llamascopium relu", lambda p: edit(p / "config.json", sae_type="crosscoder"), "'crosscoder'"),
    "a norm that is missing": (
        "llamascopium relu",
        lambda p: edit(p / "config.json", hook_point_in="blocks.0.hook_resid_pre"),
        "no tensor 'dataset_average_activation_norm.blocks.0.hook_resid_pre'",
    ),
    "a threshold that was never estimated": (
        "dictionary_learning BatchTopKSAE",
        lambda p: change(p / "ae.safetensors", threshold=torch.tensor(-1.0)),
        "threshold is -1.0",
    ),
    "an unknown class": (
        "dictionary_learning AutoEncoder",
        lambda p: edit(p / "config.json", trainer={"dict_class": "GatedAnneal"}),
        "'GatedAnneal'",
    ),
    "a crosscoder of layers": (
        "dictionary_learning AutoEncoder",
        lambda p: change(p / "ae.safetensors", encoder__weight=torch.zeros(2, WIDTH, FEATURES)),
        "crosscoder",
    ),
    "a layer that is missing": (
        "circuit-tracer clt",
        lambda p: (p / "W_enc_1.safetensors").unlink(),
        "layers [0, 2]",
    ),
    "decoders of fewer layers": (
        "circuit-tracer clt",
        lambda p: change(p / "W_dec_0.safetensors", W_dec_0=torch.zeros(FEATURES, 2, WIDTH)),
        "W_dec_0 has shape (10, 2, 6)",
    ),
    "decoders along columns": (
        "circuit-tracer relu",
        lambda p: change(p / "layer_0.safetensors", W_dec=torch.zeros(WIDTH, FEATURES)),
        "turned",
    ),
    "files elsewhere": (
        "circuit-tracer relu",
        lambda p: [file.unlink() for file in p.glob("layer_*")],
        "hf://org/repo/layer_0.safetensors",
    ),
    "an unknown activation": (
        "circuit-tracer relu",
        lambda p: (p / "config.yaml").write_text("model_kind: transcoder_set\nactivation: gelu\n"),
        "'gelu'",
    ),
    "settings that are not flat": (
        "circuit-tracer relu",
        lambda p: (p / "config.yaml").write_text("model_kind: transcoder_set\nscan:\n  a: 1\n"),
        "line 3 is 'a: 1'",
    ),
    "a rank that is missing": (
        "clt-forge ranks",
        lambda p: (p / "rank0_clt_weights.safetensors").unlink(),
        "ranks [1]",
    ),
    "too few features in all": ("clt-forge", lambda p: edit(p / "cfg.json", d_latent=12), "d_latent is 12"),
    "a transcoder of another kind": (
        "gemma scope 2 transcoder",
        lambda p: edit(p / "config.json", architecture="topk"),
        "'topk'",
    ),
    "an affine part that is missing": (
        "gemma scope 2 transcoder",
        lambda p: change(p / "params.safetensors", affine_skip_connection=None),
        "affine_connection is True",
    ),
    "half a component": (
        "components",
        lambda p: change(p, **{"_components__model-layers-0-mlp-up_proj__V": None}),
        "'model.layers.0.mlp.up_proj' has U alone",
    ),
    "a module of no known place": (
        "components",
        lambda p: change(p, _components__tower__V=torch.zeros(3, 2), _components__tower__U=torch.zeros(2, 3)),
        "decomposes tower",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_dictionary_is_refused_with_what_is_wrong(fault: str, tmp_path: Path) -> None:
    name, spoil, words = BROKEN[fault]
    written = write(name, tmp_path)
    opened(name, written)
    spoil(written.path)
    with pytest.raises(CheckpointError) as refused:
        opened(name, written)
    assert words in refused.value.what
    assert refused.value.expected
    assert refused.value.do


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    for name in ("ae.pt", "sae_weights.pt", "model.pth"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps({}))
        for path in (folder, folder / name):
            with pytest.raises(UnsafeCheckpointError, match="pickle") as refused:
                open_dictionary(path)
            assert "save_file" in refused.value.do
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(UnsafeCheckpointError, match="pickled objects"):
        open_dictionary(tmp_path / "params.npz")
    np.save(tmp_path / "vectors.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UnsafeCheckpointError, match="pickled objects"):
        open_dictionary(tmp_path / "vectors.npy")


@pytest.mark.parametrize(("name", "entry"), [("saelens standard", "cfg.json"), ("llama scope", "checkpoints")])
def test_files_and_folders_that_lead_elsewhere_are_refused(name: str, entry: str, tmp_path: Path) -> None:
    written = write(name, tmp_path)
    (written.path / entry).rename(tmp_path / "elsewhere")
    (written.path / entry).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeCheckpointError, match="is a link"):
        open_dictionary(written.path)


def test_weights_of_before_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    written = write("llamascopium relu", tmp_path)
    features = open_dictionary(written.path).parts[0].features
    (written.path / "checkpoints").mkdir()
    (written.path / "sae_weights.safetensors").rename(written.path / "checkpoints" / "final.safetensors")
    assert open_dictionary(written.path).parts[0].features == features


JUNK: tuple[Any, ...] = (None, True, -1, 0, 1.5, "x", [], ["x"], {"a": 1}, 1e308)


@pytest.mark.parametrize(
    "name", [n for n in files.FORMATS if n.startswith(("saelens", "llama", "sparsify", "clt-f", "dict"))]
)
def test_senseless_settings_raise_no_other_errors(name: str, tmp_path: Path) -> None:
    """Whatever a setting is, the dictionary opens or is refused in three parts."""
    written = write(name, tmp_path)
    folder = written.path / "layers.0" if name == "sparsify sae" else written.path
    folder = written.path / "layers.0.mlp" if name == "sparsify transcoder" else folder
    path = next(folder / n for n in ("cfg.json", "config.json", "hyperparams.json") if (folder / n).exists())
    settings = json.loads(path.read_text())
    for key, value in settings.items():
        inner = [{**value, name: junk} for name in value for junk in JUNK] if isinstance(value, dict) else []
        for junk in (*JUNK, *inner):
            path.write_text(json.dumps({**settings, key: junk}))
            try:
                opened(name, written)
            except VirtualWeightsError as refused:
                assert refused.expected  # noqa: PT017
                assert refused.do  # noqa: PT017


def test_an_unknown_format_lists_those_that_can_be_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "x.safetensors"):
        with pytest.raises(CheckpointError, match="SAELens") as refused:
            open_dictionary(path)
        assert "circuit-tracer" in refused.value.expected
    with pytest.raises(MissingTensorError, match="there is no dictionary"):
        open_dictionary(tmp_path / "nowhere")
    written = write("lora", tmp_path)
    with pytest.raises(CheckpointError, match="low-rank adapter"):
        open_dictionary(written.path)


def test_two_dictionaries_of_one_place_are_not_mixed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        files.saelens(tmp_path / name, WIDTH, FEATURES, LAYERS, 1)
    with pytest.raises(CheckpointError, match="several folders"):
        open_dictionary(tmp_path)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    written = write("gemma scope res", tmp_path)
    path = written.path / "params.npz"
    whole = path.read_bytes()
    for damaged in (whole[:-40], whole[:200], b"PK\x03\x04", whole.replace(b"'<f4'", b"'<c8'")):
        path.write_bytes(damaged)
        with pytest.raises(VirtualWeightsError):
            open_dictionary(written.path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'}")
    with pytest.raises(CheckpointError, match="descr, fortran_order and shape"):
        open_dictionary(written.path)


def test_flat_yaml_is_read_as_yaml_reads_it() -> None:
    yaml = pytest.importorskip("yaml")
    text = "---\n# c\na: 1\nb: 'x # y'  # z\nc: [1, two]\nd:\n- hf://o/r#3\n- 2.5e-3\ne:\nf: true\ng: \"q\"\nh: -4\n"
    assert parse_flat_yaml(text, "t") == yaml.safe_load(text)
    for refused in ("a: {b: 1}\n", "a: &x 1\n", "a: |\n  text\n", "a: 1\na: 2\n", "- a\n", "a: !!python/object 1\n"):
        with pytest.raises(CheckpointError):
            parse_flat_yaml(refused, "t")
