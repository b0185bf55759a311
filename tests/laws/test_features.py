"""Features of attached dictionaries take part in questions like heads and neurons: each against its own definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dictionary_files as files
import numpy as np
import pytest
import torch
from every_question import borrowed
from tiny_models import norms_in_full_precision, tiny
from torch import Tensor, nn

import virtual_weights as vw
from virtual_weights.errors import ResourceError, UsageError
from virtual_weights.runtime.features.coactivity import coactivations
from virtual_weights.runtime.running.hooks import watched
from virtual_weights.stream.coactivations import Coactivations

TOKENS = torch.randint(37, (6, 9), generator=torch.Generator().manual_seed(3))
F = 7
MODEL = "llama-grouped-untied"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny(MODEL, dtype=torch.float64)


@pytest.fixture(scope="module")
def crossing(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> vw.Stream:
    """With a cross-layer transcoder: its maps differ with the state that somebody reads."""
    folder = tmp_path_factory.mktemp("clt")
    files.circuit_tracer_clt(folder / "clt", 24, F, 3, 5, jumps=False)
    return vw.open(model, attach=[folder / "clt"]).to(torch.float64)


@pytest.fixture(scope="module")
def layered(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> vw.Stream:
    """With a transcoder for each layer."""
    folder = tmp_path_factory.mktemp("tc")
    files.circuit_tracer_set(folder / "tc", 24, F, 3, 5, activation="relu")
    return vw.open(model, attach=[folder / "tc"]).to(torch.float64)


def run_of(stream: vw.Stream, model: nn.Module) -> vw.Run:
    return vw.Run.on_tokens(stream, TOKENS, model=model)


def as_written(stream: vw.Stream, name: str, state: int) -> Tensor:
    """Decoders (F, d) of what is written by a state, straight from the file."""
    part = stream.attached[name]
    return torch.stack([d.rows(slice(0, F)).double() for place, d in part.writings if place.state <= state]).sum(0)


def encoder(stream: vw.Stream, name: str) -> Tensor:
    return stream.read("enc", name).maps[0].double()


def value_of(record: vw.Record, reader: str, writer: str) -> float | None:
    """The first column of a pair; None of one that cannot be."""
    values = np.asarray(record[record.columns[0].name])
    value = values[record.axes[0].labels.index(reader), record.axes[1].labels.index(writer)]
    return None if np.isnan(value) else float(value)


@pytest.mark.parametrize("question", [vw.Composition, vw.Overlap])
def test_a_whole_dictionary_beside_everything_else(question: Any, crossing: vw.Stream) -> None:
    stream = crossing
    record = question("enc", writers="all")(stream)
    for reader in ("clt0", "clt1", "clt2"):
        state = stream.groups[reader].reads
        assert state is not None
        rows = encoder(stream, reader)
        for writer in ("clt0", "clt1", "clt2"):
            spans = {first: f"{writer}:F@{first}" for first in stream.groups[writer].writes}
            spans = spans if len(spans) > 1 else dict.fromkeys(spans, f"{writer}:F")
            reached = [first for first in spans if first <= state]
            for first, label in spans.items():
                value = value_of(record, f"{reader}:F.enc", label)
                if not reached or first != max(reached):
                    assert value is None, "another of them stands for it in this state"
                    continue
                dec = as_written(stream, writer, state)
                if question is vw.Composition:
                    expected = (rows @ dec.T).norm() / rows.norm() / dec.norm()
                else:
                    left, right = (torch.linalg.qr(m.T).Q for m in (rows, dec))
                    expected = (left.T @ right).square().sum() / F
                assert value == pytest.approx(float(expected), rel=1e-4)
        assert (value_of(record, f"{reader}:F.enc", "L0H1") is None) == (state < 1)


def test_features_and_heads(crossing: vw.Stream) -> None:
    stream = crossing
    into = vw.HeadNeuron("enc")(stream)
    assert into.axes[0].labels == tuple(f"clt{i}:F{f}.enc" for i in range(3) for f in range(F))
    head = stream["L0H2"]
    assert isinstance(head, vw.Head)
    ov = head.ov.dense().double()
    for f in range(F):
        row = encoder(stream, "clt1")[f]
        assert into[f"clt1:F{f}.enc", "L0H2"]["strength"] == pytest.approx(float((row @ ov).norm()), rel=1e-4)
    out = vw.NeuronHead("V")(stream)
    labels = [label for label in out.axes[1].labels if ":" in label]
    assert labels == [f"clt{i}:F{f}" for i in range(3) for f in range(F)]
    for layer in (1, 2):
        reader = stream[f"L{layer}H3"]
        assert isinstance(reader, vw.Head)
        state = stream.groups[f"L{layer}.attn"].reads
        assert state is not None
        for i in range(layer):
            dec = as_written(stream, f"clt{i}", state)
            for f in range(F):
                found = out[f"L{layer}H3.V", f"clt{i}:F{f}"]
                seen = (reader.ov.dense().double() @ dec[f]).norm()
                assert found["strength"] == pytest.approx(float(seen), rel=1e-4)
                whole = seen / reader.ov.dense().double().norm() / dec[f].norm()
                assert found["score"] == pytest.approx(float(whole), rel=1e-4)
    assert value_of(out, "L0H3.V", "clt0:F1") is None, "it cannot reach"
    only = vw.NeuronHead("V", writer="clt0:F3")(stream)
    assert only.axes[1].labels == ("clt0:F3",)


@pytest.mark.parametrize(("port", "whole"), [("enc", vw.HeadNeuron), ("up", vw.HeadNeuron), ("V", vw.NeuronHead)])
def test_the_strongest_units_of_each_head(port: Any, whole: Any, crossing: vw.Stream) -> None:
    """The same numbers as the table of all pairs, head by head."""
    table = whole(port)(crossing)
    scores = torch.as_tensor(table["score"]) if port == "V" else torch.as_tensor(table["score"]).T
    heads, units = (table.axes[0], table.axes[1])[:: 1 if port == "V" else -1]
    top = vw.HeadUnits(port, 4)(crossing)
    sides = ("reader", "writer") if port == "V" else ("writer", "reader")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in top.rows():
        found.setdefault(row[sides[0]], []).append(row)
    assert top.stamp["pairs"] == int((~scores.isnan()).sum())
    for head, name in enumerate(heads.labels):
        order = scores[head].nan_to_num(-1.0).argsort(descending=True)[: min(4, int((~scores[head].isnan()).sum()))]
        assert [row[sides[1]] for row in found.get(name, [])] == [units.labels[i] for i in order.tolist()]
        for rank, (row, unit) in enumerate(zip(found.get(name, []), order.tolist(), strict=True), 1):
            pair = (name, units.labels[unit]) if port == "V" else (units.labels[unit], name)
            for column in ("score", "strength", "null_ratio", "z"):
                assert row[column] == pytest.approx(table[pair][column], rel=1e-6)
            assert row["rank"] == rank


def test_strongest_edges_of_each_reader_and_each_writer(crossing: vw.Stream) -> None:
    stream = crossing
    into = vw.NeuronNeuron("up", 200, writers="features")(stream)
    rows = {(row["writer"], row["reader"]): row for row in into.rows()}
    state = stream.groups["L2.mlp"].reads
    assert state is not None
    up = stream.read("up", "L2.mlp").maps[0].double()
    for i in range(2):
        dec = as_written(stream, f"clt{i}", state)
        for f in range(F):
            row = rows[f"clt{i}:F{f}", "L2N5.up"]
            assert row["strength"] == pytest.approx(float(up[5] @ dec[f]), abs=1e-5)
            cosine = up[5] @ dec[f] / up[5].norm() / dec[f].norm()
            assert row["score"] == pytest.approx(float(cosine), abs=1e-6)
    out = vw.NeuronReaders("up", 3, writers="features")(stream)
    best: dict[str, list[tuple[float, str]]] = {}
    for (writer, reader), row in rows.items():
        best.setdefault(writer, []).append((abs(row["score"]), reader))
    found = {(row["writer"], row["reader"]): row for row in out.rows()}
    assert {row["rank"] for row in found.values()} == {1, 2, 3}
    for writer, readers in best.items():
        strongest = sorted(readers, reverse=True)[:3]
        assert {reader for w, reader in found if w == writer} == {reader for _, reader in strongest}
    for pair, row in found.items():
        assert row["strength"] == pytest.approx(rows[pair]["strength"], abs=1e-9)
    both = vw.NeuronNeuron("enc", 500)(stream)
    assert {row["writer"].partition("N")[0] for row in both.rows() if ":" not in row["writer"]} == {"L0", "L1"}
    with pytest.raises(UsageError, match="writers="):
        vw.NeuronNeuron("enc", writers="heads")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_directions_and_vectors(crossing: vw.Stream) -> None:
    stream = crossing
    row = encoder(stream, "clt2")[4]
    record = vw.VectorReaders(vw.Vector(-3 * row), at="L1")(stream)
    best = record.top(1, "score")
    (row_,) = best.rows()
    assert (row_["reader"], row_["kind"], row_["sign"]) == ("clt2:F4.enc", "feature", -1)
    dec = as_written(stream, "clt0", stream.states - 1)[2]
    writers = vw.VectorWriters(vw.Vector(dec))(stream)
    assert next(iter(writers.top(1, "score").rows()))["writer"] == "clt0:F2"
    kinds = dict(zip(writers.axes[0].labels, writers["kind"], strict=True))
    assert kinds["clt0:F2"] == "feature"
    assert kinds["L0N3"] == "neuron"
    coherence = vw.Coherence("enc")(stream)
    assert coherence.stamp["directions"] == 3 * F
    with pytest.raises(UsageError, match="nothing that is attached"):
        vw.Coherence("dec")(vw.open(tiny(MODEL)))


def live(stream: vw.Stream, model: nn.Module, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every dictionary the pre-activations (B, T, F) by the file's own encoder, and the scalar it divides by."""
    names = [part.name for part in stream.attached.parts]
    states = {("state", stream.groups[name].reads or 0) for name in names}
    with torch.no_grad():
        signals, _ = watched(model, stream, states, tokens)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        x, part = signals["state", stream.groups[name].reads or 0], stream.attached[name]
        assert part.part.encoder is not None
        assert part.part.bias is not None
        found[name] = x @ part.part.encoder(slice(0, F)).double().T + part.part.bias.double(), x
    return found


def test_what_is_active_together(layered: vw.Stream, model: nn.Module) -> None:
    stream, run = layered, run_of(layered, model)
    averages = coactivations(run, without_sinks=False)
    acts = {name: pre.relu().flatten(0, 1) for name, (pre, _) in live(stream, model, TOKENS).items()}
    n = TOKENS.numel()
    assert averages.tokens == n
    assert set(averages.pairs) == {"tc0>tc1", "tc0>tc2", "tc1>tc2"}
    for key, pairs in averages.pairs.items():
        a, b = (acts[name] for name in key.split(">"))
        torch.testing.assert_close(averages.mean[key.split(">")[0]], a.mean(0))
        assert averages.active[key.split(">")[1]].tolist() == (b > 0).sum(0).tolist()
        product, gated, together = a.T @ b / n, a.T @ (b > 0).double() / n, (a > 0).double().T @ (b > 0).double()
        i, j = pairs.long().T
        assert int((together > 0).sum()) == len(pairs), "all that are active together, and no others"
        torch.testing.assert_close(averages.product[key], product[i, j])
        torch.testing.assert_close(averages.gated[key], gated[i, j])
        assert averages.together[key].tolist() == together[i, j].tolist()
    halves = [coactivations(half, without_sinks=False) for half in run.halves()]
    joined = halves[0].joined(halves[1], "both")
    for key in averages.pairs:
        torch.testing.assert_close(joined.product[key], averages.product[key])
        assert joined.pairs[key].tolist() == averages.pairs[key].tolist()
        assert joined.together[key].tolist() == averages.together[key].tolist()


def test_edges_between_features(layered: vw.Stream, model: nn.Module, tmp_path: Path) -> None:
    stream, run = layered, run_of(layered, model)
    averages = coactivations(run, without_sinks=False)
    averages.save(tmp_path / "averages.safetensors")
    again = Coactivations.load(tmp_path / "averages.safetensors", stream)
    assert again.identity == averages.identity
    record = vw.FeatureEdges(again, top=10_000, least=1)(stream)
    rows = {(row["writer"], row["reader"]): row for row in record.rows()}
    assert len(rows) == sum(map(len, averages.pairs.values()))
    for key, pairs in averages.pairs.items():
        source, target = key.split(">")
        for at, (i, j) in enumerate(pairs.tolist()):
            row = rows[f"{source}:F{i}", f"{target}:F{j}.enc"]
            weight = float(vw.virtual_weight(stream, f"{source}:F{i}", f"{target}:F{j}.enc").dense())
            assert row["weight"] == pytest.approx(weight, rel=1e-5)
            assert row["era"] == pytest.approx(weight * float(averages.gated[key][at]), rel=1e-5)
            ratio = float(averages.product[key][at] / averages.mean[target][j])
            assert row["twera"] == pytest.approx(weight * ratio, rel=1e-5)
    sizes = [abs(row["era"]) for row in record.rows()]
    assert sizes == sorted(sizes, reverse=True)
    often = vw.FeatureEdges(averages, least=20, top=10_000)(stream)
    assert 0 < len(often.axes[0].labels) < len(rows)
    assert min(row["reader_active"] for row in often.rows()) >= 20
    only = vw.FeatureEdges(averages, source="tc0", target="tc2", least=1, by="twera")(stream)
    assert {row["writer"].partition(":")[0] for row in only.rows()} == {"tc0"}
    with pytest.raises(UsageError, match="no features of tc2"):
        vw.FeatureEdges(averages, source="tc2")(stream)
    with pytest.raises(UsageError, match="another model"):
        vw.FeatureEdges(averages)(vw.open(model))
    with pytest.raises(ResourceError, match="pairs of features"):
        coactivations(run, memory_mb=0)


def test_halves_compared(layered: vw.Stream, model: nn.Module) -> None:
    stream = layered
    first, second = (coactivations(half, without_sinks=False) for half in run_of(stream, model).halves())
    record = vw.FeatureInterference(first, second, top=5, least=2)(stream)
    for key in first.pairs:
        source, target = key.split(">")
        alive = [
            [f for f in range(F) if min(half.active[name][f] for half in (first, second)) >= 2]
            for name in (source, target)
        ]
        row = record[key,]
        assert row["pairs"] == len(alive[0]) * len(alive[1])
        together = {(i, j) for half in (first, second) for i, j in half.pairs[key].tolist()}
        every = [(i, j) for i in alive[0] for j in alive[1]]
        never = [pair for pair in every if pair not in together]
        assert row["never"] == pytest.approx(len(never) / len(every))
        weight = {
            (i, j): abs(float(vw.virtual_weight(stream, f"{source}:F{i}", f"{target}:F{j}.enc").dense()))
            for i, j in every
        }
        largest = sorted(every, key=lambda pair: -weight[pair])[:5]
        assert row["never_of_largest"] == pytest.approx(sum(pair in never for pair in largest) / len(largest))
        era = [
            torch.tensor(
                [
                    weight[i, j]
                    * sum(
                        float(g) for g, p in zip(half.gated[key], half.pairs[key].tolist(), strict=True) if p == [i, j]
                    )
                    for i, j in every
                ]
            )
            for half in (first, second)
        ]
        ranks = [x.unique(return_inverse=True)[1].double() for x in era]
        assert row["era_era"] == pytest.approx(_spearman(*era), abs=1e-6), ranks
        assert row["weight_era"] == pytest.approx(_spearman(torch.tensor([weight[p] for p in every]), era[1]), abs=1e-6)


def _spearman(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def removal(stream: vw.Stream, model: nn.Module, writer: Tensor, feature: int) -> float:
    """Loss change when tc1's feature reads less: its own definition, with a hook of our own on the MLP's output."""
    pre, _ = live(stream, model, TOKENS)["tc1"]
    part = stream.attached["tc1"].part
    assert part.encoder is not None
    moved = (writer.mean((0, 1)) - writer) @ part.encoder(slice(0, F))[feature].double()
    change = (pre[..., feature] + moved).relu() - pre[..., feature].relu()
    added = change[..., None] * part.decoders[0].rows(slice(0, F))[feature].double()
    mlp: Any = model.model.layers[1].mlp  # pyright: ignore
    with torch.no_grad():
        before = model(TOKENS, labels=TOKENS).loss
        hook = mlp.register_forward_hook(lambda _, __, output: output + added)
        after = model(TOKENS, labels=TOKENS).loss
        hook.remove()
    return float(after - before)


def test_removing_edges_of_features(layered: vw.Stream, model: nn.Module) -> None:
    """A feature that reads less writes less, and one that writes is a writer like a neuron."""
    stream, run = layered, run_of(layered, model)
    with torch.no_grad():
        signals, _ = watched(model, stream, {("inner", "L0.attn")}, TOKENS)
    head = signals["inner", "L0.attn"][:, :, 2] @ stream.write("L0.attn")[2].double().T
    found = vw.EdgeAblation("L0H2", "tc1:F3.enc")(run)
    assert found["L0H2", "tc1:F3.enc"]["effect_nats"] == pytest.approx(removal(stream, model, head, 3), rel=1e-3)
    wrote = live(stream, model, TOKENS)["tc0"][0].relu()[..., 5, None] * as_written(stream, "tc0", 2)[5]
    found = vw.EdgeAblation("tc0:F5", "tc1:F3.enc")(run)
    assert found["tc0:F5", "tc1:F3.enc"]["effect_nats"] == pytest.approx(removal(stream, model, wrote, 3), rel=1e-3)
    whole = vw.Ablation([("tc0:F5", "tc1:F3.enc"), ("tc0:F5", "L1H2.V"), ("tc0:F", "L2.mlp.up")], random=2)(run)
    assert len(whole.axes[0].labels) >= 5
    assert bool(torch.as_tensor(whole["effect_nats"]).isfinite().all())
    together = vw.EdgeSetAblation([("tc0:F5", "tc1:F3.enc"), ("L0H2", "L1H2.K")])(run)
    assert np.isfinite(together["removed",]["value"])


def test_removing_what_a_cross_layer_feature_writes(crossing: vw.Stream, model: nn.Module) -> None:
    run = run_of(crossing, model)
    record = vw.EdgeAblation("clt0:F5", "L2.mlp.up")(run)
    state = crossing.groups["L2.mlp"].reads
    assert np.isfinite(record[f"clt0:F5@{state}", "L2.mlp.up"]["effect_nats"])


@pytest.mark.parametrize("stamp", ["layered", "crossing"])
def test_attribution_is_the_derivative_of_removal(stamp: str, model: nn.Module, request: pytest.FixtureRequest) -> None:
    from virtual_weights.runtime.edges.edge import Edge, Removal, removed
    from virtual_weights.runtime.edges.losses import next_token_loss

    stream: vw.Stream = request.getfixturevalue(stamp)
    run = run_of(stream, model)
    into, out = (vw.Attribution(port, writers="all")(run) for port in ("enc", "up"))
    name = "tc" if stamp == "layered" else "clt"
    first = max(w for w in stream.groups[f"{name}0"].writes if w <= (stream.groups["L2.mlp"].reads or 0))
    late = f"{name}0:F" if stamp == "layered" else f"{name}0:F@{first}"
    for record, writer, reader, label in (
        (into, "L0H2", f"{name}1:F.enc", "L0H2"),
        (into, f"{name}0:F", f"{name}2:F.enc", late),
        (out, f"{name}0:F", "L2.mlp.up", late),
    ):
        losses = list[float]()
        for fraction in (1e-3, -1e-3):
            with (
                torch.no_grad(),
                norms_in_full_precision(),
                removed(model, stream, [Edge.of(stream, writer, reader)], Removal(fraction=fraction)),
            ):
                losses.append(float(next_token_loss(model(TOKENS).logits, TOKENS).mean()))
        slope = (losses[0] - losses[1]) / 2e-3
        assert record[reader, label]["attribution"] == pytest.approx(slope, rel=5e-3, abs=1e-6)


def test_contribution_and_paths(layered: vw.Stream, model: nn.Module) -> None:
    stream, run = layered, run_of(layered, model)
    moments = vw.Observation().moments(run)
    record = vw.Contribution("enc", moments, writers="heads")(stream)
    assert "tc1" in record.stamp["tokens_weighted"]
    second, _ = moments.held_at("L0.attn", stream.groups["tc1"].reads - 1)  # type: ignore[operator] # pyright: ignore
    maps = encoder(stream, "tc1") @ stream.write("L0.attn")[2].double()
    energy = float(torch.einsum("ij,jk,ik->", maps, second[2], maps)) ** 0.5
    assert record["tc1:F.enc", "L0H2"]["contribution"] == pytest.approx(energy**2, rel=1e-3) or record[
        "tc1:F.enc", "L0H2"
    ]["contribution"] == pytest.approx(energy, rel=1e-3)
    paths = vw.Paths("tc0:F1", "tc2:F2.enc", order=2)(stream)
    weight = float(vw.virtual_weight(stream, "tc0:F1", "tc2:F2.enc").dense().abs())
    assert paths["tc0:F1 > tc2:F2.enc",]["strength"] == pytest.approx(weight, rel=1e-5)


def test_a_dictionary_that_was_trained(tmp_path: Path) -> None:
    """Transcoders explain more than the mean, in circuit-tracer's files; an adapter lowers the loss, in peft's."""
    small = tiny(MODEL)
    stream = vw.open(small)
    run = vw.Run.on_repeats(stream, 512, 32, model=small)
    fits = vw.train_transcoders(run, tmp_path / "tc", (1,), features=32, k=8, steps=150)
    assert fits[0].unexplained < 0.9
    attached = vw.open(small, attach=[tmp_path / "tc"])
    assert [group.id for group in attached.groups.attached] == ["tc1"]
    before, after = vw.train_lora(run, tmp_path / "lora", steps=40)
    assert after < before
    adapted = vw.open(small, attach=[tmp_path / "lora"])
    assert adapted.provenance["fingerprint"] != stream.provenance["fingerprint"]
    factors = vw.open(small, attach=[f"{tmp_path / 'lora'}@factors"])
    assert {"lora0q", "lora0v", "lora0o", "lora0down"} <= {group.id for group in factors.groups.attached}
    with pytest.raises(UsageError, match="no MLP in layer 7"):
        vw.train_transcoders(run, tmp_path / "tc", (7,))


@pytest.mark.parametrize("shape", [MODEL, "gpt2", "gemma3"])
def test_features_that_are_neurons_have_the_edges_of_neurons(shape: str) -> None:
    """Whatever the norms before and behind the MLPs are."""
    stream = borrowed(vw.open(tiny(shape, dtype=torch.float64)).to(torch.float64), 5)
    port = stream.groups.mlps[0].ports[-1]
    assert port in ("up", "in")
    ports: list[Any] = [port, "enc"]
    into, as_features = (vw.HeadNeuron(each)(stream) for each in ports)
    edges = [
        {(row["writer"], row["reader"]): row["strength"] for row in vw.NeuronNeuron(each, 500)(stream).rows()}
        for each in ports
    ]
    out = vw.NeuronHead("K")(stream)
    for layer in (1, 2):
        for i in range(5):
            own, feature = f"L{layer}N{i}.{port}", f"own{layer}:F{i}.enc"
            assert as_features[feature, "L0H1"]["strength"] == pytest.approx(into[own, "L0H1"]["strength"], rel=1e-5)
            written = f"L0N{i}", f"own0:F{i}"
            assert edges[1][written[1], feature] == pytest.approx(edges[0][written[0], own], abs=1e-5)
            assert edges[0][written[1], own] == pytest.approx(edges[0][written[0], own], abs=1e-5)
            heads = [out["L2H1.K", name]["score"] for name in written]
            assert heads[0] == pytest.approx(heads[1], rel=1e-5)


def test_what_a_norm_behind_the_part_takes_from_a_feature(tmp_path: Path) -> None:
    """What is removed of a transcoder at an MLP's own output is what that norm passes of it, token by token."""
    model: Any = tiny("gemma3", dtype=torch.float64)
    files.saelens(tmp_path / "tc", 24, F, 1, 5, architecture="transcoder")
    reference = f"tc={tmp_path / 'tc'}@L0.mlp.normed,L0.mlp.output"
    stream = vw.open(model, attach=[reference]).to(torch.float64)
    layer, seen = model.model.layers[0], dict[str, Tensor]()
    hooks = [
        layer.mlp.register_forward_hook(lambda _, given, output: seen.update(x=given[0], y=output)),
        model.model.layers[2].pre_feedforward_layernorm.register_forward_pre_hook(lambda _, g: seen.update(late=g[0])),
    ]
    with torch.no_grad():
        before = model(TOKENS, labels=TOKENS).loss
    for hook in hooks:
        hook.remove()
    part, norm = stream.attached["tc"].part, layer.post_feedforward_layernorm
    assert part.encoder is not None
    assert part.bias is not None
    some = slice(0, F)
    activations = part.activation(seen["x"] @ part.encoder(some).double().T + part.bias.double())
    scalar = (seen["y"].square().mean(-1, keepdim=True) + norm.eps).sqrt()
    wrote = activations[..., 2, None] * part.decoders[0].rows(some)[2].double() * (1 + norm.weight) / scalar
    after = model.model.layers[2].pre_feedforward_layernorm
    size = (seen["late"].square().mean(-1, keepdim=True) + after.eps).sqrt()
    moved = (wrote.mean((0, 1)) - wrote) * (1 + after.weight) / size
    up = model.model.layers[2].mlp.up_proj
    hook = up.register_forward_hook(lambda _, __, output: output + moved @ up.weight.T)
    with torch.no_grad():
        expected = float(model(TOKENS, labels=TOKENS).loss - before)
    hook.remove()
    found = vw.EdgeAblation("tc:F2", "L2.mlp.up")(run_of(stream, model))
    assert found["tc:F2", "L2.mlp.up"]["effect_nats"] == pytest.approx(expected, rel=2e-3, abs=1e-7)
    both = f"late={tmp_path / 'tc'}@L2.mlp.normed,L2.mlp.added"
    stream = vw.open(model, attach=[reference, both]).to(torch.float64)
    averages = coactivations(run_of(stream, model), without_sinks=False)
    inside = (activations / scalar / size).flatten(0, 1)
    with torch.no_grad():
        signals, _ = watched(model, stream, {("state", stream.groups["late"].reads or 0)}, TOKENS)
    x = next(iter(signals.values()))
    reads = encoder(stream, "late")
    target = part.activation((x / size) @ reads.T + part.bias.double()).flatten(0, 1)
    gated = inside.T @ (target > 0).double() / TOKENS.numel()
    i, j = averages.pairs["tc>late"].long().T
    torch.testing.assert_close(averages.gated["tc>late"], gated[i, j])


def test_an_edge_out_of_a_feature_that_reads_less(layered: vw.Stream, model: nn.Module) -> None:
    """Removed together with an edge into it, it is removed as it then writes: nothing of it arrives."""
    from virtual_weights.runtime.edges.edge import Edge, EdgeSet, Removal, removed

    stream = layered
    edges = [Edge.of(stream, "L0H0", "tc1:F3.enc"), Edge.of(stream, "tc1:F3", "L2.mlp.up")]
    nothing = Removal(means={"L0H0": torch.zeros(24), "tc1:F3": torch.zeros(24)})
    part = stream.attached["tc1"].part
    column = part.decoders[0].rows(slice(0, F))[3].double()
    seen = dict[str, Tensor]()
    mlp: Any = model.model.layers[2].mlp  # pyright: ignore
    layer: Any = model.model.layers[2]  # pyright: ignore

    def reads(_: Any, given: Any, output: Tensor) -> None:
        seen["up"] = output

    hook = mlp.up_proj.register_forward_hook(reads)
    with torch.no_grad(), removed(model, stream, [EdgeSet(tuple(edges))], nothing):
        hook.remove()
        hook = mlp.up_proj.register_forward_hook(reads)  # behind what removes
        late = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, g: seen.update(x=g[0]))
        model(TOKENS)
    hook.remove()
    late.remove()
    pre, _ = live(stream, model, TOKENS)["tc1"]
    with torch.no_grad():
        signals, _ = watched(model, stream, {("inner", "L0.attn")}, TOKENS)
    head = signals["inner", "L0.attn"][:, :, 0] @ stream.write("L0.attn")[0].double().T
    assert part.encoder is not None
    less = (pre[..., 3] - head @ part.encoder(slice(0, F))[3].double()).relu()  # what the feature then is
    norm = layer.post_attention_layernorm
    s = (seen["x"].square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    expected = (seen["x"] - less[..., None] * column) * norm.weight / s @ mlp.up_proj.weight.T
    torch.testing.assert_close(seen["up"], expected, rtol=1e-5, atol=1e-6)


def test_what_has_no_edges_in_a_run_says_so(model: nn.Module, tmp_path: Path) -> None:
    files.saelens(tmp_path / "sae", 24, F, 1, 5, architecture="standard")
    np.save(tmp_path / "v.npy", np.eye(24)[:2])
    references = [
        f"sae={tmp_path / 'sae'}@L1.begin",
        f"out={tmp_path / 'sae'}@L0.mlp.output",
        f"v={tmp_path / 'v.npy'}@2",
    ]
    stream = vw.open(model, attach=references).to(torch.float64)
    assert stream.groups["sae"].writes == ()
    assert stream.groups["out"].ports == ()
    run = run_of(stream, model)
    for writer, reader in (("L0H1", "sae:F3.enc"), ("out:F1", "L2H0.V"), ("v:F1", "L2H0.V")):
        with pytest.raises(UsageError, match="does not read a state and write for a part"):
            vw.EdgeAblation(writer, reader)(run)
    with pytest.raises(UsageError, match="nothing follows from what they read"):
        vw.Attribution("enc")(run)
    assert bool(torch.as_tensor(vw.HeadUnits("enc")(stream)["score"]).isfinite().all())
    with pytest.raises(UsageError, match="has no v:F1@3"):
        vw.virtual_weight(stream, "v:F1@3", "L2H0.V")


def test_a_raw_reader_moves_no_edge_of_others(tmp_path: Path) -> None:
    """On a model with LayerNorm it sees the mean of what is written, and nobody else does."""
    model = tiny("gpt2", dtype=torch.float64)
    files.saelens(tmp_path / "sae", 24, F, 1, 5, architecture="standard")
    plain = vw.open(model).to(torch.float64)
    stream = vw.open(model, attach=[f"sae={tmp_path / 'sae'}@L1.mlp.state"]).to(torch.float64)
    for question in (
        vw.Composition("K", writers="all"),
        vw.NeuronNeuron("in"),
        vw.VectorWriters(vw.Vector(torch.arange(24.0))),
    ):
        one, other = question(plain), question(stream)
        for column in one.columns:
            if isinstance(column.values, Tensor):
                torch.testing.assert_close(
                    torch.as_tensor(other[column.name]), column.values, rtol=0, atol=0, equal_nan=True
                )
    mean = stream.write("L0.attn").mean(1).abs().max()
    kept = vw.virtual_weight(stream, "L0H1", "sae:F.enc").dense()
    assert float(mean) < 1e-12
    ov = stream["L0H1"]
    assert isinstance(ov, vw.Head)
    uncentred = stream.attached["sae"].part.encoder
    assert uncentred is not None
    raw = plain.weight("o", "L0.attn")
    assert raw is not None
    torch.testing.assert_close(kept, uncentred(slice(0, F)).double() @ raw[1].double() @ ov.v.dense().double())


def test_averages_of_different_streams_are_not_joined(
    layered: vw.Stream, crossing: vw.Stream, model: nn.Module
) -> None:
    one, other = (coactivations(run_of(stream, model), without_sinks=False) for stream in (layered, crossing))
    with pytest.raises(UsageError, match="two different streams"):
        one.joined(other, "both")


def test_a_folder_of_other_transcoders_is_left_alone(tmp_path: Path) -> None:
    small = tiny(MODEL)
    run = vw.Run.on_repeats(vw.open(small), 64, 16, model=small)
    vw.train_transcoders(run, tmp_path, (0, 1), features=8, k=4, steps=2)
    with pytest.raises(UsageError, match=r"layer_0\.safetensors"):
        vw.train_transcoders(run, tmp_path, (1,), features=8, k=2, steps=2)
    vw.train_transcoders(run, tmp_path, (0, 1), features=8, k=2, steps=2)


def test_twera_of_a_target_that_is_never_above_zero() -> None:
    from virtual_weights.stream.coactivations import target_weighted_attribution

    weights, product, mean = torch.ones(4), torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([2.0, -1.0, 0.0, 0.0])
    assert torch.isnan(target_weighted_attribution(weights, product, mean)).tolist() == [False, True, False, True]
    assert target_weighted_attribution(weights, product, mean, 0.5).tolist() == [0.5, 2.0, 0.0, 2.0]
