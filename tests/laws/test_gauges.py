"""What changes no probability of a model changes no answer about it: constants that no reader and no softmax sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from every_question import KINDS, TOKENS, Subject, different, questions, unlike
from tiny_models import norms_in_full_precision, tiny
from torch import nn

import virtual_weights as vw
from virtual_weights.stream import Question

MODELS = ("gpt2-untied-narrow", "neox-parallel-partial-rotary", "llama-grouped-untied")


def disguised(model: nn.Module, seed: int) -> nn.Module:
    """The same model otherwise written down.

    With LayerNorm a constant in all coordinates is added to whatever is written; to all rows of the unembedding the
    same vector; to all keys the same vector, where nothing rotates them (GPT-2).
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)

    def random(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "lm_head.weight" or name == "embed_out.weight":
                weight += random(weight.shape[1])
            elif name.endswith((".c_proj.weight", "wte.weight", "wpe.weight", "embed_in.weight")):
                weight += random(len(weight))[:, None]  # stored (in, out): the last axis is the stream
            elif name.endswith((".c_proj.bias", ".dense.bias", ".dense_4h_to_h.bias")):
                weight += random(1)
            elif name.endswith((".dense.weight", ".dense_4h_to_h.weight")):
                weight += random(weight.shape[1])
            elif name.endswith(".c_attn.bias"):
                weight.view(3, -1)[1] += random(len(weight) // 3)
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Subject, Subject]]:
    """A model, and the same in disguise."""
    model = tiny(request.param, seed=1, dtype=torch.float64)
    with norms_in_full_precision():
        yield Subject(model), Subject(disguised(model, seed=2))


def test_every_public_question_is_asked(pair: tuple[Subject, Subject]) -> None:
    public = {value for name in dir(vw) if isinstance(value := getattr(vw, name), type) and issubclass(value, Question)}
    asked = {type(question) for kind in questions(pair[0]).values() for question in kind}
    assert asked == public - {Question}


def test_the_disguise_changes_the_weights_and_no_probability(pair: tuple[Subject, Subject]) -> None:
    plain, other = (subject.run.module(TOKENS).logits.log_softmax(-1) for subject in pair)
    torch.testing.assert_close(plain, other, rtol=0, atol=1e-10)
    assert pair[0].stream.source.fingerprint != pair[1].stream.source.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_sees_the_disguise(pair: tuple[Subject, Subject], kind: str) -> None:
    assert not "\n".join(unlike(*pair, kind))


@pytest.mark.parametrize("seed", range(20))
def test_twenty_disguises_of_one_model(seed: int) -> None:
    model = tiny("gpt2-untied-narrow", seed=1, dtype=torch.float64)
    plain, other = (vw.open(m).to(torch.float64) for m in (model, disguised(model, seed)))
    for question in (vw.Composition("K", None, "all"), vw.Composition("unembed", None, "all"), vw.Neurons()):
        assert not list(different(question(plain), question(other)))


@pytest.mark.parametrize("seed", [13, 17, 18])
def test_readers_that_receive_the_same_do_not_change_places(seed: int) -> None:
    """In a parallel block attention and MLP read state 0, which holds the embedding alone: all of each."""
    model = tiny("neox-parallel-partial-rotary", seed=1, dtype=torch.float64)
    with norms_in_full_precision():
        plain, other = Subject(model), Subject(disguised(model, seed))
        for question in (vw.Frontier(), vw.ErasurePolicy()):
            assert not list(different(question(plain.run), question(other.run)))


def test_embeddings_and_unembedding_come_as_the_model_has_them_and_questions_centre_them() -> None:
    model: Any = tiny("gpt2-untied-narrow", seed=1, dtype=torch.float64)
    stream = vw.open(model)
    assert torch.equal(stream["embed"].dense(), model.transformer.wte.weight.T)
    x = torch.randn(24, dtype=torch.float64)
    norm = model.transformer.ln_f
    shift = model.lm_head.weight @ norm.bias
    logits = stream["unembed"] @ (x - x.mean()) / stream.scale(x) + shift
    torch.testing.assert_close(logits, model.lm_head(norm(x)), rtol=1e-9, atol=1e-9)
    for maps, axis in ((stream.write("embed"), -2), (stream.read("unembed").maps, -2)):
        torch.testing.assert_close(maps.mean(axis), torch.zeros_like(maps.mean(axis)), rtol=0, atol=1e-12)


def test_left_in_the_constants_show() -> None:
    model = tiny("gpt2-untied-narrow", seed=1, dtype=torch.float64)
    for port in ("K", "unembed"):
        plain, other = (vw.Composition(port)(vw.open(m, fold=False)) for m in (model, disguised(model, 0)))
        assert "score" in list(different(plain, other))
