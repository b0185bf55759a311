"""Planted truth: the one edge that the loss hangs on is ablated, its mirror image and the rest are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planting import blank, frame, plant_head
from tiny_models import norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import Run
from virtual_weights.runtime.edges.ablation import Ablation, EdgeAblation
from virtual_weights.runtime.edges.edge import Edge, Removal, next_token_loss, removed
from virtual_weights.stream import Stream
from virtual_weights.stream.question import asking

TOKENS = torch.randint(0, 37, (6, 12), generator=torch.Generator().manual_seed(1))
CONSTANT = torch.tensor([[0] * 8, [1] * 8, [1] * 8, [0] * 8, [0] * 8, [1] * 8])


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    with norms_in_full_precision():
        yield


@pytest.fixture(scope="module")
def relay() -> tuple[nn.Module, Stream]:
    """Sequences of 0 are told from those of 1 by one chain alone: L0H1 moves a to b, L2H3 moves b to the answer.

    L0H2 writes a hundredth of b too, against the answer. L1H2 reads b and writes aside: the chain's last edge turned
    round. What it writes makes the norm larger and the answer a little weaker.
    """
    model: Any = blank()
    base, a, b, answer, aside = frame(3).T[:5]
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = 4 * base
        model.model.embed_tokens.weight[0] += a
        model.model.embed_tokens.weight[1] -= a
        model.lm_head.weight[0] = answer / model.model.norm.weight
        model.lm_head.weight[1] = -answer / model.model.norm.weight
    plant_head(model, 0, 1, torch.outer(b, a))
    plant_head(model, 0, 2, -torch.outer(b, a) / 100)
    plant_head(model, 1, 2, torch.outer(aside, b))
    plant_head(model, 2, 3, 9 * torch.outer(answer, b))
    return model, vw.open(model).to(torch.float64)


def numbers(record: Record, column: str) -> list[float]:
    values = record[column]
    assert isinstance(values, Tensor)
    return values.tolist()


def test_the_edge_that_carries_the_answer_is_causal(relay: tuple[nn.Module, Stream]) -> None:
    model, stream = relay
    edges = [("L0H1", "L2H3.V"), ("L1H2", "L2H3.V"), ("L0H1", "L1H2.V"), ("L0H1", "L2H4.V")]
    record = Ablation(edges, random=12, batch=4)(Run.on_tokens(stream, CONSTANT, model=model))
    assert record.stamp["clean_loss"] < 0.5
    assert numbers(record, "effect_nats")[0] > 2.0
    assert -0.05 < numbers(record, "effect_nats")[2] < -0.001
    assert [x for i, x in enumerate(numbers(record, "effect_nats")) if i not in (0, 2)] == [0.0] * 14
    assert record["verdict"] == ("causal", "not shown", "causal") + ("not shown",) * 13
    assert record["kind"] == ("asked",) * 4 + ("random",) * 12
    assert numbers(record, "p")[0] == pytest.approx(1 / 13)
    assert numbers(record, "low")[0] > 2.0
    assert numbers(record, "output_change")[0] > 0.9  # the mean of the text's two halves is nothing
    assert numbers(record, "top_changed")[0] == 1.0
    assert all(x != x for x in numbers(record, "pattern_change"))  # values move no attention


def test_a_real_effect_below_a_random_edge_is_not_shown(relay: tuple[nn.Module, Stream]) -> None:
    model, stream = relay
    run = Run.on_tokens(stream, CONSTANT, model=model)
    record = Ablation([("L0H2", "L2H3.V")], random=200)(run)
    names = record.axis("edge").labels
    assert len(names) == len(set(names)) == 6 * 12 + 6 * 6  # every edge that reaches, once
    assert numbers(record, "effect_nats")[names.index("L0H1 -> L2H3.V")] > 2.0
    assert numbers(record, "high")[0] < 0  # the loss falls without it
    assert record["verdict"][0] == "not shown"
    assert numbers(record, "p")[0] == pytest.approx(3 / 108)  # L0H1 into L2H3 and into L1H2 do more
    alone = Ablation([("L0H2", "L2H3.V")], random=3, seed=2)(run)
    assert "L0H1 -> L2H3.V" not in alone.axis("edge").labels
    assert alone["verdict"][0] == "causal"


def test_a_large_effect_that_differs_in_sign_is_not_shown(relay: tuple[nn.Module, Stream]) -> None:
    """Half of the sequences end as the model expects, half do not: whatever the mean, the interval holds 0."""
    model, stream = relay
    text = CONSTANT[:4].clone()
    text[:2, -1] = 1 - text[:2, -1]
    record = Ablation([("L0H1", "L2H3.V")], random=5, seed=2)(Run.on_tokens(stream, text, first=7, model=model))
    assert abs(numbers(record, "effect_nats")[0]) > 0.1
    assert numbers(record, "p")[0] == pytest.approx(1 / 6)
    assert numbers(record, "low")[0] < 0 < numbers(record, "high")[0]
    assert record["verdict"][0] == "not shown"


def test_the_figures_are_what_removal_does() -> None:
    """Effect, attention, output and top tokens from their definitions, with one pass over all of the text."""
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    run = Run.on_tokens(stream, TOKENS, first=5, model=model)
    record = Ablation([("L0H1", "L2H4.K"), ("L0H1", "L2H3.K")], random=2, batch=4)(run)
    row = next(record.rows())
    assert record["kind"] == ("asked", "random", "random")  # two names of one group are one edge
    assert (row["edge"], row["group"], row["shared_with"]) == ("L0H1 -> L2H4.K", "L2.kv1", "L2H3 L2H5")
    inputs: list[Tensor] = []
    o: Any = model.get_submodule("model.layers.2.self_attn.o_proj")
    hook = o.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        clean = model(TOKENS, output_attentions=True)
        with removed(model, stream, [Edge.of(stream, "L0H1", "L2H4.K")], Removal()):
            other = model(TOKENS, output_attentions=True)
    hook.remove()
    effect = (next_token_loss(other.logits, TOKENS, 5) - next_token_loss(clean.logits, TOKENS, 5)).mean()
    assert row["effect_nats"] == pytest.approx(float(effect), rel=1e-6)
    patterns = [output.attentions[2][:, 3:6] for output in (clean, other)]
    assert row["pattern_change"] == pytest.approx(float((patterns[0] - patterns[1]).abs().sum(-1).mean() / 2), rel=1e-6)
    before, after = (z[..., 12:24] @ o.weight[:, 12:24].T for z in inputs)
    change = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    assert row["output_change"] == pytest.approx(float(change.mean().detach()), rel=1e-6)
    tops = (clean.logits.argmax(-1) != other.logits.argmax(-1))[:, 4:11].double().mean()
    assert row["top_changed"] == pytest.approx(float(tops))
    assert record.stamp["clean_loss"] == pytest.approx(float(next_token_loss(clean.logits, TOKENS, 5).mean()))


def test_edges_stacked_along_the_batch_are_each_alone() -> None:
    model = tiny("neox-parallel-partial-rotary", dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    edges = [("L0H1", "L2H3.K"), ("L0.mlp", "L1.mlp.in"), ("L0H1", "L2H0.Q"), ("L1H2", "unembed"), ("embed", "L0H0.V")]
    run = Run.on_tokens(stream, TOKENS, model=model)
    alone, stacked = Ablation(edges, random=2, batch=6)(run), Ablation(edges, random=2, batch=18)(run)
    for column in ("effect_nats", "low", "pattern_change", "output_change", "top_changed"):
        assert numbers(stacked, column) == pytest.approx(numbers(alone, column), rel=1e-5, abs=1e-9, nan_ok=True)
    assert stacked["verdict"] == alone["verdict"]


def test_intervals_are_those_of_means_over_sequences() -> None:
    model, tokens = tiny("gpt2", dtype=torch.float64), torch.randint(0, 37, (60, 8), generator=torch.Generator())
    stream = vw.open(model).to(torch.float64)
    edges = [("L0H1", "L2H3.Q")]
    row = next(Ablation(edges, random=0, batch=60)(Run.on_tokens(stream, tokens, model=model)).rows())
    with torch.no_grad():
        with removed(model, stream, [Edge.of(stream, *edges[0])]):
            losses = next_token_loss(model(tokens).logits, tokens)
        effects = losses - next_token_loss(model(tokens).logits, tokens)
    spread = float(effects.std()) / len(tokens) ** 0.5
    low, high = float(row["low"] or 0), float(row["high"] or 0)
    assert (low + high) / 2 == pytest.approx(float(effects.mean()), abs=0.3 * spread)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert row["verdict"] == "not shown"  # nothing to compare it with
    one = next(Ablation(edges, random=2)(Run.on_tokens(stream, TOKENS[:1], model=model)).rows())
    assert (one["low"], one["high"], one["verdict"]) == (None, None, "not shown")


@pytest.mark.parametrize(
    "edge", [("L0H1", "L2.mlp.up"), ("L0.mlp", "unembed"), ("L0N3", "L1N4.gate"), ("embed", "L1H2.Q")]
)
@pytest.mark.parametrize("how", [{"random": 3}, {"random": 2, "replacement": "resample", "scalars": "move"}])
def test_every_kind_of_edge(edge: tuple[str, str], how: dict[str, Any]) -> None:
    model = tiny("llama-grouped-untied")
    stream = vw.open(model)
    steps: list[tuple[float, float]] = []
    run = Run.on_tokens(stream, TOKENS, model=model)
    record = Ablation([edge], **how)(run, lambda done, total: steps.append((done, total)))
    assert all(x == x and x != 0 for x in numbers(record, "effect_nats"))
    assert all(x > 0 for x in numbers(record, "output_change"))
    number = len(record.axis("edge").labels)
    assert steps == [(i + 1, number) for i in range(number)]
    assert number == 3 if edge[1] == "unembed" else 1 + how["random"]  # three MLPs, one asked about
    kinds = {Edge.of(stream, *label.split(" -> ")).writer.kind for label in record.axis("edge").labels}
    assert len(kinds) == 1


def test_one_more_edge_computes_one_more(relay: tuple[nn.Module, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    """Random edges are shared between questions, and those of one port do not depend on the others."""
    together, counts = EdgeAblation.together.__func__, list[int]()  # type: ignore[attr-defined]

    def counted(cls: type[EdgeAblation], questions: Any, *rest: Any) -> Any:
        counts.append(len(questions))
        return together(cls, questions, *rest)

    monkeypatch.setattr(EdgeAblation, "together", classmethod(counted))
    run = Run.on_tokens(relay[1], CONSTANT, model=relay[0])
    ask, edges = asking(run), [("L0H1", "L2H3.V"), ("L1H2", "L2H3.V"), ("L0H1", "L2H3.Q")]
    records = [Ablation(edges[:number], random=3)(run, ask=ask) for number in (1, 2, 3, 3)]
    assert counts == [4, 1, 4]
    random = [[row["edge"] for row in record.rows() if row["kind"] == "random"] for record in records]
    assert random[0] == random[1] == random[2][:3]


def test_what_only_costs_is_no_parameter() -> None:
    how = {"replacement": "mean", "scalars": "held", "sequences": None, "seed": 0}
    assert EdgeAblation("L0H1", "L2H3.K", batch=2).parameters == {"writer": "L0H1", "reader": "L2H3.K", **how}
    whole = Ablation([("L0H1", "L2H3.K")], batch=2)
    assert whole.parameters == {"edges": [["L0H1", "L2H3.K"]], "random": 20, **how}


def test_refused() -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    run = Run.on_tokens(stream, TOKENS, model=model)
    with pytest.raises(UsageError, match="no edge"):
        Ablation([])(run)
    with pytest.raises(UsageError, match="chunks of 12 tokens"):
        Ablation([("L0H1", "L2H3.Q")])(Run.on_tokens(stream, TOKENS, first=12, model=model))
    with pytest.raises(UsageError, match="cannot reach"):
        Ablation([("L2H1", "L1H3.Q")])(run)
