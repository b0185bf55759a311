"""Every verdict can come out otherwise: for each statement a model on which it does, planted so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from operating import operate
from planting import HEADS, NEURONS, WIDTH, D, blank, confine, frame, plant_head, plant_neuron, plant_qk
from tiny_models import ROPE, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.statements import STATEMENTS, Finding, Statements
from virtual_weights.statements.evidence import Evidence
from virtual_weights.stream.question import asking

CHECKS = {s.id: s.check for s in STATEMENTS}


def verdict(id: str, model: nn.Module, **options: object) -> Finding:
    stream = vw.open(model)
    return CHECKS[id](Evidence(stream, asking(stream), **options))


def ordinary(seed: int = 0) -> nn.Module:
    return tiny("llama-full", seed, dtype=torch.float64)


def flat(model: nn.Module) -> nn.Module:
    """Every gain of a norm at 1."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "norm" in name:
                weight.fill_(1)
    return model


def one_wide_head(**changes: int) -> nn.Module:
    """A Llama whose one head is as wide as the stream."""
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=3, vocab_size=11) | changes
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=1, num_key_value_heads=1, rope_parameters=ROPE, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def every_head(ov: Callable[[Tensor, int, int], Tensor], model: nn.Module | None = None) -> nn.Module:
    """All heads with an OV made from the frame of directions, the layer and the head; all else 0."""
    model, axes = model or blank(), frame(0)
    for layer in range(3):
        for head in range(HEADS):
            plant_head(model, layer, head, ov(axes, layer, head))
    return model


def test_l1_is_without_condition_where_the_gains_are_1() -> None:
    assert verdict("L1", ordinary()).verdict == "holds under"
    assert verdict("L1", flat(ordinary())).verdict == "holds"
    centred = verdict("L1", tiny("gpt2", dtype=torch.float64))
    assert centred.verdict == "holds under"
    assert "centred" in str(centred.condition)


def test_l2_and_c4_and_l7_hold_where_little_is_written() -> None:
    """One head of four dimensions for each sixth of the stream, nothing else; then a second layer on top of it."""
    model, axes = blank(), frame(1)
    for head in range(HEADS):
        part = axes[:, head * WIDTH : (head + 1) * WIDTH]
        plant_head(model, 0, head, part @ axes[:, :WIDTH].T)
    assert [verdict(id, model).verdict for id in ("L2", "C4", "L7")] == ["holds"] * 3
    plant_head(model, 1, 0, axes[:, :WIDTH] @ axes[:, :WIDTH].T)
    findings = [verdict(id, model) for id in ("L2", "C4", "L7")]
    assert [finding.verdict for finding in findings] == ["holds under", "holds under", "fails"]
    assert [
        f.figures[name]
        for f, name in zip(findings, ("largest_sum_of_ranks", "sum_of_dimensions", "sum_of_dimensions"), strict=True)
    ] == [28] * 3
    assert findings[2].figures["dimension_of_the_sum"] == 24
    assert findings[2].figures["direct_subset_found"] == 6


def test_l4_and_c2_hold_where_all_read_the_same() -> None:
    model = ordinary()
    assert [verdict(id, model).verdict for id in ("L4", "C2")] == ["fails", "fails"]
    confine(model, frame(2)[:, :WIDTH])
    assert [verdict(id, model).verdict for id in ("L4", "C2")] == ["holds", "holds"]
    assert verdict("C2", model).figures["dimension_of_the_intersection"] == WIDTH


def test_l5_holds_where_the_heads_between_pass_everything_on() -> None:
    """All heads write into four dimensions and copy what they find there, each with a factor of its own."""
    model = ordinary()
    copying = every_head(lambda axes, layer, head: (1 + layer + head) * axes[:, :4] @ axes[:, :4].T, model)
    assert verdict("L5", copying).verdict == "holds"
    turning = every_head(lambda axes, layer, head: axes[:, :4] @ axes[:, 2:6].T, ordinary())
    finding = verdict("L5", turning)
    assert finding.verdict == "fails"
    assert finding.figures["triples_that_agree"] == 0


def test_l6_holds_where_all_circuits_are_symmetric_and_commute() -> None:
    gains = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))
    assert verdict("L6", every_head(lambda axes, layer, head: axes[:, :4] @ gains @ axes[:, :4].T)).verdict == "holds"
    shifted = verdict("L6", every_head(lambda axes, layer, head: axes[:, 1:5] @ gains @ axes[:, :4].T))
    assert shifted.verdict == "fails"
    assert shifted.figures["least_largest_modulus_over_largest_gain"] == pytest.approx(0, abs=1e-2)


def test_l8_is_proportional_for_heads_of_one_dimension() -> None:
    def thin(axes: Tensor, layer: int, head: int) -> Tensor:
        write, read = axes[:, head] + axes[:, layer], axes[:, head + 1] + 2 * axes[:, 7]
        return torch.outer(write, read)

    assert verdict("L8", every_head(thin)).verdict == "holds"
    finding = verdict("L8", ordinary())
    assert finding.verdict == "holds under"
    assert finding.figures["violations"] == 0


def test_l11_holds_where_what_is_efficient_clears() -> None:
    model, axes = blank(), frame(3)
    weak(model, axes, 1.0)
    assert verdict("L11", model).verdict == "holds"
    plant_neuron(model, 1, 0, axes[:, 0], -5 * axes[:, 0])
    finding = verdict("L11", model)
    assert finding.verdict == "holds under"
    assert finding.witnesses[0].startswith("L1N0")
    assert verdict("L11", weak(blank(), axes, -1.0)).verdict == "cannot tell"


def weak(model: nn.Module, axes: Tensor, gain: float) -> nn.Module:
    for layer in range(3):
        for neuron in range(NEURONS):
            plant_neuron(model, layer, neuron, axes[:, neuron % D], -gain * axes[:, neuron % D])
    return model


def test_l12_holds_where_nobody_is_disturbed() -> None:
    finding = verdict("L12", ordinary())
    assert finding.verdict == "fails"
    assert finding.figures["erased_as_written_at_price_0.9"] == 0
    assert finding.figures["erased_as_corrected_at_price_0.9"] > finding.figures["erased_as_corrected_at_price_0.1"]
    model = ordinary()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
    assert verdict("L12", model).verdict == "holds"


def test_t1_holds_where_no_head_is_thinner_than_the_stream() -> None:
    assert verdict("T1", one_wide_head()).verdict == "holds"
    finding = verdict("T1", ordinary())
    assert finding.verdict == "holds under"
    assert finding.figures["largest_rank_of_a_path"] == WIDTH
    assert finding.figures["least_rank_of_a_composed_stream"] == D
    assert finding.figures["largest_rank_of_a_composed_update"] == 3 * WIDTH


def test_t1_knows_planted_ranks_and_a_dimension_that_is_cleared() -> None:
    """Ranks 3 and 4 along a path; a head that writes minus what it reads takes its three dimensions away."""
    ranks = (3, 4, 4)
    model = every_head(lambda axes, layer, head: -axes[:, : ranks[layer]] @ axes[:, : ranks[layer]].T)
    finding = verdict("T1", model)
    assert finding.figures["least_rank"] == 3
    assert finding.figures["largest_rank_of_a_path"] == 3
    assert finding.figures["least_rank_of_a_composed_stream"] == D - 4


def test_t2_at_a_cut_depends_on_the_gains() -> None:
    """R = diag(1, e), O = diag(e, 1): each of rank 1 at the cut, their product e times the identity."""
    assert verdict("T2", ordinary()).verdict == "holds"
    small = 1e-7
    model = every_head(
        lambda axes, layer, head: (
            small * torch.outer(axes[:, 0], axes[:, 2]) + torch.outer(axes[:, 1], axes[:, 3])
            if layer == 0
            else torch.outer(axes[:, 2], axes[:, 0]) + small * torch.outer(axes[:, 3], axes[:, 1])
        )
    )
    finding = verdict("T2", model, samples=400)
    assert finding.verdict == "holds under"
    assert finding.figures["above_the_bound"] > 0


def test_t3_and_c5_where_reads_are_orthogonal_to_writes() -> None:
    apart = every_head(lambda axes, layer, head: axes[:, :4] @ axes[:, 4 + 3 * head : 8 + 3 * head].T)
    assert verdict("T3", apart).verdict == "holds"
    finding = verdict("T3", ordinary())
    assert finding.verdict == "fails"
    assert finding.figures["of_these_with_an_effect"] == finding.figures["pairs_that_meet_in_zero_alone"] > 0


def test_c5_goes_with_overlap_where_gains_are_equal_and_against_it_where_they_are_planted_so() -> None:
    def tilted(axes: Tensor, layer: int, head: int, gain: float) -> Tensor:
        """Writes a plane that leans towards what all read, the more the higher the head."""
        lean = torch.tensor(0.1 + 0.2 * head).double()
        write = lean.cos() * axes[:, 4:8] + lean.sin() * axes[:, :4]
        return gain * write @ axes[:, :4].T

    assert verdict("C5", every_head(lambda a, layer, h: tilted(a, layer, h, 1.0))).verdict == "holds"
    against = verdict("C5", every_head(lambda a, layer, h: tilted(a, layer, h, 100.0**-h)))
    assert against.verdict == "holds under"
    assert against.figures["largest_share_left"] < 1e-9


def test_t4_holds_under_a_condition_at_100_neurons_a_dimension() -> None:
    assert verdict("T4", ordinary()).verdict == "fails"
    finding = verdict("T4", one_wide_head(num_hidden_layers=2, intermediate_size=800))
    assert finding.verdict == "holds under"
    assert finding.figures["neurons_before_per_dimension"] == 100
    assert finding.figures["saving_of_a_map_through_d"] == pytest.approx(800 * 800 / (8 * 1592))


def test_t6_needs_something_that_writes_against_what_it_reads() -> None:
    model, axes = blank(), frame(4)
    plant_head(model, 1, 0, axes[:, :4] @ axes[:, :4].T)
    plant_neuron(model, 1, 0, axes[:, 0], axes[:, 0])
    assert verdict("T6", model).verdict == "fails"
    plant_neuron(model, 1, 1, axes[:, 0], -axes[:, 0])
    finding = verdict("T6", model)
    assert (finding.verdict, finding.figures["neurons_that_clear"]) == ("holds under", 1)
    wide = flat(one_wide_head())
    with torch.no_grad():
        attention = wide.model.layers[1].self_attn
        attention.o_proj.weight.copy_(-torch.linalg.inv(attention.v_proj.weight))
    assert verdict("T6", wide).verdict == "holds"


def test_c1_needs_an_edge_that_skips_a_layer() -> None:
    """Each layer writes its own dimensions and reads only its neighbour's; then one head reads two layers back."""
    model = every_head(
        lambda axes, layer, head: (
            axes[:, 6 * layer : 6 * layer + 4] @ axes[:, 6 * layer - 6 : 6 * layer - 2].T
            if layer
            else axes[:, :4] @ axes[:, 18:22].T
        )
    )
    assert verdict("C1", model).verdict == "fails"
    axes = frame(0)
    plant_head(model, 2, 3, axes[:, 12:16] @ axes[:, :4].T)
    finding = verdict("C1", model)
    assert finding.verdict == "holds"
    assert finding.witnesses[0].startswith("L0H0 -> L2H3.V, 2 layers, p ")
    assert verdict("C1", one_wide_head(num_hidden_layers=2)).verdict == "cannot tell"


def test_c3_needs_no_threshold_where_each_channel_is_one_clear_direction() -> None:
    model = blank()
    axes = frame(5)
    for layer in range(3):
        for head in range(HEADS):
            plant_head(model, layer, head, torch.outer(axes[:, 0], axes[:, 1]))
            plant_qk(model, layer, head, torch.outer(axes[:, 2], axes[:, 0]))
    assert verdict("C3", model).verdict == "holds"
    assert verdict("C3", ordinary()).verdict == "holds under"


def test_l3_needs_a_run_and_the_right_one() -> None:
    model = ordinary()
    stream = vw.open(model)
    point, _ = operate(model, stream, torch.arange(12))
    assert verdict("L3", model).verdict == "cannot tell"
    finding = verdict("L3", model, point=point)
    assert finding.verdict == "holds under"
    assert (finding.figures["compared"], finding.verdict) == ("norm scalars and gates", "holds under")
    assert float(finding.figures["largest_relative_error"] or 0) < 1e-10
    wrong = {group: 1.01 * gate for group, gate in point.gates.items() if group == "L2.mlp"}
    assert verdict("L3", model, point=replace(point, gates={**point.gates, **wrong})).verdict == "fails"
    other, _ = operate(model, stream, torch.arange(12).flip(0))
    mixed = replace(point, patterns=other.patterns, gates=other.gates)
    assert verdict("L3", model, point=mixed).verdict == "fails"
    silent = blank()
    with torch.no_grad():
        silent.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    point, _ = operate(silent, vw.open(silent), torch.arange(12))
    assert verdict("L3", silent, point=point).verdict == "holds"


def test_t7_tells_a_gate_that_listens_from_one_that_is_always_open() -> None:
    """A neuron writes against what it reads; its gate reads a direction that half of the tokens have, or all."""
    axes = frame(6)
    findings = {}
    for kind in ("half", "all"):
        model = flat(blank())
        sign = torch.ones(37, dtype=torch.float64)
        if kind == "half":
            sign[::2] = -1
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(sign[:, None] * axes[:, 0] + 0.1 * axes[:, 1])
            model.model.layers[1].mlp.gate_proj.weight[0] = 10 * axes[:, 0]
        s = ((1 + 0.01) / D + model.config.rms_norm_eps) ** 0.5  # the gate is about 10 / s where it is open
        plant_neuron(model, 1, 0, axes[:, 1], -axes[:, 1] * s**2 / 10)
        stream = vw.open(model)
        point, _ = operate(model, stream, torch.arange(12))
        findings[kind] = verdict("T7", model, point=point)
        assert verdict("T7", model).verdict == "cannot tell"
    assert {kind: finding.verdict for kind, finding in findings.items()} == {"half": "holds", "all": "fails"}
    assert findings["half"].figures["conditional"] == findings["all"].figures["unconditional"] == 1
    assert findings["half"].witnesses[0].startswith("L1N0: erases on 50% of tokens, coefficient 0.50")


def test_every_statement_has_its_row_and_its_page() -> None:
    record = Statements(samples=4)(vw.open(ordinary()))
    expected = [*(f"L{i}" for i in range(1, 13)), *(f"T{i}" for i in range(1, 8)), *(f"C{i}" for i in range(1, 7))]
    assert list(record.axis("statement").labels) == expected
    root = Path(__file__).parents[2]
    for row in record.rows():
        assert row["verdict"] in ("holds", "holds under", "fails", "cannot tell")
        assert (row["condition"] is not None) == (row["verdict"] == "holds under")
        assert (root / str(row["page"])).is_file()
        evidence = json.loads(str(row["evidence"]))
        assert evidence or row["verdict"] == "cannot tell"
    assert Statements(("T3", "L5"))(vw.open(ordinary())).axis("statement").labels == ("L5", "T3")


@pytest.mark.parametrize("wrong", [{"only": ("L13",)}, {"samples": 0}])
def test_unknown_statements_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        Statements(**wrong)


def test_statements_want_the_norm_folded() -> None:
    with pytest.raises(vw.VirtualWeightsError, match="left out"):
        Statements(("L5",))(vw.open(ordinary(), fold=False))


def orthogonal() -> nn.Module:
    """Three layers of eight neurons, each with a direction of its own."""
    model = one_neuron_layers(8)
    axes = frame(7)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.copy_(axes[:, 8 * i : 8 * i + 8])
    return model


def one_neuron_layers(neurons: int) -> nn.Module:
    sizes = dict(hidden_size=D, intermediate_size=neurons, num_hidden_layers=3, vocab_size=11, head_dim=4)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=6, rope_parameters=ROPE, tie_word_embeddings=False)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def test_l9_and_c6_and_t5_know_orthogonal_directions() -> None:
    assert [verdict(id, orthogonal()).verdict for id in ("L9", "C6", "T5")] == ["holds", "fails", "holds under"]
    findings = [verdict(id, ordinary()) for id in ("L9", "C6", "T5")]
    assert [finding.verdict for finding in findings] == ["holds under", "holds", "fails"]
    same = ordinary()
    with torch.no_grad():
        for layer in same.model.layers:
            layer.mlp.down_proj.weight.copy_(frame(8)[:, :1].expand(-1, NEURONS))
    assert verdict("L9", same).verdict == "fails", "one direction cannot tell its signals apart"


def test_l10_needs_interference() -> None:
    model = one_neuron_layers(40)
    finding = verdict("L10", model)
    assert finding.verdict == "holds under"
    assert finding.figures["total_over_pairs_exponent"] == pytest.approx(2, abs=0.2)
    assert finding.figures["squared_error_of_a_signal_exponent"] == pytest.approx(1, abs=0.2)
    assert verdict("L10", orthogonal()).verdict == "cannot tell"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(torch.block_diag(*[torch.ones(3, 5)] * 8).double())
    assert verdict("L10", model).figures["squared_error_of_a_signal_exponent"] > 0.5
