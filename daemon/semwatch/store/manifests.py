"""The ledger's tables of manifests: what the KLARFs of lots name, and what was written back. Since layout 5.

    manifests       id             never used twice
                    source, path   of the KLARF, relative to the drop folder; unique
                    sha256         of its content; ``kept_copy`` has it
                    about          JSON: lot, wafers, step, slot, as the file says them
                    n_defects, taken_utc, due_utc
                    done_utc       when every defect had a verdict or a reason; NULL: not yet
                    revision       the newest that was written, 0: none
                    digest         hash of what it said
                    counts         JSON: what it said, in numbers
                    n_changes      counts up with each file or result of it that changes
                    n_seen         what ``n_changes`` was when it was looked at last
    manifest_files  manifest, match_key
                    name           as the KLARF has it, relative to the drop folder
                    pages          JSON: what is to be judged of it, see ``NamedFile``
    lot_revisions   seq            never used twice
                    manifest, revision, utc, why, counts
                    files          JSON: what is to be written, see ``Delivery``
                    delivered_utc  when all of it lay in its place; NULL: not yet

An image belongs to a manifest by ``match_key``, which ``paths`` holds too, so neither needs to come first.
"""

import json
import sqlite3
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semwatch.system.sqlite_file import SqliteFile

SCHEMA = (
    """CREATE TABLE manifests (
        id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, path BLOB NOT NULL, sha256 TEXT NOT NULL,
        about TEXT NOT NULL, n_defects INTEGER NOT NULL, taken_utc TEXT NOT NULL, due_utc TEXT NOT NULL,
        done_utc TEXT, revision INTEGER NOT NULL DEFAULT 0, digest TEXT NOT NULL DEFAULT '',
        counts TEXT NOT NULL DEFAULT '{}', n_changes INTEGER NOT NULL DEFAULT 1, n_seen INTEGER NOT NULL DEFAULT 0,
        UNIQUE (source, path))""",
    """CREATE TABLE manifest_files (
        manifest INTEGER NOT NULL, match_key TEXT NOT NULL, name TEXT NOT NULL, pages TEXT NOT NULL,
        PRIMARY KEY (manifest, match_key)) WITHOUT ROWID""",
    "CREATE INDEX manifest_files_by_key ON manifest_files (match_key)",
    """CREATE TABLE lot_revisions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, manifest INTEGER NOT NULL, revision INTEGER NOT NULL, utc TEXT NOT NULL,
        why TEXT NOT NULL, counts TEXT NOT NULL, files TEXT NOT NULL, delivered_utc TEXT,
        UNIQUE (manifest, revision))""",
    "CREATE INDEX lot_revisions_to_deliver ON lot_revisions (seq) WHERE delivered_utc IS NULL",
    "ALTER TABLE paths ADD COLUMN match_key TEXT",
    "CREATE INDEX paths_by_match_key ON paths (source, match_key)",
)
KEPT = "klarf"
"""Folder in the state folder with the copies of KLARFs, and with what is on its way to its place."""


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file as KLARFs name it."""

    name: str
    """POSIX, relative to the drop folder, as the KLARF spells it."""
    pages: Mapping[int, int | None] = field(default_factory=dict)
    """Pages to judge, each with the page of its reference; None: it has none. Empty: the file is a reference, or is
    not looked at."""
    reference: str | None = None
    """The file that the references are pages of; None: this one."""

    @property
    def key(self) -> str:
        """What it is found by."""
        return match_key(self.name)

    @property
    def reference_key(self) -> str | None:
        """What the file of its references is found by."""
        return None if self.reference is None else match_key(self.reference)


@dataclass(frozen=True, slots=True)
class NewManifest:
    """A KLARF that was read, as the ledger takes it."""

    source: str
    path: str
    sha256: str
    about: Mapping[str, Any]
    n_defects: int
    files: Sequence[NamedFile]
    due_utc: str
    again: Sequence[str] = ()
    """Contents, by sha256, that are to be judged again: they were without what this KLARF says of them."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A KLARF that the ledger knows."""

    id: int
    source: str
    path: str
    sha256: str
    about: Mapping[str, Any]
    n_defects: int
    taken_utc: str
    due_utc: str
    done_utc: str | None
    revision: int
    digest: str
    counts: Mapping[str, int]
    n_changes: int
    n_seen: int


@dataclass(frozen=True, slots=True)
class FileState:
    """A file that a KLARF names, and what the ledger knows of it."""

    file: NamedFile
    path: str | None
    """Of the file as it arrived; None: it has not."""
    sha256: str | None
    state: str | None
    """Of the work: SEEN, CLAIMED, DONE or QUARANTINED."""
    reason: str | None
    original: str | None
    """Path that the content was judged under."""
    first_seen_utc: str | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One file of a revision: from its copy in the state folder to its place."""

    kept: str
    """Name in the folder ``KEPT``."""
    place: str
    """Absolute path."""
    root: str
    """Folder above it that must be there: below a share that is away, nothing is to be written."""


@dataclass(frozen=True, slots=True)
class LotRevision:
    """A lot was done, or said something else later: the record that others wait for.

    The last of ``files`` is the KLARF where one was written; the first is the lot's JSON.
    """

    seq: int
    manifest: int
    source: str
    path: str
    """Of the KLARF in the drop folder."""
    about: Mapping[str, Any]
    revision: int
    utc: str
    why: str
    counts: Mapping[str, int]
    files: tuple[Delivery, ...]
    delivered_utc: str | None


class Manifests:
    """The manifests; part of the open ledger. Every method may be called from any thread and is one transaction."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    @property
    def is_there(self) -> bool:
        """False in a ledger that the daemon has not brought up to date yet."""
        return bool(self._file.rows("SELECT 1 FROM sqlite_master WHERE name = 'manifests'"))

    # --- what images ask ---------------------------------------------------------------------------------------------

    def naming(self, source: str, path: str) -> list[NamedFile]:
        """What the KLARFs of a source say of a file, the newest KLARF first."""
        rows = self._file.rows(
            "SELECT name, pages FROM manifest_files JOIN manifests ON id = manifest"
            " WHERE match_key = ? AND source = ? ORDER BY taken_utc DESC, id DESC",
            (match_key(path), source),
        )
        return [_named(*row) for row in rows]

    def about_naming(self, source: str, path: str) -> Mapping[str, Any]:
        """What the newest KLARF that names a file says of its lot and its wafers; nothing where none does."""
        rows = self._file.rows(
            "SELECT about FROM manifest_files JOIN manifests ON id = manifest"
            " WHERE match_key = ? AND source = ? ORDER BY taken_utc DESC, id DESC LIMIT 1",
            (match_key(path), source),
        )
        return json.loads(rows[0][0]) if rows else {}

    def arrived(self, source: str, name: str) -> str | None:
        """Path of a whole file that a KLARF calls so; None where none has been seen. The same spelling goes first."""
        rows = self._file.rows(
            "SELECT paths.path FROM paths JOIN work USING (source, sha256)"
            " WHERE paths.source = ? AND match_key = ? AND state != 'QUARANTINED'",
            (source, match_key(name)),
        )
        return _best([text(path) for (path,) in rows], name)

    def reviewed(self, source: str, name: str) -> list[tuple[str, str]]:
        """Files that a KLARF calls so and that were judged already: path and sha256."""
        rows = self._file.rows(
            "SELECT paths.path, sha256 FROM paths JOIN work USING (source, sha256)"
            " WHERE paths.source = ? AND match_key = ? AND state = 'DONE' AND reason IS NULL",
            (source, match_key(name)),
        )
        return [(text(path), sha256) for path, sha256 in rows]

    # --- what the lot asks -------------------------------------------------------------------------------------------

    def of(self, source: str, path: str) -> Manifest | None:
        """The manifest of a KLARF; None where it is none."""
        found = self._manifests("WHERE source = ? AND path = ?", (source, blob(path)))
        return found[0] if found else None

    def all_of(self, source: str) -> list[Manifest]:
        """The manifests of a source, by path."""
        return self._manifests("WHERE source = ? ORDER BY path", (source,))

    def to_look_at(self, now_utc: str) -> list[Manifest]:
        """Manifests of which something has changed, or that are due, the oldest first."""
        return self._manifests(
            "WHERE n_changes != n_seen OR (done_utc IS NULL AND due_utc <= ?) ORDER BY taken_utc, id", (now_utc,)
        )

    def files(self, manifest: Manifest) -> list[FileState]:
        """The files that a KLARF names, with what became of each."""
        rows = self._file.rows(
            "SELECT f.name, f.pages, p.path, p.sha256, w.state, w.reason, w.path, w.first_seen_utc"
            " FROM manifest_files AS f LEFT JOIN paths AS p ON p.source = ? AND p.match_key = f.match_key"
            " LEFT JOIN work AS w ON w.source = p.source AND w.sha256 = p.sha256 WHERE f.manifest = ?",
            (manifest.source, manifest.id),
        )
        found: dict[str, list[FileState]] = {}
        for name, pages, path, sha256, state, reason, original, first_utc in rows:
            whence = None if path is None else text(path), sha256, state, reason
            judged_as = None if original is None else text(original)
            found.setdefault(name, []).append(FileState(_named(name, pages), *whence, judged_as, first_utc))
        best = {name: _best([one.path for one in states if one.path], name) for name, states in found.items()}
        return [next(one for one in states if one.path == best[name]) for name, states in found.items()]

    def seen(self, manifest: Manifest) -> None:
        """Note that a manifest was looked at as it was when it was read."""
        with self._file.transaction() as db:
            db.execute("UPDATE manifests SET n_seen = ? WHERE id = ?", (manifest.n_changes, manifest.id))

    def revise(
        self, db: sqlite3.Connection, manifest: Manifest, revision: int, digest: str, counts: Mapping[str, int],
        why: str, files: Sequence[Delivery], now_utc: str,
    ) -> bool:  # fmt: skip
        """Within a transaction: a lot is done, or says something else. False where its KLARF was replaced meanwhile."""
        changed = db.execute(
            "UPDATE manifests SET done_utc = coalesce(done_utc, ?), revision = ?, digest = ?, counts = ?,"
            " n_seen = ? WHERE id = ? AND sha256 = ? AND revision = ?",
            (
                now_utc,
                revision,
                digest,
                json.dumps(counts),
                manifest.n_changes,
                manifest.id,
                manifest.sha256,
                manifest.revision,
            ),
        )
        if changed.rowcount != 1:
            return False
        db.execute(
            "INSERT INTO lot_revisions (manifest, revision, utc, why, counts, files) VALUES (?, ?, ?, ?, ?, ?)",
            (
                manifest.id, revision, now_utc, why, json.dumps(counts),
                json.dumps([[one.kept, one.place, one.root] for one in files]),
            ),
        )  # fmt: skip
        return True

    # --- what others wait for ----------------------------------------------------------------------------------------

    def to_deliver(self) -> list[LotRevision]:
        """Revisions that are not in their place yet, oldest first."""
        return self._revisions("WHERE delivered_utc IS NULL ORDER BY seq")

    def delivered(self, seq: int, now_utc: str) -> None:
        """Note that a revision lies in its place."""
        with self._file.transaction() as db:
            db.execute("UPDATE lot_revisions SET delivered_utc = ? WHERE seq = ?", (now_utc, seq))

    def done_after(self, seq: int, limit: int = 100) -> list[LotRevision]:
        """Revisions of lots that lie in their place, behind the one of that number, in the order of their numbers.

        A revision is left out while one before it is still on its way, so whoever keeps the last number misses none.
        """
        return self._revisions(
            "WHERE seq > ? AND seq < (SELECT coalesce(min(seq), 9e18) FROM lot_revisions WHERE delivered_utc IS NULL)"
            " ORDER BY seq LIMIT ?",
            (seq, limit),
        )

    def revisions(self, manifest: int) -> list[LotRevision]:
        """All revisions of one manifest, oldest first."""
        return self._revisions("WHERE manifest = ? ORDER BY seq", (manifest,))

    def forget(self, done_before_utc: str) -> list[str]:
        """Forget manifests that were done before that moment and whose KLARF no path leads to any more.

        Returns:
            The sha256 of those, whose kept copies nobody needs any more.
        """
        with self._file.transaction() as db:
            rows = db.execute(
                "SELECT id, sha256 FROM manifests AS m WHERE done_utc < ? AND NOT EXISTS"
                " (SELECT 1 FROM paths WHERE paths.source = m.source AND paths.path = m.path) AND NOT EXISTS"
                " (SELECT 1 FROM lot_revisions WHERE manifest = m.id AND delivered_utc IS NULL)",
                (done_before_utc,),
            ).fetchall()
            for id_, _ in rows:
                for table, column in (
                    ("manifest_files", "manifest"),
                    ("lot_revisions", "manifest"),
                    ("manifests", "id"),
                ):
                    db.execute(f"DELETE FROM {table} WHERE {column} = ?", (id_,))
            kept = {sha256 for (sha256,) in db.execute("SELECT sha256 FROM manifests")}
        return [sha256 for _, sha256 in rows if sha256 not in kept]

    def _manifests(self, where: str, values: Sequence[object]) -> list[Manifest]:
        rows = self._file.rows(
            "SELECT id, source, path, sha256, about, n_defects, taken_utc, due_utc, done_utc, revision, digest, counts,"
            f" n_changes, n_seen FROM manifests {where}",
            values,
        )
        return [
            Manifest(
                id_, source, text(path), sha256, json.loads(about), n, taken, due, done, revision, digest,
                json.loads(counts), n_changes, n_seen,
            )
            for id_, source, path, sha256, about, n, taken, due, done, revision, digest, counts, n_changes, n_seen
            in rows
        ]  # fmt: skip

    def _revisions(self, where: str, values: Sequence[object] = ()) -> list[LotRevision]:
        rows = self._file.rows(
            "SELECT * FROM (SELECT seq, manifest, source, path, about, lot_revisions.revision, utc, why,"
            " lot_revisions.counts, files, delivered_utc FROM lot_revisions JOIN manifests ON id = manifest)"
            f" {where}",
            values,
        )
        return [
            LotRevision(
                seq, manifest, source, text(path), json.loads(about), revision, utc, why, json.loads(counts),
                tuple(Delivery(*one) for one in json.loads(files)), delivered_utc,
            )
            for seq, manifest, source, path, about, revision, utc, why, counts, files, delivered_utc in rows
        ]  # fmt: skip


# --- within a transaction of the ledger ------------------------------------------------------------------------------


def take(db: sqlite3.Connection, new: NewManifest | None, now_utc: str, again_because: str) -> None:
    """Take a KLARF, in place of one that lay under its name before; None: nothing."""
    if new is None:
        return
    db.execute(
        "INSERT INTO manifests (source, path, sha256, about, n_defects, taken_utc, due_utc)"
        " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (source, path) DO UPDATE SET sha256 = excluded.sha256,"
        " about = excluded.about, n_defects = excluded.n_defects, taken_utc = excluded.taken_utc,"
        " due_utc = excluded.due_utc, done_utc = NULL, n_changes = n_changes + 1",
        (new.source, blob(new.path), new.sha256, json.dumps(new.about), new.n_defects, now_utc, new.due_utc),
    )
    (id_,) = db.execute(
        "SELECT id FROM manifests WHERE source = ? AND path = ?", (new.source, blob(new.path))
    ).fetchone()
    db.execute("DELETE FROM manifest_files WHERE manifest = ?", (id_,))
    db.executemany(
        "INSERT INTO manifest_files VALUES (?, ?, ?, ?)",
        [(id_, file.key, file.name, _pages_text(file)) for file in new.files],
    )
    db.executemany(  # taken for a reference before: to be hashed, and judged, as an image now
        "UPDATE paths SET size = -1 WHERE source = ? AND match_key = ? AND EXISTS (SELECT 1 FROM work WHERE"
        " work.source = paths.source AND work.sha256 = paths.sha256 AND state = 'DONE' AND reason IS NOT NULL)",
        [(new.source, file.key) for file in new.files if file.pages],
    )
    db.executemany(
        "UPDATE work SET state = 'SEEN', attempts = 0, deaths = 0, reason = ?, finished_utc = NULL"
        " WHERE source = ? AND sha256 = ? AND state = 'DONE' AND reason IS NULL",
        [(again_because, new.source, sha256) for sha256 in new.again],
    )


def touch(db: sqlite3.Connection, source: str, sha256: str) -> None:
    """Let manifests that name a file of this content be looked at."""
    db.execute(
        "UPDATE manifests SET n_changes = n_changes + 1 WHERE source = ? AND id IN (SELECT f.manifest FROM paths AS p"
        " JOIN manifest_files AS f USING (match_key) WHERE p.source = ? AND p.sha256 = ?)",
        (source, source, sha256),
    )


# --- names -----------------------------------------------------------------------------------------------------------


def match_key(path: str) -> str:
    r"""What a file and a KLARF that names it have in common, whatever the case; ``.i01`` and ``.tiff`` are ``.tif``.

    >>> match_key("Lot7/W1.I01"), match_key("lot7/w1.tif")
    ('lot7/w1.tif', 'lot7/w1.tif')
    """
    printable = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    key = unicodedata.normalize("NFC", printable).casefold()
    stem, dot, suffix = key.rpartition(".")
    return f"{stem}.tif" if dot and suffix in ("i01", "tiff") else key


def kept_copy(state_dir: Path, sha256: str) -> Path:
    """Where the content of a KLARF is kept."""
    return state_dir / KEPT / f"{sha256}.klarf"


def blob(path: str) -> bytes:
    """A path as the ledger holds it."""
    return path.encode("utf-8", "surrogateescape")


def text(path: bytes) -> str:
    """A path as it comes back."""
    return path.decode("utf-8", "surrogateescape")


def _best(paths: Sequence[str], name: str) -> str | None:
    """Of several files that fit a name, the one that is spelled like it, else the first."""
    return name if name in paths else min(paths, default=None)


def _pages_text(file: NamedFile) -> str:
    return json.dumps([[[page, of] for page, of in file.pages.items()], file.reference])


def _named(name: str, pages: str) -> NamedFile:
    of, reference = json.loads(pages)
    return NamedFile(name, dict(of), reference)
