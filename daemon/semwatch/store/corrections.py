"""People's verdicts in a result, on plain records: put in, and carried over where an image is judged again."""

from collections.abc import Sequence
from dataclasses import dataclass

from semwatch.defects import Box
from semwatch.errors import ConfigError
from semwatch.store.review_record import DefectRecord, HumanRecord, MissedRecord, PageRecord, ReviewRecord

SAME_IOU = 0.5
"""Two boxes of one page are of one defect where they share this much of their union."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What a person says of one place of an image."""

    page: int
    """0-based."""
    label: str | None
    """Class name; None: it is no defect, of a missed one: it is not there after all."""
    defect_id: int | None = None
    """Of a defect of the result; None: of one that the line has missed."""
    box_xyxy: Box | None = None
    """Of a missed one: half-open, in pixels of the page as read."""


def corrected(record: ReviewRecord, given: Sequence[Correction], *, by: str, utc: str) -> ReviewRecord:
    """Put people's verdicts into a result, in their order; a later one of the same defect takes the place of the first.

    Raises:
        ConfigError: there is no such page or defect, or a box lies outside the page.
    """
    pages = {page.page: page for page in record.pages}
    for one in given:
        page = pages.get(one.page)
        if page is None:
            raise ConfigError(f"{record.path} has no page {one.page}; its pages are {_listed(sorted(pages))}")
        if one.defect_id is not None:
            pages[one.page] = _with_verdict(
                record.path, page, one.defect_id, HumanRecord(label=one.label, by=by, utc=utc)
            )
        elif one.box_xyxy is not None:
            pages[one.page] = _with_missed(record.path, page, one.box_xyxy, one.label, by, utc)
    return record.model_copy(update={"pages": tuple(pages[page.page] for page in record.pages)})


def carried(before: ReviewRecord, after: ReviewRecord) -> ReviewRecord:
    """Carry people's verdicts from a result into a later one of the same content.

    A verdict goes to the defect whose box is most like the one that was judged, from ``SAME_IOU`` on. Where there is
    none, a defect that a person named is one that the later review has missed; what is no defect and is found no more
    needs no verdict. A missed one that is found now is judged with its label.
    """
    pages = {page.page: page for page in after.pages}
    for old in before.pages:
        page = pages.get(old.page)
        if page is None:
            continue
        judged = [(d.box_xyxy, d.human) for d in old.defects if d.human is not None]
        judged += [(m.box_xyxy, HumanRecord(label=m.label, by=m.by, utc=m.utc)) for m in old.missed]
        for box, human in judged:
            defect = max(page.defects, key=lambda d: iou(d.box_xyxy, box), default=None)
            if defect is not None and iou(defect.box_xyxy, box) >= SAME_IOU:
                page = _with_verdict(after.path, page, defect.defect_id, human)
            elif human.label is not None:
                page = _with_missed(after.path, page, box, human.label, human.by, human.utc)
        pages[old.page] = page
    return after.model_copy(update={"pages": tuple(pages[page.page] for page in after.pages)})


def without_people(record: ReviewRecord) -> ReviewRecord:
    """The result as the models alone have it."""
    pages = [
        page.model_copy(
            update={
                "missed": (),
                "defects": tuple(defect.model_copy(update={"human": None}) for defect in page.defects),
            }
        )
        for page in record.pages
    ]
    return record.model_copy(update={"pages": tuple(pages)})


def iou(one: Box, other: Box) -> float:
    """Share of their union that two half-open boxes (x0, y0, x1, y1) have in common, 0 to 1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(one) + _area(other) - shared)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _with_verdict(path: str, page: PageRecord, defect_id: int, human: HumanRecord) -> PageRecord:
    ids = [defect.defect_id for defect in page.defects]
    if defect_id not in ids:
        has = f"its defects are {_listed(ids)}" if ids else "none was found there: --missed x,y,w,h adds one"
        raise ConfigError(f"{path} has no defect {defect_id} on page {page.page}; {has}")

    def judged(defect: DefectRecord) -> DefectRecord:
        return defect.model_copy(update={"human": human}) if defect.defect_id == defect_id else defect

    return page.model_copy(update={"defects": tuple(map(judged, page.defects))})


def _with_missed(path: str, page: PageRecord, box: Box, label: str | None, by: str, utc: str) -> PageRecord:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= page.width_px and 0 <= y0 < y1 <= page.height_px):
        raise ConfigError(
            f"a box {x0},{y0},{x1 - x0},{y1 - y0} (x,y,w,h) does not lie inside page {page.page} of {path}, which has"
            f" {page.width_px} x {page.height_px} px"
        )
    others = [one for one in page.missed if iou(one.box_xyxy, box) < SAME_IOU]
    if label is None and len(others) == len(page.missed):
        raise ConfigError(f"{path}: nobody said that a defect was missed there on page {page.page}")
    new = [] if label is None else [MissedRecord(box_xyxy=box, label=label, by=by, utc=utc)]
    return page.model_copy(update={"missed": (*others, *new)})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
