"""Edges of every kind of writer into every port, against dense twins; gauges; a planted edge with its direction."""

from __future__ import annotations

import pytest
import torch
from dense import seen
from regauge import rebased, rotated
from tiny_models import tiny
from torch import Tensor

import virtual_weights as vw
from virtual_weights.runtime.edges.edge import group_readers
from virtual_weights.stream import Head, Mlp

MODELS = ("llama-grouped-untied", "llama-biases-wide-heads", "gpt2", "neox-parallel-partial-rotary")


def ports(stream: vw.Stream) -> tuple[str, ...]:
    return ("Q", "K", "V", *(("gate", "up") if stream.spec.gated else ("in",)), "unembed")


def written(stream: vw.Stream, name: str) -> Tensor:
    part = seen(stream, name)
    map = part.ov if isinstance(part, Head) else part.out if isinstance(part, Mlp) else part
    return map.dense().double()


def read(stream: vw.Stream, name: str, port: str) -> Tensor:
    part = seen(stream, name)
    map = part.circuit(port) if isinstance(part, Head) else part.reader(port) if isinstance(part, Mlp) else part
    return map.dense().double()


def basis(matrix: Tensor, energy: float | None) -> Tensor:
    """Orthonormal columns of the column space, or of its leading part with this share of the energy."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    mask = s > 1e-5 * s[0]
    if energy is not None:
        share = s.square().cumsum(0) / s.square().sum()
        mask = torch.arange(len(s)) <= int((share < energy - 1e-12).sum())
    return u[:, mask]


@pytest.mark.parametrize("name", MODELS)
def test_every_edge_equals_its_dense_product(name: str) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    places = {str(c.label): c for c in stream.components}
    for port in ports(stream):
        record = vw.Composition(port, writers="all")(stream)
        readers, writers = (record.axis(side).labels for side in ("reader", "writer"))
        assert set(writers) == {label for label, c in places.items() if c.writes is not None}
        assert [places[w].writes for w in writers] == sorted(places[w].writes for w in writers)
        for i, reader in enumerate(label.removesuffix(f".{port}") for label in readers):
            left = read(stream, reader, port)
            for j, writer in enumerate(writers):
                right = written(stream, writer)
                strength, score = (float(record[c][i, j]) for c in ("strength", "score"))
                if places[writer].writes > places[reader].reads:
                    assert strength != strength
                    continue
                expected = torch.linalg.norm(left @ right)
                assert strength == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
                assert score == pytest.approx(
                    float(expected / torch.linalg.norm(left) / torch.linalg.norm(right)), rel=1e-6, abs=1e-9
                )


@pytest.mark.parametrize("energy", [None, 0.8])
@pytest.mark.parametrize("name", ["llama-full", "gpt2"])
def test_every_overlap_equals_its_dense_twin(name: str, energy: float | None) -> None:
    stream = vw.open(tiny(name, dtype=torch.float64))
    places = {str(c.label): c for c in stream.components}
    for port in ports(stream):
        record = vw.Overlap(port, writers="all", energy=energy)(stream)
        for i, reader in enumerate(label.removesuffix(f".{port}") for label in record.axis("reader").labels):
            left = basis(read(stream, reader, port).T, energy)
            for j, writer in enumerate(record.axis("writer").labels):
                if places[writer].writes > places[reader].reads:
                    assert record["overlap"][i, j].isnan()
                    continue
                right = basis(written(stream, writer), energy)
                expected = (left.T @ right).square().sum() / min(left.shape[1], right.shape[1])
                assert float(record["overlap"][i, j]) == pytest.approx(float(expected), abs=1e-6), (reader, writer)


def test_heads_alone_are_the_same_edges() -> None:
    stream = vw.open(tiny("llama-grouped-untied"))
    alone, every = vw.Composition("K")(stream), vw.Composition("K", writers="all")(stream)
    order = [every.axis("writer").index(label) for label in alone.axis("writer").labels]
    for column in alone.columns:
        torch.testing.assert_close(every[column.name][:, order], alone[column.name], equal_nan=True)


@pytest.mark.parametrize("question", [vw.Composition, vw.Overlap])
def test_gauges(question: type[vw.Composition] | type[vw.Overlap]) -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    streams = [vw.open(m) for m in (model, rebased(model, 1), rotated(model, 2))]
    extra = {"energy": 0.9} if question is vw.Overlap else {}
    for port in ports(streams[0]):
        first, *others = (question(port, writers="all", **extra)(s) for s in streams)
        for other in others:
            for column in first.columns:
                torch.testing.assert_close(other[column.name], first[column.name], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_planted_edge_is_first_and_its_transpose_is_not() -> None:
    """L0.mlp writes a; L1.mlp's up reads a, L2.mlp's up reads b, which L0.mlp's own up reads."""
    model = tiny("llama-full", dtype=torch.float64)
    frame = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    a, b = frame[:, :3], frame[:, 3:6]
    with torch.no_grad():
        blocks = [layer.mlp for layer in model.model.layers]
        gains = [layer.post_attention_layernorm.weight for layer in model.model.layers]
        blocks[0].down_proj.weight.copy_(a @ blocks[0].down_proj.weight[:3])
        for i, read_space in enumerate((b, a, b)):
            blocks[i].up_proj.weight.copy_(blocks[i].up_proj.weight[:, :3] @ read_space.T / gains[i])
    record = vw.Composition("up", writers="all")(vw.open(model))
    column = record["score"][:, record.axis("writer").index("L0.mlp")]
    assert column[0].isnan()
    assert float(column[1]) > 0.5, "the planted edge"
    assert float(column[2]) < 1e-6, "reads what the other reads, not what it writes"
    assert record.top(1, "z")["writer"] == ("L0.mlp",)


def test_memory_only_cuts_the_work() -> None:
    stream = vw.open(tiny("gpt2"))
    for port in ("Q", "in"):
        much, little = (vw.Composition(port, writers="all", memory_mb=mb)(stream) for mb in (64, 1))
        torch.testing.assert_close(much["strength"], little["strength"], equal_nan=True)


@pytest.mark.parametrize(
    "wrong",
    [
        vw.Composition("in"),
        lambda s: vw.Composition("K", writers="some"),
        lambda s: vw.Overlap("K", energy=1.5),
        vw.Overlap("in"),
    ],
)
def test_what_is_not_there_is_refused(wrong: object) -> None:
    with pytest.raises(vw.VirtualWeightsError, match="expected"):
        wrong(vw.open(tiny("llama-full")))


@pytest.mark.parametrize("name", ["llama-grouped-untied", "gpt2"])
def test_every_question_names_the_same_readers_with_their_port(name: str) -> None:
    model = tiny(name)
    stream = vw.open(model)
    run = vw.Run.on_tokens(stream, torch.arange(12).reshape(2, 6), model=model)
    moments = vw.Observation().moments(run)
    for port in stream.groups.ports:
        readers = vw.Composition(port)(stream).axis("reader")
        components = [str(part.label) for group in stream.groups.readers(port) for part in group.components]
        assert readers.labels == tuple(name if port == "unembed" else f"{name}.{port}" for name in components)
        assert vw.Contribution(port, moments)(stream).axis("reader") == readers
        assert vw.Attribution(port)(run).axis("reader") == readers
        groups = readers.groups or readers.labels
        first = tuple(label for i, label in enumerate(readers.labels) if groups.index(groups[i]) == i)
        assert vw.Overlap(port)(stream).axis("reader").labels == group_readers(stream, port) == first
