"""What hooks have to run and have run: one SQLite file, so that a restart forgets none and repeats few.

A run is written down before it begins and marked after it ended: one that the process died in is repeated. So each
happens at least once, or is given up after its attempts, and twice only where the process died in between.

    since   when hooks were first asked for: lots that were finished before are never announced; and the newest
            revision of a lot by its KLARF that was announced
    lots    for each lot that was announced, what it held then
    runs    hook, key (once for each), variables as JSON, attempts so far, not before (Unix time), state, why
"""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from semwatch.system.sqlite_file import Kind, SqliteFile

HOOKS = "hooks.sqlite"
"""Its name in the state folder."""
MAX_ENDED = 1000
"""Runs that have ended and are kept, the newest."""

State = Literal["waits", "done", "given up"]

_KIND = Kind(
    noun="memory of the hooks",
    application_id=0x53454D48,  # "SEMH"
    schema=(
        "CREATE TABLE since (utc TEXT NOT NULL, revision INTEGER NOT NULL)",
        "CREATE TABLE lots (lot TEXT PRIMARY KEY, held TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY AUTOINCREMENT, hook TEXT NOT NULL, key TEXT NOT NULL, variables TEXT NOT NULL,
            utc TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, not_before REAL NOT NULL DEFAULT 0,
            state TEXT NOT NULL DEFAULT 'waits', why TEXT NOT NULL DEFAULT '', UNIQUE (hook, key))""",
        "CREATE INDEX runs_by_state ON runs (state, not_before)",
    ),
    migrations={},
    made_by="the daemon makes it where the site has hooks",
    remedy="delete it: runs that wait are lost, and lots that are finished from then on are announced",
)


@dataclass(frozen=True, slots=True)
class HookRun:
    """One run of a hook."""

    id: int
    hook: str
    key: str
    variables: Mapping[str, str]
    utc: str
    """When it came up."""
    attempts: int
    state: State
    why: str
    """How the last attempt ended."""


class HookRuns:
    """The open file; any thread may call.

    Args:
        now_utc: for a file that is new.
        newest: for a file that is new, number of the newest revision that was there before.

    Raises:
        ConfigError, ServiceUnavailable: as ``SqliteFile`` says, from every method.
    """

    def __init__(
        self, path: Path, *, now_utc: str = "", newest: Callable[[], int] = lambda: 0, read_only: bool = False
    ) -> None:
        self._file = SqliteFile(path, _KIND, read_only=read_only)
        if not read_only and not self._file.rows("SELECT * FROM since"):
            with self._file.transaction() as db:
                db.execute("INSERT INTO since VALUES (?, ?)", (now_utc, newest()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def since_utc(self) -> str:
        """When hooks were first asked for."""
        return str(self._file.rows("SELECT utc FROM since")[0][0])

    def announced(self) -> dict[str, str]:
        """What each lot held when it was last announced."""
        return dict(self._file.rows("SELECT lot, held FROM lots"))

    def announce(self, lot: str, held: str, hooks: Sequence[str], variables: Mapping[str, str], utc: str) -> None:
        """Keep the runs of hooks for a lot, and that it was announced."""
        with self._file.transaction() as db:
            db.execute("INSERT OR REPLACE INTO lots VALUES (?, ?)", (lot, held))
            for hook in hooks:
                self._add(db, hook, f"{lot}\n{held}", variables, utc)

    def revision(self) -> int:
        """Number of the newest revision that was announced."""
        return int(self._file.rows("SELECT revision FROM since")[0][0])

    def announce_revision(
        self, number: int, key: str, hooks: Sequence[str], variables: Mapping[str, str], utc: str
    ) -> None:
        """Keep the runs of hooks for a revision of a lot, and that it was announced."""
        with self._file.transaction() as db:
            db.execute("UPDATE since SET revision = ?", (number,))
            for hook in hooks:
                self._add(db, hook, key, variables, utc)

    def add(self, hook: str, key: str, variables: Mapping[str, str], utc: str) -> None:
        """Keep a run of a hook; one of the same key is left as it is."""
        with self._file.transaction() as db:
            self._add(db, hook, key, variables, utc)

    @staticmethod
    def _add(db: sqlite3.Connection, hook: str, key: str, variables: Mapping[str, str], utc: str) -> None:
        db.execute(
            "INSERT OR IGNORE INTO runs (hook, key, variables, utc) VALUES (?, ?, ?, ?)",
            (hook, key, json.dumps(dict(variables)), utc),
        )

    def due(self, now_s: float, limit: int = 20) -> list[HookRun]:
        """What is to be run now (Unix time), in the order in which it came up."""
        return self._runs("WHERE state = 'waits' AND not_before <= ? ORDER BY id LIMIT ?", now_s, limit)

    def waiting(self) -> int:
        """How many runs are to come, those that are tried again later too."""
        return int(self._file.rows("SELECT count(*) FROM runs WHERE state = 'waits'")[0][0])

    def given_up(self, limit: int = 10) -> list[HookRun]:
        """What was given up, the newest first."""
        return self._runs("WHERE state = 'given up' ORDER BY id DESC LIMIT ?", limit)

    def begin(self, run: HookRun) -> None:
        """Count an attempt, before it is made."""
        with self._file.transaction() as db:
            db.execute("UPDATE runs SET attempts = attempts + 1 WHERE id = ?", (run.id,))

    def end(self, run: HookRun, state: State, why: str, *, not_before_s: float = 0.0) -> None:
        """Note how an attempt ended; of those that are over, the oldest are forgotten."""
        with self._file.transaction() as db:
            db.execute(
                "UPDATE runs SET state = ?, why = ?, not_before = ? WHERE id = ?", (state, why, not_before_s, run.id)
            )
            db.execute(
                "DELETE FROM runs WHERE state != 'waits' AND id <= (SELECT id FROM runs WHERE state != 'waits'"
                " ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (MAX_ENDED,),
            )

    def take_back(self, run: HookRun) -> None:
        """Uncount an attempt that a stop of the daemon ended."""
        with self._file.transaction() as db:
            db.execute("UPDATE runs SET attempts = attempts - 1 WHERE id = ?", (run.id,))

    def _runs(self, where: str, *values: object) -> list[HookRun]:
        rows = self._file.rows(f"SELECT id, hook, key, variables, utc, attempts, state, why FROM runs {where}", values)
        return [
            HookRun(number, hook, key, json.loads(variables), utc, attempts, state, why)
            for number, hook, key, variables, utc, attempts, state, why in rows
        ]
