"""The index of the results: one SQLite file that answers what a tree of JSON files would answer slowly.

It is a cache. It says nothing that the results do not, losing it loses nothing, and one that is broken or of another
layout is made anew by ``open_index``. ``refresh`` brings one lot up to date by the stamps of its files: what has
changed is read again, what is gone is forgotten.

    files     one row for each review.json, reason.json and duplicate.json: its lot (the folder, relative to the
              results), name, stamp, what became of the image, and when. Kept revisions and broken files have a row
              too, so that they are not read again
    pages     of reviewed files
    defects   of reviewed files, with the model's verdict and a person's beside it
    missed    what people say that the line has missed
"""

import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.store import result_names
from semwatch.system.sqlite_file import Kind, SqliteFile

if TYPE_CHECKING:
    from semwatch.store.results import AnyRecord

log = logging.getLogger(__name__)

INDEX = "results.sqlite"
"""Its name in the state folder."""
BATCH = 500
"""Files of a transaction."""

Outcome = Literal["reviewed", "refused", "duplicate", "kept", "broken"]

_BY_VERDICT = "CREATE INDEX defects_by_verdict ON defects (lot, kind, label, file)"
"""A lot at a glance is answered from it alone."""
_KIND = Kind(
    noun="index of the results",
    application_id=0x53454D49,  # "SEMI"
    schema=(
        """CREATE TABLE files (
            id INTEGER PRIMARY KEY, lot TEXT NOT NULL, name TEXT NOT NULL, stamp TEXT NOT NULL, outcome TEXT NOT NULL,
            source TEXT NOT NULL, path TEXT NOT NULL, sha256 TEXT NOT NULL, utc TEXT NOT NULL, recipe TEXT,
            recipe_id TEXT, revision INTEGER, reason TEXT, original TEXT, image_score REAL, took_ms REAL,
            UNIQUE (lot, name))""",
        "CREATE INDEX files_by_content ON files (sha256)",
        """CREATE TABLE pages (
            file INTEGER NOT NULL, page INTEGER NOT NULL, verdict TEXT NOT NULL, image_score REAL,
            gate_threshold REAL NOT NULL, domain TEXT NOT NULL, quality TEXT NOT NULL,
            PRIMARY KEY (file, page)) WITHOUT ROWID""",
        """CREATE TABLE defects (
            id INTEGER PRIMARY KEY, file INTEGER NOT NULL, lot TEXT NOT NULL, page INTEGER NOT NULL,
            defect_id INTEGER NOT NULL, kind TEXT NOT NULL, label TEXT, confidence REAL NOT NULL, nearest TEXT,
            box TEXT NOT NULL, area_px INTEGER NOT NULL, is_judged INTEGER, human_label TEXT, human_by TEXT,
            human_utc TEXT)""",
        "CREATE INDEX defects_by_file ON defects (file)",
        "CREATE INDEX defects_by_lot ON defects (lot, id)",
        _BY_VERDICT,
        # With the confidence, so that what is filtered out by it is not looked up.
        "CREATE INDEX defects_by_label ON defects (label, id, confidence)",
        "CREATE INDEX defects_by_kind ON defects (kind, id, confidence)",
        "CREATE INDEX defects_judged ON defects (is_judged, id) WHERE is_judged IS NOT NULL",
        """CREATE TABLE missed (
            file INTEGER NOT NULL, lot TEXT NOT NULL, page INTEGER NOT NULL, label TEXT NOT NULL, box TEXT NOT NULL,
            by TEXT NOT NULL, utc TEXT NOT NULL)""",
        "CREATE INDEX missed_by_file ON missed (file)",
        "CREATE INDEX missed_by_lot ON missed (lot)",
    ),
    migrations={1: (_BY_VERDICT,)},
    made_by="the daemon makes it, and so does `semwatch reindex`",
    remedy="delete it and run `semwatch reindex`; it holds nothing that the results do not",
)


@dataclass(frozen=True, slots=True)
class IndexedDefect:
    """One defect, the model's verdict and a person's."""

    id: int
    """Grows with each defect that is taken in: pages of a listing go on after the last."""
    lot: str
    source: str
    path: str
    page: int
    defect_id: int
    kind: str
    label: str | None
    confidence: float
    nearest: str | None
    """Label of the nearest class."""
    box_xyxy: tuple[int, int, int, int]
    area_px: int
    is_judged: bool
    """A person has given a verdict."""
    human_label: str | None
    """Of the person; None: no defect, or no verdict."""
    human_by: str | None
    human_utc: str | None


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """One image of a lot."""

    outcome: Outcome
    lot: str
    path: str
    name: str
    """Of its JSON file."""
    sha256: str
    utc: str
    recipe_id: str | None
    reason: str | None
    """Of a refused one why."""
    original: str | None
    """Of a duplicate: path of the image with the same content."""
    image_score: float | None
    """Largest of its pages."""
    took_ms: float | None
    n_defects: int
    """Without those that the head called defect-free."""


class ResultIndex:
    """The open index; any thread may call. See ``open_index``.

    One that is ``read_only`` takes nothing in and says what it last knew.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._file = SqliteFile(path, _KIND, read_only=read_only)
        self._is_read_only = read_only

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # --- taking in ---------------------------------------------------------------------------------------------------

    def refresh(self, results_dir: Path, lot: str) -> int:
        """Bring a lot up to date with its folder; return how many files were read or forgotten.

        Raises:
            ServiceUnavailable: the disk cannot be read or written.
        """
        if self._is_read_only:
            return 0
        folder = results_dir / lot
        known = dict(self._file.rows("SELECT name, stamp FROM files WHERE lot = ?", (lot,)))
        present = _stamps(folder)
        gone = known.keys() - present.keys()
        changed = [name for name, stamp in present.items() if known.get(name) != stamp]
        for start in range(0, max(len(changed), 1), BATCH):
            some = changed[start : start + BATCH]
            self.put(lot, _read(folder, some, present), gone=gone if start == 0 else ())
        return len(gone) + len(changed)

    def put(self, lot: str, read: Sequence["tuple[str, str, AnyRecord | None]"], *, gone: Iterable[str] = ()) -> None:
        """Take in files of a lot, by name, stamp and content (None: it is broken), in one transaction."""
        gone = list(gone)
        if self._is_read_only or not (read or gone):
            return
        from semwatch.store import index_rows  # noqa: PLC0415 - see ``_read``

        with self._file.transaction() as db:
            for name in (*gone, *(name for name, _, _ in read)):
                _forget(db, lot, name)
            for name, stamp, record in read:
                index_rows.add(db, lot, name, stamp, record)

    def forget_all_but(self, lots: Iterable[str]) -> None:
        """Forget the lots whose folders are gone."""
        kept = set(lots)
        for lot in set(self.lots()) - kept:
            with self._file.transaction() as db:
                for (name,) in db.execute("SELECT name FROM files WHERE lot = ?", (lot,)).fetchall():
                    _forget(db, lot, name)

    # --- asked -------------------------------------------------------------------------------------------------------

    def lots(self) -> list[str]:
        """Names of all lots, which are their folders relative to the results."""
        sql = (  # a loose scan of the index, from lot to lot: their number counts, not that of the files
            "WITH RECURSIVE found (lot) AS (SELECT min(lot) FROM files UNION ALL"
            " SELECT (SELECT min(lot) FROM files WHERE lot > found.lot) FROM found WHERE found.lot IS NOT NULL)"
            " SELECT lot FROM found WHERE lot IS NOT NULL"
        )
        return [lot for (lot,) in self._file.rows(sql)]

    def files(self, *lots: str) -> list[IndexedFile]:
        """The images of lots by name; kept revisions are left out."""
        return self._files(lots, "outcome != 'kept'", "ORDER BY lot, name")

    def aside(self, *lots: str) -> list[IndexedFile]:
        """The images of lots without a result of their own, by name: refused, duplicate, broken."""
        return self._files(lots, "outcome IN ('refused', 'duplicate', 'broken')", "ORDER BY lot, name")

    def worst(self, *lots: str, limit: int) -> list[IndexedFile]:
        """The reviewed images of lots with most defects, and among these with the highest score."""
        where, values = _in_lots(lots)
        ids = self._file.rows(
            "SELECT files.id FROM (SELECT file, count(*) AS n FROM defects"
            f" WHERE kind != 'defect-free' {where} GROUP BY file) JOIN files ON files.id = file"
            " ORDER BY n DESC, image_score DESC, lot, name LIMIT ?",
            (*values, limit),
        )
        return [one for (id_,) in ids for one in self._files(None, f"id = {int(id_)}", "")]

    def _files(self, lots: Sequence[str] | None, condition: str, order: str) -> list[IndexedFile]:
        where, values = _in_lots(lots)
        rows = self._file.rows(
            "SELECT outcome, lot, path, name, sha256, utc, recipe_id, reason, original, image_score, took_ms,"
            " (SELECT count(*) FROM defects WHERE file = files.id AND kind != 'defect-free') FROM files"
            f" WHERE {condition} {where} {order}",
            values,
        )
        return [IndexedFile(*row) for row in rows]

    def outcomes(self, *lots: str) -> dict[str, int]:
        """Images of lots by what became of them."""
        where, values = _in_lots(lots)
        sql = f"SELECT outcome, count(*) FROM files WHERE outcome != 'kept' {where} GROUP BY outcome"
        return dict(self._file.rows(sql, values))

    def times(self, *lots: str) -> tuple[str | None, str | None, float | None]:
        """When something first and last happened in lots, and the mean milliseconds of a review."""
        where, values = _in_lots(lots)
        (row,) = self._file.rows(
            "SELECT min(nullif(utc, '')), max(nullif(utc, '')), avg(CASE outcome WHEN 'reviewed' THEN took_ms END)"
            f" FROM files WHERE outcome != 'kept' {where}",
            values,
        )
        return row[0], row[1], row[2]

    def recipes(self, *lots: str) -> dict[str, int]:
        """Reviewed images of lots by the id of their recipe."""
        where, values = _in_lots(lots)
        sql = (
            "SELECT recipe_id, count(*) FROM files WHERE outcome = 'reviewed' AND recipe_id IS NOT NULL"
            f" {where} GROUP BY recipe_id ORDER BY min(id)"
        )
        return dict(self._file.rows(sql, values))

    def page_verdicts(self, *lots: str) -> dict[str, int]:
        """Pages of lots by their verdict."""
        where, values = _in_lots(lots)
        sql = (
            "SELECT verdict, count(*) FROM files JOIN pages ON pages.file = files.id WHERE"
            f" outcome = 'reviewed' {where} GROUP BY verdict ORDER BY verdict"
        )
        return dict(self._file.rows(sql, values))

    def defect_counts(self, *lots: str) -> list[tuple[str, str | None, int]]:
        """Defects of lots by kind and label of the model, most frequent first."""
        where, values = _in_lots(lots)
        sql = (
            f"SELECT kind, label, count(*) FROM defects WHERE TRUE {where} GROUP BY kind, label"
            " ORDER BY count(*) DESC, kind, label"
        )
        return self._file.rows(sql, values)

    def overview(self) -> list[tuple[str, int, int, int, str]]:
        """Of each lot the images, those refused, the duplicates, and when something last happened; by lot."""
        return self._file.rows(
            "SELECT lot, count(*), sum(outcome = 'refused'), sum(outcome = 'duplicate'), max(utc) FROM files"
            " WHERE outcome != 'kept' GROUP BY lot ORDER BY lot"
        )

    def arrivals(self) -> list[tuple[str, int, int, int, str]]:
        """Of each lot the images, those refused, the duplicates, and when the last of them was new.

        An image counts from its first result on: judged again, or corrected, it is no newer.
        """
        return self._file.rows(
            "SELECT lot, sum(is_there), sum(refused), sum(duplicate), max(first) FROM ("
            " SELECT lot, min(utc) AS first, max(outcome != 'kept') AS is_there, max(outcome = 'refused') AS refused,"
            " max(outcome = 'duplicate') AS duplicate FROM files GROUP BY lot, path, sha256"
            ") GROUP BY lot HAVING sum(is_there) > 0 ORDER BY lot"
        )

    def defects(
        self,
        *,
        lot: str | None = None,
        kind: str | None = None,
        label: str | None = None,
        is_judged: bool | None = None,
        max_confidence: float | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> list[IndexedDefect]:
        """One page of the defects that meet every given condition, in the order in which they were taken in.

        Args:
            lot: of which they are.
            kind: of the model's verdict.
            label: of the model's verdict.
            is_judged: whether a person has given a verdict.
            max_confidence: of the model.
            after: ``id`` of the last of the page before.
            limit: of the page.
        """
        of_all = "+" if lot is not None else ""  # keeps SQLite to the index of the lot, which is the shorter way
        conditions: list[tuple[str, object]] = [
            ("d.lot = ?", lot),
            (f"{of_all}d.kind = ?", kind),
            (f"{of_all}d.label = ?", label),
            (f"{of_all}d.is_judged = ?", 1 if is_judged else None),
            ("d.confidence <= ?", max_confidence),
            ("d.id > ?", after),
        ]
        used = [(text, value) for text, value in conditions if value is not None]
        where = " AND ".join([*(text for text, _ in used), *(["d.is_judged IS NULL"] if is_judged is False else [])])
        rows = self._file.rows(
            "SELECT d.id, d.lot, f.source, f.path, d.page, d.defect_id, d.kind, d.label, d.confidence, d.nearest,"
            " d.box, d.area_px, d.is_judged, d.human_label, d.human_by, d.human_utc FROM defects AS d"
            f" JOIN files AS f ON f.id = d.file WHERE {where} ORDER BY d.id LIMIT ?",
            (*(value for _, value in used), limit),
        )
        return [_defect_of(row) for row in rows]

    def calls(self, lots: Sequence[str] | None = None) -> list[tuple[int, str, float, str | None]]:
        """What the head favoured of defects that a person has judged, surest first: image, class, confidence, truth.

        Named ones and non-decidable ones; the truth is the person's label, None for no defect.
        """
        where, values = _in_lots(lots)
        return self._file.rows(
            "SELECT file, CASE kind WHEN 'non-decidable' THEN nearest ELSE label END, confidence, human_label"
            f" FROM defects WHERE is_judged = 1 AND kind IN ('known', 'novel', 'non-decidable') {where}"
            " ORDER BY confidence DESC, id",
            values,
        )

    def judged(self, lots: Sequence[str] | None = None) -> list[tuple[str, str | None, str | None, int]]:
        """Defects that a person has judged: kind and label of the model, the person's label, how many."""
        where, values = _in_lots(lots)
        return self._file.rows(
            f"SELECT kind, label, human_label, count(*) FROM defects WHERE is_judged = 1 {where}"
            " GROUP BY kind, label, human_label",
            values,
        )

    def missed(self, lots: Sequence[str] | None = None) -> dict[str, int]:
        """What people say was missed, by label."""
        where, values = _in_lots(lots)
        return dict(self._file.rows(f"SELECT label, count(*) FROM missed WHERE TRUE {where} GROUP BY label", values))

    def n_labelled(self, labels: Sequence[str]) -> int:
        """How many defects the model gave one of these labels."""
        sql = "SELECT count(*) FROM defects WHERE label IN (SELECT value FROM json_each(?))"
        return int(self._file.rows(sql, (json.dumps(list(labels)),))[0][0])

    def counts(self) -> dict[str, int]:
        """How many lots, images and defects it holds."""
        n_files = self._file.rows("SELECT count(*) FROM files WHERE outcome != 'kept'")[0][0]
        n_defects = self._file.rows("SELECT count(*) FROM defects")[0][0]
        return {"lots": len(self.lots()), "images": n_files, "defects": n_defects}


def open_index(path: Path) -> ResultIndex:
    """Open the index to read and write; one that is broken, or of another layout, is made anew and empty.

    One that this user may not write is opened to read alone.

    Raises:
        ConfigError: something of somebody else lies there, or there is none and its folder cannot be written.
        ServiceUnavailable: the disk is full or failing.
    """
    if path.exists() and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        log.warning("%s may not be written by this user: what it says may be old", path)
        return ResultIndex(path, read_only=True)
    try:
        return ResultIndex(path)
    except ConfigError as error:
        if not _is_ours(path):
            raise
        log.warning("the index of the results is made anew: %s", error)
        for suffix in ("", "-wal", "-shm"):
            path.with_name(f"{path.name}{suffix}").unlink(missing_ok=True)
        return ResultIndex(path)


def all_lots(results_dir: Path) -> Iterator[str]:
    """Every folder of the results that may hold a lot, relative to them."""
    pending = [results_dir]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as listing:
                pending += [Path(entry.path) for entry in listing if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        if folder != results_dir:
            yield folder.relative_to(results_dir).as_posix()


def rebuild(index: ResultIndex, results_dir: Path) -> Iterator[tuple[str, int]]:
    """Bring every lot up to date and forget those that are gone; give each lot and what changed in it.

    Raises:
        ServiceUnavailable: the disk cannot be read or written.
    """
    lots = []
    for lot in all_lots(results_dir):
        lots.append(lot)
        yield lot, index.refresh(results_dir, lot)
    index.forget_all_but(lots)


def stamp_of(path: Path) -> str:
    """What tells one state of a file from another; empty where it is gone."""
    try:
        return _stamp(path.lstat())
    except OSError:
        return ""


def _stamps(folder: Path) -> dict[str, str]:
    """Stamps of what the table of a lot is made of, by name; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as listing:
            entries = {entry.name: entry for entry in listing if entry.name.endswith(result_names.IN_TABLES)}
        stamps = {}
        for name in result_names.names_among(list(entries)):
            with suppress(FileNotFoundError):  # meanwhile
                stamps[name] = _stamp(entries[name].stat(follow_symlinks=False))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ServiceUnavailable(f"cannot read {folder}: {error.strerror or error}; mend the disk") from error
    return stamps


def _read(folder: Path, names: Sequence[str], stamps: Mapping[str, str]) -> "list[tuple[str, str, AnyRecord | None]]":
    """Files of a lot by name, stamp and content; None: broken.

    What reads them is loaded here alone: a person who looks at a lot of which nothing has changed does not wait for it.
    """
    if not names:
        return []
    from semwatch.store import index_rows  # noqa: PLC0415

    return [(name, stamps[name], index_rows.read(folder / name)) for name in names]


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _is_ours(path: Path) -> bool:
    """Whether a file is an index, by the mark in its head (SQLite: application id in the bytes 68 to 71)."""
    try:
        with path.open("rb") as file:
            head = file.read(72)
    except OSError:
        return False
    return head[68:72] == _KIND.application_id.to_bytes(4, "big") or not head.startswith(b"SQLite format 3\0")


def _defect_of(row: Sequence[Any]) -> IndexedDefect:
    """A row of ``defects``: the box is JSON, and that nobody has judged is NULL."""
    values = [*row[:10], tuple(json.loads(row[10])), row[11], row[12] is not None, *row[13:]]
    return IndexedDefect(*values)


def _in_lots(lots: Sequence[str] | None) -> tuple[str, tuple[str, ...]]:
    return ("", ()) if lots is None else ("AND lot IN (SELECT value FROM json_each(?))", (json.dumps(list(lots)),))


def _forget(db: sqlite3.Connection, lot: str, name: str) -> None:
    row = db.execute("SELECT id FROM files WHERE lot = ? AND name = ?", (lot, name)).fetchone()
    if row is not None:
        db.execute("DELETE FROM files WHERE id = ?", row)
        for table in ("pages", "defects", "missed"):
            db.execute(f"DELETE FROM {table} WHERE file = ?", row)
