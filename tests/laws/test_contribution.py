"""Contribution equals its definition, averaged token by token over what transformers' own modules computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import contributions
from regauge import rebased, rotated
from tiny_models import SHAPES, flow, norms_in_full_precision, tiny
from torch import Tensor, nn
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.pairs.contribution import Contribution
from virtual_weights.runtime.flow.observation import Observation
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import PADDING
from virtual_weights.stream import Group, Stream, scale
from virtual_weights.stream.moments import Moments

ROWS = [torch.tensor(row) for row in ([3, 17, 5, 5, 30, 1, 22], [9, 9, 2, 36, 11, 0, 4], [8, 1, 30, 17])]
BATCH = torch.nn.utils.rnn.pad_sequence(ROWS, batch_first=True, padding_value=PADDING)


def _observed(model: nn.Module, tokens: Tensor = BATCH, batch: int = 4, **options: Any) -> tuple[Stream, Moments]:
    stream = vw.open(model).to(torch.float64)
    with norms_in_full_precision():
        return stream, Observation(**options).moments(Run.on_tokens(stream, tokens, model=model, batch=batch))


def _naive(model: nn.Module, stream: Stream, port: str, centred: bool, offset: int | None) -> dict[str, Any]:
    """Energies of every pair and of every reader's input from the definition, one prompt after another."""
    flows = [flow(model, row) for row in ROWS]
    written = [contributions(stream, signals, row) for signals, row in zip(flows, ROWS, strict=True)]
    names = [str(c.label) for c in stream.components if c.writes is not None]
    energies: dict[str, Any] = {}
    for group in stream.groups.readers(port):
        reaching = [i for i, (position, _) in enumerate(written[0]) if position <= group.reads]
        scalars = [scale(sum(w[i][1] for i in reaching), stream.spec.head.norm)[:, None] for w in written]
        read = stream.read(port, group)
        for head, label in enumerate(group.readers(port)):
            rows = read.maps[head // (sizes(stream).group if port in "KV" else 1)].double()
            after = _after(stream, flows, port, group, head, offset)
            total = 0
            for i in reaching:
                received = torch.cat([w[i][1] / s for w, s in zip(written, scalars, strict=True)]) @ rows.T
                total = total + received
                energies[label, names[i]] = _energy(received, after, centred)
            energies[label] = _energy(total, after, centred)
    return energies


def _energy(received: Tensor, after: list[tuple[float, Tensor]], centred: bool) -> float:
    received = received - received.mean(0) if centred else received
    return sum(weight * float((received @ a.T).square().sum(1).mean()) for weight, a in after)


def _after(stream: Stream, flows: list[Any], port: str, group: Group, head: int, offset: int | None) -> Any:
    """What becomes of the reader's input: a list of (weight, matrix A)."""
    if port == "V":
        return [(1.0, stream.write(group)[head].double())]
    if port not in "QK":
        return [(1.0, torch.eye(stream.read(port, group).maps.shape[1], dtype=torch.float64))]
    opposite = "K" if port == "Q" else "Q"
    other = torch.cat([f.reads[opposite, group.layer] for f in flows]).unflatten(1, (-1, sizes(stream).d_head))
    other = other[:, head // (sizes(stream).group if port == "Q" else 1)]
    length = max(map(len, ROWS))
    pairs = [(t, u) for t in range(length) for u in range(t + 1)] if offset is None else [(offset, 0)]
    after = []
    for t, u in pairs:
        turn = stream.rotation(t - u)
        turn = torch.eye(sizes(stream).d_head, dtype=torch.float64) if turn is None else turn
        rows = other @ turn if port == "Q" else other @ turn.T  # q^T (Rot^T k), (Rot q)^T k
        after.append((1 / len(pairs) / len(rows) / sizes(stream).d_head, rows))
    if port == "Q":  # softmax does not see what all keys have in common
        mean = torch.stack([rows.mean(0) for _, rows in after]).mean(0)
        after = [(weight, rows - mean) for weight, rows in after]
    return after


@pytest.mark.parametrize(("centred", "offset"), [(False, None), (True, 2)])
@pytest.mark.parametrize("name", SHAPES)
def test_contribution_is_the_average_over_tokens(name: str, centred: bool, offset: int | None) -> None:
    model = tiny(name, seed=2, dtype=torch.float64)
    stream, moments = _observed(model)
    assert (set(moments.held.values()), moments.tokens, moments.length) == ({"exact"}, 18, 7)
    heads = {str(c.label) for c in stream.heads}
    for port in ("Q", "K", "V", *(("gate", "up") if stream.spec.gated else ("in",)), "unembed"):
        record = Contribution(port, moments, centred, "all", offset)(stream)
        naive = _naive(model, stream, port, centred, offset)
        rows = {(r["reader"], r["writer"]): r for r in record.rows()}
        assert rows.keys() == {key for key in naive if isinstance(key, tuple)}
        for (reader, writer), row in rows.items():
            expected = naive[reader, writer]
            assert row["contribution"] == pytest.approx(expected, rel=1e-9, abs=1e-14), (port, reader, writer)
            if port in "QKV" and writer in heads:
                assert row["share"] == pytest.approx(expected / naive[reader], rel=1e-9), (port, reader, writer)


def test_factorised_moments_are_exact_in_the_energy_written() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    stream, exact = _observed(model)
    _, factorised = _observed(model, memory_mb=0)
    assert factorised.held == {"heads": "factorised", "MLPs": "energy alone", "embeddings": "energy alone"}
    assert "embed" not in factorised.second
    for group, writes in (("L0.attn", 1), ("L1.attn", 3)):
        out = stream.write(group).double()
        square = out.mT @ out
        for state in range(writes, stream.states):
            energies = [(square * m.held_at(group, state - writes)[0]).sum((1, 2)) for m in (exact, factorised)]
            torch.testing.assert_close(energies[0], energies[1], rtol=1e-9, atol=0)
            torch.testing.assert_close(energies[0], exact.energy[group][state - writes], rtol=1e-9, atol=0)
        assert not torch.allclose(exact.held_at(group, 1)[0], factorised.held_at(group, 1)[0], rtol=1e-3)
    alone = Contribution("K", factorised, writers="all")(stream)
    assert "embed" not in alone.axis("writer").labels


def test_moments_are_exact_from_heads_to_embeddings_to_mlps_as_memory_allows() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    stream, exact = _observed(model)
    d, states = stream.d_model, stream.states
    heads = sum(8 * 6 * 4**2 * (states - group.first) for group in stream.groups.heads)
    embedding = 8 * d * d * (states - stream.groups["embed"].first - 1)
    known, names = [], ("heads", "MLPs", "embeddings")
    for budget in (heads, heads + 8 * d * d * 4, heads + 8 * d * d * 4 + embedding):
        _, moments = _observed(model, memory_mb=budget / 2**20)
        known.append(tuple(moments.held[name] for name in names))
        assert torch.equal(moments.second["L0.attn"], exact.second["L0.attn"])
        record = Contribution("K", moments, writers="all")(stream)
        assert record.stamp["held"] == moments.held
    assert known == [
        ("exact", "energy alone", "energy alone"),
        ("exact", "factorised", "factorised"),
        ("exact", "factorised", "exact"),
    ]


def test_moments_read_back_are_held_alike_in_the_same_order(tmp_path: Path) -> None:
    _, moments = _observed(tiny("llama-grouped-untied", dtype=torch.float64), memory_mb=0)
    moments.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors")
    assert list(again.held.items()) == list(moments.held.items())


def test_sinks_are_first_tokens_and_tokens_of_huge_norm() -> None:
    model: Any = tiny("llama-grouped-untied", dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[30] *= 1000
    stream = vw.open(model).to(torch.float64)
    run = vw.Run.on_tokens(stream, BATCH, model=model)
    counted = (BATCH >= 0) & (BATCH != 30) & (torch.arange(BATCH.shape[1]) > 0)
    without = vw.Observation(sinks="left out").moments(run)
    assert (without.tokens, without.length) == (13, 7) == (int(counted.sum()), len(ROWS[0]))
    assert without.text.endswith(", without sinks")
    x = model.model.embed_tokens(BATCH[counted]).detach()
    expected = (x.square().mean(-1) + sizes(stream).norm_eps).sqrt().mean()
    assert float(without.states["norm"][0]) == pytest.approx(float(expected), rel=1e-9)
    with pytest.raises(vw.VirtualWeightsError, match="every token is a sink"):
        vw.Observation(sinks="left out").moments(vw.Run.on_tokens(stream, BATCH[:, :1], model=model))
    with pytest.raises(vw.VirtualWeightsError, match="sinks='gone'"):
        vw.Observation(sinks="gone")  # pyright: ignore[reportArgumentType]


def test_padding_never_counts_and_batching_changes_nothing() -> None:
    model = tiny("llama-biases-wide-heads", dtype=torch.float64)
    _, together = _observed(model)
    for tokens, batch in ((BATCH, 1), (BATCH, 2), (BATCH[[2, 0, 1]], 4)):
        _, apart = _observed(model, tokens, batch)
        assert apart.tokens == together.tokens == 18
        for name, tensor in together._tensors().items():
            torch.testing.assert_close(apart._tensors()[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_padding_before_a_token_is_refused() -> None:
    with pytest.raises(vw.VirtualWeightsError, match="padding before a token"):
        _observed(tiny("gpt2"), BATCH.flip(1))
    with pytest.raises(vw.VirtualWeightsError, match="no tokens"):
        _observed(tiny("gpt2"), BATCH[:0])


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_re_basing_of_values_changes_nothing(name: str) -> None:
    """Values in another basis; queries and keys too where no rotary turns them."""
    model = tiny(name, dtype=torch.float64)
    for bias in (p for n, p in model.named_parameters() if n.endswith(("attn.c_attn.bias", "query_key_value.bias"))):
        bias.data.zero_()
    ports = ("Q", "K", "V") if name == "gpt2" else ("V",)
    if name != "gpt2":
        for n, p in model.named_parameters():
            p.data.mul_(0 if n.endswith(("q_proj.weight", "k_proj.weight")) else 1)  # else rotary sees the basis
    if name.startswith("neox"):
        fused = [m.query_key_value.weight.data.view(4, 3, 8, -1) for m in (x.attention for x in model.gpt_neox.layers)]
        for weight in fused:
            weight[:, :2] = 0
    answers = []
    for variant in (model, rebased(model, 3)):
        stream, moments = _observed(variant)
        answers.append([Contribution(port, moments)(stream)["contribution"] for port in ports])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, equal_nan=True)


def test_rotation_of_the_stream_changes_nothing() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    answers = []
    for variant in (model, rotated(model, 5)):
        stream, moments = _observed(variant)
        answers.append(
            [Contribution(port, moments, writers="all")(stream)["contribution"] for port in ("Q", "K", "V", "up")]
        )
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, equal_nan=True)


def test_moments_of_another_model_are_refused() -> None:
    _, moments = _observed(tiny("gpt2"))
    with pytest.raises(vw.VirtualWeightsError, match="another checkpoint"):
        Contribution("K", moments)(vw.open(tiny("gpt2", seed=9)))


@pytest.mark.parametrize(("name", "offset"), [("gpt2", None), ("llama-grouped-untied", 3)])
def test_what_varies_between_keys_is_the_contribution_without_its_mean(name: str, offset: int | None) -> None:
    """Without rotary at every offset, with it at a single one."""
    stream, moments = _observed(tiny(name, seed=2, dtype=torch.float64))
    whole, centred = (Contribution("K", moments, c, "all", offset)(stream) for c in (False, True))
    torch.testing.assert_close(whole["varying"], centred["contribution"], rtol=1e-9, atol=1e-12, equal_nan=True)
    assert bool((whole["contribution"] - whole["varying"]).nan_to_num().max() > 1e-3)
    assert "varying" not in [column.name for column in centred.columns]
