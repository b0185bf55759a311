"""Attribution is the derivative of the metric along each removal, for every edge, on every family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from regauge import rebased, rotated
from tiny_models import SHAPES, in_float64, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import Run
from virtual_weights.runtime.edges.attribution import Attribution, LogitDifference
from virtual_weights.runtime.edges.edge import Edge, Removal, removed
from virtual_weights.runtime.edges.losses import next_token_loss
from virtual_weights.stream import Stream
from virtual_weights.stream.group import HEAD_PORTS, Port

TOKENS = torch.randint(0, 37, (3, 6), generator=torch.Generator().manual_seed(8))
STEP = 1e-5

pytestmark = pytest.mark.usefixtures("full_precision")


def difference(model: nn.Module, stream: Stream, edge: Edge, metric: object = next_token_loss) -> float:
    """Central difference of the metric along a small part of the removal, mean over sequences."""
    values = []
    for fraction in (STEP, -STEP):
        with torch.no_grad(), removed(model, stream, [edge], Removal(fraction=fraction)):
            values.append(metric(model(TOKENS).logits, TOKENS).mean())  # type: ignore[operator]
    return float(values[0] - values[1]) / (2 * STEP)


def attributions(
    model: nn.Module, stream: Stream, ports: Sequence[Port] = HEAD_PORTS, **how: Any
) -> dict[Port, Record]:
    """By port, all of them from one backward pass a batch."""
    questions = {Attribution(port, **how): port for port in ports}
    answers = Attribution.together(list(questions), Run.on_tokens(stream, TOKENS, model=model))
    return {questions[question]: record for question, record in answers}  # type: ignore[index]


def entry(record: Record, reader: str, writer: str) -> float:
    values = record["attribution"]
    assert isinstance(values, Tensor)
    return float(values[record.axis("reader").index(reader), record.axis("writer").index(writer)])


@pytest.mark.parametrize("name", SHAPES)
def test_equals_finite_differences(name: str) -> None:
    model, stream = in_float64(name)
    last = stream.spec.n_layers - 1
    edges = [("L0H1", f"L{last}H3.{port}") for port in "QKV"] + [("L0H2", "L1H0.K"), (f"L{last - 1}H0", f"L{last}H2.V")]
    records = attributions(model, stream)
    for writer, reader in edges:
        effect = entry(records[reader[-1]], reader, writer)  # type: ignore[index]
        expected = difference(model, stream, Edge.of(stream, writer, reader))
        assert effect == pytest.approx(expected, rel=1e-5, abs=1e-8), (writer, reader)
        assert abs(effect) > 1e-6


def test_every_edge_of_one_port() -> None:
    model, stream = in_float64("llama-grouped-untied")
    record = Attribution("K")(Run.on_tokens(stream, TOKENS, model=model))
    rows = [row for row in record.rows() if row["reader"] in ("L1H0.K", "L2H3.K")]
    assert len(rows) == 6 + 12
    for row in rows:
        edge = Edge.of(stream, str(row["writer"]), str(row["reader"]))
        assert row["attribution"] == pytest.approx(difference(model, stream, edge), rel=1e-5, abs=1e-8)
        assert row["size"] == abs(float(row["attribution"] or 0))
        assert row["reader_group"] == edge.kv_group
    assert int(record.present().sum()) == 6 * 6 + 6 * 12


@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_of_writer_and_reader(name: str) -> None:
    model, stream = in_float64(name)
    last = stream.spec.n_layers - 1
    mlp = stream.groups.ports[3:-1]
    assert mlp == (("gate", "up") if stream.spec.gated else ("in",))
    embeds = ["embed", "pos"] if stream.model.has("pos", "pos") else ["embed"]
    readers: list[tuple[str, Port]] = [("unembed", "unembed"), (f"L{last}H1.K", "K")]
    readers += [(f"L{last}.mlp.{port}", port) for port in mlp]
    records = attributions(model, stream, stream.groups.ports, writers="all")
    assert tuple(records) == stream.groups.ports
    for reader, port in readers:
        for writer in (*embeds, "L0H2", "L0.mlp"):
            effect = entry(records[port], reader, writer)
            expected = difference(model, stream, Edge.of(stream, writer, reader))
            assert effect == pytest.approx(expected, rel=1e-5, abs=1e-8), (writer, reader)
            assert abs(effect) > 1e-6
    heads = attributions(model, stream, mlp)  # heads alone: the same numbers
    writer = records[mlp[0]].axis("writer").labels.index("L0H0")
    assert entry(heads[mlp[0]], f"L{last}.mlp.{mlp[0]}", "L0H0") == pytest.approx(
        float(records[mlp[0]]["attribution"][last, writer])  # type: ignore[index]
    )


def test_only_what_reaches_is_there() -> None:
    model, stream = in_float64("neox-parallel-partial-rotary")
    records = attributions(model, stream, ("in", "unembed"), writers="all")
    assert math.isnan(entry(records["in"], "L1.mlp.in", "L1H0"))  # a parallel block: both read the same state
    assert math.isfinite(entry(records["in"], "L1.mlp.in", "L0.mlp"))
    assert records["unembed"]["attribution"].isfinite().all()  # type: ignore[union-attr]
    assert set(records["in"].axis("writer").labels) == {
        str(c.label) for c in stream.components if c.kind in ("embed", "head", "mlp")
    }
    _, sequential = in_float64("gpt2")
    run = Run.on_tokens(sequential, TOKENS, model=tiny("gpt2"))
    assert "pos" in Attribution("Q", writers="all")(run).axis("writer").labels


def test_batches_metric_and_gradients_of_the_parameters() -> None:
    model, stream = in_float64("gpt2")

    def gap(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -2].gather(1, tokens[:, -1:])[:, 0]

    whole = attributions(model, stream, metric=gap, batch=3)
    parts = attributions(model, stream, metric=gap, batch=1)
    expected = difference(model, stream, Edge.of(stream, "L0H1", "L2H3.Q"), gap)
    assert entry(whole["Q"], "L2H3.Q", "L0H1") == pytest.approx(expected, rel=1e-5)
    for port in HEAD_PORTS:
        a, b = whole[port]["attribution"], parts[port]["attribution"]
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert "gap, sha256 " in whole["Q"].parameters["metric"]
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.requires_grad_(False)
    frozen = attributions(model, stream, metric=gap, batch=3)["V"]["attribution"]
    expected_v = whole["V"]["attribution"]
    assert isinstance(frozen, Tensor)
    assert isinstance(expected_v, Tensor)
    assert torch.allclose(frozen, expected_v, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["llama-full", "llama-grouped-untied"])
def test_free_of_bases(name: str) -> None:
    """Rotating the stream changes nothing; re-basing heads changes nothing of V (rotary fixes the bases of Q and K)."""
    model, stream = in_float64(name)
    before = attributions(model, stream)
    turned_model = rotated(model, 1)
    turned = attributions(turned_model, vw.open(turned_model).to(torch.float64))
    for port in HEAD_PORTS:
        a, b = before[port]["attribution"], turned[port]["attribution"]
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9, equal_nan=True)


def test_free_of_the_heads_bases() -> None:
    model, stream = in_float64("gpt2")  # no rotary: all of a head's bases are free, but for its biases
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "c_attn.bias" in key or "ln_1.bias" in key:  # a norm's shift is a bias to the heads as well
                p.zero_()
    before = attributions(model, stream)
    other = rebased(model, 2)
    changed = attributions(other, vw.open(other).to(torch.float64))
    for port in HEAD_PORTS:
        a, b = before[port]["attribution"], changed[port]["attribution"]
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9, equal_nan=True)


def test_what_only_costs_is_no_parameter() -> None:
    parameters = {"port": "V", "writers": "heads", "sequences": None}
    assert Attribution("V", batch=3).parameters == {**parameters, "metric": "next_token_loss"}
    metric = LogitDifference(token=7, against=2)
    assert Attribution("V", metric=metric).parameters["metric"] == "logit_difference, token=7, against=2"


def test_refused() -> None:
    model, stream = in_float64("llama-full")
    run = Run.on_tokens(stream, TOKENS, model=model)
    for tokens in (TOKENS[0], TOKENS.double(), torch.where(TOKENS == TOKENS[0, 0], -1, TOKENS), TOKENS[:, :1]):
        with pytest.raises(UsageError, match=r"tokens of shape|padding before a token|chunks of 1 tokens"):
            Attribution()(Run.on_tokens(stream, tokens, model=model))
    with pytest.raises(UsageError, match="no port 'in'"):
        Attribution("in")(run)
    with pytest.raises(UsageError, match="writers 'biases'"):
        Attribution(writers="biases")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="gain"):
        Attribution()(Run.on_tokens(vw.open(model, fold=False), TOKENS, model=model))


def test_absent_where_nothing_can_reach() -> None:
    model, stream = in_float64("neox-parallel-partial-rotary")
    record = Attribution("V")(Run.on_tokens(stream, TOKENS, model=model))
    assert math.isnan(entry(record, "L1H0.V", "L1H1"))
    assert math.isfinite(entry(record, "L1H0.V", "L0H1"))
