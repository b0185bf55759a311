"""What is in an atlas, what is unfinished, and whether it is still what was written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from virtual_weights.atlas.atlas import RECORDS, Atlas
from virtual_weights.atlas.ledger import Entry
from virtual_weights.atlas.stored import KEY, parsed
from virtual_weights.errors import RecordError
from virtual_weights.progress import Progress, silent
from virtual_weights.record.durable import reading, sha256_of
from virtual_weights.stream.moments import Moments

BLOCKS, LOCK, QUESTION = "blocks", ".lock", "question.json"
"""Beside the records: blocks of unfinished questions, and the file that a run at work holds locked."""
_MAX_QUESTION = 1 << 20


@final
@dataclass(frozen=True)
class Status:
    """What is in an atlas.

    Attributes:
        records: a row per question: how many records and edges it has, their bytes on disk, and how many seconds the
            ledger says that they took.
        unfinished: a row per question of which some blocks are computed: its parameters, how many blocks are done and
            how many there will be, and their bytes. None where that cannot be read.
        at_work: whether a run is at work on the atlas.
        checked: how many files were compared with their checksums; None where none were to be.
        faults: what was found to be wrong with them, in a sentence each.
    """

    records: tuple[Mapping[str, Any], ...]
    unfinished: tuple[Mapping[str, Any], ...]
    at_work: bool
    checked: int | None
    faults: tuple[str, ...]


def status(atlas: Atlas, *, check: bool = False, progress: Progress = silent) -> Status:
    """What is in an atlas.

    Args:
        atlas: the atlas.
        check: also compare every file with its checksum: those of all records, moments, and entries of the ledger.
        progress: called with (records checked, records in all).

    Raises:
        RecordError: without ``check``, a record or the ledger cannot be read; with it, that is among the faults.

    Example:
        >>> vw.status(atlas, check=True).faults  # doctest: +SKIP
        ()
    """
    if not check:
        return Status(tuple(_by_question(atlas, atlas.entries())), tuple(_unfinished(atlas)), _locked(atlas), None, ())
    entries, faults, checked = list[Entry](), list[str](), 1  # the manifest was checked when the atlas was opened
    names = sorted(path.name for path in (atlas.path / RECORDS).glob("*") if KEY.fullmatch(path.name))
    for done, key in enumerate(names):
        progress(done, len(names))
        try:
            header = atlas.header(key)
            entries.append(Entry.of(header))
            checked += 1 + len(header.files)
            faults += [f"{key[:12]}: {fault}" for fault in _changed(atlas, key, header.files)]
        except RecordError as error:
            faults.append(error.what)
    for path in sorted(atlas.path.glob("moments-*.safetensors")):
        checked += 1
        faults += _fault(lambda path=path: Moments.load(path))
    unusable = _fault(atlas.ledger)
    faults += unusable or _fault(lambda: [e.confirm(atlas.header(e.key)) for e in atlas.entries()])
    progress(len(names), len(names))
    rows = _by_question(atlas, entries, seconds=not unusable)
    return Status(tuple(rows), tuple(_unfinished(atlas)), _locked(atlas), checked, tuple(dict.fromkeys(faults)))


def _fault(use: Any) -> list[str]:
    try:
        use()
    except RecordError as error:
        return [error.what]
    return []


def _changed(atlas: Atlas, key: str, files: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the files of a record."""
    for name, checksum in files.items():
        try:
            if sha256_of(atlas.path, RECORDS, key, name) != checksum:
                yield f"{name} was changed after it was written"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def _by_question(atlas: Atlas, entries: Any, seconds: bool = True) -> Iterator[dict[str, Any]]:
    """A row per question, in alphabetical order."""
    times = {task["key"]: task["seconds"] for task in atlas.ledger()} if seconds else {}
    rows = dict[str, dict[str, Any]]()
    for entry in sorted(entries, key=lambda entry: entry.question):
        zero = {"question": entry.question, "records": 0, "edges": None, "bytes": 0, "seconds": None}
        row = rows.setdefault(entry.question, zero)
        row["records"] += 1
        row["bytes"] += _size(atlas.path / RECORDS / entry.key)
        if entry.is_pairs:
            row["edges"] = (row["edges"] or 0) + sum(part.rows for part in atlas.header(entry.key).parts)
        if times.get(entry.key) is not None:
            row["seconds"] = (row["seconds"] or 0.0) + times[entry.key]
    yield from rows.values()


def _unfinished(atlas: Atlas) -> Iterator[dict[str, Any]]:
    """A row per question of which blocks are there and the answer is not."""
    folder = atlas.path / BLOCKS
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    for key in names:
        if KEY.fullmatch(key) and not atlas.finished(key) and not (folder / key).is_symlink():
            blocks = len(list((folder / key).glob("*.safetensors")))
            described = _described(atlas.path, key)
            yield {**described, "done": blocks, "bytes": _size(folder / key), "key": key}


def _described(path: Path, key: str) -> dict[str, Any]:
    """Question, parameters and number of blocks; None each where the file that says so cannot be read."""
    names = ("question", "parameters", "blocks")
    try:
        with reading(path, BLOCKS, key, QUESTION) as file:
            fields = parsed(file.read(_MAX_QUESTION))
    except (OSError, ValueError):
        return dict.fromkeys(names)
    kinds = (str, dict, int)
    return {n: fields.get(n) if isinstance(fields.get(n), kind) else None for n, kind in zip(names, kinds, strict=True)}


def _size(folder: Path) -> int:
    """The bytes of the files in a folder."""
    try:
        with os.scandir(folder) as files:
            return sum(file.stat(follow_symlinks=False).st_size for file in files)
    except OSError:  # another process has just removed it
        return 0


def _locked(atlas: Atlas) -> bool:
    """Whether a run holds the lock of the atlas."""
    try:
        with reading(atlas.path, LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        return False
    return False
