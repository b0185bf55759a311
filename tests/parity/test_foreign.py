"""A model that a peer library wraps opens and runs as the plain transformers model does.

The peers' own classes are used where they are installed; stand-ins with their names and structure (nnsight 0.8,
TransformerLens 4.3) always.
"""

from __future__ import annotations

import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPES, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.checkpoint.mapping_source import twin, unwrapped
from virtual_weights.errors import CheckpointError, UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import Run
from virtual_weights.runtime.edges.ablation import Ablation
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.flow.trace import Trace
from virtual_weights.runtime.running import load, module_name
from virtual_weights.runtime.running.hooks import places, watching
from virtual_weights.stream.lens_shapes import in_lens_shapes

TOKENS = torch.randint(0, 37, (3, 8), generator=torch.Generator().manual_seed(1))
PAGE = Path(__file__).parents[2] / "docs" / "interoperate.md"
MODELS = ("llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary")


class Envoy:
    """Like nnsight's: no torch module, it holds one."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module


class Wrapper(nn.Module):
    """Like the bridge's components: code of its own around the wrapped module, beside aliases of its parts."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.add_module("_original_component", wrapped)
        for name, part in wrapped.named_children():
            self.add_module(f"alias_{name}", part)

    def forward(self, *_given: Any, **_named: Any) -> Tensor:
        raise AssertionError("the bridge's own code ran")


def standing_in(library: str, *names: str) -> type:
    """A class of a peer: its module's name and the names of its bases, the last one first."""
    peer: type = Envoy if library.startswith("nnsight") else nn.Module
    for name in names:
        peer = type(name, (peer,), {"__module__": library})
    return peer


LanguageModel = standing_in("nnsight.modeling.language", "Envoy", "LanguageModel")
TransformerBridge = standing_in("transformer_lens.model_bridge.transformer_bridge", "TransformerBridge")


def bridged(model: nn.Module) -> Any:
    """Every map, norm, attention, MLP and block wrapped, innermost first; a bias of zeros on the unembedding."""
    modules = dict(model.named_modules())
    for name in sorted(modules, key=lambda n: -n.count(".")):
        above, _, last = name.rpartition(".")
        if name and not isinstance(modules[name], nn.ModuleList) and (above or last == "lm_head"):
            setattr(modules[above], last, Wrapper(modules[name]))
    head: Any = modules["lm_head"]
    del head.bias
    head.register_buffer("bias", torch.zeros(37))
    bridge: Any = TransformerBridge()
    bridge.__dict__["original_model"] = model
    return bridge


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(37)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", pad_token="w0")


def by_nnsight(model: nn.Module, _folder: Path) -> Any:
    nnsight = pytest.importorskip("nnsight")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nnsight.LanguageModel(model, tokenizer=tokenizer())


def by_transformer_lens(model: Any, folder: Path) -> Any:
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bridges.TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=None, device="cpu")


WRAPPINGS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "sdpa": lambda model, _: model.set_attn_implementation("sdpa") or model,  # type: ignore[operator]
    "like nnsight": lambda model, _: LanguageModel(model),
    "like a bridge": lambda model, _: bridged(model),
    "nnsight": by_nnsight,
    "transformer_lens": by_transformer_lens,
}


def columns(record: Record) -> dict[str, Any]:
    return {column.name: column.values for column in record.columns}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_it_is_measured_as_the_plain_model_is(wrapping: str, name: str, tmp_path: Path) -> None:
    plain = tiny(name, seed=3)
    stream = vw.open(plain)
    other = WRAPPINGS[wrapping](tiny(name, seed=3), tmp_path)
    opened = vw.open(other)
    assert opened.spec == stream.spec
    assert set(opened.source.tensors) == set(stream.source.tensors)
    for tensor in opened.source.tensors:
        assert torch.equal(opened.source.read(tensor), stream.source.read(tensor))

    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    runs = [Run.on_tokens(s, TOKENS, model=m) for s, m in ((opened, other), (stream, plain))]
    moments = [Observation().moments(run) for run in runs]
    for part in ("mean", "states", "attention", "neurons"):
        torch.testing.assert_close(getattr(moments[0], part), getattr(moments[1], part), **exact)
    port = "L1H2.K"
    traces = [Trace(port)(run.prompt()) for run in runs]
    torch.testing.assert_close(columns(traces[0]), columns(traces[1]), **exact)
    assert traces[0].stamp["error"] < 1e-5
    edges = [("L0H1", port), ("L0.mlp", "L1.mlp.in" if not stream.spec.gated else "L1.mlp.up")]
    effects = [columns(Ablation(edges, random=3)(run)) for run in runs]
    for column, values in effects[1].items():
        if isinstance(values, Tensor):
            torch.testing.assert_close(effects[0][column], values, **exact)
        else:
            assert effects[0][column] == values
    assert effects[1]["effect_nats"].abs().max() > 1e-4


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_users_model_is_left_as_it_was(wrapping: str, tmp_path: Path) -> None:
    model: Any = tiny("gpt2")
    other = WRAPPINGS[wrapping](model, tmp_path)
    model.set_attn_implementation("sdpa")
    model.train()
    before = {name: (type(module), len(module._forward_hooks)) for name, module in model.named_modules()}
    run: Any = load(vw.open(other), other)
    run.transformer.h[0].register_forward_hook(lambda *_: None)
    assert before == {name: (type(module), len(module._forward_hooks)) for name, module in model.named_modules()}
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert run.config._attn_implementation == "eager"
    assert not run.training
    assert run is not model
    # the same tensors: a change in place is seen by both
    assert {id(p) for p in run.parameters()} == {id(p) for p in unwrapped(other).parameters()}
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "ln_f" in n and n.endswith("weight")).fill_(7)
    assert (run.transformer.ln_f.weight == 7).all()


def test_a_plain_eager_model_runs_itself() -> None:
    model = tiny("gpt2")
    assert unwrapped(model) is model
    assert load(vw.open(model), model) is model


def test_a_twin_has_the_tensors_and_nothing_else() -> None:
    model: Any = tiny("llama-multi-query-tied")
    other: Any = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    assert other.config is not model.config
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_weights_that_are_not_loaded_are_refused() -> None:
    with torch.device("meta"):
        empty = LanguageModel(tiny("gpt2").to("meta"))
    for use in (vw.open, lambda model: load(vw.open(tiny("gpt2")), model)):
        with pytest.raises(UsageError, match=r"not loaded yet[\s\S]*dispatch=True"):
            use(empty)  # type: ignore[operator]


def test_weights_that_transformer_lens_changed_are_refused() -> None:
    processed = bridged(tiny("gpt2"))
    processed.__dict__["_weights_processed"] = True
    stream = vw.open(tiny("gpt2"))
    for use in (vw.open, lambda model: load(stream, model)):
        with pytest.raises(CheckpointError, match=r"folded or centred[\s\S]*to do: [\s\S]*TransformerBridge"):
            use(processed)  # type: ignore[operator]


def test_attention_without_pattern_is_refused_where_it_is_watched_by_hand() -> None:
    model: Any = tiny("gpt2")
    stream = vw.open(model)
    model.set_attn_implementation("sdpa")
    with (
        watching(model, stream, places(stream, "pattern"), lambda *_: None),
        pytest.raises(UsageError, match="keeps no pattern"),
    ):
        model(TOKENS)


def of_the_bridge(bridge: Any, key: str) -> Tensor:
    place, _, name = key.rpartition(".")
    if not place.startswith(("blocks", "ln_final")):
        return getattr(bridge, name)
    if name == "b_in":  # the alias is stale after process_weights
        return getattr(bridge.get_submodule(place), "in").bias
    return getattr(bridge.get_submodule(place), name)


# TransformerLens 4.3 refuses GPT-NeoX without biases
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "neox-sequential-no-attention-bias"])
def test_shapes_and_values_are_those_of_the_bridge(name: str, tmp_path: Path) -> None:
    bridge = by_transformer_lens(tiny(name, seed=3), tmp_path)
    for key, tensor in in_lens_shapes(vw.open(bridge)).items():
        assert torch.equal(tensor, of_the_bridge(bridge, key)), key
    folded = in_lens_shapes(vw.open(tiny(name, seed=3)), folded=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.process_weights(center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    for key, tensor in folded.items():
        torch.testing.assert_close(tensor, of_the_bridge(bridge, key).detach(), rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("library", ["nnsight", "transformer_lens"])
def test_what_the_page_shows_of_a_peer_is_so(library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    tiny("gpt2", seed=3).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    page = tmp_path / "page.py"  # nnsight reads the source of what it traces
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    page.write_text(next(block for block in blocks if library in block), encoding="utf-8")
    names = {"vw": vw, "torch": torch, "Run": Run, "Trace": Trace, "Ablation": Ablation, "folder": str(tmp_path)}
    names |= {"module_name": module_name, "in_lens_shapes": in_lens_shapes, "tokens": TOKENS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = runpy.run_path(str(page), names)
    assert results["ablation"].axis("edge").labels[0] == "L0H1 -> L1H2.K"
    assert results["trace"].stamp["error"] < 1e-5
    if "neurons" in results:
        assert results["neurons"].shape[-1] == results["stream"].spec.mlps[0].width
    else:
        weights, bridge = results["weights"], results["bridge"]
        assert torch.equal(weights["blocks.1.attn.W_Q"], bridge.blocks[1].attn.W_Q)
        assert torch.equal(weights["unembed.W_U"], bridge.W_U)
