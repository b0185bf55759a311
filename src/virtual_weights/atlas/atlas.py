"""An atlas: the folder of everything that was computed for one checkpoint."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from virtual_weights.atlas.stored import (
    EDGES,
    HEADER,
    KEY,
    MAX_HEADER,
    TABLE,
    Header,
    canonical,
    parsed,
    read_header,
    read_record,
    sealed,
    task_key,
    unsealed,
    write_record,
)
from virtual_weights.errors import RecordError, UsageError, write_error, writing
from virtual_weights.record import Record
from virtual_weights.record.durable import is_vacant, reading, replacing, sweep_aside, write_folder
from virtual_weights.version import VERSION

_TABLE = """
CREATE TABLE IF NOT EXISTS tasks (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, parameters TEXT NOT NULL, seconds REAL, finished TEXT NOT NULL,
    checksum TEXT NOT NULL
)
"""
_SCHEMA = [
    ("index", "sqlite_autoindex_tasks_1", "tasks", None),
    ("table", "tasks", "tasks", _TABLE.strip().replace("IF NOT EXISTS ", "")),
]
_PATIENCE = 60.0
"""Seconds to wait for another writer; each holds the file for milliseconds."""


def _enter(path: Path, key: str, question: str, parameters: Mapping[str, Any], seconds: float | None) -> None:
    """Enter a finished task, once: the first entry of a key stays."""
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    row = (key, question, canonical(parameters), None if seconds is None else float(seconds), now)
    with _database(path) as database, database:
        database.execute(_TABLE)
        database.execute("INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, ?, ?)", (*row, _checksum(row)))


def _entries(path: Path) -> list[dict[str, Any]]:
    """Every entry in order of time, parameters as JSON text; empty where nothing was entered yet."""
    if not os.path.lexists(path):
        return []
    with _database(path) as database:
        rows = database.execute("SELECT * FROM tasks ORDER BY finished, key").fetchall() if _tables(database) else []
        if any(_checksum(row) != checksum for *row, checksum in rows):
            raise _foreign(path, "an entry was changed after it was written")
        names = ("key", "question", "parameters", "seconds", "finished")
        return [dict(zip(names, row, strict=False)) for row in rows]


def _checksum(row: Sequence[Any]) -> str:
    return sha256(repr(tuple(row)).encode("utf-8", "surrogatepass")).hexdigest()


def _tables(database: sqlite3.Connection) -> list[Any]:
    """What a database defines: the schema of a ledger, or nothing yet."""
    return database.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type").fetchall()


@contextmanager
def _database(path: Path) -> Generator[sqlite3.Connection]:
    """The ledger. A file in its place that defines anything else, or is a link, is not touched."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise _foreign(path, "it is not a regular file")
    try:
        with closing(sqlite3.connect(path, timeout=_PATIENCE)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            if _tables(database) not in ([], _SCHEMA):
                raise _foreign(path, "it defines other tables, views or triggers")
            yield database
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite quotes a schema that is no text
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _OF_THE_SYSTEM:
            raise write_error(path, OSError(_OF_THE_SYSTEM[code], str(error))) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise RecordError(
                f"the ledger {path.name} has been in use for {_PATIENCE:.0f} seconds",
                expected="other writers that hold it for milliseconds",
                do="wait for the other process, or end it, and run the command again",
            ) from error
        raise _foreign(path, str(error)) from error


_OF_THE_SYSTEM = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
}
"""What SQLite reports of the disk, not of what is in the file."""


def _foreign(path: Path, what: str) -> RecordError:
    return RecordError(
        f"the ledger {path.name} cannot be used: {what}",
        expected="the SQLite file that this package writes",
        do=f"remove {path}: it only keeps account of time, no result is lost",
    )


FORMAT = 3
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
        canonical(described)  # refuses what is not plain JSON
        assert isinstance(described.get("fingerprint"), str), "an atlas is of one checkpoint: give its fingerprint"
        with writing(path):
            if path.exists() and not path.is_dir():
                expected = "a new or empty folder, or an atlas"
                raise UsageError(f"{path} is a file", expected=expected, do="name another path")
            path.mkdir(parents=True, exist_ok=True)
            vacant = is_vacant(path)  # first: an atlas that another writer makes meanwhile begins with its manifest
            if not os.path.lexists(path / MANIFEST):
                if not vacant:
                    raise UsageError(
                        f"{path} is neither empty nor an atlas",
                        expected="a new or empty folder, or an atlas",
                        do="name another folder; nothing there was touched",
                    )
                with replacing(path / MANIFEST) as aside:
                    aside.write_text(sealed(described), encoding="utf-8")
        atlas = cls.open(path)
        if atlas.fingerprint != described["fingerprint"]:
            raise UsageError(
                f"{path} is the atlas of another checkpoint: {atlas.manifest.get('reference', atlas.fingerprint)}",
                expected=f"the atlas of {described.get('reference', described['fingerprint'])}",
                do="name another folder; one atlas holds one checkpoint",
            )
        with writing(path):
            (path / RECORDS).mkdir(exist_ok=True)
            sweep_aside(path)
            sweep_aside(path / RECORDS)
        return atlas

    @classmethod
    def open(cls, path: str | Path) -> Atlas:
        """Open an existing atlas, to read or to go on.

        Raises:
            UsageError: there is no atlas at this path.
            RecordError: its manifest cannot be read or was changed, a link leads out of it, or another version of this
                package wrote it.
        """
        path = Path(path)
        if not os.path.lexists(path / MANIFEST):
            raise UsageError(
                f"no atlas at {path}",
                expected=f"a folder with a {MANIFEST}",
                do="make one with vweights map MODEL -o DIR",
            )
        anew = "map the model again into another folder"
        try:
            with reading(path, MANIFEST) as file:
                fields = parsed(file.read(MAX_HEADER + 1))
            if fields.get("format") != FORMAT:
                raise _unreadable(path, f"it has format {fields.get('format')!r:.100}", anew)
            manifest = unsealed(fields)
        except (OSError, ValueError) as error:
            raise _unreadable(path, f"its {MANIFEST} cannot be used ({error})", anew) from error
        if not isinstance(manifest.get("fingerprint"), str):
            raise _unreadable(path, f"its {MANIFEST} names no fingerprint", anew)
        if (path / RECORDS).is_symlink():
            raise _unreadable(path, f"its {RECORDS} are a link", "open the folder that holds them by its own path")
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
            UsageError: the record is of another checkpoint, its parameters are no plain JSON, or the system does not
                let us write there.
            ResourceError: the disk is full.
            RecordError: what lies in the place of the ledger is not one.
        """
        import_module("duckdb")  # before anything is written: whoever interrupts it leaves nothing behind

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
            with writing(target):
                target.parent.mkdir(exist_ok=True)
            write_folder(target, lambda folder: write_record(record, folder, key))
        _enter(self._path / LEDGER, key, record.question, record.parameters, seconds)
        return key

    def get(self, key: str) -> Record:
        """Read a record.

        Raises:
            UsageError: nothing is stored at this address.
            RecordError: what is stored there cannot be read, or was changed since it was stored.
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
        try:
            names = sorted(path.name for path in records.iterdir()) if records.is_dir() else []
        except OSError as error:
            raise _unreadable(self._path, f"{RECORDS} cannot be listed ({error})", "check the permissions") from error
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
