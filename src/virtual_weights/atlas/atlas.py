"""An atlas: the folder of everything that was computed for one checkpoint."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from virtual_weights.atlas.stored import (
    EDGES,
    HEADER,
    KEY,
    TABLE,
    Header,
    canonical,
    read_header,
    read_record,
    task_key,
    write_record,
)
from virtual_weights.errors import RecordError, UsageError
from virtual_weights.record import Record
from virtual_weights.record.durable import is_vacant, replacing, sweep_aside, write_folder
from virtual_weights.version import VERSION

_TABLE = """
CREATE TABLE IF NOT EXISTS tasks (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, parameters TEXT NOT NULL, seconds REAL, finished TEXT NOT NULL
)
"""
_PATIENCE = 60.0
"""Seconds to wait for another writer; each holds the file for milliseconds."""


def _enter(path: Path, key: str, question: str, parameters: Mapping[str, Any], seconds: float | None) -> None:
    """Enter a finished task, once: the first entry of a key stays."""
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    with _database(path) as database, database:
        database.execute(_TABLE)
        database.execute(
            "INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, ?)", (key, question, canonical(parameters), seconds, now)
        )


def _entries(path: Path) -> list[dict[str, Any]]:
    """Every entry in order of time, parameters as JSON text; empty where nothing was entered yet."""
    if not path.exists():
        return []
    with _database(path) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM tasks ORDER BY finished, key")]


@contextmanager
def _database(path: Path) -> Generator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, timeout=_PATIENCE)) as database:
            yield database
    except sqlite3.DatabaseError as error:
        raise RecordError(
            f"the ledger {path.name} cannot be used: {error}",
            expected="the SQLite file that this package writes",
            do=f"remove {path}: it only records which tasks finished and when, and no result is lost",
        ) from error


FORMAT = 2
"""Version of the folder's layout; it grows when an older reader could not read it."""

MANIFEST, RECORDS, LEDGER = "manifest.json", "records", "ledger.sqlite"


class Atlas:
    """Records of one checkpoint at rest.

    A record lies under the hash of what was asked, appears whole or not at all, and never changes: any
    number of writers may fill one atlas, on one machine or on a shared disk, and an interrupted run goes
    on where it stopped. Make one with `create`, or read one with `open`.

    Example:
        >>> atlas = Atlas.create(folder, {"fingerprint": stream.source.fingerprint})  # doctest: +SKIP
        >>> key = atlas.put(Composition("K")(stream))  # doctest: +SKIP
        >>> Atlas.open(folder).get(key).top(10)  # doctest: +SKIP
    """

    def __repr__(self) -> str:
        count = sum(1 for _ in (self.path / RECORDS).glob("[0-9a-f]*"))
        return f"Atlas in {self.path}: {count} records; .keys(question), .get(key).top(10)"

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path, self._manifest = path, manifest

    @classmethod
    def create(cls, path: str | Path, manifest: Mapping[str, Any]) -> Atlas:
        """Make an atlas in a new or empty folder, or go on with the one that is there.

        Args:
            path: the folder.
            manifest: what there is to say about the checkpoint, plain JSON values; ``"fingerprint"`` is needed.
                Format and package version are added. An atlas that is there keeps its own.

        Returns:
            The atlas, cleared of what crashed writers left.

        Raises:
            UsageError: the folder holds something else, or the atlas of another checkpoint.
            RecordError: the atlas there cannot be read.
        """
        path = Path(path)
        described = {"format": FORMAT, "version": VERSION, **manifest}
        text = json.dumps(json.loads(canonical(described)), indent=1)
        assert isinstance(described.get("fingerprint"), str), "an atlas is of one checkpoint: give its fingerprint"
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file", expected="a new or empty folder, or an atlas", do="name another path")
        path.mkdir(parents=True, exist_ok=True)
        vacant = is_vacant(path)  # first: an atlas that another writer makes meanwhile begins with its manifest
        if not (path / MANIFEST).exists():
            if not vacant:
                raise UsageError(
                    f"{path} is neither empty nor an atlas",
                    expected="a new or empty folder, or an atlas",
                    do="name another folder; nothing there was touched",
                )
            with replacing(path / MANIFEST) as aside:
                aside.write_text(text, encoding="utf-8")
        atlas = cls.open(path)
        if atlas.fingerprint != described["fingerprint"]:
            raise UsageError(
                f"{path} is the atlas of another checkpoint: {atlas.manifest.get('reference', atlas.fingerprint)}",
                expected=f"the atlas of {described.get('reference', described['fingerprint'])}",
                do="name another folder; one atlas holds one checkpoint",
            )
        (path / RECORDS).mkdir(exist_ok=True)
        sweep_aside(path)
        sweep_aside(path / RECORDS)
        return atlas

    @classmethod
    def open(cls, path: str | Path) -> Atlas:
        """Open an existing atlas, to read or to go on.

        Raises:
            UsageError: there is no atlas at this path.
            RecordError: its manifest cannot be read, or a later version of this package wrote it.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UsageError(
                f"no atlas at {path}",
                expected=f"a folder with a {MANIFEST}",
                do="make one with vweights map MODEL -o DIR",
            )
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            layout, fingerprint = manifest["format"], manifest["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(
                path, f"its {MANIFEST} cannot be read ({error!r})", "compute it anew elsewhere"
            ) from error
        if layout != FORMAT or not isinstance(fingerprint, str):
            raise _unreadable(path, f"it has format {layout!r}", "map the model again into another folder")
        return cls(path, manifest)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What the atlas says about its checkpoint and itself."""
        return self._manifest

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint."""
        return str(self._manifest["fingerprint"])

    def put(self, record: Record, *, key: str | None = None, seconds: float | None = None) -> str:
        """Store a record, unless one is stored at its address.

        Args:
            record: the record; its provenance names this atlas's checkpoint or none.
            key: its address, of `task_key`; None derives it from the record's own parameters and stamp.
            seconds: how long it took to compute, for the ledger.

        Returns:
            The record's address.

        Raises:
            UsageError: the record is of another checkpoint, or its parameters are no plain JSON.
        """
        fingerprint = record.provenance.get("fingerprint", self.fingerprint)
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"a {record.question} record of checkpoint {fingerprint} cannot be stored in this atlas",
                expected=f"records of {self.fingerprint}",
                do="make another atlas for it; one atlas holds one checkpoint",
            )
        key = task_key(self.fingerprint, record.question, record.parameters, record.stamp) if key is None else key
        target = self._folder(key)
        if not self.finished(key):
            target.parent.mkdir(exist_ok=True)
            write_folder(target, lambda folder: write_record(record, folder, key))
        _enter(self._path / LEDGER, key, record.question, record.parameters, seconds)
        return key

    def get(self, key: str) -> Record:
        """Read a record; dense columns are mapped, and read from the disk as they are touched.

        Raises:
            UsageError: nothing is stored at this address.
            RecordError: what is stored there cannot be read.
        """
        folder = self._folder(key)
        if not folder.is_dir():
            raise UsageError(
                f"no record {key[:12]}... in {self._path}",
                expected=f"one of its {len(self.keys())} keys",
                do="list them with atlas.keys(), or compute the record and put() it",
            )
        return read_record(folder)

    def find(self, question: str, /, **parameters: Any) -> Record | None:
        """The newest record of a question that has these parameters, whatever its others are.

        Example:
            >>> atlas.find("composition", port="K")  # doctest: +SKIP
        """
        keys = self.keys(question, **parameters)
        return self.get(keys[-1]) if keys else None

    def keys(self, question: str | None = None, /, **parameters: Any) -> tuple[str, ...]:
        """Addresses of the stored records, oldest first.

        Args:
            question: only records of this question; None for all.
            parameters: only records that have these parameters, whatever their others are.
        """
        records = self._path / RECORDS
        names = sorted(path.name for path in records.iterdir()) if records.is_dir() else []
        headers = {name: self.header(name) for name in names if KEY.fullmatch(name)}
        fitting = [name for name, header in headers.items() if _fits(header, question, parameters)]
        return tuple(sorted(fitting, key=lambda name: headers[name].written))

    def finished(self, key: str) -> bool:
        """Whether a record is stored at this address; nothing is read."""
        return (self._folder(key) / HEADER).is_file()

    def ledger(self) -> list[dict[str, Any]]:
        """The account of finished tasks in order of time: key, question, parameters, seconds, finished."""
        return _entries(self._path / LEDGER)

    def header(self, key: str) -> Header:
        """What is known of a stored record without its values."""
        return read_header(self._folder(key))

    def table(self, key: str) -> Path:
        """The Parquet file of a record over one axis; others have none."""
        return self._folder(key) / TABLE

    def edge_table(self, key: str) -> Path:
        """The Parquet file of a record's pairs; there for records over (reader, writer)."""
        return self._folder(key) / EDGES

    def _folder(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise UsageError(f"{key!r} is not a key", expected="64 hex digits", do="list keys with atlas.keys()")
        return self._path / RECORDS / key


def _fits(header: Header, question: str | None, parameters: Mapping[str, Any]) -> bool:
    stored = header.parameters
    same = all(name in stored and canonical(stored[name]) == canonical(value) for name, value in parameters.items())
    return same and question in (None, header.question)


def _unreadable(path: Path, what: str, do: str) -> RecordError:
    return RecordError(f"the atlas {path} cannot be used: {what}", expected=f"an atlas of format {FORMAT}", do=do)
