"""The fingerprint is of every byte, is computed when it is first needed, and is remembered for files that stay."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import virtual_weights as vw
from virtual_weights.checkpoint import Source, open_source, pinned_file
from virtual_weights.checkpoint.mapping_source import MappingSource
from virtual_weights.checkpoint.pinned_file import PinnedFile
from virtual_weights.survey.plan import Part

CONFIG = {"model_type": "llama", "hidden_size": 256}
HEAD = slice(128, 160)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VWEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pinned_file, "_SETTLED_AFTER", -1)
    return tmp_path / "cache" / "fingerprints"


def large() -> dict[str, torch.Tensor]:
    """A tensor of which three samples of 64 KiB are the smaller part."""
    generator = torch.Generator().manual_seed(0)
    return {"q": torch.randn(512, 256, generator=generator), "norm": torch.ones(256)}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(large() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    lengths, read_into = list[int](), PinnedFile.read_into

    def counted(file: PinnedFile, buffer: memoryview, offset: int) -> None:
        lengths.append(len(buffer))
        read_into(file, buffer, offset)

    monkeypatch.setattr(PinnedFile, "read_into", counted)
    return lengths


def test_a_model_in_which_one_head_was_replaced_is_another_one(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    before = open_source(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["q"][HEAD] += 1
    assert open_source(checkpoint(tmp_path / "other", tensors)).fingerprint != before
    assert open_source(checkpoint(tmp_path / "same")).fingerprint == before


@pytest.mark.parametrize("byte", [70_000, 200_001, 400_002])
def test_every_byte_counts(tmp_path: Path, byte: int) -> None:
    folder = checkpoint(tmp_path / "model")
    before = open_source(folder).fingerprint
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(byte)
        old = file.read(1)
        file.seek(byte)
        file.write(bytes([old[0] ^ 1]))
    assert open_source(folder).fingerprint != before


def test_what_was_edited_in_place_and_given_its_old_time_is_seen(tmp_path: Path, cache: Path) -> None:
    path = checkpoint(tmp_path / "model") / "model.safetensors"
    before, times = open_source(path).fingerprint, path.stat()
    assert len(list(cache.iterdir())) == 1
    raw = bytearray(path.read_bytes())
    raw[200_000] ^= 1
    with path.open("r+b") as file:
        file.write(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert open_source(path).fingerprint != before


def test_opening_reads_no_tensor_and_the_second_time_nothing_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model")
    lengths = count_reads(monkeypatch)
    source = open_source(folder)
    assert sum(lengths) < 2000
    reports: list[tuple[float, float]] = []
    assert source.identify(lambda done, size: reports.append((done, size))) == source.fingerprint
    assert reports[-1] == (512 * 256 * 4 + 256 * 4,) * 2
    assert sum(lengths) > 512 * 256 * 4
    del lengths[:]
    assert open_source(folder).fingerprint == source.fingerprint
    assert sum(lengths) < 2000


@pytest.mark.parametrize("text", ["", "0" * 63, "x" * 64, "\n" * 64])
def test_a_broken_memory_is_not_believed(tmp_path: Path, cache: Path, text: str) -> None:
    folder = checkpoint(tmp_path / "model")
    before = open_source(folder).fingerprint
    (kept,) = cache.iterdir()
    kept.write_text(text)
    assert open_source(folder).fingerprint == before


def test_without_a_cache_to_write_to_it_is_computed_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VWEIGHTS_CACHE", "/dev/null/x")
    folder = checkpoint(tmp_path / "model")
    assert open_source(folder).fingerprint == open_source(folder).fingerprint


def test_files_whose_times_may_stay_as_they_are_are_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned_file, "_SETTLED_AFTER", 10**12)
    assert open_source(checkpoint(tmp_path / "model")).fingerprint
    assert not cache.exists()


# -- the hub's cache


def snapshot(root: Path, content: Path) -> Path:
    repository = root / "models--org--name"
    folder, blobs = repository / "snapshots" / "abc", repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for path in content.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_file_that_the_hub_has_hashed_is_not_read(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(hub, checkpoint(tmp_path / "model"))
    changed = {**large(), "norm": torch.zeros(256)}
    other = snapshot(hub / "another", checkpoint(tmp_path / "other", changed))
    lengths = count_reads(monkeypatch)
    fingerprints = {open_source(place).fingerprint for place in (folder, folder, other)}
    assert sum(lengths) < 6000
    assert len(fingerprints) == 2


def test_a_file_of_the_hub_that_was_edited_in_place_is_read(tmp_path: Path, hub: Path) -> None:
    folder = snapshot(hub, checkpoint(tmp_path / "model"))
    before = open_source(folder).fingerprint
    blob = (folder / "model.safetensors").resolve()
    with blob.open("r+b") as file:
        file.seek(300_000)
        file.write(b"\0\0\0")
    assert open_source(folder).fingerprint != before


def test_a_cache_that_is_not_the_hubs_own_is_hashed(tmp_path: Path, hub: Path) -> None:
    model = checkpoint(tmp_path / "model")
    assert open_source(snapshot(tmp_path / "unpacked", model)).fingerprint == open_source(model).fingerprint
    assert open_source(snapshot(hub, model)).fingerprint != open_source(model).fingerprint


# -- in memory


def test_in_memory_a_change_that_torch_counts_is_seen_at_once() -> None:
    tensors = large()
    source = MappingSource(tensors, CONFIG)
    before = source.fingerprint
    tensors["q"][HEAD] *= 2
    after = source.fingerprint
    assert after != before
    tensors["q"].data[HEAD] = 0  # behind its back, between the samples
    assert source.identify() not in (before, after)
    assert source.fingerprint == MappingSource(tensors, CONFIG).fingerprint


def test_tensors_that_count_no_changes_have_a_fingerprint() -> None:
    with torch.inference_mode():
        tensors = large()
        assert MappingSource(tensors, CONFIG).fingerprint == MappingSource(large(), CONFIG).fingerprint


# -- when it is computed


def test_an_answer_that_is_not_stored_needs_no_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_models import tiny

    tiny("llama-grouped-untied").save_pretrained(tmp_path / "model")

    def refuse(*_: object) -> str:
        raise AssertionError("hashed")

    stream, own = vw.open(str(tmp_path / "model")), Source._hashed
    monkeypatch.setattr(Source, "_hashed", refuse)
    record = vw.Survey(stream).ask(vw.Composition("K"))
    assert record.provenance["model"] == str(tmp_path / "model")
    with pytest.raises(AssertionError, match="hashed"):
        record.to_json()
    monkeypatch.setattr(Source, "_hashed", own)
    assert json.loads(record.to_json())["provenance"]["fingerprint"] == stream.source.fingerprint
    steps: list[str] = []

    def step(name: str):
        steps.append(name)
        return lambda done, total: None

    vw.map(stream, tmp_path / "atlas", plan=vw.Plan((Part.bandwidth,)), progress=step)
    assert steps[0] == "fingerprint"
    key = vw.Survey(stream).key(vw.Bandwidth(), stream)
    assert vw.Atlas.open(tmp_path / "atlas").finished(key), "an address that needs no atlas"
