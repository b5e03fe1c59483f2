"""One SQLite file of ours, held open: made, recognised, brought to its newest layout, its faults told in our words.

A file says by ``application_id`` what it is and by ``user_version`` in which layout. ``synchronous=FULL`` in a WAL:
what a transaction returned from survives a power cut. A WAL needs a local disk, not a network share.
"""

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from semwatch.errors import ConfigError, ServiceUnavailable

log = logging.getLogger(__name__)

_BROKEN = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_AWAY = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CANTOPEN", "SQLITE_READONLY")
_WAL_BYTES = 64 << 20
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Kind:
    """What files of one kind are."""

    noun: str
    """For people: ledger."""
    application_id: int
    schema: Sequence[str]
    """Statements that make an empty file of the newest layout."""
    migrations: Mapping[int, Sequence[str]]
    """Statements that bring a file from a layout to the next; layouts count from 1."""
    made_by: str
    """For people: who makes the file."""
    remedy: str
    """For people: what to do with a file that is broken."""

    @property
    def layout(self) -> int:
        """The newest."""
        return 1 + len(self.migrations)


class _Identity(NamedTuple):
    application_id: int
    layout: int
    n_tables: int


class SqliteFile:
    """The open file. Any thread may call; one works at a time.

    Args:
        path: of the file; its folder is made unless ``read_only``.
        kind: what it must be.
        read_only: look at it while another may be writing; older layouts are taken as they are.
        migrates: an older layout is brought up to date; False: it is refused.
        busy_s: how long to wait for another writer.

    Raises:
        ConfigError: it is of another kind, broken, too new, or (read-only) not there; from every method, broken.
        ServiceUnavailable: from every method: the disk is full or failing, or another writer takes too long.
    """

    def __init__(
        self, path: Path, kind: Kind, *, read_only: bool = False, migrates: bool = True, busy_s: float = 10.0
    ) -> None:
        self._path, self._kind = path, kind
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        try:
            self._db = self._connect(read_only=read_only, busy_s=busy_s)
            self._prepare_in(busy_s, read_only=read_only, migrates=migrates)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        with self._lock:
            if self._db is not None:
                self._db.close()
            self._db = None

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        """Return what a question finds."""
        with self._opened() as db:
            return db.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write, all or nothing; durable once left."""
        with self._opened() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite itself rolls back after some errors of the disk
                    with suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                raise

    def _connect(self, *, read_only: bool, busy_s: float) -> sqlite3.Connection:
        path, noun = self._path, self._kind.noun
        if read_only and not path.is_file():
            raise ConfigError(f"there is no {noun} at {path}; {self._kind.made_by}")
        uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        if read_only and not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
            uri += "&immutable=1"  # nobody writes, all is in the one file, and a WAL of our own could not be made
        try:
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            return sqlite3.connect(uri, uri=True, timeout=busy_s, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise ConfigError(f"{noun} {path} cannot be opened ({error}); check the folder and its rights") from error

    def _prepare_in(self, busy_s: float, *, read_only: bool, migrates: bool) -> None:
        """Prepare, and again while another makes the file: SQLite does not wait where the journal becomes a WAL."""
        deadline = time.monotonic() + busy_s
        while True:
            try:
                return self._prepare(read_only=read_only, migrates=migrates)
            except ServiceUnavailable as error:
                is_busy = getattr(error.__cause__, "sqlite_errorname", "").startswith("SQLITE_BUSY")
                if not is_busy or time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_S)

    def _prepare(self, *, read_only: bool, migrates: bool) -> None:
        kind, what = self._kind, f"{self._kind.noun} {self._path}"
        found = self._identity()
        if found == (0, 0, 0):
            if read_only:
                raise ServiceUnavailable(f"{what} is still empty; {kind.made_by}")
            self._create()
            found = self._identity()
        if found.application_id != kind.application_id:
            raise ConfigError(f"{self._path} is no {kind.noun} of semwatch; move it away, or name another file")
        if found.layout > kind.layout:
            raise ConfigError(
                f"{what} was made by a newer semwatch (layout {found.layout}, this one knows {kind.layout}): upgrade "
                f"again, or put back the {kind.noun} of the backup that the upgrade made"
            )
        if read_only:
            return
        if found.layout < kind.layout and not migrates:
            raise ConfigError(f"{what} is of an older semwatch; {kind.made_by}, and brings it up to date")
        self._set_up_journal()
        if found.layout < kind.layout:
            self._migrate(found.layout)

    def _identity(self) -> _Identity:
        with self._opened() as db:
            return _identity(db)

    def _create(self) -> None:
        with self.transaction() as db:
            if _identity(db) == (0, 0, 0):  # else another writer was faster
                for statement in self._kind.schema:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {self._kind.application_id}")
                db.execute(f"PRAGMA user_version = {self._kind.layout}")

    def _set_up_journal(self) -> None:
        with self._opened() as db:
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise ConfigError(f"{self._kind.noun} {self._path}: its disk cannot hold a WAL; put it on a local disk")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")

    def _migrate(self, layout: int) -> None:
        with self.transaction() as db:
            for older in range(layout, self._kind.layout):
                for statement in self._kind.migrations[older]:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {self._kind.layout}")
        log.info("%s %s brought from layout %d to %d", self._kind.noun, self._path, layout, self._kind.layout)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            if self._db is None:
                raise RuntimeError(f"the {self._kind.noun} is closed")
            yield self._db

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            name, what = getattr(error, "sqlite_errorname", ""), f"{self._kind.noun} {self._path}"
            if name.startswith(_BROKEN):
                raise ConfigError(f"{what} is broken ({error}); {self._kind.remedy}") from error
            if name.startswith(_AWAY):
                raise ServiceUnavailable(f"{what}: {error}") from error
            raise


def _identity(db: sqlite3.Connection) -> _Identity:
    """What the file says at one moment: another may be making it."""
    found = db.execute(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)"
        " FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    return _Identity(*found)
