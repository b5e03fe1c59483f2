"""Copies of what must not be lost while versions change.

    /var/lib/semwatch-install/backups/<utc>-<from>-<to>/   what the version left had, each file under its own path:
        var/lib/semwatch/ledger.sqlite                     copied by SQLite's online backup, as are the unknowns
        var/lib/semwatch/learning/unknowns.sqlite, clusters.json
        etc/semwatch/                                      settings and recipes
        srv/semwatch/model_repository/*/pinned, *.withdrawn

so that ``cp`` brings any of it back by hand; the five newest are kept. Heads themselves are never touched.
"""

import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from semwatch.deployment.installed_files import REPOSITORY, SETTINGS, STATE, settings_folder
from semwatch.deployment.releases import Place
from semwatch.errors import ConfigError
from semwatch.settings.site import Site, load_site
from semwatch.system import files, rights

BACKUPS = Path("/var/lib/semwatch-install/backups")
KEEP = 5
LEDGER, UNKNOWNS, CLUSTERS = "ledger.sqlite", "unknowns.sqlite", "clusters.json"
BUSY_S = 10.0
_MARGIN_BYTES = 64 << 20
_ENDS = ("", "-wal", "-shm")


@dataclass(frozen=True, slots=True)
class Kept:
    """What a version must not lose, as this process reaches it."""

    databases: tuple[Path, ...]
    files: tuple[Path, ...]


def kept_files(at: Place, tools: Sequence[str]) -> Kept:
    """What a backup takes: what the settings name, and where they cannot be read, what the layout has."""
    databases: list[Path] = []
    files: set[Path] = set()
    for tool in tools:
        site = _site(at, tool)
        state = at.on_disk(site.state_dir if site else STATE / tool)
        learning = at.on_disk(site.learning_dir if site else STATE / tool / "learning")
        repository = at.on_disk(site.models.repository if site else REPOSITORY)
        databases += [state / LEDGER, learning / UNKNOWNS]
        files |= {
            state / CLUSTERS,
            learning / CLUSTERS,
            *repository.glob("*/pinned"),
            *repository.glob("*/*.withdrawn"),
        }
        files |= {reached(at, folder.recipe) for folder in site.folders} if site else set()
    settings = at.on_disk(SETTINGS).rglob("*")
    files |= {path for path in settings if path.is_file() and not path.is_symlink()}
    there = (path for path in files if path.is_file() and not path.is_symlink())
    return Kept(tuple(databases), tuple(sorted(there)))


def take(at: Place, kept: Kept, name: str) -> Path:
    """Copy what must not be lost into a folder that appears whole; all but the newest backups go.

    Raises:
        OSError, sqlite3.Error: the disk refused, or a database is broken.
    """
    utc = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    folder = at.on_disk(BACKUPS)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # settings may hold names of people, unknowns hold images
    partial = folder / f".{utc}.partial"
    partial.mkdir()
    try:
        for path in kept.files:
            _made(partial / path.relative_to(at.root)).write_bytes(rights.read_no_link(path))
        for path in filter(Path.is_file, kept.databases):
            _take_database(path, _made(partial / path.relative_to(at.root)))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    made = folder / f"{utc}-{name}"
    files.place_folder(partial, made)
    for old in listed(at)[:-KEEP]:
        shutil.rmtree(old)
    return made


def listed(at: Place) -> list[Path]:
    """The backups, oldest first."""
    return sorted(at.on_disk(BACKUPS).glob("[0-9]*T*Z-*-*"))


def put_back(at: Place, backup: Path, databases: Sequence[Path]) -> None:
    """Make databases what they were; one that the backup has not stays.

    The audit log is append-only and is never put back: the ledger goes on counting where it was, or its daemon would
    refuse the log, and lines that were not in the log yet stay queued.

    Raises:
        OSError, sqlite3.Error: the disk refused.
    """
    for path in databases:
        copy = backup / path.relative_to(at.root)
        if copy.is_file():
            _put_database(copy, path, counts_on=path.name == LEDGER)


def put_back_older(at: Place, kept: Kept, version: str) -> list[Path]:
    """Put back what ``version`` left, where the layout has changed since it served."""
    left = [backup for backup in listed(at) if backup.name.split("-")[1] == version]
    if not left:
        return []
    newer = []
    for path in filter(Path.is_file, kept.databases):
        copy = left[-1] / path.relative_to(at.root)
        with rights.of_owner(path):
            layout = _layout(path)
        if copy.is_file() and layout > _layout(copy):
            newer.append(path)
    put_back(at, left[-1], newer)
    return newer


def _site(at: Place, tool: str) -> Site | None:
    try:
        return load_site(at.on_disk(settings_folder(tool) / "site.yaml"))
    except ConfigError:
        return None


def reached(at: Place, path: Path) -> Path:
    """A path of the settings; one that was relative starts at their folder, within the root, already."""
    return path if path.is_relative_to(at.root) else at.on_disk(path)


def check_space(at: Place, kept: Kept) -> None:
    """See that the backup fits on its disk.

    Raises:
        ConfigError: it does not.
    """
    needed = sum(path.stat().st_size for path in _with_wal(kept.databases)) + _MARGIN_BYTES
    folder = next(path for path in (at.on_disk(BACKUPS), *at.on_disk(BACKUPS).parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"{BACKUPS} needs {needed >> 20} MB for the backup, {free >> 20} are free; make room first")


def _with_wal(databases: Sequence[Path]) -> Iterator[Path]:
    for path in databases:
        yield from (file for end in _ENDS if (file := path.with_name(path.name + end)).is_file())


def _take_database(source: Path, target: Path) -> None:
    """Copy a service's database into a backup by SQLite's online backup, WAL included.

    The service's rights are taken for all of it: SQLite makes and follows files beside the database. So ``target``,
    in a folder of root, is opened before, and needs no file beside it.
    """
    with closing(sqlite3.connect(target, isolation_level=None)) as written:
        written.execute("PRAGMA journal_mode = OFF")
        written.execute("PRAGMA locking_mode = EXCLUSIVE")
        written.execute("BEGIN EXCLUSIVE")
        written.execute("COMMIT")
        with rights.of_owner(source), _open(source) as read:
            read.backup(written)


def _put_database(copy: Path, target: Path, *, counts_on: bool) -> None:
    """Put a database back, whole or not at all, with its owner's rights; see ``put_back`` for ``counts_on``."""
    with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?immutable=1", uri=True)) as read:
        read.execute("SELECT count(*) FROM sqlite_master").fetchone()  # opened here: its folder is root's
        with rights.of_owner(target):
            queued, last = _audit(target) if counts_on and target.is_file() else ([], 0)
            with closing(sqlite3.connect(target, timeout=BUSY_S)) as written:
                read.backup(written)
            if last:
                _count_on(target, queued, last)


def _audit(ledger: Path) -> tuple[list[tuple[int, str]], int]:
    """Audit lines that wait for the log, and the number of the last that there ever was."""
    with _open(ledger) as db:
        last = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'audit'").fetchone()[0]
        return db.execute("SELECT seq, line FROM audit").fetchall(), int(last)


def _count_on(ledger: Path, queued: Sequence[tuple[int, str]], last: int) -> None:
    with _open(ledger) as db, db:
        db.executemany("INSERT OR IGNORE INTO audit (seq, line) VALUES (?, ?)", queued)
        # AUTOINCREMENT never gives a number again that a row had, also one that is gone
        if db.execute("INSERT OR IGNORE INTO audit (seq, line) VALUES (?, '')", (last,)).rowcount:
            db.execute("DELETE FROM audit WHERE seq = ?", (last,))


def _layout(path: Path) -> int:
    with _open(path) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def _open(path: Path) -> "closing[sqlite3.Connection]":
    return closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_S))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
