"""The ledger's table of results whose rows are not in the table of their lot yet. Since layout 3.

lot_rows   seq      never used twice
           lot      folder of the lot, relative to the results
           result   name of the review.json whose rows are new; NULL: the lot's table is to be written anew
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from semwatch.system.sqlite_file import SqliteFile

SCHEMA = ("CREATE TABLE lot_rows (seq INTEGER PRIMARY KEY AUTOINCREMENT, lot TEXT NOT NULL, result TEXT)",)


@dataclass(frozen=True, slots=True)
class LotRow:
    """What is to be brought into the table of a lot."""

    lot: str
    """Folder of the table, relative to the results."""
    result: str | None
    """Name of the review.json whose rows are new; None: a result has changed, and the table is written anew."""


class LotRows:
    """What waits for the tables of lots; part of the open ledger."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    def new(self, limit: int, *, but: Sequence[str] = ()) -> list[tuple[int, LotRow]]:
        """Return the oldest results whose rows can be appended, with the number to name in ``mark_listed``.

        Those of lots whose table is to be written anew are left out, and those of the lots of ``but``.
        """
        rows = self._file.rows(
            "SELECT seq, lot, result FROM lot_rows WHERE result IS NOT NULL AND lot NOT IN"
            " (SELECT lot FROM lot_rows WHERE result IS NULL UNION SELECT value FROM json_each(?))"
            " ORDER BY seq LIMIT ?",
            (json.dumps(list(but)), limit),
        )
        return [(seq, LotRow(lot, result)) for seq, lot, result in rows]

    def changed(self) -> list[tuple[str, int]]:
        """Return the lots whose table is to be written anew, changed first, with the number for ``mark_written``."""
        return self._file.rows(
            "SELECT lot, max(seq) FROM lot_rows GROUP BY lot HAVING count(*) > count(result) ORDER BY min(seq)"
        )

    def mark_listed(self, seqs: Sequence[int]) -> None:
        """Forget results whose rows are in their table."""
        with self._file.transaction() as db:
            db.executemany("DELETE FROM lot_rows WHERE seq = ?", [(seq,) for seq in seqs])

    def mark_written(self, lot: str, up_to_seq: int) -> None:
        """Forget what waited for a table that has been written anew since."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM lot_rows WHERE lot = ? AND seq <= ?", (lot, up_to_seq))

    def write_anew(self, lot: str) -> None:
        """Let a table be written anew."""
        with self._file.transaction() as db:
            add(db, LotRow(lot, None))


def add(db: sqlite3.Connection, row: LotRow | None) -> None:
    """Take a row within a transaction; None: nothing."""
    if row is not None:
        db.execute("INSERT INTO lot_rows (lot, result) VALUES (?, ?)", (row.lot, row.result))


def recover(db: sqlite3.Connection) -> None:
    """After a stop of whatever kind: rows may be in their table already, whole or torn, so it is written anew."""
    db.execute("UPDATE lot_rows SET result = NULL")
