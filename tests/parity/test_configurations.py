"""Configurations are read as transformers reads them, or refused; of what contradicts itself both names are given."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
import transformers
from tiny_models import SHAPES, tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.architecture import resolve, without_keys
from virtual_weights.architecture.config import NEUTRAL_HF
from virtual_weights.errors import ArchitectureError
from virtual_weights.stream.rotary import frequencies

ROTARY = [name for name in SHAPES if not name.startswith("gpt2")]
NUMBERS: list[Any] = [0.25, 0.5, 1.0, 1, 10000, 500.0, 4.0, None, True, "2", 0, -1.0]
DRAWS = 80
KINDS: list[Any] = ["default", "linear", "llama3", "yarn", None, 3]
SCALING = ["rope_theta", "factor", "partial_rotary_factor", "low_freq_factor", "high_freq_factor"]


def parts(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    model: Any = tiny(name)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}, model.config.to_dict()


def settings(draw: random.Random) -> dict[str, Any]:
    """Rotary settings as a file might hold them: mostly sensible, sometimes of the wrong type, sometimes nested."""
    given: dict[str, Any] = {key: draw.choice(NUMBERS[:8]) for key in draw.sample(SCALING, draw.randint(0, 5))}
    if draw.random() < 0.8:
        given[draw.choice(["rope_type", "type"])] = draw.choice(KINDS[:3] * 4 + KINDS)
    if draw.random() < 0.3:
        given["original_max_position_embeddings"] = draw.choice([32, 16, None])
    if draw.random() < 0.15:
        given[draw.choice(SCALING)] = draw.choice(NUMBERS)
    if draw.random() < 0.1:
        return {"full_attention": given, **draw.choice([{}, {"rope_theta": 77.0}])}
    return given


def variant(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A configuration with its rotary settings under any mixture of old and new spellings."""
    changed = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    for key in ("rope_parameters", "rope_scaling"):
        if draw.random() < 0.5:
            changed[key] = draw.choice([settings(draw), settings(draw), settings(draw), None, {}])
    for key in ("rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor"):
        if draw.random() < 0.3:
            changed[key] = draw.choice(NUMBERS[:8] if draw.random() < 0.9 else NUMBERS)
    return changed


def angles(config: dict[str, Any]) -> Tensor | None:
    """Frequencies of the rotary embedding that transformers makes; None where it cannot."""
    try:
        small: dict[str, Any] = {**config, "num_hidden_layers": 1, "layer_types": None}
        read = transformers.AutoConfig.for_model(small.pop("model_type"), **small)
        module: Any = transformers.AutoModelForCausalLM.from_config(read)
        with torch.no_grad():
            module(torch.zeros(1, 3, dtype=torch.long))
    except Exception:  # noqa: BLE001 - whatever a library raises on nonsense
        return None
    return module.base_model.rotary_emb.inv_freq.double()


@pytest.mark.parametrize("name", ["llama-full", "mistral", "qwen2", "neox-parallel-partial-rotary"])
def test_rotary_settings_in_any_spelling_turn_as_in_transformers(name: str) -> None:
    logging.disable(logging.WARNING)
    shapes, config = parts(name)
    draw, read = random.Random(name), 0
    for _ in range(DRAWS):
        changed = variant(config, draw)
        try:
            spec = resolve(changed, shapes, "hf").spec
        except ArchitectureError:
            continue
        expected = angles(changed)
        if expected is None:
            continue
        rotary = spec.attentions[0].rotary
        assert rotary is not None
        found = frequencies(rotary)
        assert found.shape == expected.shape, changed
        assert torch.allclose(found, expected, rtol=1e-5, atol=0), changed
        read += 1
    logging.disable(logging.NOTSET)
    assert read >= DRAWS // 6


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {"tie_word_embeddings": 1}),
        ("llama-full", {"attention_bias": 0}),
        ("llama-full", {"mlp_bias": "false"}),
        ("gpt2", {"tie_word_embeddings": None}),
        ("neox-parallel-partial-rotary", {"use_parallel_residual": 1}),
        ("llama-full", {"hidden_size": 24.0}),
        ("llama-full", {"num_hidden_layers": True}),
        ("llama-full", {"rms_norm_eps": "1e-6"}),
        ("llama-full", {"rms_norm_eps": 10**400}),
        ("llama-full", {"hidden_act": None}),
        ("llama-full", {"hidden_act": ["silu"]}),
        ("llama-full", {"rope_scaling": "linear"}),
        ("llama-full", {"rope_parameters": [1]}),
        ("llama-full", {"rope_parameters": {"rope_theta": True}}),
        ("llama-full", {"rope_parameters": {"factor": "2", "rope_type": "linear"}}),
        ("neox-parallel-partial-rotary", {"rope_parameters": {"partial_rotary_factor": "0.5"}}),
        ("gpt2", {"scale_attn_weights": 1}),
        ("gpt2", {"add_cross_attention": 0}),
    ],
)
def test_a_value_of_another_json_type_is_refused_by_its_key(name: str, change: dict[str, Any]) -> None:
    shapes, config = parts(name)
    with pytest.raises(ArchitectureError) as caught:
        resolve({**config, **change}, shapes, "hf")
    value = next(iter(change.values()))
    assert next(iter(value if isinstance(value, dict) else change)) in caught.value.what


def test_settings_of_their_own_for_kinds_of_layers_are_refused() -> None:
    shapes, config = parts("qwen2")
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(ArchitectureError, match="full_attention"):
        resolve({**config, "rope_parameters": nested}, shapes, "hf")


def test_a_key_under_another_name_is_that_key() -> None:
    shapes, config = parts("gpt2")
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    renamed = {names.get(key, key): value for key, value in config.items()}
    assert resolve(renamed, shapes, "hf").spec == resolve(config, shapes, "hf").spec
    assert resolve({**config, "hidden_size": 24}, shapes, "hf").spec.d_model == 24
    with pytest.raises(ArchitectureError, match=r"num_attention_heads = 2 and n_head = 4"):
        resolve({**config, "num_attention_heads": 2}, shapes, "hf")


def test_a_key_left_out_is_what_transformers_takes_for_it() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 16}
    for kind in ("llama", "mistral"):
        read = transformers.AutoConfig.for_model(kind, **sizes, vocab_size=37, head_dim=4)
        model = transformers.AutoModelForCausalLM.from_config(read)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        spec = resolve({"model_type": kind, **sizes, "vocab_size": 37, "head_dim": 4}, shapes, "hf").spec
        assert spec.attentions[0].kv_heads == read.num_key_value_heads


@pytest.mark.parametrize("key", ["output_past", "n_special", "predict_special_tokens", "num_labels", "unsloth_version"])
def test_keys_that_change_nothing_pass(key: str) -> None:
    assert key in NEUTRAL_HF
    for name in ("gpt2", "llama-full"):
        shapes, config = parts(name)
        assert resolve({**config, key: 1}, shapes, "hf").spec == resolve(config, shapes, "hf").spec


def test_an_unknown_key_may_be_ignored_but_none_that_is_read() -> None:
    shapes, config = parts("llama-full")
    noted = {**config, "some_tool_note": 3}
    assert resolve(without_keys(noted, "hf", ["some_tool_note"]), shapes, "hf").spec.n_layers == 3
    for key in ("rope_parameters", "hidden_size", "rope_interleaved", "not_there"):
        with pytest.raises(ArchitectureError, match=key):
            without_keys(noted, "hf", [key])


# -- which tensor is the unembedding


def loaded(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    read = transformers.AutoConfig.for_model(**config)
    classes: Any = transformers.AutoModelForCausalLM
    return classes._model_mapping[type(read)].from_pretrained(None, config=read, state_dict=tensors)


@pytest.mark.parametrize("name", ["llama-multi-query-tied", "qwen2", "gpt2"])
@pytest.mark.parametrize("stored", ["both equal", "both different", "embedding", "head"])
def test_a_tied_model_has_the_unembedding_that_transformers_gives_it(name: str, stored: str) -> None:
    logging.disable(logging.WARNING)
    model: Any = tiny(name)
    tensors, config = dict(model.state_dict()), model.config.to_dict()
    embed = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    tensors = {key: value.clone() for key, value in tensors.items()}
    if stored == "both different":
        tensors["lm_head.weight"][5] += 0.5
    if stored in ("embedding", "head"):
        del tensors["lm_head.weight" if stored == "embedding" else embed]
    right = loaded(config, tensors)
    logging.disable(logging.NOTSET)
    stream = vw.open(tensors, config=config)
    bare = vw.open(tensors, config=config, fold=False)
    assert torch.equal(bare.read("unembed").maps[0], right.lm_head.weight)
    assert torch.equal(bare.write("embed")[0].T, right.get_input_embeddings().weight)
    assert stream.spec.tied is (stored != "both different")
