"""What runs is what was opened: its tensors and its configuration, whatever lies beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import save_file, save_model
from tiny_models import SHAPES, gguf_sizes, gguf_tensors, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.errors import ArchitectureError, CheckpointError, MissingTensorError
from virtual_weights.runtime import Run
from virtual_weights.runtime.flow.trace import Trace
from virtual_weights.runtime.running import ModuleRunner, Runner, load

TOKENS = torch.randint(0, 37, (2, 30), generator=torch.Generator().manual_seed(3))
LLAMA = "llama-grouped-untied"


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        return module(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_it_gives_the_logits_of_transformers_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny(name, 5).save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=dtype)
    assert torch.equal(logits(load(vw.open(tmp_path), dtype=dtype)), logits(expected.eval()))


@pytest.mark.parametrize("name", ["llama-multi-query-tied", "gpt2"])
def test_tied_ends_are_one_tensor_in_memory(name: str) -> None:
    model = tiny(name)
    built: Any = load(vw.open(model))
    assert built.get_input_embeddings().weight is built.get_output_embeddings().weight
    assert {p.data_ptr() for p in built.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


def test_one_tensor_of_a_gguf_file_for_both_ends_stays_one(tmp_path: Path) -> None:
    model = tiny("llama-multi-query-tied")
    built: Any = load(vw.open(as_gguf(tmp_path / "model.gguf", model)))
    assert built.model.embed_tokens.weight.data_ptr() == built.lm_head.weight.data_ptr()
    assert torch.equal(logits(built), logits(model))


@dataclass
class Opened:
    """What is opened, what it must run as, and what would run in its place."""

    reference: Any
    expected: nn.Module
    decoy: nn.Module
    options: dict[str, Any] = field(default_factory=dict)


PLACES: dict[str, Callable[[Path], Opened]] = {}


def place(make: Callable[[Path], Opened]) -> Callable[[Path], Opened]:
    PLACES[make.__name__.replace("_", " ")] = make
    return make


def both(name: str = LLAMA) -> tuple[Any, Any]:
    return tiny(name, 1), tiny(name, 2)


def stored(model: Any) -> dict[str, Tensor]:
    return {key: x.clone() for key, x in model.state_dict().items() if key != "lm_head.weight" or not tied(model)}


def tied(model: Any) -> bool:
    return model.config.tie_word_embeddings


def configure(folder: Path, model: Any, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    config = {**json.loads(model.config.to_json_string()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "delete"}))


def one(file: Path, model: Any) -> Path:
    configure(file.parent, model)
    save_file(stored(model), file)
    return file


def shards(folder: Path, model: Any, stem: str) -> Path:
    configure(folder, model)
    tensors = stored(model)
    parts = {f"{stem}-{i}-of-2.safetensors": dict(list(tensors.items())[i::2]) for i in (0, 1)}
    for name, part in parts.items():
        save_file(part, folder / name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}}))
    return index


def pickled(folder: Path, model: Any, name: str = "pytorch_model.bin") -> None:
    torch.save(model.state_dict(), folder / name)


@place
def a_file_beside_the_usual_one(folder: Path) -> Opened:
    a, b = both()
    one(folder / "model.safetensors", b)
    return Opened(one(folder / "a.safetensors", a), a, b)


@place
def a_file_beside_a_pickle(folder: Path) -> Opened:
    a, b = both("gpt2")
    pickled(folder, b)
    return Opened(one(folder / "a.safetensors", a), a, b)


@place
def the_usual_file_beside_a_pickle(folder: Path) -> Opened:
    a, b = both("neox-parallel-partial-rotary")
    pickled(folder, b)
    one(folder / "model.safetensors", a)
    return Opened(folder, a, b)


@place
def a_folder_with_a_pickle_and_one_odd_file(folder: Path) -> Opened:
    a, b = both("qwen2")
    pickled(folder, b)
    one(folder / "weights.safetensors", a)
    return Opened(folder, a, b)


@place
def a_file_beside_shards(folder: Path) -> Opened:
    a, b = both("mistral")
    shards(folder, b, "model")
    return Opened(one(folder / "a.safetensors", a), a, b)


@place
def shards_beside_other_shards(folder: Path) -> Opened:
    a, b = both("gpt2-untied-narrow")
    shards(folder, b, "model")
    return Opened(shards(folder, a, "other"), a, b)


@place
def shards_beside_the_usual_file(folder: Path) -> Opened:
    a, b = both()
    one(folder / "model.safetensors", b)
    return Opened(shards(folder, a, "model"), a, b)


@place
def the_usual_file_beside_shards(folder: Path) -> Opened:
    a, b = both()
    shards(folder, b, "model")
    one(folder / "model.safetensors", a)
    return Opened(folder, a, b)


@place
def a_shard_that_is_complete_by_itself(folder: Path) -> Opened:
    a, b = both()
    shards(folder, b, "model")
    return Opened(one(folder / "model-0-of-2.safetensors", a), a, b)


@place
def a_variant(folder: Path) -> Opened:
    a, b = both("llama-multi-query-tied")
    one(folder / "model.safetensors", b)
    return Opened(one(folder / "model.fp16.safetensors", a), a, b)


@place
def a_file_beside_an_adapter(folder: Path) -> Opened:
    a, b = both()
    save_file({"base_model.model.model.norm.weight": torch.ones(24)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    return Opened(one(folder / "model.safetensors", a), a, b)


@place
def a_file_beside_other_frameworks(folder: Path) -> Opened:
    a, b = both()
    for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx", "consolidated.00.pth"):
        pickled(folder, b, name)
    return Opened(one(folder / "a.safetensors", a), a, b)


@place
def a_link_to_another_folders_file(folder: Path) -> Opened:
    a, b = both()
    one(folder / "model.safetensors", b)
    (folder / "inner").mkdir()
    one(folder / "inner" / "model.safetensors", a)
    (folder / "linked.safetensors").symlink_to("inner/model.safetensors")
    return Opened(folder / "linked.safetensors", a, b)


@place
def a_snapshot_of_the_hubs_cache(folder: Path) -> Opened:
    a, b = both("gpt2")
    repository = folder / "models--org--name"
    for revision, model in (("aaaa", a), ("bbbb", b)):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        one(folder / revision / "model.safetensors", model)
        for name in ("model.safetensors", "config.json"):
            (folder / revision / name).rename(repository / "blobs" / f"{revision}{name}")
            (snapshot / name).symlink_to(f"../../blobs/{revision}{name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbbb")
    return Opened(repository / "snapshots" / "aaaa", a, b)


@place
def tensors_in_memory_in_a_folder_with_a_model(folder: Path) -> Opened:
    a, b = both()
    one(folder / "model.safetensors", b)
    return Opened(stored(a), a, b, {"config": a.config.to_dict()})


@place
def a_module(folder: Path) -> Opened:
    a, b = both("neox-sequential-no-attention-bias")
    one(folder / "model.safetensors", b)
    return Opened(a, a, b)


@place
def a_wrapped_models_tensors(folder: Path) -> Opened:
    a, b = both()
    one(folder / "model.safetensors", b)
    save_file({f"module._orig_mod.{key}": x for key, x in stored(a).items()}, folder / "wrapped.safetensors")
    return Opened(folder / "wrapped.safetensors", a, b)


def changed(name: str, **settings: Any) -> tuple[Any, Any]:
    """A model with other settings than the family's usual ones, and the same weights with the usual ones."""
    usual = tiny(name, 1)
    config = type(usual.config)(**{**usual.config.to_dict(), **settings})
    other: Any = type(usual)._from_config(config, attn_implementation="eager")
    other.load_state_dict(usual.state_dict())
    return other.eval(), usual


@place
def a_configuration_given_in_place_of_the_file(folder: Path) -> Opened:
    rope = {"rope_type": "default", "rope_theta": 50.0}
    other, usual = changed(LLAMA, rope_parameters=rope)
    one(folder / "model.safetensors", usual)
    return Opened(folder, other, usual, {"config": other.config.to_dict()})


@place
def linear_scaling_under_the_older_name(folder: Path) -> Opened:
    other, usual = changed(LLAMA, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    one(folder / "model.safetensors", usual)
    scaling = {"type": "linear", "factor": 4.0}
    configure(folder, usual, rope_parameters="delete", rope_scaling=scaling, rope_theta=10000.0)
    return Opened(folder, other, usual)


@place
def scaling_of_llama_3(folder: Path) -> Opened:
    rope = SHAPES["llama3-scaling"][1]["rope_parameters"]
    other, usual = changed("llama-full", rope_parameters=rope)
    one(folder / "model.safetensors", usual)
    configure(folder, usual, rope_parameters=rope)
    return Opened(folder, other, usual)


@place
def a_share_of_the_head_that_turns(folder: Path) -> Opened:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    other, usual = changed("neox-parallel-partial-rotary", rope_parameters=rope)
    one(folder / "model.safetensors", usual)
    configure(folder, usual, rope_parameters="delete", rotary_pct=0.5, rotary_emb_base=10000.0)
    return Opened(folder, other, usual)


@place
def a_sliding_window_of_mistral(folder: Path) -> Opened:
    other, usual = changed("mistral", sliding_window=5)
    one(folder / "model.safetensors", usual)
    configure(folder, usual, sliding_window=5)
    return Opened(folder, other, usual)


@place
def a_sliding_window_of_the_later_layers_of_qwen(folder: Path) -> Opened:
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None}
    other, usual = changed("qwen2", **windows)
    one(folder / "model.safetensors", usual)
    configure(folder, usual, **windows)
    return Opened(folder, other, usual)


@place
def a_head_of_its_own_beside_a_tie(folder: Path) -> Opened:
    usual = tiny("llama-multi-query-tied", 1)
    other, _ = changed("llama-multi-query-tied", tie_word_embeddings=False)
    other.lm_head.weight = nn.Parameter(torch.randn(37, 24, generator=torch.Generator().manual_seed(8)))
    save_file(dict(other.state_dict()), folder / "model.safetensors")
    configure(folder, usual)
    return Opened(folder, other, usual)


@place
def tied_ends_under_the_heads_name(folder: Path) -> Opened:
    a, b = both("gpt2")
    save_model(a, str(folder / "model.safetensors"))
    configure(folder, a)
    return Opened(folder, a, b)


@place
def a_configuration_that_names_other_code(folder: Path) -> Opened:
    a, b = both()
    one(folder / "model.safetensors", a)
    other = {"architectures": ["MistralForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    configure(folder, a, **other, _attn_implementation="org/kernel", attn_implementation="flash_attention_2")
    return Opened(folder, a, b)


def as_gguf(file: Path, model: Any, further: Mapping[str, Tensor] | None = None, **keys: Any) -> Path:
    """A GGUF file as llama.cpp's converter writes it: queries' and keys' rows in pairs."""
    config = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    sizes = {**gguf_sizes(config), "context_length": 64}
    for key, value in (sizes | keys).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{config.model_type}.{key}", value)
    writer.add_float32(f"{config.model_type}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    for key, weight in gguf_tensors(config, stored(model)).items():
        writer.add_tensor(key, weight.contiguous().numpy())
    for key, value in (further or {}).items():
        writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@place
def gguf_beside_safetensors(folder: Path) -> Opened:
    a, b = both()
    one(folder / "model.safetensors", b)
    return Opened(as_gguf(folder / "model.gguf", a), a, b)


@place
def safetensors_beside_gguf(folder: Path) -> Opened:
    a, b = both()
    as_gguf(folder / "model.gguf", b)
    one(folder / "model.safetensors", a)
    return Opened(folder, a, b)


@place
def gguf_beside_gguf(folder: Path) -> Opened:
    a, b = both("qwen2")
    as_gguf(folder / "model.gguf", b)
    return Opened(as_gguf(folder / "a.gguf", a), a, b)


def turned(model: Any, frequencies: Tensor) -> Any:
    """A model whose planes turn by given angles."""
    other = copy.deepcopy(model)
    other.model.rotary_emb.inv_freq = frequencies
    return other


@place
def gguf_with_factors_of_the_frequencies(folder: Path) -> Opened:
    usual = tiny("llama-full", 1)  # heads of 4: two planes
    factors = torch.tensor([1.5, 8.0])
    file = as_gguf(folder / "model.gguf", usual, {"rope_freqs.weight": factors})
    return Opened(file, turned(usual, usual.model.rotary_emb.inv_freq / factors), usual)


@place
def gguf_with_linear_scaling(folder: Path) -> Opened:
    other, usual = changed("llama-full", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    return Opened(as_gguf(folder / "model.gguf", usual, **keys), other, usual)


@place
def gguf_in_which_few_dimensions_turn(folder: Path) -> Opened:
    """llama.cpp turns the first pairs of stored rows: here one pair of three, rows (0, 3) of a head once undone."""
    usual = tiny("neox-parallel-partial-rotary", 1)
    config = {**SHAPES[LLAMA][1], "num_attention_heads": 4, "num_key_value_heads": 2}
    usual = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**config, bos_token_id=0, eos_token_id=0), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in usual.parameters():
            parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(parameter.numel()))
    file = as_gguf(folder / "model.gguf", usual, **{"rope.dimension_count": 2})
    return Opened(file, turned(usual, torch.tensor([1.0, 0.0, 0.0])), usual)


@pytest.mark.parametrize("name", PLACES)
def test_what_runs_is_what_was_opened(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    case = PLACES[name](tmp_path / "m")
    stream = vw.open(case.reference, **case.options)
    built = logits(load(stream))
    torch.testing.assert_close(built, logits(case.expected), rtol=1e-5, atol=1e-5)
    assert float((built - logits(case.decoy)).norm() / built.norm()) > 1e-3, "the two models are told apart"
    # the law, of every reader, with the maps of the same stream
    run = Run.on_prompt(stream, TOKENS[0, :12])
    for port in ("L1H1.Q", "L1H1.K", "L1H1.V", "unembed"):
        assert Trace(port)(run).stamp["error"] < 1e-5


def test_there_are_thirty_of_them() -> None:
    assert len(PLACES) >= 30


def test_the_error_of_the_law_goes_into_the_provenance(tmp_path: Path) -> None:
    stream = vw.open(tiny("gpt2"))
    record = Trace("L1H1.K")(Run.on_prompt(stream, TOKENS[0]))
    assert 0 < record.provenance["exactness_error"] < 1e-5
    assert {k: v for k, v in record.provenance.items() if k != "exactness_error"} == stream.provenance


def touched(model: Any, change: Callable[[Any], None]) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def _head(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight[:4] *= 1.001


def _writer(model: Any) -> None:
    model.model.layers[2].mlp.down_proj.weight[:, 7] += 0.001


def _embedding(model: Any) -> None:
    model.model.embed_tokens.weight += 0.001


def _eps(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-3


def _rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 0.99


def _scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 1.01


def _nonlinearity(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = nn.GELU()


def _hook(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *given: given[2] * 1.001)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_head, r"L1\.attn\.V"),
        (_writer, r"what L2\.mlp write"),
        (_embedding, "what embed write"),
        (_eps, r"unembed"),
        (_rotary, r"the pattern of L\d\.attn"),
        (_scaling, r"the pattern of L0\.attn"),
        (_nonlinearity, r"the nonlinearity of L2\.mlp"),
        (_hook, r"what L1\.attn write"),
    ],
)
def test_a_passed_model_that_differs_in_anything_is_refused(change: Callable[[Any], None], named: str) -> None:
    model = tiny(LLAMA)
    stream = vw.open(model)
    assert load(stream, copy.deepcopy(model))
    with pytest.raises(CheckpointError, match=rf"{named}[\s\S]*to do: pass as model="):
        load(stream, touched(model, change))


def test_a_passed_model_with_another_models_weights_is_refused() -> None:
    a, b = both("gpt2")
    with pytest.raises(CheckpointError, match="is not the model whose maps are read"):
        Trace("L1H1.K")(Run.on_prompt(vw.open(a), TOKENS[0], model=b))


def test_half_a_model_is_not_run() -> None:
    model = tiny(LLAMA)
    tensors = stored(model)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    stream = vw.open(tensors, config=model.config.to_dict(), partial=True)
    with pytest.raises(MissingTensorError, match=r"layers\.2\.mlp\.down_proj\.weight"):
        load(stream)
    with pytest.raises(MissingTensorError, match=r"no L2\.mlp"):
        load(stream, model)


def test_what_transformers_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    file = as_gguf(tmp_path / "model.gguf", tiny("qwen2"), {"blk.1.attn_output.bias": torch.ones(24)})
    with pytest.raises(ArchitectureError, match=r"no row of the qwen2 table[\s\S]*blk\.1\.attn_output\.bias"):
        load(vw.open(file))
    model = tiny("mistral")
    with pytest.raises(ArchitectureError, match="sliding_window"):
        load(vw.open(stored(model), config={**model.config.to_dict(), "sliding_window": "wide"}))


def test_another_runner_can_stand_in() -> None:
    """What a run needs of it is the module, its dtype's name and its distance from the maps."""

    class Borrowed(Runner):
        module = load(vw.open(tiny("gpt2")))
        precision = "float32"
        exactness_error = 0.5

    record = Trace("L1H1.K")(Run.on_prompt(vw.open(tiny("gpt2")), TOKENS[0], model=Borrowed()))
    assert record.provenance["exactness_error"] == 0.5
    assert record.stamp["error"] < 1e-5
    assert issubclass(ModuleRunner, Runner)
