"""Utility is a derivative, interference an energy, the policy an optimum; a planted eraser is found with its sign."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import contributions
from planting import D, blank, frame, plant_head, plant_neuron, quiet
from regauge import rebased, rotated
from tiny_models import SHAPES, flow, in_float64, tiny
from torch import Tensor, nn
from uniform import sizes

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime.fate.frontier import ErasurePolicy, Frontier
from virtual_weights.runtime.fate.written_units import WrittenUnits, written_units
from virtual_weights.runtime.running.hooks import module_of
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import repeated_tokens
from virtual_weights.stream import Label, Stream, parse
from virtual_weights.stream.group import WRITINGS

TOKENS = torch.randint(0, 37, (3, 6), generator=torch.Generator().manual_seed(8))
FAMILIES = ["llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary"]
STEP = 1e-5

pytestmark = pytest.mark.usefixtures("full_precision")


def units(model: nn.Module, stream: Stream, batch: int = 2) -> WrittenUnits:
    return written_units(Run.on_tokens(stream, TOKENS, model=model), batch=batch)


def answers(model: nn.Module, stream: Stream, **options: Any) -> tuple[Record, Record]:
    """Frontier and policy of one run."""
    run = Run.on_tokens(stream, TOKENS, model=model)
    frontier, policy = dict(Frontier.together([Frontier(**options), ErasurePolicy()], run)).values()
    return frontier, policy


@torch.no_grad()
def loss(model: nn.Module, stream: Stream, label: Label, place: tuple[int, int], fraction: float) -> float:
    """The summed loss when what a writer wrote at one token is moved this far towards its mean, by its own module."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.expand(len(TOKENS), *tensor.shape[1:]).clone()
        tensor[place] += fraction * (tensor[:, :-1].mean((0, 1)) - tensor[place])
        return tensor

    def before(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads = given[0].unflatten(-1, (sizes(stream).n_heads, -1)).clone()
        heads[:, :, label.index] = moved(heads[:, :, label.index])
        return (heads.flatten(2),)

    module = module_of(model, stream, WRITINGS[label.kind], stream.groups.of(label).id)
    if label.kind == "head":
        hook = module.register_forward_pre_hook(before)
    else:
        hook = module.register_forward_hook(lambda _module, _given, output: moved(output))
    logits = model(TOKENS).logits
    hook.remove()
    return float(-logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None]).sum())


@pytest.mark.parametrize("name", SHAPES)
def test_utility_is_the_derivative_of_the_loss(name: str) -> None:
    model, stream = in_float64(name)
    measured = units(model, stream)
    last = stream.spec.n_layers - 1
    names = ["embed", "L0H1", "L0.mlp", f"L{last}H3", f"L{last}.mlp", *(["pos"] if name.startswith("gpt2") else [])]
    for writer in names:
        for place in ((0, 0), (2, 3), (1, 4)):
            ends = [loss(model, stream, parse(writer), place, step) for step in (STEP, -STEP)]
            utility = float(measured.utility[measured.writers.index(writer), place[0] * 5 + place[1]])
            assert utility == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-5, abs=1e-8)


def twin(model: nn.Module, stream: Stream) -> dict[str, tuple[Tensor, Tensor, str]]:
    """Interference, erasure and intended reader of every writer, from the definitions, with every product formed."""
    runs = [contributions(stream, flow(model, row), row) for row in TOKENS]
    wrote = [(p, torch.cat([run[i][1][:-1] for run in runs])) for i, (p, _) in enumerate(runs[0])]
    states = [sum(y for q, y in wrote if q <= p) for p in range(stream.states)]
    readers: dict[str, tuple[int, Tensor]] = {}
    for c in stream.components:
        if c.reads is not None:
            ports = {"head": ("Q", "K", "V"), "unembed": ("unembed",)}.get(c.kind, ("gate", "up"))
            ports = ("in",) if c.kind == "mlp" and not stream.spec.gated else ports
            name = f"L{c.label.layer}.attn" if c.kind == "head" else str(c.label)
            rows = [stream.read(port, name).maps.flatten(0, 1) for port in ports]
            readers[name] = (c.reads, torch.cat(rows))
    units = {}
    for c, (q, y) in zip([c for c in stream.components if c.writes is not None], wrote, strict=True):
        shares = {}
        for name, (p, rows) in readers.items():
            s = stream.scale(states[p])
            put, received = ((v @ rows.T).square().sum(1) / s**2 for v in (y, states[p]))
            if q <= p:
                shares[name] = put / received.mean()
        intended = max(shares, key=lambda name: float(shares[name].mean()))
        others = [share for name, share in shares.items() if name != intended]
        seen = y - y.mean(1, keepdim=True) if sizes(stream).norm == "layer" else y  # no reader sees a mean
        change = ((states[-1] - states[q]) * seen).sum(1) / seen.square().sum(1)
        units[str(c.label)] = (sum(others, torch.zeros(len(y))), (-change).clamp(0, 1), intended)
    return units


@pytest.mark.parametrize("name", SHAPES)
def test_interference_and_erasure_equal_a_naive_twin(name: str) -> None:
    model, stream = in_float64(name)
    measured, expected = units(model, stream), twin(model, stream)
    assert set(measured.writers) == {writer for writer in expected if not writer.endswith(".bias")}
    for i, writer in enumerate(measured.writers):
        others, erased, intended = expected[writer]
        torch.testing.assert_close(measured.interference[i], others.double(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(measured.erased[i], erased, rtol=1e-9, atol=1e-12)
        assert measured.intended[i] == intended
    last = measured.writers.index(f"L{stream.spec.n_layers - 1}.mlp")
    assert measured.intended[last] == "unembed"
    assert not measured.interference[last].any()  # nobody else can read it
    assert not measured.erased[last].any()  # and nobody comes after it
    assert measured.interference[:last].gt(0).any()
    assert measured.erased.gt(0).any()


def test_batches_change_nothing_and_parameters_get_no_gradient() -> None:
    model, stream = in_float64("gpt2")
    whole, parts = units(model, stream, 3), units(model, stream, 1)
    same(whole, parts)
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.requires_grad_(False)
    same(whole, units(model, stream))


def same(a: WrittenUnits, b: WrittenUnits, rtol: float = 1e-9) -> None:
    assert a.writers == b.writers
    assert a.intended == b.intended
    for name in ("utility", "interference", "erased"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("name", ["llama-full", "llama-grouped-untied"])
def test_free_of_the_basis_of_the_stream(name: str) -> None:
    model, stream = in_float64(name)
    turned = rotated(model, 1)
    same(units(model, stream), units(turned, vw.open(turned).to(torch.float64)), 1e-7)


def test_utility_and_erasure_are_free_of_the_bases_of_heads() -> None:
    """Interference is not: energy at a port is measured in the port's own basis."""
    model, _ = in_float64("gpt2")  # no rotary: all of a head's bases are free, but for its biases
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "c_attn.bias" in key or "ln_1.bias" in key:  # a norm's shift is a bias to the heads as well
                p.zero_()
    other = rebased(model, 2)
    first, second = (units(module, vw.open(module).to(torch.float64)) for module in (model, other))
    torch.testing.assert_close(first.utility, second.utility, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(first.erased, second.erased, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(first.interference, second.interference, rtol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_policy_is_worth_more_than_the_optimum(name: str) -> None:
    model, stream = in_float64(name)
    measured = units(model, stream)
    generator = torch.Generator().manual_seed(3)
    for price in (0.0, 0.01, 0.3, 2.0, 100.0):
        best = measured.optimum(price)
        most = measured.value(best, price)
        others = [torch.rand(best.shape, generator=generator) for _ in range(5)]
        others += [torch.rand(best.shape, generator=generator).round() for _ in range(5)]
        others += [torch.zeros_like(best), torch.ones_like(best), measured.erased, measured.optimum(2 * price + 0.1)]
        assert all(most >= measured.value(policy.to(best), price) for policy in others)
        for unit in range(0, best.numel(), 7):  # turning any one decision round gains nothing
            changed = best.clone().flatten()
            changed[unit] = 1 - changed[unit]
            assert measured.value(changed.view_as(best), price) <= most
    assert torch.equal(measured.optimum(0.0), (measured.utility < 0).double())


def erases(u: Tensor, i: Tensor, price: float) -> Tensor:
    """What the best policy erases; at a price that is a unit's own it stays, whatever machine has rounded it."""
    return u < price * i - 1e-12 * u.abs()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_records_are_what_the_units_say(name: str) -> None:
    model, stream = in_float64(name)
    measured, (frontier, policy) = units(model, stream), answers(model, stream)
    u, i, m = measured.utility, measured.interference, measured.erased
    rows = list(frontier.rows())
    assert [row["price"] for row in rows] == ["0", "5%", "10%", "25%", "50%", "75%", "90%", "95%"]
    both = (u > 0) & (i > 0)
    for row in rows:
        price = float(row["lambda"] or 0)
        gain = u - price * i
        best = erases(u, i, price)
        expected = {
            "optimal": gain.clamp(min=0).mean(),
            "model": ((1 - m) * gain).mean(),
            "shuffled": torch.outer(1 - m.flatten(), gain.flatten()).mean(),
            "keep_all": gain.mean(),
            "erase_all": 0.0,
            "erased_by_optimal": best.double().mean(),
            "erased_by_model": m.mean(),
            "agreement": ((m > 0.5) == best).double().mean(),
            "chance": ((m > 0.5).flatten()[:, None] == best.flatten()).double().mean(),
        }
        for column, value in expected.items():
            assert row[column] == pytest.approx(float(value), rel=1e-9, abs=1e-12), column
        if str(row["price"]).endswith("%"):
            lost = float((best & both).double().sum() / both.sum())
            assert lost == pytest.approx(float(str(row["price"])[:-1]) / 100, abs=1.5 / int(both.sum()))
    assert rows[0]["lambda"] == 0
    assert rows[0]["erased_by_optimal"] == float((u < 0).double().mean())
    median = policy.stamp["median_price"]
    assert median == rows[4]["lambda"]
    for w, row in enumerate(policy.rows()):
        assert (row["writer"], row["intended"]) == (measured.writers[w], measured.intended[w])
        means = (u[w], i[w], erases(u[w], i[w], median).double(), m[w])
        for column, x in zip(("utility", "interference", "erased_by_optimal", "erased_by_model"), means, strict=True):
            assert row[column] == pytest.approx(float(x.mean()), rel=1e-9, abs=1e-12)


def planted(sign: float) -> tuple[nn.Module, Stream]:
    """L0H0 writes on a direction that MLPs read and the unembedding does not; L1N0 takes it back where sign is -1."""
    model, e = blank(), frame(4)
    generator = torch.Generator().manual_seed(0)
    plant_head(model, 0, 0, torch.outer(e[:, 2], e[:, 1]))
    plant_neuron(model, 0, 0, e[:, 2], e[:, 3])  # reads it, says nothing: its gate is shut
    angle = 2 * math.pi * torch.rand(37, generator=generator, dtype=torch.float64)
    length = 10 / math.sqrt(109 / D)  # every token is 10 along the first direction, and 3 in the plane of two others
    write = sign * (1 + math.exp(-length)) / length * math.sqrt(109 / D) / 10
    plant_neuron(model, 1, 0, 10 * e[:, 2], write * e[:, 2])
    with torch.no_grad():
        mlp, gain = model.model.layers[1].mlp, model.model.layers[1].post_attention_layernorm.weight
        mlp.gate_proj.weight[0] = e[:, 0] / gain
        plane = torch.stack([angle.cos(), angle.sin()], 1) @ e[:, [1, 3]].T
        model.model.embed_tokens.weight.copy_(10 * e[:, 0] + 3 * plane)
        readout = torch.randn(37, 3, generator=generator, dtype=torch.float64)
        model.lm_head.weight.copy_(readout @ e[:, [0, 1, 3]].T / model.model.norm.weight)
    return model, vw.open(model).to(torch.float64)


def test_a_planted_eraser_is_found_and_turned_round_is_not() -> None:
    model, stream = planted(-1)
    measured = units(model, stream)
    place = measured.writers.index("L0H0")
    assert measured.intended[place] == "L0.mlp"
    assert measured.erased[place].min() > 0.95
    best = measured.optimum(0.001)
    assert best[place].all()  # it disturbs another MLP and helps nobody
    assert not best[measured.writers.index("embed")].all()
    row = next(row for row in answers(model, stream)[1].rows() if row["writer"] == "L0H0")
    assert row["erased_by_model"] == pytest.approx(float(measured.erased[place].mean()))
    model, stream = planted(1)
    assert not units(model, stream).erased[place].any()


def test_who_writes_nothing_is_absent() -> None:
    model = quiet()
    frontier, policy = answers(model, vw.open(model).to(torch.float64))
    assert {row["writer"] for row in policy.rows()} == {"embed", "L0.mlp", "L1.mlp", "L2.mlp"}
    assert policy.stamp["units"] == 4 * 15
    assert all(math.isfinite(float(row["agreement"] or 0)) for row in frontier.rows())


def test_prices_and_refusals() -> None:
    model, stream = in_float64("llama-full")
    frontier, _ = answers(model, stream, prices=(0.5, 0.0))
    assert [(row["price"], row["lambda"]) for row in frontier.rows()] == [("0.5", 0.5), ("0.0", 0.0)]
    for prices in ((), (-1.0,), (math.nan,), (math.inf,), (1.0, 1.0)):
        with pytest.raises(UsageError, match="prices"):
            Frontier(prices)
    for tokens in (TOKENS[0], TOKENS.double()):
        with pytest.raises(UsageError, match="tokens of shape"):
            Run.on_tokens(stream, tokens, model=model)
    with pytest.raises(UsageError, match="chunks of 1 tokens, of which the first 1"):
        Frontier()(Run.on_tokens(stream, TOKENS[:, :1], model=model))
    with pytest.raises(UsageError, match="gain"):
        answers(model, vw.open(model, fold=False))
    silent = blank()
    with pytest.raises(UsageError, match="no unit both helps"):
        answers(silent, vw.open(silent))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-grouped-untied").save_pretrained(tmp_path)
    line = ["frontier", str(tmp_path), "--repeated", "--length", "8", "--tokens", "30"]
    assert run([*line, "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    questions = [Frontier(), ErasurePolicy()]
    records = dict(Frontier.together(questions, Run.on_tokens(vw.open(tmp_path), repeated_tokens(37, 4, 3), first=4)))
    assert given["summary"]["units"] == 3 * 7 * 22
    (policy,) = given["more"]
    for answer, record in zip((given, policy), records.values(), strict=True):
        assert answer["question"] == record.question
        assert_rows(answer["rows"], record)
    assert run([*line, "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "50%" in shown
    assert "erases more than the optimal policy" in shown
    assert run([*line, "--text", "x"]) == 2


def assert_rows(rows: list[dict[str, object]], record: Record) -> None:
    for row, wanted in zip(rows, record.rows(), strict=True):
        assert row.keys() == wanted.keys()
        for key, x in wanted.items():
            assert row[key] == (pytest.approx(x, rel=1e-5, abs=1e-7) if isinstance(x, float) else x)
