"""Utility is a derivative, interference an energy, the policy an optimum; a planted eraser is found with its sign."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from exactness import contributions
from planting import D, blank, frame, plant_head, plant_neuron, quiet
from regauge import rebased, rotated
from tiny_models import SHAPES, flow, in_float64, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.cli import run
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import module_of
from virtual_weights.runtime.fate.frontier import Units, frontier, optimum, units, value
from virtual_weights.runtime.running.text import repeated_tokens
from virtual_weights.stream import Label, Stream, parse, scale

TOKENS = torch.randint(0, 37, (3, 6), generator=torch.Generator().manual_seed(8))
FAMILIES = ["llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary"]
STEP = 1e-5

pytestmark = pytest.mark.usefixtures("full_precision")


@torch.no_grad()
def loss(model: nn.Module, stream: Stream, label: Label, at: tuple[int, int], fraction: float) -> float:
    """The summed loss when what a writer wrote at one token is moved this far towards its mean, by its own module."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.expand(len(TOKENS), *tensor.shape[1:]).clone()
        tensor[at] += fraction * (tensor[:, :-1].mean((0, 1)) - tensor[at])
        return tensor

    def before(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads = given[0].unflatten(-1, (stream.spec.n_heads, -1)).clone()
        heads[:, :, label.index] = moved(heads[:, :, label.index])
        return (heads.flatten(2),)

    role = {"head": "o", "mlp": "down"}.get(label.kind, label.kind)
    module = module_of(model, stream, role, label.layer)
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
    found = units(stream, TOKENS, model)
    last = stream.spec.n_layers - 1
    names = ["embed", "L0H1", "L0.mlp", f"L{last}H3", f"L{last}.mlp", *(["pos"] if name.startswith("gpt2") else [])]
    for writer in names:
        for at in ((0, 0), (2, 3), (1, 4)):
            ends = [loss(model, stream, parse(writer), at, step) for step in (STEP, -STEP)]
            utility = float(found.utility[found.writers.index(writer), at[0] * 5 + at[1]])
            assert utility == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-5, abs=1e-8)


def twin(model: nn.Module, stream: Stream) -> dict[str, tuple[Tensor, Tensor, str]]:
    """Interference, erasure and intended reader of every writer, from the definitions, with every product formed."""
    runs = [contributions(stream, flow(model, row), row) for row in TOKENS]
    wrote = [(p, torch.cat([each[i][1][:-1] for each in runs])) for i, (p, _) in enumerate(runs[0])]
    states = [sum(y for q, y in wrote if q <= p) for p in range(stream.states)]
    blocks: dict[str, tuple[int, Tensor]] = {}
    for c in stream.components:
        if c.reads is not None:
            ports = {"head": ("Q", "K", "V"), "unembed": ("unembed",)}.get(c.kind, ("gate", "up"))
            ports = ("in",) if c.kind == "mlp" and not stream.spec.gated else ports
            name = f"L{c.label.layer}.attn" if c.kind == "head" else str(c.label)
            rows = [stream.read(port, c.label.layer).maps.flatten(0, 1) for port in ports]
            blocks[name] = (c.reads, torch.cat(rows))
    found = {}
    for c, (q, y) in zip([c for c in stream.components if c.writes is not None], wrote, strict=True):
        shares = {}
        for name, (p, rows) in blocks.items():
            s = scale(states[p], stream.spec.norm, stream.spec.norm_eps)
            put, received = ((v @ rows.T).square().sum(1) / s**2 for v in (y, states[p]))
            if q <= p:
                shares[name] = put / received.mean()
        intended = max(shares, key=lambda name: float(shares[name].mean()))
        others = [share for name, share in shares.items() if name != intended]
        kept = ((states[-1] - states[q]) * y).sum(1) / y.square().sum(1)
        found[str(c.label)] = (sum(others, torch.zeros(len(y))), (-kept).clamp(0, 1), intended)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_interference_and_erasure_equal_a_naive_twin(name: str) -> None:
    model, stream = in_float64(name)
    found, expected = units(stream, TOKENS, model), twin(model, stream)
    assert set(found.writers) == {writer for writer in expected if not writer.endswith(".bias")}
    for i, writer in enumerate(found.writers):
        others, erased, intended = expected[writer]
        torch.testing.assert_close(found.interference[i], others.double(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.erased[i], erased, rtol=1e-9, atol=1e-12)
        assert found.intended[i] == intended
    last = found.writers.index(f"L{stream.spec.n_layers - 1}.mlp")
    assert found.intended[last] == "unembed"
    assert not found.interference[last].any()  # nobody else can read it
    assert not found.erased[last].any()  # and nobody comes after it
    assert found.interference[:last].gt(0).any()
    assert found.erased.gt(0).any()


def test_batches_change_nothing_and_parameters_get_no_gradient() -> None:
    model, stream = in_float64("gpt2")
    whole, parts = units(stream, TOKENS, model, 3), units(stream, TOKENS, model, 1)
    same(whole, parts)
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.requires_grad_(False)
    same(whole, units(stream, TOKENS, model))


def same(a: Units, b: Units, rtol: float = 1e-9) -> None:
    assert a.writers == b.writers
    assert a.intended == b.intended
    for name in ("utility", "interference", "erased"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("name", ["llama-full", "llama-grouped-untied"])
def test_free_of_the_basis_of_the_stream(name: str) -> None:
    model, stream = in_float64(name)
    turned = rotated(model, 1)
    same(units(stream, TOKENS, model), units(vw.open(turned).to(torch.float64), TOKENS, turned), 1e-7)


def test_utility_and_erasure_are_free_of_the_bases_of_heads() -> None:
    """Interference is not: energy at a port is measured in the port's own basis."""
    model, _ = in_float64("gpt2")  # no rotary: all of a head's bases are free, but for its biases
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "c_attn.bias" in key or "ln_1.bias" in key:  # a norm's shift is a bias to the heads as well
                p.zero_()
    other = rebased(model, 2)
    own, changed = (units(vw.open(each).to(torch.float64), TOKENS, each) for each in (model, other))
    torch.testing.assert_close(own.utility, changed.utility, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(own.erased, changed.erased, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(own.interference, changed.interference, rtol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_policy_is_worth_more_than_the_optimum(name: str) -> None:
    model, stream = in_float64(name)
    found = units(stream, TOKENS, model)
    generator = torch.Generator().manual_seed(3)
    for price in (0.0, 0.01, 0.3, 2.0, 100.0):
        best = optimum(found, price)
        most = value(found, best, price)
        others = [torch.rand(best.shape, generator=generator) for _ in range(5)]
        others += [torch.rand(best.shape, generator=generator).round() for _ in range(5)]
        others += [torch.zeros_like(best), torch.ones_like(best), found.erased, optimum(found, 2 * price + 0.1)]
        assert all(most >= value(found, policy.to(best), price) for policy in others)
        for unit in range(0, best.numel(), 7):  # turning any one decision round gains nothing
            changed = best.clone().flatten()
            changed[unit] = 1 - changed[unit]
            assert value(found, changed.view_as(best), price) <= most
    assert torch.equal(optimum(found, 0.0), (found.utility < 0).double())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_records_are_what_the_units_say(name: str) -> None:
    model, stream = in_float64(name)
    found, told = units(stream, TOKENS, model), frontier(stream, TOKENS, model)
    u, i, m = found.utility, found.interference, found.erased
    rows = list(told.frontier.rows())
    assert [row["price"] for row in rows] == ["0", "5%", "10%", "25%", "50%", "75%", "90%", "95%"]
    both = (u > 0) & (i > 0)
    for row in rows:
        price = float(row["lambda"] or 0)
        kept = u - price * i
        best = kept < 0
        expected = {
            "optimal": kept.clamp(min=0).mean(),
            "model": ((1 - m) * kept).mean(),
            "shuffled": torch.outer(1 - m.flatten(), kept.flatten()).mean(),
            "keep_all": kept.mean(),
            "erase_all": 0.0,
            "erased_by_optimal": best.double().mean(),
            "erased_by_model": m.mean(),
            "agreement": ((m > 0.5) == best).double().mean(),
            "chance": ((m > 0.5).flatten()[:, None] == best.flatten()).double().mean(),
        }
        for column, wanted in expected.items():
            assert row[column] == pytest.approx(float(wanted), rel=1e-9, abs=1e-12), column
        if str(row["price"]).endswith("%"):
            lost = float((best & both).double().sum() / both.sum())
            assert lost == pytest.approx(float(str(row["price"])[:-1]) / 100, abs=1.5 / int(both.sum()))
    assert rows[0]["lambda"] == 0
    assert rows[0]["erased_by_optimal"] == float((u < 0).double().mean())
    median = told.policy.parameters["median_price"]
    assert median == rows[4]["lambda"]
    for w, row in enumerate(told.policy.rows()):
        assert (row["writer"], row["intended"]) == (found.writers[w], found.intended[w])
        means = (u[w], i[w], (u[w] < median * i[w]).double(), m[w])
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
    found = units(stream, TOKENS, model)
    place = found.writers.index("L0H0")
    assert found.intended[place] == "L0.mlp"
    assert found.erased[place].min() > 0.95
    best = optimum(found, 0.001)
    assert best[place].all()  # it disturbs another MLP and helps nobody
    assert not best[found.writers.index("embed")].all()
    row = next(row for row in frontier(stream, TOKENS, model).policy.rows() if row["writer"] == "L0H0")
    assert row["erased_by_model"] == pytest.approx(float(found.erased[place].mean()))
    model, stream = planted(1)
    assert not units(stream, TOKENS, model).erased[place].any()


def test_who_writes_nothing_is_absent() -> None:
    model = quiet()
    told = frontier(vw.open(model).to(torch.float64), TOKENS, model)
    assert {row["writer"] for row in told.policy.rows()} == {"embed", "L0.mlp", "L1.mlp", "L2.mlp"}
    assert told.policy.parameters["units"] == 4 * 15
    assert all(math.isfinite(float(row["agreement"] or 0)) for row in told.frontier.rows())


def test_prices_and_refusals() -> None:
    model, stream = in_float64("llama-full")
    told = frontier(stream, TOKENS, model, prices=[0.5, 0.0])
    assert [(row["price"], row["lambda"]) for row in told.frontier.rows()] == [("0.5", 0.5), ("0.0", 0.0)]
    for prices in ([], [-1.0], [math.nan], [math.inf], [1.0, 1.0]):
        with pytest.raises(UsageError, match="prices"):
            frontier(stream, TOKENS, model, prices=prices)
    for tokens in (TOKENS[0], TOKENS[:, :1], TOKENS.double()):
        with pytest.raises(UsageError, match="tokens of shape"):
            frontier(stream, tokens, model)
    with pytest.raises(UsageError, match="gain"):
        frontier(vw.open(model, fold=False), TOKENS, model)
    silent = blank()
    with pytest.raises(UsageError, match="no unit helps"):
        frontier(vw.open(silent), TOKENS, silent)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama-grouped-untied").save_pretrained(tmp_path)
    line = ["frontier", str(tmp_path), "--repeated", "--length", "8", "--tokens", "30"]
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = frontier(vw.open(tmp_path), repeated_tokens(37, 4, 3))
    assert found["units"] == 3 * 7 * 22
    for name, record in (("frontier", told.frontier), ("policy", told.policy)):
        assert_rows(found[name], record)
    assert run([*line, "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "50%" in shown
    assert "erases more than the policy" in shown
    assert run([*line, "--text", "x"]) == 2


def assert_rows(rows: list[dict[str, object]], record: Record) -> None:
    for row, wanted in zip(rows, record.rows(), strict=True):
        assert row.keys() == wanted.keys()
        for key, x in wanted.items():
            assert row[key] == (pytest.approx(x, rel=1e-5, abs=1e-7) if isinstance(x, float) else x)
