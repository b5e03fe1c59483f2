"""Which verdict is the one of a KLARF's defect."""

from typing import Any

import pytest

from semwatch.line.defect_rule import ImagePage, verdict_of
from semwatch.settings.recipe import KnownClass
from semwatch.store.review_record import DefectRecord, HumanRecord, MissedRecord, PageRecord, VerdictRecord

CLASSES = {"particle": KnownClass(code=10), "residue": KnownClass(code=30, doi=False)}


def defect(
    n: int, box: tuple[int, int, int, int], label: str | None = None, *, score: float = 1.0, human: Any = ...
) -> DefectRecord:
    kind = "defect-free" if label == "defect-free" else "unknown" if label is None else "known"
    return DefectRecord(
        defect_id=n,
        box_xyxy=box,
        area_px=(box[2] - box[0]) * (box[3] - box[1]),
        area_nm2=None,
        peak_score=score,
        crop_xyxy=box,
        verdict=VerdictRecord(kind=kind, label=label, confidence=0.9, class_code=None, nearest=()),
        human=None if human is ... else HumanRecord(label=human, by="ann", utc="2026-01-01T00:00:00Z"),
    )


def page(*defects: DefectRecord, pixel_nm: float | None = None, missed: tuple[MissedRecord, ...] = ()) -> ImagePage:
    """A field of 100 x 100 px under an info bar of 20 rows."""
    made = PageRecord(
        page=0, width_px=100, height_px=120, field_xyxy=(0, 0, 100, 100), pixel_nm=pixel_nm, vendor=None,
        image_score=1.0, gate_threshold=0.0, verdict="defects", defects=defects, missed=missed,
    )  # fmt: skip
    return ImagePage("lot/a.tif", made)


MIDDLE = defect(1, (48, 48, 52, 52), "residue", score=2.0)
CORNER = defect(2, (0, 0, 30, 30), "particle", score=3.0)
UNNAMED = defect(3, (60, 60, 70, 70), None, score=9.0)


@pytest.mark.parametrize(
    ("rule", "found"),
    [("nearest_centre", 1), ("nearest_coordinate", 1), ("largest", 2), ("worst", 2)],
)
def test_rule_takes_one_of_several(rule, found) -> None:
    given = verdict_of([page(CORNER, UNNAMED, MIDDLE)], rule, CLASSES)
    assert (given.defect_id, given.by, given.image) == (found, "model", "lot/a.tif")


def test_worst_takes_what_nobody_could_name_before_nuisance_and_then_the_highest_score() -> None:
    assert verdict_of([page(MIDDLE, UNNAMED)], "worst", CLASSES).label is None
    two = page(defect(1, (0, 0, 9, 9), "particle", score=1.0), defect(2, (0, 0, 9, 9), "particle", score=2.0))
    assert verdict_of([two], "worst", CLASSES).defect_id == 2


def test_coordinate_of_the_klarf_moves_the_place_that_is_meant() -> None:
    """y of a KLARF goes up, that of an image down: 20 nm a pixel, 300 nm to the right and 300 nm down."""
    shown = page(CORNER, UNNAMED, MIDDLE, pixel_nm=20.0)
    assert verdict_of([shown], "nearest_coordinate", CLASSES, offset_nm=(300.0, -300.0)).defect_id == 3
    assert verdict_of([shown], "nearest_coordinate", CLASSES, offset_nm=(300.0, 300.0)).defect_id == 1
    without_scale = page(CORNER, UNNAMED, MIDDLE)
    assert verdict_of([without_scale], "nearest_coordinate", CLASSES, offset_nm=(300.0, -300.0)).defect_id == 1


def test_defect_free_counts_only_where_there_is_nothing_else() -> None:
    free = defect(4, (49, 49, 51, 51), "defect-free")
    assert verdict_of([page(free, CORNER)], "nearest_centre", CLASSES).defect_id == 2
    assert verdict_of([page(free)], "nearest_centre", CLASSES).label == "defect-free"
    nothing = verdict_of([page()], "nearest_centre", CLASSES)
    assert (nothing.kind, nothing.label, nothing.by, nothing.defect_id) == ("defect-free", "defect-free", "model", None)


def test_word_of_a_person_wins_whatever_the_rule_says() -> None:
    named = defect(5, (90, 90, 99, 99), "residue", human="void")
    given = verdict_of([page(MIDDLE, CORNER, named)], "nearest_centre", CLASSES)
    assert (given.label, given.by, given.defect_id) == ("void", "person", 5)
    dismissed = defect(1, (48, 48, 52, 52), "residue", human=None)
    assert verdict_of([page(dismissed, CORNER)], "nearest_centre", CLASSES).defect_id == 2
    all_dismissed = verdict_of([page(dismissed)], "nearest_centre", CLASSES)
    assert (all_dismissed.label, all_dismissed.by) == ("defect-free", "person")
    missed = MissedRecord(box_xyxy=(10, 10, 20, 20), label="pit", by="ann", utc="2026-01-01T00:00:00Z")
    assert verdict_of([page(MIDDLE, missed=(missed,))], "nearest_centre", CLASSES).label == "pit"


def test_several_images_of_a_defect_are_judged_together() -> None:
    other = ImagePage("lot/b.tif", page(defect(1, (49, 49, 51, 51), "particle")).page)
    assert verdict_of([page(CORNER), other], "nearest_centre", CLASSES).image == "lot/b.tif"
