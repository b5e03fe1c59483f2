"""What left its drop folder long ago leaves the ledger, and nothing else does."""

import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from semwatch.errors import ServiceUnavailable
from semwatch.service import forgetting
from semwatch.service.forgetting import Forgetting
from semwatch.store.ledger import Ledger
from semwatch.system.clock import utc_of
from semwatch.system.files import stamp_of

START = datetime(2025, 1, 1, tzinfo=UTC)
KEEP_DAYS, REREAD_DAYS = 10.0, 20.0


class Site:
    """A ledger, drop folders, and a clock in days; every file is reviewed on the day it comes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drops = {source: folder / source for source in ("a", "b")}
        for drop in self.drops.values():
            drop.mkdir()
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.day, self.seconds = 0.0, 0.0
        monkeypatch.setattr(forgetting.time, "monotonic", lambda: self.seconds)
        self.forgetting = Forgetting(
            self.ledger, self.drops, keep_days=KEEP_DAYS, reread_days=REREAD_DAYS, now=lambda: self.now
        )

    @property
    def now(self) -> datetime:
        return START + timedelta(days=self.day)

    def drop(self, source: str, name: str) -> Path:
        """Put a file there and review it, unless the ledger says that this is done; return it."""
        file = self.drops[source] / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(name))
        return file

    def review(self) -> list[str]:
        """Review what the ledger does not know as finished, as the daemon does; return the paths."""
        reviewed = []
        for source, drop in self.drops.items():
            for file in sorted(path for path in drop.rglob("*") if path.is_file()):
                path, stamp = str(file.relative_to(drop)), stamp_of(file.stat())
                if self.ledger.settled(source, [(path, stamp)]):
                    continue
                now_utc, sha256 = utc_of(self.now), file.read_bytes().hex()
                claim = self.ledger.claim(source, path, sha256=sha256, stamp=stamp, now_utc=now_utc)
                if claim.is_mine:
                    self.ledger.finish(claim, outbox=[], audit={}, now_utc=now_utc)
                    reviewed.append(path)
        return reviewed

    def days_pass(self, days: float) -> None:
        """Days with a round each, and the reviews that the rounds cause, of which there must be none."""
        for _ in range(round(days)):
            self.day += 1
            self.seconds += forgetting.ROUND_S
            for _ in range(20):
                self.forgetting.step()
            assert self.review() == [], "a file that lies there was reviewed twice"

    @property
    def n_known(self) -> int:
        return self.ledger.counts()["DONE"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path, monkeypatch)
    yield site
    site.ledger.close()


def test_empty_ledger_and_empty_folders_are_no_fault(site: Site) -> None:
    site.days_pass(30)
    assert site.n_known == 0


def test_file_that_left_is_forgotten_after_its_days_and_reviewed_anew_when_it_comes_back(site: Site) -> None:
    gone, stays = site.drop("a", "lot/gone.tif"), site.drop("a", os.fsdecode(b"lot/stays \xff.tif"))
    assert len(site.review()) == 2
    gone.unlink()
    site.days_pass(KEEP_DAYS - 1)
    assert site.n_known == 2
    site.days_pass(KEEP_DAYS)
    assert site.n_known == 1
    site.drop("a", "lot/gone.tif")
    assert site.review() == ["lot/gone.tif"]
    assert stays.exists()


def test_file_that_lies_there_is_never_forgotten(site: Site) -> None:
    for i in range(250):  # more than two pages
        site.drop("ab"[i % 2], f"{i}.tif")
    site.review()
    site.days_pass(10 * KEEP_DAYS)
    assert site.n_known == 250


def test_file_that_moved_within_the_folder_is_known_by_its_content(site: Site) -> None:
    file = site.drop("a", "1.tif")
    site.review()
    file.rename(file.with_name("2.tif"))
    site.days_pass(5 * KEEP_DAYS)
    assert site.n_known == 1


@pytest.mark.parametrize("fault", ["missing", "empty", "a file"])
def test_share_that_is_not_mounted_makes_nothing_forgotten(site: Site, fault: str) -> None:
    site.drop("a", "1.tif")
    site.review()
    away = site.drops["a"].rename(site.drops["a"].with_name("away"))
    if fault == "empty":
        site.drops["a"].mkdir()
    elif fault == "a file":
        site.drops["a"].write_text("no folder")
    for _ in range(5):
        site.day += KEEP_DAYS
        site.seconds += forgetting.ROUND_S
        for _ in range(3):
            site.forgetting.step()
    assert site.n_known == 1
    if fault == "empty":
        site.drops["a"].rmdir()
    elif fault == "a file":
        site.drops["a"].unlink()
    away.rename(site.drops["a"])
    assert site.review() == []


def test_source_that_the_settings_do_not_name_now_is_remembered(site: Site) -> None:
    file = site.drop("b", "1.tif")
    site.review()
    site.drop("a", "other.tif")
    site.forgetting = Forgetting(
        site.ledger, {"a": site.drops["a"]}, keep_days=KEEP_DAYS, reread_days=REREAD_DAYS, now=lambda: site.now
    )
    site.review()
    site.days_pass(5 * KEEP_DAYS)
    assert file.exists()
    assert site.n_known == 2


def test_content_that_another_took_the_place_of_is_forgotten(site: Site) -> None:
    file = site.drop("a", "1.tif")
    site.review()
    file.write_bytes(b"other")
    assert site.review() == ["1.tif"]
    assert site.n_known == 2
    site.days_pass(2 * KEEP_DAYS)
    assert site.n_known == 1


def test_note_is_kept_while_what_it_speaks_of_may_be_judged_again(site: Site) -> None:
    site.ledger.note(audit={}, once="revision", once_utc=utc_of(START))
    site.days_pass(REREAD_DAYS - 1)
    assert site.ledger.was_noted("revision")
    site.days_pass(2)
    assert not site.ledger.was_noted("revision")


def test_a_round_is_once_a_day_and_a_few_files_a_step(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[int] = []
    real = site.ledger.paths_seen_before

    def counted(*args: object, **options: object) -> list[tuple[str, str, str]]:
        page = real(*args, **options)  # type: ignore[arg-type]
        pages.append(len(page))
        return page

    monkeypatch.setattr(site.ledger, "paths_seen_before", counted)
    for i in range(forgetting.FILES_A_STEP + 1):
        site.drop("a", f"{i}.tif")
    site.review()
    site.day = KEEP_DAYS
    for _ in range(5):
        site.forgetting.step()
    assert pages == [forgetting.FILES_A_STEP, 1, 0]
    site.seconds += forgetting.ROUND_S - 1
    site.forgetting.step()
    assert len(pages) == 3
    site.seconds += 1
    site.forgetting.step()
    assert len(pages) == 4


def test_disk_that_refuses_is_a_warning_and_tried_later(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.drop("a", "1.tif").unlink()
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise ServiceUnavailable("the disk is full")

        patch.setattr(site.ledger, "forget_work", full)
        site.forgetting.step()
        site.forgetting.step()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    site.seconds += forgetting.RETRY_S
    site.days_pass(1)
