"""The format of a result: the models are its one source of truth, ``schemas/`` holds the JSON schema made from them."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from semwatch.defects import (
    NO_IMAGE,
    Box,
    Defect,
    Domain,
    GateSource,
    PageReview,
    Quality,
    QualityName,
    Reference,
    Review,
    Verdict,
    VerdictKind,
)
from semwatch.errors import ImageError
from semwatch.system import text
from semwatch.system.faults import first_fault

SCHEMA_VERSION: Final = 1
SCHEMA_PATH = Path(__file__).with_name("schemas") / "review.schema.json"


def _six_digits(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


Number = Annotated[float, BeforeValidator(_six_digits)]
Share = Annotated[Number, Field(ge=0, le=1)]
PageVerdict = Literal["defect-free", "defects", "no-image"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RecipeRecord(_Record):
    """The recipe that judged."""

    name: str
    id: str = Field(description="Content hash of the recipe.")


class NeighbourRecord(_Record):
    """One class as seen from a defect."""

    label: str
    probability: Share
    p_value: Share = Field(description="Conformal p-value: how ordinary this defect would be as a member of the class.")


class VerdictRecord(_Record):
    """What was said of one defect."""

    kind: VerdictKind
    label: str | None = Field(description="Class name of a known, novel or defect-free verdict, else null.")
    confidence: Share = Field(
        description="How much speaks for what the verdict claims. With a label: its probability among the classes that "
        "fit, never below what the recipe asks for it. Non-decidable: the same of the favourite, always below. "
        "Unknown: one minus the smaller of probability and p-value of the nearest class."
    )
    class_code: int | None = Field(description="The fab's code, where the recipe has one.")
    nearest: tuple[NeighbourRecord, ...] = Field(
        description="The nearest classes, nearest first: those that fit by probability, then the others; of an unknown "
        "all by the smaller of probability and p-value."
    )


class HumanRecord(_Record):
    """What a person said of one defect; the last counts, the audit log has all."""

    label: str | None = Field(description="Class name; null: it is no defect.")
    by: str = Field(description="Login name of the person.")
    utc: str


class MissedRecord(_Record):
    """A defect that a person saw and the line did not find."""

    box_xyxy: Box = Field(description="Half-open, in pixels of the page as read.")
    label: str = Field(description="Class name.")
    by: str = Field(description="Login name of the person.")
    utc: str


class DefectRecord(_Record):
    """One defect."""

    defect_id: Annotated[int, Field(ge=1, description="1-based within its page.")]
    box_xyxy: Box = Field(description="Half-open, in pixels of the page as read.")
    area_px: Annotated[int, Field(ge=0)]
    area_nm2: Number | None
    peak_score: Number
    crop_xyxy: Box = Field(description="Window shown to the encoder; may reach outside the page.")
    verdict: VerdictRecord
    human: HumanRecord | None = Field(
        default=None, description="A person's verdict beside the model's; null or absent: nobody gave one."
    )


class QualityFlagRecord(_Record):
    """One thing that is wrong with a page."""

    name: QualityName
    measure: Number = Field(description="In the flag's own unit.")
    limit: Number = Field(description="The recipe's limit that the measure lies beyond.")


class QualityRecord(_Record):
    """What was seen of a page before any model looked at it."""

    is_image: bool = Field(default=True, description="false: blank, or an info bar alone; no model was asked.")
    flags: tuple[QualityFlagRecord, ...] = Field(default=(), description="Empty where nothing is wrong.")


class GateRecord(_Record):
    """The gate that a page met."""

    threshold: Number
    source: GateSource = Field(
        description="recipe: its own gate.threshold; detector: its normal images at the recipe's false alarm rate; "
        "stream: proposed by the scores of the recipe's own stream, where gate.self_calibration is use; reference: the "
        "recipe's limit of the difference from it."
    )


class ReferenceRecord(_Record):
    """The picture of the same place of another die that a page was compared with, or why it was not."""

    name: str = Field(description="File name of the reference, or the page of the same file.")
    used: bool = Field(description="True: image_score, gate_threshold and peak_score are of the difference.")
    reason: str = Field(description="Why the page was judged without it; empty where it was used.")
    shift_px: tuple[Number, Number] | None = Field(
        description="A point (x, y) in the middle of the field lies in the reference at (x + dx, y + dy)."
    )
    correlation: Annotated[Number, Field(ge=-1, le=1)] | None = Field(
        description="Of the gradients of both after alignment."
    )


class PageRecord(_Record):
    """One page of the image file."""

    page: Annotated[int, Field(ge=0, description="0-based in its file.")]
    width_px: int
    height_px: int
    field_xyxy: Box = Field(description="The page without info bars.")
    pixel_nm: Number | None
    vendor: str | None
    image_score: Number | None = Field(description="Raw score; null where the page holds no image.")
    gate_threshold: Number = Field(description="The page is searched for defects only if its score lies above this.")
    domain: Domain = Field(
        default="not judged",
        description="Whether the field looks like those of the processes whose normal images the detector knows; not "
        "judged: the detector cannot say, or the result is of an older release.",
    )
    domain_p: Share | None = Field(
        default=None, description="The p-value that domain was decided by, null where the detector gives none."
    )
    gate: GateRecord | None = Field(
        default=None,
        description="The same threshold, and where it came from; null in results of older releases.",
    )
    verdict: PageVerdict = Field(
        description="defect-free: the gate stayed shut, or nothing was found, or the head called all of it "
        "defect-free. no-image: there is nothing to judge."
    )
    defects: tuple[DefectRecord, ...]
    quality: QualityRecord = Field(
        default=QualityRecord(), description="Whether there is an image, and a good one; absent in older results."
    )
    reference: ReferenceRecord | None = Field(
        default=None, description="Null where the recipe names no reference, and in results of older releases."
    )
    missed: tuple[MissedRecord, ...] = Field(
        default=(), description="Defects that people saw and the line did not find; absent in older results."
    )


class ReviewRecord(_Record):
    """Everything said of one image file."""

    schema_version: Literal[1] = SCHEMA_VERSION
    site: str = Field(
        default="", description="Name of the site, unique in the fab; empty in results of older releases."
    )
    source: str = Field(description="Name of the tool.")
    path: str = Field(description="POSIX, relative to the drop folder; bytes that are not UTF-8 stand as \\xNN.")
    sha256: Sha256
    reviewed_utc: str
    revision: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="1: as first reviewed. Higher: verdicts were read again by a later head, or the image was judged "
        "again under another recipe or other models; revision r lies beside as <image>.r<r>.review.json. The overlays "
        "are those of the last whole review.",
    )
    revised_utc: str | None = Field(default=None, description="When this revision was made; null for a review.")
    recipe: RecipeRecord
    model_versions: dict[str, int] = Field(
        description="By model; models that were not asked are absent. In a revision, head is the one that read again."
    )
    model_hashes: dict[str, str] = Field(
        default={},
        description="By model, the content hash of that version: the same model has the same hash on every machine. "
        "Empty in results of older releases.",
    )
    pages: tuple[PageRecord, ...]
    timings_ms: dict[str, Number] = Field(description="Milliseconds by stage, in the order of the line.")


class ReasonRecord(_Record):
    """Why an image is in quarantine."""

    schema_version: Literal[1] = SCHEMA_VERSION
    source: str
    path: str
    sha256: str
    size: int = Field(description="Bytes.")
    quarantined_utc: str
    attempts: int
    reason: str
    what_to_do: str


class DuplicateRecord(_Record):
    """Which image has the content of this one, and was reviewed or refused in its place."""

    schema_version: Literal[1] = SCHEMA_VERSION
    source: str
    path: str
    sha256: str
    noted_utc: str
    original: str = Field(description="Path of the other image.")
    result: str | None = Field(description="Its review.json, relative to the results; null: it is in quarantine.")


def to_record(
    review: Review,
    class_codes: Mapping[str, int] | None = None,
    unknown_code: int | None = None,
    non_decidable_code: int | None = None,
) -> ReviewRecord:
    """Say a review in the words of the JSON; floats are rounded to 6 significant digits.

    Args:
        review: what to say.
        class_codes: the fab's codes by label; labels that are not here have no code.
        unknown_code: see ``class_code``.
        non_decidable_code: see ``class_code``.

    Raises:
        ImageError: a value is not finite or out of its range; the message names it.
    """
    code_of = partial(
        class_code,
        class_codes=class_codes or {},
        unknown_code=unknown_code,
        non_decidable_code=non_decidable_code,
    )
    try:
        return ReviewRecord(
            site=review.site,
            source=printable(review.source),
            path=printable(review.path),
            sha256=review.sha256,
            reviewed_utc=review.reviewed_utc,
            recipe=RecipeRecord(name=review.recipe_name, id=review.recipe_id),
            model_versions=dict(review.model_versions),
            model_hashes=dict(review.model_hashes),
            pages=tuple(_page_record(page, code_of) for page in review.pages),
            timings_ms={stage: float(ms) for stage, ms in review.timings_ms.items()},
        )
    except ValidationError as error:
        raise ImageError(f"{printable(review.path)}: the review makes no sense: {first_fault(error)}") from error


class Judged(Protocol):
    """A verdict, of a model or of a lot."""

    @property
    def kind(self) -> VerdictKind: ...  # noqa: D102
    @property
    def label(self) -> str | None: ...  # noqa: D102


def class_code(
    verdict: Judged, *, class_codes: Mapping[str, int], unknown_code: int | None, non_decidable_code: int | None
) -> int | None:
    """The fab's code of a verdict, None where it has none.

    Args:
        verdict: of a defect.
        class_codes: codes by label; they go before the others.
        unknown_code: of an unknown defect, and of one of a found class without a code.
        non_decidable_code: of a non-decidable defect.
    """
    by_kind = {"unknown": unknown_code, "novel": unknown_code, "non-decidable": non_decidable_code}
    return class_codes.get(verdict.label or "", by_kind.get(verdict.kind))


def _page_record(page: PageReview, code_of: Callable[[Verdict], int | None]) -> PageRecord:
    micrograph = page.micrograph
    height_px, width_px = micrograph.pixels.shape
    return PageRecord(
        page=micrograph.page,
        width_px=width_px,
        height_px=height_px,
        field_xyxy=_box(micrograph.field_xyxy),
        pixel_nm=None if micrograph.pixel_nm is None else float(micrograph.pixel_nm),
        vendor=micrograph.vendor,
        image_score=None if page.score_map is None else float(page.score_map.raw_score),
        gate_threshold=float(page.gate_threshold),
        domain=page.domain,
        domain_p=None if page.score_map is None or page.score_map.domain_p is None else float(page.score_map.domain_p),
        gate=GateRecord(threshold=float(page.gate_threshold), source=page.gate_source),
        verdict=page_verdict([defect.verdict.kind for defect in page.defects], is_image=page.quality.is_image),
        defects=tuple(_defect_record(defect, code_of) for defect in page.defects),
        quality=_quality_record(page.quality),
        reference=None if page.reference is None else _reference_record(page.reference),
    )


def _reference_record(reference: Reference) -> ReferenceRecord:
    return ReferenceRecord(
        name=printable(reference.name),
        used=reference.used,
        reason=printable(reference.reason),
        shift_px=reference.shift_px,
        correlation=reference.correlation,
    )


def _quality_record(quality: Quality) -> QualityRecord:
    flags = (
        QualityFlagRecord(name=flag.name, measure=float(flag.measure), limit=float(flag.limit))
        for flag in quality.flags
    )
    return QualityRecord(is_image=quality.is_image, flags=tuple(flags))


def page_verdict(kinds: Sequence[VerdictKind], *, is_image: bool = True) -> PageVerdict:
    """Say of a page what the verdicts on its defects come to."""
    if not is_image:
        return NO_IMAGE
    return "defect-free" if all(kind == "defect-free" for kind in kinds) else "defects"


def _defect_record(defect: Defect, code_of: Callable[[Verdict], int | None]) -> DefectRecord:
    return DefectRecord(
        defect_id=defect.defect_id,
        box_xyxy=_box(defect.box_xyxy),
        area_px=int(defect.area_px),
        area_nm2=None if defect.area_nm2 is None else float(defect.area_nm2),
        peak_score=float(defect.peak_score),
        crop_xyxy=_box(defect.crop_xyxy),
        verdict=verdict_record(defect.verdict, code_of(defect.verdict)),
    )


def verdict_record(verdict: Verdict, class_code: int | None) -> VerdictRecord:
    """Say one verdict in the words of the JSON."""
    nearest = tuple(
        NeighbourRecord(label=near.label, probability=float(near.probability), p_value=float(near.p_value))
        for near in verdict.nearest
    )
    return VerdictRecord(
        kind=verdict.kind,
        label=verdict.label,
        confidence=float(verdict.confidence),
        class_code=class_code,
        nearest=nearest,
    )


def _box(box_xyxy: Box) -> Box:
    x0, y0, x1, y1 = (int(edge) for edge in box_xyxy)
    return x0, y0, x1, y1


def schema_text() -> str:
    """Return the published JSON schema, made from the models.

    After a change of the models:
    ``python -c 'from semwatch.store import review_record as r; r.SCHEMA_PATH.write_text(r.schema_text())'``.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | ReviewRecord.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


printable = text.utf8
"""The name that records give it."""
