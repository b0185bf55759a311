"""Planted truth: the one edge that the loss hangs on is ablated, its mirror image and the rest are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import scipy.stats
import torch
from planting import blank, frame, plant_head
from tiny_models import in_float64, norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.linalg import mean_estimate
from virtual_weights.record import Record
from virtual_weights.runtime import Run
from virtual_weights.runtime.edges.ablation import Ablation, EdgeAblation, EdgeSetAblation
from virtual_weights.runtime.edges.attribution import LogitDifference
from virtual_weights.runtime.edges.edge import Edge, Removal, removed
from virtual_weights.runtime.edges.losses import next_token_loss, token_losses
from virtual_weights.stream import Stream
from virtual_weights.stream.question import asking

TOKENS = torch.randint(0, 37, (6, 12), generator=torch.Generator().manual_seed(1))
MANY = torch.randint(0, 37, (60, 8), generator=torch.Generator().manual_seed(2))
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


def test_verdicts_go_by_the_interval_and_the_least_effect(relay: tuple[nn.Module, Stream]) -> None:
    model, stream = relay
    run = Run.on_tokens(stream, CONSTANT, model=model)
    edges = [("L0H1", "L2H3.V"), ("L1H2", "L2H3.V"), ("L0H1", "L1H2.V"), ("L0H2", "L2H3.V")]
    record = Ablation(edges, random=12, batch=4)(run)
    assert record.stamp["clean_loss"] < 0.5
    effect, low, high = (numbers(record, name) for name in ("effect_nats", "low", "high"))
    assert effect[0] > low[0] > 2.0
    assert effect[1] == low[1] == high[1] == 0.0
    assert -0.05 < effect[2] < high[2] < -0.001
    assert record["verdict"][:3] == ("causal", "negligible", "causal")
    assert record["kind"] == ("asked",) * 4 + ("random",) * (len(effect) - 4)
    assert numbers(record, "output_change")[0] > 0.9  # the mean of the text's two halves is nothing
    assert numbers(record, "top_changed")[0] == numbers(record, "loss_changed")[0] == 1.0
    assert numbers(record, "loss_changed")[1] == 0.0
    assert all(x != x for x in numbers(record, "pattern_change"))  # values move no attention
    strict = Ablation(edges, random=0, least=effect[0] + 1)(run)
    assert strict["verdict"] == ("negligible",) * 4
    assert "plus or minus 0.01" in record.stamp["rule"]


@pytest.mark.parametrize("replacement", ["mean", "resample"])
def test_a_verdict_is_the_same_whatever_else_is_asked(replacement: Any, relay: tuple[nn.Module, Stream]) -> None:
    """Alone, together, in another order, and beside other random edges."""
    model, stream = relay
    run = Run.on_tokens(stream, CONSTANT, model=model)
    edges = [("L0H1", "L2H3.V"), ("L1H2", "L2H3.V"), ("L0H1", "L1H2.V"), ("L0H2", "L2H3.V"), ("L0H1", "L2H3.Q")]
    together = Ablation(edges, random=4, replacement=replacement)(run)
    others = [Ablation([edge], random=4, replacement=replacement, batch=3)(run) for edge in edges]
    others += [Ablation(edges[::-1], random=0, replacement=replacement, batch=12)(run)]
    others += [Ablation(edges, random=7, replacement=replacement, seed=5)(run)]
    assert len(set(together["verdict"])) > 1
    expected = dict(zip(together.axis("edge").labels, zip(*_judged(together), strict=True), strict=True))
    for record in others:
        rows = zip(record.axis("edge").labels, zip(*_judged(record), strict=True), strict=True)
        same = [(expected[label], row) for label, row in rows if label in expected]
        assert [row[0] for _, row in same] == [before[0] for before, _ in same]
        assert all(row[1:] == pytest.approx(before[1:], rel=1e-6, abs=1e-9) for before, row in same)


def _judged(record: Record) -> tuple[Any, ...]:
    return record["verdict"], numbers(record, "low"), numbers(record, "high")


def test_random_edges_depend_on_the_seed_and_the_port_alone(relay: tuple[nn.Module, Stream]) -> None:
    model, stream = relay
    run = Run.on_tokens(stream, CONSTANT, model=model)
    record = Ablation([("L0H2", "L2H3.V")], random=200)(run)
    names, sizes = record.axis("edge").labels, [abs(x) for x in numbers(record, "effect_nats")]
    assert len(names) == len(set(names)) == 6 * 12 + 6 * 6  # every edge that reaches, once
    assert numbers(record, "rank")[0] == 1 + sum(size > sizes[0] for size in sizes[1:]) > 1
    assert numbers(record, "rank")[names.index("L0H1 -> L2H3.V")] == 1.0
    few = [Ablation([edge], random=5)(run) for edge in (("L0H2", "L2H3.V"), ("L0H1", "L2H3.V"))]
    drawn = [{row["edge"] for row in record.rows() if row["kind"] == "random"} for record in few]
    asked = {"L0H2 -> L2H3.V", "L0H1 -> L2H3.V"}
    assert drawn[0] - asked == drawn[1] - asked
    ranks = [numbers(record, "rank")[0] for record in few]
    both = Ablation([("L0H2", "L2H3.V"), ("L0H1", "L2H3.V")], random=5)(run)
    assert numbers(both, "rank")[:2] == ranks
    assert all(x != x for x in numbers(Ablation([("L0H2", "L2H3.V")], random=0)(run), "rank"))


def test_a_q_value_is_the_false_discovery_rate_over_what_was_asked() -> None:
    model, stream = in_float64("gpt2")
    run = Run.on_tokens(stream, MANY, model=model)
    edges = [("L0H1", "L2H3.Q"), ("L0H2", "L2H3.Q"), ("L1H0", "L2H1.V")]
    record = Ablation(edges, random=2, batch=60)(run)
    q, p = numbers(record, "q"), numbers(record, "p")
    assert q[:3] == pytest.approx(scipy.stats.false_discovery_control(p[:3]), rel=1e-9)
    assert all(x != x for x in q[3:])


def test_a_large_effect_that_differs_in_sign_is_inconclusive(relay: tuple[nn.Module, Stream]) -> None:
    """Half of the sequences end as the model expects, half do not: whatever the mean, the interval holds 0."""
    model, stream = relay
    text = CONSTANT[:4].clone()
    text[:2, -1] = 1 - text[:2, -1]
    record = Ablation([("L0H1", "L2H3.V")], random=5, seed=2)(Run.on_tokens(stream, text, first=7, model=model))
    assert abs(numbers(record, "effect_nats")[0]) > 0.1
    assert numbers(record, "low")[0] < 0 < numbers(record, "high")[0]
    assert record["verdict"][0] == "inconclusive"
    assert record.stamp["first"] == 7


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
    model, stream = in_float64("gpt2")
    edges = [("L0H1", "L2H3.Q")]
    row = next(Ablation(edges, 0, sequences=None, batch=60)(Run.on_tokens(stream, MANY, model=model)).rows())
    with torch.no_grad():
        with removed(model, stream, [Edge.of(stream, *edges[0])]):
            losses = next_token_loss(model(MANY).logits, MANY)
        effects = losses - next_token_loss(model(MANY).logits, MANY)
    estimate = mean_estimate(effects)
    assert (row["low"], row["high"], row["p"]) == pytest.approx(
        tuple(map(float, (estimate.low, estimate.high, estimate.p))), rel=1e-6
    )
    record = Ablation(edges, random=0)(Run.on_tokens(stream, MANY, model=model))
    assert record.stamp["sequences"] == 32, "where the run has so many"
    one = next(Ablation(edges, random=2)(Run.on_tokens(stream, TOKENS[:1], model=model)).rows())
    assert (one["low"], one["high"], one["q"], one["verdict"]) == (None, None, None, "inconclusive")


def test_resampling_takes_the_next_sequence_whatever_the_batch() -> None:
    model, stream = in_float64("llama-grouped-untied")
    run = Run.on_tokens(stream, TOKENS, model=model)
    effects = [
        numbers(Ablation([("L0H1", "L2H4.K"), ("embed", "L1H0.V")], 0, "resample", batch=batch)(run), "effect_nats")
        for batch in (6, 4, 1)
    ]
    assert effects[1] == pytest.approx(effects[0], rel=1e-9)
    assert effects[2] == pytest.approx(effects[0], rel=1e-9)


def test_a_metric_of_ones_own_and_tokens_left_out() -> None:
    model, stream = in_float64("gpt2")
    edge = ("L0H1", "L2H3.Q")
    run = Run.on_tokens(stream, TOKENS, model=model)
    with torch.no_grad():
        clean = model(TOKENS).logits
        with removed(model, stream, [Edge.of(stream, *edge)]):
            other = model(TOKENS).logits
    record = Ablation([edge], random=0, metric=last_logit)(run)
    assert numbers(record, "effect_nats")[0] == pytest.approx(float((other - clean)[:, -1, 5].mean()), rel=1e-6)
    assert record.stamp["clean_metric"] == pytest.approx(float(clean[:, -1, 5].mean()), rel=1e-6)
    assert record.stamp["clean_loss"] == pytest.approx(float(next_token_loss(clean, TOKENS).mean()))
    difference = LogitDifference([1, 2, 3, 4, 5, 6], 7)
    record = Ablation([edge], random=0, metric=difference, batch=4)(run)
    gap = [(other - clean)[i, -1, i + 1] - (other - clean)[i, -1, 7] for i in range(6)]
    assert numbers(record, "effect_nats")[0] == pytest.approx(float(sum(gap)) / 6, rel=1e-6)
    late = Run.on_tokens(stream, TOKENS, first=4, model=model)
    effect = (next_token_loss(other, TOKENS, 4) - next_token_loss(clean, TOKENS, 4)).mean()
    assert numbers(Ablation([edge], random=0)(late), "effect_nats")[0] == pytest.approx(float(effect), rel=1e-6)
    assert Ablation([edge], random=0)(late).stamp["first"] == 4
    with torch.no_grad(), removed(model, stream, [Edge.of(stream, "L1.mlp", "unembed")]):
        changed = token_losses(model(TOKENS).logits, TOKENS) - token_losses(clean, TOKENS)
    share = float((changed.abs() > 0.1).double().mean())
    record = Ablation([("L1.mlp", "unembed")], random=0)(run)
    assert numbers(record, "loss_changed")[0] == pytest.approx(share)
    assert 0 < share < 1
    for wrong in (LogitDifference([1, 2], 3), mean_logit):
        with pytest.raises(UsageError, match=r"tokens whose logits|shape"):
            Ablation([edge], random=0, metric=wrong)(run)


def last_logit(logits: Tensor, tokens: Tensor) -> Tensor:
    del tokens
    return logits[:, -1, 5]


def mean_logit(logits: Tensor, tokens: Tensor) -> Tensor:
    del tokens
    return logits.mean()


def test_a_metric_is_named_by_its_source_or_kept_in_no_atlas() -> None:
    name = str(EdgeAblation("L0H1", "L2H3.K", metric=last_logit).parameters["metric"])
    assert re.fullmatch(r".*last_logit, sha256 [0-9a-f]{16}", name)
    assert name == EdgeAblation("L0H1", "L2H3.K", metric=last_logit).parameters["metric"]
    assert EdgeAblation("L0H1", "L2H3.K", metric=last_logit).addressable
    assert EdgeAblation("L0H1", "L2H3.K", metric=LogitDifference(1, 2)).addressable

    def closure(logits: Tensor, tokens: Tensor) -> Tensor:
        return last_logit(logits, tokens) * len(unknown)

    unknown = [1, 2]
    for metric in (closure, lambda logits, tokens: logits[:, -1, 4], partial(last_logit)):
        question = EdgeAblation("L0H1", "L2H3.K", metric=metric)
        assert not question.addressable
        assert "of this process" in question.parameters["metric"]
        assert question.parameters["metric"] == EdgeAblation("L1H1", "L2H3.K", metric=metric).parameters["metric"]
    assert len({str(EdgeAblation("", "", metric=m).parameters["metric"]) for m in (closure, partial(last_logit))}) == 2


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
    if edge[1] != "unembed":  # of which there are three edges from MLPs, the one asked among them
        assert number - 1 in (how["random"], how["random"] - 1), "the edge itself may be drawn"
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
    how = {"replacement": "mean", "scalars": "held", "sequences": 32, "metric": None}
    assert EdgeAblation("L0H1", "L2H3.K", batch=2).parameters == {"writer": "L0H1", "reader": "L2H3.K", **how}
    whole = Ablation([("L0H1", "L2H3.K")], batch=2)
    assert whole.parameters == {"edges": [["L0H1", "L2H3.K"]], "random": 20, "seed": 0, "least": 0.01, **how}


@dataclass
class Unhashable:
    scale: float = 1.0

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return last_logit(logits, tokens)


@dataclass(frozen=True)
class HoldsList:
    weights: list[float]

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return last_logit(logits, tokens)


EDGE = ("L0H1", "L2H3.Q")


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: Ablation([EDGE], sequences=0), "sequences=0"),
        (lambda: Ablation([EDGE], sequences=-1), "sequences=-1"),
        (lambda: Ablation([EDGE], batch=0), "batch=0"),
        (lambda: Ablation([EDGE], random=-1), "random=-1"),
        (lambda: EdgeAblation(*EDGE, sequences=0), "sequences=0"),
        (lambda: EdgeAblation(*EDGE, batch=-2), "batch=-2"),
        (lambda: EdgeSetAblation([EDGE], sequences=0), "sequences=0"),
        (lambda: EdgeSetAblation([EDGE], batch=0), "batch=0"),
        (lambda: EdgeSetAblation([EDGE], others="everything"), "others='everything'"),  # type: ignore[arg-type]  # pyright: ignore
        (lambda: vw.Attribution("Q", sequences=0), "sequences=0"),
        (lambda: vw.Attribution("Q", batch=0), "batch=0"),
        (lambda: Ablation([("a",)]), r"edges=\[\('a',\)\]"),  # type: ignore[list-item]  # pyright: ignore
        (lambda: Ablation("L0H1"), "edges='L0H1'"),  # type: ignore[arg-type]  # pyright: ignore
        (lambda: Ablation(EDGE), "edges="),  # type: ignore[arg-type]  # pyright: ignore
        (lambda: Ablation(["ab"]), "edges="),  # type: ignore[list-item]  # pyright: ignore
        (lambda: EdgeSetAblation([("a", 3)]), "edges="),  # type: ignore[list-item]  # pyright: ignore
        (lambda: Ablation([EDGE], metric=Unhashable()), "Unhashable"),
        (lambda: EdgeAblation(*EDGE, metric=Unhashable()), "Unhashable"),
        (lambda: EdgeSetAblation([EDGE], metric=HoldsList([1.0])), "HoldsList"),
        (lambda: vw.Attribution("Q", metric=Unhashable()), "Unhashable"),
    ],
)
def test_parameters_that_cannot_be_are_refused(ask: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ask()


def test_a_logit_difference_is_taken_in_more_than_bfloat16() -> None:
    logits = torch.tensor([[[100.0, 0.25, 100.5, 3.0]]], dtype=torch.bfloat16)
    assert LogitDifference(0, 1)(logits, TOKENS).tolist() == [99.75]
    assert LogitDifference(0)(logits, TOKENS).tolist() == [100 - 203.75 / 4]
    model = tiny("gpt2").to(torch.bfloat16)
    run = Run.on_tokens(vw.open(model), TOKENS, model=model)
    for metric in (LogitDifference(3, 5), last_logit):
        with torch.no_grad():
            clean = metric(model(TOKENS).logits.double(), TOKENS)
            with removed(model, run.stream, [Edge.of(run.stream, "L0H1", "L2H3.V")]):
                without = metric(model(TOKENS).logits.double(), TOKENS)
        record = EdgeAblation("L0H1", "L2H3.V", metric=metric, batch=6)(run)
        assert numbers(record, "effect_nats") == pytest.approx([float((without - clean).mean())], rel=1e-6)


def test_an_early_edge_lets_no_late_one_begin_early() -> None:
    model, stream = in_float64("llama-grouped-untied")
    run = Run.on_tokens(stream, TOKENS[:2], model=model)
    early, late = ("L0H1", "L1H2.V"), ("L0H1", "L2H3.V")
    edges = [early, late, ("L0H2", "L1H2.V"), ("L0H2", "L2H3.V")]
    rows = list[int]()
    inside = model.model.layers[1].input_layernorm
    hook = inside.register_forward_hook(lambda _m, _g, out: rows.append(len(out)))
    record = Ablation(edges, random=0, batch=4)(run)
    hook.remove()
    assert rows.count(4) == 1, "the two edges that this block reads, of two sequences each"
    alone = [numbers(EdgeAblation(*edge, batch=2)(run), "effect_nats")[0] for edge in edges]
    assert numbers(record, "effect_nats") == pytest.approx(alone, rel=1e-9), "in the order given"
    assert len(set(alone)) == 4


def test_refused() -> None:
    model = tiny("gpt2")
    stream = vw.open(model)
    run = Run.on_tokens(stream, TOKENS, model=model)
    for question in (Ablation, EdgeSetAblation):
        with pytest.raises(UsageError, match="no edge"):
            question([])
        with pytest.raises(UsageError, match="least effect"):
            question([("L0H1", "L2H3.Q")], least=-0.1)
    with pytest.raises(UsageError, match="no partners"):
        Ablation([("L0H1", "L2H3.Q")], replacement="partner")(run)
    with pytest.raises(UsageError, match="one sequence"):
        Ablation([("L0H1", "L2H3.Q")], replacement="resample")(Run.on_tokens(stream, TOKENS[:1], model=model))
    with pytest.raises(UsageError, match="chunks of 12 tokens"):
        Ablation([("L0H1", "L2H3.Q")])(Run.on_tokens(stream, TOKENS, first=12, model=model))
    with pytest.raises(UsageError, match="cannot reach"):
        Ablation([("L2H1", "L1H3.Q")])(run)
