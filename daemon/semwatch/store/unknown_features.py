"""The ledger's table of unknowns: what a later head needs to judge them again. Since layout 3.

unknowns   id              primary key: the record's own
           created_utc, source, path, sha256, page, defect_id    as in the record
           box             x0, y0, x1, y1 in pixels of the page, JSON
           recipe_id, encoder, features                          see ``UnknownFeatures``
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from semwatch.system.sqlite_file import SqliteFile

SCHEMA = (
    """CREATE TABLE unknowns (
        id TEXT PRIMARY KEY, created_utc TEXT NOT NULL, source TEXT NOT NULL, path TEXT NOT NULL,
        sha256 TEXT NOT NULL, page INTEGER NOT NULL, defect_id INTEGER NOT NULL, box TEXT NOT NULL,
        recipe_id TEXT NOT NULL, encoder TEXT NOT NULL, features BLOB NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX unknowns_by_image ON unknowns (source, path, sha256, page, defect_id, id)",
    "CREATE INDEX unknowns_by_time ON unknowns (created_utc)",
)
_PLACE = "source, path, sha256, page, defect_id, id"
"""The order of ``unknowns_since``."""
_COLUMNS = "id, created_utc, source, path, sha256, page, defect_id, box, recipe_id, encoder, features"


@dataclass(frozen=True, slots=True)
class UnknownFeatures:
    """What a later head needs to judge an unknown again."""

    id: str
    """Of its record."""
    created_utc: str
    source: str
    path: str
    """As in the record: bytes that are no UTF-8 are spelled out."""
    sha256: str
    page: int
    defect_id: int
    box_xyxy: tuple[int, int, int, int]
    recipe_id: str
    encoder: str
    """Whose features these are: its content hash, of older reviews its version number."""
    features: bytes
    """D little-endian float32."""


def since(file: SqliteFile, utc: str, after: UnknownFeatures | None, limit: int) -> list[UnknownFeatures]:
    """See ``Ledger.unknowns_since``."""
    start = ("", "", "", 0, 0, "") if after is None else _place(after)
    ends = file.rows(
        f"SELECT source, path, sha256 FROM (SELECT {_PLACE} FROM unknowns WHERE created_utc >= ?"
        f" AND ({_PLACE}) > (?, ?, ?, ?, ?, ?) ORDER BY {_PLACE} LIMIT ?)"
        " ORDER BY source DESC, path DESC, sha256 DESC LIMIT 1",
        (utc, *start, limit),
    )
    if not ends:
        return []
    rows = file.rows(
        f"SELECT {_COLUMNS} FROM unknowns WHERE created_utc >= ? AND ({_PLACE}) > (?, ?, ?, ?, ?, ?)"
        f" AND (source, path, sha256) <= (?, ?, ?) ORDER BY {_PLACE}",
        (utc, *start, *ends[0]),
    )
    return [_unknown(*row) for row in rows]


def places(file: SqliteFile, ids: Sequence[str]) -> dict[str, tuple[str, str, int, int]]:
    """See ``Ledger.places_of``."""
    rows = file.rows(
        "SELECT id, source, path, page, defect_id FROM unknowns WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(list(ids)),),
    )
    return {id_: (source, path, page, defect_id) for id_, source, path, page, defect_id in rows}


def _place(of: UnknownFeatures) -> tuple[object, ...]:
    return of.source, of.path, of.sha256, of.page, of.defect_id, of.id


def _unknown(
    id_: str, utc: str, source: str, path: str, sha256: str, page: int, defect_id: int, box: str, *rest: Any
) -> UnknownFeatures:
    x0, y0, x1, y1 = json.loads(box)
    recipe_id, encoder, features = rest
    return UnknownFeatures(
        id_, utc, source, path, sha256, page, defect_id, (x0, y0, x1, y1), recipe_id, encoder, features
    )


def add(db: sqlite3.Connection, found: Sequence[UnknownFeatures]) -> None:
    """Take features within a transaction; those of a known id change nothing."""
    db.executemany(
        f"INSERT OR IGNORE INTO unknowns ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                u.id, u.created_utc, u.source, u.path, u.sha256, u.page, u.defect_id, json.dumps(u.box_xyxy),
                u.recipe_id, u.encoder, u.features,
            )
            for u in found
        ],
    )  # fmt: skip
