"""A direction of the stream: a planted reader of it comes first, with its sign; circuits agree with compositions."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny

import virtual_weights as vw
from virtual_weights.errors import CheckpointError, UsageError
from virtual_weights.linalg import svd
from virtual_weights.stream.vector import state_of


@pytest.fixture(scope="module")
def stream() -> vw.Stream:
    return vw.open(tiny("llama-grouped-untied", seed=4, dtype=torch.float64)).to(torch.float64)


def _vector(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("port", ["gate_proj", "up_proj"])
def test_a_planted_reader_comes_first_with_its_sign(sign: float, port: str) -> None:
    model = tiny("llama-grouped-untied", seed=4)
    vector = _vector(model.config.hidden_size).float()
    layer = model.model.layers[1]
    with torch.no_grad():  # what a neuron reads is its row times the gain
        getattr(layer.mlp, port).weight[3] = sign * 0.7 * vector / layer.post_attention_layernorm.weight
    readers = vw.VectorReaders(vw.Vector(vector), "L1")(vw.open(model))
    first = next(readers.top(1, "score").rows())
    assert (first["reader"], first["sign"]) == (f"L1N3.{port[:-5]}", sign)
    assert first["score"] == pytest.approx(1.0, abs=1e-6)
    assert first["strength"] == pytest.approx(0.7 * float(vector.norm()) ** 2, rel=1e-5)
    later = vw.VectorReaders(vw.Vector(vector), "L2")(vw.open(model))
    assert f"L1N3.{port[:-5]}" not in later.axis("reader").labels


def test_circuits_agree_with_component_composition(stream: vw.Stream) -> None:
    for writer in ("L0H1", "L1H0"):
        head = stream[writer]
        assert not isinstance(head, vw.Mlp)
        assert hasattr(head, "ov")
        direction = svd(head.ov).U[:, 0]
        parts = vw.ComponentComposition(writer)(stream)
        readers = vw.VectorReaders(vw.Vector(3.0 * direction), state_of(stream, f"{writer[:2]}.mlp"))(stream)
        found = {str(row["reader"]): row for row in readers.rows() if row["kind"] == "head"}
        for name in parts.axis("reader").labels:
            part = parts["1", name]
            for column in ("score", "null_ratio", "z"):
                assert found[name][column] == pytest.approx(part[column], rel=1e-9, abs=1e-9)


def test_writers_by_their_definition(stream: vw.Stream) -> None:
    vector = _vector(stream.d_model)
    unit = vector / vector.norm()
    writers = vw.VectorWriters(vw.Vector(vector))(stream)
    for row in writers.rows():
        if row["kind"] == "token":
            continue
        part = stream[str(row["writer"])]
        column = part.ov.dense() if hasattr(part, "ov") else part.out.dense()  # pyright: ignore[reportAttributeAccessIssue]
        along = unit @ column.double()
        assert row["score"] == pytest.approx(float(along.norm() / column.double().norm()), rel=1e-6)
    early = vw.VectorWriters(vw.Vector(vector), "L1")(stream)
    assert {str(name)[:2] for name in early.axis("writer").labels} == {"L0", "em"}


def test_lift_of_a_reader_is_that_of_its_energies(stream: vw.Stream) -> None:
    vector = _vector(stream.d_model)
    readers = vw.VectorReaders(vw.Vector(vector))(stream)
    unit = vector / vector.norm()
    grams = [m.T @ m for h in stream.heads for m in [stream[str(h.label)].ov.dense().double().T]]  # pyright: ignore
    mean = torch.stack([gram / gram.trace() for gram in grams]).mean(0)
    rows = {str(row["reader"]): row for row in readers.rows()}
    maps = {f"{h.label}.V": stream[str(h.label)].ov.dense().double() for h in stream.heads}  # pyright: ignore
    energy = {name: float((m @ unit).square().sum() / m.square().sum()) for name, m in maps.items()}
    heard = {name: float((m.T @ m * mean).sum() / m.square().sum()) for name, m in maps.items()}
    for name in maps:
        lift = energy[name] / np.mean(list(energy.values())) * np.mean(list(heard.values())) / heard[name]
        assert rows[name]["lift"] == pytest.approx(float(np.log2(lift)), abs=1e-6)


def test_files_give_the_vector(tmp_path: Path) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    np.save(tmp_path / "one.npy", matrix[1])
    np.save(tmp_path / "rows.npy", matrix)
    save_file({"W_dec": torch.from_numpy(matrix), "b": torch.ones(4)}, tmp_path / "dictionary.safetensors")
    writer = gguf.GGUFWriter(str(tmp_path / "control.gguf"), "controlvector")
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", matrix[layer])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = torch.from_numpy(matrix[1]).double()
    given = [
        vw.open_vector(tmp_path / "one.npy"),
        vw.open_vector(tmp_path / "rows.npy", row=1),
        vw.open_vector(tmp_path / "dictionary.safetensors", "W_dec", 1),
        vw.open_vector(tmp_path / "control.gguf", "direction.1"),
    ]
    assert all(torch.equal(vector.values, wanted) for vector in given)
    assert [vector.name for vector in given] == ["one", "rows[1]", "dictionary:W_dec[1]", "control:direction.1"]
    for options in ({}, {"row": 3}, {"name": "x"}):
        with pytest.raises(UsageError):
            vw.open_vector(tmp_path / "rows.npy", **options)
    for options in ({}, {"name": "nothing"}, {"name": "W_dec"}):
        with pytest.raises(UsageError):
            vw.open_vector(tmp_path / "dictionary.safetensors", **options)
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("pickled.npy", "absent.npy", "absent.safetensors"):
        with pytest.raises(CheckpointError):
            vw.open_vector(tmp_path / name)


def test_what_cannot_be_is_refused(stream: vw.Stream) -> None:
    for values in (torch.zeros(4), torch.full((4,), torch.nan), torch.ones(2, 2)):
        with pytest.raises(UsageError):
            vw.Vector(values)
    with pytest.raises(UsageError, match="width"):
        vw.VectorReaders(vw.Vector(torch.ones(3)))(stream)
    for place in ("L99", "x", stream.states, -1):
        with pytest.raises(UsageError, match="state"):
            vw.VectorReaders(vw.Vector(torch.ones(stream.d_model)), place)(stream)


def test_an_atlas_keeps_the_answer_of_each_vector(stream: vw.Stream) -> None:
    one, same, other = (vw.VectorReaders(vw.Vector(_vector(stream.d_model, s))) for s in (0, 0, 1))
    assert one == same
    assert one != other
    assert one.addressable
    assert one.parameters["vector"] == same.parameters["vector"] != other.parameters["vector"]


def test_what_lies_along_a_vector_on_a_text() -> None:
    model = tiny("llama-grouped-untied", dtype=torch.float64)
    stream = vw.open(model).to(torch.float64)
    tokens = torch.arange(14).reshape(2, 7)
    vector = torch.randn(stream.d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    record = vw.VectorActivity(vw.Vector(3 * vector))(vw.Run.on_tokens(stream, tokens, model=model))
    for layer in range(3):
        x, state = states[layer].flatten(0, 1), stream.groups[f"L{layer}.attn"].reads
        scaled = x / stream.scale(x, f"L{layer}.attn")[:, None]
        along = scaled @ vector / vector.norm()
        row = record[str(state),]
        assert row["mean"] == pytest.approx(float(along.mean()))
        assert row["rms"] == pytest.approx(float(along.square().mean().sqrt()))
        assert row["share"] == pytest.approx(float(along.square().sum() / scaled.square().sum()))
