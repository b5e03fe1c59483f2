"""What leaves with a result, of a first review and of every revision alike: messages, audit line, journal fields.

All of it is made from the ``ReviewRecord``, so that what others read is what stands in the result.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from semwatch.settings.recipe import Recipe
from semwatch.store.review_record import DefectRecord, ReviewRecord, printable
from semwatch.streams import records
from semwatch.streams.records import Message, Outcome, Record, ResultSummary
from semwatch.system.journal import about

Place = tuple[int, int]
"""Page and ``defect_id``."""


def messages(found: Sequence[Record], result: ReviewRecord, doubtful: Sequence[Record] = ()) -> list[Message]:
    """All that a first review gives to Redis, ready for the outbox: unknowns, doubtful crops, then its summary."""
    streams = ((records.UNKNOWNS, found), (records.DOUBTFUL, doubtful))
    made = [(stream, one.id, records.pack(records.encode(one))) for stream, of in streams for one in of]
    return [*made, summary_message(result)]


def summary_message(result: ReviewRecord) -> Message:
    """The results stream's message of a result."""
    made = summary(result)
    return records.RESULTS, made.id, records.pack(records.encode_result(made))


def summary(result: ReviewRecord) -> ResultSummary:
    """What the results stream says of a result; each revision has an id of its own."""
    verdicts = [defect.verdict for defect in defects_of(result).values()]
    return ResultSummary(
        id=records.result_id(
            result.site,
            result.source,
            result.sha256,
            result.path,
            result.recipe.id,
            result.model_versions,
            result.revision,
        ),
        reviewed_utc=result.reviewed_utc,
        source=result.source,
        path=result.path,
        sha256=result.sha256,
        recipe_name=result.recipe.name,
        recipe_id=result.recipe.id,
        model_versions=dict(sorted(result.model_versions.items())),
        image_scores=tuple(page.image_score for page in result.pages if page.image_score is not None),
        n_defects=len(verdicts),
        n_by_kind=count_kinds(result),
        n_by_label=Counter(verdict.label for verdict in verdicts if verdict.label is not None),
        revision=result.revision,
        model_hashes=dict(sorted(result.model_hashes.items())),
        site=result.site,
        domains=tuple(page.domain for page in result.pages),
        n_no_image=sum(not page.quality.is_image for page in result.pages),
        n_by_quality=count_flags(result),
    )


def aside_message(
    *, site: str, source: str, path: str, sha256: str, recipe: Recipe, outcome: Outcome, reason: str, utc: str
) -> Message:
    """The results stream's message of a file without a result of its own: refused, or the content of another."""
    made = ResultSummary(
        id=records.result_id(site, source, sha256, printable(path), recipe.id, {outcome: 1}, 1),
        reviewed_utc=utc,
        source=source,
        path=printable(path),
        sha256=sha256,
        recipe_name=recipe.name,
        recipe_id=recipe.id,
        model_versions={},
        image_scores=(),
        n_defects=0,
        n_by_kind={},
        n_by_label={},
        site=site,
        n_no_image=1,
        outcome=outcome,
        reason=printable(reason),
    )
    return records.RESULTS, made.id, records.pack(records.encode_result(made))


def audit_entry(result: ReviewRecord, name: str, *, before: ReviewRecord | None = None) -> dict[str, object]:
    """The audit line of a result: what was judged, by which recipe and models, and what came out.

    Args:
        result: as it was written.
        name: of its file.
        before: of a revision, the one before it; None where it was taken away.
    """
    line: dict[str, object] = {
        "event": "reviewed" if result.revised_utc is None else "revised",
        "utc": result.revised_utc or result.reviewed_utc,
        "site": result.site,
        "source": result.source,
        "path": result.path,
        "sha256": result.sha256,
        "recipe": result.recipe.id,
        "models": result.model_versions,
        "model_hashes": result.model_hashes,
        "verdicts": count_kinds(result),
        "result": name,
    }
    if flags := count_flags(result):
        line["quality"] = flags
    if result.revised_utc is not None:
        changes = None if before is None else _differences(defects_of(before), defects_of(result))
        line |= {"revision": result.revision, "head": result.model_versions.get("head"), "changes": changes}
    return line


def journal_fields(result: ReviewRecord) -> dict[str, dict[str, str]]:
    """The journal's fields of a result."""
    return about(
        "reviewed" if result.revised_utc is None else "revised",
        result.source,
        result.path,
        result.sha256,
        recipe=result.recipe.name,
        recipe_id=result.recipe.id,
        verdicts=count_kinds(result),
        models=result.model_versions,
    )


def count_kinds(result: ReviewRecord) -> dict[str, int]:
    """Defects of a result by verdict kind."""
    kinds = Counter(defect.verdict.kind for defect in defects_of(result).values())
    return dict(sorted(kinds.items()))


def count_flags(result: ReviewRecord) -> dict[str, int]:
    """Pages of a result by what is wrong with them."""
    return dict(sorted(Counter(flag.name for page in result.pages for flag in page.quality.flags).items()))


def defects_of(result: ReviewRecord) -> dict[Place, DefectRecord]:
    """All defects of a result by page and ``defect_id``."""
    return {(page.page, defect.defect_id): defect for page in result.pages for defect in page.defects}


def _differences(before: Mapping[Place, DefectRecord], after: Mapping[Place, DefectRecord]) -> list[dict[str, object]]:
    return [
        {
            "page": page,
            "defect_id": defect_id,
            "from": _verdict_name(before[page, defect_id]),
            "to": _verdict_name(defect),
        }
        for (page, defect_id), defect in after.items()
        if (page, defect_id) in before and _verdict_name(before[page, defect_id]) != _verdict_name(defect)
    ]


def _verdict_name(defect: DefectRecord) -> str:
    return defect.verdict.label or defect.verdict.kind
