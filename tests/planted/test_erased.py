"""Erasure on text equals the definition token by token, and planted erasers are classified."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from operating import operate
from planting import TOKENS, D, blank, echo, frame, plant_head, plant_neuron
from regauge import rebased, rotated
from tiny_models import flow, norms_in_full_precision, tiny
from torch import Tensor, nn
from uniform import sizes

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.record import Record
from virtual_weights.runtime.fate.erased import Erased
from virtual_weights.runtime.running.activations import prompted
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import PADDING

ROWS = (torch.tensor([3, 17, 5, 5, 30, 1, 22, 8, 9]), torch.tensor([4, 28, 11, 0, 12]), torch.tensor([36, 2, 2]))
NUMBERS = ("mean", "spread", "erased", "overshot", "strengthened", "bimodality", "tokens")
FAMILIES = ("llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary")


def erased(model: nn.Module, tokens: Tensor | Iterable[Tensor], batch: int = 4, **thresholds: float) -> Record:
    with norms_in_full_precision():
        return Erased(**thresholds)(Run.on_tokens(vw.open(model), tokens, model=model, batch=batch))


def row(record: Record, name: str) -> dict[str, object]:
    return next(r for r in record.rows() if r["eraser"] == name)


def token_by_token(model: nn.Module) -> dict[str, Tensor]:
    """Coefficients (tokens,) from the definition: what is taken away over what is there, one row at a time."""
    stream = vw.open(model).to(torch.float64)
    coefficients: dict[str, list[Tensor]] = {}
    for tokens in ROWS:
        with norms_in_full_precision():
            activations = prompted(Run.on_prompt(stream, tokens, model=model))
        signals, (point, _) = flow(model, tokens), operate(model, stream, tokens)
        written = dict(activations.written(stream.states - 1))
        for component in stream.components:
            if component.kind in ("head", "mlp"):
                x, y = activations.state(component.reads), written[str(component.label)]
                if sizes(stream).norm == "layer":  # no reader sees a mean
                    x, y = (v - v.mean(1, keepdim=True) for v in (x, y))
                left = ((x + y) * y).sum(1) / (x * y).sum(1)  # of what x has along y
                coefficients.setdefault(str(component.label), []).append(1 - left)
        for layer, group in enumerate(stream.groups.mlps):
            port = "up" if stream.spec.gated else "in"
            read, out = stream.read(port, group).maps[0], stream.write(group)[0]
            for n in range(sizes(stream).d_mlp):
                erasure = -(out[:, n] @ read[n]) * signals.mlp_inner[layer][:, n]
                received = signals.reads[port, layer][:, n] * point.scalars[group.id]  # <w, x> + s b
                coefficients.setdefault(f"L{layer}N{n}", []).append(erasure / received)
    return {name: torch.cat(parts) for name, parts in coefficients.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_figures_are_those_of_the_tokens(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    record, twin = erased(model, ROWS, batch=2), token_by_token(model)
    assert set(record.axis("eraser").labels) == set(twin)
    for eraser in record.rows():
        c = twin[str(eraser["eraser"])]
        cut = c if eraser["kind"] == "neuron" else c.clamp(-4, 4)
        z = (cut - cut.mean()) / cut.std(correction=0)
        expected = {
            "mean": cut.mean(),
            "spread": cut.std(correction=0),
            "erased": ((c >= 0.5) & (c <= 1.5)).double().mean(),
            "overshot": (c > 1.5).double().mean(),
            "strengthened": (c < 0).double().mean(),
            "bimodality": (z.pow(3).mean() ** 2 + 1) / z.pow(4).mean(),
            "tokens": 17,
        }
        assert {k: eraser[k] for k in NUMBERS} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-6)
        share = eraser["erased"]
        word = None if not share else "unconditional" if share >= 0.9 else "conditional" if share >= 0.1 else "rare"
        assert eraser["verdict"] == ("overshoots" if eraser["overshot"] > max(share, 0.1 - 1e-9) else word)
    assert {row["verdict"] for row in record.rows()} >= {None, "conditional"}


def test_neither_the_split_nor_padding_matters() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    whole = erased(model, ROWS)
    padded = torch.nn.utils.rnn.pad_sequence([*ROWS, ROWS[2][:0]], batch_first=True, padding_value=PADDING)
    for other in (erased(model, ROWS, batch=1), erased(model, padded, batch=2)):
        assert other.stamp["tokens"] == whole.stamp["tokens"] == 17
        for name in NUMBERS:
            torch.testing.assert_close(other[name], whole[name], equal_nan=True)
    assert erased(model, padded, batch=1).stamp["run"] == whole.stamp["run"]
    assert erased(model, [torch.cat(ROWS)]).stamp["run"] != whole.stamp["run"]


def test_figures_do_not_depend_on_the_gauge() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    record = erased(model, ROWS)
    values = rebased(model, 1)
    with torch.no_grad():  # rotary stands between queries and keys: in a run they keep their basis
        for layer, original in zip(values.model.layers, model.model.layers, strict=True):
            for part in ("q_proj", "k_proj"):
                layer.self_attn.get_submodule(part).load_state_dict(original.self_attn.get_submodule(part).state_dict())
    for other in (values, rotated(model, 2)):
        changed = erased(other, ROWS)
        for name in NUMBERS:
            torch.testing.assert_close(changed[name], record[name], rtol=1e-6, atol=1e-8, equal_nan=True)


def gated_neuron(closed: Tensor, gain: float = 1.0) -> nn.Module:
    """A neuron that takes ``gain`` of what it reads from tokens, and nothing from those where its gate is closed.

    Every token is ``±axis 0 + 0.1 axis 1`` of one length, so that slope and norm scalar are known and set off.
    """
    model, axes = blank(), frame(6)
    sign = torch.where(closed, -1.0, 1.0).double()
    s = ((1 + 0.01) / D + model.config.rms_norm_eps) ** 0.5
    slope = float(torch.nn.functional.silu(torch.tensor(10 / s, dtype=torch.float64)))
    read = 3 * axes[:, 1] + axes[:, 2]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(sign[:, None] * axes[:, 0] + 0.1 * axes[:, 1])
        mlp, norm = model.model.layers[1].mlp, model.model.layers[1].post_attention_layernorm.weight
        mlp.gate_proj.weight[0] = 10 * axes[:, 0] / norm
    plant_neuron(model, 1, 0, read, -gain * read / read.square().sum() * s / slope)
    return model


EVERY = torch.arange(TOKENS)[None, :30]


def test_a_neuron_that_always_clears_is_unconditional() -> None:
    none = torch.zeros(TOKENS, dtype=torch.bool)
    always = row(erased(gated_neuron(none), EVERY), "L1N0")
    assert always["verdict"] == "unconditional"
    assert (always["mean"], always["erased"], always["strengthened"]) == (pytest.approx(1, rel=1e-9), 1, 0)
    assert always["spread"] == pytest.approx(0, abs=1e-9)
    assert always["bimodality"] is None  # a spread of rounding has no form
    turned = row(erased(gated_neuron(none, -1.0), EVERY), "L1N0")
    assert (turned["verdict"], turned["erased"], turned["strengthened"]) == (None, 0, 1)
    assert turned["mean"] == pytest.approx(-1, rel=1e-9)
    over = row(erased(gated_neuron(none, 2.0), EVERY), "L1N0")
    assert (over["mean"], over["verdict"]) == (pytest.approx(2, rel=1e-9), "overshoots")
    assert (over["erased"], over["overshot"]) == (0, 1)
    assert row(erased(gated_neuron(none, 1.4), EVERY), "L1N0")["verdict"] == "unconditional"
    once = row(erased(gated_neuron(torch.arange(TOKENS) != 7, 9.0), EVERY), "L1N0")
    assert (once["verdict"], once["overshot"]) == (None, pytest.approx(1 / 30))


def test_a_gate_that_opens_on_some_tokens_makes_it_conditional() -> None:
    half = row(erased(gated_neuron(torch.arange(TOKENS) % 2 == 0), EVERY), "L1N0")
    assert (half["verdict"], half["erased"]) == ("conditional", 0.5)
    assert half["bimodality"] == pytest.approx(1, rel=1e-6)
    assert half["spread"] == pytest.approx(0.5, rel=1e-6)
    seldom = gated_neuron(torch.arange(TOKENS) != 7)
    assert row(erased(seldom, EVERY), "L1N0")["verdict"] == "rare"
    assert row(erased(seldom, EVERY, seldom=0.02), "L1N0")["verdict"] == "conditional"
    twice = gated_neuron(torch.zeros(TOKENS, dtype=torch.bool), 0.4)
    assert row(erased(twice, EVERY), "L1N0")["verdict"] is None
    assert row(erased(twice, EVERY, clears=0.3), "L1N0")["verdict"] == "unconditional"


@pytest.mark.parametrize(
    ("gain", "mean", "verdict"), [(1.0, 1, "unconditional"), (-1, -1, None), (10, 4, "overshoots")]
)
def test_a_head_that_takes_away_what_it_stands_on(gain: float, mean: float, verdict: str | None) -> None:
    """Alone in its row a token attends to itself; its content lies in the four dimensions of the head."""
    record = erased(echo(-gain), EVERY.T)
    head = row(record, "L1H2")
    assert (head["mean"], head["verdict"], head["kind"]) == (pytest.approx(mean, rel=1e-9), verdict, "head")
    assert (head["erased"], head["overshot"]) == (float(gain == 1), float(gain == 10))
    assert "L1H1" not in [eraser["eraser"] for eraser in record.rows()], "a head that writes nothing has no coefficient"
    assert int(record["tokens"][record.axis("eraser").index("L1H1")]) == 0


def test_tokens_without_a_coefficient_do_not_count() -> None:
    """A head that reflects e0 (c = 2, or 1 where it is long), writes e6 where it finds e1, and nothing on e2."""
    model, e = blank(), torch.eye(D, dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(e[torch.arange(TOKENS) % 3])
        model.model.embed_tokens.weight[:15] *= 2
    s = (1 / D + model.config.rms_norm_eps) ** 0.5
    plant_head(model, 1, 2, s * (torch.outer(e[6], e[1]) - 2 * torch.outer(e[0], e[0])))
    head = row(erased(model, EVERY.T, batch=20), "L1H2")
    assert (head["tokens"], head["erased"], head["overshot"], head["verdict"]) == (10, 0.5, 0.5, "conditional")
    assert head["mean"] == pytest.approx(1.5, rel=1e-4)
    assert head["spread"] == pytest.approx(0.5, rel=1e-4)
    assert head["bimodality"] == pytest.approx(1, rel=1e-4)


def test_what_cannot_be_run_is_refused() -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    with pytest.raises(vw.VirtualWeightsError, match="padding before a token"):
        Run.on_tokens(stream, torch.tensor([[PADDING, 3]]), model=model)
    with pytest.raises(vw.VirtualWeightsError, match="no tokens"):
        Run.on_tokens(stream, [], model=model)
    with pytest.raises(vw.VirtualWeightsError, match="norm gains out"):
        Erased()(Run.on_tokens(vw.open(model, fold=False), ROWS, model=model))
    with pytest.raises(vw.VirtualWeightsError, match="thresholds"):
        Erased(always=0.05)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama-grouped-untied")
    model.save_pretrained(tmp_path)
    asked = ["erased", str(tmp_path), "--repeated", "--tokens", "64", "--length", "16"]
    assert run([*asked, "--kind", "head", "--top", "2", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    counts = given["summary"]["counts"]
    assert given["stamp"]["tokens"] == 64
    assert {kind: sum(row.values()) for kind, row in counts.items()} == {"neuron": 120, "head": 18, "mlp": 3}
    assert 0 < len(given["rows"]) <= 4
    assert {row["kind"] for row in given["rows"]} == {"head"}
    assert run(asked) == 0
    assert "bimodality" in capsys.readouterr().out
    assert run([*asked, "--text", "a.txt"]) == 2
