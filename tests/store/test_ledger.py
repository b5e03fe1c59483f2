"""The ledger on a real SQLite file, with real processes killed on it."""

import hashlib
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from paths import ROOT
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.store import ledger as ledger_module
from semwatch.store.ledger import Claim, Ledger, OutboxItem
from semwatch.store.ledger_layout import KIND
from semwatch.store.unknown_features import UnknownFeatures
from semwatch.system.files import Stamp

T0, T1, T2 = "2025-03-01T08:00:00Z", "2025-03-01T08:00:10Z", "2025-03-01T08:00:20Z"
DAEMON = ROOT / "daemon"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as ledger:
        yield ledger


def sha(content: str) -> str:
    return hashlib.sha256(os.fsencode(content)).hexdigest()


def claim(ledger: Ledger, path: str, content: str | None = None, *, source: str = "tool", mtime_ns: int = 1) -> Claim:
    digest = sha(path if content is None else content)
    return ledger.claim(source, path, sha256=digest, stamp=Stamp(7, mtime_ns), now_utc=T0)


def is_settled(ledger: Ledger, source: str, path: str, size: int, mtime_ns: int) -> bool:
    return ledger.settled(source, [(path, Stamp(size, mtime_ns))]) == {path}


def finish(ledger: Ledger, held: Claim, *ids: str, now_utc: str = T1) -> None:
    items = [OutboxItem("semwatch:results", id_, b"\x00payload") for id_ in ids]
    ledger.finish(held, outbox=items, audit={"path": held.path}, now_utc=now_utc)


# --- one piece of work ---------------------------------------------------------------------------------------------


def test_empty_ledger_has_nothing_to_say(ledger: Ledger) -> None:
    assert ledger.counts() == {"SEEN": 0, "CLAIMED": 0, "DONE": 0, "QUARANTINED": 0}
    assert ledger.unpublished(10) == []
    assert ledger.n_unpublished() == 0
    assert ledger.audit_after(0, 10) == []
    assert ledger.listing("QUARANTINED") == []
    assert ledger.reviews_since(T0) == (0, None)
    assert ledger.paths_seen_before(T2, limit=10) == []
    assert (ledger.forget_paths([], seen_before_utc=T2), ledger.forget_work(T2), ledger.forget_notes(T2)) == (0, 0, 0)
    assert ledger.settled("tool", []) == set()
    assert not is_settled(ledger, "tool", "a.tif", 7, 1)
    assert not ledger.requeue("tool", sha("a.tif"), audit={"event": "requeued"})
    ledger.mark_published([])
    ledger.forget_audit(0)


def test_finished_work_is_settled_with_its_messages_and_audit_line(ledger: Ledger) -> None:
    held = claim(ledger, "lot/a.tif")
    assert (held.outcome, held.is_mine, held.attempts, held.original) == ("new", True, 0, "lot/a.tif")
    assert not is_settled(ledger, "tool", "lot/a.tif", 7, 1)
    finish(ledger, held, "x", "y")
    assert is_settled(ledger, "tool", "lot/a.tif", 7, 1)
    assert [(item.id, item.payload) for _, item in ledger.unpublished(10)] == [
        ("x", b"\x00payload"),
        ("y", b"\x00payload"),
    ]
    assert [json.loads(line) for _, line in ledger.audit_after(0, 10)] == [{"path": "lot/a.tif"}]
    assert ledger.counts()["DONE"] == 1
    assert (ledger.reviews_since(T1), ledger.reviews_since(T2)) == ((1, T1), (0, None))


def test_settled_means_exactly_this_file(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif"))
    assert not is_settled(ledger, "tool", "a.tif", 8, 1)
    assert not is_settled(ledger, "tool", "a.tif", 7, 2)
    assert not is_settled(ledger, "other", "a.tif", 7, 1)
    assert not is_settled(ledger, "tool", "b.tif", 7, 1)


def test_touched_file_is_settled_again_without_work(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif"))
    again = claim(ledger, "a.tif", mtime_ns=2)
    assert (again.outcome, again.is_mine) == ("settled", False)
    assert is_settled(ledger, "tool", "a.tif", 7, 2)


def test_new_content_under_an_old_path_is_new_work(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif", "first"))
    assert claim(ledger, "a.tif", "second", mtime_ns=2).outcome == "new"


def test_same_content_of_another_tool_is_new_work(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif"))
    assert claim(ledger, "a.tif", source="other").outcome == "new"


def test_work_that_the_process_died_on_counts_attempts_and_comes_back(path: Path) -> None:
    for attempts in range(3):
        with Ledger(path) as ledger:
            assert not is_settled(ledger, "tool", "a.tif", 7, 1)
            held = claim(ledger, "a.tif")
            assert (held.outcome, held.attempts) == ("retry" if attempts else "new", attempts)


def test_given_back_work_counts_no_attempt(ledger: Ledger) -> None:
    ledger.give_back(claim(ledger, "a.tif"), "Redis is away")
    assert [(work.state, work.reason) for work in ledger.listing("SEEN")] == [("SEEN", "Redis is away")]
    again = claim(ledger, "a.tif")
    assert (again.outcome, again.attempts) == ("retry", 0)


def test_quarantined_work_is_settled_until_it_is_requeued(ledger: Ledger) -> None:
    ledger.quarantine(claim(ledger, "a.tif"), "not a TIFF", audit={"quarantined": "a.tif"}, now_utc=T1)
    assert is_settled(ledger, "tool", "a.tif", 7, 1)
    [work] = ledger.listing("QUARANTINED")
    assert (work.path, work.reason, work.finished_utc) == ("a.tif", "not a TIFF", T1)
    assert ledger.reviews_since(T0) == (0, None)
    assert ledger.requeue("tool", sha("a.tif"), audit={"event": "requeued"})
    assert json.loads(ledger.audit_after(0, 10)[-1][1]) == {"event": "requeued"}
    assert not ledger.requeue("tool", sha("a.tif"), audit={"event": "requeued"})
    assert len(ledger.audit_after(0, 10)) == 2
    assert not is_settled(ledger, "tool", "a.tif", 7, 1)
    again = claim(ledger, "a.tif")
    assert (again.outcome, again.attempts) == ("retry", 0)


def test_done_work_cannot_be_requeued(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif"))
    assert not ledger.requeue("tool", sha("a.tif"), audit={"event": "requeued"})


def test_waiting_work_whose_file_is_gone_can_be_quarantined(ledger: Ledger) -> None:
    ledger.give_back(claim(ledger, "a.tif"), "Redis is away")
    [work] = ledger.listing("SEEN")
    ledger.quarantine(work, "vanished", audit={}, now_utc=T1)
    assert ledger.listing("SEEN") == []


def test_work_waiting_for_a_replaced_content_does_not_wait_for_ever(ledger: Ledger) -> None:
    ledger.give_back(claim(ledger, "a.tif", "first"), "Redis is away")
    finish(ledger, claim(ledger, "a.tif", "second", mtime_ns=2))
    [work] = ledger.listing("QUARANTINED")
    assert (work.sha256, work.reason) == (sha("first"), "replaced before it was reviewed")
    assert claim(ledger, "b.tif", "first").outcome == "retry"  # its content came again


def test_replaced_content_that_lies_elsewhere_too_goes_on_waiting(ledger: Ledger) -> None:
    held = claim(ledger, "a.tif", "first")
    claim(ledger, "b.tif", "first")
    ledger.give_back(held, "Redis is away")
    claim(ledger, "a.tif", "second", mtime_ns=2)
    assert claim(ledger, "b.tif", "first").outcome == "retry"


def test_work_that_left_the_hands_cannot_be_finished_twice(ledger: Ledger) -> None:
    held = claim(ledger, "a.tif")
    finish(ledger, held, "x")
    with pytest.raises(RuntimeError, match="not CLAIMED"):
        finish(ledger, held, "y")
    assert ledger.n_unpublished() == 1
    assert len(ledger.audit_after(0, 10)) == 1


def test_finish_is_all_or_nothing(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif"), "x")
    held = claim(ledger, "b.tif")
    with pytest.raises(ValueError, match="JSON"):
        ledger.finish(held, outbox=[OutboxItem("s", "z", b"")], audit={"score": float("nan")}, now_utc=T1)
    assert [item.id for _, item in ledger.unpublished(10)] == ["x"]
    assert ledger.counts()["CLAIMED"] == 1
    finish(ledger, held, "y", "x")  # what waits already is not doubled, as after a review that is repeated
    assert [item.id for _, item in ledger.unpublished(10)] == ["x", "y"]


# --- duplicates ----------------------------------------------------------------------------------------------------


def test_duplicate_of_done_content_names_the_original_and_is_settled(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif", "same"))
    copy = claim(ledger, "copy/a.tif", "same")
    assert (copy.outcome, copy.is_mine, copy.original) == ("duplicate", False, "a.tif")
    assert is_settled(ledger, "tool", "copy/a.tif", 7, 1)


def test_duplicate_of_content_in_flight_is_settled_with_it(ledger: Ledger) -> None:
    held = claim(ledger, "a.tif", "same")
    copy = claim(ledger, "b.tif", "same")
    assert (copy.outcome, copy.original) == ("in-flight", "a.tif")
    assert not is_settled(ledger, "tool", "b.tif", 7, 1)
    finish(ledger, held)
    assert is_settled(ledger, "tool", "b.tif", 7, 1)


def test_duplicate_takes_over_when_the_original_fails(ledger: Ledger) -> None:
    held = claim(ledger, "a.tif", "same")
    claim(ledger, "b.tif", "same")
    ledger.give_back(held, "a.tif vanished")
    takeover = claim(ledger, "b.tif", "same")
    assert (takeover.outcome, takeover.original) == ("retry", "b.tif")
    finish(ledger, takeover)
    assert is_settled(ledger, "tool", "a.tif", 7, 1)


# --- outbox and audit ----------------------------------------------------------------------------------------------


def test_published_messages_leave_and_the_rest_keeps_its_order(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif"), "x", "y", "z")
    seqs = [seq for seq, _ in ledger.unpublished(2)]
    ledger.mark_published(seqs)
    assert [item.id for _, item in ledger.unpublished(10)] == ["z"]
    ledger.mark_published(seqs)
    assert ledger.n_unpublished() == 1


def test_audit_numbers_are_never_used_twice(path: Path) -> None:
    with Ledger(path) as ledger:
        finish(ledger, claim(ledger, "a.tif"))
        finish(ledger, claim(ledger, "b.tif"))
        [(first, _), (second, _)] = ledger.audit_after(0, 10)
        assert [seq for seq, _ in ledger.audit_after(first, 10)] == [second]
        ledger.forget_audit(second)
    with Ledger(path) as ledger:
        finish(ledger, claim(ledger, "c.tif"))
        [(third, _)] = ledger.audit_after(0, 10)
    assert first < second < third


def test_many_files_are_asked_for_at_once_and_each_is_itself(ledger: Ledger) -> None:
    names = [os.fsdecode(b"\xff %d.tif" % i) for i in range(1203)]
    for name in names[::100]:
        finish(ledger, claim(ledger, name))
    ledger.quarantine(claim(ledger, names[1]), "no TIFF", audit={}, now_utc=T1)
    ledger.give_back(claim(ledger, names[2]), "away")
    assert ledger.settled("tool", [(name, Stamp(7, 1)) for name in names]) == {*names[::100], names[1]}
    assert ledger.settled("other", [(name, Stamp(7, 1)) for name in names]) == set()
    assert ledger.settled("tool", [(name, Stamp(7, 2)) for name in names]) == set()


# --- what is forgotten ---------------------------------------------------------------------------------------------


def test_path_that_is_forgotten_is_found_finished_when_it_comes_back(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif"))
    assert ledger.forget_paths([("tool", "a.tif")], seen_before_utc=T0) == 0  # seen at, not before
    assert ledger.forget_paths([("tool", "a.tif")], seen_before_utc=T1) == 1
    assert not is_settled(ledger, "tool", "a.tif", 7, 1)
    assert claim(ledger, "a.tif").outcome == "settled"
    assert is_settled(ledger, "tool", "a.tif", 7, 1)


def test_work_is_forgotten_once_no_path_leads_to_it(ledger: Ledger) -> None:
    finish(ledger, claim(ledger, "a.tif", "same"))
    claim(ledger, "copy.tif", "same")
    ledger.quarantine(claim(ledger, "bad.tif"), "no TIFF", audit={}, now_utc=T1)
    ledger.forget_paths([("tool", "a.tif"), ("tool", "bad.tif")], seen_before_utc=T1)
    assert ledger.forget_work(T1) == 0  # finished at, not before
    assert ledger.forget_work(T2) == 1, "the copy still leads to the other"
    assert ledger.counts() == {"SEEN": 0, "CLAIMED": 0, "DONE": 1, "QUARANTINED": 0}
    assert claim(ledger, "bad.tif").outcome == "new"
    assert claim(ledger, "a.tif", "same").outcome in ("settled", "duplicate")


def test_unfinished_work_is_never_forgotten(ledger: Ledger) -> None:
    ledger.give_back(claim(ledger, "waits.tif"), "Redis is away")
    claim(ledger, "in flight.tif")
    assert ledger.paths_seen_before(T2, limit=10) == []
    both = [("tool", "waits.tif"), ("tool", "in flight.tif")]
    assert ledger.forget_paths(both, seen_before_utc=T2) == 0
    assert ledger.forget_work(T2) == 0
    assert ledger.counts() == {"SEEN": 1, "CLAIMED": 1, "DONE": 0, "QUARANTINED": 0}


def test_paths_are_paged_by_source_and_path_and_what_lies_there_still_stays(ledger: Ledger) -> None:
    wanted = [(source, os.fsdecode(b"%d \xff.tif" % i)) for source in ("a", "b") for i in range(5)]
    for source, name in reversed(wanted):
        finish(ledger, claim(ledger, name, source=source))
    found: list[tuple[str, str]] = []
    while page := ledger.paths_seen_before(T1, after=found[-1] if found else ("", ""), limit=3):
        assert len(page) <= 3
        found += [(source, path) for source, path, seen_utc in page if seen_utc == T0]
    assert found == wanted
    ledger.still_there(wanted[:4], now_utc=T1)
    assert [(source, path) for source, path, _ in ledger.paths_seen_before(T1, limit=10)] == wanted[4:]
    assert ledger.forget_paths(wanted, seen_before_utc=T1) == 6


def test_notes_that_may_be_forgotten_go_and_the_others_stay_for_ever(ledger: Ledger) -> None:
    assert ledger.note(audit={}, once="for ever")
    assert ledger.note(audit={}, once="for a while", once_utc=T1)
    assert ledger.forget_notes(T1) == 0
    assert ledger.forget_notes(T2) == 1
    assert not ledger.note(audit={}, once="for ever")
    assert ledger.note(audit={}, once="for a while", once_utc=T2)


def test_names_that_are_not_utf8_go_through(ledger: Ledger) -> None:
    name = os.fsdecode(b"lot \xff/a'\n.tif")
    ledger.give_back(claim(ledger, name, "same"), f"cannot read {name}")
    held = claim(ledger, name, "same")
    finish(ledger, held)
    assert held.original == name
    assert is_settled(ledger, "tool", name, 7, 1)
    [(_, line)] = ledger.audit_after(0, 1)
    assert json.loads(line) == {"path": name}
    assert line.isascii()


def test_many_threads_share_one_ledger(ledger: Ledger) -> None:
    outcomes: list[str] = []

    def work() -> None:
        for i in range(30):
            held = claim(ledger, f"{threading.get_ident()}/{i}.tif", str(i))
            outcomes.append(held.outcome)
            if held.is_mine:
                finish(ledger, held, f"message {i}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 120
    assert outcomes.count("new") == 30
    assert (ledger.counts()["DONE"], ledger.n_unpublished()) == (30, 30)


# --- files that are no ledger, disks that fail ---------------------------------------------------------------------


def test_file_that_is_no_database_is_a_config_error(path: Path) -> None:
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(ConfigError, match="move the file"):
        Ledger(path)
    assert path.read_bytes().startswith(b"not a database")


def test_database_of_another_program_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE recipes (name)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="no ledger of semwatch"):
        Ledger(path)
    assert path.read_bytes() == before


def test_ledger_of_a_newer_layout_is_a_config_error(path: Path) -> None:
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match=r"newer semwatch .layout 99, this one knows 5.*backup"):
        Ledger(path)


def _without_layout_5(db: sqlite3.Connection) -> None:
    for later in ("TABLE manifests", "TABLE manifest_files", "TABLE lot_revisions", "INDEX paths_by_match_key"):
        db.execute(f"DROP {later}")
    db.execute("ALTER TABLE paths DROP match_key")


def _without_layout_4(db: sqlite3.Connection) -> None:
    _without_layout_5(db)
    for later in ("INDEX suspects", "INDEX paths_to_look_at"):
        db.execute(f"DROP {later}")
    db.execute("DROP TABLE duplicates")
    for later in ("work DROP deaths", "paths DROP ctime_ns", "paths DROP inode", "paths DROP look_again_utc"):
        db.execute(f"ALTER TABLE {later}")


def of_layout_3(path: Path) -> None:
    """What the release before the second look left."""
    with Ledger(path) as ledger:
        finish(ledger, claim(ledger, "a.tif"), "m")
        claim(ledger, "b.tif")
    with closing(sqlite3.connect(path)) as db, db:
        _without_layout_4(db)
        db.execute("PRAGMA user_version = 3")


def of_layout_4(path: Path) -> None:
    """What the release before KLARFs left."""
    with Ledger(path) as ledger:
        finish(ledger, claim(ledger, "a.tif"), "m")
        claim(ledger, "b.tif")
    with closing(sqlite3.connect(path)) as db, db:
        _without_layout_5(db)
        db.execute("PRAGMA user_version = 4")


def of_layout_1(path: Path) -> None:
    """What the first release left: work in flight, a line and a message that wait."""
    with Ledger(path) as ledger:
        finish(ledger, claim(ledger, "a.tif"), "m")
        claim(ledger, "b.tif")
    with closing(sqlite3.connect(path)) as db, db:
        for later in ("TABLE noted", "TABLE unknowns", "TABLE lot_rows", "INDEX paths_by_content"):
            db.execute(f"DROP {later}")
        _without_layout_4(db)
        db.execute("PRAGMA user_version = 1")


def layout_of(db: sqlite3.Connection) -> dict[str, list[tuple[object, ...]]]:
    """Columns of every table and index by name."""
    names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite%'")]
    return {name: db.execute(f"SELECT * FROM pragma_table_xinfo('{name}')").fetchall() for name in names}


def of_layout_2(path: Path) -> None:
    """What the release before the rooms left."""
    of_layout_1(path)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE noted (id TEXT PRIMARY KEY) WITHOUT ROWID")
        db.execute("PRAGMA user_version = 2")


@pytest.mark.parametrize("left", [of_layout_1, of_layout_2, of_layout_3, of_layout_4])
def test_daemon_brings_an_older_ledger_up_to_date_and_keeps_all_it_holds(path: Path, left) -> None:
    left(path)
    with Ledger(path) as ledger:
        assert ledger.unknowns_since("", limit=10) == []
        assert ledger.counts() == {"SEEN": 1, "CLAIMED": 0, "DONE": 1, "QUARANTINED": 0}
        assert ledger.n_unpublished() == 1
        assert ledger.note(audit={"event": "x"}, once="x")
        assert not ledger.note(audit={"event": "x"}, once="x")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (5,)
        migrated = layout_of(db)
    Ledger(path.with_name("new.sqlite")).close()
    with closing(sqlite3.connect(path.with_name("new.sqlite"))) as db:
        assert migrated == layout_of(db)


def test_older_ledger_may_be_looked_at_but_not_written_beside_the_daemon(path: Path) -> None:
    of_layout_1(path)
    with Ledger(path, read_only=True) as reader:
        assert reader.counts()["DONE"] == 1
        assert is_settled(reader, "tool", "a.tif", 7, 1)
        assert [work.path for work in reader.listing("CLAIMED")] == ["b.tif"]
        assert [seen.stamp for seen in reader.seen_as("tool", sha("a.tif"))] == [Stamp(7, 1)]
    with pytest.raises(ConfigError, match="older semwatch; the daemon"):
        Ledger(path, exclusive=False)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


def test_migration_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_layout_1(path)
    kind = KIND
    broken = {**kind.migrations, 2: (*kind.migrations[2], "SELECT 1 FROM nowhere")}
    monkeypatch.setattr(ledger_module, "KIND", replace(kind, migrations=broken))
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        Ledger(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'noted'").fetchone() == (0,)


def test_broken_pages_are_a_config_error(path: Path) -> None:
    with Ledger(path) as ledger:
        for i in range(50):
            finish(ledger, claim(ledger, f"{i}.tif"))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(ConfigError, match="broken"), Ledger(path) as ledger:
        claim(ledger, "0.tif")


def test_empty_file_becomes_a_ledger(path: Path) -> None:
    path.touch()
    with Ledger(path) as ledger:
        assert claim(ledger, "a.tif").outcome == "new"


def test_folder_of_the_ledger_is_made(tmp_path: Path) -> None:
    with Ledger(tmp_path / "state" / "semwatch" / "ledger.sqlite") as ledger:
        assert ledger.counts()["DONE"] == 0


def test_ledger_below_a_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(ConfigError, match="cannot be opened"):
        Ledger(tmp_path / "state" / "ledger.sqlite")


def test_full_disk_is_service_unavailable_and_nothing_is_half_done(ledger: Ledger) -> None:
    held = claim(ledger, "a.tif")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(ServiceUnavailable):
            finish(ledger, held, "x")
        with pytest.raises(ServiceUnavailable):
            ledger.give_back(held, "the disk is full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (ledger.n_unpublished(), ledger.counts()["CLAIMED"]) == (0, 1)
    again = claim(ledger, "a.tif")
    assert (again.outcome, again.attempts) == ("retry", 0)
    finish(ledger, again, "x")
    assert ledger.n_unpublished() == 1


def test_closed_ledger_says_so(path: Path) -> None:
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(RuntimeError, match="closed"):
        ledger.counts()


# --- several processes ---------------------------------------------------------------------------------------------


def start(code: str, *args: object) -> "subprocess.Popen[bytes]":
    env = os.environ | {"PYTHONPATH": str(DAEMON)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, stdout=subprocess.PIPE)


def test_second_daemon_is_refused_and_names_the_first(ledger: Ledger, path: Path) -> None:
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        Ledger(path)
    finish(ledger, claim(ledger, "a.tif"))


def test_daemon_of_another_process_is_refused_until_it_dies(path: Path) -> None:
    code = (
        "import sys, time, pathlib; from semwatch.store.ledger import Ledger\n"
        "l = Ledger(pathlib.Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    with start(code, path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match=f"in use by process {child.pid}"):
            Ledger(path)
        child.kill()
        child.wait(10)
        Ledger(path).close()


def test_reader_sees_what_is_committed_while_a_writer_works(ledger: Ledger, path: Path) -> None:
    with Ledger(path, read_only=True) as reader:
        held = claim(ledger, "a.tif")
        assert reader.counts()["CLAIMED"] == 1
        finish(ledger, held, "x")
        assert (reader.counts()["DONE"], reader.n_unpublished()) == (1, 1)
        with pytest.raises(ServiceUnavailable):
            reader.requeue("tool", held.sha256, audit={})
    assert ledger.counts()["CLAIMED"] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
@pytest.mark.parametrize("daemon_runs", [False, True])
def test_reader_needs_no_right_to_write(daemon_runs: bool) -> None:
    # All modules are loaded before the rights are dropped: Python or semwatch may lie where only root reads.
    code = (
        "import os, sys, pathlib; from semwatch.store.ledger import Ledger\n"
        "other = Ledger(pathlib.Path(sys.argv[2])); other.counts(); other.close()\n"
        "os.setuid(65534); ledger = Ledger(pathlib.Path(sys.argv[1]), read_only=True)\n"
        "print(ledger.counts()['CLAIMED']); ledger.close()"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "ledger.sqlite"
        ledger = Ledger(path)
        claim(ledger, "a.tif")
        if not daemon_runs:
            ledger.close()
        with start(code, path, Path(folder) / "other.sqlite") as child:
            assert child.communicate(timeout=60)[0] == b"1\n"
        ledger.close()


def test_reader_of_a_ledger_that_is_not_there_is_told_so(path: Path) -> None:
    with pytest.raises(ConfigError, match="no ledger"):
        Ledger(path, read_only=True)
    assert not path.exists()


def test_operator_requeues_beside_a_running_daemon(ledger: Ledger, path: Path) -> None:
    ledger.quarantine(claim(ledger, "a.tif"), "not a TIFF", audit={}, now_utc=T1)
    held = claim(ledger, "b.tif")
    with Ledger(path, exclusive=False) as operator:
        assert operator.requeue("tool", sha("a.tif"), audit={"event": "requeued"})
    assert not is_settled(ledger, "tool", "a.tif", 7, 1)
    finish(ledger, held)


# --- notes ---------------------------------------------------------------------------------------------------------


def test_note_without_messages_is_an_audit_line(ledger: Ledger) -> None:
    assert ledger.note(audit={"event": "named"})
    assert [json.loads(line) for _, line in ledger.audit_after(0, 10)] == [{"event": "named"}]
    assert ledger.n_unpublished() == 0
    assert ledger.counts()["DONE"] == 0


def test_note_takes_line_and_messages_or_neither(ledger: Ledger) -> None:
    items = [OutboxItem("results", "1", b"a"), OutboxItem("results", "2", b"b")]
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.note(audit={"score": float("nan")}, outbox=items, once="n")
    assert (ledger.n_unpublished(), ledger.audit_after(0, 10)) == (0, [])
    assert ledger.note(audit={}, outbox=items, once="n")  # the name was not used up
    assert [item for _, item in ledger.unpublished(10)] == items


def test_message_that_waits_already_is_left_out_of_a_note(ledger: Ledger) -> None:
    ledger.note(audit={}, outbox=[OutboxItem("results", "1", b"first")])
    ledger.note(audit={}, outbox=[OutboxItem("results", "1", b"again"), OutboxItem("results", "2", b"new")])
    assert [(item.id, item.payload) for _, item in ledger.unpublished(10)] == [("1", b"first"), ("2", b"new")]
    assert len(ledger.audit_after(0, 10)) == 2


def test_note_of_one_name_is_taken_once_even_after_all_was_delivered(ledger: Ledger, path: Path) -> None:
    item = OutboxItem("results", "1", b"a")
    assert ledger.note(audit={"n": 1}, outbox=[item], once="revision 2")
    ledger.mark_published([seq for seq, _ in ledger.unpublished(10)])
    ledger.forget_audit(ledger.last_audit_seq())
    ledger.close()
    with Ledger(path) as again:
        assert not again.note(audit={"n": 2}, outbox=[item], once="revision 2")
        assert (again.n_unpublished(), again.audit_after(0, 10)) == (0, [])
        assert again.note(audit={"n": 3}, once="revision 3")


def test_operator_notes_beside_a_running_daemon(ledger: Ledger, path: Path) -> None:
    held = claim(ledger, "a.tif")
    with Ledger(path, exclusive=False) as operator:
        assert operator.note(audit={"event": "named"}, once="decision 1")
    finish(ledger, held, "1")
    assert [json.loads(line) for _, line in ledger.audit_after(0, 10)] == [{"event": "named"}, {"path": "a.tif"}]


def test_file_that_kills_the_process_reaches_quarantine(path: Path) -> None:
    code = (
        "import os, sys, pathlib; from semwatch.store.ledger import Ledger\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1]))\n"
        "held = ledger.claim('tool', 'a.tif', sha256='ab', stamp=(7, 1, None, None), now_utc='2025-03-01T08:00:00Z')\n"
        "if held.attempts < 3: os.kill(os.getpid(), 9)\n"
        "ledger.quarantine(held, 'killed the process', audit={}, now_utc='2025-03-01T08:00:00Z')\n"
    )
    statuses = []
    for _ in range(4):
        with start(code, path) as child:
            statuses.append(child.wait(20))
    assert statuses == [-signal.SIGKILL] * 3 + [0]
    with Ledger(path) as ledger:
        assert [work.attempts for work in ledger.listing("QUARANTINED")] == [3]


WORKER = """
import hashlib, os, random, sys, time
from pathlib import Path
from semwatch.store.ledger import Ledger, OutboxItem
from semwatch.store.unknown_features import UnknownFeatures
from semwatch.system.files import Stamp
ledger_path, published, n, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng, now = random.Random(seed), "2025-03-01T08:00:00Z"
stream = os.open(published, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
with Ledger(ledger_path) as ledger:
    print("open", flush=True)
    for i in sorted(range(n), key=lambda _: rng.random()):
        name, sha = f"{i}.tif", hashlib.sha256(str(i // 2).encode()).hexdigest()  # every content lies there twice
        if ledger.settled("tool", [(name, Stamp(i, i))]):
            continue
        held = ledger.claim("tool", name, sha256=sha, stamp=Stamp(i, i), now_utc=now)
        if held.is_mine:
            time.sleep(rng.random() * 0.002)
            if rng.random() < 0.1:
                ledger.give_back(held, "away")
                continue
            messages = [OutboxItem("results", f"{sha}:{k}", b"x" * 5000) for k in range(3)]
            ledger.finish(held, outbox=messages, audit={"sha256": sha}, now_utc=now)
        if rng.random() < 0.2:
            batch = ledger.unpublished(5)
            for _, item in batch:
                os.write(stream, item.id.encode() + b"\\n")
            ledger.mark_published([seq for seq, _ in batch])
"""


def test_thirty_kills_lose_nothing_and_double_nothing(path: Path, tmp_path: Path) -> None:
    rng, n, published = random.Random(5), 400, tmp_path / "published"
    n_killed = 0
    for seed in range(30):
        with start(WORKER, path, published, n, seed) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(rng.random() * 0.03)
            child.kill()
            n_killed += child.wait(20) == -signal.SIGKILL
    assert n_killed >= 20
    with Ledger(path, read_only=True) as reader:
        n_done_before = reader.counts()["DONE"]
    for seed in range(100, 104):  # given back at random: a few more passes settle all
        with start(WORKER, path, published, n, seed) as child:
            assert child.wait(60) == 0
    shas = {sha(str(i)) for i in range(n // 2)}
    with Ledger(path) as ledger:
        assert 0 < n_done_before <= len(shas)
        assert ledger.counts() == {"SEEN": 0, "CLAIMED": 0, "DONE": len(shas), "QUARANTINED": 0}
        assert all(is_settled(ledger, "tool", f"{i}.tif", i, i) for i in range(n))
        assert 0 < sum(work.attempts for work in ledger.listing("DONE", n)) <= n_killed  # some died in between
        audited = [json.loads(line)["sha256"] for _, line in ledger.audit_after(0, 2 * n)]
        assert sorted(audited) == sorted(shas)
        waiting = [item.id for _, item in ledger.unpublished(4 * n)]
    ids = {f"{digest}:{k}" for digest in shas for k in range(3)}
    sent = published.read_text().split()
    assert len(waiting) == len(set(waiting))
    assert set(waiting) | set(sent) == ids
    assert len(sent) - len(set(sent)) <= 5 * n_killed  # a kill between sending and marking repeats one batch at most


# --- unknowns that a later head judges again -----------------------------------------------------------------------


def an_unknown(i: int, path: str = "a.tif", utc: str = T0) -> UnknownFeatures:
    return UnknownFeatures(
        f"{i:032x}", utc, "tool-a", path, "0" * 64, 0, i, (1, 2, 30, 40), "r" * 16, "1", b"\x00\x00\x80?" * 4
    )


def test_unknowns_come_with_their_work_and_by_whole_images(ledger: Ledger) -> None:
    mine = claim(ledger, "a.tif")
    found = [an_unknown(i) for i in range(3)] + [an_unknown(i, "b.tif") for i in range(3, 5)]
    ledger.finish(mine, outbox=[], audit={"event": "reviewed"}, now_utc=T0, unknowns=found)
    first = ledger.unknowns_since("", limit=1)
    assert first == found[:3]  # an image is never cut in two
    assert ledger.unknowns_since("", after=first[-1], limit=1) == found[3:]
    assert ledger.unknowns_since("", after=found[-1], limit=1) == []


def test_unknowns_of_work_that_could_not_be_finished_are_not_there(ledger: Ledger) -> None:
    mine = claim(ledger, "a.tif")
    with pytest.raises(ValueError, match="JSON"):
        ledger.finish(mine, outbox=[], audit={"score": float("nan")}, now_utc=T0, unknowns=[an_unknown(1)])
    assert ledger.unknowns_since("", limit=10) == []


def test_unknowns_leave_by_their_age_and_are_taken_over_once(ledger: Ledger) -> None:
    old, new = an_unknown(1, utc="2020-01-01T00:00:00Z"), an_unknown(2)
    assert not ledger.was_noted("an older release")
    assert ledger.add_unknowns([old, new], once="an older release")
    assert not ledger.add_unknowns([an_unknown(3)], once="an older release")
    assert ledger.was_noted("an older release")
    assert ledger.unknowns_since("2021-01-01T00:00:00Z", limit=10) == [new]
    assert ledger.forget_unknowns("2021-01-01T00:00:00Z") == 1
    assert ledger.unknowns_since("", limit=10) == [new]
