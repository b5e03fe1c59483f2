"""kill -9 at random moments while a lot comes, is done, and is revised: one KLARF a revision, nothing lost or twice."""

import hashlib
import json
import random
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from daemon import Daemon, Site, make_site
from klarf_lots import KLARF, RECIPE, image, klarf, name
from semwatch import klarf as library
from semwatch.store import audit
from semwatch.store.ledger import LEDGER, Ledger
from semwatch.store.manifests import KEPT
from semwatch.system.clock import utc_now

SEED = 20261130
N_MISSING, N_LATE = 5, 2


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("n_defects", "n_kills"), [(30, 4), pytest.param(500, 20, marks=pytest.mark.slow)])
def test_lot_that_is_killed_again_and_again_has_one_klarf_for_each_revision(
    tmp_path: Path, tiny_repository: Path, n_defects: int, n_kills: int
) -> None:
    """A lot with images and references, 5 missing, 2 late, 1 corrupt."""
    recipe = {**RECIPE, "klarf": {**KLARF, "target_column": "AUTOOFFSEMCLASS", "no_verdict_code": 43}}
    limits = {"min_free_mb": 0, "max_attempts": n_kills + 1}
    site = make_site(tmp_path / "site", tiny_repository, recipe=recipe, limits=limits)
    rng = random.Random(SEED)
    defects = list(range(1, n_defects + 1))
    missing, late, corrupt = defects[:N_MISSING], defects[N_MISSING : N_MISSING + N_LATE], defects[-1]
    arriving = [(name(n), image(n, side=64)) for n in defects if n not in (*missing, *late, corrupt)]
    arriving += [(name(corrupt), image(corrupt, side=64)[:500])]
    rng.shuffle(arriving)
    arriving.insert(n_defects // 3, ("lot7.001", klarf(defects)))
    seen: dict[str, str] = {}

    begin = time.monotonic()
    _storm(site, rng, arriving, n_kills // 2, seen)
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: _states(site) == {"DONE": n_defects - N_MISSING - N_LATE, "QUARANTINED": 1}, 1500)
        daemon.kill()
    assert _klarfs(site) == {}
    _let_the_deadline_pass(site)
    _storm(site, rng, [], n_kills // 4, seen)
    _until_revision(site, 1, seen)
    _storm(site, rng, [(name(n), image(n, side=64)) for n in late], n_kills - n_kills // 2 - n_kills // 4, seen)
    _until_revision(site, 2, seen)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        time.sleep(2.0)
        assert daemon.stop() == 0
    print(f"\n{n_defects} defects, {n_kills} kills, {time.monotonic() - begin:.0f} s")

    assert _klarfs(site) == seen  # what was there once has never changed, and nothing has gone
    assert sorted(seen) == ["lot7.r1.001", "lot7.r2.001"]
    _check(site, defects, missing, late, corrupt)


def _storm(
    site: Site, rng: random.Random, arriving: list[tuple[str, bytes]], n_kills: int, seen: dict[str, str]
) -> None:
    """Start the daemon and kill it at a random moment, again and again, while files arrive."""
    left = list(arriving)
    for kill in range(n_kills):
        share = len(left) if kill == n_kills - 1 else len(arriving) // n_kills
        with Daemon(site) as daemon:
            if rng.random() < 0.8:  # the others are killed while starting
                daemon.wait_ready()
            moment = time.monotonic() + rng.uniform(0.0, 2.0)
            while time.monotonic() < moment:
                if share and left:
                    file, data = left.pop(0)
                    site.put(f"lot7/{file}", data)
                    share -= 1
                time.sleep(0.005)
            daemon.kill()
        _note_new(site, seen)
    for file, data in left:
        site.put(f"lot7/{file}", data)


def _until_revision(site: Site, revision: int, seen: dict[str, str]) -> None:
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: len(_delivered(site)) == revision, 300)
        daemon.kill()
    _note_new(site, seen)


def _note_new(site: Site, seen: dict[str, str]) -> None:
    """Whatever lies there whole stays as it is from then on."""
    for file, sha256 in _klarfs(site).items():
        assert seen.setdefault(file, sha256) == sha256


def _klarfs(site: Site) -> dict[str, str]:
    found = site.results.rglob("*.r*.001")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _delivered(site: Site) -> list[Any]:
    if not (site.state / LEDGER).exists():
        return []
    with Ledger(site.state / LEDGER, read_only=True) as ledger:
        return ledger.manifests.done_after(0)


def _states(site: Site) -> dict[str, int]:
    if not (site.state / LEDGER).exists():
        return {}
    with closing(sqlite3.connect(site.state / LEDGER)) as db:
        return dict(db.execute("SELECT state, count(*) FROM work GROUP BY state").fetchall())


def _let_the_deadline_pass(site: Site) -> None:
    time.sleep(1.1)  # the times of the ledger have whole seconds
    with closing(sqlite3.connect(site.state / LEDGER)) as db, db:
        db.execute("UPDATE manifests SET due_utc = ?", (utc_now(),))


def _check(site: Site, defects: list[int], missing: list[int], late: list[int], corrupt: int) -> None:
    record = json.loads((site.results / "lot7/lot7.001.lot.json").read_text())
    assert record["revision"] == 2
    assert record["missing"] == [f"lot7/{name(n)}" for n in missing]
    assert record["late"] == [f"lot7/{name(n)}" for n in late]
    said = {one["id"]: one for one in record["wafers"][0]["defects"]}
    assert list(said) == defects
    assert {n for n, one in said.items() if one["verdict"] is None} == {*missing, corrupt}
    assert all(one["verdict"] or one["reason"] for one in said.values())
    for revision, without in ((1, {*missing, *late, corrupt}), (2, {*missing, corrupt})):
        (wafer,) = library.read(site.results / f"lot7/lot7.r{revision}.001").wafers
        codes = {one.id: one["AUTOOFFSEMCLASS"] for one in wafer.defects}
        assert list(codes) == defects
        assert {n for n, code in codes.items() if code == 43} == without
    log = site.state / "audit.jsonl"
    assert audit.verify(log).ok
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    events = Counter((line["event"], line["path"]) for line in lines)
    assert max(events[at] for at in events if at[0] != "lot") == 1  # each image, and the KLARF, once
    assert [line["revision"] for line in lines if line["event"] == "lot"] == [1, 2]
    assert len(site.reviews()) == len(defects) - len(missing) - 1
    assert len(_delivered(site)) == 2
    assert [path.suffix for path in (site.state / KEPT).iterdir()] == [".klarf"]
    assert not [path for path in site.results.rglob("*") if path.name.endswith(".tmp")]
