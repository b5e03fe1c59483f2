"""Which verdict is the one of a defect that a KLARF names: one rule, here alone.

Candidates are what the images of the defect show: defects that the line found, and those that people say it missed.
What a person called no defect is none. Where a person has named one, only what people have named counts: their word
wins. What the head called defect-free counts only where there is nothing else. Of what is left, the rule takes one:

    nearest_centre       to the centre of its field, in units of the field's sides
    nearest_coordinate   to the place that the KLARF gives, from the centre of its field; as nearest_centre where the
                         file or the image does not say enough
    largest              of the largest area
    worst                a class of interest before what nobody could name, that before nuisance; then the highest score

Ties go to the larger score, then to the one that was found first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from semwatch.defects import DEFECT_FREE, Box, VerdictKind
from semwatch.settings.recipe import DefectRule, KnownClass
from semwatch.store.review_record import PageRecord


@dataclass(frozen=True, slots=True)
class ImagePage:
    """A judged page of a defect's image."""

    image: str
    """POSIX, relative to the drop folder."""
    page: PageRecord


@dataclass(frozen=True, slots=True)
class LotVerdict:
    """What is said of a defect of a lot."""

    kind: VerdictKind
    label: str | None
    """Class name; None: unknown or non-decidable."""
    by: Literal["model", "person"]
    image: str
    page: int
    defect_id: int | None
    """Of the defect on that page; None: a person says that the line missed it, or there is none."""
    confidence: float | None
    """Of the model; None where a person judged, or nothing was found."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    at: ImagePage
    box_xyxy: Box
    area_px: float
    score: float
    verdict: LotVerdict


def verdict_of(
    pages: Sequence[ImagePage],
    rule: DefectRule,
    classes: Mapping[str, KnownClass],
    *,
    offset_nm: tuple[float, float] | None = None,
) -> LotVerdict:
    """Say what the defect is that these pages show; one at least must hold an image.

    Args:
        pages: judged pages of the images that show it.
        rule: of the recipe.
        classes: the recipe's class table; a class that is not there is of interest.
        offset_nm: (x, y) of the defect from the centre of its image, y upwards; None: the KLARF does not say.
    """
    shown = [one for one in pages if one.page.quality.is_image]
    found = [candidate for one in shown for candidate in _candidates(one)]
    by_people = [one for one in found if one.verdict.by == "person"]
    named = by_people or [one for one in found if one.verdict.kind != DEFECT_FREE] or found
    if not named:
        first = shown[0]
        is_judged = any(d.human is not None for one in shown for d in one.page.defects)
        by: Literal["model", "person"] = "person" if is_judged else "model"
        return LotVerdict("defect-free", DEFECT_FREE, by, first.image, first.page.page, None, None)
    return min(named, key=lambda one: (*_order(one, rule, classes, offset_nm), -one.score)).verdict


def _candidates(one: ImagePage) -> list[_Candidate]:
    page, found = one.page, []
    for defect in page.defects:
        human, verdict = defect.human, defect.verdict
        at = one.image, page.page, defect.defect_id
        if human is None:
            given = LotVerdict(verdict.kind, verdict.label, "model", *at, verdict.confidence)
        elif human.label is not None:
            given = LotVerdict("known", human.label, "person", *at, None)
        else:
            continue
        found.append(_Candidate(one, defect.box_xyxy, defect.area_px, defect.peak_score, given))
    for missed in page.missed:
        x0, y0, x1, y1 = missed.box_xyxy
        given = LotVerdict("known", missed.label, "person", one.image, page.page, None, None)
        found.append(_Candidate(one, missed.box_xyxy, (x1 - x0) * (y1 - y0), 0.0, given))
    return found


def _order(
    one: _Candidate, rule: DefectRule, classes: Mapping[str, KnownClass], offset_nm: tuple[float, float] | None
) -> tuple[float, ...]:
    """What the rule takes the smallest of."""
    match rule:
        case "largest":
            return (-one.area_px,)
        case "worst":
            return (_rank(one.verdict, classes),)
        case "nearest_coordinate":
            return (_distance(one, offset_nm),)
        case "nearest_centre":
            return (_distance(one, None),)


def _rank(verdict: LotVerdict, classes: Mapping[str, KnownClass]) -> int:
    if verdict.kind == DEFECT_FREE:
        return 3
    if verdict.label is None:
        return 1
    known = classes.get(verdict.label)
    return 0 if known is None or known.doi else 2


def _distance(one: _Candidate, offset_nm: tuple[float, float] | None) -> float:
    """From the middle of its box to the place that is meant, in sides of the field."""
    left, top, right, bottom = one.at.page.field_xyxy
    x0, y0, x1, y1 = one.box_xyxy
    at_x, at_y = (left + right) / 2, (top + bottom) / 2
    pixel_nm = one.at.page.pixel_nm
    if offset_nm is not None and pixel_nm is not None:
        at_x, at_y = at_x + offset_nm[0] / pixel_nm, at_y - offset_nm[1] / pixel_nm
    dx = ((x0 + x1) / 2 - at_x) / (right - left)
    dy = ((y0 + y1) / 2 - at_y) / (bottom - top)
    return math.hypot(dx, dy)
