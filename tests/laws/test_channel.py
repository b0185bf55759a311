"""Laws of channels: equal to their dense twins, free of LAPACK's signs and bases, of heads' gauge and of rotation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from dense import seen
from regauge import rebased, rotated
from tiny_models import tiny
from torch import Tensor
from typer.testing import CliRunner
from uniform import sizes

import virtual_weights as vw
from virtual_weights.analysis.channels import channel_tokens
from virtual_weights.analysis.channels.channel import Circuit, summary
from virtual_weights.analysis.channels.channel_tokens import ChannelTokens, directions_of
from virtual_weights.analysis.channels.direction_tokens import blocks_of, random_reach
from virtual_weights.analysis.channels.offsets import MeanCircuit, OffsetProfile, mean_qk
from virtual_weights.analysis.pairs.composition import ComponentComposition
from virtual_weights.cli.channel import channel
from virtual_weights.linalg import SVD, haar_orthogonal

SHAPES = ["llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary"]


def turn_of(stream: vw.Stream, offset: int) -> Tensor:
    """The rotary matrix from its definition: the plane (i, i + dim/2) turned by offset * base^(-2i/dim)."""
    spec, d = sizes(stream).rotary, sizes(stream).d_head
    matrix = torch.eye(d, dtype=torch.float64)
    for i in range(0 if spec is None else spec.dim // 2):
        angle, j = offset * spec.base ** (-2 * i / spec.dim), i + spec.dim // 2
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def dense(stream: vw.Stream, name: str, offset: int = 0) -> Tensor:
    """A circuit in full: ``L1H2.K`` is QK, ``.Q`` its transpose, ``.V`` and ``.ov`` are OV; else the map itself."""
    stem, _, port = name.rpartition(".")
    if port not in ("Q", "K", "V", "ov", "qk"):
        return seen(stream, name).dense().double()
    q, k, v, o = (stream[f"{stem}.{p}"].dense().double() for p in "QKVO")
    qk = q.T @ turn_of(stream, offset).T @ k
    return {"Q": qk.T, "K": qk, "qk": qk}.get(port, o @ v)


def same(one: vw.Record, two: vw.Record) -> None:
    assert [axis.labels for axis in one.axes] == [axis.labels for axis in two.axes]
    for column in one.columns:
        if isinstance(column.values, Tensor):
            torch.testing.assert_close(column.values, two[column.name], rtol=1e-6, atol=1e-7, equal_nan=True)
        else:
            assert column.values == two[column.name], column.name


@pytest.mark.parametrize("reader", ["L2H1.K", "L2H1.Q", "L2H1.V", "L2.mlp.up", "unembed", "ov", "qk"])
@pytest.mark.parametrize("name", SHAPES)
def test_tokens_equal_the_dense_twin(name: str, reader: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    reader = "L2.mlp.in" if reader == "L2.mlp.up" and not stream.spec.gated else reader
    if reader in ("ov", "qk"):
        record = ChannelTokens(f"L0H1.{reader}", count=3, rotary_offset=2)(stream)
        u, _, vh = torch.linalg.svd(dense(stream, f"L0H1.{reader}", 2))
        ends = {"ov": {"read": vh.T, "written": u}, "qk": {"query": u, "key": vh.T}}[reader]
    else:
        record = ChannelTokens("L0H1", reader, count=3, rotary_offset=2)(stream)
        r, o = dense(stream, reader, 2), dense(stream, "L0H1.ov")
        u, _, vh = torch.linalg.svd(r @ o, full_matrices=False)
        ends = {"source": vh.T, "written": o @ vh.T, "read": r.T @ u} | ({"target": u} if "H" in reader else {})
    assert set(record["end"]) == set(ends)
    assert set(record["size"].tolist()) == {1}
    sides = {"unembed": seen(stream, "unembed").dense().double(), "embed": seen(stream, "embed").dense().double().T}
    signs: dict[str, set[float]] = {}
    for row in record.rows():
        direction = ends[row["end"]][:, int(row["directions"]) - 1]
        cosines = torch.nn.functional.normalize(sides[row["side"]], dim=1) @ direction / direction.norm()
        assert abs(row["cosine"]) == pytest.approx(float(cosines.abs().sort().values[-row["place"]]))
        own = float(cosines[row["token"]])
        assert abs(own) == pytest.approx(abs(row["cosine"]))
        signs.setdefault(row["directions"], set()).add(math.copysign(1, own * row["cosine"]))
    assert len(signs) == sizes(stream).d_head
    assert all(len(each) == 1 for each in signs.values()), "the signs of one direction belong together"


@pytest.mark.parametrize(("name", "reader"), [("L0H1", "L1H2.K"), ("L0H1", "L1.mlp.up"), ("L0H1.ov", None)])
def test_nothing_depends_on_the_signs_and_bases_that_lapack_takes(
    name: str, reader: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another sign of every pair; and, where gains count as equal, another basis of their block."""
    stream = vw.open(tiny("llama-full", dtype=torch.float64))
    alone, block = ChannelTokens(name, reader), ChannelTokens(name, reader, tolerance=0.6)
    before = alone(stream), block(stream)
    assert max(before[1]["size"].tolist()) > 1
    own, generator = channel_tokens.svd, torch.Generator().manual_seed(0)

    def flipped(map: Any) -> SVD:
        parts = own(map)
        return SVD(-parts.U, parts.S, -parts.V)

    def mixed(map: Any) -> SVD:
        parts = own(map)
        u, v = parts.U.clone(), parts.V.clone()
        for cut in blocks_of(parts.S[parts.S > 1e-9], 0.6):
            turn = haar_orthogonal(cut.stop - cut.start, generator)
            u[:, cut], v[:, cut] = u[:, cut] @ turn, v[:, cut] @ turn
        return SVD(u, parts.S, v)

    monkeypatch.setattr(channel_tokens, "svd", flipped)
    same(before[0], alone(stream))
    monkeypatch.setattr(channel_tokens, "svd", mixed)
    same(before[1], block(stream))


def test_a_cosine_to_a_block_is_that_of_the_projection() -> None:
    stream = vw.open(tiny("llama-full", dtype=torch.float64))
    record = ChannelTokens("L0H1", "L1H2.V", tolerance=0.999, count=37)(stream)
    assert set(record["directions"]) == {"1-4"}
    _, ends = directions_of(stream, "L0H1", "L1H2.V")
    embed = seen(stream, "embed").dense()
    for end, vectors in ends.items():
        onto = vectors @ torch.linalg.pinv(vectors)
        expected = (onto @ embed).norm(dim=0) / embed.norm(dim=0)
        rows = [row for row in record.rows() if (row["end"], row["side"]) == (end, "embed")]
        assert [row["cosine"] for row in rows] == pytest.approx([float(expected[row["token"]]) for row in rows])
        assert sorted(row["token"] for row in rows) == list(range(37))


def test_blocks_are_runs_of_near_gains() -> None:
    gains = torch.tensor([10.0, 9.95, 9.9, 5, 4.9, 1], dtype=torch.float64)
    assert [(b.start, b.stop) for b in blocks_of(gains, 0.01)] == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert [(b.start, b.stop) for b in blocks_of(gains, 0.02)] == [(0, 3), (3, 5), (5, 6)]
    assert len(blocks_of(gains, 0.0)) == 6
    assert blocks_of(gains[:0], 0.01) == ()


@pytest.mark.parametrize("size", [1, 2, 6])
def test_random_tokens_reach_about_what_is_said(size: int) -> None:
    d, count, generator = 96, 3000, torch.Generator().manual_seed(1)
    tokens = torch.nn.functional.normalize(torch.randn(count, d, generator=generator, dtype=torch.float64), dim=1)
    best = [float((tokens @ haar_orthogonal(d, generator)[:, :size]).norm(dim=1).max()) for _ in range(40)]
    assert random_reach(count, d, size) == pytest.approx(sum(best) / 40, rel=0.05)
    assert random_reach(49152, 576) == pytest.approx(4.26 / 24, rel=0.02)  # t P(|z| > 4.26) = 1, z nearly Gaussian
    assert random_reach(10, 6, 6) == 1


@pytest.mark.parametrize("name", SHAPES)
def test_components_equal_the_dense_twin_and_sum_to_the_whole(name: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    record = ComponentComposition("L0H1", rotary_offset=3)(stream)
    assert record.axis("reader").labels == tuple(
        f"L{layer}H{h}.{port}"
        for port in "QKV"
        for layer in range(1, stream.spec.n_layers)
        for h in range(sizes(stream).n_heads)
    )
    ov = dense(stream, "L0H1.ov")
    u, s, _ = torch.linalg.svd(ov)
    r = sizes(stream).d_head
    for j, reader in enumerate(record.axis("reader").labels[::5]):
        c, j = dense(stream, reader, 3), 5 * j
        seen = (c @ u[:, :r]).norm(dim=0)
        torch.testing.assert_close(record["score"][:, j], seen / c.norm(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(record["strength"][:, j], s[:r] * seen, rtol=1e-7, atol=1e-9)
        assert float(record["strength"][:, j].square().sum()) == pytest.approx(float((c @ ov).square().sum()))
        one = ComponentComposition("L0H1", reader, rotary_offset=3)(stream)
        same(record.select("reader", [reader]), one)
    mlp = ComponentComposition("L0H1", "L1.mlp.up" if stream.spec.gated else "L1.mlp.in")(stream)
    whole = dense(stream, str(mlp.axis("reader").labels[0])) @ ov
    assert float(mlp["strength"].square().sum()) == pytest.approx(float(whole.square().sum()))


def test_null_of_components_is_that_of_turned_components() -> None:
    stream = vw.open(tiny("gpt2", dtype=torch.float64))
    record = ComponentComposition("L0H1", "L2H3.K")(stream)
    c, generator = dense(stream, "L2H3.K"), torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(24, 20000, generator=generator, dtype=torch.float64), dim=0)
    drawn = (c @ unit).square().sum(0)
    seen = (record["score"][:, 0] * c.norm()).square()
    torch.testing.assert_close(record["z"][:, 0], (seen - drawn.mean()) / drawn.std(), rtol=0.05, atol=0.05)
    assert float((drawn.mean().sqrt() / c.norm()) * 24**0.5) == pytest.approx(1, rel=0.02)
    torch.testing.assert_close(record["null_ratio"], record["score"] * 24**0.5)


@pytest.mark.parametrize(("writer", "port"), [("L0H1", "K"), ("L0H1", "Q"), ("L0.mlp", "K"), ("embed", "Q")])
@pytest.mark.parametrize("name", SHAPES)
def test_offsets_equal_the_dense_twin(name: str, writer: str, port: str) -> None:
    stream, offsets = vw.open(tiny(name, dtype=torch.float64)), (0, 1, 5, 30)
    record = OffsetProfile(writer, f"L1H2.{port}", offsets)(stream)
    o = {"L0H1": "L0H1.ov", "L0.mlp": "L0.mlp.out"}.get(writer, writer)
    o = dense(stream, o)
    circuits = [dense(stream, f"L1H2.{port}", offset) for offset in offsets]
    strength = torch.stack([(c @ o).norm() for c in circuits])
    norms = torch.stack([c.norm() for c in circuits])
    torch.testing.assert_close(record["strength"], strength)
    torch.testing.assert_close(record["score"], strength / norms / o.norm())
    squares = strength.square().mean()
    assert record.stamp["root_mean_square"]["strength"] == pytest.approx(float(squares.sqrt()))
    score = (squares / norms.square().mean()).sqrt() / o.norm()
    assert record.stamp["root_mean_square"]["score"] == pytest.approx(float(score))
    mean = torch.stack([dense(stream, "L1H2.qk", offset) for offset in offsets]).mean(0)
    torch.testing.assert_close(mean_qk(stream, "L1H2", offsets).dense(), mean)
    spectrum = MeanCircuit("L1H2", offsets)(stream)
    torch.testing.assert_close(spectrum["gain"], torch.linalg.svdvals(mean)[: sizes(stream).d_head])
    assert spectrum.stamp["kept"] == pytest.approx(float(mean.norm() / norms.square().mean().sqrt()))
    if sizes(stream).rotary is None:
        assert "all offsets are equal" in record.stamp["rotary_offset"]
        assert float(strength.max() - strength.min()) == 0
        assert spectrum.stamp["kept"] == pytest.approx(1)
    else:
        assert record.stamp["rotary_offset"] == [0, 1, 5, 30]
        assert float(record["strength"].max() / record["strength"].min()) > 1.001
        assert spectrum.stamp["kept"] < 0.999


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2", "neox-parallel-partial-rotary"])
def test_unchanged_when_heads_are_rebased(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    before, after = vw.open(model), vw.open(rebased(model, seed=3))
    for question in (
        ChannelTokens("L0H1", "L1H2.K"),
        ChannelTokens("L1H2.qk"),
        ChannelTokens("L0H1", "L1H2.V", tolerance=0.3),
        ComponentComposition("L0H1"),
        OffsetProfile("L0H1", "L1H2.K", range(4) if name == "gpt2" else (0,)),
    ):
        same(question(before), question(after))


def test_unchanged_when_the_stream_of_a_folded_rmsnorm_is_rotated() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    before, after = vw.open(model), vw.open(rotated(model, seed=5))
    for question in (
        ChannelTokens("L0H1", "L1H2.Q", rotary_offset=3),
        ChannelTokens("L1H2.ov"),
        ChannelTokens("L0.mlp", "L1H2.V", tolerance=0.3),
        ComponentComposition("L0H1", rotary_offset=3),
        OffsetProfile("L0H1", "L1H2.K"),
        MeanCircuit("L1H2"),
    ):
        same(question(before), question(after))


def test_a_partial_checkpoint_is_asked_only_what_it_holds() -> None:
    model = tiny("llama-grouped-untied")
    state, config = model.state_dict(), model.config.to_dict()
    whole = ChannelTokens("L0H1.ov")(vw.open(model))
    for left_out, side in (("embed_tokens", "unembed"), ("lm_head", "embed")):
        held = {name: tensor for name, tensor in state.items() if left_out not in name}
        record = ChannelTokens("L0H1.ov")(vw.open(held, config=config, partial=True))
        assert set(record["side"]) == {side}
        own = [abs(row["cosine"]) for row in whole.rows() if row["side"] == side]
        torch.testing.assert_close(record["cosine"].abs(), torch.tensor(own, dtype=torch.float64))
    held = {name: tensor for name, tensor in state.items() if "embed" not in name and "lm_head" not in name}
    with pytest.raises(vw.VirtualWeightsError, match="neither embedding nor unembedding"):
        ChannelTokens("L0H1.ov")(vw.open(held, config=config, partial=True))


def test_what_cannot_be_meant_is_refused() -> None:
    stream = vw.open(tiny("gpt2"))
    for question in (
        ChannelTokens("L0H1"),
        ChannelTokens("L0.mlp.ov"),
        ChannelTokens("L2H1", "L1H2.K"),
        ComponentComposition("L0.mlp", "L1H2.K"),
        ComponentComposition("L2H1", "L1H2.K"),
        ComponentComposition("L2H1"),
        OffsetProfile("L0H1", "L1H2.V"),
        OffsetProfile("L0H1", "L1.mlp.in"),
        OffsetProfile("L2H1", "L1H2.K"),
        MeanCircuit("L1.mlp"),
    ):
        with pytest.raises(vw.VirtualWeightsError, match="expected"):
            question(stream)
    for wrong in (
        lambda: ChannelTokens("L0H1", count=0),
        lambda: ChannelTokens("L0H1", tolerance=1.0),
        lambda: ComponentComposition("L0H1", ports=("O",)),
        lambda: OffsetProfile("L0H1", "L1H2.K", ()),
        lambda: OffsetProfile("L0H1", "L1H2.K", (0, -1)),
    ):
        with pytest.raises(vw.VirtualWeightsError, match="expected"):
            wrong()


app = typer.Typer()
app.command()(channel)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def told(folder: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, [str(folder), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_says_what_the_records_say(folder: Path) -> None:
    asked = ("L0H1", "L1H3.K", "--nearest", "2", "--blocks", "2", "--singular-components", "--offsets", "0:6:2")
    given, stream = json.loads(told(folder, *asked, "--json")), vw.open(folder)
    more = {answer["question"]: answer for answer in given["more"]}
    record = ChannelTokens("L0H1", "L1H3.K", 2, 2)(stream)
    tokens = more["channel_tokens"]["rows"]
    assert [row["cosine"] for row in tokens] == record["cosine"].tolist()
    assert [row["directions"] for row in tokens] == ["1"] * 16 + ["2"] * 16, "4 ends, 2 sides, 2 tokens"
    components = ComponentComposition("L0H1", "L1H3.K")(stream).top(4, "z")
    assert [row["component"] for row in more["component_composition"]["rows"]] == list(components["component"])
    profile = OffsetProfile("L0H1", "L1H3.K", (0, 2, 4))(stream)
    assert [row["strength"] for row in more["offset_profile"]["rows"]] == profile["strength"].tolist()
    assert more["offset_profile"]["summary"]["root_mean_square"] == profile.stamp["root_mean_square"]
    assert more["mean_circuit"]["summary"]["kept"] == MeanCircuit("L1H3", (0, 2, 4))(stream).stamp["kept"]
    assert given["summary"]["strength"] == pytest.approx(profile["strength"][0].item())
    assert "more" not in json.loads(told(folder, "L0H1", "L1H3.K", "--json"))
    text = told(folder, *asked)
    assert "in tokens" in text
    assert "singular components" in text
    assert "root mean square over these offsets" in text


def test_the_command_shows_angles_and_the_cosine_of_ends(folder: Path) -> None:
    stream, asked = vw.open(folder), ("L0H1", "L1H3.K", "--nearest", "2", "--angles")
    given = json.loads(told(folder, *asked, "--json"))
    tokens, angles = given["more"]
    record = ChannelTokens("L0H1", "L1H3.K", 2, 3)(stream)
    assert [row["written_read"] for row in tokens["rows"]] == record["written_read"].tolist()
    assert angles["question"] == "pair_angles"
    cosines = vw.PairAngles("L0H1", "L1H3.K")(stream)
    assert [row["cosine"] for row in angles["rows"]] == cosines["cosine"].tolist()
    assert angles["summary"]["above_chance"] == int((cosines["cosine"] > cosines["random_high"]).sum())
    text = told(folder, *asked)
    assert "principal angles" in text
    assert f"{angles['summary']['above_chance']} of 4 cosines are above 95%" in text


def test_the_command_compares_all_heads(folder: Path) -> None:
    stream = vw.open(folder)
    given = json.loads(told(folder, "--nearest", "2", "--blocks", "1", "--json"))
    assert given["question"] == "head_circuits"
    strengths = {row["head"]: row["ov_strength"] for row in given["summary"]["heads"]}
    assert strengths["L1H2"] == pytest.approx(float(stream["L1H2"].ov.dense().norm()))
    assert list(strengths.values()) == sorted(strengths.values(), reverse=True)
    (tokens,) = given["more"]
    record = vw.HeadTokens(2, 1)(stream)
    assert [(row["head"], row["token"]) for row in tokens["rows"]] == list(
        zip(record["head"], record["token"].tolist(), strict=True)
    )
    assert len(tokens["rows"]) == 18 * 2 * 2 * 2
    text = told(folder, "--nearest", "20", "--blocks", "1", "--top", "2")
    assert "the 2 of 18 heads of strongest OV" in text
    assert "directions in tokens" in text
    for wrong in (["--angles"], ["--offsets", "0:4"], ["--singular-components"]):
        done = CliRunner().invoke(app, [str(folder), *wrong])
        assert isinstance(done.exception, vw.VirtualWeightsError)


def test_the_command_takes_a_circuit_or_a_writer_alone(folder: Path) -> None:
    stream = vw.open(folder)
    alone = json.loads(told(folder, "L1H3.qk", "--nearest", "1", "--rotary-offset", "2", "--json"))
    record = Circuit("L1H3.qk", 2)(stream)
    assert alone["summary"] == summary(record)
    assert [row["gain"] for row in alone["rows"]] == record["gain"].tolist()
    assert alone["summary"]["strength"] == pytest.approx(float(stream["L1H3"].qk_at(2).dense().norm()))
    assert {row["end"] for row in alone["more"][0]["rows"]} == {"query", "key"}
    everyone = json.loads(told(folder, "L0H1", "--singular-components", "--json"))
    assert (everyone["question"], len(everyone["rows"])) == ("component_composition", 4 * 12 * 3)
    for wrong in (["L0H1"], ["L0H1", "--offsets", "0:4"], ["L0H1", "L1H3.K", "--offsets", "0-4"]):
        done = CliRunner().invoke(app, [str(folder), *wrong])
        assert isinstance(done.exception, vw.VirtualWeightsError)
