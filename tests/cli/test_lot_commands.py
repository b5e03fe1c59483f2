"""Lots, corrections, quality, re-review, the index and requeueing, as people type them."""

import csv
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from commands import Command, in_process, write_recipe
from daemon import SOURCE, Site, make_site, png
from factories import make_review, make_verdict
from semwatch.defects import DEFECT_FREE
from semwatch.operations import correct as correction
from semwatch.service.lot_tables import LotTables, row_of
from semwatch.settings.site import load_site
from semwatch.store import results
from semwatch.store.audit import AuditLog
from semwatch.store.corrections import Correction
from semwatch.store.ledger import Ledger
from semwatch.streams import records
from semwatch.system.files import file_sha256, stamp_of

UTC = "2026-03-01T08:00:00Z"


@pytest.fixture
def semwatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return in_process(capsys, monkeypatch)


@pytest.fixture
def site(tmp_path: Path, tiny_repository: Path) -> Site:
    """Two images of lot7 reviewed with three defects, one refused; one of lot8 has the content of another."""
    made = make_site(tmp_path / "site", tiny_repository)
    made.results.parent.mkdir(parents=True)
    made.state.mkdir(parents=True, exist_ok=True)
    AuditLog(made.state / "audit.jsonl").close()
    with Ledger(made.state / "ledger.sqlite") as ledger:
        for i, name in enumerate(("lot7/a.png", "lot7/w1/b.png")):
            file = made.put(name, png(i, side=256))
            claim = ledger.claim(SOURCE, name, sha256=file_sha256(file), stamp=stamp_of(file.lstat()), now_utc=UTC)
            verdicts = [make_verdict("known", "particle"), make_verdict("unknown"), make_verdict("known", "bridge")]
            review = replace(make_review(3, source=SOURCE, path=name, verdicts=verdicts, seed=i), sha256=claim.sha256)
            written = results.write(review, results_dir=made.results.parent)
            row = row_of(written.json, made.results.parent, is_new=True)
            ledger.finish(claim, outbox=[], audit={"event": "reviewed", "sha256": claim.sha256}, now_utc=UTC, row=row)
        for name in ("lot7/bad.png", "lot7/w1/worse.png"):
            file = made.put(name, name.encode())
            claim = ledger.claim(SOURCE, name, sha256=file_sha256(file), stamp=stamp_of(file.lstat()), now_utc=UTC)
            of = {"source": SOURCE, "path": name, "sha256": claim.sha256}
            results.write_reason(
                results_dir=made.results.parent, **of, reason="no image", attempts=1, size=8, quarantined_utc=UTC
            )
            ledger.quarantine(claim, "no image", audit={"event": "quarantined", **of}, now_utc=UTC)
        file = made.put("lot8/copy.png", png(0, side=256))
        ledger.claim(SOURCE, "lot8/copy.png", sha256=file_sha256(file), stamp=stamp_of(file.lstat()), now_utc=UTC)
        of = {"source": SOURCE, "path": "lot8/copy.png", "sha256": file_sha256(file)}
        results.write_duplicate(
            results_dir=made.results.parent, **of, original="lot7/a.png", is_refused=False, noted_utc=UTC
        )
        ledger.duplicate_noted(SOURCE, "lot8/copy.png")
    return made


def audit_events(site: Site, event: str) -> list[dict[str, object]]:
    with Ledger(site.state / "ledger.sqlite", read_only=True) as ledger:
        return [line for _, text in ledger.audit_after(0, 1000) if (line := json.loads(text))["event"] == event]


def result(site: Site, path: str = "lot7/a.png") -> results.ReviewRecord:
    return results.read(results.review_path(site.results.parent, SOURCE, path))


# --- lot -------------------------------------------------------------------------------------------------------------


def test_lot_at_a_glance(semwatch: Command, site: Site) -> None:
    site.put("lot7/late.png", png(9))
    said = semwatch("lot", "lot7", "--site", site.file, "--expect", 7, "--json")
    assert said.code == 1
    found = said.json
    assert (found["lot"], found["expected"], found["arrived"]) == (f"{SOURCE}/lot7", 7, 5)
    counts = {key: found[key] for key in ("reviewed", "refused", "duplicate", "broken", "waiting", "complete")}
    assert counts == {"reviewed": 2, "refused": 2, "duplicate": 0, "broken": 0, "waiting": 1, "complete": False}
    assert found["verdicts"] == [["known", "bridge", 2], ["known", "particle", 2], ["unknown", None, 2]]
    assert {one["path"] for one in found["worst"]} == {"lot7/a.png", "lot7/w1/b.png"}
    assert {one["path"]: one["reason"] for one in found["aside"]} == {
        "lot7/bad.png": "no image",
        "lot7/w1/worse.png": "no image",
    }
    words = semwatch("lot", "lot7", "--site", site.file)
    assert "not complete" in words.out
    assert all(len(line) <= 80 for line in words.out.splitlines()), words.out
    copies = semwatch("lot", "lot8", "--site", site.file)
    assert copies.code == 0, copies  # each of its images has a result, if another's
    assert "the content of lot7/a.png" in copies.out


def test_lot_that_is_not_there_or_not_one(semwatch: Command, site: Site) -> None:
    said = semwatch("lot", "lto7", "--site", site.file)
    assert said.code == 2
    assert "there is no lot 'lto7'" in said.words
    assert "lot7" in said.words
    (site.drop / "lot9").mkdir()
    empty = semwatch("lot", "lot9", "--site", site.file, "--json")
    assert (empty.code, empty.json["arrived"], empty.json["complete"]) == (1, 0, False)
    for place in ("x/w1", "y/w1"):
        (site.results.parent / place).mkdir(parents=True)
    several = semwatch("lot", "w1", "--site", site.file)
    assert several.code == 2
    assert "several lots" in several.words


def test_lots_are_listed(semwatch: Command, site: Site) -> None:
    assert semwatch("reindex", "--site", site.file, "--json").json == {
        "lots": 3, "images": 5, "defects": 6, "changed": 5,
    }  # fmt: skip
    rows = semwatch("lot", "--site", site.file, "--json").json
    assert [(row["lot"], row["images"], row["refused"], row["duplicate"]) for row in rows] == [
        (f"{SOURCE}/lot7", 2, 1, 0),
        (f"{SOURCE}/lot7/w1", 2, 1, 0),
        (f"{SOURCE}/lot8", 1, 0, 1),
    ]


# --- people ----------------------------------------------------------------------------------------------------------


def test_words_of_people_are_kept_shown_and_measured(semwatch: Command, site: Site) -> None:
    def correct(*words: object) -> None:
        said = semwatch("correct", "lot7/a.png", *words, "--site", site.file)
        assert said.code == 0, said

    correct(1, "residue", "--new")
    correct(1, "bridge")
    correct(3, "--not-a-defect")
    correct("--missed", "10,20,30,40", "particle")
    correct("--confirm")  # nothing is left: the second is unknown
    (page,) = result(site).pages
    assert [one.human and one.human.label for one in page.defects] == ["bridge", None, None]
    assert page.defects[2].human is not None
    assert [(one.label, one.box_xyxy) for one in page.missed] == [("particle", (10, 20, 40, 60))]
    lines = audit_events(site, "corrected")
    assert [line["changes"][0]["to"] for line in lines[:4]] == ["residue", "bridge", "not-a-defect", "particle"]  # type: ignore[index]
    assert lines[1]["changes"][0]["from"] == "residue"  # type: ignore[index]
    assert all(line["by"] and line["utc"] for line in lines)

    found = semwatch("lot", "lot7", "--site", site.file, "--json").json
    assert (found["judged"], found["corrected"], found["missed"]) == (2, 2, 1)
    story = semwatch("logs", "lot7/a.png", "--site", site.file)
    assert "people say 1 bridge, 1 missed particle, 1 not-a-defect" in story.words
    assert "corrected by" in story.words
    measured = semwatch("quality", "--lot", "lot7", "--site", site.file, "--json").json
    assert {one["label"]: one["purity"]["count"] for one in measured["classes"]} == {"particle": 0, "bridge": 0}
    assert measured["escapes"]["count"] == 1
    assert "false alarms" in semwatch("quality", "--site", site.file).out

    with Ledger(site.state / "ledger.sqlite") as ledger:
        LotTables(ledger.lot_rows, site.results.parent).step(is_last=True)
    with (site.results / "lot7" / "lot.csv").open(newline="") as file:
        rows = [(row["path"], row["kind"], row["label"], row["human_label"]) for row in csv.DictReader(file)]
    assert rows == [
        ("lot7/a.png", "known", "particle", "bridge"),
        ("lot7/a.png", "unknown", "", ""),
        ("lot7/a.png", "known", "bridge", "not-a-defect"),
        ("lot7/a.png", "missed", "", "particle"),
        ("lot7/bad.png", "", "", ""),
    ]


def test_confirmation_agrees_with_what_the_model_named(semwatch: Command, site: Site) -> None:
    said = semwatch("correct", "b.png", 2, "scratch", "--new", "--confirm", "--site", site.file, "--json")
    assert [(one["defect_id"], one["to"]) for one in said.json["changes"]] == [
        (2, "scratch"),
        (1, "particle"),
        (3, "bridge"),
    ]
    (page,) = result(site, "lot7/w1/b.png").pages
    assert [one.human and one.human.label for one in page.defects] == ["particle", "scratch", "bridge"]


def test_words_of_people_wait_for_learning_as_labels_where_there_is_a_redis(semwatch: Command, site: Site) -> None:
    def correct(*words: object) -> None:
        said = semwatch("correct", "lot7/a.png", *words, "--site", site.file, "--json")
        assert (said.code, said.json["without_crop"]) == (0, ""), said

    correct(1, "bridge")
    settings = yaml.safe_load(site.file.read_text())
    site.file.write_text(yaml.safe_dump({**settings, "redis": {"url": f"unix://{site.folder}/redis.sock"}}))
    correct(2, "bridge")
    correct(3, "--not-a-defect")
    correct("--missed", "10,20,30,40", "particle")
    with Ledger(site.state / "ledger.sqlite", read_only=True) as ledger:
        items = [item for _, item in ledger.unpublished(10)]
    assert {item.stream for item in items} == {records.CORRECTIONS}, "nothing waits of the time without a Redis"
    found = [records.decode_correction(records.unpack(item.payload)) for item in items]
    boxes = [one.box_xyxy for one in result(site).pages[0].defects]
    assert [(one.defect_id, one.label, one.was, one.box_xyxy) for one in found] == [
        (2, "bridge", "unknown", boxes[1]),
        (3, DEFECT_FREE, "bridge", boxes[2]),
        (None, "particle", "", (10, 20, 40, 60)),
    ]
    assert all(one.sha256 == result(site).sha256 and one.path == "lot7/a.png" and one.by for one in found)
    in_queue, *cut = found
    assert in_queue.crop is None, "an unknown's crop is in the queue already"
    for one in cut:
        assert one.crop is not None
        assert one.crop.max() > one.crop.min()
        assert one.crop_xyxy is not None
        assert one.model_versions == {"encoder": 1}
        assert one.model_hashes["encoder"]
        assert one.features is not None
        assert np.isfinite(one.features).all()


def test_word_without_the_file_it_is_about_counts_and_says_that_learning_gets_no_crop(
    semwatch: Command, site: Site
) -> None:
    settings = yaml.safe_load(site.file.read_text())
    site.file.write_text(yaml.safe_dump({**settings, "redis": {"url": f"unix://{site.folder}/redis.sock"}}))
    image = site.drop / "lot7/a.png"
    image.write_bytes(png(5))
    said = semwatch("correct", "lot7/a.png", 1, "bridge", "--site", site.file)
    assert said.code == 0
    assert "learning gets no crop" in said.words
    assert "other content" in said.words
    image.unlink()
    gone = semwatch("correct", "lot7/a.png", 3, "particle", "--site", site.file, "--json")
    assert "is gone" in gone.json["without_crop"]
    in_queue = semwatch("correct", "lot7/a.png", 2, "bridge", "--site", site.file, "--json")
    assert in_queue.json["without_crop"] == ""
    with Ledger(site.state / "ledger.sqlite", read_only=True) as ledger:
        found = [records.decode_correction(records.unpack(item.payload)) for _, item in ledger.unpublished(10)]
    assert [(one.defect_id, one.crop) for one in found] == [(1, None), (3, None), (2, None)]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("nowhere.png", 1, "bridge"), "no image fits"),
        (("lot7/a.png", 9, "bridge"), "no defect 9 on page 0; its defects are 1, 2, 3"),
        (("lot7/a.png", 1, "bridge", "--page", 2), "no page 2"),
        (("lot7/a.png", 1), "give the number of a defect and its class"),
        (("lot7/a.png", "bridge", "1"), "give the number of a defect and its class"),
        (("lot7/a.png", 1, "partcle"), "the nearest are particle"),
        (("lot7/a.png", "--missed", "1,2,3", "bridge"), "is no box"),
        (("lot7/a.png", "--missed", "250,250,30,30", "bridge"), "does not lie inside"),
        (("lot7/a.png", "--missed", "1,1,9,9"), "takes the class alone"),
    ],
)
def test_word_that_makes_no_sense_is_refused_and_nothing_kept(semwatch: Command, site: Site, words, why: str) -> None:
    before = results.review_path(site.results.parent, SOURCE, "lot7/a.png").read_bytes()
    said = semwatch("correct", *words, "--site", site.file)
    assert said.code == 2, said
    assert why in said.words
    assert results.review_path(site.results.parent, SOURCE, "lot7/a.png").read_bytes() == before
    assert audit_events(site, "corrected") == []


def test_two_people_at_once_are_both_on_record_and_the_last_counts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_site(site.file)
    names = iter([f"p{i}" for i in range(8)])
    monkeypatch.setattr(correction, "login_name", lambda: next(names))
    with Ledger(site.state / "ledger.sqlite", read_only=True) as ledger:
        ((_, work),) = ledger.find(part="lot7/a.png")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: correction.correct(settings, work, [Correction(0, "bridge", 1)]), range(8)))
    lines = audit_events(site, "corrected")
    assert sorted(str(line["by"]) for line in lines) == [f"p{i}" for i in range(8)]
    human = result(site).pages[0].defects[0].human
    assert human is not None
    assert human.by == lines[-1]["by"]


def test_labels_that_no_model_knows_are_refused_with_the_nearest(semwatch: Command, site: Site, tmp_path: Path) -> None:
    repository = load_site(site.file).models.repository
    table = {"particle": {"code": 0}, "brigde": {"code": 7}}
    recipe = write_recipe(tmp_path / "recipe.yaml", classes=table)
    said = semwatch("recipe", "check", recipe, "--repository", repository, "--json")
    assert (said.code, said.json["error"], said.json["exit_code"]) == (2, "ConfigError", 2)
    assert "no model knows the label 'brigde', the nearest are bridge" in said.json["message"]
    assert semwatch("recipe", "check", recipe, "--repository", tmp_path).code == 0  # nothing to compare with
    shutil.copy(recipe, load_site(site.file).folders[0].recipe)
    assert "the nearest are bridge" in semwatch("doctor", "--site", site.file).words
    rows = {row["label"]: row for row in semwatch("models", "labels", "--site", site.file, "--json").json}
    assert (rows["particle"]["code"], rows["brigde"]["heads"], rows["bridge"]["code"]) == (0, [], None)
    assert "none knows it" in semwatch("models", "labels", "--site", site.file).words


def test_version_and_short_help(semwatch: Command) -> None:
    assert re.fullmatch(r"semwatch \d+\.\d+\.\d+\S*\n", semwatch("--version").out)
    assert semwatch("-h").out == semwatch("--help").out
    assert "--missed" in semwatch("correct", "-h").out


# --- once more -------------------------------------------------------------------------------------------------------


def test_lot_waits_to_be_judged_again_but_for_what_is_gone(semwatch: Command, site: Site) -> None:
    (site.drop / "lot7/w1/b.png").unlink()
    said = semwatch("rereview", "lot7", "--site", site.file, "--json")
    assert (said.code, said.json["queued"], said.json["gone"]) == (1, 1, ["lot7/w1/b.png"])
    assert semwatch("lot", "lot7", "--site", site.file, "--json").json["waiting"] == 1
    (line,) = audit_events(site, "rereview")
    assert (line["lot"], line["images"]) == (f"{SOURCE}/lot7", 1)
    with Ledger(site.state / "ledger.sqlite") as ledger:
        claims = []
        for path in ("lot8/copy.png", "lot7/a.png"):  # a copy never takes the place of the original
            file = site.drop / path
            claims.append(
                ledger.claim(SOURCE, path, sha256=file_sha256(file), stamp=stamp_of(file.lstat()), now_utc=UTC)
            )
        assert [claim.outcome for claim in claims] == ["in-flight", "retry"]


@pytest.mark.parametrize(
    ("wanted", "queued"),
    [
        (("bad.png",), ["bad"]),
        ((f"{SOURCE}/lot7/bad.png",), ["bad"]),
        (("lot7",), ["bad", "worse"]),
        (("lot7/w1/",), ["worse"]),
        (("*w*.png", "bad.png"), ["bad", "worse"]),
        (("--all",), ["bad", "worse"]),
    ],
)
def test_requeue_takes_what_people_call_files(semwatch: Command, site: Site, wanted, queued: list[str]) -> None:
    said = semwatch("quarantine", "requeue", "--site", site.file, "--json", *wanted)
    assert sorted(Path(row["path"]).stem for row in said.json) == queued
    assert len(audit_events(site, "requeued")) == len(queued)


def test_requeue_of_nothing_is_refused(semwatch: Command, site: Site) -> None:
    assert "nothing in quarantine fits 'lot9'" in semwatch("quarantine", "requeue", "lot9", "--site", site.file).words
    assert semwatch("quarantine", "requeue", "--site", site.file).code == 2
    assert UTC in semwatch("quarantine", "list", "--site", site.file).words


def test_purity_that_is_surely_below_the_asked_one_ends_with_1(semwatch: Command, site: Site) -> None:
    for i in range(3):
        semwatch("correct", "lot7/a.png", i + 1, "--not-a-defect", "--site", site.file)
    said = semwatch("quality", "--site", site.file, "--at-least", 0.5)
    assert (said.code, "purity below" in said.words) == (0, False), "one of each class proves nothing"
    said = semwatch("quality", "--site", site.file, "--at-least", 0.99)
    assert (said.code, "purity below 99%: bridge, particle" in said.words) == (1, True)
    assert semwatch("quality", "--site", site.file, "--at-least", 0.99, "--json").json["impure"] == [
        "bridge",
        "particle",
    ]
