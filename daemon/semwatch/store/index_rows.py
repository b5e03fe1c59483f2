"""What of a result goes into the index: the rows of ``result_index``'s tables."""

import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

from semwatch.errors import ImageError
from semwatch.store import results
from semwatch.store.results import AnyRecord
from semwatch.store.review_record import DuplicateRecord, PageRecord, ReasonRecord, ReviewRecord

log = logging.getLogger(__name__)


def read(path: Path) -> AnyRecord | None:
    """Read a result, a reason or a note of a duplicate; None, and why is logged, where it is broken."""
    try:
        return results.read_any(path)
    except ImageError as error:
        log.warning("left out of the index: %s", error)
        return None


def add(db: sqlite3.Connection, lot: str, name: str, stamp: str, record: AnyRecord | None) -> None:
    """Take a file of a lot within a transaction; None: it is broken."""
    columns: dict[str, Any] = {"lot": lot, "name": name, "stamp": stamp, **_columns(name, record)}
    marks = ", ".join("?" * len(columns))
    added = db.execute(f"INSERT INTO files ({', '.join(columns)}) VALUES ({marks})", tuple(columns.values()))
    if isinstance(record, ReviewRecord) and columns["outcome"] == "reviewed":
        assert added.lastrowid is not None
        for page in record.pages:
            _add_page(db, added.lastrowid, lot, page)


def _columns(name: str, record: AnyRecord | None) -> dict[str, Any]:
    own: dict[str, Any]
    match record:
        case None:
            image = next(name.removesuffix(end) for end in results.IN_TABLES if name.endswith(end))
            return {"outcome": "broken", "source": "", "path": image, "sha256": "", "utc": ""}
        case ReasonRecord():
            own = {"outcome": "refused", "utc": record.quarantined_utc, "reason": record.reason}
        case DuplicateRecord():
            own = {"outcome": "duplicate", "utc": record.noted_utc, "original": record.original}
        case ReviewRecord():
            scores = [page.image_score for page in record.pages if page.image_score is not None]
            own = {
                "outcome": "reviewed" if results.is_current(Path(name), record) else "kept",
                "utc": record.revised_utc or record.reviewed_utc,
                "recipe": record.recipe.name,
                "recipe_id": record.recipe.id,
                "revision": record.revision,
                "image_score": max(scores, default=None),
                "took_ms": sum(record.timings_ms.values()),
            }
    return {"source": record.source, "path": record.path, "sha256": record.sha256, **own}


def _add_page(db: sqlite3.Connection, file: int, lot: str, page: PageRecord) -> None:
    quality = " ".join(flag.name for flag in page.quality.flags)
    db.execute(
        "INSERT INTO pages VALUES (?, ?, ?, ?, ?, ?, ?)",
        (file, page.page, page.verdict, page.image_score, page.gate_threshold, page.domain, quality),
    )
    db.executemany(
        "INSERT INTO defects (file, lot, page, defect_id, kind, label, confidence, nearest, box, area_px, is_judged,"
        " human_label, human_by, human_utc) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                file, lot, page.page, defect.defect_id, verdict.kind, verdict.label, verdict.confidence,
                verdict.nearest[0].label if verdict.nearest else None, json.dumps(defect.box_xyxy), defect.area_px,
                1 if human is not None else None, human and human.label, human and human.by, human and human.utc,
            )
            for defect in page.defects
            for verdict, human in [(defect.verdict, defect.human)]
        ],
    )  # fmt: skip
    db.executemany(
        "INSERT INTO missed VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(file, lot, page.page, one.label, json.dumps(one.box_xyxy), one.by, one.utc) for one in page.missed],
    )
