"""The archive of unknowns, against real SQLite files: nothing twice, nothing lost, read while it is written."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields as fields_of
from pathlib import Path

import numpy as np
import pytest

from factories import make_record, make_review, make_verdict
from learning_site import notes_of
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.store.ledger import Ledger
from semwatch.streams.records import Record, encode, records
from semwatch_training.learning.archive import Archive

NOW = "2025-03-02T00:00:00Z"
LATER = "2025-03-03T00:00:00Z"
STATES = ("waiting", "learned", "explained", "duplicate", "rejected", "forgotten")


def numbers(found: Sequence[Record]) -> list[int]:
    return [int(record.id, 16) for record in found]


def ids(*wanted: int) -> list[str]:
    return [f"{i:032x}" for i in wanted]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "learning" / "unknowns.sqlite"


# --- empty, then one -------------------------------------------------------------------------------------------------


def test_new_archive_is_empty_and_all_questions_have_answers(path: Path) -> None:
    with Archive(path) as archive:
        assert archive.counts() == dict.fromkeys(STATES, 0)
        assert archive.add([], now_utc=NOW) == 0
        assert archive.settle([], "learned", "x", now_utc=NOW) == 0
        assert archive.settle(ids(7), "learned", "x", now_utc=NOW) == 0
        assert (archive.state_of(ids(7)), notes_of(archive, []), archive.read_many(ids(7))) == ({}, {}, [])
        assert archive.since("", limit=10) == []
        assert archive.prune(LATER) == 0
        with pytest.raises(ConfigError, match=r"has no record 0{31}7"):
            archive.read(ids(7)[0])


def test_record_comes_back_whole(path: Path) -> None:
    record = records(make_review(1, verdicts=[make_verdict("non-decidable")], path="lot\udcff/a.tif"))[0]
    with Archive(path) as archive:
        assert archive.add([record], now_utc=NOW) == 1
    with Archive(path, read_only=True) as archive:
        back = archive.read(record.id)
    for field in fields_of(Record):
        np.testing.assert_equal(getattr(back, field.name), getattr(record, field.name))
    assert back.field_short_px == 256


def test_adding_twice_keeps_the_first_and_its_state(path: Path) -> None:
    with Archive(path) as archive:
        assert archive.add([make_record(0), make_record(1), make_record(0)], now_utc=NOW) == 2
        archive.settle(ids(0), "learned", "novel-1, head 4", now_utc=NOW)
        assert archive.add([make_record(0, kind="non-decidable"), make_record(2)], now_utc=LATER) == 1
        assert archive.state_of(ids(0, 1, 2)) == {**dict.fromkeys(ids(1, 2), "waiting"), ids(0)[0]: "learned"}
        assert archive.read(ids(0)[0]).kind == "unknown"


# --- states ----------------------------------------------------------------------------------------------------------


def test_every_state_is_taken_counted_and_taken_back(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(i) for i in range(6)], now_utc=NOW)
        for i, state in enumerate(STATES):
            assert archive.settle(ids(i), state, f"note {i}", now_utc=NOW) == 1
        assert archive.counts() == dict.fromkeys(STATES, 1)
        assert notes_of(archive, ids(1, 5)) == {ids(1)[0]: "note 1", ids(5)[0]: "note 5"}
        assert archive.settle(ids(1, 2, 99), "waiting", "split", now_utc=LATER) == 2
        assert archive.counts() == {**dict.fromkeys(STATES, 1), "waiting": 3, "learned": 0, "explained": 0}


def test_state_that_is_none_changes_nothing(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record()], now_utc=NOW)
        with pytest.raises(sqlite3.IntegrityError):
            archive.settle(ids(0), "eaten", "", now_utc=NOW)  # type: ignore[arg-type]
        assert archive.state_of(ids(0)) == {ids(0)[0]: "waiting"}


def test_only_settled_records_are_pruned_and_by_when_they_were_settled(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(i, created_utc="2020-01-01T00:00:00Z") for i in range(4)], now_utc=NOW)
        archive.settle(ids(0), "learned", "", now_utc=NOW)
        archive.settle(ids(1), "duplicate", "", now_utc=LATER)
        archive.settle(ids(2), "learned", "", now_utc=NOW)
        archive.settle(ids(2), "waiting", "", now_utc=NOW)
        assert archive.prune(NOW) == 0  # at, not before
        assert archive.prune(LATER) == 1
        assert set(archive.state_of(ids(0, 1, 2, 3))) == set(ids(1, 2, 3))


def test_more_ids_than_sqlite_takes_variables(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(3), make_record(70_000)], now_utc=NOW)
        many = ids(*range(80_000))
        assert len(archive.state_of(many)) == 2
        assert archive.settle(many, "forgotten", "old", now_utc=NOW) == 2
        assert numbers(archive.read_many([*ids(70_000), *many[:5]])) == [70_000, 3]


# --- pages -----------------------------------------------------------------------------------------------------------


def pages(archive: Archive, utc: str, limit: int) -> list[list[int]]:
    found, after = [], ""
    while page := archive.since(utc, after_id=after, limit=limit):
        found.append(numbers(page))
        after = page[-1].id
    return found


def test_pages_hold_whole_images_by_source_and_path_whatever_the_order_of_arrival(path: Path) -> None:
    places = [("b", "x.tif"), ("a", "y.tif"), ("a", "x.tif"), ("a", "y.tif"), ("a", "x.tif"), ("a", "x.tif")]
    found = [make_record(i, source=source, path=name) for i, (source, name) in enumerate(places)]
    with Archive(path) as archive:
        archive.add(found[::-1], now_utc=NOW)
        archive.settle(ids(4), "learned", "", now_utc=NOW)
        whole = [[2, 4, 5], [1, 3], [0]]
        assert pages(archive, "", 1) == pages(archive, "", 2) == whole
        assert pages(archive, "", 4) == [[2, 4, 5, 1, 3], [0]]
        assert pages(archive, "", 100) == [[2, 4, 5, 1, 3, 0]]


def test_two_contents_under_one_path_are_two_images(path: Path) -> None:
    found = [make_record(i, sha256=f"{i % 2:064x}") for i in range(4)]
    with Archive(path) as archive:
        archive.add(found, now_utc=NOW)
        assert pages(archive, "", 1) == [[0, 2], [1, 3]]


def test_only_records_created_since_then_come(path: Path) -> None:
    days = [f"2025-03-{day:02}T12:00:00Z" for day in range(1, 6)]
    with Archive(path) as archive:
        archive.add([make_record(i, created_utc=day) for i, day in enumerate(days)], now_utc=LATER)
        assert pages(archive, days[2], 2) == [[2, 3, 4]]  # one image
        assert pages(archive, "2025-03-05T12:00:01Z", 2) == []


def test_page_after_a_record_that_was_pruned_is_refused_rather_than_the_end(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(i, path=f"{i}.tif") for i in range(4)], now_utc=NOW)
        (first,) = archive.since("", limit=1)
        archive.settle([first.id], "learned", "", now_utc=NOW)
        archive.prune(LATER)
        with pytest.raises(ServiceUnavailable, match="begin again"):
            archive.since("", after_id=first.id, limit=1)


def test_page_is_found_in_the_index(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(i, path=f"{i % 50}.tif") for i in range(200)], now_utc=NOW)
    with sqlite3.connect(path) as db:
        plan = db.execute(
            "EXPLAIN QUERY PLAN SELECT source FROM unknowns WHERE created_utc >= ''"
            " AND (source, path, sha256, page, defect_id, id) > ('a', '', '', 0, 0, '')"
            " ORDER BY source, path, sha256, page, defect_id, id LIMIT 10"
        ).fetchall()
    db.close()
    assert "COVERING INDEX unknowns_by_image" in plan[0][3]
    assert not any("TEMP B-TREE" in step[3] for step in plan)


# --- readers, writers, crashes ---------------------------------------------------------------------------------------


def test_reader_works_while_a_writer_is_in_its_transaction(path: Path) -> None:
    with Archive(path) as writer, Archive(path, read_only=True, busy_s=0.1) as reader:
        writer.add([make_record(0)], now_utc=NOW)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE unknowns SET state_note = 'half'")
        assert numbers(reader.since("", limit=5)) == [0]
        assert notes_of(reader, ids(0)) == {ids(0)[0]: ""}
        with Archive(path, busy_s=0.1) as second, pytest.raises(ServiceUnavailable, match="locked"):
            second.add([make_record(1)], now_utc=NOW)
        other.execute("ROLLBACK")
        other.close()
        assert writer.add([make_record(1)], now_utc=NOW) == 1
        assert reader.counts()["waiting"] == 2


def test_threads_that_write_and_read_lose_nothing(path: Path) -> None:
    with Archive(path) as writer, Archive(path, read_only=True) as reader:
        done = threading.Event()

        def add(part: int) -> int:
            return sum(writer.add([make_record(10 * part + i)], now_utc=NOW) for i in range(10))

        def watch() -> list[int]:
            seen = [reader.counts()["waiting"]]
            while not done.is_set():
                seen.append(len(reader.since("", limit=1000)))
            return seen

        with ThreadPoolExecutor(5) as pool:
            watching = pool.submit(watch)
            assert sum(pool.map(add, range(4))) == 40
            done.set()
            seen = watching.result(30)
        assert seen == sorted(seen)
        assert reader.counts()["waiting"] == 40


def test_many_that_make_the_same_archive_at_once_all_get_it(path: Path) -> None:
    def make(i: int) -> int:
        with Archive(path) as archive:
            return archive.add([make_record(i)], now_utc=NOW)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(8))) == [1] * 8
    with Archive(path, read_only=True) as archive:
        assert archive.counts()["waiting"] == 8


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from factories import make_record
from semwatch_training.learning.archive import Archive
archive = Archive(Path({path!r}))
for i in range(10_000):
    archive.add([make_record(2 * i), make_record(2 * i + 1)], now_utc="2025-03-02T00:00:00Z")
    print(2 * i + 1, flush=True)
"""


def test_killed_writer_leaves_whole_batches_and_all_it_had_reported(path: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    packages = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": packages},
    ) as child:
        assert child.stdout is not None
        reported = [int(child.stdout.readline()) for _ in range(5)][-1]
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
    reported = max([reported, *(int(line) for line in rest)])
    with Archive(path) as archive:
        kept = numbers(archive.since("", limit=100_000))
        assert kept == list(range(len(kept)))
        assert reported < len(kept) <= reported + 3
        assert len(kept) % 2 == 0


# --- files that are not as they should be ----------------------------------------------------------------------------


def test_reader_without_an_archive_says_who_makes_it(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no archive at .*retrain"):
        Archive(path, read_only=True)
    assert not path.parent.exists()


def test_empty_file_is_made_into_an_archive_by_a_writer_only(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with pytest.raises(ServiceUnavailable, match="still empty"):
        Archive(path, read_only=True)
    with Archive(path) as archive:
        assert archive.counts()["waiting"] == 0


def test_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 100)
    for read_only in (False, True):
        with pytest.raises(ConfigError, match=r"broken .*move the file"):
            Archive(path, read_only=read_only)
    assert path.read_bytes() == b"no database at all" * 100


def test_ledger_is_no_archive_and_archive_no_ledger(path: Path, tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    Archive(path).close()
    with pytest.raises(ConfigError, match="no archive of semwatch"):
        Archive(tmp_path / "ledger.sqlite")
    with pytest.raises(ConfigError, match="no ledger of semwatch"):
        Ledger(path, exclusive=False)


def test_archive_of_another_layout_is_refused(path: Path) -> None:
    Archive(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(ConfigError, match=r"newer semwatch .layout 3, this one knows 2"):
        Archive(path)


def test_record_that_was_tampered_with_is_named(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(0), make_record(1, path="z.tif")], now_utc=NOW)
        with sqlite3.connect(path) as db:
            db.execute("UPDATE unknowns SET record = substr(record, 1, 100) WHERE id = ?", ids(0))
        db.close()
        assert numbers(archive.read_many(ids(1))) == [1]
        for look in (lambda: archive.read(ids(0)[0]), lambda: archive.since("", limit=1)):
            with pytest.raises(ConfigError, match=r"record 0{32} cannot be read .*cut short"):
                look()


def test_damaged_pages_are_a_settings_error(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(i) for i in range(50)], now_utc=NOW)
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with Archive(path) as archive, pytest.raises(ConfigError, match="is broken"):
        archive.read_many(ids(*range(50)))


def test_full_disk_is_waited_for_and_nothing_of_the_batch_is_kept(path: Path) -> None:
    with Archive(path) as archive:
        archive.add([make_record(0)], now_utc=NOW)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        wal = path.with_name(f"{path.name}-wal").stat().st_size
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG, as a full disk is ENOSPC
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (wal + 8192, hard))
            with pytest.raises(ServiceUnavailable, match="archive"):
                archive.add([make_record(i) for i in range(1, 60)], now_utc=NOW)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert archive.counts()["waiting"] == 1
        assert archive.add([make_record(i) for i in range(1, 60)], now_utc=NOW) == 59


def test_folder_that_cannot_be_made_is_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be opened"):
        Archive(tmp_path / "file" / "unknowns.sqlite")


def test_closed_archive_answers_nothing(path: Path) -> None:
    archive = Archive(path)
    archive.close()
    archive.close()
    with pytest.raises(RuntimeError, match="closed"):
        archive.counts()


def test_record_without_the_newer_key_is_kept_and_read(path: Path) -> None:
    old = make_record(0, field_short_px=None)
    assert b'"field_short_px":null' in encode(old)[b"meta"]
    with Archive(path) as archive:
        archive.add([old], now_utc=NOW)
        assert archive.read(old.id).field_short_px is None
