"""An edge token by token: its averages are those of the questions that average, and no loss changes before a cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conformance.checkpoints import build, flavours
from tiny_models import in_float64, norms_in_full_precision
from torch import Tensor

import virtual_weights as vw
from virtual_weights.errors import UsageError
from virtual_weights.runtime.edges.losses import token_losses
from virtual_weights.runtime.edges.passes import CHANGED

TOKENS = torch.randint(0, 37, (5, 9), generator=torch.Generator().manual_seed(3))
NAMES = ("llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary")
EDGES = [("L0H1", "L2H3.K"), ("embed", "L1H2.Q"), ("L0.mlp", "L2H1.V"), ("L1H0", "unembed"), ("L0H1", "L1N5.{}")]


def edges(stream: vw.Stream) -> list[tuple[str, str]]:
    return [(writer, reader.format("up" if stream.spec.gated else "in")) for writer, reader in EDGES]


def asked(run: vw.Run, **how: Any) -> list[vw.Record]:
    """All edges together."""
    questions = [vw.EdgeTokens(*edge, **how) for edge in edges(run.stream)]
    return [record for _, record in vw.EdgeTokens.together(questions, run)]


def by_place(record: vw.Record, column: str) -> Tensor:
    return record.numbers(column).reshape(-1, TOKENS.shape[1])


@pytest.mark.parametrize(
    "how", [{}, {"replacement": "resample", "scalars": "move", "batch": 15}, {"sequences": 3, "batch": 2}]
)
@pytest.mark.parametrize("name", NAMES)
def test_mean_changes_of_loss_are_the_effects_of_ablation(name: str, how: dict[str, Any]) -> None:
    model, stream = in_float64(name)
    run = vw.Run.on_tokens(stream, TOKENS, first=3, model=model)
    how = {"sequences": None, **how}
    for edge, record in zip(edges(stream), asked(run, **how), strict=True):
        ablation = vw.EdgeAblation(*edge, **how)(run)
        change = (by_place(record, "loss_without") - by_place(record, "loss"))[:, 3:]
        effect = float(ablation.numbers("effect_nats"))
        assert float(change.mean(1).mean()) == pytest.approx(effect, abs=1e-9), edge
        assert abs(effect) > 1e-6
        assert record.stamp["effect_nats"] == pytest.approx(effect, abs=1e-9)
        assert record.stamp["clean_loss"] == pytest.approx(ablation.stamp["clean_loss"], abs=1e-9)
        assert record.stamp["loss_changed"] == pytest.approx(float(ablation.numbers("loss_changed")))
        assert record.stamp["sequences"] == ablation.stamp["sequences"] == len(change)
        assert record.stamp["edge"] == ablation.axis("edge").labels[0]


@pytest.mark.parametrize("name", NAMES)
def test_mean_contributions_are_those_of_the_moments(name: str) -> None:
    model, stream = in_float64(name)
    with norms_in_full_precision():
        run = vw.Run.on_tokens(stream, TOKENS, model=model)
        moments = vw.Observation().moments(run)
        records = asked(run, sequences=None, batch=2)
    for (writer, reader), record in zip(edges(stream), records, strict=True):
        contribution, share = record.numbers("contribution"), record.numbers("share")
        if "N" in reader:  # one of the MLP's neurons; what all receive is another figure
            continue
        port: Any = reader.rpartition(".")[2]
        row = vw.Contribution(port, moments, writers="all")(stream)[writer, reader]
        assert float(contribution.mean()) == pytest.approx(row["contribution"], rel=1e-8), reader
        if "share" in row:
            whole = contribution / share
            assert float(contribution.mean() / whole.mean()) == pytest.approx(row["share"], rel=1e-8), reader


def test_a_neuron_is_read_by_its_own_row() -> None:
    """Of a port of one row the energies are squares of what ``Trace`` says of the writer."""
    model, stream = in_float64("llama-grouped-untied")
    traced = vw.Trace("L1N5.up")(vw.Run.on_tokens(stream, TOKENS[:1], model=model))
    record = vw.EdgeTokens("L0H1", "L1N5.up", sequences=1)(vw.Run.on_tokens(stream, TOKENS, model=model))
    writer = traced.axis("writer").index("L0H1")
    values = traced.numbers("value")
    torch.testing.assert_close(record.numbers("contribution"), values[:, writer].square(), rtol=1e-6, atol=1e-12)
    shares = (values[:, writer] / values.sum(1)).square()  # without biases there is no constant
    torch.testing.assert_close(record.numbers("share"), shares, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_loss_changes_before_its_cause(name: str) -> None:
    """Partners that differ from one token on change the predictions of later tokens alone."""
    model, stream = in_float64(name)
    others = TOKENS.clone()
    others[:, 4:] = (others[:, 4:] + 1) % 37
    run = vw.Run.on_pairs(stream, list(TOKENS), list(others), model=model)
    for record in asked(run, replacement="partner"):
        loss, without = by_place(record, "loss")[:, 1:5], by_place(record, "loss_without")
        torch.testing.assert_close(without[:, 1:5], loss, rtol=0, atol=1e-9)
        assert float((without - by_place(record, "loss"))[:, 5:].abs().max()) > 1e-5


def test_a_query_with_one_key_has_no_choice() -> None:
    """What is predicted at the first token depends on no query and no key."""
    model, stream = in_float64("llama-grouped-untied")
    keys, queries, *_ = asked(vw.Run.on_tokens(stream, TOKENS, model=model))
    for record in (keys, queries):
        change = by_place(record, "loss_without") - by_place(record, "loss")
        assert float(change[:, 1].abs().max()) < 1e-9 < float(change[:, 2:].abs().max())


def test_losses_and_likeliest_tokens_stand_at_the_token_that_they_predict() -> None:
    model, stream = in_float64("llama-grouped-untied")
    run = vw.Run.on_tokens(stream, TOKENS, first=2, model=model)
    record = vw.EdgeTokens("L2.mlp", "unembed", sequences=2)(run)
    with torch.no_grad():
        logits = model(TOKENS[:2]).logits
    losses = by_place(record, "loss")
    torch.testing.assert_close(losses[:, 2:], token_losses(logits, TOKENS[:2], 2).double())
    assert bool(losses[:, :2].isnan().all())
    expected = [[None, *row] for row in logits.argmax(-1)[:, :-1].tolist()]
    assert record["likeliest"] == tuple(id for row in expected for id in row)
    assert record["likeliest"] != record["likeliest_without"]
    assert record["text"] == record["likeliest_text"] == (None,) * 18
    assert len(record) == 18, "a token that does not count has a row"
    row = record["2:3",]
    assert (row["sequence"], row["position"], row["token"]) == (2, 3, int(TOKENS[1, 3]))


def test_tokens_have_their_texts(folder: Path) -> None:
    stream = vw.open(folder)
    texts = stream.source.token_texts()
    record = vw.EdgeTokens("L0H1", "L2H3.K")(vw.Run.on_tokens(stream, TOKENS))
    assert texts is None or record["text"] == tuple(texts[i] for i in TOKENS[:4].flatten().tolist())


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (lambda: vw.EdgeTokens("L0H1", "L2H3.K", sequences=0), "sequences=0"),
        (lambda: vw.EdgeTokens("L0H1", "L2H3.K", "partner"), "no partners"),
        (lambda: vw.EdgeTokens("L2H1", "L0H3.K"), "cannot reach"),
    ],
)
def test_what_cannot_be_is_refused(question: Any, words: str) -> None:
    model, stream = in_float64("llama-grouped-untied")
    with pytest.raises(UsageError, match=words):
        question()(vw.Run.on_tokens(stream, TOKENS, model=model))


def test_tokens_that_change_are_counted_beyond_a_tenth_of_a_nat() -> None:
    model, stream = in_float64("llama-grouped-untied")
    record = vw.EdgeTokens("embed", "unembed")(vw.Run.on_tokens(stream, TOKENS, model=model))
    change = (record.numbers("loss_without") - record.numbers("loss")).abs()
    counted = change[~change.isnan()]
    assert record.stamp["loss_changed"] == pytest.approx(float((counted > CHANGED).double().mean()))
    assert 0 < record.stamp["loss_changed"] < 1


@pytest.mark.parametrize("model_type", ["qwen3", "olmo2"])
def test_behind_a_norm_on_queries_and_keys_energies_are_of_directions(model_type: str, tmp_path: Path) -> None:
    """Where each token's own scalar is taken, the whole input is that of the moments, and an edge no more than it."""
    build(model_type, flavours(model_type)[0], tmp_path)
    run = vw.Run.on_tokens(vw.open(tmp_path).to(torch.float64), TOKENS, dtype=torch.float64)
    with norms_in_full_precision():
        moments = vw.Observation().moments(run)
        last = run.stream.heads[-1].label
        for port in ("Q", "K"):
            reader = f"L{last.layer}H{last.index}.{port}"
            record = vw.EdgeTokens("embed", reader, sequences=None)(run)
            row = vw.Contribution(port, moments, writers="all")(run.stream)["embed", reader]
            contribution, share = record.numbers("contribution"), record.numbers("share")
            whole = row["contribution"] / row["share"]
            assert float((contribution / share).mean()) == pytest.approx(whole, rel=1e-6)
            assert float(contribution.mean()) == pytest.approx(row["contribution"], rel=0.5)


@pytest.mark.parametrize("port", ["Q", "K"])
def test_scores_of_a_scaled_partial_rotary_count_its_factor(port: Any) -> None:
    """Of the one writer of a first block without biases the share is 1, and the energy that of the moments."""
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, vocab_size=37)
    rope = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 8}
    rope |= {"attention_factor": 1.5, "partial_rotary_factor": 0.5}
    config = transformers.GPTNeoXConfig(
        **sizes, attention_bias=False, rope_parameters=rope, initializer_range=0.3, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model: Any = transformers.GPTNeoXForCausalLM(config).double().eval()
    stream = vw.open(model).to(torch.float64)
    with norms_in_full_precision():
        run = vw.Run.on_tokens(stream, TOKENS, model=model)
        moments = vw.Observation().moments(run)
        record = vw.EdgeTokens("embed", f"L0H1.{port}", sequences=None)(run)
    row = vw.Contribution(port, moments, writers="all")(stream)["embed", f"L0H1.{port}"]
    assert float(record.numbers("contribution").mean()) == pytest.approx(row["contribution"], rel=1e-8)
    assert row["share"] == pytest.approx(1.0, rel=1e-8)
