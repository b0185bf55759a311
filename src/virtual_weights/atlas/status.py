"""What is in an atlas, what is unfinished, and whether it is still what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from virtual_weights.atlas.atlas import RECORDS, Atlas
from virtual_weights.atlas.blocks import BLOCKS, DESCRIPTION, BlockStore, holder_of
from virtual_weights.atlas.ledger import Entry
from virtual_weights.atlas.stored import KEY, MAX_HEADER, parsed
from virtual_weights.errors import RecordError
from virtual_weights.progress import Progress, silent
from virtual_weights.record.durable import reading, sha256_of
from virtual_weights.stream.moments import Moments


@final
@dataclass(frozen=True)
class Status:
    """What is in an atlas.

    Attributes:
        records: a row per question: how many records and edges it has, their bytes on disk, and how many seconds the
            ledger says that they took.
        unfinished: a row per question of which some blocks are computed: its parameters, how many blocks are done and
            how many there will be, and their bytes. None where that cannot be read.
        at_work: who is at work on the atlas; None where nobody is.
        checked: how many files were compared with their checksums; None where none were to be.
        faults: what was found to be wrong with them, in a sentence each.
    """

    records: tuple[Mapping[str, Any], ...]
    unfinished: tuple[Mapping[str, Any], ...]
    at_work: str | None
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
        return Status(
            tuple(_by_question(atlas, atlas.entries())), tuple(_unfinished(atlas)), holder_of(atlas.path), None, ()
        )
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
    return Status(tuple(rows), tuple(_unfinished(atlas)), holder_of(atlas.path), checked, tuple(dict.fromkeys(faults)))


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
    """A row per question whose blocks are kept, since not all answers that need them are there."""
    folder, store = atlas.path / BLOCKS, BlockStore(atlas.path / BLOCKS)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    for key in names:
        if not KEY.fullmatch(key) or (folder / key).is_symlink():
            continue
        question, parameters, blocks, answers = _described(folder / key)
        if answers is None or not all(KEY.fullmatch(str(answer)) and atlas.finished(answer) for answer in answers):
            row = {"question": question, "parameters": parameters, "blocks": None if blocks is None else len(blocks)}
            yield {**row, "done": len(store.finished(key)), "bytes": _size(folder / key), "key": key}


def _described(folder: Path) -> list[Any]:
    """Question, parameters, names of blocks and keys of answers; None each where the file that says so does not."""
    kinds = {"question": str, "parameters": dict, "blocks": list, "answers": list}
    try:
        with reading(folder, DESCRIPTION) as file:
            fields = parsed(file.read(MAX_HEADER + 1))
    except (OSError, ValueError):
        fields = {}
    return [fields[name] if isinstance(fields.get(name), kind) else None for name, kind in kinds.items()]


def _size(folder: Path) -> int:
    """The bytes of the files in a folder."""
    try:
        with os.scandir(folder) as files:
            return sum(file.stat(follow_symlinks=False).st_size for file in files)
    except OSError:  # another process has just removed it
        return 0
