"""Re-review with real networks, a real ledger: a head is swapped, and results follow."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from factories import make_review, make_verdict
from semwatch.defects import Domain, Verdict
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.line import notices
from semwatch.line.class_codes import class_codes
from semwatch.models import model_repository
from semwatch.models.inference import Embedded
from semwatch.service import rereview
from semwatch.service.rereview import Rereview
from semwatch.settings.recipe import KnownClass, Pins, Recipe, UnknownRule
from semwatch.store import results
from semwatch.store.ledger import Ledger
from semwatch.store.review_record import class_code, to_record
from semwatch.streams import records
from semwatch.system import clock

UNKNOWN = make_verdict("unknown")
# The tiny head is never as sure as the default asks for a dismissal.
RULE = UnknownRule(dismiss_probability=0.5)
RECIPE = Recipe(classes={"bridge": KnownClass(code=11)}, unknown=RULE, unknown_code=99)
NOW = datetime.now(UTC)


class Line:
    """A site as the daemon holds it, with head 1 in service and whatever else a test puts there."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder = folder
        self.results_dir = folder / "results"
        self.repository = repository
        self.models = {Pins(): Embedded(repository, threads=1)}
        self.recipes = {"tool-a": RECIPE}
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.busy: set[tuple[str, str]] = set()
        self.revised: list[Path] = []
        """Results that ``on_revised`` was told of."""

    @property
    def embedded(self) -> Embedded:
        return self.models[Pins()]

    def close(self) -> None:
        self.ledger.close()
        self.embedded.close()

    def review(
        self,
        path: str = "lot/a.tif",
        *,
        features: list[np.ndarray],
        age_days: float = 0,
        recipe_id: str = RECIPE.id,
        source: str = "tool-a",
        versions: dict[str, int] | None = None,
        hashes: dict[str, str] | None = None,
        domain: Domain = "not judged",
    ) -> Path:
        """Write a result of unknowns, and put their records, with these features, into the ledger."""
        utc = clock.utc_of(NOW - timedelta(days=age_days))
        review = make_review(
            len(features), path=path, source=source, verdicts=[UNKNOWN], reviewed_utc=utc,
            model_versions=versions or {"detector": 1, "encoder": 1, "head": 1}, domain=domain,
        )  # fmt: skip
        review = replace(
            review, model_hashes=hashes or {}, recipe_id=recipe_id, sha256=hashlib.sha256(path.encode()).hexdigest()
        )
        found = [replace(r, features=row) for r, row in zip(records.records(review), features, strict=True)]
        self.ledger.add_unknowns(rereview.features_of(found), once=found[0].id)
        return results.write(review, results_dir=self.results_dir).json

    def publish(self, labels: tuple[str, ...], codes: dict[str, int] | None = None) -> int:
        """Publish the serving head with other labels, and let it serve."""
        version = self.embedded.versions()["head"]
        folder = self.repository / "head" / str(version)
        meta = model_repository.read_meta(self.repository, "head", version)
        meta = meta.model_copy(update={"labels": labels, "codes": codes or {}})
        new = model_repository.publish(
            self.repository, meta, folder / "model.onnx", beside={"probe.npz": folder / "probe.npz"}
        )
        swap = self.embedded.refresh()
        assert swap is not None
        assert (swap.version, swap.refused) == (new, None)
        return new

    def rereview(self, **options: Any) -> Rereview:
        settings = {"days": 14.0, "publishes": True} | options
        return Rereview(
            self.models, self.recipes, self.ledger, results_dir=self.results_dir,
            state_dir=self.folder, is_busy=lambda source, path: (source, path) in self.busy,
            on_revised=lambda path, _: self.revised.append(path), **settings,
        )  # fmt: skip

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in self.ledger.audit_after(0, 1000)]

    def summaries(self) -> list[records.ResultSummary]:
        return [records.decode_result(records.unpack(item.payload)) for _, item in self.ledger.unpublished(1000)]


@pytest.fixture
def line(tmp_path: Path, tiny_repository: Path) -> Iterator[Line]:
    shutil.copytree(tiny_repository, tmp_path / "models")
    line = Line(tmp_path, tmp_path / "models")
    yield line
    line.close()


@pytest.fixture
def of_label(line: Line) -> Callable[[str], np.ndarray]:
    """Features that head 1 gives a label: samples it was fitted on."""
    with np.load(line.repository / "head" / "1" / "bank.npz") as bank:
        features, labels = bank["features"], bank["labels"]

    def sample(label: str) -> np.ndarray:
        return np.asarray(features[[str(name) for name in labels].index(label)], np.float32)

    return sample


@pytest.fixture
def nothing_known(of_label: Callable[[str], np.ndarray]) -> np.ndarray:
    """Features that no class explains."""
    return np.full_like(of_label("bridge"), 40)


def run(line: Line, **options: Any) -> rereview.Counts:
    """Run a pass to its end, as the daemon's loop does."""
    work = line.rereview(**options)
    for _ in range(1000):
        if not work.step():
            return work.counts
    raise AssertionError("the pass does not end")


# --- what is judged again, and what is not -------------------------------------------------------------------------


def test_ledger_without_unknowns_is_finished_at_once_and_not_asked_again(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(line) == rereview.Counts()
    marker = rereview.read_marker(line.folder / rereview.MARKER)
    assert marker.heads == {"tool-a": 1}
    work = line.rereview()
    monkeypatch.setattr(line.ledger, "unknowns_since", lambda *_, **__: pytest.fail("asked again"))
    assert work.step() is False


def test_unknown_gets_the_name_that_the_new_head_gives_it(line: Line, of_label: Any, nothing_known: Any) -> None:
    path = line.review(features=[of_label("particle"), nothing_known, of_label("bridge")])
    before = path.read_bytes()
    head = line.publish(("bridge", "defect-free", "novel-1"))
    counts = run(line)
    assert (counts.records, counts.revised, counts.changed) == (3, 1, 2)
    result = results.read(path)
    verdicts = [defect.verdict for defect in result.pages[0].defects]
    assert [(v.kind, v.label, v.class_code) for v in verdicts] == [
        ("novel", "novel-1", 99),
        ("unknown", None, None),  # untouched, as it was written
        ("known", "bridge", 11),
    ]
    assert (result.revision, result.model_versions["head"], result.pages[0].verdict) == (2, head, "defects")
    assert results.revision_path(path, 1).read_bytes() == before
    assert line.revised == [path]


def test_audit_line_and_summary_say_what_changed(line: Line, of_label: Any, nothing_known: Any) -> None:
    line.review(features=[of_label("particle"), nothing_known])
    head = line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    (entry,) = line.audit()
    assert (entry["event"], entry["revision"], entry["head"], entry["path"]) == ("revised", 2, head, "lot/a.tif")
    assert entry["changes"] == [{"page": 0, "defect_id": 1, "from": "unknown", "to": "novel-1"}]
    (said,) = line.summaries()
    assert (said.n_by_kind, said.n_by_label) == ({"novel": 1, "unknown": 1}, {"novel-1": 1})
    assert said.revision == 2
    assert said.model_versions["head"] == head
    assert line.ledger.unpublished(1)[0][1].stream == records.RESULTS


def test_site_without_redis_gets_its_audit_line_and_an_empty_outbox(line: Line, of_label: Any) -> None:
    line.review(features=[of_label("bridge")])
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line, publishes=False)
    assert len(line.audit()) == 1
    assert line.ledger.n_unpublished() == 0


def test_result_of_the_head_in_service_is_left_alone(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("bridge")])
    counts = run(line)
    assert (counts.records, counts.revised) == (1, 0)
    assert results.read(path).revision == 1
    assert line.audit() == []


def test_name_given_later_replaces_the_machines_name(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("particle")])
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    line.publish(("bridge", "defect-free", "residue"), codes={"residue": 23})
    run(line)
    result = results.read(path)
    verdict = result.pages[0].defects[0].verdict
    assert (verdict.kind, verdict.label, verdict.class_code, result.revision) == ("known", "residue", 23, 3)
    assert [entry["changes"][0]["from"] for entry in line.audit()] == ["unknown", "novel-1"]
    assert len({said.id for said in line.summaries()}) == 2


def test_page_whose_defects_all_turn_out_harmless_is_defect_free(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("defect-free")])
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    assert results.read(path).pages[0].verdict == "defect-free"


def test_page_of_an_unknown_process_keeps_what_a_later_head_would_dismiss(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("defect-free")], domain="unknown process")
    line.publish(("bridge", "defect-free", "novel-1"))
    counts = run(line)
    assert (counts.records, counts.revised) == (1, 0)
    assert results.read(path).pages[0].defects[0].verdict.kind == "unknown"


@pytest.mark.parametrize(
    ("case", "count_name"),
    [
        ({"versions": {"encoder": 7, "head": 1}}, "other_encoder"),
        ({"hashes": {"encoder": "0" * 16}}, "other_encoder"),
        ({"recipe_id": "0" * 16}, "other_recipe"),
        ({"source": "tool-that-left"}, "other_recipe"),
    ],
)
def test_record_that_this_head_cannot_judge_is_counted_and_left(
    line: Line, of_label: Any, case: dict[str, Any], count_name: str
) -> None:
    path = line.review(features=[of_label("bridge")], **case)
    before = path.read_bytes()
    line.publish(("bridge", "defect-free", "novel-1"))
    counts = run(line)
    assert (getattr(counts, count_name), counts.revised) == (1, 0)
    assert path.read_bytes() == before


def test_record_of_the_same_encoder_under_another_number_is_judged(line: Line, of_label: Any) -> None:
    same = {"encoder": line.embedded.hashes()["encoder"]}
    path = line.review(features=[of_label("particle")], versions={"encoder": 7, "head": 1}, hashes=same)
    line.publish(("bridge", "defect-free", "novel-1"))
    assert run(line).revised == 1
    result = results.read(path)
    assert (result.model_versions["encoder"], result.model_versions["head"]) == (7, 2)
    assert result.model_hashes == {**same, "head": line.embedded.hashes()["head"]}
    (summary,), (entry,) = line.summaries(), line.audit()
    assert summary.model_hashes == result.model_hashes
    assert entry["model_hashes"] == result.model_hashes


def test_features_of_another_width_are_counted_and_left(line: Line, of_label: Any) -> None:
    line.review(features=[of_label("bridge")[:-1]])
    line.publish(("bridge", "defect-free", "novel-1"))
    assert run(line).other_encoder == 1


def test_result_that_is_gone_broken_or_of_other_content_is_left(line: Line, of_label: Any) -> None:
    gone, broken, other = (line.review(f"lot/{name}.tif", features=[of_label("bridge")]) for name in "abc")
    gone.unlink()
    broken.write_text("{")
    results.write(make_review(1, path="lot/c.tif", sha256="0" * 64), results_dir=line.results_dir)
    line.publish(("bridge", "defect-free", "novel-1"))
    counts = run(line)
    assert (counts.stale, counts.revised) == (3, 0)
    assert (gone.exists(), broken.read_text(), results.read(other).sha256) == (False, "{", "0" * 64)
    assert line.audit() == []


def test_record_or_result_that_takes_no_revision_is_counted_and_the_others_go_on(
    line: Line, of_label: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream can hold a forged record, and a results folder a strange file: neither may end the daemon."""
    taken, good = (line.review(f"lot/{name}.tif", features=[of_label("bridge")]) for name in "ab")
    results.revision_path(taken, 1).write_text("somebody's notes")
    review = replace(make_review(1, verdicts=[UNKNOWN]), recipe_id=RECIPE.id, model_versions={"encoder": 1, "head": 1})
    (forged,) = (replace(r, path="../../etc/x", features=of_label("bridge")) for r in records.records(review))
    line.ledger.add_unknowns(rereview.features_of([replace(forged, created_utc=clock.utc_of(NOW))]), once="forged")
    line.publish(("bridge", "defect-free", "novel-1"))
    counts = run(line)
    assert (counts.stale, counts.revised) == (2, 1)
    assert results.revision_path(taken, 1).read_text() == "somebody's notes"
    assert results.read(good).revision == 2
    assert "is no relative path inside a drop folder" in caplog.text
    assert "move it aside" in caplog.text


def test_defect_that_lies_elsewhere_now_is_left(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("bridge")])
    path.write_text(path.read_text().replace('"box_xyxy": [\n            ', '"box_xyxy": [\n            1'))
    line.publish(("bridge", "defect-free", "novel-1"))
    assert run(line).stale == 1
    assert results.read(path).revision == 1


def test_only_the_last_days_are_read(line: Line, of_label: Any) -> None:
    line.review("lot/old.tif", features=[of_label("bridge")], age_days=15)
    line.review("lot/new.tif", features=[of_label("bridge")], age_days=13)
    line.publish(("bridge", "defect-free", "novel-1"))
    counts = run(line)
    assert (counts.records, counts.revised) == (1, 1)
    assert line.audit()[0]["path"] == "lot/new.tif"


def test_zero_days_are_none(line: Line, of_label: Any) -> None:
    line.review(features=[of_label("bridge")])
    line.publish(("bridge", "defect-free", "novel-1"))
    assert run(line, days=0) == rereview.Counts()
    assert line.audit() == []


# --- what a verdict may replace ------------------------------------------------------------------------------------


def judged(kind: str, label: str | None) -> Verdict:
    return Verdict(kind, label, 0.5, ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("current", "new", "expected"),
    [
        (("unknown", None), ("non-decidable", None), False),
        (("unknown", None), ("novel", "novel-1"), True),
        (("non-decidable", None), ("known", "bridge"), True),
        (("known", "bridge"), ("known", "bridge"), False),
        (("known", "bridge"), ("unknown", None), False),
        (("novel", "novel-9"), ("unknown", None), True),  # novel-9 was rejected: the head has it no more
        (("novel", "novel-9"), ("known", "bridge"), True),
    ],
)
def test_label_replaces_and_silence_only_what_is_no_class_any_more(
    line: Line, current: tuple[str, str | None], new: tuple[str, str | None], expected: bool
) -> None:
    stands = rereview.verdict_record(judged(*current), None)
    assert rereview.replaces(judged(*new), stands, line.embedded.meta("head")) is expected


CODED = Recipe(classes={"bridge": KnownClass(code=11)}, unknown_code=99, non_decidable_code=98)


@pytest.mark.parametrize(
    ("kind", "label", "code"),
    [
        ("known", "bridge", 11),  # the recipe's goes before the head's
        ("known", "pit", 3),  # a person named it: the head has it
        ("known", "particle", None),
        ("novel", "novel-1", 99),  # without a code a found class is an unknown
        ("novel", "novel-2", 2),
        ("unknown", None, 99),
        ("non-decidable", None, 98),
        ("defect-free", "defect-free", None),
    ],
)
def test_first_review_and_revision_give_the_same_code(line: Line, of_label: Any, kind, label, code) -> None:
    codes = class_codes(CODED, {"bridge": 1, "novel-2": 2, "pit": 3})
    first = to_record(make_review(1, verdicts=[judged(kind, label)]), **codes)
    assert first.pages[0].defects[0].verdict.class_code == code
    assert class_code(judged(kind, label), **codes) == code


def test_revision_has_the_code_that_a_first_review_by_that_head_would_have(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("particle")])
    line.publish(("bridge", "defect-free", "pit"), codes={"pit": 3})
    run(line)
    verdict = results.read(path).pages[0].defects[0].verdict
    assert (verdict.kind, verdict.label, verdict.class_code) == ("known", "pit", 3)
    again = to_record(make_review(1, verdicts=[judged("known", "pit")]), **class_codes(RECIPE, {"pit": 3}))
    assert again.pages[0].defects[0].verdict.class_code == 3


# --- what is said of it --------------------------------------------------------------------------------------------


def test_audit_lines_of_review_and_revision_are_made_alike(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("particle")])
    first = notices.audit_entry(results.read(path), path.name)
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    (revised,) = line.audit()
    assert (first["event"], revised["event"]) == ("reviewed", "revised")
    assert revised.keys() - first.keys() == {"revision", "head", "changes"}
    assert not first.keys() - revised.keys()
    same = ("site", "source", "path", "sha256", "recipe", "result")
    assert [first[key] for key in same] == [revised[key] for key in same]
    assert (first["verdicts"], revised["verdicts"]) == ({"unknown": 1}, {"novel": 1})
    assert revised["models"]["head"] == revised["head"] == 2


def test_summaries_of_review_and_revision_are_made_alike(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("particle")])
    first = notices.summary(results.read(path))
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    (revised,) = line.summaries()
    assert (first.revision, revised.revision) == (1, 2)
    assert first.id != revised.id
    assert (first.site, first.image_scores) == (revised.site, revised.image_scores) == ("site-1", first.image_scores)


def test_revision_that_an_older_release_announced_is_not_announced_again(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("particle")])
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    old = results.read(path).model_copy(update={"site": "", "model_hashes": {}})
    path.write_text(old.model_dump_json())
    parts = ["revised", old.sha256, old.source, old.path, old.recipe.id, dict(sorted(old.model_versions.items())), 2]
    announced = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    line.ledger.note(audit={"event": "revised"}, once=announced)  # what the older release did
    n_before = len(line.audit())
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    assert len(line.audit()) == n_before


def test_review_whose_count_goes_on_is_no_revision(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("particle")])
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    again = results.read(path).model_copy(update={"revision": 3, "revised_utc": None})
    path.write_text(again.model_dump_json())
    n_before = len(line.audit())
    line.publish(("bridge", "defect-free", "novel-1"))
    run(line)
    assert len(line.audit()) == n_before


# --- slices, waiting, starting again -------------------------------------------------------------------------------


def test_slices_of_no_time_take_an_image_each_and_come_to_the_same_end(line: Line, of_label: Any) -> None:
    for i in range(3):
        line.review(f"lot/{i}.tif", features=[of_label("bridge")])
    line.publish(("bridge", "defect-free", "novel-1"))
    work, n_revised = line.rereview(), []
    while work.step(budget_s=1e-9):
        n_revised.append(len(line.revised))
    assert n_revised == [1, 2, 3]
    assert work.step() is False


def test_more_records_than_a_page_holds_are_all_read(line: Line, of_label: Any) -> None:
    paths = [line.review(f"lot/{i}.tif", features=[of_label("bridge")] * 4) for i in range(20)]
    line.publish(("bridge", "defect-free", "novel-1"))
    counts = run(line)
    assert (counts.records, counts.revised, counts.changed) == (80, 20, 80)
    assert sorted(line.revised) == sorted(paths)


def test_image_in_a_workers_hands_is_waited_for(line: Line, of_label: Any) -> None:
    path = line.review(features=[of_label("bridge")])
    line.publish(("bridge", "defect-free", "novel-1"))
    line.busy.add(("tool-a", "lot/a.tif"))
    work = line.rereview()
    assert [work.step() for _ in range(3)] == [True] * 3
    assert results.read(path).revision == 1
    line.busy.clear()
    assert work.step() is False
    assert results.read(path).revision == 2


def test_finished_pass_is_not_repeated_after_a_restart_but_the_next_head_is(line: Line, of_label: Any) -> None:
    line.review(features=[of_label("bridge")])
    line.publish(("bridge", "defect-free", "novel-1"))
    assert run(line).records == 1
    assert run(line).records == 0
    line.publish(("bridge", "defect-free", "novel-1"))
    assert run(line).records == 1


def test_head_that_comes_during_a_pass_begins_it_anew(line: Line, of_label: Any) -> None:
    paths = [line.review(f"lot/{i}.tif", features=[of_label("particle")]) for i in range(2)]
    line.publish(("bridge", "defect-free", "novel-1"))
    work = line.rereview()
    assert work.step(budget_s=1e-9) is True
    head = line.publish(("bridge", "defect-free", "novel-2"))
    while work.step():
        pass
    assert [results.read(path).pages[0].defects[0].verdict.label for path in paths] == ["novel-2"] * 2
    assert [results.read(path).revision for path in paths] == [3, 2]
    assert rereview.read_marker(line.folder / rereview.MARKER).heads == {"tool-a": head}


def test_failing_disk_is_said_and_does_not_end_the_daemon(
    line: Line, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ServiceUnavailable("the disk under the ledger fails")

    monkeypatch.setattr(line.ledger, "unknowns_since", fail)
    work = line.rereview()
    assert work.step() is False
    assert "re-review waits" in caplog.text
    assert "the disk under the ledger fails" in caplog.text
    caplog.clear()
    assert work.step() is False  # not asked again at once
    assert caplog.text == ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"heads": {"tool-a": "new"}}', '{"head": 3}'])
def test_marker_edited_into_nonsense_is_refused_by_name(line: Line, text: str) -> None:
    (line.folder / rereview.MARKER).write_text(text)
    with pytest.raises(ConfigError, match=r"reread\.json: .*; delete it"):
        line.rereview()


# --- crashes -------------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone: nothing catches this."""


def die_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the ``step``-th sync, rename or note, or, at the next number, after it."""
    seen = count(1)

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def mortal(*args: Any, **kwargs: Any) -> Any:
            if next(seen) == step:
                raise Died
            value = real(*args, **kwargs)
            if next(seen) == step:
                raise Died
            return value

        monkeypatch.setattr(owner, name, mortal)

    wrap(os, "fsync")
    wrap(os, "replace")
    wrap(Ledger, "note")


def test_death_at_any_step_leaves_one_revision_with_one_audit_line(
    line: Line, of_label: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = line.review(features=[of_label("bridge"), of_label("particle")])
    before = path.read_bytes()
    line.publish(("bridge", "defect-free", "novel-1"))
    n_deaths = 0
    for step in count(1):
        with monkeypatch.context() as patch:
            die_at(step, patch)
            try:
                run(line)
            except Died:
                n_deaths += 1
            else:
                break
        results.read(path)  # whole at every moment
        run(line)
        assert results.read(path).revision == 2
        assert results.revision_path(path, 1).read_bytes() == before
        seqs = [seq for seq, _ in line.ledger.audit_after(0, 1000)]
        assert len(seqs) == step  # one more for each round
        assert len(line.summaries()) == 1  # the id is the same each round
        # Back to the beginning, as if nothing had happened.
        path.write_bytes(before)
        results.revision_path(path, 1).unlink()
        (line.folder / rereview.MARKER).unlink()
        with line.ledger._file.transaction() as db:
            db.execute("DELETE FROM noted")
    assert n_deaths >= 14  # kept file, result, ledger: each written, synced, renamed, synced


KILLED = """
import os, signal, sys
from pathlib import Path
import test_rereview
from semwatch.store import results
from semwatch.store.ledger import Ledger
note = Ledger.note
def killed(self, **said):
    if sys.argv[3] == "after":
        note(self, **said)
    os.kill(os.getpid(), signal.SIGKILL)
Ledger.note = killed
test_rereview.run(test_rereview.Line(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_between_result_and_ledger_is_mended_by_the_next_start(line: Line, of_label: Any, when: str) -> None:
    path = line.review(features=[of_label("bridge")])
    line.publish(("bridge", "defect-free", "novel-1"))
    line.ledger.close()
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", KILLED, str(line.folder), str(line.repository), when]
    assert subprocess.run(command, env=environ, timeout=60, check=False).returncode == -signal.SIGKILL
    assert results.read(path).revision == 2
    line.ledger = Ledger(line.folder / "ledger.sqlite")
    assert len(line.audit()) == (1 if when == "after" else 0)
    run(line)
    assert [entry["revision"] for entry in line.audit()] == [2]
    assert len(line.summaries()) == 1
    assert line.revised == ([path] if when == "before" else [])


def test_later_head_still_notes_the_revision_that_a_crash_left_without_a_line(
    line: Line, of_label: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line.review(features=[of_label("particle")])
    line.publish(("bridge", "defect-free", "novel-1"))
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "note", lambda *_, **__: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            run(line)
    line.publish(("bridge", "defect-free", "residue"))
    run(line)
    assert [(entry["revision"], entry["changes"][0]["to"]) for entry in line.audit()] == [
        (2, "novel-1"),
        (3, "residue"),
    ]


def test_revision_whose_forerunner_was_taken_away_is_noted_without_changes(
    line: Line, of_label: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = line.review(features=[of_label("bridge")])
    line.publish(("bridge", "defect-free", "novel-1"))
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "note", lambda *_, **__: (_ for _ in ()).throw(Died))
        with pytest.raises(Died):
            run(line)
    results.revision_path(path, 1).unlink()
    run(line)
    (entry,) = line.audit()
    assert entry["changes"] is None
