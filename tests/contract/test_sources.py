"""One contract for every kind of source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract.source_makers import MAKERS, Maker, example

from virtual_weights.checkpoint import Source, TensorInfo
from virtual_weights.errors import MissingTensorError, NonFiniteError, UsageError

CONFIG = {"general.name": "tiny", "layers": 2}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def make(request: pytest.FixtureRequest) -> Maker:
    return request.param


@pytest.fixture
def source(make: Maker, tmp_path: Path) -> Source:
    return make(tmp_path / "first", example(), CONFIG)


def test_every_tensor_is_known_without_reading(source: Source) -> None:
    expected = {
        name: TensorInfo(tuple(t.shape), DTYPES[t.dtype], t.numel() * t.itemsize) for name, t in example().items()
    }
    assert dict(source.tensors) == expected


def test_read_gives_what_was_stored(source: Source) -> None:
    for name, tensor in example().items():
        values = source.read(name)
        assert values.dtype is tensor.dtype
        assert torch.equal(values, tensor)


@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(1, 3), slice(2, None), slice(None, 2), slice(None), slice(0, 3, 1)]
)
def test_rows_are_the_same_rows_of_the_whole(source: Source, rows: slice) -> None:
    for name, tensor in example().items():
        assert torch.equal(source.read(name, rows), tensor[rows])


@pytest.mark.parametrize(
    "rows", [slice(0, 0), slice(2, 1), slice(0, 99_999), slice(-1, None), slice(0, -1), slice(0, 2, 2), slice(3, 0, -1)]
)
def test_impossible_rows_are_refused(source: Source, rows: slice) -> None:
    with pytest.raises(UsageError, match="rows"):
        source.read("a.weight", rows)


def test_an_unknown_name_is_refused_with_near_ones(source: Source) -> None:
    with pytest.raises(MissingTensorError) as caught:
        source.read("a.weigth")
    assert "'a.weight'" in caught.value.expected


def test_what_was_read_may_be_changed(source: Source) -> None:
    source.read("a.weight").zero_()
    source.read("a.weight", slice(0, 2)).zero_()
    assert torch.equal(source.read("a.weight"), example()["a.weight"])


def test_the_configuration_is_there_and_cannot_be_changed(source: Source) -> None:
    assert {key: source.config[key] for key in CONFIG} == CONFIG
    with pytest.raises(TypeError):
        source.config["layers"] = 3  # type: ignore[index]
    with pytest.raises(TypeError):
        source.tensors["x"] = None  # type: ignore[index]


def test_reference_and_dialect(source: Source, make: Maker) -> None:
    assert source.reference
    assert source.dialect == ("gguf" if make is MAKERS["gguf"] else "hf")


def test_without_a_tokenizer_there_are_no_texts(source: Source) -> None:
    assert source.token_texts() is None


def test_non_finite_values_are_refused_with_their_place(make: Maker, tmp_path: Path) -> None:
    tensors = example()
    tensors["a.weight"][3, 5] = float("nan")
    source = make(tmp_path / "nan", tensors, CONFIG)
    assert source.read("a.weight", slice(0, 3)).isfinite().all()
    for rows in (None, slice(2, 5)):
        with pytest.raises(NonFiniteError) as caught:
            source.read("a.weight", rows)
        assert "a.weight[3, 5] is nan" in caught.value.what


def test_the_fingerprint_is_of_the_content(make: Maker, tmp_path: Path) -> None:
    def print_of(name: str, tensors: dict[str, torch.Tensor], config: dict[str, object] = CONFIG) -> str:
        return make(tmp_path / name, tensors, config).fingerprint

    first = print_of("first", example())
    assert len(bytes.fromhex(first)) == 32
    assert print_of("again", example()) == first
    assert print_of("turned", dict(reversed(example().items()))) == first
    changed = {first, print_of("config", example(), CONFIG | {"layers": 3})}
    for name, tensor in example().items():
        # any value of the small ones; in the large one the ends and the middle
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            tensors = example()
            tensors[name].view(-1)[place] += 1
            changed.add(print_of(f"{name}{place}", tensors))
    renamed = example()
    renamed["a2.weight"] = renamed.pop("a.weight")
    reshaped = example()
    reshaped["a.weight"] = reshaped["a.weight"].view(10, 32)
    changed |= {print_of("renamed", renamed), print_of("reshaped", reshaped)}
    assert len(changed) == 2 + 3 * len(example()) + 2


def test_the_same_weights_have_the_same_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    prints = {
        MAKERS[name](tmp_path / name, example(), CONFIG).fingerprint for name in ("safetensors", "shards", "state-dict")
    }
    assert len(prints) == 1
