"""The account of finished tasks: what was asked, how long it took, when it was done.

The folders of the records say what is finished; the ledger adds time to it and can be lost without harm.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from virtual_weights.atlas.keys import canonical
from virtual_weights.errors import RecordError

_TABLE = """
CREATE TABLE IF NOT EXISTS tasks (
    key TEXT PRIMARY KEY, question TEXT NOT NULL, parameters TEXT NOT NULL, seconds REAL, finished TEXT NOT NULL
)
"""
_PATIENCE = 60.0
"""Seconds to wait for another writer; each holds the file for milliseconds."""


def enter(path: Path, key: str, question: str, parameters: Mapping[str, Any], seconds: float | None) -> None:
    """Enter a finished task, once: the first entry of a key stays."""
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    with _open(path) as database, database:
        database.execute(_TABLE)
        database.execute(
            "INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, ?)", (key, question, canonical(parameters), seconds, now)
        )


def entries(path: Path) -> list[dict[str, Any]]:
    """Every entry in order of time, parameters as JSON text; empty where nothing was entered yet."""
    if not path.exists():
        return []
    with _open(path) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM tasks ORDER BY finished, key")]


@contextmanager
def _open(path: Path) -> Generator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, timeout=_PATIENCE)) as database:
            yield database
    except sqlite3.DatabaseError as error:
        raise RecordError(
            f"the ledger {path.name} cannot be used: {error}",
            expected="the SQLite file that this package writes",
            do=f"remove {path}: it only keeps account of time, no result is lost",
        ) from error
