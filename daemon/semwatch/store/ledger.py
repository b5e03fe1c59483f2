"""The ledger: one SQLite file that alone says what is done. The drop folder belongs to the tool and is only read.

Whether a file is settled is never stored, it follows: its path resolves to a content, and that content's work is
finished. So a duplicate of something still in flight becomes settled with it, and comes back if the original fails.

Its tables are in ``ledger_layout``. ``synchronous=FULL``: what ``finish`` returned from survives a power cut. WAL needs
a local disk, not a network share.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, Self

from semwatch.store import lot_rows, manifests, unknown_features
from semwatch.store.ledger_layout import KIND, lock_out_others
from semwatch.store.lot_rows import LotRow, LotRows
from semwatch.store.manifests import Delivery, Manifest, Manifests, NewManifest, match_key
from semwatch.store.manifests import blob as _blob
from semwatch.store.manifests import text as _text
from semwatch.store.unknown_features import UnknownFeatures
from semwatch.system.files import Stamp
from semwatch.system.sqlite_file import SqliteFile

log = logging.getLogger(__name__)

LEDGER = "ledger.sqlite"
"""Its name in the state folder."""

State = Literal["SEEN", "CLAIMED", "DONE", "QUARANTINED"]
Outcome = Literal["new", "retry", "settled", "duplicate", "in-flight"]

_FILES_A_QUERY = 500
_REPLACED = "replaced before it was reviewed"
"""Reason of work that nobody can do any more; should its content come again, it is done."""
_AGAIN = "to be judged again"
"""Reason of work that is done and waits for another review."""


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """One message that must reach a stream at least once."""

    stream: str
    id: str
    """Unique for ever; the consumer drops an id that it has seen."""
    payload: bytes


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work as the ledger knows it."""

    source: str
    sha256: str
    path: str
    state: State
    attempts: int
    reason: str | None
    first_seen_utc: str
    finished_utc: str | None
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """One file as it was when it was last hashed."""

    path: str
    stamp: Stamp
    seen_utc: str


@dataclass(frozen=True, slots=True)
class Claim:
    """The ledger's answer to one file."""

    outcome: Outcome
    """``new`` and ``retry``: the work is yours, and one of finish, quarantine and give_back must follow.
    ``settled``: this file is finished already. ``duplicate``: its content was finished under the path ``original``.
    ``in-flight``: another worker has the content now; release the file, it comes again."""
    source: str
    sha256: str
    path: str
    attempts: int
    """Tries that failed before this one. At the caller's limit: quarantine, do not try."""
    original: str
    """Path of the file that this content is, or was, reviewed from."""
    deaths: int = 0
    """Tries that died with the process: such work is tried alone, for it must not cost its neighbours an attempt."""

    @property
    def is_mine(self) -> bool:
        """The caller has to do the work."""
        return self.outcome in ("new", "retry")


class Ledger:
    """The open ledger. Every method may be called from any thread and is one transaction.

    ``read_only`` looks at a ledger that a daemon may be writing; ``exclusive=False`` writes beside a daemon, for
    ``note`` and an operator's ``requeue``, not for work. Otherwise the ledger is locked against a second daemon, and
    work that a dead process had in flight goes back to SEEN with one attempt more.

    Raises: ConfigError when the file is no ledger, is broken, too new, or used by another daemon;
    ServiceUnavailable from every method while the disk is full or failing.
    """

    def __init__(self, path: Path, *, read_only: bool = False, exclusive: bool = True, busy_s: float = 10.0) -> None:
        self.path = path
        self._lock_fd = lock_out_others(path) if exclusive and not read_only else None
        try:
            # Only who has the ledger alone may change its layout.
            self._file = SqliteFile(path, KIND, read_only=read_only, migrates=exclusive, busy_s=busy_s)
        except BaseException:
            self._unlock()
            raise
        self.lot_rows = LotRows(self._file)
        self.manifests = Manifests(self._file)
        self._data_version = 0
        self._set_columns()
        try:
            if self._lock_fd is not None:
                self._recover()
        except BaseException:
            self.close()
            raise

    def _set_columns(self) -> None:
        """A reader takes a ledger that the daemon has not brought up to date yet as it is."""
        is_older = not self._file.rows("SELECT 1 FROM pragma_table_info('work') WHERE name = 'deaths'")
        self._deaths = "0" if is_older else "deaths"
        self._ctime_ns, self._inode = ("NULL", "NULL") if is_older else ("paths.ctime_ns", "paths.inode")
        self._work = f"source, sha256, path, state, attempts, reason, first_seen_utc, finished_utc, {self._deaths}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, then let the next daemon in."""
        self._file.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = None

    # --- the life of one piece of work -----------------------------------------------------------------------------

    def settled(self, source: str, files: Sequence[tuple[str, Stamp]]) -> set[str]:
        """Say which of these files were finished, done or in quarantine, exactly as they are.

        Args:
            source: of all of them.
            files: path and stamp of each.
        """
        found: set[str] = set()
        for start in range(0, len(files), _FILES_A_QUERY):
            asked = files[start : start + _FILES_A_QUERY]
            rows = self._file.rows(
                "WITH asked (path, size, mtime_ns, ctime_ns, inode) AS"
                f" (VALUES {', '.join(['(?, ?, ?, ?, ?)'] * len(asked))})"
                # CROSS JOIN keeps the order: each file that was asked for is looked up by its key
                " SELECT asked.path FROM asked CROSS JOIN paths USING (path, size, mtime_ns)"
                " JOIN work USING (source, sha256) WHERE source = ? AND state IN ('DONE', 'QUARANTINED')"
                f" AND coalesce(asked.ctime_ns = {self._ctime_ns}, TRUE)"
                f" AND coalesce(asked.inode = {self._inode}, TRUE)",
                [*chain.from_iterable((_blob(path), *stamp) for path, stamp in asked), source],
            )
            found.update(_text(path) for (path,) in rows)
        return found

    def claim(
        self,
        source: str,
        path: str,
        *,
        sha256: str,
        stamp: Stamp,
        now_utc: str,
        look_again_utc: str | None = None,
    ) -> Claim:
        """Ask for the work on one hashed file. A path must be in one worker's hands at a time, as ``Incoming`` does.

        Args:
            source: of the file.
            path: of the file.
            sha256: of its content, or what stands for it.
            stamp: the file as it was when it was read.
            now_utc: the time.
            look_again_utc: when its content is to be compared once more; None: never.
        """
        with self._file.transaction() as db:
            row = db.execute(
                "SELECT CASE reason WHEN ? THEN 'SEEN' ELSE state END, attempts, deaths, path, reason FROM work"
                " WHERE source = ? AND sha256 = ?",
                (_REPLACED, source, sha256),
            ).fetchone()
            state, attempts, deaths, original, reason = row if row else (None, 0, 0, _blob(path), None)
            is_same_path = original == _blob(path)
            outcome = _outcome(state, is_same_path=is_same_path)
            if state == "SEEN" and reason == _AGAIN and not is_same_path:
                outcome = "in-flight"  # its result is beside the original's name, so the original is to come first
            if outcome in ("new", "retry"):
                original = _blob(path)
                db.execute(
                    "INSERT INTO work (source, sha256, path, state, first_seen_utc) VALUES (?, ?, ?, 'CLAIMED', ?)"
                    " ON CONFLICT DO UPDATE SET state = 'CLAIMED', path = excluded.path, reason = NULL,"
                    " finished_utc = NULL",
                    (source, sha256, original, now_utc),
                )
            _resolve(db, source, path, sha256, stamp, now_utc, look_again_utc)
            if outcome in ("duplicate", "in-flight"):
                db.execute("INSERT OR IGNORE INTO duplicates VALUES (?, ?)", (source, _blob(path)))
            else:
                db.execute("DELETE FROM duplicates WHERE source = ? AND path = ?", (source, _blob(path)))
            if outcome in ("settled", "duplicate"):
                manifests.touch(db, source, sha256)
        return Claim(outcome, source, sha256, path, attempts, _text(original), deaths)

    def finish(
        self,
        claim: Claim,
        *,
        outbox: Sequence[OutboxItem],
        audit: Mapping[str, object],
        now_utc: str,
        unknowns: Sequence[UnknownFeatures] = (),
        row: LotRow | None = None,
        reason: str | None = None,
        manifest: NewManifest | None = None,
    ) -> None:
        """Make the work DONE, with messages, audit line, features of unknowns and the lot's row, all or nothing.

        A ``reason`` says why it was done without a review: a reference is none of its own, nor is a KLARF, which comes
        with its ``manifest``.
        """
        with self._file.transaction() as db:
            kept = None if reason is None else _clean(reason)
            _leave(db, claim, "state = 'DONE', reason = ?, finished_utc = ?", kept, now_utc)
            manifests.take(db, manifest, now_utc, _AGAIN)
            manifests.touch(db, claim.source, claim.sha256)
            _add_messages(db, outbox)
            unknown_features.add(db, unknowns)
            lot_rows.add(db, row)
            _append_audit(db, audit)

    def quarantine(
        self,
        work: Claim | Work,
        reason: str,
        *,
        audit: Mapping[str, object],
        now_utc: str,
        row: LotRow | None = None,
        outbox: Sequence[OutboxItem] = (),
    ) -> None:
        """Put claimed or waiting work aside for good: reason, audit line, lot's row and messages, all or nothing."""
        with self._file.transaction() as db:
            _leave(db, work, "state = 'QUARANTINED', reason = ?, finished_utc = ?", _clean(reason), now_utc)
            manifests.touch(db, work.source, work.sha256)
            lot_rows.add(db, row)
            _add_messages(db, outbox)
            _append_audit(db, audit)

    def duplicates(self, limit: int) -> list[Work]:
        """Return duplicates that are not noted yet: the work that they are of, under their own path.

        ``reason`` is the path of the original, ``state`` that of its work; work in flight is left out.
        """
        rows = self._file.rows(
            "SELECT d.source, p.sha256, d.path, w.state, w.attempts, w.path, w.first_seen_utc, w.finished_utc, 0"
            " FROM duplicates AS d JOIN paths AS p USING (source, path)"
            " JOIN work AS w ON w.source = d.source AND w.sha256 = p.sha256"
            " WHERE w.path != d.path AND w.state IN ('DONE', 'QUARANTINED') LIMIT ?",
            (limit,),
        )
        return [
            Work(source, sha256, _text(path), state, attempts, _text(original), *rest)
            for source, sha256, path, state, attempts, original, *rest in rows
        ]

    def duplicate_noted(
        self, source: str, path: str, *, row: LotRow | None = None, outbox: Sequence[OutboxItem] = ()
    ) -> None:
        """Note that a duplicate stands beside the results, with its lot's row and messages, all or nothing."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM duplicates WHERE source = ? AND path = ?", (source, _blob(path)))
            lot_rows.add(db, row)
            _add_messages(db, outbox)

    def give_back(self, claim: Claim, reason: str, *, is_attempt: bool = False) -> None:
        """Let the work wait again: a service is away, or with ``is_attempt`` the work itself failed, which counts."""
        with self._file.transaction() as db:
            _leave(db, claim, f"state = 'SEEN', reason = ?, attempts = attempts + {is_attempt:d}", _clean(reason))

    def progress(self, claim: Claim, *, outbox: Sequence[OutboxItem], unknowns: Sequence[UnknownFeatures] = ()) -> None:
        """Note that a part of claimed work is done, with its messages and features; tries that failed count no more.

        After a crash a part may be done once more: its messages have the same ids, and consumers drop them.
        """
        with self._file.transaction() as db:
            _leave(db, claim, "attempts = 0, deaths = 0")
            _add_messages(db, outbox)
            unknown_features.add(db, unknowns)

    def requeue(self, source: str, sha256: str, *, audit: Mapping[str, object]) -> bool:
        """Let quarantined work wait again with no attempts counted; False where nothing such is in quarantine.

        The audit line is taken in the same transaction, and only where there was something.
        """
        with self._file.transaction() as db:
            changed = db.execute(
                "UPDATE work SET state = 'SEEN', attempts = 0, deaths = 0, reason = 'requeued', finished_utc = NULL"
                " WHERE source = ? AND sha256 = ? AND state = 'QUARANTINED'",
                (source, sha256),
            )
            if changed.rowcount == 1:
                _append_audit(db, audit)
        return changed.rowcount == 1

    def done_below(self, source: str, folder: str) -> list[Work]:
        """Return the reviewed work whose file lay in a folder, or below it, by path; "" for the whole drop folder."""
        low, high = (_blob(f"{folder}/"), _blob(f"{folder}0")) if folder else (b"", None)  # "0" comes after "/"
        rows = self._file.rows(
            f"SELECT {self._work} FROM work WHERE source = ? AND state = 'DONE' AND reason IS NULL AND path >= ?"
            " AND (? IS NULL OR path < ?) ORDER BY path",
            (source, low, high, high),
        )
        return [Work(source, sha256, _text(path), *rest) for source, sha256, path, *rest in rows]

    def review_again(self, works: Sequence[Work], *, audit: Mapping[str, object]) -> int:
        """Let reviewed work wait to be judged once more, with one audit line; return how much still was reviewed."""
        with self._file.transaction() as db:
            changed = db.executemany(
                "UPDATE work SET state = 'SEEN', attempts = 0, deaths = 0, reason = ?, finished_utc = NULL"
                " WHERE source = ? AND sha256 = ? AND state = 'DONE' AND reason IS NULL",
                [(_AGAIN, work.source, work.sha256) for work in works],
            )
            if changed.rowcount > 0:
                _append_audit(db, audit)
        return max(changed.rowcount, 0)

    # --- outbox and audit ------------------------------------------------------------------------------------------

    def note(
        self,
        *,
        audit: Mapping[str, object] | None,
        outbox: Sequence[OutboxItem] = (),
        once: str | None = None,
        once_utc: str | None = None,
        row: LotRow | None = None,
        changed: tuple[str, str] | None = None,
        manifest: NewManifest | None = None,
        now_utc: str = "",
    ) -> bool:
        """Take an audit line, where there is one, and messages that belong to no work in flight, all or nothing.

        ``changed``, source and sha256, names a result that says something else than before. A ``manifest`` is one that
        was taken before, and lies under its name again, at ``now_utc``.

        Messages whose id waits in the outbox already are left out. With ``once``, a name unique for ever, a second call
        under that name takes nothing and returns False: so a note can be repeated after a crash. With ``once_utc``, the
        time now, the name may be forgotten by ``forget_notes``.
        """
        with self._file.transaction() as db:
            if once is not None:
                taken = db.execute("INSERT OR IGNORE INTO noted (id, utc) VALUES (?, ?)", (once, once_utc))
                if taken.rowcount == 0:
                    return False
            _add_messages(db, outbox)
            lot_rows.add(db, row)
            manifests.take(db, manifest, now_utc, _AGAIN)
            if changed is not None:
                manifests.touch(db, *changed)
            if audit is not None:
                _append_audit(db, audit)
        return True

    def revise_lot(
        self,
        manifest: Manifest,
        revision: int,
        digest: str,
        counts: Mapping[str, int],
        *,
        why: str,
        files: Sequence[Delivery],
        audit: Mapping[str, object],
        now_utc: str,
    ) -> bool:
        """Note that a lot is done, or says something else than before, with its audit line, all or nothing.

        Args:
            manifest: of the lot, as it was looked at.
            revision: higher than the one before.
            digest: hash of what the lot says.
            counts: the same in numbers.
            why: for people.
            files: to be put in their places; their copies are kept already.
            audit: line of the log.
            now_utc: the time.

        Returns:
            False where the KLARF was replaced, or the lot revised, meanwhile: nothing was noted.
        """
        with self._file.transaction() as db:
            if not self.manifests.revise(db, manifest, revision, digest, counts, why, files, now_utc):
                return False
            _append_audit(db, audit)
        return True

    def unpublished(self, limit: int) -> list[tuple[int, OutboxItem]]:
        """Return the oldest messages that wait, with the sequence number to name in ``mark_published``."""
        rows = self._file.rows("SELECT seq, stream, id, payload FROM outbox ORDER BY seq LIMIT ?", (limit,))
        return [(seq, OutboxItem(stream, id_, payload)) for seq, stream, id_, payload in rows]

    def mark_published(self, seqs: Sequence[int]) -> None:
        """Forget messages that have reached their stream."""
        with self._file.transaction() as db:
            db.executemany("DELETE FROM outbox WHERE seq = ?", [(seq,) for seq in seqs])

    def n_unpublished(self) -> int:
        """Count the messages that wait."""
        return int(self._file.rows("SELECT count(*) FROM outbox")[0][0])

    def audit_after(self, seq: int, limit: int) -> list[tuple[int, str]]:
        """Return audit lines, JSON text, with a sequence number above ``seq``, oldest first."""
        return self._file.rows("SELECT seq, line FROM audit WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))

    def last_audit_seq(self) -> int:
        """Return the number of the newest audit line ever queued, 0 where there was none."""
        rows = self._file.rows("SELECT seq FROM sqlite_sequence WHERE name = 'audit'")
        return int(rows[0][0]) if rows else 0

    def forget_audit(self, up_to_seq: int) -> None:
        """Forget audit lines, ``up_to_seq`` included, that are safe in the audit log."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM audit WHERE seq <= ?", (up_to_seq,))

    # --- unknowns that a later head judges again ---------------------------------------------------------------------

    def add_unknowns(self, found: Sequence[UnknownFeatures], *, once: str) -> bool:
        """Take features that belong to no work in flight; under the name ``once``, only the first call takes any."""
        with self._file.transaction() as db:
            if db.execute("INSERT OR IGNORE INTO noted (id) VALUES (?)", (once,)).rowcount == 0:
                return False
            unknown_features.add(db, found)
        return True

    def was_noted(self, once: str) -> bool:
        """Say whether something was taken under a name that is taken once."""
        return bool(self._file.rows("SELECT 1 FROM noted WHERE id = ?", (once,)))

    def unknowns_since(self, utc: str, *, after: UnknownFeatures | None = None, limit: int) -> list[UnknownFeatures]:
        """Return the next page of the unknowns created at or after ``utc``; [] behind the last.

        Ordered by source, path, content, page and defect. An image is never cut in two: all of its unknowns follow
        where ``limit`` would end among them.
        """
        return unknown_features.since(self._file, utc, after, limit)

    def places_of(self, ids: Sequence[str]) -> dict[str, tuple[str, str, int, int]]:
        """Source, path as in the record, page and defect of unknowns by record id; of those that are kept."""
        return unknown_features.places(self._file, ids)

    def forget_unknowns(self, before_utc: str) -> int:
        """Delete the unknowns created before that moment; return how many."""
        with self._file.transaction() as db:
            return db.execute("DELETE FROM unknowns WHERE created_utc < ?", (before_utc,)).rowcount

    # --- what to show ----------------------------------------------------------------------------------------------

    def counts(self) -> dict[State, int]:
        """Count the work by state; every state is there."""
        states: dict[State, int] = {"SEEN": 0, "CLAIMED": 0, "DONE": 0, "QUARANTINED": 0}
        return states | dict(self._file.rows("SELECT state, count(*) FROM work GROUP BY state"))

    def reviews_since(self, utc: str) -> tuple[int, str | None]:
        """Count the reviews that were finished at or after ``utc``, and say when the first of them was."""
        rows = self._file.rows(
            "SELECT count(*), min(finished_utc) FROM work WHERE finished_utc >= ? AND state = 'DONE'"
            " AND reason IS NULL",  # else it was done without a review, as a reference is
            (utc,),
        )
        return int(rows[0][0]), rows[0][1]

    def listing(self, state: State, limit: int = 100) -> list[Work]:
        """Return work in one state, first seen first."""
        rows = self._file.rows(
            f"SELECT {self._work} FROM work WHERE state = ? ORDER BY first_seen_utc LIMIT ?", (state, limit)
        )
        return [Work(source, sha256, _text(path), *rest) for source, sha256, path, *rest in rows]

    def suspects(self, limit: int = 1000) -> list[Work]:
        """Return waiting work that the process has died on, first seen first."""
        rows = self._file.rows(
            f"SELECT {self._work} FROM work WHERE deaths > 0 AND state = 'SEEN' ORDER BY first_seen_utc LIMIT ?",
            (limit,),
        )
        return [Work(source, sha256, _text(path), *rest) for source, sha256, path, *rest in rows]

    def find(self, *, digits: str = "", part: str = "", limit: int = 1000) -> list[tuple[str, Work]]:
        """Return work whose sha256 begins with ``digits``, or work with a path that holds ``part``, shortest first.

        Beside each stands the path: the one it was found by, or was claimed under. One of the two must be given.
        """
        values: tuple[str | bytes, ...]
        columns = "w.source, w.sha256, w.path, state, attempts, reason, first_seen_utc, finished_utc"
        columns += f", {self._deaths}"
        if digits:
            sql, values = "SELECT w.path, w.source, w.sha256 FROM work AS w WHERE sha256 GLOB ?", (f"{digits}*",)
        else:
            by_path = "SELECT path, source, sha256 FROM {} WHERE instr(path, ?)"
            sql, values = f"{by_path.format('work')} UNION {by_path.format('paths')}", (_blob(part),) * 2
        rows = self._file.rows(
            f"WITH found (at, source, sha256) AS ({sql}) SELECT at, {columns} FROM found JOIN work AS w"
            " USING (source, sha256) ORDER BY length(at), at, first_seen_utc LIMIT ?",
            (*values, limit),
        )
        return [(_text(at), Work(source, sha, _text(path), *rest)) for at, source, sha, path, *rest in rows]

    def seen_as(self, source: str, sha256: str) -> list[Seen]:
        """Return the files that hold this content as far as the ledger knows, first hashed first."""
        rows = self._file.rows(
            f"SELECT path, size, mtime_ns, {self._ctime_ns}, {self._inode}, seen_utc FROM paths"
            " WHERE source = ? AND sha256 = ? ORDER BY seen_utc, path",
            (source, sha256),
        )
        return [Seen(_text(path), Stamp(*stamp), seen_utc) for path, *stamp, seen_utc in rows]

    # --- a second look at young files --------------------------------------------------------------------------------

    def to_look_at_again(self, now_utc: str, limit: int) -> list[tuple[str, str, str]]:
        """Return source, path and sha256 of finished files whose content is to be compared now, longest due first."""
        rows = self._file.rows(
            "SELECT source, paths.path, sha256 FROM paths JOIN work USING (source, sha256)"
            " WHERE look_again_utc <= ? AND state IN ('DONE', 'QUARANTINED') ORDER BY look_again_utc LIMIT ?",
            (now_utc, limit),
        )
        return [(source, _text(path), sha256) for source, path, sha256 in rows]

    def looked_at_again(self, source: str, path: str, *, next_utc: str | None = None) -> None:
        """Note that a file was compared, or that it shall be at a later time."""
        with self._file.transaction() as db:
            db.execute(
                "UPDATE paths SET look_again_utc = ? WHERE source = ? AND path = ?", (next_utc, source, _blob(path))
            )

    def doubt(self, source: str, path: str) -> None:
        """Let a file count as one that was never hashed: its content is another than the one that was reviewed."""
        with self._file.transaction() as db:
            db.execute(
                "UPDATE paths SET size = -1, look_again_utc = NULL WHERE source = ? AND path = ?",
                (source, _blob(path)),
            )

    def others_wrote(self) -> bool:
        """Say whether another process has written into the ledger since this was last asked."""
        version = int(self._file.rows("PRAGMA data_version")[0][0])
        changed, self._data_version = version != self._data_version, version
        return changed

    def unpublished_with(self, text: bytes, limit: int = 1000) -> list[OutboxItem]:
        """Return messages that wait and whose payload holds ``text``, such as a sha256, oldest first."""
        rows = self._file.rows(
            "SELECT stream, id, payload FROM outbox WHERE instr(payload, ?) ORDER BY seq LIMIT ?", (text, limit)
        )
        return [OutboxItem(*row) for row in rows]

    # --- what is forgotten -------------------------------------------------------------------------------------------

    def paths_seen_before(
        self, utc: str, *, after: tuple[str, str] = ("", ""), limit: int
    ) -> list[tuple[str, str, str]]:
        """Return the next page of the paths of finished work that were seen last before that moment.

        Args:
            utc: the moment.
            after: source and path of the last row of the page before.
            limit: rows of a page.

        Returns:
            Source, path and when it was seen last, in the order of source and path; [] behind the last.
        """
        rows = self._file.rows(
            "SELECT source, paths.path, seen_utc FROM paths JOIN work USING (source, sha256)"
            " WHERE (source, paths.path) > (?, ?) AND seen_utc < ? AND state IN ('DONE', 'QUARANTINED')"
            " ORDER BY source, paths.path LIMIT ?",
            (after[0], _blob(after[1]), utc, limit),
        )
        return [(source, _text(path), seen_utc) for source, path, seen_utc in rows]

    def still_there(self, files: Sequence[tuple[str, str]], *, now_utc: str) -> None:
        """Note that paths, by source, lie in their folder still."""
        with self._file.transaction() as db:
            db.executemany(
                "UPDATE paths SET seen_utc = ? WHERE source = ? AND path = ?",
                [(now_utc, source, _blob(path)) for source, path in files],
            )

    def forget_paths(self, files: Sequence[tuple[str, str]], *, seen_before_utc: str) -> int:
        """Forget paths, by source, of files that are gone; one whose work is not finished, or seen since, stays.

        Returns:
            How many. A file that comes back is hashed, and found finished while ``work`` has its content.
        """
        with self._file.transaction() as db:
            gone = db.executemany(
                "DELETE FROM paths WHERE source = ? AND path = ? AND seen_utc < ? AND (source, sha256) IN"
                " (SELECT source, sha256 FROM work WHERE state IN ('DONE', 'QUARANTINED'))",
                [(source, _blob(path), seen_before_utc) for source, path in files],
            )
        return max(gone.rowcount, 0)

    def forget_work(self, finished_before_utc: str) -> int:
        """Forget finished work that no path leads to any more; return how much."""
        with self._file.transaction() as db:
            return db.execute(
                "DELETE FROM work WHERE state IN ('DONE', 'QUARANTINED') AND finished_utc < ? AND NOT EXISTS"
                " (SELECT 1 FROM paths WHERE paths.source = work.source AND paths.sha256 = work.sha256)",
                (finished_before_utc,),
            ).rowcount

    def forget_notes(self, before_utc: str) -> int:
        """Forget the names of notes that may be forgotten and were taken before that moment; return how many."""
        with self._file.transaction() as db:
            return db.execute("DELETE FROM noted WHERE utc < ?", (before_utc,)).rowcount

    def _recover(self) -> None:
        with self._file.transaction() as db:
            found = db.execute(
                "UPDATE work SET state = 'SEEN', attempts = attempts + 1, deaths = deaths + 1,"
                " reason = 'the process died on it' WHERE state = 'CLAIMED'"
            )
            lot_rows.recover(db)
        if found.rowcount:
            log.warning("ledger %s: %d in flight when the last process died, tried again", self.path, found.rowcount)


def _outcome(state: State | None, *, is_same_path: bool) -> Outcome:
    if state is None:
        return "new"
    if state in ("DONE", "QUARANTINED"):
        return "settled" if is_same_path else "duplicate"
    # CLAIMED under the very same path is what a give_back that met a full disk leaves behind: no one else has it.
    return "retry" if state == "SEEN" or is_same_path else "in-flight"


def _resolve(
    db: sqlite3.Connection,
    source: str,
    path: str,
    sha256: str,
    stamp: Stamp,
    now_utc: str,
    look_again_utc: str | None,
) -> None:
    """Note what the path holds now. Work that waited for what it held before cannot be done any more."""
    before = db.execute("SELECT sha256 FROM paths WHERE source = ? AND path = ?", (source, _blob(path))).fetchone()
    db.execute(
        "INSERT OR REPLACE INTO paths"
        " (source, path, size, mtime_ns, ctime_ns, inode, sha256, seen_utc, look_again_utc, match_key)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (source, _blob(path), *stamp, sha256, now_utc, look_again_utc, match_key(path)),
    )
    if before is not None and before[0] != sha256:
        db.execute(
            "UPDATE work SET state = 'QUARANTINED', reason = ?, finished_utc = ?"
            " WHERE source = ? AND sha256 = ? AND state = 'SEEN'"
            " AND NOT EXISTS (SELECT 1 FROM paths WHERE paths.source = work.source AND paths.sha256 = work.sha256)",
            (_REPLACED, now_utc, source, before[0]),
        )


def _leave(db: sqlite3.Connection, work: Claim | Work, assignments: str, *values: str | None) -> None:
    """Move the work out of CLAIMED (a ``Work`` from a listing: out of SEEN)."""
    state = "CLAIMED" if isinstance(work, Claim) else "SEEN"
    changed = db.execute(
        f"UPDATE work SET {assignments} WHERE source = ? AND sha256 = ? AND state = ?",
        (*values, work.source, work.sha256, state),
    )
    if changed.rowcount != 1:
        raise RuntimeError(f"{work.source} {work.path!r} is not {state} any more")


def _add_messages(db: sqlite3.Connection, outbox: Sequence[OutboxItem]) -> None:
    """Let messages wait; those whose id waits already are left out."""
    db.executemany(
        "INSERT OR IGNORE INTO outbox (id, stream, payload) VALUES (?, ?, ?)",
        [(item.id, item.stream, item.payload) for item in outbox],
    )


def _append_audit(db: sqlite3.Connection, audit: Mapping[str, object]) -> None:
    db.execute("INSERT INTO audit (line) VALUES (?)", (json.dumps(dict(audit), allow_nan=False),))


def _clean(reason: str) -> str:
    """SQLite takes no lone surrogates, which a file name inside a message may carry."""
    return reason.encode("utf-8", "backslashreplace").decode()
