"""What became of the defects that a KLARF names, and the KLARF that says so: straight functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from semwatch import klarf
from semwatch.intake.manifest import NamedImage, images_of
from semwatch.klarf import Document, KlarfError
from semwatch.klarf.views import Defect, Wafer
from semwatch.line.class_codes import ClassCodes
from semwatch.line.defect_rule import ImagePage, LotVerdict, verdict_of
from semwatch.settings.recipe import Klarf, Recipe
from semwatch.store.lot_record import LotDefect, LotRecord, LotWafer
from semwatch.store.manifests import Manifest, match_key
from semwatch.store.review_record import RecipeRecord, ReviewRecord, class_code, printable

Codes = Callable[[int | None], ClassCodes]
"""Class codes for the version of the head that judged."""


@dataclass(frozen=True, slots=True)
class ReviewedWafer:
    """A wafer of the KLARF and what became of its defects, in the order of the file."""

    wafer_id: str | None
    slot: int | None
    defects: tuple[LotDefect, ...]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A KLARF to write."""

    part: str
    """What its name has beside the name of the original: empty, or the wafer of a partial form."""
    data: bytes


@dataclass(frozen=True, slots=True)
class Written:
    """The KLARFs to write."""

    files: tuple[WrittenFile, ...]
    fault: str
    """Why there are none; empty where there is no fault."""
    codes_without_class: tuple[int, ...]


# --- verdicts --------------------------------------------------------------------------------------------------------


def judged(
    document: Document, folder: str, outcomes: Mapping[str, ReviewRecord | str], recipe: Recipe, codes: Codes
) -> list[ReviewedWafer]:
    """Say of every defect what it is, or why nobody knows.

    Args:
        document: the KLARF.
        folder: of it, relative to the drop folder.
        outcomes: by key of each image file, its result or why there is none.
        recipe: has the rule and the class table.
        codes: class codes.
    """
    return [
        ReviewedWafer(
            wafer.id, wafer.slot, tuple(_judged(defect, folder, outcomes, recipe, codes) for defect in wafer.defects)
        )
        for wafer in document.wafers
    ]


def _judged(
    defect: Defect, folder: str, outcomes: Mapping[str, ReviewRecord | str], recipe: Recipe, codes: Codes
) -> LotDefect:
    images = images_of(defect, folder, recipe.klarf)
    pages, heads, reasons = [], {}, []
    for image in images:
        if image.role != "test":
            continue
        found = _page(image, outcomes.get(match_key(image.name), f"the image {image.name} has not come"))
        if isinstance(found, str):
            reasons.append(found)
        else:
            page, heads[image.name] = found
            pages.append(page)
    if not pages:
        reasons = reasons or [_why_no_image(defect, images)]
        return _without(defect, "; ".join(dict.fromkeys(reasons)), recipe.klarf.no_verdict_code)
    verdict = verdict_of(pages, recipe.klarf.defect_rule, recipe.classes, offset_nm=_offset_nm(defect, recipe.klarf))
    return _with(defect, verdict, codes(heads[verdict.image]))


def _page(image: NamedImage, outcome: ReviewRecord | str) -> tuple[ImagePage, int | None] | str:
    """The judged page of an image and the head that judged it, or why there is none."""
    if isinstance(outcome, str):
        return outcome
    page = next((page for page in outcome.pages if page.page == image.page), None)
    if page is None:
        return f"the image {image.name} has no page {image.page} that was judged"
    if not page.quality.is_image:
        return f"page {image.page} of {image.name} holds no image"
    return ImagePage(image.name, page), outcome.model_versions.get("head")


def _why_no_image(defect: Defect, images: Sequence[NamedImage]) -> str:
    if images:
        return "the KLARF names no image of it that is to be judged"
    return "the KLARF names no file for its images" if defect.images else "the KLARF names no image of it"


def _with(defect: Defect, verdict: LotVerdict, codes: ClassCodes) -> LotDefect:
    code = class_code(verdict, **codes)
    named = verdict.label or verdict.kind
    return LotDefect(
        id=defect.id,
        verdict=verdict.kind,
        label=verdict.label,
        code=code,
        by=verdict.by,
        confidence=verdict.confidence,
        image=verdict.image,
        page=verdict.page,
        defect_id=verdict.defect_id,
        reason="" if code is not None else f"the recipe has no code for {named}",
    )


def _without(defect: Defect, reason: str, code: int | None) -> LotDefect:
    return LotDefect(
        id=defect.id, verdict=None, label=None, code=code, by=None, confidence=None, image=None, page=None,
        defect_id=None, reason=printable(reason),
    )  # fmt: skip


def _offset_nm(defect: Defect, settings: Klarf) -> tuple[float, float] | None:
    """Where the defect lies from the centre of its image, nm; None where the file does not say it in numbers."""
    try:
        x, y = (defect.number(column) for column in settings.offset_columns)
    except KlarfError:
        return None
    if x is None or y is None:
        return None
    unit_nm = 1000 / defect.wafer.scope.per_um
    return x * unit_nm, y * unit_nm


# --- the KLARF -----------------------------------------------------------------------------------------------------


def written(document: Document, reviewed: Sequence[ReviewedWafer], recipe: Recipe) -> Written:
    """Make the KLARFs that say so; only the target column, and where asked the table of classes, differ."""
    settings = recipe.klarf
    codes = [{one.id: one.code for one in wafer.defects if one.code is not None} for wafer in reviewed]
    names = {
        one.code: one.label or one.verdict or "no verdict"
        for wafer in reviewed
        for one in wafer.defects
        if one.code is not None
    }
    known = {number for wafer in document.wafers for number in wafer.classes}
    without = tuple(sorted(names.keys() - known))
    if settings.form == "none" or not document.wafers:
        return Written((), "", without)
    try:
        if settings.form == "partial":
            return Written(tuple(_partial(document, codes, settings)), "", without)
        edited = _full(document, codes, settings)
        if settings.extend_lookup:
            edited, without = _extended(edited, names)
        return Written((WrittenFile("", bytes(edited)),), "", without)
    except KlarfError as error:
        return Written((), str(error), without)


def _full(document: Document, codes: Sequence[Mapping[int, int]], settings: Klarf) -> Document:
    for n, of_wafer in enumerate(codes):
        wafer = document.wafers[n]  # every edit gives new ones
        if not wafer.tables or not len(wafer.defects):
            continue
        if any(table.index(settings.target_column) is not None for table in wafer.tables):
            if of_wafer:
                values = _as_column_holds(wafer, settings.target_column, of_wafer)
                document = klarf.set_column(document, wafer, settings.target_column, values)
        else:
            default = 0 if settings.no_verdict_code is None else settings.no_verdict_code
            document = klarf.add_column(document, wafer, settings.target_column, of_wafer, default=default)
    return document


def _as_column_holds(wafer: Wafer, column: str, codes: Mapping[int, int]) -> Mapping[int, int | str]:
    """Numbers, or texts where the file says that its column holds texts."""
    table = next(table for table in wafer.tables if table.index(column) is not None)
    index = table.index(column)
    of = table.columns.all[index or 0]
    if of.type and of.kind != "number":
        return {defect_id: str(code) for defect_id, code in codes.items()}
    return codes


def _partial(document: Document, codes: Sequence[Mapping[int, int]], settings: Klarf) -> list[WrittenFile]:
    has_several = len(document.wafers) > 1
    return [
        WrittenFile(
            f".w{n + 1}" if has_several else "", bytes(klarf.partial(document, wafer, settings.target_column, of_wafer))
        )
        for n, (wafer, of_wafer) in enumerate(zip(document.wafers, codes, strict=True))
    ]


def _extended(document: Document, names: Mapping[int, str]) -> tuple[Document, tuple[int, ...]]:
    """Add what the table of classes of each lot lacks; return what could not be added as well."""
    left: set[int] = set()
    for n in range(len(document.lots)):
        lot = document.lots[n]
        if not lot.wafers:
            continue
        known = {number for wafer in lot.wafers for number in wafer.classes}
        try:
            document = klarf.add_classes(document, lot, {c: name for c, name in names.items() if c not in known})
        except KlarfError:
            left |= names.keys() - known
    return document, tuple(sorted(left))


# --- the record ------------------------------------------------------------------------------------------------------


def why(manifest: Manifest, before: LotRecord | None, reviewed: Sequence[ReviewedWafer], *, is_due: bool) -> str:
    """Say in words what makes this revision.

    Args:
        manifest: of the lot.
        before: what the revision before said; None where there is none, or it was taken away.
        reviewed: what this one says.
        is_due: images had not come by the deadline.
    """
    if manifest.revision == 0:
        return "the deadline has passed" if is_due else "every defect has a verdict or a reason"
    if before is not None and before.sha256 != manifest.sha256:
        return "another KLARF came under the same name"
    if before is None:
        return "something has changed"
    old = {(n, one.id): _essence(one) for n, wafer in enumerate(before.wafers) for one in wafer.defects}
    new = {(n, one.id): _essence(one) for n, wafer in enumerate(reviewed) for one in wafer.defects}
    changed = [at for at, one in new.items() if old.get(at) != one]
    if not changed:
        return "the recipe writes otherwise"
    by_people = sum(new[at][2] == "person" for at in changed)
    people = f", {by_people} by people" if by_people else ""
    which = "1 defect says" if len(changed) == 1 else f"{len(changed)} defects say"
    return f"{which} something else than in revision {before.revision}{people}"


def _essence(one: LotDefect) -> tuple[str | None, str | None, str | None, int | None, str]:
    return one.verdict, one.label, one.by, one.code, one.reason


def record(
    manifest: Manifest, recipe: Recipe, reviewed: Sequence[ReviewedWafer], written: Written, *, site: str,
    revision: int, why: str, now_utc: str, names: Sequence[str], missing: Sequence[str], late: Sequence[str],
) -> LotRecord:  # fmt: skip
    """Say all of it in the words of the JSON."""
    return LotRecord(
        site=site,
        source=manifest.source,
        path=printable(manifest.path),
        sha256=manifest.sha256,
        lot_id=manifest.about.get("lot_id"),
        step_id=manifest.about.get("step_id"),
        device_id=manifest.about.get("device_id"),
        recipe=RecipeRecord(name=recipe.name, id=recipe.id),
        revision=revision,
        why=why,
        taken_utc=manifest.taken_utc,
        due_utc=manifest.due_utc,
        written_utc=now_utc,
        target_column=recipe.klarf.target_column,
        klarf=tuple(names),
        klarf_fault=written.fault,
        codes_without_class=written.codes_without_class,
        missing=tuple(missing),
        late=tuple(late),
        wafers=tuple(LotWafer(wafer_id=one.wafer_id, slot=one.slot, defects=one.defects) for one in reviewed),
    )


def counts(record: LotRecord) -> dict[str, int]:
    """The same in numbers."""
    defects = [one for wafer in record.wafers for one in wafer.defects]
    return {
        "defects": len(defects),
        "verdicts": sum(one.verdict is not None for one in defects),
        "by_people": sum(one.by == "person" for one in defects),
        "without_verdict": sum(one.verdict is None for one in defects),
        "without_code": sum(one.verdict is not None and one.code is None for one in defects),
        "missing": len(record.missing),
        "late": len(record.late),
    }
