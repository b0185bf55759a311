"""Finished blocks of answers that are not complete yet, and the lock of a run at work on an atlas."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load

from virtual_weights.atlas.stored import KEY, parsed
from virtual_weights.checkpoint.writing import write_safetensors
from virtual_weights.errors import RecordError, writing
from virtual_weights.record.durable import reading, replacing, sweep_aside
from virtual_weights.stream import Block, Question, Work

BLOCKS, LOCK = "blocks", ".lock"
DESCRIPTION, _SUFFIX = "question.json", ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")
_PAUSE = 0.5  # seconds between two looks at a lock


@final
class BlockStore:
    """Blocks by the key of the question under which they are kept: files of a folder that appear whole or not at all.

    ::

        blocks/<key>/question.json           the question, its blocks, and the keys of the answers that need them
        blocks/<key>/<name>.safetensors      one finished block

    Args:
        folder: where they lie; several processes may write into it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self._folder

    def begin(self, key: str, question: Question[Any], names: Sequence[str], answers: Iterable[str]) -> None:
        """Say what the blocks of a key are for, before the first is written.

        Raises:
            UsageError: the system does not let us write there.
            ResourceError: the disk is full.
        """
        target = self._folder / key
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        sweep_aside(target)
        described = {"question": question.question, "parameters": question.parameters, "blocks": list(names)}
        with replacing(target / DESCRIPTION) as aside:
            aside.write_text(json.dumps({**described, "answers": sorted(answers)}, indent=1), encoding="utf-8")

    def finished(self, key: str) -> set[str]:
        """The names of the finished blocks of a key."""
        folder = self._folder / key
        return {path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}") if _NAME.fullmatch(path.name)}

    def missing(self, work: Work, keys: Mapping[Any, str]) -> list[tuple[Any, str]]:
        """Those of some blocks that are not finished, by the key of each question."""
        finished = {key: self.finished(key) for key in set(keys.values())}
        return [(question, name) for question, name in work if name not in finished[keys[question]]]

    def put(self, key: str, name: str, block: Block) -> None:
        """Keep a finished block.

        Raises:
            UsageError: the system does not let us write there.
            ResourceError: the disk is full.
        """
        assert _NAME.fullmatch(name), name
        with replacing(self._folder / key / f"{name}{_SUFFIX}") as aside:
            arrays = sorted(block.items(), key=lambda item: -item[1].itemsize)
            shapes = {name: (array.dtype, tuple(array.shape)) for name, array in arrays}
            write_safetensors(aside, shapes, (array for _, array in arrays), {})

    def get(self, key: str, name: str) -> Block:
        """A finished block.

        Raises:
            RecordError: its file cannot be read.
        """
        try:
            with reading(self._folder, key, f"{name}{_SUFFIX}") as file:
                return load(file.read())
        except (OSError, SafetensorError) as error:
            raise RecordError(
                f"the unfinished work in {self._folder / key} cannot be read: {error}",
                expected="blocks as this package writes them",
                do="remove that folder and run the command again: its blocks are computed again",
            ) from error

    def drop(self, key: str) -> None:
        """Remove the blocks of a key."""
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def sweep(self, answered: Callable[[str], bool]) -> None:
        """Remove blocks whose answers are all there, which a run that was killed left."""
        for folder in self._folder.glob("*") if self._folder.is_dir() else ():
            if KEY.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                try:
                    with reading(folder, DESCRIPTION) as file:
                        answers = parsed(file.read()).get("answers")
                except (OSError, ValueError):
                    continue
                if isinstance(answers, list) and all(KEY.fullmatch(str(key)) and answered(key) for key in answers):
                    self.drop(folder.name)


@contextmanager
def at_work(atlas: Path, waiting: Callable[[str], object]) -> Generator[None]:
    """Hold the lock of an atlas for a run that fills it; the lock of a process that dies is free at once.

    Args:
        atlas: the folder.
        waiting: told once who holds the lock, where somebody does; the call then waits for it.

    Raises:
        UsageError: the system does not let us write there.
    """
    with writing(atlas / LOCK):
        descriptor = os.open(atlas / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if not _locked(descriptor):
            waiting(f"{holder_of(atlas)} is at work on {atlas}: waiting until it is done")
            while not _locked(descriptor):
                time.sleep(_PAUSE)
        when = {"since": datetime.now(UTC).isoformat(timespec="seconds")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname(), **when}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder_of(atlas: Path) -> str | None:
    """Who is at work on an atlas, as far as this machine can tell; None where nobody is."""
    try:
        with reading(atlas, LOCK) as file:
            if _locked(file.fileno()):
                return None
            holder = parsed(file.read(4096))
    except (OSError, ValueError):
        return "another process" if (atlas / LOCK).exists() else None
    return f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')},"


def _locked(descriptor: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
