"""``semwatch logs`` beside sites where a real daemon has worked."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import Command, Said, in_process, put
from daemon import SOURCE, Daemon, Site, make_site, png
from semwatch.line import notices
from semwatch.service.delivery import deliver_audit
from semwatch.store import results
from semwatch.store.audit import AuditLog
from semwatch.store.ledger import Ledger
from semwatch.store.review_record import VerdictRecord
from semwatch.system.files import Stamp

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def semwatch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Command:
    """The command beside an empty journal: the machine's own may hold anything."""
    journalctl = put(tmp_path_factory.mktemp("bin") / "journalctl", b"#!/bin/sh\n")
    journalctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(journalctl.parent), prepend=os.pathsep)
    return in_process(capsys, monkeypatch)


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Site:
    """A daemon reviewed two images of one name, met a duplicate and a broken file, had no Redis, and was stopped."""
    site = make_site(tmp_path_factory.mktemp("site"), tiny_repository, redis_url=NOWHERE)
    site.put("lot7/a.png", png(1))
    site.put("lot8/a.png", png(2))
    site.put("lot8/only.png", png(3))
    site.put("lot8/broken.png", b"no image")
    with Daemon(site) as daemon:
        daemon.wait_ready()
        daemon.wait_for(lambda: daemon.log().count(" defects, ") == 3 and "broken.png quarantined" in daemon.log())
        site.put("lot9/copy.png", png(1))
        daemon.wait_for(lambda: "not reviewed again" in daemon.log())
        assert daemon.stop() == 0
    return site


@pytest.fixture
def own(worked: Site, tmp_path: Path) -> Site:
    """A copy of that site to change."""
    return Site(shutil.copytree(worked.folder, tmp_path / "site"))


def story(semwatch: Command, site: Site, image: object, *more: object) -> dict[str, Any]:
    said = semwatch("logs", image, "--site", site.file, "--json", *more)
    assert said.code == 0, said
    assert isinstance(said.json, dict)
    return said.json


def texts(told: dict[str, Any], where: str) -> list[str]:
    return [event["text"] for event in told["events"] if event["where"] == where]


def sha_of(site: Site, path: str) -> str:
    with Ledger(site.state / "ledger.sqlite", read_only=True) as ledger:
        return next(work.sha256 for at, work in ledger.find(part=path) if at == path)


# --- nothing to tell -----------------------------------------------------------------------------------------------


def test_site_that_never_ran_and_empty_folder_say_where_was_looked(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    said = semwatch("logs", "a.tif", "--site", site.file)
    assert said.code == 1
    assert said.out == (
        f"nothing fits 'a.tif'; looked in {site.state / 'ledger.sqlite'} (not there yet), {site.drop}\n"
    )
    site.drop.rmdir()
    said = semwatch("logs", "a.tif", "--site", site.file, "--json")
    assert (said.code, said.json["matches"], said.json["waiting"]) == (1, [], [])
    assert said.json["looked_in"][1] == f"{site.drop} (not there)"


def test_too_few_digits_are_no_sha256_and_that_is_said(semwatch, worked) -> None:
    digits = next(d for n in range(1 << 20) if (d := f"{n:05x}") not in sha_of(worked, "lot7/a.png"))
    said = semwatch("logs", digits, "--site", worked.file)
    assert said.code == 1
    assert "of a sha256, give 6 digits or more" in said.out


# --- one image -----------------------------------------------------------------------------------------------------


def test_reviewed_image_is_told_in_time_order_from_every_place(semwatch, worked) -> None:
    told = story(semwatch, worked, "only.png")
    assert (told["source"], told["path"], told["state"]) == (SOURCE, "lot8/only.png", "DONE")
    assert told["sha256"] == sha_of(worked, "lot8/only.png")
    times = [event["utc"] for event in told["events"]]
    assert times == sorted(times)
    assert all(time.endswith("Z") for time in times)
    assert texts(told, "file") == [f"lot8/only.png was written, {len(png(3))} bytes (its own time)"]
    assert texts(told, "ledger") == ["lot8/only.png was seen and taken for review", "the review was finished"]
    (result,) = texts(told, "result")
    assert "recipe test, detector 1" in result
    assert result.endswith(str(worked.results / "lot8/only.png.review.json"))
    (audit,) = texts(told, "audit")
    assert ": reviewed, " in audit
    assert told["now"][0] == "reviewed: nothing is left to do"
    assert told["now"][-1] == "lot8/only.png lies in the drop folder as it was reviewed"


def test_records_that_wait_for_redis_are_counted(semwatch, worked) -> None:
    told = story(semwatch, worked, "only.png")
    (waits,) = [sentence for sentence in told["now"] if "Redis" in sentence]
    assert waits.startswith("waits for Redis: 1 results")
    with Ledger(worked.state / "ledger.sqlite", read_only=True) as ledger:
        assert len(ledger.unpublished_with(sha_of(worked, "lot8/only.png").encode())) < ledger.n_unpublished()


def test_text_for_people_says_the_same(semwatch, worked) -> None:
    said = semwatch("logs", "only.png", "--site", worked.file)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0] == f"{SOURCE}/lot8/only.png"
    assert lines[1] == f"sha256 {sha_of(worked, 'lot8/only.png')}"
    assert "now:" in lines
    assert any(line.startswith("  20") and " ledger   the review was finished" in line for line in lines)


def test_duplicate_tells_whose_content_it_has(semwatch, worked) -> None:
    told = story(semwatch, worked, "lot9/copy.png")
    assert told["path"] == "lot7/a.png"
    assert "lot9/copy.png has the same content: a duplicate of lot7/a.png" in texts(told, "ledger")
    assert told == {**story(semwatch, worked, "lot7/a.png"), "not_asked": told["not_asked"]}


def test_quarantined_image_tells_the_reason_and_what_to_do(semwatch, worked) -> None:
    told = story(semwatch, worked, "broken.png")
    assert told["state"] == "QUARANTINED"
    assert texts(told, "ledger")[-1].startswith("was put into quarantine: ")
    assert texts(told, "result")[0].startswith("quarantine after 1 attempts: ")
    assert ": quarantined: " in texts(told, "audit")[0]
    assert all(event["utc"] for event in told["events"])
    assert told["now"][0].endswith(f"semwatch quarantine requeue {told['sha256'][:16]}")


def test_requeued_image_waits_and_says_so(semwatch, own) -> None:
    assert semwatch("quarantine", "requeue", sha_of(own, "lot8/broken.png")[:8], "--site", own.file).code == 0
    told = story(semwatch, own, "broken.png")
    assert (told["state"], told["now"][0]) == ("SEEN", "waits for another try: requeued")
    assert texts(told, "audit") != []


def test_attempts_that_died_are_told_with_their_limit(semwatch, own) -> None:
    with Ledger(own.state / "ledger.sqlite") as ledger:
        ledger.claim(SOURCE, "late.png", sha256="c" * 64, stamp=Stamp(1, 1), now_utc="2026-01-01T00:00:00Z")
    told = story(semwatch, own, "late.png")
    assert told["state"] == "CLAIMED"
    with Ledger(own.state / "ledger.sqlite"):
        pass  # a start after the death
    told = story(semwatch, own, "cccccc")
    assert told["now"][:2] == [
        "waits for another try: the process died on it",
        "1 tries failed or ended the process; the limit is 5",
    ]
    assert told["now"][-1] == "late.png is no longer in the drop folder"


def test_revised_image_tells_both_revisions_and_what_changed(semwatch, own) -> None:
    target = own.results / "lot8/only.png.review.json"
    first = results.read(target)
    page = next(page for page in first.pages if page.defects)
    verdict = page.defects[0].verdict
    other = VerdictRecord(kind="known", label="bridge-like", confidence=1, class_code=None, nearest=verdict.nearest)
    place = (page.page, page.defects[0].defect_id)
    revised = results.revise(target, {place: other}, head_version=9, utc="2030-01-01T00:00:00Z")
    assert revised is not None
    with Ledger(own.state / "ledger.sqlite") as ledger, AuditLog(own.state / "audit.jsonl") as log:
        ledger.note(
            audit=notices.audit_entry(revised, target.name, before=results.read(results.revision_path(target, 1)))
        )
        told = story(semwatch, own, "only.png")  # the line still waits in the ledger
        deliver_audit(ledger, log)
    assert story(semwatch, own, "only.png")["events"] == told["events"]
    assert [text.partition(": ")[0] for text in texts(told, "result")][1] == "revision 2"
    assert texts(told, "result")[0].endswith("only.png.r1.review.json")
    assert texts(told, "audit")[1].endswith(f"revised by head 9: {verdict.label or verdict.kind} -> bridge-like")
    only_late = story(semwatch, own, "only.png", "--since", "2029-06-01")
    assert [event["where"] for event in only_late["events"]] == ["result", "audit"]
    assert story(semwatch, own, "only.png", "--since", "2030-01-01T02:00+01:00")["events"] == []


def test_content_that_took_an_older_ones_name_leaves_both_stories(semwatch, own) -> None:
    old = sha_of(own, "lot8/only.png")
    own.put("lot8/only.png", png(4))
    told = story(semwatch, own, old[:6])
    assert told["now"][-1].startswith("lot8/only.png was written again since")
    with Daemon(own) as daemon:
        daemon.wait_ready()
        daemon.wait_for((own.results / f"lot8/only.png.{old[:8]}.review.json").exists)
        assert daemon.stop() == 0
    said = semwatch("logs", "lot8/only.png", "--site", own.file, "--json")
    assert (said.code, len(said.json["matches"])) == (1, 2)
    assert texts(story(semwatch, own, old), "result")[0].endswith(f"only.png.{old[:8]}.review.json")


def test_audit_log_that_is_gone_or_torn_is_said_and_the_rest_told(semwatch, own) -> None:
    log = own.state / "audit.jsonl"
    log.write_bytes(log.read_bytes() + b'{"sha256": "' + sha_of(own, "lot8/only.png").encode())
    assert len(texts(story(semwatch, own, "only.png"), "audit")) == 1
    log.unlink()
    told = story(semwatch, own, "only.png")
    assert any(sentence.startswith("the audit log was not read: there is none at") for sentence in told["not_asked"])
    assert texts(told, "ledger") != []


def test_journal_that_cannot_be_asked_is_said(semwatch, worked, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert story(semwatch, worked, "only.png")["not_asked"] == ["the journal was not read: journalctl is not here"]


# --- which image ---------------------------------------------------------------------------------------------------


def test_name_path_part_source_and_whole_path_find_the_same(semwatch, worked, monkeypatch) -> None:
    sha = sha_of(worked, "lot8/only.png")
    file = worked.drop / "lot8/only.png"
    monkeypatch.chdir(worked.drop)
    names = (
        "only.png",
        "lot8/only.png",
        "8/onl",
        f"{SOURCE}/lot8/only.png",
        file,
        "./lot8/only.png",
        sha,
        sha[:6].upper(),
    )
    for name in names:
        assert story(semwatch, worked, name)["sha256"] == sha, name


def test_several_that_fit_are_listed_with_digits_to_choose_by(semwatch, worked) -> None:
    said = semwatch("logs", "a.png", "--site", worked.file)
    assert said.code == 1
    assert said.out.startswith("2 images fit 'a.png'")
    for path in ("lot7/a.png", "lot8/a.png"):
        assert f"  {sha_of(worked, path)[:16]}  {SOURCE}/{path}  DONE\n" in said.out
    assert semwatch("logs", "lot", "--site", worked.file).out.startswith("4 images fit")


def test_wrong_since_is_a_usage_error_in_words(semwatch, worked) -> None:
    said = semwatch("logs", "only.png", "--site", worked.file, "--since", "yesterday")
    assert said.code == 2
    assert "write 30m, 2h, 7d" in said.words
    assert story(semwatch, worked, "only.png", "--since", "7d")["events"] != []


# --- not reviewed yet ----------------------------------------------------------------------------------------------


def ask(semwatch: Command, site: Site, image: str) -> Said:
    said = semwatch("logs", image, "--site", site.file)
    assert said.code == 1
    return said


def watch(site: Site, **rule: object) -> None:
    settings = yaml.safe_load(site.file.read_text())
    settings["folders"][0] |= rule
    site.file.write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize(
    ("name", "rule", "why"),
    [
        ("new.png", {}, "it is complete and waits for its turn\nno daemon runs on this site"),
        ("new.png", {"completeness": "marker"}, "waits for its marker, one of new.png.done, new.png.trigger, new.done"),
        ("new.png", {"completeness": "steady", "steady_s": 3600.0}, "must be steady for 3600 s"),
        ("new.png.part", {}, "a temporary one"),
        ("new.txt", {}, "no image by its name"),
        ("sub/new.png", {"recursive": False}, "lies in a sub-folder"),
    ],
)
def test_file_that_waits_unseen_is_told_with_its_reason(semwatch, own, name: str, rule, why: str) -> None:
    watch(own, **rule)
    file = own.drop / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(png(7))
    said = ask(semwatch, own, name)
    assert said.out.startswith(f"{file} is not in the ledger: ")
    assert why in said.out


def test_marker_older_than_its_file_makes_it_wait_until_steady(semwatch, own) -> None:
    watch(own, completeness="marker", steady_s=3600.0)
    (own.drop / "new.png").write_bytes(png(7))
    (own.drop / "new.done").touch()
    os.utime(own.drop / "new.done", (1, 1))
    assert "must be steady for 3600 s" in ask(semwatch, own, "new.png").out
    os.utime(own.drop / "new.done")
    assert "complete and waits" in ask(semwatch, own, "new.png").out


def test_link_is_not_followed_and_that_is_said(semwatch, own) -> None:
    (own.drop / "link.png").symlink_to(own.drop / "lot8/only.png")
    assert "links are not followed" in ask(semwatch, own, "link.png").out


def test_new_file_is_not_taken_for_an_older_one_whose_path_ends_alike(semwatch, own) -> None:
    own.put("only.png", png(7))
    assert ask(semwatch, own, str(own.drop / "only.png")).out.startswith(
        f"{own.drop / 'only.png'} is not in the ledger"
    )
    assert ask(semwatch, own, "only.png").out.startswith(f"{own.drop / 'only.png'} is not in the ledger")
    assert story(semwatch, own, "lot8/only.png")["state"] == "DONE"


def test_json_of_what_waits_is_for_machines(semwatch, own) -> None:
    own.put("new.png", png(7))
    said = semwatch("logs", "new.png", "--site", own.file, "--json")
    assert (said.code, said.json["matches"]) == (1, [])
    assert said.json["waiting"][0].endswith("it is complete and waits for its turn")
    assert json.dumps(said.json["looked_in"])


def test_file_name_that_is_no_utf_8_has_its_story(semwatch, own) -> None:
    sha = "d" * 64
    with Ledger(own.state / "ledger.sqlite") as ledger:
        ledger.claim(SOURCE, "lot\udcff/a.png", sha256=sha, stamp=Stamp(1, 1), now_utc="2026-01-01T00:00:00Z")
    assert story(semwatch, own, "lot\udcff/a.png")["path"] == "lot\\xff/a.png"
    said = semwatch("logs", sha[:8], "--site", own.file)
    assert (said.code, said.out.splitlines()[0]) == (0, f"{SOURCE}/lot\\xff/a.png")
