"""The ledger of an atlas: the account of finished tasks, and an index of the records.

One SQLite file holds both. It may be lost: no result is in it. The index is made again from the headers of the records,
and the account begins anew.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from virtual_weights.atlas.stored import Header, canonical
from virtual_weights.errors import RecordError, write_error
from virtual_weights.record import Record

_SCHEMA = {
    ("table", "tasks"): """CREATE TABLE tasks (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, parameters TEXT NOT NULL, seconds REAL, finished TEXT NOT NULL,
    checksum TEXT NOT NULL
)""",
    ("table", "records"): """CREATE TABLE records (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, parameters TEXT NOT NULL, size INTEGER NOT NULL,
    is_pairs INTEGER NOT NULL, written TEXT NOT NULL, checksum TEXT NOT NULL
)""",
    ("index", "by_question"): "CREATE INDEX by_question ON records (question)",
    ("index", "sqlite_autoindex_tasks_1"): None,
    ("index", "sqlite_autoindex_records_1"): None,
}
"""What a ledger defines; SQLite makes what has no text."""
_PATIENCE = 60.0
"""Seconds to wait for another writer; each holds the file for milliseconds."""


@dataclass(frozen=True)
class Entry:
    """What the index says of a record.

    Attributes:
        key: its address.
        question: its question.
        parameters: the question's parameters.
        size: how many entries its columns have, absent ones too.
        is_pairs: whether it is about pairs, which are kept as edges.
        written: when it was stored, as in its header.
    """

    key: str
    question: str
    parameters: Mapping[str, Any]
    size: int
    is_pairs: bool
    written: str

    @staticmethod
    def of(header: Header) -> Entry:
        """The entry of a stored record."""
        size = 1
        for length in header.shape:
            size *= length
        return Entry(header.key, header.question, header.parameters, size, header.is_pairs, header.written)

    def fits(self, question: str | None, parameters: Mapping[str, Any]) -> bool:
        """Whether it is of this question, where one is named, and has these parameters, whatever its others are."""
        own = self.parameters
        same = all(name in own and canonical(own[name]) == canonical(value) for name, value in parameters.items())
        return same and question in (None, self.question)

    def confirm(self, answer: Header | Record) -> None:
        """Compare with what the record itself says.

        Raises:
            RecordError: that is something else.
        """
        if (self.question, dict(self.parameters)) != (answer.question, dict(answer.parameters)):
            raise RecordError(
                f"stored record {self.key[:12]} is not what the ledger says of it",
                expected=f"an answer to {self.question!r}",
                do="remove the atlas' ledger.sqlite: it is made again from the records",
            )


def enter(
    path: Path, key: str, question: str, parameters: Mapping[str, Any], seconds: float | None, entry: Entry | None
) -> None:
    """Enter a finished task, once: the first entry of a key stays; and the record in the index, if it is new."""
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    task = _with_checksum((key, question, canonical(parameters), None if seconds is None else float(seconds), now))
    with _database(path) as database:
        _begin(database)
        database.execute("INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, ?, ?)", task)
        _put(database, [] if entry is None else [entry])
        database.commit()


def index(path: Path, entries: Iterable[Entry], gone: Iterable[str]) -> None:
    """Enter records in the index that others have written, and strike out those that are gone."""
    with _database(path) as database:
        _begin(database)
        database.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in gone])
        _put(database, entries)
        database.commit()


def tasks(path: Path) -> list[dict[str, Any]]:
    """Every finished task in order of time, parameters as JSON text; empty where nothing was entered yet."""
    names = ("key", "question", "parameters", "seconds", "finished")
    with _reading(path) as database:
        rows = database.execute("SELECT * FROM tasks ORDER BY finished, key").fetchall() if database else []
    return [dict(zip(names, row, strict=True)) for row in _without_checksum(path, rows)]


def indexed(path: Path, question: str | None) -> tuple[Collection[Any], list[Entry]]:
    """The keys of all records that the index knows, and the entries of one question; of all where none is named."""
    with _reading(path) as database:
        if not database:
            return (), []
        keys = {key for (key,) in database.execute("SELECT key FROM records")}
        if question is None:
            rows = database.execute("SELECT * FROM records").fetchall()
        else:
            rows = database.execute("SELECT * FROM records WHERE question = ?", (question,)).fetchall()
    try:
        return keys, [
            Entry(key, name, dict(json.loads(parameters)), size, bool(is_pairs), written)
            for key, name, parameters, size, is_pairs, written in _without_checksum(path, rows)
        ]
    except (ValueError, TypeError, RecursionError) as error:
        raise _foreign(path, f"an entry is malformed ({error})") from error


def _put(database: sqlite3.Connection, entries: Iterable[Entry]) -> None:
    rows = ((e.key, e.question, canonical(e.parameters), e.size, int(e.is_pairs), e.written) for e in entries)
    database.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", map(_with_checksum, rows))


def _begin(database: sqlite3.Connection) -> None:
    """Begin to write, in a ledger that is whole or, if this process is killed, not there."""
    database.execute("BEGIN IMMEDIATE")
    if not _defined(database):
        for text in filter(None, _SCHEMA.values()):
            database.execute(text)


def _with_checksum(row: Sequence[Any]) -> tuple[Any, ...]:
    return (*row, sha256(repr(tuple(row)).encode("utf-8", "surrogatepass")).hexdigest())


def _without_checksum(path: Path, rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    if any(tuple(row) != _with_checksum(row[:-1]) for row in rows):
        raise _foreign(path, "an entry was changed after it was written")
    return [row[:-1] for row in rows]


def _defined(database: sqlite3.Connection) -> dict[tuple[str, str], str | None]:
    """What a database defines: what a ledger does, or nothing yet."""
    rows = database.execute("SELECT type, name, sql FROM sqlite_schema").fetchall()
    return {(kind, name): text for kind, name, text in rows}


@contextmanager
def _reading(path: Path) -> Generator[sqlite3.Connection | None]:
    """The ledger as it is at one moment, or None where there is none yet."""
    if not os.path.lexists(path):
        yield None
        return
    with _database(path) as database:
        database.execute("BEGIN")
        yield database if _defined(database) else None


@contextmanager
def _database(path: Path) -> Generator[sqlite3.Connection]:
    """The ledger. A file in its place that defines anything else, or is a link, is not touched."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise _foreign(path, "it is not a regular file")
    try:
        with closing(sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            if _defined(database) not in ({}, _SCHEMA):
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
        do=f"remove {path}: it only keeps account of time and an index, no result is lost",
    )
