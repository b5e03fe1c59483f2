"""The daemon as a process: real files, real Redis, real SIGTERM; tiny models, for it is the plumbing that is tested."""

import json
import os
import shutil
import stat
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import redis

import tiny_models
from daemon import SOURCE, Daemon, Site, make_site, png
from semwatch.models import model_repository
from semwatch.store import audit
from semwatch.streams import records
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.system import child_server
from semwatch_training.publishing.export import publish_head


@pytest.fixture
def server(tmp_path: Path):
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


def flat(level: int) -> bytes:
    """An image of one gray level."""
    return bytes(cv2.imencode(".png", np.full((96, 96), level, np.uint8))[1])


@dataclass(frozen=True)
class Worked:
    """What a daemon left that found five images and a broken one, and was stopped after them."""

    site: Site
    dropped: dict[Path, os.stat_result]
    """The files as they were before it started."""
    metrics: str


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path) -> Worked:
    """One run for all tests that look at what an uneventful run leaves."""
    port = child_server.free_port()
    site = make_site(tmp_path_factory.mktemp("worked") / "site", tiny_repository, metrics={"port": port})
    files = [site.put(f"lot/{index}.png", png(index)) for index in range(5)]
    files.append(site.put("broken.png", b"no image"))
    dropped = {file: file.stat() for file in files}
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: (log := daemon.log()).count(" defects, ") == 5 and "broken.png quarantined" in log)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        assert daemon.stop() == 0
    return Worked(site, dropped, text)


def test_no_file_at_all_is_ready_and_stops_cleanly(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        assert daemon.stop() == 0
    assert site.reviews() == []


def test_one_file_gives_result_overlay_table_records_and_audit_line(tmp_path, tiny_repository, server) -> None:
    site = make_site(tmp_path / "site", tiny_repository, redis_url=server.url, name="fab3-ws7")
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("lot1/a.png", png(1))
        daemon.wait_for((site.results / "lot1/lot.csv").exists)
        assert daemon.stop() == 0
    record = json.loads((site.results / "lot1/a.png.review.json").read_text())
    assert (record["site"], record["source"], record["path"]) == ("fab3-ws7", SOURCE, "lot1/a.png")
    (line,) = (json.loads(text) for text in (site.state / "audit.jsonl").read_text().splitlines())
    assert (line["site"], line["model_hashes"]) == ("fab3-ws7", record["model_hashes"])
    assert (site.results / "lot1/a.png.overlay.png").stat().st_size > 0
    assert "a.png" in (site.results / "lot1/lot.csv").read_text()
    client = redis.Redis.from_url(server.url)
    ((_, fields),) = client.xrange("semwatch:results")
    summary = json.loads(fields[b"meta"])
    assert (summary["site"], summary["model_hashes"]) == ("fab3-ws7", record["model_hashes"])
    n_unexplained = sum(
        defect["verdict"]["kind"] in ("unknown", "non-decidable")
        for page in record["pages"]
        for defect in page["defects"]
    )
    assert client.xlen("semwatch:unknowns") == n_unexplained
    report = audit.verify(site.state / "audit.jsonl", expected_last_seq=1)
    assert report.ok


def test_named_defects_of_little_support_go_to_learning_with_their_names(tmp_path, tiny_repository, server) -> None:
    models = shutil.copytree(tiny_repository, tmp_path / "models")
    width = model_repository.read_meta(models, "encoder", 1).outputs["features"].shape[0]
    sure, crops = tiny_models.head(width, tiny_models.encoder_graph().frozen_width), tiny_models.blobs(width)
    sure.get_buffer("weight").mul_(100)  # the tiny head gives every class about a third
    publish_head(sure, models, encoder_version=1, provenance={}, bank=crops, golden=crops)
    rule = {"significance": 1e-6, "decide_confidence": 0.5, "doubtful_significance": 0.9}
    recipe = {"name": "test", "gate": {"threshold": 0.0}, "unknown": rule}
    site = make_site(tmp_path / "site", models, redis_url=server.url, recipe=recipe)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        for index in range(4):
            site.put(f"lot1/{index}.png", png(index))
        daemon.wait_for(lambda: daemon.log().count(" defects, ") == 4)
        assert daemon.stop() == 0
    verdicts = [
        defect["verdict"]
        for file in site.reviews()
        for page in json.loads(file.read_text())["pages"]
        for defect in page["defects"]
    ]
    doubtful = [v["label"] for v in verdicts if v["kind"] == "known" and v["nearest"][0]["p_value"] <= 0.9]
    entries = redis.Redis.from_url(server.url).xrange("semwatch:doubtful")
    assert doubtful, verdicts
    assert sorted(records.decode_doubtful(fields).label for _, fields in entries) == sorted(doubtful)


def test_the_drop_folder_is_only_read(worked) -> None:
    for file, before in worked.dropped.items():
        after = file.stat()
        assert (before.st_mtime_ns, before.st_ino, before.st_mode) == (after.st_mtime_ns, after.st_ino, after.st_mode)
    assert {path for path in worked.site.drop.rglob("*") if path.is_file()} == set(worked.dropped)


def test_files_that_lay_there_before_the_start_are_reviewed(worked) -> None:
    assert [path.name for path in worked.site.reviews()] == [f"{index}.png.review.json" for index in range(5)]
    assert list(worked.site.reasons()) == ["broken.png.reason.json"]


def test_results_are_not_for_everyone_to_write(worked) -> None:
    for path in (*worked.site.results.rglob("*"), *worked.site.state.rglob("*")):
        assert not path.stat().st_mode & stat.S_IWOTH


def test_metrics_tell_what_happened(worked) -> None:
    assert f'semwatch_quarantined_total{{source="{SOURCE}"}} 1.0' in worked.metrics
    assert 'semwatch_model_version{model="detector"} 1.0' in worked.metrics
    assert "semwatch_stage_seconds" in worked.metrics


def test_broken_files_are_quarantined_and_the_line_goes_on(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    good = png(1)
    site.put("empty.png", b"")
    site.put("text.png", b"these are not pixels")
    site.put("cut.png", good[: len(good) // 2])
    site.put("small.png", png(2, side=8))
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: len(site.reasons()) == 4)
        site.put("good.png", good)
        daemon.wait_for(lambda: len(site.reviews()) == 1)
        assert daemon.stop() == 0
    assert all(len(reason) > 10 for reason in site.reasons().values())
    lines = [json.loads(line) for line in (site.state / "audit.jsonl").read_text().splitlines()]
    assert sorted(line["event"] for line in lines) == ["quarantined"] * 4 + ["reviewed"]
    with Daemon(site) as daemon:  # and they are not tried again
        site.put("later.png", png(3))  # whatever is tried again is older, and so comes before it
        daemon.wait_for(lambda: len(site.reviews()) == 2)
        assert daemon.stop() == 0
    lines = [json.loads(line) for line in (site.state / "audit.jsonl").read_text().splitlines()]
    assert [(line["event"], line["path"]) for line in lines[5:]] == [("reviewed", "later.png")]


def test_blank_frames_are_no_image_and_alarm_after_the_fifth(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Daemon(site) as daemon:
        for level in range(5):
            site.put(f"lot/{level}.png", flat(level))
        daemon.wait_for(lambda: "pages hold no image" in daemon.log())
        assert daemon.stop() == 0
    pages = [page for path in site.reviews() for page in json.loads(path.read_text())["pages"]]
    assert [(page["verdict"], page["image_score"]) for page in pages] == [("no-image", None)] * 5
    assert "quality: blank 0 (limit 8)" in daemon.log()


def test_blank_frames_are_quarantined_where_the_recipe_says_so(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    recipe = site.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\nquality: {no_image: quarantine}\n")
    with Daemon(site) as daemon:
        site.put("black.png", flat(0))
        daemon.wait_for(lambda: "black.png quarantined: page 0 holds no image: blank 0 (limit 8)" in daemon.log())
        assert daemon.stop() == 0
    assert site.reviews() == []


def test_same_content_twice_is_one_review_and_a_logged_duplicate(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Daemon(site) as daemon:
        site.put("a.png", png(1))
        daemon.wait_for(lambda: len(site.reviews()) == 1)
        site.put("copy.png", png(1))
        daemon.wait_for(lambda: "copy.png has the content of a.png" in daemon.log())
        daemon.stop()
    assert [p.name for p in site.reviews()] == ["a.png.review.json"]


def test_new_content_under_an_old_name_is_new_work_and_the_old_result_is_kept(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Daemon(site) as daemon:
        site.put("a.png", png(1))
        daemon.wait_for(lambda: len(site.reviews()) == 1)
        first = json.loads(site.reviews()[0].read_text())["sha256"]
        site.put("a.png", png(2))
        daemon.wait_for(lambda: len(site.reviews()) == 2)
        daemon.stop()
    assert (site.results / f"a.png.{first[:8]}.review.json").exists()
    assert json.loads((site.results / "a.png.review.json").read_text())["sha256"] != first


def test_redis_away_loses_nothing_and_doubles_nothing(tmp_path, tiny_repository, server) -> None:
    site = make_site(tmp_path / "site", tiny_repository, redis_url=server.url)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("before.png", png(0))
        daemon.wait_for(lambda: len(site.reviews()) == 1)
        server.stop()
        for index in range(1, 6):
            site.put(f"{index}.png", png(index))
        daemon.wait_for(lambda: len(site.reviews()) == 6)
        server.start()
        client = redis.Redis.from_url(server.url)
        daemon.wait_for(lambda: client.xlen("semwatch:results") == 6, 90)
        assert daemon.stop() == 0
    paths = [json.loads(fields[b"meta"])["path"] for _, fields in client.xrange("semwatch:results")]
    assert sorted(paths) == sorted(["before.png", *(f"{index}.png" for index in range(1, 6))])


def test_files_wait_in_the_folder_once_the_outbox_is_full(tmp_path, tiny_repository, server) -> None:
    redis_settings = {"url": server.url, "timeout_s": 1, "max_unpublished": 1}
    site = make_site(tmp_path / "site", tiny_repository, redis=redis_settings)
    server.stop()
    with Daemon(site) as daemon:
        daemon.wait_ready()
        for index in range(8):
            site.put(f"{index}.png", png(index))
        daemon.wait_for(lambda: "paused: Redis away" in daemon.notices(1))
        n_reviewed = len(site.reviews())
        assert 1 <= n_reviewed < 8
        server.start()
        daemon.wait_for(lambda: len(site.reviews()) == 8, 90)


def test_nearly_full_disk_pauses_the_line_in_words(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository, limits={"min_free_mb": 10**9})
    with Daemon(site) as daemon:
        daemon.wait_ready()
        site.put("a.png", png(1))
        daemon.wait_for(lambda: "disk nearly full" in daemon.notices(1))
        assert site.reviews() == []
        assert daemon.stop() == 0


def test_share_that_vanishes_and_returns_is_picked_up_again(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository, watched={"polling": True}, poll_s=0.2)
    with Daemon(site) as daemon:
        site.put("a.png", png(1))
        daemon.wait_for(lambda: len(site.reviews()) == 1)
        site.drop.rename(site.folder / "away")
        daemon.wait_for(lambda: "is missing" in daemon.log())
        (site.folder / "away").rename(site.drop)
        site.put("b.png", png(2))
        daemon.wait_for(lambda: len(site.reviews()) == 2)


def test_results_folder_that_refuses_keeps_the_file_and_recovers(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    site.results.parent.mkdir()
    site.results.write_text("a file where a folder should be")
    with Daemon(site) as daemon:
        site.put("a.png", png(1))
        daemon.wait_for(lambda: "waits in its folder" in daemon.log())
        site.results.unlink()
        daemon.wait_for(lambda: len(site.reviews()) == 1)


def test_second_daemon_on_one_state_folder_is_refused_with_exit_code_2(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Daemon(site) as first:
        first.wait_ready()
        with Daemon(site) as second:
            assert second.process.wait(60) == 2
        assert first.process.poll() is None


def test_missing_models_are_exit_code_3_and_say_how_to_build(tmp_path) -> None:
    site = make_site(tmp_path / "site", tmp_path / "nothing")
    with Daemon(site) as daemon:
        assert daemon.process.wait(60) == 3
        assert "semwatch-train build" in daemon.log()


def test_recipe_that_pins_an_older_version_gets_it(tmp_path, tiny_repository) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    meta = model_repository.read_meta(repository, "detector", 1)
    model_repository.publish(repository, meta, repository / "detector/1/model.onnx")
    recipe = {"name": "pinned", "gate": {"threshold": 0.0}, "pins": {"detector": 1}}
    site = make_site(tmp_path / "site", repository, recipe=recipe)
    with Daemon(site) as daemon:
        site.put("a.png", png(1))
        daemon.wait_for(lambda: len(site.reviews()) == 1)
    assert json.loads(site.reviews()[0].read_text())["model_versions"]["detector"] == 1


def test_watchdog_is_fed_from_the_loop(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Daemon(site, {"WATCHDOG_USEC": "1000000"}) as daemon:
        daemon.wait_ready()
        beats, end = 0, time.monotonic() + 3
        while beats < 4 and time.monotonic() < end:
            beats += "WATCHDOG=1" in daemon.notices(0.2)
        assert beats == 4


def test_results_folder_that_is_a_file_is_exit_code_2_in_words(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    (site.folder / "results").write_text("not a folder")
    with Daemon(site) as daemon:
        assert daemon.process.wait(60) == 2
        assert "cannot be made" in daemon.log()


def test_stop_that_comes_during_the_start_is_clean_and_a_second_one_forces(tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    for index in range(50):
        site.put(f"{index}.png", png(index))
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: "in review" in daemon.notices(0.1) or daemon.log() != "")
        start = time.monotonic()
        daemon.process.terminate()
        daemon.process.terminate()
        assert daemon.process.wait(10) in (0, 128 + 15)
        assert time.monotonic() - start < 5
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: len(site.reviews()) == 50)
        assert daemon.stop() == 0


def test_hung_review_does_not_hold_the_stop_beyond_its_bound(tmp_path, tiny_repository) -> None:
    """The daemon as a process whose reviews never end: SIGTERM still ends it, and the file is reviewed next time."""
    limits = {"min_free_mb": 0, "stop_timeout_s": 1}
    site = make_site(tmp_path / "site", tiny_repository, limits=limits)
    site.put("a.png", png(1))
    hangs = tmp_path / "hangs"
    hang = (
        "import pathlib, sys, threading; from semwatch.line import pipeline; from semwatch.__main__ import main;"
        f"pipeline.review = lambda *_, **__: (pathlib.Path({str(hangs)!r}).touch(), threading.Event().wait()); main()"
    )
    with Daemon(site, program=("-c", hang)) as daemon:
        daemon.wait_for(hangs.exists)
        daemon.process.terminate()
        assert daemon.process.wait(8) == 0
    assert site.reviews() == []
    with Daemon(site) as daemon:
        daemon.wait_for(lambda: len(site.reviews()) == 1)
