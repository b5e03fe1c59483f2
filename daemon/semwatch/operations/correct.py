"""A person's word on a result: who says what is on record first, then it stands beside the model's verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ImageError
from semwatch.operations import labels
from semwatch.operations.decide import login_name
from semwatch.settings.site import Site
from semwatch.store import corrections, results
from semwatch.store.corrections import Correction
from semwatch.store.ledger import LEDGER, Ledger, OutboxItem, Work
from semwatch.store.result_index import INDEX, open_index, stamp_of
from semwatch.store.review_record import ReviewRecord
from semwatch.system.clock import utc_now


@dataclass(frozen=True, slots=True)
class Corrected:
    """What a person's word has changed."""

    source: str
    path: str
    result: Path
    by: str
    changes: tuple[dict[str, object], ...]
    """As in the audit log: page, defect_id or box_xyxy, model, from and to."""


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
    changes: list[dict[str, object]] = []
    with Ledger(site.state_dir / LEDGER, exclusive=False) as ledger:

        def edit(before: ReviewRecord) -> ReviewRecord:
            if before.sha256 != work.sha256:
                raise ImageError(f"{target} is of other content now: `semwatch logs` says which")
            after = corrections.corrected(before, given, by=by, utc=utc)
            changes.extend(_change(before, one) for one in given)
            origin = {"event": "corrected", "utc": utc, "by": by, "source": before.source, "path": before.path}
            audit = {**origin, "sha256": before.sha256, "revision": before.revision, "changes": changes}
            ledger.note(audit=audit, outbox=messages_for_learning(before, given, by=by, utc=utc))
            return after

        after = results.change(target, edit)
        lot = target.parent.relative_to(site.results_dir).as_posix()
        ledger.lot_rows.write_anew(lot)
    with open_index(site.state_dir / INDEX) as index:
        index.put(lot, [(target.name, stamp_of(target), after)])
    return Corrected(work.source, work.path, target, by, tuple(changes))


def messages_for_learning(
    result: ReviewRecord,  # noqa: ARG001
    given: Sequence[Correction],  # noqa: ARG001
    *,
    by: str,  # noqa: ARG001
    utc: str,  # noqa: ARG001
) -> list[OutboxItem]:
    """What leaves for learning with people's verdicts: nothing, until the streams have a record for them."""
    return []


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
    page = next(page for page in before.pages if page.page == one.page)
    to = one.label or "not-a-defect"
    if one.defect_id is None:
        return {"page": one.page, "box_xyxy": one.box_xyxy, "model": None, "from": None, "to": to}
    defect = next(defect for defect in page.defects if defect.defect_id == one.defect_id)
    old = None if defect.human is None else defect.human.label or "not-a-defect"
    model = defect.verdict.label or defect.verdict.kind
    return {"page": one.page, "defect_id": one.defect_id, "model": model, "from": old, "to": to}
