"""The archive of unknowns: one SQLite file that keeps every record that learning has claimed, and its state.

Redis holds what waits; an entry there is gone once it is acknowledged. The archive is the memory behind it: the crops
of a cluster that a person looks at, and the features that a new head judges again.

Layout, ``user_version`` 2, ``application_id`` "SEMU":

    unknowns  id            primary key: the record's own
              created_utc, source, path, sha256, page, defect_id, kind    as in the record
              added_utc     when it was added here
              state         waiting (no class yet) | learned | explained | duplicate | rejected | forgotten
              state_note    why: class and head version, the record it repeats, the cluster that was rejected
              settled_utc   when it left ``waiting``
              record        the record as one packed blob (``records.pack``)

    corrections  id           primary key: the correction's own
                 added_utc    when it was added here
                 correction   as one packed blob (``records.pack``)

``synchronous=FULL``: what ``add`` returned from survives a power cut, so it may be acknowledged in Redis. WAL: readers
work while one writes. A local disk, not a network share.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, get_args

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.streams import records
from semwatch.streams.records import Correction, Record
from semwatch.system.sqlite_file import Kind, SqliteFile

ARCHIVE = "unknowns.sqlite"
"""Its name in the learning folder."""

State = Literal["waiting", "learned", "explained", "duplicate", "rejected", "forgotten"]
"""``waiting``: no class came of it yet. ``learned``: a class was made with it. ``explained``: clustering put it into a
class known before. ``duplicate``: of a record that is kept. ``rejected``: a person rejected its class. ``forgotten``:
it waited too long."""

_STATES: tuple[State, ...] = get_args(State)
_CORRECTIONS = (
    "CREATE TABLE corrections (id TEXT PRIMARY KEY NOT NULL, added_utc TEXT NOT NULL, correction BLOB NOT NULL)"
)
_KIND = Kind(
    noun="archive",
    application_id=0x53454D55,  # "SEMU"
    schema=(
        f"""CREATE TABLE unknowns (
            id TEXT PRIMARY KEY NOT NULL, created_utc TEXT NOT NULL, source TEXT NOT NULL, path TEXT NOT NULL,
            sha256 TEXT NOT NULL, page INTEGER NOT NULL, defect_id INTEGER NOT NULL, kind TEXT NOT NULL,
            added_utc TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN {_STATES}),
            state_note TEXT NOT NULL DEFAULT '', settled_utc TEXT, record BLOB NOT NULL,
            CHECK ((state = 'waiting') = (settled_utc IS NULL)))""",
        "CREATE INDEX unknowns_by_state ON unknowns (state, settled_utc)",
        "CREATE INDEX unknowns_by_image ON unknowns (source, path, sha256, page, defect_id, id, created_utc)",
        _CORRECTIONS,
    ),
    migrations={1: (_CORRECTIONS,)},
    made_by="the first `semwatch-train retrain` makes it",
    remedy="move the file and its -wal and -shm aside; the next cycle makes a new one of what still waits in Redis",
)
_PLACE = "source, path, sha256, page, defect_id, id"
"""The order of ``since``."""
_AMONG = "id IN (SELECT value FROM json_each(?))"


class Archive:
    """The open archive. Every method may be called from any thread; each one that writes is one transaction.

    ``read_only`` looks at an archive that a cycle may be writing. Otherwise file and folder are made where they are
    missing; a second writer waits up to ``busy_s`` for the first one's transaction.

    Raises: ConfigError when the file is no archive, is broken, too new, or (read-only) not there; ServiceUnavailable
    from every method while the disk is full or failing, or another writer takes too long.
    """

    def __init__(self, path: Path, *, read_only: bool = False, busy_s: float = 10.0) -> None:
        self.path = path
        self._file = SqliteFile(path, _KIND, read_only=read_only, busy_s=busy_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    # --- what is written -------------------------------------------------------------------------------------------

    def add(self, found: Sequence[Record], *, now_utc: str) -> int:
        """Keep records as ``waiting``, all or none; return how many were new.

        A known id changes nothing, but that a doubtful crop which was explained waits again where it comes as an
        unknown: a later look could not name it any more.
        """
        rows = [(*_place(r), r.created_utc, r.kind, now_utc, records.pack(records.encode(r))) for r in found]
        with self._file.transaction() as db:
            added = db.executemany(
                f"INSERT INTO unknowns ({_PLACE}, created_utc, kind, added_utc, record)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET kind = excluded.kind,"
                " record = excluded.record, state = 'waiting', state_note = '', settled_utc = NULL"
                " WHERE state = 'explained' AND kind IN ('known', 'novel') AND excluded.kind NOT IN ('known', 'novel')",
                rows,
            )
        return max(added.rowcount, 0)

    def settle(self, ids: Sequence[str], state: State, note: str, *, now_utc: str) -> int:
        """Set state and note of records, whatever they were before; return how many of the ids are here.

        ``waiting`` takes it back: a head was rolled back, or a crop taken out of a class, and it needs one again.
        """
        settled_utc = None if state == "waiting" else now_utc
        with self._file.transaction() as db:
            changed = db.execute(
                f"UPDATE unknowns SET state = ?, state_note = ?, settled_utc = ? WHERE {_AMONG}",
                (state, note, settled_utc, json.dumps(list(ids))),
            )
        return changed.rowcount

    def add_corrections(self, found: Sequence[Correction], *, now_utc: str) -> None:
        """Keep corrections, all or none; a known id changes nothing."""
        rows = [(one.id, now_utc, records.pack(records.encode_correction(one))) for one in found]
        with self._file.transaction() as db:
            db.executemany("INSERT INTO corrections VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING", rows)

    def prune(self, before_utc: str, *, keep: Sequence[str] = ()) -> int:
        """Delete records that were settled before that moment, never one that waits or to ``keep``; return how many.

        The file keeps its size, the room is used again. A record that Redis delivers once more after that is new.
        """
        with self._file.transaction() as db:
            gone = db.execute(
                f"DELETE FROM unknowns WHERE state != 'waiting' AND settled_utc < ? AND NOT ({_AMONG})",
                (before_utc, json.dumps(list(keep))),
            )
        return gone.rowcount

    # --- what is read ----------------------------------------------------------------------------------------------

    def state_of(self, ids: Sequence[str]) -> dict[str, State]:
        """Return the state of each id that is here."""
        return dict(self._file.rows(f"SELECT id, state FROM unknowns WHERE {_AMONG}", (json.dumps(list(ids)),)))

    def notes_of(self, state: State) -> dict[str, str]:
        """Return the note on each record in a state, by id."""
        return dict(self._file.rows("SELECT id, state_note FROM unknowns WHERE state = ?", (state,)))

    def others_at(self, found: Sequence[Record], states: Sequence[State]) -> dict[str, str]:
        """By id of a record: another record in one of these states, of the same box on the same page of the same file.

        One defect may have two ids: older releases made them otherwise, and a site may get another name.
        """
        by_file: dict[tuple[str, str, str], list[Record]] = {}
        for record in found:
            by_file.setdefault((record.source, record.path, record.sha256), []).append(record)
        others: dict[str, str] = {}
        for file, of_file in by_file.items():
            rows = self._file.rows(
                "SELECT id, record FROM unknowns WHERE source = ? AND path = ? AND sha256 = ?"
                " AND state IN (SELECT value FROM json_each(?))",
                (*file, json.dumps(list(states))),
            )
            for other in (self._decoded(id_, blob) for id_, blob in rows):
                for record in of_file:
                    if other.id != record.id and (other.page, other.box_xyxy) == (record.page, record.box_xyxy):
                        others[record.id] = other.id
        return others

    def read(self, id_: str) -> Record:
        """Return one record.

        Raises:
            ConfigError: It is not here, or is broken.
        """
        found = self.read_many([id_])
        if not found:
            raise ConfigError(f"archive {self.path} has no record {id_}: it never had, or it was pruned")
        return found[0]

    def read_many(self, ids: Sequence[str]) -> list[Record]:
        """Return records in the order of their ids; ids that are not here are left out.

        Raises:
            ConfigError: One of them is broken.
        """
        blobs = dict(self._file.rows(f"SELECT id, record FROM unknowns WHERE {_AMONG}", (json.dumps(list(ids)),)))
        return [self._decoded(id_, blobs[id_]) for id_ in ids if id_ in blobs]

    def since(self, utc: str, *, after_id: str = "", limit: int) -> list[Record]:
        """Return the next page of the records created at or after ``utc``, whatever their state; [] behind the last.

        Ordered by source, path, file, page and defect; ``after_id`` is the id of the last record of the page before.
        An image is never cut in two: all of its records follow where ``limit`` would end among them.

        Raises:
            ConfigError: A record is broken.
            ServiceUnavailable: ``after_id`` was pruned meanwhile; begin again.
        """
        start: tuple[object, ...] = ("", "", "", 0, 0, "")
        if after_id:
            places = self._file.rows(f"SELECT {_PLACE} FROM unknowns WHERE id = ?", (after_id,))
            if not places:
                raise ServiceUnavailable(f"archive {self.path}: {after_id} was pruned while it was read; begin again")
            start = places[0]
        # The end of the page is found in the index alone; only then are blobs read.
        ends = self._file.rows(
            f"SELECT source, path, sha256 FROM (SELECT {_PLACE} FROM unknowns WHERE created_utc >= ?"
            f" AND ({_PLACE}) > (?, ?, ?, ?, ?, ?) ORDER BY {_PLACE} LIMIT ?)"
            " ORDER BY source DESC, path DESC, sha256 DESC LIMIT 1",
            (utc, *start, limit),
        )
        if not ends:
            return []
        rows = self._file.rows(
            f"SELECT id, record FROM unknowns WHERE created_utc >= ? AND ({_PLACE}) > (?, ?, ?, ?, ?, ?)"
            f" AND (source, path, sha256) <= (?, ?, ?) ORDER BY {_PLACE}",
            (utc, *start, *ends[0]),
        )
        return [self._decoded(id_, blob) for id_, blob in rows]

    def corrections(self) -> list[Correction]:
        """Return all corrections, oldest first.

        Raises:
            ConfigError: One of them is broken.
        """
        rows = self._file.rows("SELECT id, correction FROM corrections ORDER BY added_utc, id", ())
        found = []
        for id_, blob in rows:
            try:
                found.append(records.decode_correction(records.unpack(blob)))
            except ValueError as error:
                raise ConfigError(
                    f"archive {self.path}: correction {id_} cannot be read ({error}); {_KIND.remedy}"
                ) from error
        return found

    def counts(self) -> dict[State, int]:
        """Count the records by state; every state is there."""
        return dict.fromkeys(_STATES, 0) | dict(self._file.rows("SELECT state, count(*) FROM unknowns GROUP BY state"))

    def _decoded(self, id_: str, blob: bytes) -> Record:
        try:
            return records.decode_either(records.unpack(blob))
        except ValueError as error:
            raise ConfigError(f"archive {self.path}: record {id_} cannot be read ({error}); {_KIND.remedy}") from error


def _place(record: Record) -> tuple[str, str, str, int, int, str]:
    return record.source, record.path, record.sha256, record.page, record.defect_id, record.id
