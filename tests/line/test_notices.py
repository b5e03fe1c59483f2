"""What leaves with a result says what stands in it, of a first review and of a revision."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from factories import make_review, make_verdict
from semwatch.defects import Quality, QualityFlag
from semwatch.line import notices
from semwatch.store.review_record import ReviewRecord, VerdictRecord, to_record
from semwatch.streams import records

VERDICTS = [make_verdict("known", "bridge"), make_verdict("unknown"), make_verdict("non-decidable")]
REVIEW = make_review(3, n_pages=2, verdicts=VERDICTS)
RESULT = to_record(REVIEW)
T1 = "2025-03-02T08:00:00Z"


def revised() -> ReviewRecord:
    """The unknowns of the first page became a class."""
    page = RESULT.pages[0]
    verdict = VerdictRecord(kind="novel", label="novel-1", confidence=0.9, nearest=(), class_code=None)
    defects = [d.model_copy(update={"verdict": verdict}) if d.verdict.kind == "unknown" else d for d in page.defects]
    pages = (page.model_copy(update={"defects": tuple(defects)}), *RESULT.pages[1:])
    versions = {**RESULT.model_versions, "head": 4}
    return RESULT.model_copy(update={"pages": pages, "revision": 2, "revised_utc": T1, "model_versions": versions})


def test_first_review_gives_its_unknowns_and_then_its_summary() -> None:
    found = records.records(REVIEW)
    *unknowns, (stream, id_, payload) = notices.messages(found, RESULT)
    assert [message[:2] for message in unknowns] == [(records.UNKNOWNS, record.id) for record in found]
    assert [records.decode(records.unpack(message[2])).id for message in unknowns] == [record.id for record in found]
    assert (stream, id_) == (records.RESULTS, notices.summary(RESULT).id)
    assert records.decode_result(records.unpack(payload)) == notices.summary(RESULT)


def test_review_without_unknowns_gives_its_summary_alone() -> None:
    [message] = notices.messages([], RESULT)
    assert message[0] == records.RESULTS


def test_summary_counts_defects_by_kind_and_label() -> None:
    found = notices.summary(RESULT)
    assert (found.n_defects, found.revision) == (6, 1)
    assert found.n_by_kind == {"known": 2, "non-decidable": 2, "unknown": 2}
    assert found.n_by_label == Counter({"bridge": 2})
    assert found.image_scores == tuple(page.image_score for page in RESULT.pages)
    assert list(found.model_versions) == sorted(found.model_versions)
    clean = notices.summary(to_record(make_review(0)))
    assert (clean.n_defects, clean.n_by_kind, clean.n_by_label) == (0, {}, {})


def test_summary_and_records_say_whether_the_process_is_known() -> None:
    foreign = make_review(2, n_pages=2, verdicts=[make_verdict("unknown")], domain="unknown process")
    found = records.records(foreign)
    assert {record.domain for record in found} == {"unknown process"}
    messages = notices.messages(found, to_record(foreign))
    assert records.decode(records.unpack(messages[0][2])).domain == "unknown process"
    assert records.decode_result(records.unpack(messages[-1][2])).domains == ("unknown process",) * 2
    assert notices.summary(RESULT).domains == ("not judged",) * 2


@pytest.mark.parametrize(("stream", "key"), [(0, b"domain"), (-1, b"domains")])
def test_message_of_an_older_release_says_nothing_of_it(stream: int, key: bytes) -> None:
    fields = records.unpack(notices.messages(records.records(REVIEW), RESULT)[stream][2])
    meta = json.loads(fields[b"meta"])
    del meta[key.decode()]
    fields[b"meta"] = json.dumps(meta).encode()
    if stream == 0:
        assert records.decode(fields).domain == "not judged"
    else:
        assert records.decode_result(fields).domains == ()


def test_every_revision_has_an_id_of_its_own() -> None:
    assert notices.summary(RESULT).id == notices.summary(RESULT).id
    assert notices.summary(RESULT).id != notices.summary(RESULT.model_copy(update={"revision": 2})).id


def test_audit_line_of_a_first_review() -> None:
    assert notices.audit_entry(RESULT, "a.tif.review.json") == {
        "event": "reviewed",
        "utc": RESULT.reviewed_utc,
        "site": RESULT.site,
        "source": RESULT.source,
        "path": RESULT.path,
        "sha256": RESULT.sha256,
        "recipe": RESULT.recipe.id,
        "models": RESULT.model_versions,
        "model_hashes": RESULT.model_hashes,
        "verdicts": {"known": 2, "non-decidable": 2, "unknown": 2},
        "result": "a.tif.review.json",
    }


def test_audit_line_of_a_revision_says_what_changed() -> None:
    line = notices.audit_entry(revised(), "a.tif.review.json", before=RESULT)
    changed = next(d.defect_id for d in RESULT.pages[0].defects if d.verdict.kind == "unknown")
    assert (line["event"], line["utc"], line["revision"], line["head"]) == ("revised", T1, 2, 4)
    assert line["changes"] == [{"page": 0, "defect_id": changed, "from": "unknown", "to": "novel-1"}]
    assert notices.audit_entry(revised(), "a.tif.review.json")["changes"] is None


def test_changes_name_only_defects_that_both_revisions_have() -> None:
    page = RESULT.pages[0]
    fewer = RESULT.model_copy(update={"pages": (page.model_copy(update={"defects": page.defects[:1]}),)})
    assert notices.audit_entry(revised(), "a", before=fewer)["changes"] == []


@pytest.mark.parametrize(("result", "event"), [(RESULT, "reviewed"), (revised(), "revised")])
def test_journal_names_the_event_and_the_verdicts(result: ReviewRecord, event: str) -> None:
    fields = notices.journal_fields(result)["journal"]
    assert (fields["EVENT"], fields["IMAGE"], fields["SHA256"]) == (event, result.path, result.sha256)
    kinds = notices.count_kinds(result)
    assert fields["VERDICTS"] == " ".join(f"{kind}={n}" for kind, n in kinds.items())
    assert sum(kinds.values()) == len(notices.defects_of(result)) == 6


def test_summary_and_audit_line_count_pages_without_image() -> None:
    review = make_review(0, n_pages=2)
    blank = Quality((QualityFlag("blank", 0.0, 2.0),), is_image=False)
    result = to_record(
        replace(review, pages=(replace(review.pages[0], score_map=None, quality=blank), review.pages[1]))
    )
    summary = notices.summary(result)
    assert (summary.n_no_image, summary.n_by_quality, summary.n_defects) == (1, {"blank": 1}, 0)
    assert len(summary.image_scores) == 1
    assert records.decode_result(records.encode_result(summary)) == summary
    assert notices.audit_entry(result, "a.review.json")["quality"] == {"blank": 1}
    assert "quality" not in notices.audit_entry(to_record(review), "a.review.json")
