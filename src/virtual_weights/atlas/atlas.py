"""An atlas: the folder of everything that was computed for one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from virtual_weights.atlas.ledger import Entry, enter, index, indexed, tasks
from virtual_weights.atlas.stored import (
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
from virtual_weights.errors import RecordError, ResourceError, UsageError, writing
from virtual_weights.record import Record
from virtual_weights.record.durable import is_vacant, reading, replacing, sweep_aside, write_folder
from virtual_weights.version import VERSION

FORMAT = 4
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
        target, entry = self._folder(key), None
        if not self.finished(key):
            with writing(target):
                target.parent.mkdir(exist_ok=True)
            headers = list[Header]()
            if write_folder(target, lambda folder: headers.append(write_record(record, folder, key))):
                entry = Entry.of(headers[0])
        enter(self._path / LEDGER, key, record.question, record.parameters, seconds, entry)
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
        entries = self.entries(question, **parameters)
        if not entries:
            return None
        record = self.get(entries[-1].key)
        entries[-1].confirm(record)
        return record

    def keys(self, question: str | None = None, /, **parameters: Any) -> tuple[str, ...]:
        """Addresses of the stored records, oldest first.

        Args:
            question: only records of this question; None for all.
            parameters: only records that have these parameters, whatever their others are.
        """
        return tuple(entry.key for entry in self.entries(question, **parameters))

    def entries(self, question: str | None = None, /, **parameters: Any) -> tuple[Entry, ...]:
        """What the stored records answer, oldest first; asked as ``keys``.

        The ledger's index says it, so that the time grows with the records that fit and hardly with the others. Records
        that it does not know yet, of a writer who was killed or copied into the folder, are found in the folder. Where
        the ledger cannot be written, their headers are read each time.
        """
        path = self._path / LEDGER
        try:
            known, entries = indexed(path, question)
        except (UsageError, ResourceError):  # the system does not let us read it
            known, entries = (), []
        names = self._names()  # after the index: what was entered in between is in both
        new = [Entry.of(self.header(name)) for name in sorted(names.difference(known))]
        gone = [key for key in known if key not in names]
        if new or gone:
            with suppress(UsageError, ResourceError):
                index(path, new, gone)
        fitting = [entry for entry in (*entries, *new) if entry.key in names and entry.fits(question, parameters)]
        return tuple(sorted(fitting, key=lambda entry: (entry.written, entry.key)))

    def _names(self) -> set[str]:
        """The addresses that there are folders for."""
        records = self._path / RECORDS
        try:
            with os.scandir(records) as names:
                return {item.name for item in names if KEY.fullmatch(item.name)}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise _unreadable(self._path, f"{RECORDS} cannot be listed ({error})", "check the permissions") from error

    def finished(self, key: str) -> bool:
        """Whether a record is stored at this address; nothing is read."""
        return (self._folder(key) / HEADER).is_file()

    def ledger(self) -> list[dict[str, Any]]:
        """The account of finished tasks in order of time: key, question, parameters, seconds, finished."""
        return tasks(self._path / LEDGER)

    def header(self, key: str) -> Header:
        """What is known of a stored record without its values."""
        return read_header(self._folder(key))

    def table(self, key: str) -> Path:
        """The Parquet file of a record over one axis; others have none."""
        return self._folder(key) / TABLE

    def edge_tables(self, key: str) -> tuple[Path, ...]:
        """The Parquet files of a record's pairs; there for records over (reader, writer) and tables of such pairs."""
        return tuple(self._folder(key) / part.name for part in self.header(key).parts)

    def _folder(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise UsageError(f"{key!r} is not a key", expected="64 hex digits", do="list keys with atlas.keys()")
        return self._path / RECORDS / key


def _unreadable(path: Path, what: str, do: str) -> RecordError:
    return RecordError(f"the atlas {path} cannot be used: {what}", expected=f"an atlas of format {FORMAT}", do=do)
