"""kill -9 at random moments while files arrive: every file has one result, one stream entry, one audit line."""

import json
import os
import random
import time
from pathlib import Path

import pytest
import redis

from daemon import SOURCE, Daemon, Site, make_site, png
from semwatch.store import audit
from semwatch.store.ledger import Ledger
from semwatch.streams.embedded_redis import EmbeddedRedis

MANY_IMAGES = int(os.environ.get("SEMWATCH_CRASH_IMAGES", "60"))
MANY_KILLS = int(os.environ.get("SEMWATCH_CRASH_KILLS", "8"))
SEED = 20260101


DIES_ON_POISON = """
import os, sys, time
from semwatch.__main__ import main
from semwatch.line import pipeline

def review(data, *, path, real=pipeline.review, **rest):
    if path == "poison.png":
        time.sleep(0.3)  # until its neighbours are in flight
        os._exit(9)
    time.sleep(0.6)  # still in flight when it dies
    return real(data, path=path, **rest)

pipeline.review = review
main()
"""


def test_file_that_kills_the_process_costs_its_neighbours_one_attempt_at_most(tmp_path, tiny_repository) -> None:
    """What had an attempt is tried alone, so whoever dies on it dies alone."""
    limits = {"min_free_mb": 0, "in_flight": 3, "max_attempts": 3}
    site = make_site(tmp_path / "site", tiny_repository, limits=limits)
    for age, name in enumerate(("a.png", "b.png", "poison.png")):  # the poison is the oldest, so it is tried first
        os.utime(site.put(name, png(age)), (1e9 - age, 1e9 - age))
    for _ in range(3):
        with Daemon(site, program=("-c", DIES_ON_POISON)) as daemon:
            assert daemon.process.wait(60) == 9
    with Daemon(site, program=("-c", DIES_ON_POISON)) as daemon:
        daemon.wait_for(lambda: len(site.reviews()) == 2)
        assert daemon.stop() == 0
    assert list(site.reasons()) == ["poison.png.reason.json"]
    with Ledger(site.state / "ledger.sqlite", read_only=True) as ledger:
        attempts = {work.path: work.attempts for work in ledger.listing("DONE")}
    assert attempts == {"a.png": 1, "b.png": 1}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("n_images", "n_kills"), [(24, 4), pytest.param(MANY_IMAGES, MANY_KILLS, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_nothing_is_lost_and_nothing_doubled(
    tmp_path: Path, tiny_repository: Path, n_images: int, n_kills: int
) -> None:
    repository = Path(os.environ.get("SEMWATCH_CRASH_REPOSITORY", tiny_repository))
    with EmbeddedRedis(tmp_path / "redis") as server:
        # The kills are the test's, not the files': attempts must not run out.
        site = make_site(
            tmp_path / "site", repository, redis_url=server.url, limits={"min_free_mb": 0, "max_attempts": n_kills + 1}
        )
        n_in_flight = _kill_again_and_again(site, n_images, n_kills)
        with Daemon(site) as daemon:
            daemon.wait_ready()
            daemon.wait_for(lambda: len(site.reviews()) >= n_images, 900)
            assert daemon.stop() == 0
        _check(site, redis.Redis.from_url(server.url), n_images)
    print(f"\n{n_kills} kills, {n_in_flight} of them with work in flight; {n_images} files, {n_images} results")


def _kill_again_and_again(site: Site, n_images: int, n_kills: int) -> int:
    rng = random.Random(SEED)
    waiting = list(range(n_images))
    n_in_flight = 0
    for kill in range(n_kills):
        share = len(waiting) if kill == n_kills - 1 else n_images // n_kills
        with Daemon(site) as daemon:
            if rng.random() < 0.8:  # the others are killed while starting
                daemon.wait_ready()
            moment = time.monotonic() + rng.uniform(0.0, 0.6)
            while time.monotonic() < moment:
                if share and waiting:
                    index = waiting.pop()
                    site.put(f"lot{index % 3}/{index}.png", png(index))
                    share -= 1
                time.sleep(0.005)
            daemon.kill()
        n_in_flight += "CLAIMED" in _states(site)
    for index in waiting:
        site.put(f"lot{index % 3}/{index}.png", png(index))
    return n_in_flight


def _states(site: Site) -> set[str]:
    import sqlite3
    from contextlib import closing

    path = site.state / "ledger.sqlite"
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path)) as db:
        return {row[0] for row in db.execute("SELECT DISTINCT state FROM work")}


def _check(site: Site, client: "redis.Redis", n_images: int) -> None:
    names = {p.relative_to(site.results).as_posix().removesuffix(".review.json") for p in site.reviews()}
    assert names == {f"lot{index % 3}/{index}.png" for index in range(n_images)}
    assert site.reasons() == {}
    assert _states(site) == {"DONE"}
    assert not [p for p in site.results.rglob("*") if ".tmp" in p.name or "partial" in p.name]
    log = site.state / "audit.jsonl"
    assert audit.verify(log, expected_last_seq=n_images).ok
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == sorted(names)
    for stream in ("semwatch:results", "semwatch:unknowns"):
        ids = [fields[b"id"] for _, fields in client.xrange(stream)]
        assert len(ids) == len(set(ids))
    summaries = [json.loads(fields[b"meta"]) for _, fields in client.xrange("semwatch:results")]
    assert sorted(summary["path"] for summary in summaries) == sorted(names)
    assert {summary["source"] for summary in summaries} == {SOURCE}
