"""Rounding is not an effect, chance is not a finding, and what is zero is not what cannot reach."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import norms_in_full_precision
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import virtual_weights as vw
from virtual_weights.analysis.channels.channel import summary
from virtual_weights.analysis.memory.head_erasers import HeadErasers
from virtual_weights.analysis.pairs.subspaces import Subspaces
from virtual_weights.linalg import Dense, singular_values
from virtual_weights.linalg.null import draw_null, haar_tail
from virtual_weights.report.tables import drawn
from virtual_weights.statements import Finding, Statements


def llama(d: int, k: int, heads: int, layers: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=40, hidden_size=d, head_dim=k, intermediate_size=16, **sizes)
    return LlamaForCausalLM(config).double().eval()


def frame(d: int, k: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q


@torch.no_grad()
def write_heads(model: nn.Module, layer: int, head: int, value: Tensor, out: Tensor) -> None:
    attention, rows = model.model.layers[layer].self_attn, slice(head * len(value), (head + 1) * len(value))
    attention.v_proj.weight[rows] = value
    attention.o_proj.weight[:, rows] = out


def verdicts(model: nn.Module, *only: str, run: bool = False) -> dict[str, Finding]:
    stream = vw.open(model)
    tokens = torch.arange(12)[None]
    record = Statements(only=only)(vw.Run.on_tokens(stream, tokens, model=model) if run else stream)
    columns = (record[name] for name in ("verdict", "why", "evidence"))
    return {
        id: Finding(verdict, why, "" if verdict == "holds under" else None, json.loads(evidence))
        for id, verdict, why, evidence in zip(record.axis("statement").labels, *columns, strict=True)
    }


def test_heads_on_orthogonal_blocks_have_no_effect_on_each_other() -> None:
    model = llama(24, 2, 2, 4)
    blocks = frame(24, 24)
    for layer in range(4):
        for head in range(2):
            block = blocks[:, 2 * head : 2 * head + 2]
            write_heads(model, layer, head, block.T, block)
    findings = verdicts(model, "C5", "L6")
    assert {id: finding.verdict for id, finding in findings.items()} == {"C5": "holds", "L6": "holds"}
    stream = vw.open(model)
    channel = summary(vw.Channel("L0H0", "L1H1.V")(stream))
    assert (channel["score"], channel["numerical_rank"], channel["above_null_edge"]) == (0, 0, 0)
    assert float(vw.Overlap("V")(stream)["overlap"][3, 0]) == 0
    assert float(vw.Composition("V")(stream)["strength"][3, 0]) == 0


def test_a_projector_of_small_rank_has_no_negative_eigenvalue() -> None:
    model = llama(32, 8, 4, 2)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.copy_(block.mlp.up_proj.weight.T)
            for head in range(4):
                space, mix = frame(32, 3), frame(8, 3)
                write_heads(model, layer, head, mix @ space.T, space @ mix.T)
    finding = verdicts(model, "T6")["T6"]
    assert (finding.verdict, finding.figures["heads_with_a_negative_eigenvalue"]) == ("fails", 0)
    assert finding.figures["neurons_that_strengthen"] == 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nilpotent_heads_have_eigenvalues_0_and_no_shares(dtype: torch.dtype) -> None:
    model = llama(32, 8, 4, 1)
    shift = torch.diag(torch.ones(7, dtype=torch.float64), 1)
    for head in range(4):
        space, mix = frame(32, 16), frame(8, 8)
        # half read what they do not write, half shift along eight directions in a random basis
        value, out = (
            (3 * space[:, :8].T, space[:, 8:]) if head < 2 else (mix @ shift @ mix.T @ space[:, :8].T, space[:, :8])
        )
        write_heads(model, 0, head, value, out)
    record = HeadErasers(draws=2)(vw.open(model.to(dtype)))
    for share in ("copying", "negative_share", "complex_share"):
        assert all(math.isnan(value) for value in record[share].tolist()), share
    assert record["kept"].tolist() == [1.0] * 4
    assert float(record["trace"].abs().max()) == 0


def test_where_every_orientation_gives_the_same_no_question_has_a_z() -> None:
    model = llama(16, 16, 1, 3)
    for layer in range(3):
        write_heads(model, layer, 0, frame(16, 16), frame(16, 16))
    stream = vw.open(model)
    for question in (vw.Composition("V"), Subspaces("O", "V"), vw.Overlap("V")):
        assert bool(question(stream)["z"].isnan().all()), question
    assert vw.Channel("L0H0", "L1H0.V")(stream).stamp["z"] is None
    assert float(vw.Composition("V")(stream)["score"][1, 0]) == pytest.approx(0.25)


@pytest.mark.parametrize(("k", "d"), [(1, 64), (2, 32), (4, 24)])
def test_the_tail_of_chance_is_that_of_seeded_draws(k: int, d: int) -> None:
    """A normal law would call 1% what happens in up to 3% of the draws."""
    generator = torch.Generator().manual_seed(k)
    read, write = (torch.randn(k, d, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = Dense(read), Dense(write.T.contiguous())
    powers = [tuple(singular_values(map).pow(2 * j).sum() for j in (1, 2, 3)) for map in (a, b)]
    p = haar_tail(draw_null(a, b, 20_000, seed=0), *powers, d)
    for share in (0.1, 0.01):
        assert float((p < share).double().mean()) == pytest.approx(share, rel=0.2)


def test_distant_edges_of_random_models_are_not_beyond_chance() -> None:
    models = (llama(32, 2, 16, 6, seed) for seed in range(6))
    assert sum(verdicts(model, "C1")["C1"].verdict == "holds" for model in models) <= 1


def test_a_head_that_writes_nothing_has_strength_0_and_is_told_from_one_that_comes_too_late() -> None:
    model = llama(24, 2, 2, 3)
    write_heads(model, 0, 1, torch.randn(2, 24, dtype=torch.float64), torch.zeros(24, 2, dtype=torch.float64))
    stream = vw.open(model)
    record = vw.Composition("V")(stream)
    row = record["L0H1", "L2H0.V"]
    assert (row["score"], row["z"], row["strength"]) == (None, None, 0)
    rows = json.loads(record.to_json())["rows"]
    pairs = {(row["writer"], row["reader"]): row["score"] for row in rows}
    assert pairs["L0H1", "L2H0.V"] is None
    assert ("L2H0", "L0H1.V") not in pairs
    subspaces = Subspaces("O", "V")(stream)
    assert subspaces["L0H1.O", "L2H0.V"]["rank_first"] == 0
    (drawing, *_), _ = drawn(record)
    columns = len(drawing["writers"])
    undefined = {divmod(place, columns) for place in drawing["undefined"]}
    dead = drawing["writers"].index("L0H1")
    assert undefined == {(reader, dead) for reader in range(2, 6)}


def test_l1_is_decided_by_logits_and_l3_by_states_where_the_model_runs() -> None:
    model = llama(24, 4, 6, 2)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight.mul_(20)
            block.input_layernorm.weight.uniform_(0.5, 1.5)
    with norms_in_full_precision():
        findings = verdicts(model, "L1", "L3", run=True)
    l1, l3 = findings["L1"].figures, findings["L3"].figures
    assert (findings["L1"].verdict, findings["L3"].verdict) == ("holds under", "holds under")
    assert float(l1["logits_rotated"] or 0) < 1e-10 < 1e-3 < float(l1["logits_rotated_with_the_gains_in_the_norm"] or 0)
    assert float(l1["logits_not_orthogonal"] or 0) > 1e-3
    assert l3["compared"] == "states"
    assert "rotation" in findings["L1"].why
