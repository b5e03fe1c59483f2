"""The table of a lot: ``lot.csv`` beside its results, a row for each defect, and one for each page without any.

A file that was refused has one row, so has a duplicate; their ``page_verdict`` says so, and ``reason`` why.

It is derived from the folder's JSON files and says nothing that they do not. Rows of new results are appended;
where a result has changed, the table is written anew, in the order of the names. One writer per table at a time.
"""

import csv
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from semwatch.errors import ImageError
from semwatch.store import result_names, results
from semwatch.store.results import AnyRecord
from semwatch.store.review_record import (
    DefectRecord,
    DuplicateRecord,
    MissedRecord,
    PageRecord,
    ReasonRecord,
    ReviewRecord,
)
from semwatch.system import files
from semwatch.system.text import for_spreadsheet

log = logging.getLogger(__name__)

LOT = "lot.csv"
LOT_COLUMNS = (
    "source", "path", "page", "sha256", "reviewed_utc", "recipe", "recipe_id", "models", "image_score",
    "gate_threshold", "page_verdict", "domain", "defect_id", "kind", "label", "class_code", "confidence", "nearest_1",
    "nearest_2", "x0", "y0", "x1", "y1", "area_px", "area_nm2", "peak_score", "revision", "quality", "reason",
    "human_label", "human_by", "human_utc",
)  # fmt: skip


NO_DEFECT, MISSED = "not-a-defect", "missed"
"""In ``human_label``: a person says that it is none. In ``kind``: a person saw it, and the line did not."""


def iter_lot(lot_dir: Path) -> Iterator[ReviewRecord]:
    """Read the current results of one folder one by one, by name: a lot of thousands is never in memory as a whole.

    Broken files are logged and left out, kept ones are not given.

    Raises:
        ServiceUnavailable: the disk cannot be read.
    """
    return (record for _, record in _current(lot_dir) if isinstance(record, ReviewRecord))


def names(lot_dir: Path) -> list[str]:
    """Names of the files that tables are made of, by image; of an image that has a result, that one.

    Raises:
        ServiceUnavailable: the disk cannot be read.
    """
    with results.disk(lot_dir):
        found = os.listdir(lot_dir) if lot_dir.is_dir() else []  # noqa: PTH208 - half the time of iterdir
    return result_names.names_among(found)


def _current(lot_dir: Path) -> Iterator[tuple[Path, AnyRecord]]:
    for name in names(lot_dir):
        path = lot_dir / name
        try:
            record = results.read_any(path)
        except ImageError as error:
            log.warning("left out of the lot: %s", error)
            continue
        if not isinstance(record, ReviewRecord) or results.is_current(path, record):
            yield path, record


def write(lot_dir: Path) -> list[Path]:
    """Write the table anew from all results of the folder; it takes time in proportion to them.

    Returns:
        The JSON files that are in it.

    Raises:
        ServiceUnavailable: the disk is full or broken.
    """
    target = lot_dir / LOT
    paths: list[Path] = []
    with results.disk(target):
        files.write_stream(target, _lines(lot_dir, paths))
    return paths


def append(lot_dir: Path, records: Sequence[AnyRecord]) -> int | None:
    """Append the rows of new results, in their order.

    Returns:
        How many bytes; None where there is no table that can be continued: none at all, one of other columns, one cut
        short. Nothing was written then; ``write`` it anew.

    Raises:
        ServiceUnavailable: the disk is full or broken; a part of the rows may be there, so ``write`` it anew.
    """
    target = lot_dir / LOT
    with results.disk(target):
        if target.is_symlink() or not target.is_file():
            return None
        fd = files.open_to_append(target)
        try:
            end = os.fstat(fd).st_size
            if os.pread(fd, len(_HEADER), 0) != _HEADER or os.pread(fd, 1, end - 1) != b"\n":
                return None
            return files.append(fd, end, b"".join(line for record in records for line in _rows(record))) - end
        finally:
            os.close(fd)


def size(lot_dir: Path) -> int:
    """Bytes of the table, 0 without one."""
    try:
        return (lot_dir / LOT).stat().st_size
    except OSError:
        return 0


def _lines(lot_dir: Path, paths: list[Path]) -> Iterator[bytes]:
    yield _HEADER
    for path, record in _current(lot_dir):
        yield from _rows(record)
        paths.append(path)


def _rows(record: AnyRecord) -> Iterator[bytes]:
    if not isinstance(record, ReviewRecord):
        yield _csv_line(_row_aside(record))
        return
    for page in record.pages:
        for defect in page.defects or [None]:
            yield _csv_line([*_row(record, page, defect), None, *_human(defect)])
        for missed in page.missed:
            yield _csv_line(_row_missed(record, page, missed))


def _human(defect: DefectRecord | None) -> list[object]:
    if defect is None or defect.human is None:
        return [None, None, None]
    return [defect.human.label or NO_DEFECT, defect.human.by, defect.human.utc]


def _row_missed(record: ReviewRecord, page: PageRecord, missed: MissedRecord) -> list[object]:
    """The row of a defect that a person saw and the line did not find."""
    row = dict(zip(LOT_COLUMNS, [*_row(record, page, None), *[None] * 4], strict=True))
    row |= dict(zip(("x0", "y0", "x1", "y1"), missed.box_xyxy, strict=True))
    row |= {"kind": MISSED, "human_label": missed.label, "human_by": missed.by, "human_utc": missed.utc}
    return list(row.values())


def _row_aside(record: ReasonRecord | DuplicateRecord) -> list[object]:
    """The row of a file without a result of its own."""
    if isinstance(record, ReasonRecord):
        verdict, utc, reason = "refused", record.quarantined_utc, record.reason
    else:
        verdict, utc, reason = "duplicate", record.noted_utc, f"the content of {record.original}"
    row: dict[str, object] = dict.fromkeys(LOT_COLUMNS)
    row |= {"source": record.source, "path": record.path, "sha256": record.sha256, "reviewed_utc": utc}
    row |= {"page_verdict": verdict, "reason": " ".join(reason.split())}
    return list(row.values())


def _csv_line(cells: Sequence[object]) -> bytes:
    line = io.StringIO()
    # Names are anybody's: a cell must neither end its line nor be a formula to who opens the table.
    safe = [for_spreadsheet(cell) if isinstance(cell, str) else cell for cell in cells]
    csv.writer(line, lineterminator="\n").writerow(safe)
    return line.getvalue().encode()


def _row(record: ReviewRecord, page: PageRecord, defect: DefectRecord | None) -> list[object]:
    models = " ".join(f"{model}={version}" for model, version in record.model_versions.items())
    head: list[object] = [
        record.source, record.path, page.page, record.sha256, record.reviewed_utc, record.recipe.name,
        record.recipe.id, models, page.image_score, page.gate_threshold, page.verdict,
        page.domain,
    ]  # fmt: skip
    flags = " ".join(flag.name for flag in page.quality.flags)
    if defect is None:
        return [*head, *[None] * (len(LOT_COLUMNS) - len(head) - 6), record.revision, flags]
    verdict = defect.verdict
    nearest = ([near.label for near in verdict.nearest] + [None, None])[:2]
    return [
        *head, defect.defect_id, verdict.kind, verdict.label, verdict.class_code, verdict.confidence, *nearest,
        *defect.box_xyxy, defect.area_px, defect.area_nm2, defect.peak_score, record.revision,
        flags,
    ]  # fmt: skip


_HEADER = _csv_line(LOT_COLUMNS)
