"""Layouts met in the wild: read as what they are, or refused with the name of what they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from contract.source_makers import write
from safetensors.torch import save_file, save_model
from tiny_models import tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.analysis.ledger.bandwidth import in_tokens
from virtual_weights.checkpoint import open_source, text_of
from virtual_weights.checkpoint.source import plain_names
from virtual_weights.errors import (
    ArchitectureError,
    CheckpointError,
    OfflineError,
    UnsafeCheckpointError,
    VirtualWeightsError,
)

COMMIT = "c" * 40


def saved(folder: Path, name: str = "llama-full", changes: Any = None) -> dict[str, Tensor]:
    """A tiny model as a folder; tensors in ``changes`` are added, replace its own or, where None, are left out."""
    model: Any = tiny(name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.clone() for key, value in model.state_dict().items()} | (changes or {})
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return kept


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def refused(reference: Any, error: type[VirtualWeightsError], *words: str, **options: Any) -> None:
    with pytest.raises(error) as caught:
        vw.open(reference, **options)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


# -- the hub's cache


def snapshot(cache: Path, source: Path, *, shared: bool, inside: str = "", repo: str = "models--a--b") -> Path:
    """A folder as the hub's library lays it out: links to the repository's blobs, or from there to the cache's own."""
    root = cache / repo
    folder = root / "snapshots" / COMMIT / inside
    folder.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in source.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = root / "blobs" / digest
        if shared:
            store = cache / "blobs" / digest[:2] / digest
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            shutil.copy(path, blob)
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    return folder


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("inside", ["", "step100", "a/b"])
def test_a_snapshot_may_link_into_its_cache(shared: bool, inside: str, tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    folder = snapshot(tmp_path / "hub", tmp_path / "plain", shared=shared, inside=inside)
    expected = vw.open(tmp_path / "plain").read("K", "L1.attn").maps
    assert torch.equal(vw.open(folder).read("K", "L1.attn").maps, expected)
    assert torch.equal(vw.open(folder / "model.safetensors").read("K", "L1.attn").maps, expected)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "hub")
    through = tmp_path / "elsewhere" / folder.relative_to(tmp_path / "hub")
    assert torch.equal(vw.open(through).read("K", "L1.attn").maps, expected)


@pytest.mark.parametrize("place", ["beside the cache", "in the cache but no blob", "another snapshot of that name"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_snapshot_may_link_nowhere_else(place: str, name: str, tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    folder = snapshot(tmp_path / "hub", tmp_path / "plain", shared=False)
    target = {
        "beside the cache": tmp_path / "blobs" / "ab" / "abc",
        "in the cache but no blob": tmp_path / "hub" / "version.txt",
        "another snapshot of that name": tmp_path / "models--a--b" / "blobs" / "abc",
    }[place]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "plain" / name, target)
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    refused(folder, UnsafeCheckpointError, name, "link")
    if name == "model.safetensors":
        refused(folder / name, UnsafeCheckpointError, name, "link")


def test_a_single_file_may_not_be_a_link_out_of_its_folder(tmp_path: Path) -> None:
    saved(tmp_path / "plain")
    (tmp_path / "other").mkdir()
    for name in ("some.safetensors", "model.safetensors", "some.gguf"):
        (tmp_path / "other" / name).symlink_to(tmp_path / "plain" / "model.safetensors")
        refused(tmp_path / "other" / name, UnsafeCheckpointError, name, "by its own path")
    (tmp_path / "plain" / "again.safetensors").symlink_to("model.safetensors")
    assert vw.open(tmp_path / "plain" / "again.safetensors").spec.n_layers == 3


@pytest.mark.parametrize("offline", [False, True])
def test_a_pinned_commit_opens_offline(offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "plain")
    snapshot(tmp_path / "hub", tmp_path / "plain", shared=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if not offline:  # as HF_HUB_OFFLINE=1 does
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for reference in (f"hf://a/b@{COMMIT}", "hf://a/b", "hf://a/b@main"):
        assert open_source(reference, offline=offline).reference == f"hf://a/b@{COMMIT}"
    with pytest.raises(OfflineError):
        open_source(f"hf://a/b@{'d' * 40}", offline=offline)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    saved(tmp_path / "m")
    monkeypatch.setattr(Path, "iterdir", forbidden)
    refused(tmp_path / "m", CheckpointError, str(tmp_path / "m"), "Permission denied")


# -- tied tensors, padded vocabularies


@pytest.mark.parametrize("name", ["gpt2", "llama-multi-query-tied", "qwen2"])
def test_a_tied_pair_stored_under_the_heads_name_is_both(name: str, tmp_path: Path) -> None:
    model: Any = tiny(name)
    saved(tmp_path, name)
    save_model(model, str(tmp_path / "model.safetensors"))
    stream, expected = vw.open(tmp_path, fold=False), model.get_input_embeddings().weight
    assert "lm_head.weight" in stream.source.tensors
    assert torch.equal(stream.write("embed")[0].T, expected)
    assert torch.equal(stream.read("unembed").maps[0], expected)


def test_of_an_untied_model_the_head_is_no_embedding(tmp_path: Path) -> None:
    saved(tmp_path, "llama-grouped-untied", {"model.embed_tokens.weight": None})
    refused(tmp_path, ArchitectureError, "embed_tokens")


def test_a_padded_vocabulary_has_tokens_without_text(tmp_path: Path) -> None:
    saved(tmp_path)
    vocabulary = {f"t{i}": i for i in range(30)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}}))
    texts = open_source(tmp_path).token_texts()
    assert [text_of(texts, token) for token in (0, 29, 30, 36)] == ["t0", "t29", None, None]
    record = vw.ChannelTokens("L0H0", "L1H0.K", 37)(vw.open(tmp_path))
    shown = {int(str(row["token"])): row["text"] for row in record.rows()}
    assert shown[5] == "t5"
    assert shown[36] is None
    nearest = in_tokens(vw.open(tmp_path), torch.eye(24)[:, :1], count=37)[0]
    assert {t.token: t.text for t in nearest}[36] is None


# -- storage types


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_multiplied_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    plain = saved(tmp_path)
    stored = saved(tmp_path, changes={name: plain[name].to(dtype)})
    gain = stored["model.layers.1.input_layernorm.weight"].double()
    expected = stored[name].double().reshape(6, 4, 24) * gain
    assert torch.equal(vw.open(tmp_path).read("K", "L1.attn").maps.double(), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    saved(tmp_path, changes={name: torch.ones(24, 24).to(dtype)})
    refused(tmp_path, ArchitectureError, name, "whole numbers")


FOREIGN = {
    "model.layers.0.self_attn.q_proj.weight_scale_inv": ("float8", "quantised from"),
    "model.layers.0.self_attn.q_proj.weight_scale": ("float8", "quantised from"),
    "model.layers.0.self_attn.q_proj.input_scale": ("float8", "quantised from"),
    "model.layers.0.self_attn.q_proj.weight.absmax": ("bitsandbytes", "quantised from"),
    "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4": ("bitsandbytes", "quantised from"),
    "model.layers.0.self_attn.q_proj.SCB": ("bitsandbytes", "quantised from"),
    "model.layers.0.self_attn.q_proj.qweight": ("GPTQ or AWQ", "quantised from"),
    "model.layers.0.self_attn.q_proj.g_idx": ("GPTQ or AWQ", "quantised from"),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("adapter", "merge_and_unload"),
    "model.layers.0.self_attn.q_proj.base_layer.weight": ("adapter", "merge_and_unload"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_must_be_converted_is_recognised_by_its_tensors(name: str, tmp_path: Path) -> None:
    saved(tmp_path, changes={name: torch.ones(3)})
    refused(tmp_path, ArchitectureError, name, *FOREIGN[name])


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
def test_what_must_be_converted_is_recognised_by_its_configuration(method: str, tmp_path: Path) -> None:
    saved(tmp_path)
    configured(tmp_path, quantization_config={"quant_method": method})
    refused(tmp_path, ArchitectureError, method, "quantised", "quantised from")


def test_a_text_model_inside_another_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    configured(tmp_path, model_type="llava", text_config={"model_type": "llama"})
    refused(tmp_path, ArchitectureError, "llava", "text_config as config=")


def test_an_adapter_folder_is_named(tmp_path: Path) -> None:
    saved(tmp_path)  # even beside a whole model, since transformers would load the adapter over it
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(tmp_path, CheckpointError, "adapter", "merge_and_unload")
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    refused(tmp_path, CheckpointError, "adapter", "merge_and_unload")


# -- prefixes


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "language_model.", "module._orig_mod.", "module.module."])
def test_the_prefix_of_a_wrapped_model_is_taken_off(prefix: str, tmp_path: Path) -> None:
    model: Any = tiny("llama-full")
    wrapped = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = vw.open(model).read("V", "L2.attn").maps
    config = model.config.to_dict()
    assert torch.equal(vw.open(wrapped, config=config).read("V", "L2.attn").maps, expected)
    save_file(wrapped, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    stream = vw.open(tmp_path)
    assert torch.equal(stream.read("V", "L2.attn").maps, expected)
    assert set(stream.source.tensors) == set(model.state_dict())


def test_names_are_left_alone_where_a_prefix_is_not_common_or_two_would_be_one() -> None:
    for names in (["module.a", "b"], ["_orig_mod.a", "a"], ["module.", "module.a"], [], ["model.a", "model.b"]):
        assert plain_names(names) == {name: name for name in names}


def test_a_prefix_that_stays_is_named() -> None:
    model: Any = tiny("llama-full")
    for prefix in ("student.", "model.language_model."):
        tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
        refused(tensors, ArchitectureError, prefix, config=model.config.to_dict())
    tensors = {f"language_model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["vision_tower.weight"] = torch.ones(2)
    refused(tensors, ArchitectureError, "'language_model.'", config=model.config.to_dict())


def test_what_torch_wraps_around_a_model_is_looked_through() -> None:
    model: Any = tiny("llama-full")
    expected = vw.open(model).read("V", "L2.attn").maps
    compiled: Any = torch.compile(model, backend="eager")
    for wrapped in (compiled, nn.DataParallel(model), nn.DataParallel(compiled)):
        assert torch.equal(vw.open(wrapped).read("V", "L2.attn").maps, expected)


def test_a_model_with_an_adapter_is_refused() -> None:
    kind = type("PeftModel", (nn.Module,), {"__module__": "peft.peft_model"})
    refused(kind(), CheckpointError, "merge_and_unload")


# -- GGUF


def as_gguf(path: Path, **settings: Any) -> Path:
    """A one-layer Llama with random weights; settings are added to its metadata, under ``llama.`` without a dot."""
    writer, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    sizes = {"embedding_length": 24, "feed_forward_length": 40, "block_count": 1, "attention.head_count": 4}
    for key, value in {**{f"llama.{key}": size for key, size in sizes.items()}, **settings}.items():
        kind = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
        kind.get(type(value), writer.add_string)(key, value)  # type: ignore[operator]
    shapes = {f"attn_{role}": (24, 24) for role in ("q", "k", "v", "output")} | {"attn_norm": (24,), "ffn_norm": (24,)}
    shapes |= {"ffn_gate": (40, 24), "ffn_up": (40, 24), "ffn_down": (24, 40)}
    for name, shape in {f"blk.0.{name}": shape for name, shape in shapes.items()}.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    for name, shape in {"token_embd": (37, 24), "output_norm": (24,)}.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    write(writer)
    return path


@pytest.mark.parametrize(
    "key", ["mradermacher.quantized_by", "llama.tensor_data_layout", "imatrix.file", "block_count"]
)
def test_notes_in_a_gguf_file_change_nothing(key: str, tmp_path: Path) -> None:
    assert vw.open(as_gguf(tmp_path / "m.gguf", **{key: "7"})).spec == vw.open(as_gguf(tmp_path / "n.gguf")).spec


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),  # llama.cpp: linear where no type is named
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0, "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, "rope.scale_linear = 2.0"),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "none"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
        ({"rope.dimension_count": 5}, "5 of 6"),
        ({"rope.dimension_count": 8}, "8 of 6"),
        ({"attention.head_count_kv": [4, 4]}, None),
        ({"attention.head_count_kv": [4, 2]}, "head_count_kv"),
        ({"expert_count": 0}, None),
        ({"expert_count": 8}, "expert_count"),
        ({"attention.causal": False}, "causal"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"per_layer": [1] * 3000}, "per_layer"),
    ],
)
def test_settings_of_a_gguf_file_are_read_as_llama_cpp_reads_them(
    settings: dict[str, Any], factor: float | str | None, tmp_path: Path
) -> None:
    path = as_gguf(tmp_path / "m.gguf", **{f"llama.{key}": value for key, value in settings.items()})
    if isinstance(factor, str):
        refused(path, ArchitectureError, factor)
        return
    rotary = vw.open(path).spec.attentions[0].rotary
    assert rotary is not None
    assert rotary.scaling == ({} if factor is None else {"rope_type": "linear", "factor": factor})


@pytest.mark.parametrize(("key", "value"), [("general.type", "adapter"), ("split.count", 3)])
def test_a_gguf_file_that_is_not_a_whole_model_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    refused(as_gguf(tmp_path / "m.gguf", **{key: value}), ArchitectureError, key)
