"""Tables of lots follow results: appended where that is enough, written anew where it is not, whole after any crash."""

import csv
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from factories import make_review
from semwatch.errors import ServiceUnavailable
from semwatch.service import lot_tables
from semwatch.service.lot_tables import LotTables, row_of
from semwatch.store import lot_table, results
from semwatch.store.corrections import Correction, corrected
from semwatch.store.ledger import Ledger
from semwatch.store.lot_table import LOT
from semwatch.store.result_index import INDEX, open_index
from semwatch.system.files import Stamp

UTC = "2025-03-01T08:00:00Z"


class Line:
    """Results, the ledger, and a clock that stands still unless a test moves it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.now = folder, 1000.0
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.results = folder / "results"
        self.tables = LotTables(self.ledger.lot_rows, self.results)
        self.anew: Counter[str] = Counter()
        """How often a table was written anew, by lot."""
        self.cost_s = 0.0
        """Time that it takes."""
        monkeypatch.setattr(lot_tables.time, "monotonic", lambda: self.now)
        real = lot_table.write

        def counted(lot_dir: Path) -> list[Path]:
            self.anew[lot_dir.name] += 1
            self.now += self.cost_s
            return real(lot_dir)

        monkeypatch.setattr(lot_table, "write", counted)

    def write(self, path: str, sha256: str | None = None) -> results.ReviewPaths:
        """Write a result, as a worker does before the ledger has it."""
        review = replace(make_review(1, path=path), sha256=sha256 or path.encode().hex().ljust(64, "0")[-64:])
        return results.write(review, results_dir=self.results)

    def finish(self, path: str, written: results.ReviewPaths) -> None:
        sha256 = results.read(written.json).sha256
        claim = self.ledger.claim("tool-a", path, sha256=sha256, stamp=Stamp(1, 1), now_utc=UTC)
        row = row_of(written.json, self.results, is_new=written.is_new)
        self.ledger.finish(claim, outbox=[], audit={}, now_utc=UTC, row=row)

    def review(self, *paths: str, sha256: str | None = None) -> None:
        for path in paths:
            self.finish(path, self.write(path, sha256))

    def step(self) -> None:
        self.now += lot_tables.INTERVAL_S
        self.tables.step()

    def restart(self) -> None:
        """The process dies and the daemon starts again."""
        self.ledger.close()
        self.ledger = Ledger(self.folder / "ledger.sqlite")
        self.tables = LotTables(self.ledger.lot_rows, self.results)

    def rows(self, lot: str) -> list[str]:
        with (self.results / "tool-a" / lot / LOT).open(newline="") as file:
            return [Path(row["path"]).name for row in csv.DictReader(file)]

    def is_up_to_date(self) -> bool:
        return not self.ledger.lot_rows.new(1) and not self.ledger.lot_rows.changed()


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    line = Line(tmp_path, monkeypatch)
    yield line
    line.ledger.close()


def indexed(line: Line) -> dict[str, str]:
    with open_index(line.folder / INDEX) as index:
        return {file.path: file.outcome for lot in index.lots() for file in index.files(lot)}


def test_index_follows_what_is_appended_revised_and_left_by_a_crash(line: Line) -> None:
    with open_index(line.folder / INDEX) as index:
        line.tables = LotTables(line.ledger.lot_rows, line.results, index)
        line.review("lot/a.tif")
        line.step()
        assert indexed(line) == {"lot/a.tif": "reviewed"}
        line.review("lot/b.tif", "lot/c.tif")  # appended
        line.step()
        assert len(indexed(line)) == 3
        path = line.results / "tool-a" / "lot" / "a.tif.review.json"
        said = [Correction(0, "void", 1)]
        results.change(path, lambda record: corrected(record, said, by="ada", utc=UTC))
        line.ledger.lot_rows.write_anew("tool-a/lot")
        line.step()
        assert len(index.defects(is_judged=True)) == 1
        written = line.write("lot/d.tif")  # the process dies between the result and the ledger
        line.restart()
        line.tables = LotTables(line.ledger.lot_rows, line.results, index)
        line.finish("lot/d.tif", written)
        line.restart()  # and again before the table has it
        (line.results / "tool-a" / "lot" / "c.tif.review.json").unlink()
        line.tables = LotTables(line.ledger.lot_rows, line.results, index)
        line.step()
        assert sorted(indexed(line)) == ["lot/a.tif", "lot/b.tif", "lot/d.tif"]


def test_broken_index_stops_no_table(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    with open_index(line.folder / INDEX) as index:
        line.tables = LotTables(line.ledger.lot_rows, line.results, index)
        with sqlite3.connect(line.folder / INDEX) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        (line.folder / INDEX).write_bytes(b"SQLite format 3\0" + bytes(40_000))
        line.review("lot/a.tif")
        line.step()
    assert line.rows("lot") == ["a.tif"]
    assert "made anew at the next start" in caplog.text


def test_nothing_reviewed_is_no_table(line: Line) -> None:
    line.step()
    line.tables.step(is_last=True)
    assert not line.results.exists()


def test_first_results_make_a_table_and_later_ones_are_appended(line: Line) -> None:
    line.review("lot/b.tif", "lot/c.tif")
    line.step()
    assert line.rows("lot") == ["b.tif", "c.tif"]
    for name in ("z.tif", "a.tif"):
        line.review(f"lot/{name}")
        line.step()
    assert line.rows("lot") == ["b.tif", "c.tif", "z.tif", "a.tif"]
    assert line.anew == {"lot": 1}
    assert line.is_up_to_date()


def test_result_in_a_lot_of_any_size_reads_itself_alone(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    line.review(*(f"lot/{i}.tif" for i in range(60)))
    line.step()
    line.review("lot/new.tif")
    read: list[str] = []
    real = results.read
    monkeypatch.setattr(results, "read", lambda path: read.append(path.name) or real(path))
    for _ in range(20):
        line.step()
    assert read == ["new.tif.review.json"]
    assert line.rows("lot")[-1] == "new.tif"


def test_steps_come_no_more_often_than_their_interval(line: Line) -> None:
    line.step()
    line.review("lot/a.tif")
    line.tables.step()
    assert not line.is_up_to_date()
    line.step()
    assert line.is_up_to_date()


def test_result_that_replaces_another_leaves_one_row(line: Line) -> None:
    line.review("lot/a.tif", "lot/b.tif")
    line.step()
    line.review("lot/a.tif", sha256="f" * 64)
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif"]
    assert line.anew == {"lot": 2}


def test_revision_is_brought_into_the_table_once(line: Line) -> None:
    line.review("lot/a.tif", "lot/b.tif")
    line.step()
    path = line.results / "tool-a/lot/a.tif.review.json"
    for _ in range(2):
        line.ledger.note(audit={}, once="revision", row=row_of(path, line.results, is_new=False))
        line.step()
    assert line.anew == {"lot": 2}
    assert line.is_up_to_date()


@pytest.mark.parametrize("died", ["before the rows", "in the middle of them", "before they were noted"])
def test_crash_around_an_append_heals(line: Line, monkeypatch: pytest.MonkeyPatch, died: str) -> None:
    line.review("lot/b.tif")
    line.step()
    line.review("lot/a.tif")
    table = line.results / "tool-a/lot" / LOT
    if died != "before the rows":
        with monkeypatch.context() as patch:
            patch.setattr(line.ledger.lot_rows, "mark_listed", _die)
            with pytest.raises(KeyboardInterrupt):
                line.step()
        assert line.rows("lot") == ["b.tif", "a.tif"]
    if died == "in the middle of them":
        table.write_bytes(table.read_bytes()[:-20])
    line.restart()
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif"]
    assert line.is_up_to_date()
    line.review("lot/c.tif")
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif", "c.tif"]


def _die(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("refuses", ["the table", "the ledger"])
def test_disk_that_refuses_around_an_append_leaves_no_row_twice(
    line: Line, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    line.review("lot/b.tif", "other/b.tif")
    line.step()
    line.review("lot/a.tif", "other/a.tif")
    with monkeypatch.context() as patch:
        real = lot_table.append

        def refused(*arguments: Any) -> None:
            if refuses == "the table":
                real(*arguments)
                raise ServiceUnavailable("the disk is full")
            raise ServiceUnavailable("the disk is full") from sqlite3.OperationalError()

        patch.setattr(
            *((lot_table, "append") if refuses == "the table" else (line.ledger.lot_rows, "mark_listed")), refused
        )
        if refuses == "the table":
            line.step()  # the tables wait, not the line
        else:
            with pytest.raises(ServiceUnavailable):
                line.step()
    line.now += lot_tables.RETRY_S
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif"]
    assert sorted(line.rows("other")) == ["a.tif", "b.tif"]
    assert line.is_up_to_date()
    before = line.anew.copy()
    line.review("lot/c.tif", "other/c.tif")
    line.step()
    assert line.anew == before, "and from then on rows are appended again"
    assert line.rows("lot") == ["a.tif", "b.tif", "c.tif"]


def test_table_that_cannot_be_written_holds_up_no_other(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    line.review("lot/a.tif", "other/a.tif")
    (line.results / "tool-a" / "lot" / LOT).mkdir()
    for _ in range(3):
        line.step()
    assert line.rows("other") == ["a.tif"]
    assert sum("tool-a/lot waits" in record.message for record in caplog.records) == 1
    line.review("other/b.tif")
    line.step()
    assert line.rows("other") == ["a.tif", "b.tif"]
    (line.results / "tool-a" / "lot" / LOT).rmdir()
    line.now += lot_tables.RETRY_S
    line.step()
    assert line.rows("lot") == ["a.tif"]


def test_tables_that_are_gone_or_behind_are_found_after_a_start(line: Line) -> None:
    line.review("gone/a.tif", "behind/a.tif", "whole/a.tif")
    line.step()
    line.write("behind/b.tif")
    (line.results / "tool-a" / "gone" / LOT).unlink()
    line.anew.clear()
    line.restart()
    line.step()
    assert line.rows("gone") == ["a.tif"]
    assert line.rows("behind") == ["a.tif", "b.tif"]
    assert line.anew["whole"] == 0


def test_result_on_disk_that_the_ledger_does_not_have_yet_is_listed_once(line: Line) -> None:
    """A worker is between the result and its commit while the table is written anew."""
    line.review("lot/a.tif")
    written = line.write("lot/b.tif")
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif"]
    line.finish("lot/b.tif", written)
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif"]
    assert line.is_up_to_date()
    line.review("lot/c.tif")
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif", "c.tif"]


def test_lot_that_grew_is_put_in_order_once_it_is_quiet_and_then_left_alone(line: Line) -> None:
    line.review("lot/m.tif")
    line.step()
    line.review("lot/a.tif")
    line.step()
    assert line.rows("lot") == ["m.tif", "a.tif"]
    for _ in range(10):
        line.step()
    assert line.rows("lot") == ["a.tif", "m.tif"]
    assert line.anew == {"lot": 2}


def test_lot_that_hardly_grew_is_not_put_in_order_each_time(line: Line) -> None:
    line.review(*(f"lot/{i}.tif" for i in range(100, 150)))
    line.step()
    for name in ("0.tif", "1.tif"):
        line.review(f"lot/{name}")
        for _ in range(10):
            line.step()
    assert line.anew == {"lot": 1}, "less than a twentieth is new"
    line.review("lot/2.tif")
    for _ in range(10):
        line.step()
    assert line.anew == {"lot": 2}
    assert line.rows("lot")[:3] == ["0.tif", "1.tif", "100.tif"]


def test_writing_anew_takes_a_twentieth_of_the_time_at_most_and_holds_up_no_appending(line: Line) -> None:
    line.review("small/a.tif", "large/a.tif")
    line.step()
    line.cost_s = 10.0
    line.ledger.lot_rows.write_anew("tool-a/large")
    line.step()
    assert line.anew == {"small": 1, "large": 2}
    started = line.now
    line.ledger.lot_rows.write_anew("tool-a/large")
    while line.anew["large"] == 2:
        line.review(f"small/{line.now}.tif")
        line.step()
        assert line.ledger.lot_rows.new(1) == []
    assert 190 <= line.now - line.cost_s - started <= 200
    assert line.anew["small"] == 1


def test_many_small_tables_are_written_anew_in_one_step(line: Line) -> None:
    line.cost_s = lot_tables.SLICE_S / 10
    line.review(*(f"{i}/a.tif" for i in range(5)))
    line.step()
    assert len(line.anew) == 5


def test_last_step_waits_for_nothing(line: Line) -> None:
    line.review("a/a.tif", "b/a.tif", "c/a.tif")
    line.cost_s = 10.0
    line.step()
    assert len(line.anew) == 1
    line.tables.step(is_last=True)
    assert line.anew == {"a": 1, "b": 1, "c": 1}
    assert line.is_up_to_date()


def test_lot_that_a_person_took_away_is_no_fault(line: Line) -> None:
    line.review("lot/a.tif")
    line.step()
    line.review("lot/b.tif")
    (line.results / "tool-a/lot").rename(line.folder / "taken")
    line.step()
    assert line.is_up_to_date()
    assert not (line.results / "tool-a/lot").exists()


@pytest.mark.parametrize("spoilt", ["deleted", "edited"])
def test_table_that_a_person_spoilt_is_made_good_with_the_next_result(line: Line, spoilt: str) -> None:
    line.review("lot/b.tif")
    line.step()
    table = line.results / "tool-a/lot" / LOT
    if spoilt == "deleted":
        table.unlink()
    else:
        table.write_text(table.read_text().replace(",", ";"))
    line.review("lot/a.tif")
    line.step()
    assert line.rows("lot") == ["a.tif", "b.tif"]


def test_result_that_is_broken_meanwhile_is_left_out_with_a_warning(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    line.review("lot/a.tif")
    line.step()
    line.review("lot/b.tif")
    (line.results / "tool-a/lot/b.tif.review.json").write_text("{")
    line.step()
    assert line.rows("lot") == ["a.tif"]
    assert line.is_up_to_date()
    assert "b.tif.review.json" in caplog.text


def test_image_at_the_top_of_the_drop_folder_has_a_table_too(line: Line) -> None:
    line.review("a.tif")
    line.step()
    assert line.rows(".") == ["a.tif"]
