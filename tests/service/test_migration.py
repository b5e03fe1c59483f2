"""A site that the commit before the rooms left starts under this house, and nothing of it is lost.

The figures of ``site_before`` are what the old code itself made of the site.
"""

import json
import socket
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import site_before as before
from daemon import Daemon
from daemon import Site as DaemonSite
from semwatch.classes import clusters
from semwatch.errors import ConfigError
from semwatch.operations import decide
from semwatch.service import migration
from semwatch.settings.site import load_site
from semwatch.store import audit, results
from semwatch.store.ledger import Ledger
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff
from semwatch.streams.unknowns import connect
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.retrain import Outcome, run_cycle


@dataclass
class After:
    """What was found after the daemon's first start under this house, and after the first cycle."""

    site: Path
    work: dict[str, int]
    streams: dict[str, int]
    n_unpublished: int
    wishes: list[str]
    audit: audit.AuditReport
    outcome: Outcome
    archive: dict[str, int]
    n_unknowns: int
    found: clusters.Clusters
    taken_over: int
    log: str


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return db.execute(sql).fetchall()


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Iterator[After]:
    folder = tmp_path_factory.mktemp("before")
    with EmbeddedRedis(folder / "redis") as server, connect(server.url) as client:
        folder = before.unpack(folder / "unpacked", redis_url=server.url)
        before.restore(folder.parent, client, learner=f"retrain-{socket.gethostname()}")
        ledger, handoff = folder / "state/ledger.sqlite", Handoff(client)

        def work() -> dict[str, int]:
            return dict(rows(ledger, "SELECT state, count(*) FROM work GROUP BY state"))

        def n_unpublished() -> int:
            return int(rows(ledger, "SELECT count(*) FROM outbox")[0][0])

        site = load_site(folder / "site.yaml")
        with Daemon(DaemonSite(folder)) as daemon:
            daemon.wait_ready()
            daemon.wait_for(lambda: work() == before.AFTER_START["work"] and n_unpublished() == 0, timeout_s=60)
            daemon.wait_for(lambda: handoff.classes() is not None)
            streams = {key: client.xlen(key) for key in before.STREAMS}
            wishes = [wish.sentence for wish in handoff.wishes().values()]
            state, left = work(), n_unpublished()
            outcome = run_cycle(site)
            daemon.stop()
            log = daemon.log()
        with Archive(site.learning_dir / ARCHIVE, read_only=True) as archive:
            counts = {str(name): n for name, n in archive.counts().items() if n}
        yield After(
            site=folder, work=state, streams=streams, n_unpublished=left, wishes=wishes,
            audit=audit.verify(folder / "state/audit.jsonl"), outcome=outcome, archive=counts,
            n_unknowns=client.xlen("semwatch:unknowns"), found=decide.found_classes(site),
            taken_over=rows(ledger, "SELECT count(*) FROM unknowns")[0][0], log=log,
        )  # fmt: skip


def test_all_work_is_finished_and_all_records_arrive(after: After) -> None:
    assert after.work == before.AFTER_START["work"]
    streams = before.AFTER_START["streams"]
    refused = {"semwatch:results": streams["semwatch:results"] + 1}  # the file that was refused has a summary now
    assert after.streams == {**streams, **refused}
    assert after.n_unpublished == 0


def test_results_keep_their_revisions_and_none_is_doubled(after: After) -> None:
    found = [results.read(path) for path in (after.site / "results").rglob("*.review.json")]
    counts = Counter((f"{record.source}/{record.path}", record.revision) for record in found)
    assert set(counts.values()) == {1}
    for image, revision in before.REVISIONS.items():
        assert {kept for name, kept in counts if name == image} >= set(range(1, revision + 1))


def test_audit_log_goes_on_unbroken_and_no_head_is_published_twice_in_it(after: After) -> None:
    assert after.audit.ok
    assert after.audit.n_lines >= before.AFTER_START["audit lines"]
    lines = [json.loads(line) for line in (after.site / "state/audit.jsonl").read_text().splitlines()]
    published = [line["utc"] for line in lines if line["event"] == "head published"]
    assert len(published) == len(set(published)) == 3  # two of the old house, one of this


def test_wishes_leave_their_file_for_redis_and_are_answered_by_the_cycle(after: After) -> None:
    assert after.wishes == list(before.WISHES)
    assert not (after.site / "state/learning" / migration.WANTED).exists()


def test_unknowns_of_the_archive_can_be_judged_again(after: After) -> None:
    assert after.taken_over >= sum(before.ARCHIVE.values())


def test_cycle_learns_what_the_old_one_would_have_and_applies_both_decisions(after: After) -> None:
    assert after.outcome.sentence == before.AFTER_CYCLE["outcome"]
    assert after.archive == before.AFTER_CYCLE["archive"]
    assert after.n_unknowns == before.AFTER_CYCLE["unknowns"]
    assert not clusters.pending(after.found)
    known = {k.id: (k.state, k.label) for k in after.found.clusters}
    assert {id_: known[id_] for id_ in ("novel-1", "novel-3", "novel-4", "novel-5")} == {
        id_: before.CLUSTERS[id_][:2] for id_ in ("novel-1", "novel-3", "novel-4", "novel-5")
    }


def test_both_sides_remember_the_found_classes_in_files_of_their_own(after: After) -> None:
    assert clusters.read(after.site / "state/learning") == after.found
    assert clusters.read(after.site / "state") == after.found


def test_a_second_start_takes_nothing_over_again(after: After) -> None:
    with Ledger(after.site / "state/ledger.sqlite") as ledger:
        site = load_site(after.site / "site.yaml")
        n_waiting = ledger.n_unpublished()
        migration.take_over_unknowns(site, ledger)
        migration.take_over_wishes(site, ledger)
        assert ledger.n_unpublished() == n_waiting
    assert rows(after.site / "state/ledger.sqlite", "SELECT count(*) FROM unknowns")[0][0] == after.taken_over


def test_way_back_is_refused_in_words(tmp_path: Path) -> None:
    """The old house knows layout 2 and refuses what is newer by the same rule as this one does."""
    with Ledger(tmp_path / "ledger.sqlite"):
        pass
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (5,)
        db.execute("PRAGMA user_version = 6")
        db.commit()
    with pytest.raises(ConfigError, match="newer"):
        Ledger(tmp_path / "ledger.sqlite")
