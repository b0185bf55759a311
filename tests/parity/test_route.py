"""What a part tells a logit, split over writers and tokens: the paths add up to it, on every family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import blank, frame, plant_head
from tiny_models import SHAPES, norms_in_full_precision, tiny
from torch import Tensor
from uniform import sizes

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import Run
from virtual_weights.runtime.flow.trace import CONSTANT, Route
from virtual_weights.runtime.running.activations import prompted
from virtual_weights.runtime.running.hooks import Place, module_of

TOKENS = torch.tensor([3, 14, 15, 9, 2, 6, 5, 35])


@pytest.fixture(autouse=True)
def norms() -> Iterator[None]:
    with norms_in_full_precision():
        yield


def run_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Run]:
    model: Any = tiny(name, dtype=dtype)
    return model, Run.on_prompt(vw.open(model).to(torch.float64), TOKENS, model=model)


def logits(record: Record) -> Tensor:
    values = record["logit"]
    assert isinstance(values, Tensor)
    return values


def own_contribution(model: Any, stream: vw.Stream, part: str, token: int, against: int, t: int) -> float:
    """By the model's own modules: the logits of what the part writes, under the final norm's scalar of the run."""
    role, group = ("o", f"{part[:2]}.attn") if "H" in part else ("down", f"{part[:2]}.mlp")
    module, norm = module_of(model, stream, role, group), module_of(model, stream, "norm", "unembed")
    inputs: dict[str, Tensor] = {}
    hooks = [module.register_forward_pre_hook(lambda _, given: inputs.update(inner=given[0]))]
    hooks.append(norm.register_forward_pre_hook(lambda _, given: inputs.update(x=given[0])))
    with torch.no_grad():
        model(TOKENS[None])
        for hook in hooks:
            hook.remove()
        inner, k = inputs["inner"][0, t].clone(), sizes(stream).d_head
        if "H" in part:
            entries = slice(int(part[3:]) * k, (int(part[3:]) + 1) * k)
        else:
            entries = slice(int(part[3:]), int(part[3:]) + 1) if "N" in part else slice(None)
        other = inner.clone()
        other[entries] = 0
        exact = deepcopy(module).double()  # a neuron is a small difference of two large outputs
        output, x = exact(inner.double()) - exact(other.double()), inputs["x"][0, t].double()
        if sizes(stream).norm == "layer":
            output, x = output - output.mean(), x - x.mean()
        s = (x.square().mean() + sizes(stream).norm_eps).sqrt()
        weight = module_of(model, stream, "unembed", "unembed").weight
        assert isinstance(weight, Tensor)
        gain: Any = norm.weight
        return float((weight[token] - weight[against]).double() @ (output / s * gain.double()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SHAPES)
def test_paths_add_up_to_what_the_part_tells_the_logit(name: str, dtype: torch.dtype, bound: float) -> None:
    model, prompt = run_of(name, dtype)
    for part in ("L0H1", "L1H0", "L1H3", "L0.mlp", "L1.mlp", "L1N5"):
        for t in (0, 4, -1):
            record = Route(part, 5, 9, t)(prompt)
            direct = own_contribution(model, prompt.stream, part, 5, 9, t)
            size = float(logits(record).abs().sum())
            assert record.stamp["error"] < bound, (part, t)
            assert float(logits(record).sum()) == pytest.approx(direct, rel=bound, abs=bound * size), (part, t)
            assert record.stamp["direct"] == pytest.approx(direct, rel=bound, abs=bound * size)
            assert size > 1e-4


def test_each_path_is_what_one_writer_at_one_token_adds() -> None:
    """From the definition: the head's value at one token, made of one writer alone, through its pattern."""
    model, prompt = run_of("llama-grouped-untied")
    record, activations = Route("L1H4", 5)(prompt), prompted(prompt, "pattern")
    block, head = model.model.layers[1], slice(16, 20)
    v = block.self_attn.v_proj.weight[4:8] * block.input_layernorm.weight
    o, pattern = block.self_attn.o_proj.weight[:, head], activations.signals["pattern", "L1.attn"][4, -1]
    last = prompt.stream.states - 1
    r = (
        (model.lm_head.weight[5] - model.lm_head.weight.mean(0))
        * model.model.norm.weight
        / activations.scalar(last)[-1]
    )
    written = dict(activations.written(2))
    for writer, token in (("embed", 2), ("L0H3", 5), ("L0.mlp", 7)):
        expected = (r @ o @ v @ written[writer][token] * pattern[token] / activations.scalar(2)[token]).detach()
        path = logits(record)[record.axis("writer").index(writer), token]
        assert float(path) == pytest.approx(float(expected), rel=1e-9)
    assert record.axis("writer").labels == ("embed", *(f"L0H{i}" for i in range(6)), "L0.mlp")


def test_a_planted_path_is_the_strongest_and_its_mirror_is_nothing() -> None:
    """L0H1 writes b where it reads a; L2H3 turns b into the answer: only what reads b tells the logit through it."""
    model: Any = blank()
    base, a, b, answer = frame(3).T[:4]
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = 4 * base
        model.model.embed_tokens.weight[1] += a
        model.lm_head.weight[1] = answer / model.model.norm.weight
    plant_head(model, 0, 1, torch.outer(b, a))
    plant_head(model, 1, 2, torch.outer(a, b))
    plant_head(model, 2, 3, 9 * torch.outer(answer, b))
    stream = vw.open(model).to(torch.float64)
    record = Route("L2H3", 1)(Run.on_prompt(stream, [0, 0, 1], model=model))
    best = next(record.top(1, "logit").rows())
    assert (best["writer"], best["token"]) == ("L0H1", "2")
    assert record.stamp["direct"] > 0.01
    assert logits(record).sum(1)[record.axis("writer").index("L1H2")].abs() < 1e-9


def test_a_wrong_pattern_or_gate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, prompt = run_of("gpt2")
    assert CONSTANT in Route("L1H2", 5)(prompt).axis("writer").labels
    assert Route("L1.mlp", 5, position=3)(prompt).axis("token").labels == ("3",)
    activations = prompted(prompt, "pattern")
    places: list[tuple[Place, str]] = [(("pattern", "L1.attn"), "L1H2"), (("in", "L1.mlp"), "L1.mlp")]
    for place, part in places:
        wrong = replace(activations, signals={**activations.signals, place: activations.signals[place].roll(1, 0)})
        monkeypatch.setattr(f"{Route.__module__}.prompted", lambda *_, wrong=wrong: wrong)
        assert Route(part, 5)(prompt).stamp["error"] > 1e-3


@pytest.mark.parametrize("wrong", [("L9H0", 5), ("embed", 5), ("L1H0", 99), ("L1H0", 5, 99), ("L1H0", 5, None, 8)])
def test_what_is_no_path_is_refused(wrong: tuple[Any, ...]) -> None:
    _, prompt = run_of("gpt2")
    with pytest.raises(UsageError, match="expected"):
        Route(*wrong)(prompt)
    assert not any(signal == "pattern" for signal, _ in prompted(prompt).signals)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = tiny("llama-full")
    model.save_pretrained(tmp_path / "m")
    base = ["trace", str(tmp_path / "m"), "--prompt-ids", "3,14,15,9", "--token", "5", "--against", "9", "--through"]
    assert run([*base, "L1H2", "--top", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    record = Route("L1H2", 5, 9)(Run.on_prompt(vw.open(tmp_path / "m"), TOKENS[:4]))
    best = sorted(record.rows(), key=lambda row: -abs(float(row["logit"] or 0)))[:4]
    assert [(row["writer"], row["token"]) for row in answer["rows"]] == [(row["writer"], row["token"]) for row in best]
    assert answer["stamp"]["direct"] == pytest.approx(record.stamp["direct"], rel=1e-4)
    assert answer["summary"]["error"] < 1e-4
    assert run([*base, "L1.mlp"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "what L1.mlp contributes to the logit of 5 less that of 9" in out
    assert "L1.mlp adds" in out
    assert run([*base, "L1H2", "--lens"]) == 2
    assert run([*base, "L1H9"]) == 2
