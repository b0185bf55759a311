"""What a part tells a logit, split over writers and tokens: the paths add up to it, on every family."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import blank, frame, plant_head
from tiny_models import SHAPES, norms_in_full_precision, tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import module_of
from virtual_weights.runtime.flow.route import route
from virtual_weights.runtime.flow.trace import CONSTANT, Passage, passage

TOKENS = torch.tensor([3, 14, 15, 9, 2, 6, 5, 35])


def run_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, vw.Stream, Passage]:
    model: Any = tiny(name, dtype=dtype)
    stream = vw.open(model).to(torch.float64)
    with norms_in_full_precision():
        return model, stream, passage(stream, TOKENS, model, patterns=True)


def logits(record: Record) -> Tensor:
    found = record["logit"]
    assert isinstance(found, Tensor)
    return found


def own_contribution(model: Any, stream: vw.Stream, part: str, token: int, against: int, t: int) -> float:
    """By the model's own modules: the logits of what the part writes, under the final norm's scalar of the run."""
    layer, role = int(part[1]), "o" if "H" in part else "down"
    module, norm = module_of(model, stream, role, layer), module_of(model, stream, "final_norm")
    seen: dict[str, Tensor] = {}
    hooks = [module.register_forward_pre_hook(lambda _, given: seen.update(inner=given[0]))]
    hooks.append(norm.register_forward_pre_hook(lambda _, given: seen.update(x=given[0])))
    with torch.no_grad(), norms_in_full_precision():
        model(TOKENS[None])
        for hook in hooks:
            hook.remove()
        inner, k = seen["inner"][0, t].clone(), stream.spec.d_head
        if "H" in part:
            own = slice(int(part[3:]) * k, (int(part[3:]) + 1) * k)
        else:
            own = slice(int(part[3:]), int(part[3:]) + 1) if "N" in part else slice(None)
        other = inner.clone()
        other[own] = 0
        exact = deepcopy(module).double()  # a neuron is a small difference of two large outputs
        wrote, x = exact(inner.double()) - exact(other.double()), seen["x"][0, t].double()
        if stream.spec.norm == "layer":
            wrote, x = wrote - wrote.mean(), x - x.mean()
        s = (x.square().mean() + stream.spec.norm_eps).sqrt()
        weight = module_of(model, stream, "unembed").weight
        assert isinstance(weight, Tensor)
        gain: Any = norm.weight
        return float((weight[token] - weight[against]).double() @ (wrote / s * gain.double()))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SHAPES)
def test_paths_add_up_to_what_the_part_tells_the_logit(name: str, dtype: torch.dtype, bound: float) -> None:
    model, stream, seen = run_of(name, dtype)
    for part in ("L0H1", "L1H0", "L1H3", "L0.mlp", "L1.mlp", "L1N5"):
        for t in (0, 4, -1):
            record = route(seen, part, 5, 9, t)
            own = own_contribution(model, stream, part, 5, 9, t)
            size = float(logits(record).abs().sum())
            assert record.stamp["error"] < bound, (part, t)
            assert float(logits(record).sum()) == pytest.approx(own, rel=bound, abs=bound * size), (part, t)
            assert record.stamp["direct"] == pytest.approx(own, rel=bound, abs=bound * size)
            assert size > 1e-4


def test_each_path_is_what_one_writer_at_one_token_adds() -> None:
    """From the definition: the head's value at one token, made of one writer alone, through its pattern."""
    model, stream, seen = run_of("llama-grouped-untied")
    record = route(seen, "L1H4", 5)
    block, head = model.model.layers[1], slice(16, 20)
    v = block.self_attn.v_proj.weight[4:8] * block.input_layernorm.weight
    o, pattern = block.self_attn.o_proj.weight[:, head], seen.seen["pattern", 1][4, -1]
    r = model.lm_head.weight[5] * model.model.norm.weight / seen.scalar(stream.states - 1)[-1]
    wrote = dict(seen.written(2))
    for writer, token in (("embed", 2), ("L0H3", 5), ("L0.mlp", 7)):
        expected = (r @ o @ v @ wrote[writer][token] * pattern[token] / seen.scalar(2)[token]).detach()
        own = logits(record)[record.axis("writer").index(writer), token]
        assert float(own) == pytest.approx(float(expected), rel=1e-9)
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
    with norms_in_full_precision():
        record = route(passage(stream, torch.tensor([0, 0, 1]), model, patterns=True), "L2H3", 1)
    best = next(record.top(1, "logit").rows())
    assert (best["writer"], best["token"]) == ("L0H1", "2")
    assert record.stamp["direct"] > 0.01
    assert logits(record).sum(1)[record.axis("writer").index("L1H2")].abs() < 1e-9


def test_a_wrong_pattern_or_gate_is_noticed() -> None:
    _, stream, seen = run_of("gpt2")
    for kind, part in (("pattern", "L1H2"), ("in", "L1.mlp")):
        other = dict(seen.seen)
        other[kind, 1] = other[kind, 1].roll(1, 0)  # type: ignore[index]
        assert route(Passage(stream, TOKENS, other, seen.logits), part, 5).stamp["error"] > 1e-3  # type: ignore[arg-type]
    assert CONSTANT in route(seen, "L1H2", 5).axis("writer").labels
    assert route(seen, "L1.mlp", 5, position=3).axis("token").labels == ("3",)


@pytest.mark.parametrize("wrong", [("L9H0", 5), ("embed", 5), ("L1H0", 99), ("L1H0", 5, 99), ("L1H0", 5, None, 8)])
def test_what_is_no_path_is_refused(wrong: tuple[Any, ...]) -> None:
    _, stream, seen = run_of("gpt2")
    with pytest.raises(UsageError, match="expected"):
        route(seen, *wrong)
    bare = passage(stream, TOKENS, tiny("gpt2"))
    assert not any(kind == "pattern" for kind, _ in bare.seen)
    with pytest.raises(UsageError, match="no pattern"):
        route(bare, "L1H0", 5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = tiny("llama-full")
    model.save_pretrained(tmp_path / "m")
    base = ["trace", str(tmp_path / "m"), "--ids", "3,14,15,9", "--token", "5", "--against", "9", "--through"]
    assert run([*base, "L1H2", "--top", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    record = route(passage(vw.open(tmp_path / "m"), TOKENS[:4], patterns=True), "L1H2", 5, 9)
    best = sorted(record.rows(), key=lambda row: -abs(float(row["logit"] or 0)))[:4]
    assert [(row["writer"], row["token"]) for row in told["rows"]] == [(row["writer"], row["token"]) for row in best]
    assert told["direct"] == pytest.approx(record.stamp["direct"], rel=1e-4)
    assert told["error"] < 1e-4
    assert run([*base, "L1.mlp"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "what L1.mlp tells the logit of 5 less that of 9" in out
    assert "L1.mlp adds" in out
    assert run([*base, "L1H2", "--lens"]) == 2
    assert run([*base, "L1H9"]) == 2
