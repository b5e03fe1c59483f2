"""The ledger's file: its tables, how older ones are brought up to date, and the lock against a second daemon.

Layout, ``user_version`` 5, ``application_id`` "SEMW". Paths are BLOBs, because file names need not be UTF-8.

    work     source, sha256     primary key: a content reviewed for one tool is one piece of work
             path               where the content lay when it was claimed last, relative to the drop folder
             state              SEEN (waits) | CLAIMED (in flight) | DONE | QUARANTINED
             attempts           tries that failed, those that died with the process included
             deaths             tries that died with the process; since layout 4
             reason             why it was given back or quarantined, or done without a review (a reference)
             first_seen_utc, finished_utc
    paths    source, path       primary key
             size, mtime_ns     the file as it was when it was hashed
             ctime_ns, inode    the same, NULL where they are not known; since layout 4
             look_again_utc     when it is to be hashed once more, NULL: never; since layout 4
             sha256             what it hashed to
             seen_utc           when it was hashed; later, when it was last found lying there still
             match_key          what a KLARF that names it has in common with it; since layout 5
    outbox   seq, id, stream, payload    waits to be published; consumers drop ids that they know
    audit    seq, line                   waits to be appended to the audit log; ``seq`` is never used twice
    noted    id, utc                     what ``note`` has taken and must not take twice; since layout 2.
                                         ``utc``, where it may be forgotten, is when it was taken; since layout 3
    unknowns id, created_utc, source, path, sha256, page, defect_id, box, recipe_id, encoder, features
                                         what a later head judges again, see ``UnknownFeatures``; since layout 3
    duplicates source, path              with the content of others, not noted beside the results yet; since layout 4
    lot_rows seq, lot, result            what is not in the table of its lot yet, see ``lot_rows``; since layout 3
    manifests, manifest_files, lot_revisions    KLARFs and what was written back, see ``manifests``; since layout 5
"""

import fcntl
import os
import time
from pathlib import Path

from semwatch.errors import ConfigError
from semwatch.store import lot_rows, manifests, unknown_features
from semwatch.system.sqlite_file import Kind

_LAYOUT_3 = (
    *unknown_features.SCHEMA,
    *lot_rows.SCHEMA,
    "CREATE INDEX paths_by_content ON paths (source, sha256)",
)
_LAYOUT_4 = (
    "ALTER TABLE work ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE paths ADD COLUMN ctime_ns INTEGER",
    "ALTER TABLE paths ADD COLUMN inode INTEGER",
    "ALTER TABLE paths ADD COLUMN look_again_utc TEXT",
    "CREATE TABLE duplicates (source TEXT NOT NULL, path BLOB NOT NULL, PRIMARY KEY (source, path)) WITHOUT ROWID",
    "CREATE INDEX suspects ON work (first_seen_utc) WHERE deaths > 0 AND state = 'SEEN'",
    "CREATE INDEX paths_to_look_at ON paths (look_again_utc) WHERE look_again_utc IS NOT NULL",
)
KIND = Kind(
    noun="ledger",
    application_id=0x53454D57,  # "SEMW"
    schema=(
        """CREATE TABLE work (
            source TEXT NOT NULL, sha256 TEXT NOT NULL, path BLOB NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('SEEN', 'CLAIMED', 'DONE', 'QUARANTINED')),
            attempts INTEGER NOT NULL DEFAULT 0, reason TEXT, first_seen_utc TEXT NOT NULL, finished_utc TEXT,
            PRIMARY KEY (source, sha256)) WITHOUT ROWID""",
        "CREATE INDEX work_by_state ON work (state, first_seen_utc)",
        "CREATE INDEX work_by_finish ON work (finished_utc)",
        """CREATE TABLE paths (
            source TEXT NOT NULL, path BLOB NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
            sha256 TEXT NOT NULL, seen_utc TEXT NOT NULL, PRIMARY KEY (source, path)) WITHOUT ROWID""",
        """CREATE TABLE outbox (
            seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, stream TEXT NOT NULL,
            payload BLOB NOT NULL)""",
        "CREATE TABLE audit (seq INTEGER PRIMARY KEY AUTOINCREMENT, line TEXT NOT NULL)",
        "CREATE TABLE noted (id TEXT PRIMARY KEY, utc TEXT) WITHOUT ROWID",
        *_LAYOUT_3,
        *_LAYOUT_4,
        *manifests.SCHEMA,
    ),
    migrations={
        # Some ledgers of layout 1 have the table already.
        1: ("CREATE TABLE IF NOT EXISTS noted (id TEXT PRIMARY KEY) WITHOUT ROWID",),
        2: (*_LAYOUT_3, "ALTER TABLE noted ADD COLUMN utc TEXT"),
        # What had attempts then had died with the process.
        3: (*_LAYOUT_4, "UPDATE work SET deaths = attempts WHERE attempts > 0"),
        4: manifests.SCHEMA,
    },
    made_by="the daemon makes it at its start",
    remedy="move the file and its -wal and -shm aside and start again; what still lies in the folders is reviewed anew",
)
LOCK_S = 0.3


def lock_out_others(path: Path) -> int:
    """Lock the side file of a ledger, which stays: to delete it would let two daemons lock two files of one name.

    Returns:
        A descriptor; to close it ends the lock.

    Raises:
        ConfigError: another daemon has it, or its folder cannot be written.
    """
    side = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(side, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"ledger {path} cannot be opened ({error}); check the folder and its rights") from error
    try:
        _lock(fd, time.monotonic() + LOCK_S)
    except OSError as error:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise ConfigError(
            f"ledger {path} is in use by process {holder}; stop that daemon, or give this one a ledger of its own"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _lock(fd: int, deadline: float) -> None:
    """Lock at once, or shortly after: who only asks whether a daemon runs holds a shared lock for a moment."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.02)
