"""What is particular to a kind of file: storage types, quantised blocks, vocabularies, change under the reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from contract.source_makers import SCALES, as_gguf, as_safetensors_file, example, random_blocks, write
from safetensors.torch import save_file

from virtual_weights.checkpoint import gguf_source, open_source
from virtual_weights.checkpoint.gguf_header import GGUF_TYPES
from virtual_weights.checkpoint.source import STORAGE_DTYPES
from virtual_weights.checkpoint.tokenizer import byte_level_text
from virtual_weights.errors import CheckpointError, MalformedCheckpointError, MissingTensorError, UsageError

Kind = gguf.GGMLQuantizationType


# -- storage types


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_safetensors_reads_every_storage_type(name: str, tmp_path: Path) -> None:
    dtype = STORAGE_DTYPES[name]
    tensor = torch.arange(12).reshape(3, 4).remainder(2 if name == "BOOL" else 12).to(dtype)
    save_file(
        {"w": tensor, "none": torch.zeros(0, 4).to(dtype), "one": tensor[1, 1].clone()}, tmp_path / "m.safetensors"
    )
    source = open_source(tmp_path / "m.safetensors", config={})
    assert source.tensors["w"].dtype == name
    assert source.read("w").dtype is (torch.float64 if name.startswith("F8") else dtype)
    for values, expected in ((source.read("w"), tensor), (source.read("w", slice(1, 2)), tensor[1:2])):
        assert values.double().tolist() == expected.double().tolist()
    assert source.read("none").shape == (0, 4)
    assert source.read("one").double() == tensor[1, 1].double()
    with pytest.raises(UsageError):
        source.read("one", slice(0, 1))


def test_the_table_of_gguf_types_is_ggufs_own() -> None:
    """Our table spares importing gguf to read a header; it must not drift from gguf's."""
    for number, ours in GGUF_TYPES.items():
        kind = Kind(number)
        assert (ours.name, (ours.values, ours.nbytes)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])
        if ours.quantised:
            assert gguf.dequantize(np.zeros((2, ours.nbytes), np.uint8), kind).shape == (2, ours.values)


def quantised_file(folder: Path, kind: Kind, raw: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("w", raw, raw_dtype=kind)
    write(writer)
    return folder / "m.gguf"


@pytest.mark.parametrize("name", SCALES)
def test_quantised_rows_equal_the_whole_dequantised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind[name]
    raw = random_blocks(kind, rows=7, blocks=2)
    width = raw.shape[1] // gguf.GGML_QUANT_SIZES[kind][1] * gguf.GGML_QUANT_SIZES[kind][0]
    expected = torch.from_numpy(gguf.dequantize(raw, kind).copy())
    source = open_source(quantised_file(tmp_path, kind, raw))
    assert source.tensors["w"].shape == (7, width)
    assert (source.tensors["w"].dtype, source.tensors["w"].nbytes) == (name, raw.nbytes)
    assert source.read("w").dtype is torch.float32
    assert torch.equal(source.read("w"), expected)
    assert torch.equal(source.read("w", slice(2, 6)), expected[2:6])
    monkeypatch.setattr(gguf_source, "_VALUES_AT_ONCE", 3 * width)  # groups of three rows, the last one short
    assert torch.equal(source.read("w"), expected)


@pytest.mark.parametrize(
    ("name", "bound"), [("Q8_0", 0.02), ("Q4_0", 0.3), ("Q4_1", 0.3), ("Q5_0", 0.2), ("Q5_1", 0.2)]
)
def test_quantised_values_are_near_the_original(name: str, bound: float, tmp_path: Path) -> None:
    original = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(1))
    source = open_source(quantised_file(tmp_path, Kind[name], gguf.quantize(original.numpy(), Kind[name])))
    assert source.tensors["w"].shape == (4, 3, 64)
    assert 0 < (source.read("w") - original).abs().max() < bound


def test_the_formulas_of_q8_0_and_q4_1(tmp_path: Path) -> None:
    """By hand from ggml's definition: d * q; and d * q + m with q in the low, then the high nibbles."""
    scale = np.array([0.5], "<f2").tobytes()
    eight = np.frombuffer(scale + np.arange(-16, 16, dtype=np.int8).tobytes(), np.uint8)[None]
    (tmp_path / "8").mkdir()
    values = open_source(quantised_file(tmp_path / "8", Kind.Q8_0, eight)).read("w")
    assert values.tolist() == [[0.5 * q for q in range(-16, 16)]]
    nibbles = bytes(i | ((15 - i) << 4) for i in range(16))
    four = np.frombuffer(scale + np.array([-2.0], "<f2").tobytes() + nibbles, np.uint8)[None]
    (tmp_path / "4").mkdir()
    values = open_source(quantised_file(tmp_path / "4", Kind.Q4_1, four)).read("w")
    assert values.tolist() == [[0.5 * q - 2 for q in (*range(16), *range(15, -1, -1))]]


# -- files that change


@pytest.mark.parametrize("change", ["shrink", "grow", "rewrite", "replace", "remove", "pipe"])
@pytest.mark.parametrize("make", [as_safetensors_file, as_gguf])
def test_a_file_that_changes_after_opening_is_refused(make, change: str, tmp_path: Path) -> None:
    source = make(tmp_path / "model", example(), {})
    path = Path(source.reference)
    before = path.read_bytes()
    if change == "shrink":
        os.truncate(path, len(before) // 2)
    elif change == "grow":
        path.write_bytes(before + b"\0")
    elif change == "rewrite":
        path.write_bytes(before)
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
        if change == "replace":
            path.write_bytes(before)
        if change == "pipe":
            os.mkfifo(path)
    with pytest.raises(MalformedCheckpointError if change != "remove" else CheckpointError):
        source.read("large")


def test_a_shard_may_be_a_link_within_the_folder_or_to_a_hub_caches_blobs(tmp_path: Path) -> None:
    as_safetensors_file(tmp_path / "x", example(), {"a": 1})
    model = tmp_path / "models--org--name"
    snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for target, name in (("some.safetensors", "model.safetensors"), ("config.json", "config.json")):
        (tmp_path / "x" / target).rename(blobs / target)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / target)
    weight_map = dict.fromkeys(example(), "model.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for reference in (snapshot, snapshot / "model.safetensors.index.json"):
        source = open_source(reference)
        assert source.config == {"a": 1}
        assert torch.equal(source.read("large"), example()["large"])


# -- choosing what to open


def test_a_folder_with_one_gguf_file_opens(tmp_path: Path) -> None:
    as_gguf(tmp_path / "m", example(), {})
    source = open_source(tmp_path / "m")
    assert (source.dialect, source.reference) == ("gguf", str(tmp_path / "m"))


def test_references_open_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_safetensors_file(tmp_path / "m", example(), {})
    monkeypatch.chdir(tmp_path)
    source = open_source("m")
    monkeypatch.chdir("/")
    assert open_source(source.reference).fingerprint == source.fingerprint


def test_given_configuration_replaces_the_files(tmp_path: Path) -> None:
    assert as_safetensors_file(tmp_path / "m", example(), {"a": 1}).config == {"a": 1}
    assert open_source(tmp_path / "m", config={"b": 2}).config == {"b": 2}


def test_an_unknown_name_hints_at_near_ones_and_the_hub() -> None:
    with pytest.raises(MissingTensorError) as caught:
        open_source("smollm2-135")
    assert "did you mean smollm2-135m?" in caught.value.do
    with pytest.raises(MissingTensorError) as caught:
        open_source("org/name")
    assert "hf://org/name" in caught.value.do


# -- vocabularies


def tokenizer_json(folder: Path, content: dict[str, object]) -> tuple[str, ...] | None:
    as_safetensors_file(folder / "m", {"w": torch.ones(1)}, {})
    (folder / "m" / "tokenizer.json").write_text(json.dumps(content))
    return open_source(folder / "m").token_texts()


def test_texts_of_a_byte_level_vocabulary(tmp_path: Path) -> None:
    texts = tokenizer_json(
        tmp_path,
        {
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {"Ġthe": 0, "Ċ": 1, "é": 3, "Ã©": 4}},
            "added_tokens": [{"id": 5, "content": "<Ġ>"}],
        },
    )
    assert texts == (" the", "\n", "", "\\xe9", "é", "<Ġ>")


def test_byte_level_text_undoes_the_tokenizers_librarys_own_spelling() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    sample = "".join(map(chr, range(0x250))) + " Größe 漢字 🙂\n"
    spelled = "".join(piece for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(sample))
    assert byte_level_text(spelled) == sample


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Metaspace", "replacement": "▁"},
        {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    ],
)
def test_texts_of_a_sentencepiece_vocabulary(decoder: dict[str, object], tmp_path: Path) -> None:
    vocab = [["▁the", -1.0], ["<0x0A>", -2.0], ["<0xE2>", -2.0], ["Ġ", -3.0]]
    texts = tokenizer_json(tmp_path, {"decoder": decoder, "model": {"type": "Unigram", "vocab": vocab}})
    assert texts == (" the", "\n", "\\xe2", "Ġ")


def test_texts_of_a_word_vocabulary_are_left_alone(tmp_path: Path) -> None:
    content = {"decoder": {"type": "WordPiece"}, "model": {"vocab": {"##Ġ▁": 0}}}
    assert tokenizer_json(tmp_path, content) == ("##Ġ▁",)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": 3},
        {"model": {"vocab": {"a": "x"}}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": {"a": 2**40}}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0}]},
        {"model": {"vocab": [3]}},
    ],
)
def test_a_broken_tokenizer_is_refused_when_asked_for(content: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(MalformedCheckpointError, match="tokenizer"):
        tokenizer_json(tmp_path, content)


@pytest.mark.parametrize("size", [4, 5000])  # a short vocabulary is in the header, a long one is left in the file
def test_texts_of_gguf_vocabularies(size: int, tmp_path: Path) -> None:
    filler = [f"t{i}" for i in range(size - 3)]
    for model, tokens, expected in (
        ("gpt2", ["Ġa", "Ċ", "<Ġ>"], (" a", "\n", "<Ġ>")),
        ("llama", ["▁a", "<0x0A>", "<▁>"], (" a", "\n", "<▁>")),
    ):
        writer = gguf.GGUFWriter(tmp_path / f"{model}.gguf", "llama")
        writer.add_tokenizer_model(model)
        writer.add_token_list(tokens + filler)
        writer.add_token_types([1, 1, 3] + [1] * len(filler))
        write(writer)
        source = open_source(tmp_path / f"{model}.gguf")
        assert source.token_texts() == (*expected, *filler)
        assert set(source.config) == {"general.architecture", "tokenizer.ggml.model"}
