"""Whose fault it is: a file's, a folder's, a service's. The whole daemon in this process, on real files and models."""

import errno
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import SOURCE, Site, make_site, png
from semwatch.errors import ConfigError, FileUnavailable, ImageError, ModelMismatch, ServiceUnavailable
from semwatch.intake import decoding
from semwatch.intake.drop_folder import Arrival
from semwatch.line import pipeline
from semwatch.operations import doctor
from semwatch.service import duplicates, faults, late_look, lot_tables
from semwatch.service.loop import Service
from semwatch.settings.site import load_site
from semwatch.store import pause
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.system import files
from semwatch.system.files import Stamp, stamp_of
from service_here import names, running, wait_for

UTC = "2026-01-01T00:00:00Z"


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, part: str, error: Callable[[], Exception]
) -> list[bool]:
    """Let a function fail where ``part`` is among its arguments, until the list that is given back is emptied."""
    real, fails = getattr(owner, name), [True]

    def function(*args: Any, **kwargs: Any) -> Any:
        if fails and any(part in str(value) for value in (*args[1:], *kwargs.values(), args[0] if args else "")):
            raise error()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)
    return fails


def unread(number: int, path: str = "busy") -> ServiceUnavailable:
    error = ServiceUnavailable(f"{path}: cannot be read now")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


# --- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "scope"),
    [
        (ValueError("a bug"), "file"),
        (MemoryError(), "file"),
        (OverflowError(), "file"),
        (ImageError("no image"), "file"),
        (FileUnavailable("out of memory"), "file"),
        (unread(errno.EBUSY), "file"),
        (unread(errno.EIO), "file"),
        (PermissionError(errno.EACCES, "not searchable"), "file"),
        (unread(errno.ENOSPC), "service"),
        (OSError(errno.EROFS, "read-only"), "service"),
        (ServiceUnavailable("Triton is away"), "service"),
        (ModelMismatch("arrays of another shape"), "file"),
        (ConfigError("the ledger is broken"), "service"),
    ],
)
def test_fault_with_all_folders_in_place(tmp_path: Path, error: Exception, scope: str) -> None:
    assert faults.scope_of(error, folder=tmp_path, results_dir=tmp_path) == scope
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fails_is_the_folders_where_that_is_away_and_a_services_where_the_results_are(tmp_path: Path) -> None:
    error = unread(errno.EIO)
    assert faults.scope_of(error, folder=tmp_path / "away", results_dir=tmp_path) == "folder"
    assert faults.scope_of(error, folder=tmp_path, results_dir=tmp_path / "away") == "service"
    assert faults.scope_of(ValueError(), folder=tmp_path / "away", results_dir=tmp_path / "away") == "file"


def test_file_that_cannot_be_looked_at_is_not_there(tmp_path: Path) -> None:
    assert not faults.is_there(tmp_path / ("x" * 5000))
    assert faults.is_there(tmp_path)


# --- one file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EIO])
def test_files_that_cannot_be_read_hold_up_no_other_and_are_reviewed_once_they_can(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fails = failing(monkeypatch, decoding, "read_file", "busy", lambda: unread(number))
    site = make_site(tmp_path / "site", tiny_repository)
    for name in ("busy1.png", "busy2.png", "busy3.png"):
        os.utime(site.put(name, png(len(name))), (1e9, 1e9))
    site.put("busy2.png", png(100))
    site.put("busy3.png", png(101))
    with running(site) as service:
        for i in range(5):
            site.put(f"good{i}.png", png(i))
        wait_for(lambda: len(names(site)) == 5)
        assert not service._away.is_down
        fails.clear()
        wait_for(lambda: len(names(site)) == 8)
    assert site.reasons() == {}


def test_file_that_cannot_be_read_for_an_hour_is_set_aside(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, decoding, "read_file", "busy", lambda: unread(errno.EIO))
    monkeypatch.setattr(faults, "PATIENCE_S", 0.5)
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("busy.png", png(1))
    with running(site):
        wait_for(site.reasons)
    assert "cannot be read now" in site.reasons()["busy.png.reason.json"]


def test_file_that_may_be_read_a_moment_later_is_reviewed(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> ImageError:
        fails.clear()
        error = ImageError("may not be read")
        error.__cause__ = PermissionError()
        return error

    fails = failing(monkeypatch, decoding, "read_file", "late", refuse)
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("late.png", png(1))
    with running(site):
        wait_for(lambda: names(site) == {"late.png"})
    assert site.reasons() == {}


def test_bug_in_the_work_on_one_file_is_that_files(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, pipeline, "review", "odd.png", lambda: RecursionError("a bug"))
    site = make_site(tmp_path / "site", tiny_repository, limits={"min_free_mb": 0, "max_attempts": 2})
    for i, name in enumerate(("odd.png", "good1.png", "good2.png")):
        os.utime(site.put(name, png(i)), (1e9 + i, 1e9 + i))
    with running(site):
        wait_for(lambda: len(names(site)) == 2 and site.reasons())
    assert site.reasons() == {"odd.png.reason.json": "gave up after 2 attempts: RecursionError: a bug"}
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("when", ["2300-01-01", "1601-01-01"])
def test_file_times_beyond_what_a_database_holds_are_no_fault(tmp_path: Path, tiny_repository: Path, when: str) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    subprocess.run(["touch", "-d", when, site.put("odd.png", png(1))], check=True)
    site.put("good.png", png(2))
    with running(site):
        wait_for(lambda: names(site) == {"odd.png", "good.png"})
    assert doctor.status(load_site(site.file))["waiting_files"] == 0


def test_thousand_nested_folders_hold_up_nothing(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("good.png", png(1))
    top = os.open(site.drop, os.O_RDONLY)
    deep = top
    for _ in range(1200):
        os.mkdir("d", dir_fd=deep)
        below = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    try:
        with running(site):
            wait_for(lambda: names(site) == {"good.png"})
    finally:
        subprocess.run(["rm", "-rf", site.drop], check=True)


def test_folders_of_any_depth_are_made_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "sync_folder", lambda _: None)  # a thousand flushes take long
    files.make_folder(tmp_path.joinpath(*["d"] * 1100))
    assert (tmp_path / "d" / "d").is_dir()
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_lot_among_the_results_that_leads_elsewhere_holds_up_no_other(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    (tmp_path / "other disk").mkdir()
    site.results.mkdir(parents=True)
    (site.results / "lot7").symlink_to(tmp_path / "other disk")
    (site.results / "ring").symlink_to("ring")
    for name in ("lot7/a.png", "ring/b.png", "lot8/c.png"):
        site.put(name, png(len(name) + ord(name[-5])))
    with running(site):
        wait_for(lambda: names(site) == {"c.png"} and _counts(site)["QUARANTINED"] == 1)
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        [work] = ledger.listing("QUARANTINED")
    assert "leads out of" in str(work.reason)
    assert "the reason is not beside the results" in str(work.reason)


def test_folder_that_is_swapped_for_a_link_leads_nowhere(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    private = tmp_path / "private"
    private.mkdir()
    (private / "a.png").write_bytes(png(7))
    service = Service(load_site(site.file))
    try:
        (site.drop / "lot").symlink_to(private)
        stamp = stamp_of((private / "a.png").lstat())
        service._file_work.process(Arrival(SOURCE, "lot/a.png", site.drop / "lot/a.png", stamp))
    finally:
        service._open.close()
    assert "behind a link" in site.reasons()["a.png.reason.json"]
    assert names(site) == set()


def _counts(site: Site) -> dict[str, int]:
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        return {str(state): n for state, n in ledger.counts().items()}


# --- what kills the process ----------------------------------------------------------------------------------------


def _die_on(site: Site, name: str, times: int, *, sha256: str = "ab" * 32) -> None:
    """Leave the ledger as deaths of the process leave it."""
    for _ in range(times):
        with Ledger(site.state / LEDGER) as ledger:
            ledger.claim(SOURCE, name, sha256=sha256, stamp=Stamp(1, 1), now_utc=UTC)
    Ledger(site.state / LEDGER).close()


def test_crash_loop_is_ended_at_the_start_with_its_story(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository, limits={"min_free_mb": 0, "max_attempts": 3})
    site.results.mkdir(parents=True)  # where the ledger knows work, a folder that is not there is a share that is away
    _die_on(site, "lot/killer.png", 3)
    Service(load_site(site.file))._open.close()
    assert "3 attempts that failed or ended the process" in site.reasons()["killer.png.reason.json"]
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        assert ledger.suspects() == []


def test_what_killed_the_process_is_tried_alone_however_many_files_were_given_back(
    tmp_path: Path, tiny_repository: Path
) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Ledger(site.state / LEDGER) as ledger:
        for i in range(20):
            held = ledger.claim(SOURCE, f"gone{i}.png", sha256=f"{i:064d}", stamp=Stamp(1, 1), now_utc=UTC)
            ledger.give_back(held, "the models were away")
    _die_on(site, "killer.png", 1)
    service = Service(load_site(site.file))
    assert not service._has_suspects()  # the file is gone
    site.put("killer.png", png(1))
    assert service._has_suspects()
    service._open.close()


# --- results that are away -----------------------------------------------------------------------------------------


def test_results_that_are_away_are_waited_for_and_it_is_told(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    results, away = tmp_path / "site" / "results", tmp_path / "site" / "elsewhere"
    site.put("a.png", png(1))
    with running(site) as service:
        wait_for(lambda: names(site) == {"a.png"})
        results.rename(away)
        wait_for(lambda: pause.stated(site.state))
        site.put("b.png", png(2))
        wait_for(lambda: _metric(service, "semwatch_waiting_files") == 1)
        assert _metric(service, "semwatch_paused", reason="results away") == 1
        assert _metric(service, "semwatch_oldest_waiting_seconds") > 0
        assert _metric(service, "semwatch_ready") == 1
        settings = load_site(site.file)
        assert "results away since" in str(doctor.status(settings)["paused"])
        assert [check.ok for check in doctor.examine(settings) if check.name == "line"] == [False]
        assert not results.exists()  # nothing is written where the share is not
        away.rename(results)
        wait_for(lambda: names(site) == {"a.png", "b.png"})
        wait_for(lambda: _metric(service, "semwatch_paused", reason="results away") == 0)
        assert doctor.status(settings)["paused"] is None
    assert site.reasons() == {}


def test_start_waits_for_results_that_are_away(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("a.png", png(1))
    with running(site):
        wait_for(lambda: names(site) == {"a.png"})
    results = tmp_path / "site" / "results"
    results.rename(tmp_path / "away")
    site.put("b.png", png(2))
    with running(site):
        wait_for(lambda: pause.stated(site.state))
        (tmp_path / "away").rename(results)
        wait_for(lambda: names(site) == {"a.png", "b.png"})


def _metric(service: Service, name: str, **labels: str) -> float:
    value = service.metrics.registry.get_sample_value(name, labels)
    assert value is not None
    return value


# --- identity ------------------------------------------------------------------------------------------------------


def test_other_content_of_the_same_name_size_and_time_is_reviewed(tmp_path: Path, tiny_repository: Path) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    first, second = (png(i).ljust(20_000, b"\0") for i in (1, 2))
    os.utime(site.put("live.png", first), (1.7e9, 1.7e9))
    with running(site):
        wait_for(lambda: len(site.reviews()) == 1)
        os.utime(site.put("live.png", second), (1.7e9, 1.7e9))
        wait_for(lambda: len(site.reviews()) == 2)
    assert _counts(site)["DONE"] == 2


def test_content_that_comes_without_a_trace_is_found_by_the_second_look(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a share that keeps size and times, and whose inodes and times of change say nothing."""
    monkeypatch.setattr(late_look, "LATER_S", 4.0)  # the other content must come before the look
    blind = Stamp(20_000, time.time_ns(), time.time_ns(), None)
    monkeypatch.setattr("semwatch.intake.folder_rules.stamp_of", lambda status, **_: blind)
    monkeypatch.setattr("semwatch.service.faults.stamp_of", lambda status, **_: blind)
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("live.png", png(1).ljust(20_000, b"\0"))
    with running(site):
        wait_for(lambda: len(site.reviews()) == 1)
        site.put("live.png", png(2).ljust(20_000, b"\0"))
        wait_for(lambda: len(site.reviews()) == 2)


def test_only_young_files_are_looked_at_twice() -> None:
    now_ns = time.time_ns()
    assert late_look.look_again_utc(Stamp(1, now_ns, now_ns)) is not None
    assert late_look.look_again_utc(Stamp(1, 0, now_ns)) is not None
    assert late_look.look_again_utc(Stamp(1, 0, now_ns - 600 * 10**9)) is None
    assert late_look.look_again_utc(Stamp(1, 0)) is None


# --- tables --------------------------------------------------------------------------------------------------------


def test_refused_files_and_duplicates_have_rows_and_a_result_takes_the_place_of_its_reason(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "INTERVAL_S", 0.1)
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("lot/a.png", png(1))
    site.put("lot/bad.png", b"no image")
    with running(site):
        wait_for(lambda: names(site) == {"a.png"} and site.reasons())
        site.put("again/a.png", png(1))
        wait_for((site.results / "again" / "a.png.duplicate.json").exists)
        site.put("lot/bad.png", png(2))
        # The result is written before its reason goes: a crash between leaves both, never none.
        wait_for(lambda: names(site) == {"a.png", "bad.png"} and not site.reasons())
        site.put("lot/a.png", b"no image any more")
        wait_for(site.reasons)
    table = (site.results / "lot" / "lot.csv").read_text()
    assert {line.split(",")[1] for line in table.splitlines()[1:]} == {"lot/a.png", "lot/bad.png"}
    assert table.count("refused") == 1
    again = json.loads((site.results / "again" / "a.png.duplicate.json").read_text())
    assert (again["original"], again["result"]) == ("lot/a.png", f"{SOURCE}/lot/a.png.review.json")
    assert "again/a.png" in (site.results / "again" / "lot.csv").read_text()
    assert "duplicate" in (site.results / "again" / "lot.csv").read_text()


def test_table_that_is_gone_is_made_again_after_a_start(
    tmp_path: Path, tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lot_tables, "INTERVAL_S", 0.1)
    site = make_site(tmp_path / "site", tiny_repository)
    site.put("lot/a.png", png(1))
    table = site.results / "lot" / "lot.csv"
    with running(site):
        wait_for(table.exists)
    before = table.read_text()
    table.unlink()
    with running(site):
        wait_for(table.exists)
    assert table.read_text() == before


def test_stamp_at_the_ends_of_what_a_database_holds(tmp_path: Path) -> None:
    subprocess.run(["touch", "-d", "2300-01-01", tmp_path / "a"], check=True)
    assert stamp_of((tmp_path / "a").stat()).mtime_ns == 2**63 - 1
