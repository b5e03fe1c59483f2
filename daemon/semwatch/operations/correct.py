"""A person's word on a result: who says what is on record first, then it stands beside the model's verdict."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from semwatch.defects import DEFECT_FREE, Micrograph
from semwatch.errors import ImageError
from semwatch.line.marked import Encoded
from semwatch.operations import corrected_crops, labels
from semwatch.operations.corrected_crops import Crop, Place
from semwatch.settings.site import Site
from semwatch.store import corrections, results
from semwatch.store.corrections import Correction
from semwatch.store.ledger import LEDGER, Ledger, OutboxItem, Work
from semwatch.store.result_index import INDEX, open_index, stamp_of
from semwatch.store.review_record import DefectRecord, ReviewRecord
from semwatch.streams import records
from semwatch.system.clock import utc_now
from semwatch.system.login import login_name


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a person's word has changed."""

    source: str
    path: str
    result: Path
    by: str
    changes: tuple[dict[str, object], ...]
    """As in the audit log: page, defect_id or box_xyxy, model, from and to."""
    without_crop: str = ""
    """Why learning gets none of what needs one, or not of all; "" where it does."""


def correct(site: Site, work: Work, given: Sequence[Correction], *, is_new_label: bool = False) -> Corrected:
    """Put a person's verdicts beside the model's: audit log, result, index, lot table, in this order.

    Args:
        site: where the result is.
        work: whose result it is.
        given: verdicts.
        is_new_label: labels that no model and no class table knows are taken.

    Raises:
        ConfigError: a label, defect, page or box is not there; the message names what is.
        ImageError: there is no whole result.
        ServiceUnavailable: the disk is away, or another writer does not end.
    """
    if not is_new_label:
        for one in given:
            labels.check(site, one.label)
    target = results.review_path(site.results_dir, work.source, work.path)
    if work.state == "QUARANTINED" or not target.exists():
        raise ImageError(f"there is no result of {work.source}/{work.path} to correct: `semwatch logs` says why")
    by, utc = login_name(), utc_now()
    crops, why_not = _crops(site, work, results.read(target), given)
    changes: list[dict[str, object]] = []
    with Ledger(site.state_dir / LEDGER, exclusive=False) as ledger:

        def edit(before: ReviewRecord) -> ReviewRecord:
            if before.sha256 != work.sha256:
                raise ImageError(f"{target} is of other content now: `semwatch logs` says which")
            after = corrections.corrected(before, given, by=by, utc=utc)
            changes.extend(_change(before, one) for one in given)
            origin = {"event": "corrected", "utc": utc, "by": by, "source": before.source, "path": before.path}
            audit = {**origin, "sha256": before.sha256, "revision": before.revision, "changes": changes}
            messages = messages_for_learning(before, given, crops, by=by, utc=utc) if site.redis is not None else ()
            # Said before and after, so that a lot with a KLARF is looked at again wherever this process ends.
            ledger.note(audit=audit, outbox=list(messages), changed=(work.source, work.sha256))
            return after

        after = results.change(target, edit)
        lot = target.parent.relative_to(site.results_dir).as_posix()
        ledger.lot_rows.write_anew(lot)
        ledger.note(audit=None, changed=(work.source, work.sha256))
    results.show_people(target)
    with open_index(site.state_dir / INDEX) as index:
        index.put(lot, [(target.name, stamp_of(target), after)])
    return Corrected(work.source, work.path, target, by, tuple(changes), why_not)


def _crops(
    site: Site, work: Work, result: ReviewRecord, given: Sequence[Correction]
) -> tuple[Mapping[Place, Crop], str]:
    """Crops of those defects that are not in the queue with theirs: named, dismissed, or missed by the line."""
    if site.redis is None:
        return {}, ""
    places = []
    for one in given:
        found = None if one.defect_id is None else _found(result, one)
        if found is not None and found.verdict.kind not in records.NO_CLASSES:
            places.append((one.page, found.box_xyxy))
        elif one.defect_id is None and one.label is not None and one.box_xyxy is not None:
            places.append((one.page, one.box_xyxy))
    return corrected_crops.cut(site, work, places)


def messages_for_learning(
    result: ReviewRecord, given: Sequence[Correction], crops: Mapping[Place, Crop], *, by: str, utc: str
) -> Iterator[OutboxItem]:
    """What leaves for learning with people's verdicts: a label of each, with its crop where there is one.

    Args:
        result: before them.
        given: verdicts on it.
        crops: by place.
        by: login name of the person.
        utc: when.
    """
    for one in given:
        found = None if one.defect_id is None else _defect(result, one)
        box = one.box_xyxy if found is None else found.box_xyxy
        assert box is not None, "of a missed defect the box is given"
        correction = records.Correction(
            id="",
            corrected_utc=utc,
            by=by,
            source=result.source,
            path=result.path,
            sha256=result.sha256,
            page=one.page,
            box_xyxy=box,
            label=one.label or DEFECT_FREE,
            defect_id=one.defect_id,
            site=result.site,
            was="" if found is None else _called(found),
        )
        if (crop := crops.get((one.page, box))) is not None:
            correction = _with_crop(correction, *crop)
        yield OutboxItem(*records.correction_message(correction))


def _with_crop(correction: records.Correction, seen: Encoded, page: Micrograph) -> records.Correction:
    candidate, encoder = seen.candidate, seen.encoder
    left, top, right, bottom = page.field_xyxy
    x0, y0, x1, y1 = candidate.window_xyxy
    return replace(
        correction,
        crop_xyxy=(x0 + left, y0 + top, x1 + left, y1 + top),
        area_px=candidate.region.area_px,
        field_short_px=min(right - left, bottom - top),
        model_versions={"encoder": encoder.version},
        model_hashes={"encoder": encoder.content_hash},
        features=seen.features,
        soft_mask=candidate.soft_mask,
        crop=candidate.crop,
        field_features=candidate.field_features,
        region_features=candidate.region_features,
    )


def confirmed(record: ReviewRecord, page: int | None = None) -> list[Correction]:
    """Verdicts that agree with the model on every defect that nobody has judged; those without a name are left out."""
    return [
        Correction(one.page, None if defect.verdict.kind == DEFECT_FREE else defect.verdict.label, defect.defect_id)
        for one in record.pages
        if page in (None, one.page)
        for defect in one.defects
        if defect.human is None and defect.verdict.label is not None
    ]


def _change(before: ReviewRecord, one: Correction) -> dict[str, object]:
    """One line of what changes, for people and for the audit log."""
    to = one.label or "not-a-defect"
    if one.defect_id is None:
        return {"page": one.page, "box_xyxy": one.box_xyxy, "model": None, "from": None, "to": to}
    defect = _defect(before, one)
    old = None if defect.human is None else defect.human.label or "not-a-defect"
    return {"page": one.page, "defect_id": one.defect_id, "model": _called(defect), "from": old, "to": to}


def _defect(result: ReviewRecord, one: Correction) -> DefectRecord:
    found = _found(result, one)
    assert found is not None, "a correction of what is not there has been refused"
    return found


def _found(result: ReviewRecord, one: Correction) -> DefectRecord | None:
    defects = (defect for page in result.pages if page.page == one.page for defect in page.defects)
    return next((defect for defect in defects if defect.defect_id == one.defect_id), None)


def _called(defect: DefectRecord) -> str:
    """What the model calls it."""
    return defect.verdict.label or defect.verdict.kind
